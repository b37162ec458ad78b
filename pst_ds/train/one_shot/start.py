"""One-shot pruning of a run's base model before its first step, and remarks on a base pruned by ``pst-ds prune``."""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pst_ds.checkpoint.restore import base_fingerprint
from pst_ds.config.one_shot import CHANNELS, PruneConfig
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.data.tasks import ExampleSet
from pst_ds.errors import InputError, renamed
from pst_ds.file_names import CHECKPOINTS, START
from pst_ds.formats.hub import NotDownloadedError
from pst_ds.nn.base_model import Pretrained, architecture, pruning_record
from pst_ds.nn.folder_facts import origin_of
from pst_ds.parallel import stop_signals
from pst_ds.parallel.ranks import is_main, of_main
from pst_ds.parallel.stop_signals import StoppedError
from pst_ds.prune.model_files import ModelFiles
from pst_ds.prune.one_shot import plan_pruning
from pst_ds.train.one_shot.pruning import prune_model, require_task
from pst_ds.train.resolved import attention_options
from pst_ds.train.run_context import RunContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_LAYERS = ("pattern", "target_modules", "exclude_modules", "modules_to_save")
"""Settings of ``[pst]`` that decide which weights compete with each other."""
_COARSE = ("matrix", "stack")
"""Patterns that keep the pruned weights of a folder whose matrices have equal sparsity; "global" always does."""


SETTINGS = {
    **{name: f"start.{name}" for name in ("method", "samples", "reconstruct", "budgets", "ffn")},
    "sparsity": "schedule.initial_sparsity",
    "pattern": "pst.pattern",
}
"""Settings of the run file, by the name of the field of :class:`PruneConfig` that has their value."""


def start_run(context: RunContext, examples: ExampleSet, *, quiet: bool) -> RunConfig:
    """Prune the run's pretrained model as ``[start]`` says, unless that was done before; return the run that trains it.

    Collective: all ranks share the work. Raises on all ranks InputError, and StoppedError after a signal to any. Blocks
    that are finished are kept: the next start continues.
    """
    run = context.run
    if run.start.method == "none":
        return run
    start = _facts_of_start(run, examples.digest)
    if of_main(partial(_is_done, run, start)):
        return run.started()
    out = Path(run.output_dir) / START
    config = one_shot_config(run, min(run.start.samples, len(examples)))
    if is_main() and not quiet:
        # a cut has no sparsity: its weights go into smaller matrices
        sparsity = "" if config.sparsity is None else f" to {config.sparsity}"
        print(f"pruning {run.model.path}{sparsity} by {config.method}: {out}", file=sys.stderr, flush=True)
    try:
        prune_model(
            run,
            out,
            config,
            examples=examples,
            tokenizer=context.tokenizer,
            more_facts={"start": start, "base_model": origin_of(run.model.path)},
            check=_stop_if_asked,
        )
    except StoppedError as error:
        raise StoppedError(f"{error}. Finished blocks were kept; start the run again to prune the others") from None
    except InputError as error:
        raise InputError(f'start.method = "{config.method}": {renamed(str(error), SETTINGS)}') from None
    return run.started()


def require_startable(run: RunConfig) -> str:
    """Raise InputError if ``[start]`` cannot prune the run's model, by what is known without data.

    Of a model on the hub the headers of its files suffice. If these cannot be read, the config decides, and the reason
    is returned; else "".
    """
    model, reason = _model_without_values(run)
    _require_prunable(model, run)
    return reason


def _model_without_values(run: RunConfig) -> tuple["PreTrainedModel", str]:
    """Return the run's pretrained model without values, and why its files were not looked at, or ""."""
    from transformers import AutoModel

    base = Pretrained(run.model.path, "model.path")
    attention = run.model.attn_implementation or None
    try:
        return ModelFiles(base.path, None, attn_implementation=attention, reads_values=False).model, ""
    except NotDownloadedError as error:
        config = base.config(**attention_options(run))
        base.require_dense(config)
        model = base.shapes(architecture(config) or AutoModel, config)
        return cast("PreTrainedModel", model), str(error)


def _require_prunable(model: "PreTrainedModel", run: RunConfig) -> None:
    config = one_shot_config(run, run.start.samples)
    try:
        require_task(run, config)
        plan_pruning(model, config, run.pst, run.schedule.final_sparsity)
    except InputError as error:
        raise InputError(renamed(str(error), SETTINGS)) from None


def _stop_if_asked() -> None:
    if signal := stop_signals.asked_by():
        raise StoppedError(f"stopped by {stop_signals.name_of(signal)} while the pretrained model was pruned")


def _is_done(run: RunConfig, start: object) -> bool:
    """Return whether the folder has the run's start. Raises ConfigError if checkpoints continue from another one."""
    out = Path(run.output_dir) / START
    record = pruning_record(out)
    # the fingerprint last: it reads the files of the base
    if record.get("start") == start and record.get("base_fingerprint") == base_fingerprint(run.model.path):
        return True
    if (Path(run.output_dir) / CHECKPOINTS).exists():
        raise ConfigError(
            f"{out} does not match [start], [pst], seed, model and data, and the checkpoints in {run.output_dir} "
            "continue from it. Restore the old values, or use another output_dir."
        )
    return False


def _facts_of_start(run: RunConfig, data_digest: str) -> object:
    """Return what the start depends on besides the base model, as JSON values."""
    layers = {name: getattr(run.pst, name) for name in _OF_LAYERS}
    overrides = [asdict(one) for one in run.pst.overrides]
    start = {name: value for name, value in asdict(run.start).items() if value is not None}
    facts = {
        **start,
        "seed": run.seed,
        "sparsity": run.start_sparsity,
        "precision": run.train.precision,
        **layers,
        "overrides": overrides,
        "data_digest": data_digest,
    }
    # through JSON, since tuples are lists in the record that this is compared with
    return json.loads(json.dumps(facts))


def one_shot_config(run: RunConfig, samples: int) -> PruneConfig:
    """Return the settings of the run's ``[start]``, on ``samples`` examples."""
    start = run.start
    method = start.method
    assert method != "none"
    return PruneConfig(
        method=method,
        sparsity=None if method == CHANNELS else run.start_sparsity,
        budgets=start.budgets,
        reconstruct=start.reconstruct,
        ffn=start.ffn,
        samples=samples,
        seed=run.seed,
    )


def remark_on_shares(run: RunConfig) -> str:
    """Return a remark, without a full stop, if the run's first masks restore weights that ``pst-ds prune`` has pruned
    in its base model; "" otherwise.

    Pruned weights score lowest, so a pattern keeps them pruned unless one of its groups has more than it prunes.
    """
    if run.mask_method.masks != "ramp" or run.pst.pattern == "global":
        return ""
    about = pruning_record(run.model.path)
    if "pattern" not in about:
        return ""
    pattern = str(about["pattern"])
    budgets = str(about.get("budgets", "equal"))
    if budgets == "equal" and (run.pst.pattern == pattern or run.pst.pattern in _COARSE):
        return ""
    return (
        f'pst-ds prune pruned model.path with pattern "{pattern}" and {budgets} budgets, which '
        f'pst.pattern = "{run.pst.pattern}" does not keep: its first masks prune other weights. pst.pattern = "global" '
        "starts with the weights that are pruned already"
    )
