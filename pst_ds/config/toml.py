"""Read, override and write run files: TOML to :class:`RunConfig` and back."""

import json
import os
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pst_ds.config.additions import SECTION
from pst_ds.config.data import DATA_PRESETS, PRESET_PLACES
from pst_ds.config.pst import PAPER
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.settings import messages, report
from pst_ds.file_names import FINETUNED, MODEL, RUN_FILE, START

PRESETS: dict[str, dict[str, object]] = {"default": {}, "paper": {"pst": PAPER}}
_RUN = TypeAdapter(RunConfig)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run of a TOML file, with ``overrides`` such as "train.num_steps=20" laid over it.

    Raises ConfigError with the key, its value and the fix.
    """
    # Overrides are laid over the table, not over a RunConfig: a file without output_dir is valid with --set output_dir.
    return run_from_table(_table(path, overrides))


def load_run_or_folder(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run of a TOML file or of a run folder. Raises ConfigError."""
    path = Path(path)
    if not path.is_dir():
        return load_run(path, overrides)
    if not (path / RUN_FILE).is_file():
        raise ConfigError(f"{str(path)!r} is not a run folder: run.toml is missing (looked in {path.absolute()})")
    return load_run_folder(path, overrides)


def load_run_folder(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run in ``folder``, its output_dir wherever it was moved to. Raises ConfigError."""
    for override in overrides:
        if override.partition("=")[0].strip() == "output_dir":
            # A run continues in its folder, with the checkpoints and metrics that are there.
            raise ConfigError(
                f"--set {override!r}: {str(folder)!r} is a run folder, which is its own output_dir. Leave it out, or "
                f"name the run file {str(folder / RUN_FILE)!r} to train elsewhere"
            )
    table = _table(folder / RUN_FILE, overrides)
    _move_base(table, folder)
    return run_from_table({**table, "output_dir": str(folder)})


def _move_base(table: dict[str, object], folder: Path) -> None:
    """Let ``model.path`` in the run file of ``folder`` follow a base model that has moved with the folder."""
    model = table.get("model")
    former_folder = table.get("output_dir")
    # Wrong types are reported later, together with the other wrong settings.
    if not isinstance(model, dict) or not isinstance(former_folder, str):
        return
    for inside in (Path(FINETUNED, MODEL), Path(START)):
        if model.get("path") == str(Path(former_folder) / inside):
            table["model"] = {**model, "path": str(folder / inside)}


def _table(path: str | Path, overrides: Sequence[str]) -> dict[str, object]:
    """Return the unchecked tables of a run file with ``overrides`` laid over them. Raises ConfigError."""
    try:
        # utf-8-sig skips the byte order mark that Windows' editors write.
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"run file {str(path)!r} does not exist (looked in {Path(path).absolute()}); name a run file or a run "
            "folder"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a run file; name the TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not TOML, which is UTF-8: {error}; save it in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for override in overrides:
        _apply_override(table, override)
    return table


def run_from_table(table: Mapping[str, object]) -> RunConfig:
    """Build a RunConfig from nested tables. ``pst.preset`` and ``data.preset`` fill in what they lack.

    Raises ConfigError with a message for each wrong setting.
    """
    table = without_switched_off(without_removed(table))
    # Required sections are never absent, so that messages name the missing setting: 'model.path', not 'model'.
    table = _with_presets({"model": {}, "data": {}, "train": {}, "pst": {}, **table})
    _require_utf8(table)
    try:
        # A strict pydantic takes lists for tuples in JSON only. JSON has no dates: they become tables, which no setting
        # takes, so they are reported like any wrong type.
        return _RUN.validate_json(json.dumps(table, default=lambda value: {"value": str(value)}))
    except ValidationError as error:
        report(messages(error, RunConfig, table, in_run_file=True))
        raise  # if there is no message for the error, the error itself


def _with_presets(table: dict[str, object]) -> dict[str, object]:
    """Fill in the settings of ``data.preset`` and ``pst.preset`` that ``table`` lacks."""
    for section, presets in (("data", DATA_PRESETS), ("pst", PRESETS)):
        values = table[section]
        if not isinstance(values, dict) or "preset" not in values:
            continue
        name = values["preset"]
        if not isinstance(name, str) or name not in presets:
            raise ConfigError(f"{section}.preset = {name!r} must be one of {', '.join(presets)}")
        # A RunConfig has no presets: run.toml of a run folder must not change with the presets of a later release.
        without_preset = {key: value for key, value in values.items() if key != "preset"}
        table = _filled({**table, section: without_preset}, presets[name])
    return table


def _filled(table: dict[str, object], defaults: Mapping[str, object]) -> dict[str, object]:
    """Return ``table`` with the ``defaults`` that it lacks, setting by setting.

    With ``data.dataset = ""`` it names local files, and the defaults are for the columns only.
    """
    filled = {**defaults, **table}
    for name, section in defaults.items():
        values = table.get(name)
        if not isinstance(section, Mapping) or not isinstance(values, dict):
            continue
        omitted: Collection[str] = ()
        if name == "data" and values.get("dataset") == "":
            omitted = PRESET_PLACES
        used_defaults = {key: value for key, value in section.items() if key not in omitted}
        filled[name] = {**used_defaults, **values}
    return filled


REMOVED = {
    "pictures.interval": "set layer_statistics.interval",
    "pictures.layers": "every layer has statistics, none a histogram",
    "pst.nm_ramp": "N:M patterns constrain a growing share of the groups",
    "pst.bias": "name the modules that train in full in pst.modules_to_save",
    "pst.detach_magnitude": "the gradient of the scores reaches U V through |W|",
    "pst.full_scores": 'set method = "pst", whose scores have low rank',
    "pst.multiplicative_update": 'set method = "masked-lora"',
    "pst.score_init": "pst.score_init_scale is the standard deviation",
    "distillation.hidden_states": "only predictions are compared",
    "train.score_penalty": "no method has a penalty on scores",
}
"""Settings of the last release that no longer do anything, and what a run does instead."""
_CHANGE_RESULTS = ("pst.bias", "pst.full_scores", "pst.multiplicative_update")
"""Removed settings without which what was trained would compute something else."""
_FORMER_DEFAULTS = {"pst.bias": "none", "pst.nm_ramp": "share", "pst.score_init": "normal"}
"""Values of removed settings that run folders spell out, besides empty ones."""


def without_removed(table: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of ``table`` without the settings in :data:`REMOVED`; name those that were set on stderr.

    Omits a section that has no other settings. Raises ConfigError for one of :data:`_CHANGE_RESULTS`.
    """
    table = dict(table)
    for name, instead in REMOVED.items():
        section, _, key = name.partition(".")
        values = table.get(section)
        if not isinstance(values, dict) or key not in values:
            continue
        remaining = {other: value for other, value in values.items() if other != key}
        if remaining:
            table[section] = remaining
        else:  # the section itself may have been removed, such as [pictures]
            del table[section]
        # Empty values and former defaults were written by a run, not by its user, and asked for nothing.
        if not values[key] or values[key] == _FORMER_DEFAULTS.get(name):
            continue
        if name in _CHANGE_RESULTS:
            raise ConfigError(f"{name} = {values[key]!r} is no longer supported: {instead}")
        if _is_first_process():
            print(f"{name} = {values[key]!r} has no effect any more: {instead}. Remove it", file=sys.stderr)
    return table


def _is_first_process() -> bool:
    """Return whether this process prints for all. Run files are read before the ranks know each other."""
    return os.environ.get("RANK", "0") == "0"


SWITCHES = {"start": ("method", "none"), "finetune": ("method", "none"), "distillation": ("weight", 0)}
"""The setting of each section that switches the section off, and the value that does."""


def without_switched_off(table: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of ``table`` in which sections that it switches off have no other settings.

    One setting is enough to switch a section off: ``--set start.method=none``. Settings without effect are named on
    stderr, unless they have their default value, as in the run file of a run folder. A section that does not set its
    switch is kept, and its settings are refused.
    """
    table = dict(table)
    defaults = {field.name: field.default_factory for field in fields(RunConfig)}
    for name, (switch, off) in SWITCHES.items():
        section = table.get(name)
        if not isinstance(section, dict) or switch not in section or section[switch] != off:
            continue
        default = defaults[name]()  # type: ignore[operator]
        kept: dict[str, object] = {}
        changed: list[str] = []
        for key, value in section.items():
            # Unknown keys stay, to be reported as such.
            if key == switch or not hasattr(default, key):
                kept[key] = value
            elif value != getattr(default, key):
                changed.append(f"{name}.{key}")
        table[name] = kept
        if changed and _is_first_process():
            lead = f"{name}.{switch} = {toml_value(section[switch])}"
            print(f"note: {lead} switches [{name}] off; ignored: {', '.join(changed)}", file=sys.stderr)
    return table


def _require_utf8(table: dict[str, object]) -> None:
    """Reject bytes of a path that are not UTF-8, which Python holds as halves of surrogate pairs."""
    for key, value in flatten(table).items():
        try:
            # Encoding fails for such a half; without ensure_ascii=False it would be escaped before.
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{key} = {value!r} is not UTF-8, which a run file must be. Rename the file or folder"
            ) from None


def dump_run(run: RunConfig) -> str:
    """Return ``run`` as TOML, every setting written out; :func:`load_run` reads it back to an equal RunConfig."""
    table = _RUN.dump_python(run, exclude_none=True)  # TOML has no null; the default is None wherever None is allowed
    additions = table.pop(SECTION)
    sections = {name: values for name, values in table.items() if isinstance(values, dict)}
    for name, values in additions.items():
        sections[f"{SECTION}.{name}"] = values
    outside = {name: value for name, value in table.items() if name not in sections}
    # Settings outside of sections come first: TOML would read them as part of the last section.
    lines = _assignments(outside)
    for section, values in sections.items():
        lines += ["", f"[{section}]", *_assignments(values)]
    return "\n".join(lines) + "\n"


def _assignments(values: Mapping[str, object]) -> list[str]:
    """Return a line of TOML for each setting."""
    return [f"{name} = {toml_value(value)}" for name, value in values.items()]


def flatten(table: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Merge nested tables into one, by the dotted names that ``--set`` takes: {"schedule.final_sparsity": 0.9, ...}."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def toml_value(value: object) -> str:
    """Return a setting's value as TOML spells it, in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(_assignments(value)) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # JSON strings, numbers and booleans are TOML too, and a float keeps its point or exponent. Only the character DEL
    # needs an escape in TOML and none in JSON.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _apply_override(table: dict[str, object], override: str) -> None:
    """Write the setting of ``--set override`` into nested tables. Raises ConfigError."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r} must have the form key=value, such as train.num_steps=20")
    *parents, last = key.strip().split(".")
    for parent in parents:
        inner = table.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a table")
        table = inner
    table[last] = _parse_value(text.strip())


def _parse_value(text: str) -> object:
    """Return ``text`` as a TOML value, or else as a string, so that ``--set output_dir=runs/a`` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
