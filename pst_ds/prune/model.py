"""Prune all layers of a model block by block, each on the outputs of the pruned blocks before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pst_ds.errors import InputError
from pst_ds.nn import experts
from pst_ds.nn.input_sums import InputGatherer, InputSum, products, squares
from pst_ds.progress import Progress
from pst_ds.prune.blocks import Batch, BlockReplay, Calibration, Compute, find_blocks
from pst_ds.prune.layer import Inputs, LayerPruning, PrunedLayer, equal_inputs, inputs_of
from pst_ds.prune.reconstruction import BlockFit
from pst_ds.prune.rules import LayerRule, Method, rules_by_block

STATISTICS_BYTES = 4 * 2**30
"""Memory limit of a block's expert Gram matrices, which only a single larger expert exceeds."""


def prune_layers(
    model: nn.Module,
    rules: Sequence[LayerRule],
    method: Method,
    data: Calibration,
    *,
    gated: bool = False,
    reconstruct: int = 0,
    statistics_bytes: int = STATISTICS_BYTES,
) -> list[PrunedLayer]:
    """Prune a whole model in place; return the outcome of each layer, in the order of ``rules``.

    Every block runs twice on the batches: dense, to collect the inputs of its layers, and pruned, for the input of the
    next block. The device holds one block, one batch and the statistics of one block; the CPU holds the model and the
    hidden states of all batches. Kept weights are bit-identical with "magnitude" and "wanda"; pruned ones are +0.0.
    Experts are pruned on the tokens that are routed to them, and by magnitude without any.

    Args:
        model: the model, on the CPU.
        rules: a rule for each layer.
        method: how weights are chosen.
        data: positions with 0 in an ``attention_mask`` (batch, length) are ignored. "magnitude" needs no batches
            without swaps and ``reconstruct``.
        gated: weigh an expert's tokens by their router gates.
        reconstruct: passes that fit the kept weights of each block to its dense outputs, with three fp32 numbers per
            weight of a block on the device.
        statistics_bytes: memory for the Gram matrices of experts. A block whose experts need more runs once per group
            of experts.

    Raises InputError, and FloatingPointError, naming the layer, for values that are not finite.
    """
    model.eval()
    swaps = any(rule.swaps for rule in rules)
    if method == "magnitude" and not swaps and not reconstruct:
        return [_by_magnitude(rule) for rule in rules]
    stack, blocks = find_blocks(model, [rule.target.name for rule in rules])
    replay = BlockReplay(model, blocks, data)
    pruner = _BlockPruner(replay, method, gated, swaps, reconstruct, statistics_bytes)
    by_block = rules_by_block(rules, stack)
    done: dict[str, PrunedLayer] = {}
    last = max(by_block)
    with replay.in_place(), Progress("prune", last + 1, "blocks") as shown:
        for index in range(last + 1):
            done |= {layer.name: layer for layer in pruner.prune(index, by_block.get(index, []), is_last=index == last)}
            shown.add(1, f"{stack}.{index}")
    return [done[rule.target.name] for rule in rules]


def _by_magnitude(rule: LayerRule) -> PrunedLayer:
    pruning = LayerPruning(rule)
    for expert in range(rule.target.layout.num_experts):
        pruning.prune(Inputs(), expert)
    return pruning.outcome()


class _BlockPruner:
    """Prunes one block after another on the inputs of its layers."""

    def __init__(
        self, replay: BlockReplay, method: Method, gated: bool, swaps: bool, reconstruct: int, statistics_bytes: int
    ):
        self._replay, self._method, self._gated, self._bytes = replay, method, gated, statistics_bytes
        self._swaps, self._reconstruct = swaps, reconstruct
        self._sum_of = products if swaps or method in ("sparsegpt", "alps") else squares
        self._last: tuple[Tensor, Inputs] | None = None
        """(sum, statistics) of the previous layer's inputs."""

    def prune(self, index: int, rules: Sequence[LayerRule], *, is_last: bool) -> list[PrunedLayer]:
        """Collect statistics and prune a block; unless it is the last, run it for the next block's input.

        Experts are pruned group by group. Their inputs do not depend on other experts, but may depend on linear layers,
        which are therefore pruned last.
        """
        layers = [LayerPruning(rule) for rule in rules]  # before the block moves: they hold the stored values
        linear = [layer for layer in layers if not layer.rule.target.is_stack]
        stacks = [layer for layer in layers if layer.rule.target.is_stack]
        gatherer, tokens = self._gatherer(), dict[str, list[int]]()
        fit = BlockFit(self._replay, index, self._reconstruct) if self._reconstruct and rules else None
        with self._replay.resident(index):
            for number, group in enumerate(self._groups(stacks) if rules else []):
                of_experts = self._gatherer(group)
                remember = fit.remember if fit is not None and not number else None
                self._gather(index, gatherer, [] if number else linear, of_experts, stacks, remember)
                for layer in stacks:
                    sums = _required(of_experts, layer.name)
                    self._prune_experts(layer, sums, group)
                    tokens[layer.name] = sums.expert_tokens
            for layer in linear:
                with layer.naming():
                    given = self._inputs_of(_required(gatherer, layer.name).total)
                layer.prune(given)
            if fit is not None:
                for layer, values in zip(layers, fit.fit([r.target.weight for r in rules]), strict=True):
                    layer.weight.copy_(values)
            if not is_last:
                self._replay.run(index, keep_output=True)
        return [layer.outcome(tokens.get(layer.name, ())) for layer in layers]

    def _gatherer(self, group: range | None = None) -> InputGatherer:
        return InputGatherer(self._sum_of, self._gated, group)

    def _groups(self, stacks: Sequence[LayerPruning]) -> list[range]:
        """Return groups of consecutive experts whose statistics fit into memory; one group without stacks."""
        layouts = [layer.rule.target.layout for layer in stacks]
        number = max((layout.num_experts for layout in layouts), default=1)
        of_expert = sum(4 * layout.in_features**2 for layout in layouts)
        size = number if self._sum_of is squares or not of_expert else max(1, self._bytes // of_expert)
        return [range(first, min(first + size, number)) for first in range(0, number, size)]

    def _gather(
        self,
        index: int,
        gatherer: InputGatherer,
        linear: Sequence[LayerPruning],
        of_experts: InputGatherer,
        stacks: Sequence[LayerPruning],
        compute: Compute | None,
    ) -> None:
        """Run the block, and collect the inputs of ``linear`` layers and of a group of experts of ``stacks``."""

        def begin(batch: Batch) -> None:
            gatherer.begin(batch)
            of_experts.begin(batch)

        places = {(layer.rule.target.module, layer.rule.target.parameter): layer.name for layer in stacks}
        with (
            gatherer.listening({layer.name: layer.rule.target.module for layer in linear}),
            experts.listening(places, of_experts.add_experts),
        ):
            self._replay.run(index, keep_output=False, before=begin, compute=compute)

    def _inputs_of(self, total: Tensor | None) -> Inputs:
        """Return the statistics of inputs with this sum: once for layers with equal inputs, such as q, k and v."""
        assert total is not None
        if self._last is None or not torch.equal(self._last[0], total):
            self._last = total, inputs_of(self._method, total, swaps=self._swaps)
        return self._last[1]

    def _prune_experts(self, layer: LayerPruning, sums: InputSum, group: range) -> None:
        """Prune the experts of ``group``, whose statistics are ``sums``; by magnitude if they had no token."""
        layout, device = layer.rule.target.layout, layer.rule.target.weight.device
        for place, expert in enumerate(group):
            if expert >= layout.num_experts:
                break
            if sums.total is None or not sums.expert_tokens[expert]:
                given = equal_inputs(self._method, layout.in_features, device)
            else:
                with layer.naming(expert):
                    given = inputs_of(self._method, sums.total[place], swaps=self._swaps)
            layer.prune(given, expert)


def _required(gatherer: InputGatherer, name: str) -> InputSum:
    found = gatherer.sums.get(name)
    if found is None or not found.num_tokens:
        raise InputError(
            f"{name} had no input from the calibration data. Use more --samples, or leave it dense with "
            "pst.exclude_modules"
        )
    return found
