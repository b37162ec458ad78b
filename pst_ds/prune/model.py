"""Prune all layers of a model block by block, each on the outputs of the pruned blocks before it."""

from collections.abc import Sequence

from torch import nn

from pst_ds.core.one_shot.shares import ALONE
from pst_ds.errors import InputError
from pst_ds.nn.input_sums import InputGatherer, InputSum, products, squares
from pst_ds.parallel.ranks import raise_on_all_ranks
from pst_ds.progress import Progress
from pst_ds.prune.blocks import BlockReplay, BlockSource, Calibration, SourceOf, find_blocks
from pst_ds.prune.layer import Inputs, LayerPruning, equal_inputs, inputs_of, prune_together
from pst_ds.prune.outcome import PrunedLayer
from pst_ds.prune.reconstruction import BlockFit
from pst_ds.prune.rules import LayerRule, Method, rules_by_block
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
        return [_by_magnitude(rule) for rule in rules]
    stack, blocks = find_blocks(model, [rule.target.name for rule in rules])
    replay = BlockReplay(model, source_of(stack, blocks), data)
    pruner = _BlockPruner(replay, method, reconstruct)
    by_block = rules_by_block(rules, stack)
    done: dict[str, PrunedLayer] = {}
    last = max(by_block)
    with replay.in_place(), Progress("prune", last + 1, "blocks") as shown:
        for index in range(last + 1):
            outcome = pruner.prune(index, by_block.get(index, []), is_last=index == last)
            done |= {layer.name: layer for layer in outcome}
            shown.add(1, f"{stack}.{index}")
    return [done[rule.target.name] for rule in rules]


def _by_magnitude(rule: LayerRule) -> PrunedLayer:
    pruning = LayerPruning(rule, ALONE)
    pruning.require_finite()
    for expert in range(pruning.num_experts):
        prune_together([pruning], Inputs(), expert)
    return pruning.outcome()


class _BlockPruner:
    """Prunes one block after another on the inputs of its layers."""

    def __init__(self, replay: BlockReplay, method: Method, reconstruct: int):
        self._replay, self._method, self._reconstruct = replay, method, reconstruct
        self._sum_of = products if method in ("sparsegpt", "alps") else squares
        self._ranks = replay.data.ranks

    def prune(self, index: int, rules: Sequence[LayerRule], *, is_last: bool) -> list[PrunedLayer]:
        """Collect statistics and prune a block; unless it is the last, run it for the next block's input. Collective.

        Experts are pruned group by group. Their inputs do not depend on other experts, but may depend on linear layers,
        which are therefore pruned last.
        """
        source = self._replay.source
        with source.loaded(index):
            found = source.outcome(index, PrunedLayer)
            if found is None:
                found = self._prune(index, rules, is_last=is_last)
                source.finish(index, found)
            elif not is_last:
                with self._replay.resident(index):
                    self._replay.run(index, keep_output=True)
        return found

    def _prune(self, index: int, rules: Sequence[LayerRule], *, is_last: bool) -> list[PrunedLayer]:
        layers = [LayerPruning(rule, self._ranks) for rule in rules]  # before the block moves: they hold stored values
        linear = [layer for layer in layers if not layer.rule.target.is_stack]
        stacks = [layer for layer in layers if layer.rule.target.is_stack]
        tokens = dict[str, list[int]]()
        fit = BlockFit(self._replay, index, self._reconstruct) if self._reconstruct and rules else None
        for layer in layers:
            layer.require_finite()
        with self._replay.resident(index):
            gatherer = InputGatherer(self._sum_of)
            layouts = [layer.rule.target.layout for layer in stacks]
            for number, group in enumerate(expert_groups(gatherer, layouts, STATISTICS_BYTES) if rules else []):
                of_experts = InputGatherer(self._sum_of, group)
                remember = fit.remember if fit is not None and not number else None
                own = [] if number else [layer.rule.target for layer in linear]
                targets = [layer.rule.target for layer in stacks]
                gather(self._replay, index, [(gatherer, own)], [(of_experts, targets)], remember)
                for layer in stacks:
                    self._prune_experts(layer, required(of_experts, layer.name), group)
                    tokens[layer.name] = of_experts.sums[layer.name].expert_tokens
            self._prune_linear(linear, gatherer)
            for layer in layers:
                layer.exchange()
            if fit is not None:
                weights, dtypes = [r.target.weight for r in rules], [layer.weight.dtype for layer in layers]
                fitted = fit.fit(weights, dtypes, keep_output=not is_last)
                for layer, values in zip(layers, fitted, strict=True):
                    layer.weight.copy_(values)
            elif not is_last:
                self._replay.run(index, keep_output=True)
        return [layer.outcome(tokens.get(layer.name, ())) for layer in layers]

    def _prune_linear(self, layers: Sequence[LayerPruning], gatherer: InputGatherer) -> None:
        """Prune linear layers; those with the same inputs, such as q, k and v, together. Frees their statistics."""
        alike: dict[int, tuple[InputSum, list[LayerPruning]]] = {}
        for layer in layers:
            sums = required(gatherer, layer.name)
            alike.setdefault(id(sums), (sums, []))[1].append(layer)
        gatherer.sums.clear()
        for key in list(alike):
            sums, together = alike.pop(key)
            with together[0].naming():
                assert sums.total is not None
                given = inputs_of(self._method, sums.total)
                del sums
                prune_together(together, given)

    def _prune_experts(self, layer: LayerPruning, sums: InputSum, group: range) -> None:
        """Prune this rank's experts of ``group``, whose statistics are ``sums``; by magnitude if they had no token."""
        layout, device = layer.rule.target.layout, self._replay.data.device

        def prune() -> None:
            for expert in (e for e in group if e < layout.num_experts and layer.ranks_of(e) is not None):
                with layer.naming(expert):
                    if sums.expert_tokens[expert]:
                        given = inputs_of(self._method, sums.of[expert].whole())
                    else:
                        given = equal_inputs(self._method, layout.in_features, device)
                    prune_together([layer], given, expert)

        raise_on_all_ranks(prune, (InputError, FloatingPointError))
