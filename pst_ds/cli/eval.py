"""``pst-ds eval RUN``: metrics of a checkpoint on one split, and of the text that it generates."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.atomic_files import require_writable
from pst_ds.cli.main import add_quiet_argument, add_run_arguments, load_run_or_folder
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from pst_ds.checkpoint.format import Checkpoint
    from pst_ds.data.tasks.answers import AnsweredExamples
    from pst_ds.train.run import RunContext


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_run_arguments(parser, "run folder, or its run file")
    add("--split", choices=("train", "validation", "test"), default="test")
    add("--checkpoint", default="best", help='"best" (default), "final", or another in checkpoints/')
    add("--texts", metavar="FILE", help="write generated texts and their references to this JSONL file")
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    config = load_run_or_folder(args)
    if args.texts and not config.task_facts.writes_texts:
        raise InputError(f"--texts {args.texts}: task {config.task!r} does not generate text. Omit it")
    if args.texts:
        require_writable(Path(args.texts), f"--texts {args.texts}")
    from pst_ds.parallel.launch import launch_environment
    from pst_ds.train.run import build, evaluate, prepare
    from pst_ds.train.run_folder import open_checkpoint

    checkpoint = open_checkpoint(config, args.checkpoint)
    context = prepare(config, launch_environment(), run_file=args.run, labels=checkpoint.state.labels)
    examples = context.load(args.split)
    if config.task_facts.writes_texts and context.launch.world_size == 1:
        metrics = _with_texts(context, checkpoint, examples, args.texts)  # type: ignore[arg-type]
    else:
        engine = build(context, checkpoint)
        metrics = evaluate(engine, examples, context)
        if config.task_facts.writes_texts and context.launch.rank == 0:
            print("text is generated and scored by one process. Run pst-ds eval without a launcher for BLEU")
    if context.launch.rank == 0:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(f"{checkpoint.folder} on {args.split} ({len(examples)} {context.task.unit}): {shown}")
    return {"checkpoint": str(checkpoint.folder), "split": args.split, "examples": len(examples), **metrics}


def _with_texts(
    context: RunContext, checkpoint: Checkpoint, examples: AnsweredExamples, file: str | None
) -> dict[str, float]:
    """Return metrics of the model and of the text it generates (also written to ``file``), in one process without
    DeepSpeed.
    """
    from pst_ds.data.generation import require_text_metrics
    from pst_ds.data.tasks.answers import AnswerTask
    from pst_ds.train.evaluate import predict
    from pst_ds.train.run import masked_model

    require_text_metrics()
    task = context.task
    assert isinstance(task, AnswerTask)
    model, batch_size = masked_model(context, checkpoint), context.run.eval_batch_size
    written = task.write(model, examples, context.tokenizer, batch_size, context.device)
    if file:
        pairs = zip(written, examples.references, strict=True)
        lines = [json.dumps({"text": text, "references": wanted}, ensure_ascii=False) + "\n" for text, wanted in pairs]
        Path(file).write_text("".join(lines), encoding="utf-8")
    outcomes = predict(model, context, examples)
    return {**task.metrics(outcomes, examples), **task.text_metrics(written, examples)}
