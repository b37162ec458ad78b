"""Plug-ins that tests install: entry points in a folder on ``sys.path``, as an installed package has them."""

from pathlib import Path


def install(folder: Path, group: str, **values: str) -> Path:
    """Write the metadata of a package into ``folder``, with an entry point in ``group`` for each "module:attribute"."""
    metadata = folder / f"{group.replace('.', '_')}_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in values.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
