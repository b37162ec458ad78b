"""Write docs/reference/run-file.md and run-file.schema.json from the settings classes and their fields' docstrings."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pst_ds.additions.prompt import PromptSettings
from pst_ds.config.data import DATA_PRESETS, DataConfig, DataSource, EvalConfig
from pst_ds.config.methods import METHODS
from pst_ds.config.model import ModelConfig, QuantizationConfig
from pst_ds.config.one_shot import OneShotConfig
from pst_ds.config.pst import Override, PSTConfig
from pst_ds.config.run import CheckpointConfig, LayerStatisticsConfig, RunConfig, TrackingConfig
from pst_ds.config.tasks import TASKS
from pst_ds.config.toml import PRESETS
from pst_ds.config.train import DistillationConfig, FinetuneConfig, TrainConfig
from pst_ds.core.schedule import ScheduleConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE, SCHEMA = ROOT / "docs/reference/run-file.md", ROOT / "docs/reference/run-file.schema.json"
TABLES = {
    "": RunConfig, "model": ModelConfig, "data": DataConfig, "[data.sources]": DataSource, "train": TrainConfig,
    "finetune": FinetuneConfig, "start": OneShotConfig, "schedule": ScheduleConfig, "pst": PSTConfig,
    "[pst.overrides]": Override, "quantization": QuantizationConfig,
    "distillation": DistillationConfig, "eval": EvalConfig, "checkpoint": CheckpointConfig,
    "layer_statistics": LayerStatisticsConfig, "tracking": TrackingConfig, "additions.prompt": PromptSettings,
}  # fmt: skip
KINDS = {"string": "a string", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
GROUPS = {
    "The run and its model": ("", "model"),
    "Data": ("data", "[data.sources]"),
    "Training": ("train", "finetune", "distillation", "quantization", "additions.prompt"),
    "Pruning": ("schedule", "start", "pst", "[pst.overrides]"),
    "Evaluation, checkpoints and monitoring": ("eval", "checkpoint", "layer_statistics", "tracking"),
}
"""Headings of the page, and the sections of a run file whose settings follow them in one table."""
LONGEST = 120
"""Characters of a description on the page. The first sentence is always there; the schema has all of it."""
HEAD = """# The run file

```toml
#:schema docs/reference/run-file.schema.json
output_dir = "runs/mine"

[model]
path = "path/to/model"

[data]
train = "train.jsonl"
validation = "validation.jsonl"

[train]
num_epochs = 2

[schedule]
final_sparsity = 0.5
```

One TOML file describes a run; `pst-ds init` writes one for your model and data. Paths are relative to the working
directory. `--set train.num_steps=20` on the command line overrides a setting, by its name in the tables below. An
unknown setting is an error that suggests the nearest known one. The run folder keeps the resolved file as `run.toml`.

`pst.preset = "paper"` starts from the paper's constants, and `data.preset` from a benchmark's data settings
([Prepare data](../how-to/data.md)); settings in the file override both. [Choose a method](../how-to/methods.md)
compares the values of `method`.

The first line of the example lets editors with TOML support (Taplo, Even Better TOML) complete and check the file by
[run-file.schema.json](run-file.schema.json), which also has the full text of descriptions that are shortened here.
An empty default means "unset". This page is written by `python -m tools.docs.run_file` from the code.
"""


def schema() -> dict[str, Any]:
    """The JSON schema of a run file (draft 2020-12)."""
    table = TypeAdapter(RunConfig).json_schema()
    table["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for name, presets in (("PSTConfig", PRESETS), ("DataConfig", DATA_PRESETS)):
        preset = {"description": "Settings to start from.", "enum": list(presets), "type": "string"}
        table["$defs"][name]["properties"]["preset"] = preset
    for key, choices in (
        ("task", {name: _first_line(f"pst_ds.data.tasks.{name.replace('-', '_')}") for name in TASKS}),
        ("method", {name: method.description for name, method in METHODS.items()}),
    ):
        setting = table["properties"][key]
        setting |= {"enum": list(choices), "description": f"{setting['description']} {_in_one_sentence(choices)}"}
    table["$defs"]["DataConfig"].pop("required", None)  # a preset may have them
    _add_additions(table)
    return _in_markdown(table)


def _add_additions(table: dict[str, Any]) -> None:
    """Describe the settings of the additions of pst-ds; those of other packages may have any."""
    del table["$defs"]["AdditionSettings"]
    properties = {}
    for name, kind in TABLES.items():
        section, _, addition = name.partition(".")
        if section == "additions":
            table["$defs"][kind.__name__] = TypeAdapter(kind).json_schema()
            properties[addition] = {"$ref": f"#/$defs/{kind.__name__}"}
    description = table["properties"]["additions"]["description"]
    table["properties"]["additions"] = {"description": description, "properties": properties, "type": "object"}


def _first_line(module: str) -> str:
    return str(import_module(module).__doc__).partition("\n")[0]


def _in_one_sentence(choices: Mapping[str, str]) -> str:
    """Join the choices of a setting and their descriptions."""
    lines = {name: text.strip(".\n") for name, text in choices.items()}
    return "; ".join(f'"{name}": {text[0].lower()}{text[1:]}' for name, text in lines.items()) + "."


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
    """Return the page: one table for each group of sections, with a row for each setting."""
    parts = [HEAD]
    for title, names in GROUPS.items():
        rows = [f"## {title}", "", "| setting | value | default | meaning |", "|---|---|---|---|"]
        for name in names:
            section = table["$defs"][TABLES[name].__name__] if name else table
            lead = f"[{name}] " if name.startswith("[") else f"{name}." if name else ""
            entries = section["properties"].items()
            for key, entry in entries:
                is_section = "$ref" in entry or entry.get("type") == "object"
                if not is_section and key != "preset":
                    rows.append(_row(lead + key, entry))
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(name: str, entry: dict[str, Any]) -> str:
    default = entry.get("default", "") if "default" in entry else "required"
    shown = default if default in ("", "required") else f"`{json.dumps(default)}`"
    if default is None or default == []:
        shown = ""
    return f"| `{name}` | {_kind(entry)} | {shown} | {_shortened(entry.get('description', ''))} |"


def _shortened(text: str) -> str:
    """Return the first sentences of ``text`` that fit into LONGEST characters, at least one."""
    sentences = re.split(r"(?<=[.)]) (?=[A-Z\"])", text)
    kept = sentences[:1]
    for sentence in sentences[1:]:
        if len(" ".join([*kept, sentence])) > LONGEST:
            break
        kept.append(sentence)
    return " ".join(kept)


def _kind(entry: dict[str, Any]) -> str:
    if "enum" in entry:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in entry["enum"])
    if "anyOf" in entry:
        return " or ".join(_kind(option) for option in entry["anyOf"] if option.get("type") != "null")
    if entry.get("type") == "array":
        if "$ref" in entry["items"]:
            return "a list of tables"
        return "a list of whole numbers" if entry["items"]["type"] == "integer" else "a list of strings"
    return KINDS[entry["type"]]


if __name__ == "__main__":
    written = schema()
    SCHEMA.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(written), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} and {SCHEMA.relative_to(ROOT)} written\n")
