"""``pst-ds eval RUN``: metrics of a checkpoint on one split, and of the text that it generates."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_ds.atomic_files import require_writable
from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import add_quiet_argument, add_run_arguments, load_run_or_folder
from pst_ds.errors import InputError

KL_FORMAT = "KL divergence {kl_mean:.3g} (99th percentile {kl_p99:.3g}), same prediction {same_top:.2%}"
"""Text for a result of :class:`pst_ds.core.kl_divergence.KLDivergence`."""

if TYPE_CHECKING:
    from torch import nn

    from pst_ds.checkpoint.format import Checkpoint
    from pst_ds.data.tasks import ExampleSet
    from pst_ds.data.tasks.answers import AnswerTask
    from pst_ds.train.run import RunContext


FLAGS = flags_of_fields(["reference"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_run_arguments(parser, "run folder, or its run file")
    add("--split", choices=("train", "validation", "test"), default="test")
    add("--checkpoint", default="best", help='"best" (default), "final", or another in checkpoints/')
    add("--reference", metavar="DIR", help="model folder from which to measure the KL divergence of predictions")
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
    from pst_ds.train.run_folder import open_checkpoint, same_on_all_ranks

    checkpoint = open_checkpoint(config, args.checkpoint)
    context = prepare(config, launch_environment(), run_file=args.run, labels=checkpoint.state.labels)
    checkpoint = same_on_all_ranks(config, checkpoint)
    examples = context.load(args.split)
    if args.reference and context.launch.world_size > 1:
        raise InputError(f"--reference {args.reference} needs both models in a process. Run eval without a launcher")
    kl = dict[str, float]()
    if context.launch.world_size == 1 and (config.task_facts.writes_texts or args.reference):
        metrics, kl = _by_one_process(context, checkpoint, examples, args)
    else:
        engine = build(context, checkpoint)
        metrics = evaluate(engine, examples, context)
        if config.task_facts.writes_texts and context.launch.rank == 0:
            print("text is generated and scored by one process. Run pst-ds eval without a launcher for BLEU")
    if context.launch.rank == 0:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(f"{checkpoint.folder} on {args.split} ({len(examples)} {context.task.unit}): {shown}")
        if kl:
            print(f"from {args.reference}: {KL_FORMAT.format(**kl)}")
    return {"checkpoint": str(checkpoint.folder), "split": args.split, "examples": len(examples), **metrics, **kl}


def _by_one_process(
    context: RunContext, checkpoint: Checkpoint, examples: ExampleSet, args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Return metrics of the model and of the text it generates, and its divergence from ``--reference``, without
    DeepSpeed."""
    from pst_ds.data.tasks.answers import AnswerTask
    from pst_ds.export.reference import kl_from_folder
    from pst_ds.train.evaluate import predict
    from pst_ds.train.run import masked_model

    model, task = masked_model(context, checkpoint), context.task
    kl = kl_from_folder(args.reference, model, context, examples) if args.reference else {}
    of_texts = _text_metrics(model, context, task, examples, args.texts) if isinstance(task, AnswerTask) else {}
    return {**task.metrics(predict(model, context, examples), examples), **of_texts}, kl


def _text_metrics(
    model: nn.Module, context: RunContext, task: AnswerTask[Any], examples: Any, file: str | None
) -> dict[str, float]:
    """Return metrics of the text that the model generates, which is also written to ``file``."""
    from pst_ds.data.generation import require_text_metrics

    require_text_metrics()
    written = task.write(model, examples, context.tokenizer, context.run.eval_batch_size, context.device)
    if file:
        pairs = zip(written, examples.references, strict=True)
        lines = [json.dumps({"text": text, "references": wanted}, ensure_ascii=False) + "\n" for text, wanted in pairs]
        Path(file).write_text("".join(lines), encoding="utf-8")
    return task.text_metrics(written, examples)
