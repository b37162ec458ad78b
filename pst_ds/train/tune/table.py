"""Format the lines of a search as a table and as text. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pst_ds.config.train import TrainConfig
from pst_ds.train.tune.halving import RATES, Candidate


def _candidate(line: dict[str, Any]) -> Candidate:
    return Candidate(line["factor"], line["head_factor"])


def trial_table(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a header and a row for each trial, with the rates of the whole run that the trial represents."""
    head, train = lines[0], TrainConfig(**lines[0]["run"]["train"])
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


def budget_text(lines: Sequence[dict[str, Any]]) -> str:
    """Say how many of the run's steps the trials took: "178 of 900 steps, 19.8 %"."""
    steps, of = sum(line["steps"] for line in lines if line["event"] == "trial"), lines[0]["num_steps"]
    return f"{steps} of {of} steps, {100 * steps / of:.1f} %"


def why(lines: Sequence[dict[str, Any]]) -> str:
    """Say in two lines what was chosen, and by which figures."""
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
