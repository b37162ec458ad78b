"""Prune all layers of a model block by block, each on the outputs of the pruned blocks before it."""

from collections.abc import Sequence

import torch
from torch import nn

from pst_ds.core.one_shot.shares import ALONE
from pst_ds.errors import InputError
from pst_ds.nn.input_sums import InputGatherer, InputSum, products, squares
from pst_ds.nn.targets import Target
from pst_ds.parallel.ranks import raise_on_all_ranks
from pst_ds.progress import Progress
from pst_ds.prune.blocks import BlockReplay, BlockSource, Calibration, Compute, SourceOf, find_blocks
from pst_ds.prune.layer import Inputs, LayerPruning, equal_inputs, inputs_of, prune_together
from pst_ds.prune.outcome import PrunedLayer
from pst_ds.prune.reconstruction import BlockFit
from pst_ds.prune.rules import LayerRule, Method, names_of, rules_by_block
from pst_ds.prune.statistics import STATISTICS_BYTES, expert_groups, gather, required


def prune_layers(
    model: nn.Module,
    rules: Sequence[LayerRule],
    method: Method,
    data: Calibration,
    *,
    reconstruct: int = 0,
    source_of: SourceOf = BlockSource,
) -> list[PrunedLayer]:
    """Prune a whole model in place; return the outcome of each layer, in the order of ``rules``.

    Every block runs twice on the batches: dense, to collect the inputs of its layers, and pruned, for the input of the
    next block. The device holds one block, one piece of a batch and the statistics of one block; the CPU holds this
    rank's hidden states, and the model or the part that ``source_of`` loads. Kept weights are bit-identical with
    "magnitude" and "wanda"; pruned ones are +0.0. Experts are pruned on the tokens that are routed to them, and by
    magnitude without any. Collective over ``data.ranks``.

    Args:
        model: the model, on the CPU.
        rules: a rule for each layer.
        method: how weights are chosen.
        data: positions with 0 in an ``attention_mask`` (batch, length) are ignored. "magnitude" needs no batches
            without ``reconstruct``.
        reconstruct: passes that fit the kept weights of each block to its dense outputs (:class:`BlockFit`).
        source_of: where blocks are read from and written to.

    Raises InputError, and FloatingPointError, naming the layer, for values that are not finite.
    """
    model.eval()
    if method == "magnitude" and not reconstruct:
        return list(map(_by_magnitude, rules))
    stack, blocks = find_blocks(model, names_of(rules))
    replay = BlockReplay(model, source_of(stack, blocks), data)
    pruner = _BlockPruner(replay, method, reconstruct)
    by_block = rules_by_block(rules, stack)
    done: dict[str, PrunedLayer] = {}
    # blocks after the last with a rule would only compute inputs that nobody needs
    last = max(by_block)
    with replay.in_place(), Progress("prune", last + 1, "blocks") as shown:
        for index in range(last + 1):
            for layer in pruner.prune(index, by_block.get(index, []), is_last=index == last):
                done[layer.name] = layer
            shown.add(1, f"{stack}.{index}")
    return [done[name] for name in names_of(rules)]


def _by_magnitude(rule: LayerRule) -> PrunedLayer:
    """Prune a layer by the magnitudes of its weights, on this rank only."""
    pruning = LayerPruning(rule, ALONE)
    pruning.require_finite()
    for expert in range(pruning.num_experts):
        prune_together([pruning], Inputs(), expert)
    return pruning.outcome()


class _BlockPruner:
    """Prunes one block after another on the inputs of its layers."""

    def __init__(self, replay: BlockReplay, method: Method, reconstruct: int):
        self._replay = replay
        self._method = method
        self._reconstruct = reconstruct
        self._ranks = replay.data.ranks
        self._sum_of = squares
        if method in ("sparsegpt", "alps"):  # both solve least squares, for which they need all of X'X
            self._sum_of = products

    def prune(self, index: int, rules: Sequence[LayerRule], *, is_last: bool) -> list[PrunedLayer]:
        """Collect statistics and prune a block; unless it is the last, run it for the next block's input. Collective.

        Experts are pruned group by group. Their inputs do not depend on other experts, but may depend on linear layers,
        which are therefore pruned last.
        """
        source = self._replay.source
        with source.loaded(index):
            outcome = source.outcome(index, PrunedLayer)
            if outcome is None:
                outcome = self._prune(index, rules, is_last=is_last)
                source.finish(index, outcome)
            elif not is_last:
                # An interrupted run has finished this block, and the source has loaded its pruned values.
                with self._replay.resident(index):
                    self._replay.run(index, keep_output=True)
        return outcome

    def _prune(self, index: int, rules: Sequence[LayerRule], *, is_last: bool) -> list[PrunedLayer]:
        """Prune a block that is loaded. Collective."""
        # before the block moves to the device: they hold stored values
        layers = [LayerPruning(rule, self._ranks) for rule in rules]
        for layer in layers:
            layer.require_finite()
        fit: BlockFit | None = None
        if self._reconstruct and rules:
            fit = BlockFit(self._replay, index, self._reconstruct)
        tokens: dict[str, list[int]] = {}
        with self._replay.resident(index):
            if rules:
                tokens = self._prune_by_statistics(index, layers, fit)
            for layer in layers:
                layer.exchange()
            if fit is not None:
                weights: list[nn.Parameter] = []
                dtypes: list[torch.dtype] = []
                for rule, layer in zip(rules, layers, strict=True):
                    weights.append(rule.target.weight)
                    # that of the file, not of the block on the device
                    dtypes.append(layer.weight.dtype)
                fitted = fit.fit(weights, dtypes, keep_output=not is_last)
                for layer, values in zip(layers, fitted, strict=True):
                    layer.weight.copy_(values)
            elif not is_last:
                self._replay.run(index, keep_output=True)
        return [layer.outcome(tokens.get(layer.name, ())) for layer in layers]

    def _prune_by_statistics(
        self, index: int, layers: Sequence[LayerPruning], fit: BlockFit | None
    ) -> dict[str, list[int]]:
        """Prune this rank's share of the ``layers`` of a resident block; return each stack's tokens per expert.

        Collective. ``fit``: stores the outputs of the dense block.
        """
        linear: list[LayerPruning] = []
        linear_targets: list[Target] = []
        stacks: list[LayerPruning] = []
        stack_targets: list[Target] = []
        for layer in layers:
            target = layer.rule.target
            if target.is_stack:
                stacks.append(layer)
                stack_targets.append(target)
            else:
                linear.append(layer)
                linear_targets.append(target)
        tokens: dict[str, list[int]] = {}
        of_linear = InputGatherer(self._sum_of)
        layouts = [target.layout for target in stack_targets]
        groups = expert_groups(of_linear, layouts, STATISTICS_BYTES)
        for number, group in enumerate(groups):
            # Only the first pass runs the dense block: later ones have pruned experts. It also sees the linear layers,
            # which stay dense until the last group is done.
            targets_of_pass: list[Target] = []
            remember: Compute | None = None
            if number == 0:
                targets_of_pass = linear_targets
                if fit is not None:
                    remember = fit.remember
            of_experts = InputGatherer(self._sum_of, group)
            gather(
                self._replay,
                index,
                linear=[(of_linear, targets_of_pass)],
                stacks=[(of_experts, stack_targets)],
                compute=remember,
            )
            for layer in stacks:
                self._prune_experts(layer, required(of_experts, layer.name), group)
                tokens[layer.name] = of_experts.sums[layer.name].expert_tokens
        self._prune_linear(linear, of_linear)
        return tokens

    def _prune_linear(self, layers: Sequence[LayerPruning], gatherer: InputGatherer) -> None:
        """Prune linear layers; those with the same inputs, such as q, k and v, together. Frees their statistics."""
        # The gatherer gives layers with the same inputs the same sum, so its identity says which layers are alike.
        alike: dict[int, tuple[InputSum, list[LayerPruning]]] = {}
        for layer in layers:
            sums = required(gatherer, layer.name)
            _, sharing = alike.setdefault(id(sums), (sums, []))
            sharing.append(layer)
        gatherer.sums.clear()
        for key in list(alike):
            sums, together = alike.pop(key)
            with together[0].naming():
                assert sums.total is not None
                inputs = inputs_of(self._method, sums.total)
                del sums  # frees a Gram matrix of (I, I) fp64 before the method allocates its own
                prune_together(together, inputs)

    def _prune_experts(self, layer: LayerPruning, sums: InputSum, group: range) -> None:
        """Prune this rank's experts of ``group``, whose statistics are ``sums``; by magnitude if they had no token."""
        layout = layer.rule.target.layout

        def prune() -> None:
            for expert in group:
                # Groups are those of the largest stack in the block; another may have fewer experts.
                if expert >= layout.num_experts or layer.ranks_of(expert) is None:
                    continue
                with layer.naming(expert):
                    if sums.expert_tokens[expert]:
                        inputs = inputs_of(self._method, sums.of[expert].whole())
                    else:
                        inputs = equal_inputs(self._method, layout.in_features, self._replay.data.device)
                    prune_together([layer], inputs, expert)

        # Each rank prunes other experts, so only one may fail; the rest would wait for it in the next collective.
        raise_on_all_ranks(prune, (InputError, FloatingPointError))
