"""Files that ``pst-ds init`` writes: the run file with a comment at every setting, and DeepSpeed's JSON."""

import json
import re
import tomllib
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

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
    # a value that TOML cannot express would otherwise show only in the trained model
    assert run_from_table(tomllib.loads(text)) == chosen.run, "the run file does not say what was chosen"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if chosen.run.deepspeed_config:
            table = deepspeed_settings(on_cpu=not chosen.has_accelerator, stage=chosen.zero_stage)
            # before the run file, which names it
            write_text_atomic(deepspeed_file, json.dumps(table, indent=2) + "\n")
        write_text_atomic(out, text)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error}") from None


def run_file_text(chosen: Chosen, out: Path) -> str:
    """Return TOML with a comment above every setting."""
    # what was found in the model and the data says more than the description of a setting
    comments = _descriptions() | _findings(chosen)
    lines = [
        _comment(f"What the run would do: {chosen.plan_command(out)}", is_command=True),
        _comment(f"Start it: {chosen.train_command(out)}", is_command=True),
        _comment("Every other setting: docs/reference/run-file.md"),
    ]
    settings: Settings = {}
    sections: dict[str, Settings] = {}
    for name, value in chosen.table.items():
        if isinstance(value, dict):
            sections[name] = value
        else:
            settings[name] = value
    # first, since in TOML a setting belongs to the section above it
    lines.append("")
    lines += _lines_of_settings(settings, "", comments)
    for name, section in sections.items():
        lines += ["", f"[{name}]"]
        lines += _lines_of_settings(section, f"{name}.", comments)
    return "\n".join(lines) + "\n"


def _lines_of_settings(table: Settings, prefix: str, comments: dict[str, str]) -> list[str]:
    """Return a line for each setting, below the comment that ``comments`` have for its dotted name."""
    lines = []
    for name, value in table.items():
        comment = comments.get(prefix + name)
        if comment is not None:
            lines.append(_comment(comment))
        lines.append(f"{name} = {toml_value(value)}")
    return lines


def _comment(text: str, *, is_command: bool = False) -> str:
    """Return a comment, wrapped to lines of :data:`_WIDTH` characters unless it has a command to copy.

    Line ends and control characters, such as in class names, become escapes.
    """
    escaped = "".join(map(_escaped, text))
    if is_command:
        return f"# {escaped}"
    # words stay whole, so that paths and names of settings can be copied
    lines = wrap(escaped, _WIDTH - len("# "), break_long_words=False, break_on_hyphens=False)
    if not lines:
        return "# "
    return "\n".join(f"# {line}" for line in lines)


def _escaped(character: str) -> str:
    """Return a character, or its escape if it would end the comment or cannot be written."""
    if unicodedata.category(character) not in _ESCAPED:
        return character
    return character.encode("unicode_escape").decode()


def _descriptions() -> dict[str, str]:
    """Return the first sentence of each setting's description, by its dotted name."""
    schema = TypeAdapter(RunConfig).json_schema()
    descriptions: dict[str, str] = {}
    for name, entry in schema["properties"].items():
        descriptions[name] = _first_sentence(entry)
        if "$ref" not in entry:
            continue
        # a section: "$ref" is "#/$defs/" and the name of its class
        definition = schema["$defs"][entry["$ref"].rpartition("/")[2]]
        for setting, entry_of_setting in definition["properties"].items():
            descriptions[f"{name}.{setting}"] = _first_sentence(entry_of_setting)
    return descriptions


def _first_sentence(entry: Mapping[str, Any]) -> str:
    """Return the first sentence of a JSON schema's description, in one line without markup and full stop."""
    # a full stop within a sentence, as in "e.g. a", is not followed by a capital or a quotation mark
    sentences = re.split(r"(?<=[.)])\s+(?=[A-Z\"])", entry.get("description", ""))
    words = sentences[0].replace("``", "").rstrip(".").split()
    return " ".join(words)


def _findings(chosen: Chosen) -> dict[str, str]:
    """Return comments about findings in the model and its data, by the dotted names of settings."""
    run = chosen.run
    summary = chosen.summary
    length = "tokens to which an example is truncated"
    if run.task_facts.packs_text:
        length = "length of every training sequence"
    if chosen.positions:
        length += f"; the model supports at most {chosen.positions}"
    # with a finetuning before the cut, the length was chosen for that, and the training recovers from the cut
    steps = chosen.length_reason if run.finetune.method == "none" else "recovers from the cut"
    patterns = '"matrix", "stack", "global", "row", N:M such as "2:4", or blocks such as "16x1"'
    comments = {
        "deepspeed_config": f"settings of DeepSpeed: ZeRO stage {chosen.zero_stage}",
        "model.path": f"family {chosen.family}",
        "data.train": f"{summary['examples']} {summary['unit']}",
        "data.max_length": length,
        "train.num_epochs": f"{chosen.length_reason}; optimizer steps: {summary['num_steps']}",
        "train.num_steps": steps,
        "finetune.num_epochs": chosen.length_reason,
        "finetune.num_steps": chosen.length_reason,
        "pst.pattern": chosen.pattern_reason or patterns,
        "pst.target_modules": f"{summary['num_layers']} layers: {', '.join(chosen.layers)}",
    }
    if chosen.labels:
        comments["data.label_column"] = f"{len(chosen.labels)} classes: {shortened(chosen.labels, 8)}"
    return comments | _comments_on_sparsity(run)


def _comments_on_sparsity(run: RunConfig) -> dict[str, str]:
    """Return comments about how the model becomes sparse, or smaller, by the dotted names of settings."""
    comments = {}
    if run.pst.pattern == "global":
        comments["schedule.final_sparsity"] = "final sparsity of all pruned matrices together"
    if run.start.method == CHANNELS:
        comments["start.method"] = "makes the model smaller before the first step: docs/how-to/shapes.md"
    elif run.start.method != "none":
        comments["schedule.initial_sparsity"] = "sparsity from the first step on, reached by [start]"
    elif run.schedule.solves:
        comments["schedule.initial_sparsity"] = "where the ramp begins; the model is dense before the first solve"
    elif gains_by_start(run):
        # the start was refused for this model: the remark of init says why
        more_accurate = "more accurate if initialised with ALPS: docs/how-to/methods.md"
        comments["schedule.final_sparsity"] = f"final sparsity of every pruned matrix; {more_accurate}"
    return comments
