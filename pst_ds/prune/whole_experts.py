"""Whole experts dropped from a pretrained model: those that weigh least in its outputs on calibration text.

    REAP    the mean, over the tokens that an expert is given, of g ||f(x)||        arXiv 2510.13999

g is what the router gives the token there, f(x) the expert's output. An expert without a token weighs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.core.experts.routing import Routing
from pst_ds.errors import InputError
from pst_ds.nn import experts as registered
from pst_ds.nn.inject import persistent_buffers
from pst_ds.nn.model_structure import is_experts, router_names, stack_layouts
from pst_ds.progress import Progress
from pst_ds.prune.blocks import block_of, find_blocks
from pst_ds.prune.model import without_cache
from pst_ds.prune.replay import Batch, BlockReplay

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True, slots=True)
class KeptExperts:
    """Outcome for the experts of a module."""

    name: str
    kept: tuple[int, ...]
    """Previous indices of the kept experts, ascending; they are renumbered in this order."""
    scores: tuple[float, ...]
    """Score of every expert, including dropped ones."""
    tokens: tuple[int, ...]


class _Outputs:
    """Sums of g ||f(x)|| over the tokens of each expert."""

    def __init__(self, num_experts: int):
        self.sums = torch.zeros(num_experts, dtype=torch.float64)
        self.tokens = [0] * num_experts

    def add(self, outputs: Tensor, routing: Routing, is_real: Tensor | None) -> None:
        """``outputs``: (N*k, H) in the order of the experts. ``is_real``: (N,), false for padding."""
        weighed = torch.linalg.vector_norm(outputs.float(), dim=1).cpu().double() * routing.gates.abs().cpu().double()
        real = torch.ones(len(weighed), dtype=torch.bool) if is_real is None else is_real.cpu()[routing.tokens.cpu()]
        for expert, rows in routing.runs():
            self.sums[expert] += weighed[rows][real[rows]].sum()
            self.tokens[expert] += int(real[rows].sum())

    @property
    def scores(self) -> Tensor:
        return self.sums / torch.tensor(self.tokens).clamp(min=1)


def drop_experts(
    model: nn.Module, share: float, batches: Sequence[Batch], *, device: torch.device, dtype: torch.dtype
) -> list[KeptExperts]:
    """Drop floor(``share`` * E) experts of every module of a ``model`` on the CPU, in place, with their router's rows.

    One pass of the ``batches`` through the model as it is says which, block by block on ``device``, in ``dtype``; of
    equals the first go. Raises InputError for a model without stacks of experts, or whose experts cannot be told apart
    in its config, and where fewer experts would be left than a token goes to.
    """
    modules = {name: module for name, module in model.named_modules() if is_experts(module)}
    key, number = _key_of_number(model, modules)
    left = number - math.floor(share * number)
    _require_left(model, left, share)
    model.eval()
    found = _outputs(model, modules, batches, device, dtype)
    routers, kept = router_names(model), []
    for name, module in modules.items():
        order = found[name].scores.argsort(stable=True)
        chosen = order[number - left :].sort().values
        _cut(model, name, module, routers, chosen)
        scores = tuple(found[name].scores.tolist())
        kept.append(KeptExperts(name, tuple(chosen.tolist()), scores, tuple(found[name].tokens)))
    setattr(_text_config(model), key, left)
    return kept


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _key_of_number(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, int]:
    """Return (config key, value) of the number of experts. Raises InputError."""
    if not modules:
        raise InputError("the model has no stacks of experts, of which --method reap could drop any")
    for name, module in modules.items():
        try:
            stack_layouts(module)
        except ValueError as error:
            raise InputError(f"{name} has another form than the experts that can be dropped: {error}") from None
    config, numbers = _text_config(model), {int(module.num_experts) for module in modules.values()}  # type: ignore
    key = next((key for key in _NUM_EXPERTS if getattr(config, key, None) in numbers), None)
    if key is None or len(numbers) > 1:
        raise InputError(f"the modules have {sorted(numbers)} experts, which no one setting of the model's config says")
    if (getattr(config, "n_group", None) or 1) > 1:
        raise InputError(
            f"the router chooses among {config.n_group} groups of experts of one size (n_group), and experts of any "
            "group can weigh least; prune the weights of all experts instead, with --method wanda"
        )
    return key, numbers.pop()


def _require_left(model: nn.Module, left: int, share: float) -> None:
    per_token = next((n for key in _PER_TOKEN if (n := getattr(_text_config(model), key, None))), 1)
    if left < per_token:
        raise InputError(
            f"--sparsity {share} leaves {left} experts, and the router gives a token to {per_token}; ask for less"
        )


@torch.no_grad()
def _outputs(
    model: nn.Module, modules: dict[str, nn.Module], batches: Sequence[Batch], device: torch.device, dtype: torch.dtype
) -> dict[str, _Outputs]:
    """Measure the weighted output norms of all experts, by module, in one pass through the blocks."""
    name_of = {module: name for name, module in modules.items()}
    found = {name: _Outputs(int(module.num_experts)) for name, module in modules.items()}  # type: ignore[arg-type]
    is_real: Tensor | None = None

    def begin(batch: Batch) -> None:
        nonlocal is_real
        is_real = batch["attention_mask"].flatten().bool() if "attention_mask" in batch else None

    def forward(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        routing = Routing.of(index, weights, experts.num_experts)
        heard = _heard(found[name_of[experts]], routing, is_real)
        return registered.of_routing(experts, hidden, weights, routing, after=heard)

    stack, blocks = find_blocks(model, list(modules))
    last = max(block_of(name, stack) for name in modules)
    registered.switch_on(modules.values())
    try:
        with (
            registered.registered(forward),
            without_cache(model),
            BlockReplay(model, blocks, batches, device, dtype) as replay,
            Progress("prune", last + 1, "blocks") as shown,
        ):
            for index in range(last + 1):
                with replay.resident(index):
                    replay.run(index, keep_output=True, before=begin)
                shown.add(1, f"{stack}.{index}")
    finally:
        registered.switch_off(modules.values())
    return found


def _heard(outputs: _Outputs, routing: Routing, is_real: Tensor | None) -> Callable[[Tensor], None]:
    return lambda made: outputs.add(made, routing, is_real)


def _cut(model: nn.Module, name: str, module: nn.Module, routers: set[str], kept: Tensor) -> None:
    """Keep these experts of a module, and their entries in its router and the parent module."""
    number, parent = int(module.num_experts), name.rpartition(".")[0]  # type: ignore[arg-type]
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
