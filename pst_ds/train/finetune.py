"""Fine-tune a run's pretrained model before it is pruned: the stage ``[finetune]``, a run inside the run folder."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pst_ds.atomic_files import write_text_atomic
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.toml import dump_run
from pst_ds.data.tasks import ExampleSet
from pst_ds.errors import InputError
from pst_ds.file_names import BEST, CHECKPOINTS, FINAL, MANIFEST_FILE, RUN_FILE
from pst_ds.parallel.engine import free_released
from pst_ds.parallel.ranks import is_main, of_main, of_main_at_length
from pst_ds.train.divergence import DivergedError
from pst_ds.train.prepare import prepare
from pst_ds.train.resume import as_table, require_same_run
from pst_ds.train.run_context import RunContext
from pst_ds.train.run_folder import open_checkpoint
from pst_ds.writing.check import check_export
from pst_ds.writing.to_folder import ExportOptions, export_checkpoint


def finetune(
    context: RunContext, examples: ExampleSet, train: Callable[[RunContext], object], *, quiet: bool
) -> RunContext:
    """Fine-tune the run's model as ``[finetune]`` says, unless that was done before; return the context of the rest.

    Collective. ``train`` trains or resumes the run of the stage. Raises as :func:`pst_ds.train.run.train_run`.
    """
    stage = context.run.finetuning()
    if stage is None:
        return context
    try:
        inner = prepare(context.resolved.with_settings(stage), context.launch).with_rates(examples)
        out = Path(context.run.finetuned_path)
        # rank 0 decides for all: the others may see its folder later on a network file system
        if not of_main(partial(_is_done, context.run, inner.run, examples.digest)):
            if is_main():  # so that the folder is enough to resume
                write_text_atomic(Path(context.run.output_dir) / RUN_FILE, dump_run(context.run))
            if is_main() and not quiet:
                print(f"fine-tuning {stage.model.path} by {stage.method}: {out}", file=sys.stderr, flush=True)
            train(inner)
            # before the run's model is built, so that the device does not hold both
            free_released()
            of_main_at_length(partial(_write_model, inner, out))
    except DivergedError as error:
        # the stage is a separate run, whose message names the settings of [train]
        raise DivergedError(str(error).replace("a lower train.", "a lower finetune.")) from None
    except InputError as error:
        raise InputError(f'finetune.method = "{stage.method}": {error}') from None
    return context.with_run(context.run.finetuned())


def _is_done(run: RunConfig, stage: RunConfig, data_digest: str) -> bool:
    """Return whether the model of ``stage`` was written. Raises ConfigError if the run's checkpoints continue from
    another one."""
    out = Path(run.finetuned_path)
    problem = ""
    if not (out / MANIFEST_FILE).is_file():
        problem = "it is missing"
    else:
        try:
            final = open_checkpoint(stage, FINAL)
            changed = require_same_run(final, stage, final.state.base_fingerprint, data_digest)
            # a resumed run may change its rates, but here they would give another model
            for change in changed:
                if "learning_rate" in change:
                    problem = change
                    break
        except InputError as error:
            problem = str(error)
    # without checkpoints the stage simply runs again
    if problem and (Path(run.output_dir) / CHECKPOINTS).exists():
        raise ConfigError(
            f"the checkpoints in {run.output_dir} continue from {out}, which differs from [finetune]: {problem}. "
            "Restore the old values, or use another output_dir"
        )
    return not problem


def _write_model(context: RunContext, out: Path) -> None:
    """Write the trained model to the folder ``out``, atomically, and verify it."""
    checkpoint = open_checkpoint(context.run, BEST)
    model = context.resolved.shapes.model_to_export()
    export_checkpoint(
        model=model,
        checkpoint=checkpoint,
        tokenizer=context.tokenizer,
        out=out,
        options=ExportOptions(),
        run=as_table(context.run),
    )
    check_export(out)
