"""Report a search for learning rates: a table, the choice, and the run file with the chosen rates. Importing this
module does not import torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pst_ds.config.run import RunConfig
from pst_ds.config.toml import dump_run, run_from_table, toml_value
from pst_ds.config.train import RATES, TrainConfig
from pst_ds.errors import InputError
from pst_ds.train.tune.halving import Candidate

Record: TypeAlias = dict[str, Any]
"""A line of tune.jsonl."""


def _candidate(line: Record) -> Candidate:
    return Candidate(line["factor"], line["head_factor"])


def trial_table(lines: Sequence[Record]) -> list[list[str]]:
    """Return a header and a row for each trial, with the rates of the whole run that the trial represents."""
    head, own = lines[0], lines[0]["run"]["train"]
    train = TrainConfig(num_steps=1, **{name: own[name] for name in RATES})
    names = [name.removesuffix("_learning_rate") for name in RATES]
    rows = [["rates", *names, "steps", head["metric"], "standard error"]]
    for line in lines:
        if line["event"] == "trial":
            value = (
                ["diverged", "-"] if line["value"] is None else [f"{line[n]:.4g}" for n in ("value", "standard_error")]
            )
            candidate = _candidate(line)
            rates = [f"{rate:.3g}" for rate in candidate.rates(train).values()]
            rows.append([str(candidate), *rates, str(line["steps"]), *value])
    return rows


def budget_text(lines: Sequence[Record]) -> str:
    """Return the steps of all trials as a share of the run: "178 of 900 steps, 19.8 %"."""
    steps, of = sum(line["steps"] for line in lines if line["event"] == "trial"), lines[0]["num_steps"]
    return f"{steps} of {of} steps, {100 * steps / of:.1f} %"


def why(lines: Sequence[Record]) -> str:
    """Return the choice and its reason in two lines."""
    head, choice, last = lines[0], lines[-1], max(line["rung"] for line in lines if line["event"] == "trial")
    finals = {line["trial"]: line for line in lines if line["event"] == "trial" and line["rung"] == last}
    own, best, metric = finals[0], finals[choice["trial"]], head["metric"]
    spread = f"standard error {own['standard_error']:.2g}"
    if choice["trial"]:
        at_first = "diverged" if own["value"] is None else f"{own['value']:.4g} as they were, {spread}"
        found = f"{_candidate(choice)}: {metric} {best['value']:.4g} ({at_first})"
    else:
        found = f"as they were: nothing tried had a {metric} better than {own['value']:.4g} by more than the {spread}"
    return (
        f"pst-ds tune: learning rates {found}\n"
        f"in trials of {own['steps']} steps for a run of {head['num_steps']}; all trials: {budget_text(lines)}"
    )


def tuned_text(text: str, tuned: RunConfig, rates: Mapping[str, float], why: str) -> str:
    """Return the ``text`` of a run file with other ``rates`` in [train], below ``why`` as a comment.

    If the result is not ``tuned``, because settings were overridden or [train] is written differently, write out every
    setting of ``tuned`` instead.
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
