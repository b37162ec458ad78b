"""Check all stages of a run ([finetune], [start], training) before the first of them starts."""

from pathlib import Path

from pst_ds.config.run import RunConfig
from pst_ds.config.settings import report
from pst_ds.errors import InputError
from pst_ds.file_names import START
from pst_ds.train.one_shot.start import require_startable


def require_stages(run: RunConfig, num_examples: int) -> int:
    """Return the optimizer steps of the run. Raises InputError for what would stop it only after hours of work.

    These are the checks that need the number of training examples, or that a later stage makes: steps and schedules of
    training and of ``[finetune]``, and whether ``[start]`` can prune the model. ``pst-ds plan`` and ``train`` share
    them; ``init`` makes the same.
    """
    num_steps = require_schedules(run, num_examples)
    # a folder of the start exists once its first block was pruned, after these checks
    if run.start.method != "none" and not (Path(run.output_dir) / START).exists():
        try:
            require_startable(run)
        except InputError as error:
            raise InputError(
                f'start.method = "{run.start.method}": {error}. Or skip it: start.method = "none"'
            ) from None
    return num_steps


def require_schedules(run: RunConfig, num_examples: int) -> int:
    """Return the optimizer steps of the run. Raises InputError for steps and schedules of a stage that cannot work."""
    num_steps = run.num_steps(num_examples)
    report(run.train.problems_of_profile(num_steps))
    # made for their checks only: each raises for a ramp that does not fit into the steps
    run.make_schedules(num_steps)
    stage = run.finetuning()
    if stage is not None:
        stage.make_schedules(stage.num_steps(num_examples))
    return num_steps
