"""Remove channels of a pretrained model, block by block, so that a smaller dense model remains.

A layer loses the inputs whose removal changes its outputs least, and its remaining weights are fitted to the former
outputs; the layers before it lose what made these inputs. A block sees the outputs of the smaller blocks before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pst_ds.config.one_shot import PruneConfig
from pst_ds.core.one_shot.channels import InputMoments, by_second_order, refitted
from pst_ds.nn.input_sums import InputGatherer, products, totals
from pst_ds.nn.model_structure import ExpertsModule, is_conv1d, stack_names, text_config
from pst_ds.nn.targets import Target
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
    cutter = _Cutter(replay, plan)
    outcomes: list[CutLayer] = []
    for index in range(len(blocks)):
        if replay.source.outcome(index, CutLayer) is not None:
            # The block gets its smaller shapes now; its tensors are loaded from the finished file when it is its turn.
            _adopt(blocks[index], plan.smaller_block(index), {})
    with replay.in_place(), Progress("prune", len(blocks), "blocks") as shown:
        for index in range(len(blocks)):
            outcomes += cutter.cut(index)
            shown.add(1, f"{plan.stack}.{index}")
    for key, value in plan.settings.items():
        setattr(text_config(files.model), key, value)
    return outcomes, dict(plan.settings)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A stored matrix that loses inputs."""

    weight: Tensor
    """(O, I)."""
    has_bias: bool


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Sums over the tokens that a matrix gets."""

    gram: Tensor
    """(I, I) fp64: :func:`products`."""
    total: Tensor
    """(I,) fp64: :func:`totals`."""
    tokens: int


@dataclass(frozen=True, slots=True)
class _CutMatrix:
    """The outcome for a matrix, on the CPU."""

    kept: Tensor
    """(kept,) int64, ascending."""
    weight: Tensor
    """(O, kept), in the dtype of the stored weight."""
    shift: Tensor
    """(O,), to add to the bias."""
    removed: Tensor
    """The other inputs, the least important first."""
    scores: Tensor
    """Error of each removal."""
    error: float


class _Cutter:
    def __init__(self, replay: BlockReplay, plan: CutPlan):
        self._replay = replay
        self._plan = plan

    def cut(self, index: int) -> list[CutLayer]:
        """Cut a block, and run it for the next block's input. Collective."""
        source = self._replay.source
        is_last = index == len(self._plan.cuts) - 1
        with source.loaded(index):
            outcomes = source.outcome(index, CutLayer)
            if outcomes is None:
                outcomes = []
                if self._plan.cuts[index]:
                    outcomes = self._cut(index)
                source.finish(index, outcomes)
            if not is_last:
                with self._replay.resident(index):
                    self._replay.run(index, keep_output=True)
        return outcomes

    def _cut(self, index: int) -> list[CutLayer]:
        """Cut a block that is loaded. Collective."""
        block = self._replay.blocks[index]
        matrices = self._cut_matrices(index)
        chosen: list[tuple[Cut, Tensor]] = []
        outcomes: list[CutLayer] = []
        for cut in self._plan.cuts[index]:
            matrices_of_layer = matrices[cut.layer]
            kept = torch.stack([matrix.kept for matrix in matrices_of_layer])  # (experts, kept)
            if not cut.of_experts:
                kept = kept[0]
            chosen.append((cut, kept))
            outcomes.append(_outcome(f"{self._plan.stack}.{index}.{cut.layer}", cut, matrices_of_layer))
        _adopt(block, self._plan.smaller_block(index), _tensors(block, chosen, matrices))
        return outcomes

    def _cut_matrices(self, index: int) -> dict[str, list[_CutMatrix]]:
        """Return what the matrices of a block become, by layer; one for each expert. Collective."""
        linear: list[tuple[Cut, Target]] = []
        stacks: list[tuple[Cut, Target]] = []
        matrices: dict[str, list[_CutMatrix]] = {}
        for cut in self._plan.cuts[index]:
            matrices[cut.layer] = []
            target = self._plan.target(index, cut)
            if cut.of_experts:
                stacks.append((cut, target))
            else:
                linear.append((cut, target))
        stack_targets = [target for _, target in stacks]
        grams = InputGatherer(products)
        sums = InputGatherer(totals)
        groups = expert_groups(grams, [target.layout for target in stack_targets], STATISTICS_BYTES)
        for number, group in enumerate(groups):
            linear_targets: list[Target] = []
            # one pass is enough for layers whose statistics fit together
            if number == 0:
                linear_targets = [target for _, target in linear]
            expert_grams = InputGatherer(products, experts=group)
            expert_sums = InputGatherer(totals, experts=group)
            with self._replay.resident(index):
                gather(
                    self._replay,
                    index,
                    linear=[(grams, linear_targets), (sums, linear_targets)],
                    stacks=[(expert_grams, stack_targets), (expert_sums, stack_targets)],
                )
            for cut, target in stacks:
                name = target.name
                gram = required(expert_grams, name)
                total = required(expert_sums, name)
                for expert in group:
                    # Groups are those of the largest stack in the block; another may have fewer experts.
                    if expert >= len(gram.expert_tokens):
                        continue
                    inputs: _Inputs | None = None
                    if gram.expert_tokens[expert]:
                        inputs = _Inputs(
                            gram=gram.of[expert].whole(),
                            total=total.of[expert].whole(),
                            tokens=gram.expert_tokens[expert],
                        )
                    cut_matrix = self._cut_on_one_rank(index, cut, inputs, expert, name=f"{name}, expert {expert}")
                    matrices[cut.layer].append(cut_matrix)
        for number, (cut, target) in enumerate(linear):
            name = target.name
            gram = required(grams, name)
            total = required(sums, name)
            inputs = _Inputs(gram=gram.of[0].whole(), total=total.of[0].whole(), tokens=gram.num_tokens)
            matrices[cut.layer] = [self._cut_on_one_rank(index, cut, inputs, number, name=name)]
        return matrices

    def _cut_on_one_rank(self, index: int, cut: Cut, inputs: _Inputs | None, number: int, *, name: str) -> _CutMatrix:
        """Compute on one rank what a matrix of block ``index`` becomes, for all. Collective.

        ``inputs``: None for an expert without tokens, whose inputs then count equally. ``number``: of the expert, or of
        the layer in its block; ranks take turns.
        """
        matrix = _matrix(self._replay.blocks[index], cut, number)

        def compute() -> _CutMatrix:
            with naming(name):
                if inputs is None:
                    identity = torch.eye(matrix.weight.shape[1], dtype=torch.float64)
                    moments = InputMoments.of(identity, None, 0)
                elif matrix.has_bias:
                    moments = InputMoments.of(inputs.gram, inputs.total, inputs.tokens)
                else:
                    moments = InputMoments.of(inputs.gram, None, inputs.tokens)
                return self._cut_matrix(matrix.weight, cut, moments)

        return of_rank(number % self._replay.data.ranks.number, compute, (FloatingPointError,))

    def _cut_matrix(self, stored: Tensor, cut: Cut, moments: InputMoments) -> _CutMatrix:
        """Choose the inputs that a matrix (O, I) keeps, and fit their weights to its outputs."""
        device = self._replay.data.device
        weight = stored.to(device)
        moments = InputMoments(moments.gram.to(device), moments.mean.to(device))
        kept, removed, scores = by_second_order(weight, moments.gram, cut.kept)
        fitted, shift, error = refitted(weight, moments, kept)
        return _CutMatrix(
            kept=kept.cpu(),
            weight=fitted.to(stored.dtype).cpu(),
            shift=shift.cpu(),
            removed=removed.cpu(),
            scores=scores.cpu(),
            error=error,
        )


def _matrix(block: nn.Module, cut: Cut, expert: int) -> _Matrix:
    """Return the stored matrix that loses inputs; ``expert`` is ignored for a linear layer."""
    module: ExpertsModule = block.get_submodule(cut.layer)
    if cut.of_experts:
        weight = getattr(module, stack_names(module)[1]).data[expert]
        is_transposed = module.is_transposed
        has_bias = module.has_bias
    else:
        weight = module.weight.data
        is_transposed = is_conv1d(module)
        has_bias = module.bias is not None
    if is_transposed:
        weight = weight.t()
    return _Matrix(weight, has_bias)


def _tensors(
    block: nn.Module, chosen: Sequence[tuple[Cut, Tensor]], matrices: Mapping[str, list[_CutMatrix]]
) -> dict[str, Tensor]:
    """Return the tensors of the smaller block, by name."""
    tensors = block.state_dict()
    for name, (dim, index) in block_selections(block, chosen).items():
        if index.dim() == 1:
            tensors[name] = tensors[name].index_select(dim, index)
            continue
        # each expert keeps other channels
        of_experts: list[Tensor] = []
        for tensor, kept in zip(tensors[name], index, strict=True):
            of_experts.append(tensor.index_select(dim, kept))
        tensors[name] = torch.stack(of_experts)
    for cut, _ in chosen:
        module: ExpertsModule = block.get_submodule(cut.layer)
        # (E, O, kept) and (E, O); one matrix of a linear layer
        fitted = torch.stack([matrix.weight for matrix in matrices[cut.layer]])
        shift = torch.stack([matrix.shift for matrix in matrices[cut.layer]])
        if cut.of_experts:
            last = stack_names(module)[1]
            weight_name = f"{cut.layer}.{last}"
            bias_name = f"{cut.layer}.{last}_bias"
            is_transposed = module.is_transposed
        else:
            weight_name = f"{cut.layer}.weight"
            bias_name = f"{cut.layer}.bias"
            is_transposed = is_conv1d(module)
            fitted = fitted[0]
            shift = shift[0]
        if is_transposed:
            fitted = fitted.transpose(-2, -1)
        # Overwrites the columns that were merely selected above.
        tensors[weight_name] = fitted.contiguous()
        if bias_name in tensors:
            bias = tensors[bias_name]
            tensors[bias_name] = (bias.double() + shift).to(bias.dtype)
    return tensors


def _adopt(block: nn.Module, smaller: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Turn ``block`` into the ``smaller`` one, with these ``tensors`` by name if there are any."""
    if tensors:
        smaller.load_state_dict(tensors, assign=True)
    # The object stays, because the model and its hooks refer to it. So does its forward, which the replay has replaced.
    vars(block).update({"forward": block.forward, **vars(smaller)})


def _outcome(name: str, cut: Cut, matrices: Sequence[_CutMatrix]) -> CutLayer:
    """Return what a layer lost, with the mean error of its experts; the channels of a linear layer by number."""
    error = sum(matrix.error for matrix in matrices) / len(matrices)
    outcome = CutLayer(name, channels=cut.channels, kept=cut.kept, error=error)
    if cut.of_experts:
        return outcome
    (matrix,) = matrices
    return replace(outcome, removed=tuple(matrix.removed.tolist()), scores=tuple(matrix.scores.tolist()))
