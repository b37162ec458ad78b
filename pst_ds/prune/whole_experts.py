"""Drop whole experts of a pretrained model: those that contribute least to its outputs on calibration data.

    REAP    the mean of g ||f(x)|| over the tokens routed to an expert        arXiv 2510.13999

g is the token's router gate, f(x) the expert's output. An expert without a token has score 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pst_ds.core.experts.routing import Routing
from pst_ds.core.one_shot.shares import Ranks
from pst_ds.errors import InputError
from pst_ds.nn import experts as registered
from pst_ds.nn.inject import persistent_buffers
from pst_ds.nn.input_sums import OrderFreeSum
from pst_ds.nn.model_structure import experts_per_token, is_experts, router_names, stack_layouts
from pst_ds.progress import Progress
from pst_ds.prune.blocks import (
    Batch,
    BlockReplay,
    BlockSource,
    Calibration,
    SourceOf,
    block_of,
    find_blocks,
    text_config,
)

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class KeptExperts:
    """Outcome for the experts of a module."""

    name: str
    kept: tuple[int, ...]
    """Previous indices of the kept experts, ascending; they are renumbered in this order."""
    scores: tuple[float, ...]
    """Score of every expert, including dropped ones."""
    tokens: tuple[int, ...]

    @property
    def facts(self) -> dict[str, object]:
        """For the pruning record."""
        return {"kept": self.kept, "scores": self.scores, "expert_tokens": self.tokens}


class _Outputs:
    """Sums of g ||f(x)|| over the tokens of each expert."""

    def __init__(self, num_experts: int):
        self.sums, self.tokens = OrderFreeSum(), [0] * num_experts

    def add(self, outputs: Tensor, routing: Routing, is_real: Tensor | None) -> None:
        """Add ``outputs``, (N*k, H) in the order of the experts. ``is_real``: (N,), false for padding."""
        weighed = torch.linalg.vector_norm(outputs.float(), dim=1).cpu().double() * routing.gates.abs().cpu().double()
        real = torch.ones(len(weighed), dtype=torch.bool) if is_real is None else is_real.cpu()[routing.tokens.cpu()]
        sums = torch.zeros(len(self.tokens))
        for expert, rows in routing.runs():
            sums[expert] = weighed[rows][real[rows]].sum()
            self.tokens[expert] += int(real[rows].sum())
        self.sums.add([sums])

    def settle(self, ranks: Ranks) -> None:
        """Fix the step of the sums by the first piece of rank 0. Collective."""
        self.sums.settle(float(ranks.of_first(torch.tensor(self.sums.largest, dtype=torch.float64))))

    def add_ranks(self, ranks: Ranks) -> None:
        """Add the sums of all ranks. Collective."""
        self.sums.add([torch.zeros(len(self.tokens))])
        self.sums.add_ranks(ranks)
        self.tokens = ranks.sums.all_sum(torch.tensor(self.tokens)).tolist()

    @property
    def scores(self) -> Tensor:
        return self.sums.whole() / torch.tensor(self.tokens).clamp(min=1)


def drop_experts(
    model: nn.Module, share: float, data: Calibration, *, source_of: SourceOf = BlockSource
) -> list[KeptExperts]:
    """Drop floor(``share`` * E) experts of every module of a ``model`` on the CPU, in place, with their router's rows.

    The scores come from one pass of the ``data`` through the dense model, block by block. Among equal scores the first
    experts are dropped. Raises InputError for a model without stacks of experts, if its config does not determine their
    number, and if fewer experts would be left than a token is routed to.
    """
    modules = {name: module for name, module in model.named_modules() if is_experts(module)}
    key, number = _key_of_number(model, modules)
    left = number - math.floor(share * number)
    per_token = experts_per_token(text_config(model))
    if left < per_token:
        raise InputError(
            f"--sparsity {share} leaves {left} experts, and the router gives a token to {per_token}. Choose a lower "
            "sparsity"
        )
    model.eval()
    found = _outputs(model, modules, data, source_of)
    stack, blocks = find_blocks(model, list(modules))
    source, routers, kept = source_of(stack, blocks), router_names(model), []
    for name, module in modules.items():
        order = found[name].scores.argsort(stable=True)
        chosen = order[number - left :].sort().values
        index = block_of(name, stack)
        with source.loaded(index):
            _cut(model, name, module, routers, chosen)
            source.finish(index, [])
        scores = tuple(found[name].scores.tolist())
        kept.append(KeptExperts(name, tuple(chosen.tolist()), scores, tuple(found[name].tokens)))
    setattr(text_config(model), key, left)
    return kept


def _key_of_number(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, int]:
    """Return (config key, value) of the number of experts. Raises InputError."""
    if not modules:
        raise InputError("--method reap: the model has no stacks of experts. Choose another --method")
    for name, module in modules.items():
        try:
            stack_layouts(module)
        except ValueError as error:
            raise InputError(f"--method reap: {name} is not a supported stack of experts: {error}") from None
    config, numbers = text_config(model), {_num_experts(module) for module in modules.values()}
    key = next((key for key in _NUM_EXPERTS if getattr(config, key, None) in numbers), None)
    if key is None or len(numbers) > 1:
        raise InputError(
            f"--method reap: the modules have {sorted(numbers)} experts, and no setting of the model's config says so. "
            "Prune the weights of all experts with --method wanda"
        )
    if (getattr(config, "n_group", None) or 1) > 1:
        raise InputError(
            f"n_group = {config.n_group}: the router chooses among {config.n_group} groups of experts of equal size, "
            "which dropping experts would change. Prune the weights of all experts with --method wanda"
        )
    return key, numbers.pop()


def _num_experts(module: nn.Module) -> int:
    return int(module.num_experts)  # type: ignore[arg-type]


@torch.no_grad()
def _outputs(
    model: nn.Module, modules: dict[str, nn.Module], data: Calibration, source_of: SourceOf
) -> dict[str, _Outputs]:
    """Measure the weighted output norms of all experts, by module, in one pass through the blocks."""
    found = {module: _Outputs(_num_experts(module)) for module in modules.values()}
    is_real: Tensor | None = None

    def begin(batch: Batch) -> None:
        nonlocal is_real
        is_real = batch["attention_mask"].flatten().bool() if "attention_mask" in batch else None

    def forward(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        routing = Routing.of(index, weights, _num_experts(experts))
        return registered.of_routing(
            experts, hidden, weights, routing, after=lambda made: found[experts].add(made, routing, is_real)
        )

    stack, blocks = find_blocks(model, list(modules))
    last = max(block_of(name, stack) for name in modules)
    replay = BlockReplay(model, source_of(stack, blocks), data)
    registered.switch_on(modules.values())
    try:
        with registered.registered(forward), replay.in_place(), Progress("prune", last + 1, "blocks") as shown:
            for index in range(last + 1):
                own = [found[module] for name, module in modules.items() if block_of(name, stack) == index]
                with replay.resident(index):
                    replay.run(index, keep_output=True, before=begin, after_first=partial(_settle, own, data.ranks))
                for one in own:
                    one.add_ranks(data.ranks)
                shown.add(1, f"{stack}.{index}")
    finally:
        registered.switch_off(modules.values())
    return {name: found[module] for name, module in modules.items()}


def _settle(sums: Sequence[_Outputs], ranks: Ranks) -> None:
    for one in sums:
        one.settle(ranks)


def _cut(model: nn.Module, name: str, module: nn.Module, routers: set[str], kept: Tensor) -> None:
    """Keep these experts of a module, and their entries in its router and the parent module."""
    number, parent = _num_experts(module), name.rpartition(".")[0]
    beside = [model.get_submodule(router) for router in sorted(routers) if router.startswith(parent + ".")]
    persistent = {id(buffer) for buffer in persistent_buffers(model).values()}
    for owner in (module, *beside, model.get_submodule(parent)):
        for attribute, param in list(owner._parameters.items()):
            if param is not None and param.shape[:1] == (number,):
                owner._parameters[attribute] = nn.Parameter(param.data[kept].contiguous(), param.requires_grad)
        for attribute, buffer in list(owner._buffers.items()):
            if buffer is not None and id(buffer) in persistent and buffer.shape == (number,):
                owner._buffers[attribute] = buffer[kept].contiguous()
        for attribute in (*_NUM_EXPERTS, "out_features"):
            if vars(owner).get(attribute) == number:
                setattr(owner, attribute, len(kept))
