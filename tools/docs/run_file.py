"""Write docs/run-file.md and docs/run-file.schema.json from the settings classes and the docstrings of their fields."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from pst_ds.config.data import DataConfig, DataSource, EvalConfig
from pst_ds.config.methods import METHODS
from pst_ds.config.presets import DATA_PRESETS
from pst_ds.config.pst import Override, PSTConfig
from pst_ds.config.run import (
    CheckpointConfig,
    DistillationConfig,
    ModelConfig,
    PicturesConfig,
    PromptConfig,
    QuantizationConfig,
    RunConfig,
    TrainConfig,
)
from pst_ds.config.start import StartConfig
from pst_ds.config.tasks import TASKS
from pst_ds.config.toml import PRESETS
from pst_ds.config.tracking import TrackingConfig
from pst_ds.core.schedule import ScheduleConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE, SCHEMA = ROOT / "docs" / "run-file.md", ROOT / "docs" / "run-file.schema.json"
TABLES = {
    "": RunConfig, "model": ModelConfig, "data": DataConfig, "[data.sources]": DataSource, "train": TrainConfig,
    "start": StartConfig, "schedule": ScheduleConfig, "pst": PSTConfig, "[pst.overrides]": Override,
    "quantization": QuantizationConfig,
    "prompt": PromptConfig,
    "distillation": DistillationConfig, "eval": EvalConfig, "checkpoint": CheckpointConfig, "pictures": PicturesConfig,
    "tracking": TrackingConfig,
}  # fmt: skip
KINDS = {"string": "a string", "integer": "a whole number", "number": "a number", "boolean": "`true` or `false`"}
HEAD = """# The run file

One TOML file describes a run. Paths are relative to the working directory; `--set key=value` on the command line
overrides any setting (`--set train.num_steps=20`). An unknown key is an error that names the nearest known one, and the
resolved file is written to the run folder as `run.toml`. `pst.preset = "paper"` sets the paper's constants (no relative
magnitude, A and U from N(0, 1)), and `data.preset` those of a benchmark ([tasks.md](tasks.md)); settings in the file
win over both.

Editors that know TOML complete and check a run file by [run-file.schema.json](run-file.schema.json): the first line
`#:schema PATH/run-file.schema.json` tells Taplo and the editors that use it.

This page is written by `python -m tools.docs.run_file` from the code.
"""


def schema() -> dict[str, Any]:
    """The JSON schema of a run file (draft 2020-12)."""
    for cls in TABLES.values():
        cls.__pydantic_config__ = ConfigDict(use_attribute_docstrings=True, extra="forbid")  # type: ignore[attr-defined]
    table = TypeAdapter(RunConfig).json_schema()
    table["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for name, presets in (("PSTConfig", PRESETS), ("DataConfig", DATA_PRESETS)):
        preset = {"description": "Settings to start from.", "enum": list(presets), "type": "string"}
        table["$defs"][name]["properties"]["preset"] = preset
    for key, names, package in (
        ("task", TASKS, "pst_ds.data.tasks"), ("method", METHODS, "pst_ds.config.methods")
    ):  # fmt: skip
        setting = table["properties"][key]
        setting |= {"enum": list(names), "description": f"{setting['description']} {_choices(names, package)}"}
    table["$defs"]["DataConfig"].pop("required", None)  # a preset may have them
    return _in_markdown(table)


def _choices(names: Iterable[str], package: str) -> str:
    """The first lines of the files that the names stand for."""
    lines = {name: str(import_module(f"{package}.{name.replace('-', '_')}").__doc__).strip(".\n") for name in names}
    return "; ".join(f'"{name}": {line[0].lower()}{line[1:]}' for name, line in lines.items()) + "."


def _in_markdown(value: Any) -> Any:
    """``value`` without titles, and with sentences in one line and single backticks."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k != "title" or isinstance(v, dict)}
        return {
            k: " ".join(v.replace("``", "`").split()) if k == "description" else _in_markdown(v)
            for k, v in kept.items()
        }
    return [_in_markdown(item) for item in value] if isinstance(value, list) else value


def page(table: dict[str, Any]) -> str:
    sections = [HEAD]
    for name, cls in TABLES.items():
        one = table["$defs"][cls.__name__] if name else table
        title = f"## [{name}]" if name else "## Top level"
        summary = re.split(r"(?<=[.)]) (?=[A-Z])", one["description"])[0]
        rows = ["", title, "", summary, "", "| setting | value | default | |", "|---|---|---|---|"]
        rows += [
            _row(key, entry) for key, entry in one["properties"].items() if "$ref" not in entry and key != "preset"
        ]
        sections.append("\n".join(rows))
    return "\n".join(sections) + "\n"


def _row(name: str, entry: dict[str, Any]) -> str:
    default = (
        "" if entry.get("default", "") is None else json.dumps(entry["default"]) if "default" in entry else "required"
    )
    shown = f"`{default}`" if default not in ("", "required") else default
    return f"| `{name}` | {_kind(entry)} | {shown} | {entry.get('description', '')} |"


def _kind(entry: dict[str, Any]) -> str:
    if "enum" in entry:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in entry["enum"])
    if "anyOf" in entry:
        return " or ".join(_kind(option) for option in entry["anyOf"] if option.get("type") != "null")
    if entry.get("type") == "array":
        return "a list of tables" if "$ref" in entry["items"] else "a list of strings"
    return KINDS[entry["type"]]


if __name__ == "__main__":
    written = schema()
    SCHEMA.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(written), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} and {SCHEMA.relative_to(ROOT)} written\n")
