"""``pst-ds eval RUN``: metrics of a checkpoint on one split, and of the text that it generates."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import add_quiet_argument, add_run_arguments, load_run_or_folder
from pst_ds.cli.output_file import require_file_place
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from pst_ds.checkpoint.format import Checkpoint
    from pst_ds.data.tasks import ExampleSet
    from pst_ds.data.tasks.answers import AnswerTask
    from pst_ds.train.run import RunContext

KL_FORMAT = "KL divergence {kl_mean:.3g} (99th percentile {kl_p99:.3g}), same prediction {same_top:.2%}"
"""Text for a result of :class:`pst_ds.core.kl_divergence.KLDivergence`."""
FLAGS = flags_of_fields(["reference"])
"""Flags for the settings that messages of this verb name."""


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
    writes_texts = config.task_facts.writes_texts
    if args.texts:
        if not writes_texts:
            raise InputError(f"--texts {args.texts}: task {config.task!r} does not generate text. Omit it")
        # now, since generating may take hours
        require_file_place(Path(args.texts), "--texts")
    from pst_ds.parallel.launch import launch_environment
    from pst_ds.train.run import build, evaluate, prepare
    from pst_ds.train.run_folder import open_checkpoint, same_on_all_ranks

    checkpoint = open_checkpoint(config, args.checkpoint)
    # the classes of the checkpoint: the split may have some of them only
    context = prepare(config, launch_environment(), run_file=args.run, labels=checkpoint.state.labels)
    # collective. A run that is training may have replaced the best checkpoint between two ranks' looks at it
    checkpoint = same_on_all_ranks(config, checkpoint)
    examples = context.load(args.split)
    if args.reference and context.launch.world_size > 1:
        raise InputError(f"--reference {args.reference} needs both models in a process. Run eval without a launcher")
    kl = dict[str, float]()
    if context.launch.world_size == 1 and (writes_texts or args.reference):
        metrics, kl = _by_one_process(context, checkpoint, examples, args)
    else:
        engine = build(context, checkpoint)
        metrics = evaluate(engine, examples, context)
        # ranks that generate until their answers end would wait for each other at every token
        if writes_texts and context.launch.rank == 0:
            print("text is generated and scored by one process. Run pst-ds eval without a launcher for BLEU")
    # all ranks have the same metrics
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

    model = masked_model(context, checkpoint)
    task = context.task
    kl: dict[str, float] = {}
    if args.reference:
        kl = kl_from_folder(args.reference, model, context, examples)
    text_metrics: dict[str, float] = {}
    if isinstance(task, AnswerTask):
        text_metrics = _text_metrics(model, context, task, examples, args.texts)
    metrics = task.metrics(predict(model, context, examples), examples)
    return {**metrics, **text_metrics}, kl


def _text_metrics(
    model: nn.Module, context: RunContext, task: AnswerTask[Any], examples: Any, file: str | None
) -> dict[str, float]:
    """Return metrics of the text that the model generates, which is also written to ``file``."""
    from pst_ds.data.generation import require_text_metrics

    require_text_metrics()
    texts = task.write(
        model, examples, tokenizer=context.tokenizer, batch_size=context.run.eval_batch_size, device=context.device
    )
    if file:
        _write_texts(Path(file), texts, examples.references)
    return task.text_metrics(texts, examples)


def _write_texts(file: Path, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Write a JSON object per line: a text and its references."""
    with file.open("w", encoding="utf-8") as lines:
        for text, references_of_text in zip(texts, references, strict=True):
            lines.write(json.dumps({"text": text, "references": references_of_text}, ensure_ascii=False) + "\n")
