"""Statistics of the inputs of a block's layers: a pass of the block over the calibration data, summed over ranks."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from pst_ds.core.experts.routing import Routing
from pst_ds.core.layout import WeightLayout
from pst_ds.errors import InputError
from pst_ds.nn import experts
from pst_ds.nn.input_sums import InputGatherer, InputSum, squares
from pst_ds.nn.targets import Target
from pst_ds.prune.blocks import Batch, BlockReplay, Compute

STATISTICS_BYTES = 4 * 2**30
"""Memory limit of a block's expert Gram matrices, which only a single larger expert exceeds."""


def expert_groups(gatherer: InputGatherer, layouts: Sequence[WeightLayout], most_bytes: int) -> list[range]:
    """Return groups of consecutive experts whose statistics fit into memory; one group without stacks."""
    number = 1
    # fp64 X'X of one expert of every stack
    bytes_each = 0
    for layout in layouts:
        number = max(number, layout.num_experts)
        bytes_each += 8 * layout.in_features**2
    size = number
    # squares are I numbers per expert, and fit always
    if bytes_each and gatherer.sum_of is not squares:
        size = max(1, most_bytes // bytes_each)
    groups: list[range] = []
    for first in range(0, number, size):
        groups.append(range(first, min(first + size, number)))
    return groups


Listeners = Sequence[tuple[InputGatherer, Sequence[Target]]]
"""Gatherers, each with the layers whose inputs it sums."""


def gather(
    replay: BlockReplay, index: int, linear: Listeners, stacks: Listeners, compute: Compute | None = None
) -> None:
    """Run the resident block ``index``, and sum the inputs of linear layers and of stacks of experts. Collective.

    Raises FloatingPointError on all ranks.
    """
    listeners = [*linear, *stacks]
    ranks = replay.data.ranks

    def begin(batch: Batch) -> None:
        for gatherer, _ in listeners:
            gatherer.begin(batch)

    # After the first piece, so that the steps of the sums suit its values. Every rank takes those of rank 0.
    def settle() -> None:
        for gatherer, targets in listeners:
            gatherer.settle([target.name for target in targets], ranks)

    def heard(name: str, inputs: Tensor, routing: Routing, by_token: bool) -> None:
        for gatherer, targets in stacks:
            # a gatherer only gets what it was asked for
            if name in [target.name for target in targets]:
                gatherer.add_experts(name, inputs, routing, by_token)

    name_of: dict[tuple[nn.Module, str], str] = {}
    for _, targets in stacks:
        for target in targets:
            name_of[target.module, target.parameter] = target.name
    with ExitStack() as stack:
        for gatherer, targets in linear:
            stack.enter_context(gatherer.listening({target.name: target.module for target in targets}))
        # One listener for all stacks: experts report their inputs to a single place.
        stack.enter_context(experts.listening(name_of, heard))
        replay.run(index, keep_output=False, before=begin, compute=compute, after_first=settle)
    for gatherer, targets in listeners:
        sizes = {target.name: target.layout.in_features for target in targets}
        # the sums of a block are added up together, so that an error can name only one of its layers
        name = ""
        if targets:
            name = targets[0].name
        with naming(name):
            gatherer.add_ranks(sizes, replay.data.device, ranks)


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Add the layer and advice to a FloatingPointError."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f'{layer}: {error}. Check that the model\'s weights are finite, and calibrate with train.precision = "fp32"'
        ) from None


def required(gatherer: InputGatherer, name: str) -> InputSum:
    """Return the sum of a layer. Raises InputError if it had no input."""
    sums = gatherer.sums.get(name)
    if sums is None or not sums.num_tokens:
        raise InputError(
            f"{name} had no input from the calibration data. Use more samples, or leave it dense with "
            "pst.exclude_modules"
        )
    return sums
