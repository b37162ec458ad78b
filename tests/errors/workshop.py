"""What the tables of wrong inputs are made of: a case, and the workshop that makes what is wrong for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CLASSIFICATION, CAUSAL = "tests/data/world_size.toml", "tests/data/causal_lm.toml"
BERT, LLAMA = "tests/data/tiny-bert", "tests/data/tiny-llama"


@dataclass(frozen=True)
class Wrong:
    """A wrong input, and the three things that its message must hold; "{tmp}" and "{made}" stand for folders."""

    arguments: Callable[[Workshop], list[str]]
    place: str
    value: str
    fix: str
    environment: Mapping[str, str] = field(default_factory=dict)
    """What stdout begins with, of work that was done before; nothing if it is empty."""
    without_gpu: bool = False
    """Whether it is wrong only where there is no GPU."""


@dataclass(frozen=True)
class Workshop:
    """Makes the input of one case in ``tmp``, from the good folders in ``made`` (see conftest.py)."""

    tmp: Path
    made: Path
    deepspeed_config: str = ""
    """Of the runs; empty for one process."""

    def train(self, *settings: str, run_file: str = CLASSIFICATION, verb: str = "train") -> list[str]:
        """The arguments of a run that would be good but for ``settings``."""
        good = (f"output_dir={self.tmp}/run", f"deepspeed_config={self.deepspeed_config}", "train.num_steps=4")
        return [verb, run_file, *_set(*good, *settings)]

    def causal(self, *settings: str, verb: str = "train") -> list[str]:
        return self.train(*settings, run_file=CAUSAL, verb=verb)

    def prune(self, *arguments: str, settings: tuple[str, ...] = ()) -> list[str]:
        out = () if "--out" in arguments else ("--out", f"{self.tmp}/pruned")
        return [*self.causal(*settings, verb="prune"), *out, *arguments]

    def file(self, name: str, content: str | bytes) -> str:
        """The path of a file with ``content``."""
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def rows(self, name: str, *rows: dict[str, Any]) -> str:
        """The path of a JSONL file."""
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))

    def below_a_file(self, name: str) -> str:
        """A path where root cannot make a folder either."""
        return f"{self.file('plain-file', '')}/{name}"

    def copied(self, name: str) -> Path:
        """A copy of one of the good folders, to damage."""
        return Path(shutil.copytree(self.made / name, self.tmp / name, symlinks=True))

    def model(self, base: str = BERT, **config: Any) -> Path:
        """A copy of a model folder with other values in its config; None takes one out."""
        folder = Path(shutil.copytree(base, self.tmp / "model"))
        path = folder / "config.json"
        table = {**json.loads(path.read_text()), **config}
        path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
        return folder

    def model_with(self, change: Callable[[dict[str, torch.Tensor]], object], base: str = BERT, **config: Any) -> Path:
        """The same with other weights: ``change`` changes them in place, by name."""
        folder = self.model(base, **config)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def damaged(self, name: str, pattern: str) -> Path:
        """A copy of a good folder in which the last byte of the one file that fits ``pattern`` is another."""
        folder = self.copied(name)
        (path,) = folder.glob(pattern)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return folder

    def without(self, name: str, *patterns: str) -> Path:
        """A copy of a good folder without the files and folders that fit."""
        folder = self.copied(name)
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return folder

    def filled(self, text: str) -> str:
        """``text`` with this workshop's folders for their names."""
        return text.replace("{tmp}", str(self.tmp)).replace("{made}", str(self.made)).replace("{here}", str(Path.cwd()))


def setting(*settings: str, verb: str = "train") -> Callable[[Workshop], list[str]]:
    """The arguments of a case whose run of the classification task has wrong ``settings``."""
    return lambda shop: shop.train(*(shop.filled(one) for one in settings), verb=verb)


def causal_setting(*settings: str, verb: str = "train") -> Callable[[Workshop], list[str]]:
    return lambda shop: shop.causal(*(shop.filled(one) for one in settings), verb=verb)


def words(*arguments: str) -> Callable[[Workshop], list[str]]:
    """Arguments as they are, but for the folders in them."""
    return lambda shop: [shop.filled(one) for one in arguments]


def _set(*settings: str) -> list[str]:
    return [word for one in settings for word in ("--set", one)]
