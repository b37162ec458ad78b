"""Files that ``pst-ds init`` writes: the run file with a comment at every setting, and DeepSpeed's JSON."""

import json
import re
import tomllib
import unicodedata
from pathlib import Path
from textwrap import wrap

from pydantic import TypeAdapter

from pst_ds.atomic_files import write_text_atomic
from pst_ds.cli.init.draft import Chosen, deepspeed_settings
from pst_ds.cli.init.first_table import Settings
from pst_ds.config.one_shot import CHANNELS
from pst_ds.config.run import RunConfig
from pst_ds.config.toml import run_from_table, toml_value
from pst_ds.errors import InputError, shortened
from pst_ds.planning.dense_start import gains_by_start

_ESCAPED = ("Cc", "Cs", "Zl", "Zp")
"""Categories of Unicode: control characters, halves of surrogate pairs, ends of lines and of paragraphs."""


_WIDTH = 120
"""Characters of a line of comments."""


def write_files(chosen: Chosen, out: Path, deepspeed_file: Path) -> None:
    """Write both files. Raises InputError for a folder that cannot be written."""
    text = run_file_text(chosen, out)
    assert run_from_table(tomllib.loads(text)) == chosen.run, "the run file does not say what was chosen"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if chosen.run.deepspeed_config:
            table = deepspeed_settings(on_cpu=not chosen.has_accelerator)
            write_text_atomic(deepspeed_file, json.dumps(table, indent=2) + "\n")
        write_text_atomic(out, text)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error}") from None


def run_file_text(chosen: Chosen, out: Path) -> str:
    """Return TOML with a comment above every setting."""
    comments = _descriptions() | _found(chosen)
    lines = [
        _comment(f"What the run would do: {chosen.plan_command(out)}", is_command=True),
        _comment(f"Start it: {chosen.train_command(out)}", is_command=True),
        _comment("Every other setting: docs/reference/run-file.md"),
    ]
    tables = {name: value for name, value in chosen.table.items() if isinstance(value, dict)}
    lines += _lines({name: value for name, value in chosen.table.items() if name not in tables}, "", comments)
    for name, table in tables.items():
        lines += ["", f"[{name}]", *_lines(table, f"{name}.", comments)[1:]]
    return "\n".join(lines) + "\n"


def _lines(table: Settings, prefix: str, comments: dict[str, str]) -> list[str]:
    lines = [""]
    for name, value in table.items():
        if prefix + name in comments:
            lines.append(_comment(comments[prefix + name]))
        lines.append(f"{name} = {toml_value(value)}")
    return lines


def _comment(text: str, *, is_command: bool = False) -> str:
    """Return a comment, wrapped to lines of :data:`_WIDTH` characters unless it has a command to copy.

    Line ends and control characters, such as in class names, become escapes.
    """
    escaped = "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _ESCAPED else c for c in text)
    if is_command:
        return f"# {escaped}"
    lines = wrap(escaped, _WIDTH - len("# "), break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"# {line}" for line in lines or [""])


def _descriptions() -> dict[str, str]:
    """Return the first sentence of each setting's description, by its dotted name."""
    schema = TypeAdapter(RunConfig).json_schema()
    sections = {
        name: entry["$ref"].rpartition("/")[2] for name, entry in schema["properties"].items() if "$ref" in entry
    }
    tables = {"": schema, **{f"{name}.": schema["$defs"][kind] for name, kind in sections.items()}}
    entries = {f"{at}{name}": entry for at, table in tables.items() for name, entry in table["properties"].items()}
    firsts = {
        at: re.split(r"(?<=[.)])\s+(?=[A-Z\"])", entry.get("description", ""))[0] for at, entry in entries.items()
    }
    return {at: " ".join(first.replace("``", "").rstrip(".").split()) for at, first in firsts.items()}


def _found(chosen: Chosen) -> dict[str, str]:
    """Return comments about findings in the model and its text."""
    limit = f"; the model supports at most {chosen.positions}" if chosen.positions else ""
    what = (
        "length of every training sequence"
        if chosen.run.task_facts.packs_text
        else "tokens to which an example is truncated"
    )
    comments = {
        "model.path": f"family {chosen.family}",
        "data.train": f"{chosen.summary['examples']} {chosen.summary['unit']}",
        "data.max_length": f"{what}{limit}",
        "train.num_epochs": f"{chosen.length_reason}; optimizer steps: {chosen.summary['num_steps']}",
        "train.num_steps": chosen.length_reason if chosen.run.finetune.method == "none" else "recovers from the cut",
        "finetune.num_epochs": chosen.length_reason,
        "finetune.num_steps": chosen.length_reason,
        "pst.pattern": chosen.pattern_reason
        or '"matrix", "stack", "global", "row", N:M such as "2:4", or blocks such as "16x1"',
        "pst.target_modules": f"{chosen.summary['num_layers']} layers: {', '.join(chosen.layers)}",
    }
    if chosen.run.pst.pattern == "global":
        comments["schedule.final_sparsity"] = "final sparsity of all pruned matrices together"
    if chosen.run.start.method == CHANNELS:
        comments["start.method"] = "makes the model smaller before the first step: docs/how-to/shapes.md"
    elif chosen.run.start.method != "none":
        comments["schedule.initial_sparsity"] = "sparsity from the first step on, reached by [start]"
    elif chosen.run.schedule.solves:
        comments["schedule.initial_sparsity"] = "where the ramp begins; the model is dense before the first solve"
    elif gains_by_start(chosen.run):
        said = "final sparsity of every pruned matrix; more accurate if initialised with ALPS: docs/how-to/methods.md"
        comments["schedule.final_sparsity"] = said
    if chosen.labels:
        comments["data.label_column"] = f"{len(chosen.labels)} classes: {shortened(chosen.labels, 8)}"
    return comments
