"""Measurements on training examples before the first step: norms of inputs for scores, and scores of experts."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from pst_ds.atomic_files import write_bytes_atomic
from pst_ds.config.run import ConfigError
from pst_ds.data.tasks import ExampleSet
from pst_ds.masks.mask_source import MaskSource
from pst_ds.nn.addition import inputs_of_layers
from pst_ds.nn.inject import bypassed, pst_layers
from pst_ds.nn.input_sums import InputGatherer, InputSum, squares
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.ranks import broadcast, is_main, raise_on_all_ranks, rank, world_size
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.train.evaluate import evaluation_batches
from pst_ds.train.run_context import RunContext

NORMS_FILE = "activation_norms.safetensors"


def calibrate(context: RunContext, engine: Engine, examples: ExampleSet, *, resumed: bool) -> None:
    """Set the activation norms of the scores: measured for a new run, from its folder for a resumed one. Collective."""
    folder = Path(context.run.output_dir)
    if resumed:
        set_norms(engine.module, raise_on_all_ranks(lambda: _load_norms(folder, engine.module)))
        return
    drawn, chosen = _sample(context, examples)
    norms = activation_norms(engine, context, drawn, chosen)
    if is_main():
        from safetensors.torch import save

        # in a file next to the checkpoints, which need not repeat them: they never change
        write_bytes_atomic(folder / NORMS_FILE, save({name: values.contiguous() for name, values in norms.items()}))
    set_norms(engine.module, norms)


def activation_norms(
    engine: Engine, context: RunContext, examples: ExampleSet, indices: Sequence[int]
) -> dict[str, Tensor]:
    """Return the relative norms of each PST layer's inputs: {name: (I,) fp32}. Collective.

    The norm of an input is the root of its :func:`summed_squares`, divided by the mean over the layer's inputs. A stack
    of experts has (E*I,), divided by the mean of each expert. Where all inputs of an expert are zero, because it saw no
    tokens, the norms are 1, so its weights are ranked by magnitude.
    """
    layers = pst_layers(engine.module)
    relative_norms = {}
    for name, sums in summed_squares(engine, context, examples, indices).items():
        norms = sums.sqrt().view(layers[name].layout.num_experts, -1)  # (experts, inputs)
        mean = norms.mean(1, keepdim=True)
        relative_norms[name] = torch.where(mean > 0, norms / mean, 1.0).float().flatten()
    return relative_norms


@torch.no_grad()
def summed_squares(
    engine: Engine, context: RunContext, examples: ExampleSet, indices: Sequence[int]
) -> dict[str, Tensor]:
    """Return the sum of squares of each PST layer's inputs over the real tokens of ``indices``. Collective.

    The result is {name: (I,) float64}, with (E*I,) for a stack of experts. The model runs without masks and updates.
    """
    layers = pst_layers(engine.module)
    sizes = [layer.layout.num_inputs for layer in layers.values()]
    totals = torch.zeros(sum(sizes), dtype=torch.float64, device=context.device)
    for batch, turns in _batches(engine, context, examples, indices):
        gatherer = InputGatherer(squares)
        gatherer.begin(batch)
        listening = gatherer.listening(layers) if rank() < turns else nullcontext()
        with bypassed(engine.module), listening:
            engine(**batch)
        parts = []
        for name, size in zip(layers, sizes, strict=True):
            total = gatherer.sums.get(name, InputSum()).total
            # None for a layer that was not called, and on a rank whose batch is a repetition
            parts.append(totals.new_zeros(size) if total is None else total.flatten())
        sums = torch.cat(parts)
        # Every rank adds the sums of one batch after the other, in the order of the batches, so they are
        # bit-identical on any number of ranks; an all-reduce would not be. Memory does not grow with the ranks.
        for source in range(turns):
            totals += broadcast(sums, source)
    return dict(zip(layers, totals.cpu().split(sizes), strict=True))


@torch.no_grad()
def observe_calibration(context: RunContext, engine: Engine, examples: ExampleSet, source: MaskSource) -> None:
    """Let ``source`` observe the dense model on training examples, before the first step. Collective."""
    drawn, chosen = _sample(context, examples)
    for batch, turns in _batches(engine, context, drawn, chosen):
        source.expect(inputs_of_layers(engine.module, batch))
        observing = source.observing() if rank() < turns else nullcontext()
        with observing:
            engine(**batch)
    source.after_batch()


def _sample(context: RunContext, examples: ExampleSet) -> tuple[ExampleSet, list[int]]:
    """Draw the run's calibration examples. Collective."""
    run = context.run
    count = min(run.pst.calibration_examples, len(examples))
    return raise_on_all_ranks(lambda: context.task.sample(examples, count, f"{run.seed}/calibration"))


def _batches(
    engine: Engine, context: RunContext, examples: ExampleSet, indices: Sequence[int]
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Yield (batch of this rank without labels, number of ranks whose batch is not a repetition), in evaluation mode.

    ZeRO-3 needs as many forward passes of every rank.
    """
    lengths = [examples.lengths[i] for i in indices]
    batches = evaluation_batches(lengths, context.run.eval_batch_size, mixed=context.task.pads)
    engine.eval()
    for first in range(0, len(batches), world_size()):
        heartbeat("the calibration pass")
        # a rank that runs out of batches repeats the last one, which its caller must not count
        positions = batches[min(first + rank(), len(batches) - 1)]
        batch = context.task.collate(examples, [indices[i] for i in positions], context.tokenizer)
        inputs = {name: values.to(context.device) for name, values in batch.items() if name != "labels"}
        yield inputs, min(world_size(), len(batches) - first)
    engine.train()


def set_norms(model: nn.Module, norms: dict[str, Tensor]) -> None:
    """Set the norms by which each layer's scores weight |W|. ``norms``: as :func:`activation_norms` returns."""
    for name, layer in pst_layers(model).items():
        layer.input_norms = norms[name].to(layer.pst_mask.device)


def _load_norms(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Load the norms that the run in ``folder`` started with. Raises ConfigError if they are missing or do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / NORMS_FILE
    layers = pst_layers(model)
    try:
        norms = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f'{path} cannot be read ({error}): a run with pst.magnitude = "activation" needs the norms it started with'
            ". Restore the file, or start a new run."
        ) from None
    shapes = {name: tuple(values.shape) for name, values in norms.items()}
    expected = {name: (layer.layout.num_inputs,) for name, layer in layers.items()}
    if shapes != expected:
        raise ConfigError(f"{path} has the norms of other layers. Restore the file, or start a new run.")
    return norms
