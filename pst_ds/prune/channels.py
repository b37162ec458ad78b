"""Remove channels of a pretrained model, block by block, so that a smaller dense model remains.

A layer loses the inputs whose removal changes its outputs least, and its remaining weights are fitted to the former
outputs; the layers before it lose what made these inputs. A block sees the outputs of the smaller blocks before it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pst_ds.config.one_shot import PruneConfig
from pst_ds.core.one_shot.channels import InputMoments, by_second_order, refitted
from pst_ds.nn.input_sums import InputGatherer, products, totals
from pst_ds.nn.model_structure import ExpertsModule, is_conv1d, stack_names, text_config
from pst_ds.parallel.ranks import of_rank, raise_on_all_ranks
from pst_ds.progress import Progress
from pst_ds.prune.blocks import BlockReplay, Calibration
from pst_ds.prune.channel_plan import Cut, CutPlan, block_selections, plan_cut
from pst_ds.prune.model_files import ModelFiles
from pst_ds.prune.outcome import CutLayer
from pst_ds.prune.statistics import STATISTICS_BYTES, expert_groups, gather, naming, required


def cut_channels(
    files: ModelFiles, config: PruneConfig, excluded: str | tuple[str, ...], data: Calibration
) -> tuple[list[CutLayer], dict[str, object]]:
    """Cut the model in ``files`` and its config; return the outcome of each layer, and the settings that changed.

    ``excluded``: modules that are not cut. Collective; the result does not depend on the number of ranks. Blocks
    that a killed run has finished are not computed again. Raises InputError, and FloatingPointError, naming the layer,
    for values that are not finite.
    """
    plan = raise_on_all_ranks(lambda: plan_cut(files, config, excluded, data.batches[0]))
    blocks = files.model.get_submodule(plan.stack)
    assert isinstance(blocks, nn.ModuleList)
    replay = BlockReplay(files.model, files.source(plan.stack, blocks), data)
    cutter, found = _Cutter(replay, plan), list[CutLayer]()
    for index in range(len(blocks)):
        if replay.source.outcome(index, CutLayer) is not None:
            _adopt(blocks[index], plan.smaller_block(index), {})  # whose tensors are those in the finished file
    with replay.in_place(), Progress("prune", len(blocks), "blocks") as shown:
        for index in range(len(blocks)):
            found += cutter.cut(index)
            shown.add(1, f"{plan.stack}.{index}")
    for key, value in plan.settings.items():
        setattr(text_config(files.model), key, value)
    return found, dict(plan.settings)


_Known = tuple[Tensor, Tensor, int]
"""The :func:`products` and :func:`totals` of a layer's inputs, and the number of tokens."""


class _Made(NamedTuple):
    """The outcome for a matrix, on the CPU."""

    kept: Tensor
    weight: Tensor
    """(O, kept inputs), in the dtype of the stored weight."""
    shift: Tensor
    """(O,), to add to the bias."""
    removed: Tensor
    scores: Tensor
    error: float


class _Cutter:
    def __init__(self, replay: BlockReplay, plan: CutPlan):
        self._replay, self._plan = replay, plan

    def cut(self, index: int) -> list[CutLayer]:
        """Cut a block, and run it for the next block's input. Collective."""
        source, is_last = self._replay.source, index == len(self._plan.cuts) - 1
        with source.loaded(index):
            found = source.outcome(index, CutLayer)
            if found is None:
                found = self._cut(index) if self._plan.cuts[index] else []
                source.finish(index, found)
            if not is_last:
                with self._replay.resident(index):
                    self._replay.run(index, keep_output=True)
        return found

    def _cut(self, index: int) -> list[CutLayer]:
        block, smaller = self._replay.blocks[index], self._plan.smaller_block(index)
        made, chosen = self._computed(index), []
        for cut in self._plan.cuts[index]:
            kept = torch.stack([one.kept for one in made[cut.layer]])
            chosen.append((cut, kept if cut.of_experts else kept[0]))
        _adopt(block, smaller, _tensors(block, chosen, made))
        prefix = f"{self._plan.stack}.{index}."
        return [_outcome(prefix + cut.layer, cut, made[cut.layer]) for cut in self._plan.cuts[index]]

    def _computed(self, index: int) -> dict[str, list[_Made]]:
        """Return what the matrices of a block become, by layer; one for each expert. Collective."""
        block, cuts = self._replay.blocks[index], self._plan.cuts[index]
        target_of = {cut.layer: self._plan.target(index, cut) for cut in cuts}
        linear, stacks = ([cut for cut in cuts if cut.of_experts is kind] for kind in (False, True))
        made: dict[str, list[_Made]] = {cut.layer: [] for cut in cuts}
        grams, sums = InputGatherer(products), InputGatherer(totals)
        layouts = [target_of[cut.layer].layout for cut in stacks]
        for number, group in enumerate(expert_groups(grams, layouts, STATISTICS_BYTES)):
            of_experts = InputGatherer(products, experts=group), InputGatherer(totals, experts=group)
            of_linear = [target_of[cut.layer] for cut in linear if not number]
            of_stacks = [target_of[cut.layer] for cut in stacks]
            with self._replay.resident(index):
                pairs = [(grams, of_linear), (sums, of_linear)], [(one, of_stacks) for one in of_experts]
                gather(self._replay, index, *pairs)
            for cut in stacks:
                name = target_of[cut.layer].name
                gram, total = (required(one, name) for one in of_experts)
                for expert in (e for e in group if e < len(gram.expert_tokens)):
                    tokens = gram.expert_tokens[expert]
                    known = (gram.of[expert].whole(), total.of[expert].whole(), tokens) if tokens else None
                    made[cut.layer].append(self._shared(block, cut, known, f"{name}, expert {expert}", expert))
        for number, cut in enumerate(linear):
            gram, total = (required(one, name := target_of[cut.layer].name) for one in (grams, sums))
            known = gram.of[0].whole(), total.of[0].whole(), gram.num_tokens
            made[cut.layer] = [self._shared(block, cut, known, name, number)]
        return made

    def _shared(self, block: nn.Module, cut: Cut, known: _Known | None, name: str, number: int) -> _Made:
        """Compute on one rank what a matrix becomes, for all. Collective.

        ``known``: None for an expert without tokens, whose inputs then count equally. ``number``: of the expert, or of
        the layer in its block; ranks take turns.
        """
        weight, has_bias = _matrix(block, cut, number)

        def compute() -> _Made:
            with naming(name):
                gram, total, tokens = known or (torch.eye(weight.shape[1], dtype=torch.float64), None, 0)
                return self._made(weight, cut, InputMoments.of(gram, total if has_bias else None, tokens))

        return of_rank(number % self._replay.data.ranks.number, compute, (FloatingPointError,))

    def _made(self, weight: Tensor, cut: Cut, known: InputMoments) -> _Made:
        device = self._replay.data.device
        own, gram = weight.to(device), known.gram.to(device)
        kept, removed, scores = by_second_order(own, gram, cut.kept)
        fitted, shift, error = refitted(own, InputMoments(gram, known.mean.to(device)), kept)
        stored = fitted.to(weight.dtype).cpu()
        return _Made(kept.cpu(), stored, shift.cpu(), removed.cpu(), scores.cpu(), error)


def _matrix(block: nn.Module, cut: Cut, expert: int) -> tuple[Tensor, bool]:
    """Return the stored matrix (O, I) that loses inputs, and whether its layer has a bias."""
    module: ExpertsModule = block.get_submodule(cut.layer)
    if cut.of_experts:
        stack = getattr(module, stack_names(module)[1]).data[expert]
        return stack.t() if module.is_transposed else stack, module.has_bias
    weight = module.weight.data
    return weight.t() if is_conv1d(module) else weight, module.bias is not None


def _tensors(
    block: nn.Module, chosen: Sequence[tuple[Cut, Tensor]], made: Mapping[str, list[_Made]]
) -> dict[str, Tensor]:
    """Return the tensors of the smaller block, by name."""
    found = block.state_dict()
    for name, (dim, index) in block_selections(block, chosen).items():
        if index.dim() == 1:
            found[name] = found[name].index_select(dim, index)
        else:
            found[name] = torch.stack([one.index_select(dim, i) for one, i in zip(found[name], index, strict=True)])
    for cut, _ in chosen:
        module: ExpertsModule = block.get_submodule(cut.layer)
        if cut.of_experts:
            last = stack_names(module)[1]
            fitted = torch.stack([one.weight.t() if module.is_transposed else one.weight for one in made[cut.layer]])
            found[f"{cut.layer}.{last}"] = fitted.contiguous()
            bias, shift = f"{cut.layer}.{last}_bias", torch.stack([one.shift for one in made[cut.layer]])
        else:
            (one,) = made[cut.layer]
            found[f"{cut.layer}.weight"] = (one.weight.t() if is_conv1d(module) else one.weight).contiguous()
            bias, shift = f"{cut.layer}.bias", one.shift
        if bias in found:
            found[bias] = (found[bias].double() + shift).to(found[bias].dtype)
    return found


def _adopt(block: nn.Module, smaller: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Turn ``block`` into the ``smaller`` one, with these ``tensors`` by name if there are any."""
    if tensors:
        smaller.load_state_dict(tensors, assign=True)
    vars(block).update({"forward": block.forward, **vars(smaller)})


def _outcome(name: str, cut: Cut, made: Sequence[_Made]) -> CutLayer:
    error = sum(one.error for one in made) / len(made)
    order = () if cut.of_experts else (tuple(made[0].removed.tolist()), tuple(made[0].scores.tolist()))
    return CutLayer(name, cut.channels, cut.kept, error, *order)
