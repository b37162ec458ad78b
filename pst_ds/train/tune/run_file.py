"""Write the chosen rates into a copy of the user's run file, with the reason as a comment."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping

from pst_ds.config.run import RunConfig
from pst_ds.config.toml import dump_run, run_from_table, toml_value
from pst_ds.errors import InputError


def tuned_text(text: str, tuned: RunConfig, rates: Mapping[str, float], why: str) -> str:
    """Return the ``text`` of a run file with other ``rates`` in [train], below ``why`` as a comment.

    Where that is not ``tuned``, because settings were overridden or [train] is written in another way, every setting
    of ``tuned`` is written out.
    """
    comment = "".join(f"# {line}\n" for line in why.splitlines())
    edited = comment + _with_rates(text, rates)
    try:
        is_tuned = run_from_table(tomllib.loads(edited)) == tuned
    except (tomllib.TOMLDecodeError, InputError):
        is_tuned = False
    return edited if is_tuned else comment + dump_run(tuned)


def _with_rates(text: str, rates: Mapping[str, float]) -> str:
    """Set ``rates`` below the line "[train]" of ``text``, if there is one."""
    lines = text.splitlines()
    tables = [i for i, line in enumerate(lines) if line.lstrip().startswith("[")]
    start = next((i for i in tables if lines[i].partition("#")[0].strip() == "[train]"), None)
    if start is None:
        return text
    end = next((i for i in tables if i > start), len(lines))
    kept = [line for line in lines[start + 1 : end] if line.partition("=")[0].strip() not in rates]
    new = [f"{name} = {toml_value(rate)}" for name, rate in rates.items()]
    return "\n".join([*lines[: start + 1], *new, *kept, *lines[end:]]) + "\n"
