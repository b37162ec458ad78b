"""The optimizer's fp32 masters and Adam moments as each engine keeps them, read and written where they lie. Every
engine holds the values of a trainable parameter in flat fp32 tensors, its *owners*: ZeRO-3 in one a sub-group with this
rank's shards, ZeRO-1 and 2 (and DeepSpeed's bf16 optimizer) in one a parameter group with an arbitrary run of it,
others in one a parameter. Nothing here communicates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pst_ds.parallel import zero3
from pst_ds.parallel.engine import Engine

MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"
KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ)
"""Kinds of state of every trainable value: its fp32 master and Adam's two moments."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """Flat values [start, stop) of a parameter, held here from index ``offset`` of ``owner`` on."""

    name: str
    start: int
    stop: int
    owner: Tensor
    offset: int

    def cut(self, start: int, stop: int) -> Fragment:
        """The part of it within [start, stop), which may be empty."""
        start, stop = max(start, self.start), min(stop, self.stop)
        return Fragment(self.name, start, max(start, stop), self.owner, self.offset + start - self.start)


def is_replicated(params: Iterable[nn.Parameter]) -> bool:
    """Return whether every rank holds the optimizer state of all ``params`` whole."""
    return not any(zero3.is_partitioned(p) or hasattr(p, "_hp_mapping") for p in params)


def is_cut_evenly(params: Iterable[nn.Parameter]) -> bool:
    """Return whether rank r holds shard r of every parameter, as ZeRO-3 cuts it; ZeRO-1 and 2 cut elsewhere."""
    return not any(hasattr(p, "_hp_mapping") for p in params)


def local_fragments(engine: Engine, named: Sequence[tuple[str, nn.Parameter]]) -> list[Fragment]:
    """Return what this rank's optimizer holds of trainable parameters, in their order, without padding."""
    inner = _inner(engine)
    found = []
    for name, param in named:
        if zero3.is_partitioned(param):
            found.append(_zero3_fragment(name, param))
        elif hasattr(param, "_hp_mapping"):
            mapping = param._hp_mapping
            if mapping is not None:
                owner = inner.param_groups[mapping.param_group_index]["params"][0]
                inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
                found.append(Fragment(name, outside.start, outside.start + outside.numel, owner, inside.start))
        else:
            found.append(Fragment(name, 0, param.numel(), getattr(param, "fp32_master", param), 0))
    return found


def values(engine: Engine, fragments: Sequence[Fragment], kind: str) -> list[Tensor]:
    """Return the values of each fragment, flat fp32: views of the engine's own, or zeros for a moment not made yet."""
    state = _inner(engine).state
    views = []
    for fragment in fragments:
        flat = fragment.owner if kind == MASTER else state.get(fragment.owner, {}).get(kind)
        count = fragment.stop - fragment.start
        views.append(torch.zeros(count) if flat is None else flat.detach().view(-1).narrow(0, fragment.offset, count))
    return views


def adam_steps(engine: Engine, fragments: Sequence[Fragment]) -> dict[str, int]:
    """Steps that Adam has counted for each fragment's parameter: its bias correction depends on them."""
    state = _inner(engine).state
    return {fragment.name: int(state.get(fragment.owner, {}).get("step", 0)) for fragment in fragments}


def prepare_moments(engine: Engine, fragments: Sequence[Fragment], steps: dict[str, int]) -> None:
    """Give the owners of ``fragments`` moments of zero and their count of steps, as after ``steps`` by parameter name.

    Parameters of one owner share a count, the largest. An owner with none is left to the optimizer.
    """
    state = _inner(engine).state
    counts: dict[Tensor, int] = {}  # tensors compare by identity as keys
    for fragment in fragments:
        counts[fragment.owner] = max(counts.get(fragment.owner, 0), steps.get(fragment.name, 0))
    for owner, count in counts.items():
        if count:
            entry = state[owner]
            entry["step"] = torch.tensor(float(count))
            for kind in (EXP_AVG, EXP_AVG_SQ):
                if kind not in entry:
                    entry[kind] = torch.zeros_like(owner, memory_format=torch.preserve_format).detach()
                entry[kind].zero_()


def forget_moments(engine: Engine, fragments: Sequence[Fragment]) -> None:
    """Give the owners of ``fragments`` the state of an optimizer that has taken no step."""
    state = _inner(engine).state
    for fragment in fragments:
        for kept in state.get(fragment.owner, {}).values():
            if torch.is_tensor(kept):
                kept.zero_()


def set_counters(engine: Engine, *, applied: int, skipped: int, accumulation: int) -> None:
    """Let the engine count optimizer steps on from those of an earlier process."""
    engine.global_steps, engine.skipped_steps = applied + skipped, skipped
    if hasattr(engine, "micro_steps"):
        engine.micro_steps = engine.global_steps * accumulation


def _inner(engine: Engine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _zero3_fragment(name: str, param: nn.Parameter) -> Fragment:
    optimizer = param._z3_optimizer
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
    shard = zero3.shard_of(param)
    stop = shard.start + shard.values.numel()
    return Fragment(name, shard.start, stop, optimizer.fp32_partitioned_groups_flat[group], offset)
