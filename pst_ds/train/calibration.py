"""How large the inputs of every pruned layer are on training text: the norms of ``pst.magnitude = "activation"``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.config.run import ConfigError
from pst_ds.data.tasks import ExampleSet, Task
from pst_ds.durable import replace_bytes
from pst_ds.nn.inject import bypassed, pst_layers
from pst_ds.nn.input_sums import InputGatherer, squares
from pst_ds.nn.linear import PSTLinear
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.ranks import all_gather_objects, rank, world_size
from pst_ds.parallel.watchdog import beat
from pst_ds.train.evaluate import evaluation_batches

NORMS_FILE = "activation_norms.safetensors"


@torch.no_grad()
def activation_norms(
    engine: Engine,
    task: Task,
    examples: ExampleSet,
    indices: Sequence[int],
    tokenizer: Any,
    batch_size: int,
    device: str,
) -> dict[str, Tensor]:
    """Of every PST layer the root of the summed squares of each input over the real tokens of ``indices``, divided by
    their mean: (I,) fp32, 1 for a layer whose inputs were all zero.

    The model runs as the dense one it was. Ranks take turns at the batches, and the sums are added in the order of the
    ranks. Collective.
    """
    layers = pst_layers(engine.module)
    gatherer = InputGatherer(squares)
    lengths = [examples.lengths[i] for i in indices]
    batches = evaluation_batches(lengths, batch_size, mixed=task.pads)
    engine.eval()
    with bypassed(engine.module):
        for first in range(0, len(batches), world_size()):
            beat("the calibration pass")
            turn = first + rank()
            own = batches[min(turn, len(batches) - 1)]
            batch = {k: v.to(device) for k, v in task.collate(examples, [indices[i] for i in own], tokenizer).items()}
            gatherer.begin(batch)
            with gatherer.listening(layers) if turn < len(batches) else nullcontext():
                engine(**{k: v for k, v in batch.items() if k != "labels"})
    engine.train()
    by_rank = all_gather_objects(
        {name: found.total.cpu() for name, found in gatherer.sums.items() if found.total is not None}
    )
    return {
        name: _relative(sum((sums[name] for sums in by_rank if name in sums), _zeros(layer)).sqrt())
        for name, layer in layers.items()
    }


def _zeros(layer: PSTLinear) -> Tensor:
    return torch.zeros(layer.layout.in_features, dtype=torch.float64)


def _relative(norms: Tensor) -> Tensor:
    mean = norms.mean()
    return (norms / mean if mean > 0 else torch.ones_like(norms)).float()


def set_norms(model: nn.Module, norms: dict[str, Tensor]) -> None:
    """Let the scores of every layer weigh |W| by its input's norm."""
    for name, layer in pst_layers(model).items():
        layer.input_norms = norms[name].to(layer.pst_mask.device)


def save_norms(folder: Path, norms: dict[str, Tensor]) -> None:
    """Write them beside the run; whole or not at all."""
    from safetensors.torch import save

    replace_bytes(folder / NORMS_FILE, save({name: values.contiguous() for name, values in norms.items()}))


def load_norms(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The norms that the run in ``folder`` began with. Raises ConfigError when they are gone, or of another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / NORMS_FILE
    layers = pst_layers(model)
    try:
        norms = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f'{path} cannot be read ({error}), and a run with pst.magnitude = "activation" goes on with the norms it '
            "began with. Fix: bring the file back, or start a new run"
        ) from None
    if {n: tuple(v.shape) for n, v in norms.items()} != {n: (x.layout.in_features,) for n, x in layers.items()}:
        raise ConfigError(f"{path} holds the norms of other layers than the model's")
    return norms
