"""Locate the origin of a non-finite loss: the first layer with a non-finite output, and its examples."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pst_ds.atomic_files import write_bytes_atomic
from pst_ds.errors import shortened
from pst_ds.parallel.ranks import all_gather_objects

BAD_BATCH_FILE = "bad_batch.safetensors"


class DivergedError(RuntimeError):
    """A loss is not finite, or too many gradients in a row are not; raised on every rank."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A rank's share of one forward and backward pass."""

    inputs: dict[str, Tensor]
    """Inputs of the model by name, with the labels."""
    share: float
    """Weight of this micro-batch's mean loss in the batch."""
    examples: Sequence[int]
    """Indices of its examples in the training data."""


def with_its_fault_in_gradients(loss: Tensor) -> Tensor:
    """Return ``loss`` with the same gradients if it is finite, and otherwise with gradients that are not finite either.

    An engine that skips such gradients then takes no step for the loss, although the host has not read it yet. Without
    this, a cross-entropy of infinity could have finite gradients.
    """
    return loss * (1 + 0 * loss.detach())  # 0 * inf and 0 * nan are nan


def require_finite(losses: Sequence[float], batch: int, step: int, find: Callable[[], str]) -> None:
    """Raise DivergedError unless the losses of all ranks in ``batch`` are finite, after ``step`` applied steps.

    ``find`` looks for the fault, as :func:`fault_of_batch` does. Collective if a loss is not finite.
    """
    bad = [str(rank) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise DivergedError(
            f"the loss of batch {batch} is not finite on rank {', '.join(bad)} (after {step} applied steps); {find()}"
            "lower the learning rates, or look for a broken example. Nothing was saved for this step"
        )


@torch.no_grad()
def fault_of_batch(
    model: nn.Module, micro_batches: Sequence[MicroBatch], run: Callable[[MicroBatch], object], folder: Path
) -> str:
    """Run each micro-batch again; describe the first layer with a non-finite output, on the lowest rank that has one.

    Return "" if all outputs are finite. Its inputs are written to ``folder``. Collective.
    """
    fault_of_rank = ""
    # All micro-batches run, also after a fault: under ZeRO-3 passes are collective, and other ranks may have no fault.
    for batch in micro_batches:
        fault = _first_fault(model, batch, run)
        if fault and not fault_of_rank:
            fault_of_rank = fault
            tensors = {name: values.contiguous() for name, values in batch.inputs.items()}
            numbers = torch.as_tensor([int(number) for number in batch.examples])
            write_bytes_atomic(folder / BAD_BATCH_FILE, save({**tensors, "examples": numbers}))
    for rank, fault in enumerate(all_gather_objects(fault_of_rank)):
        if fault:
            return (
                f"the first output that is not is that of {fault} (rank {rank}; saved as {folder / BAD_BATCH_FILE}); "
            )
    return ""


def _first_fault(model: nn.Module, batch: MicroBatch, run: Callable[[MicroBatch], object]) -> str:
    """Run ``batch``; name the first layer with a non-finite output, and the examples; "" for none."""
    faults: list[str] = []

    def look(name: str, module: nn.Module, args: object, output: object) -> None:
        for values in tree_leaves(output):
            if not faults and isinstance(values, Tensor) and values.is_floating_point():
                rows = _rows_not_finite(values, len(batch.examples))
                if rows:
                    word = "example" if len(rows) == 1 else "examples"
                    numbers = shortened([str(batch.examples[row]) for row in rows])
                    faults.append(f"{name}, of {word} {numbers} of data.train")

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            # leaves only: a module around the first layer with a fault would be named in its place
            is_leaf = next(module.children(), None) is None
            if is_leaf:
                hooks.enter_context(module.register_forward_hook(partial(look, name)))
        run(batch)
    return faults[0] if faults else ""


def _rows_not_finite(values: Tensor, count: int) -> list[int]:
    """Return which of ``count`` examples have non-finite values; all if ``values`` cannot be split by example."""
    finite = values.isfinite()
    if bool(finite.all()):
        return []
    if values.dim() == 0 or values.shape[0] % count:
        return list(range(count))
    # outputs of layers inside a block may have the tokens of all examples as rows: (examples * length, width)
    rows: list[int] = (~finite.reshape(count, -1).all(1)).nonzero().flatten().tolist()
    return rows
