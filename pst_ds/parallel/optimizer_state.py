"""Read and write the optimizer's fp32 masters and Adam moments in place, for every engine. No collectives.

Every engine holds the values of a trainable parameter in flat fp32 tensors, its *owners*: ZeRO-3 in one per sub-group
with this rank's shards, ZeRO-1 and 2 (and DeepSpeed's bf16 optimizer) in one per parameter group with an arbitrary
range of it, others in one per parameter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pst_ds.parallel import sharding
from pst_ds.parallel.engine import Engine, inner_optimizer

MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"
KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ)
"""Kinds of state of every trainable value: its fp32 master and Adam's two moments."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """Flat values [start, stop) of a parameter, stored from index ``offset`` of ``owner``."""

    name: str
    start: int
    stop: int
    owner: Tensor
    offset: int

    def cut(self, start: int, stop: int) -> "Fragment":
        """Return the part within [start, stop), which may be empty."""
        start = max(start, self.start)
        stop = max(start, min(stop, self.stop))
        offset = self.offset + start - self.start
        return Fragment(name=self.name, start=start, stop=stop, owner=self.owner, offset=offset)


def is_replicated(params: Iterable[nn.Parameter]) -> bool:
    """Return whether every rank holds the full optimizer state of all ``params``."""
    return not any(sharding.is_partitioned(p) or hasattr(p, "_hp_mapping") for p in params)


def is_cut_evenly(params: Iterable[nn.Parameter]) -> bool:
    """Return whether rank r holds shard r of every parameter as partitioned by ZeRO-3, not by ZeRO-1 or 2."""
    return not any(hasattr(p, "_hp_mapping") for p in params)


def local_fragments(engine: Engine, named: Sequence[tuple[str, nn.Parameter]]) -> list[Fragment]:
    """Return the fragments of trainable parameters in this rank's optimizer, in their order, without padding."""
    inner = inner_optimizer(engine)
    fragments: list[Fragment] = []
    for name, param in named:
        if sharding.is_partitioned(param):  # ZeRO-3
            optimizer = param._z3_optimizer
            shard = sharding.shard_of(param)
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
            fragment = Fragment(
                name=name,
                start=shard.start,
                stop=shard.start + shard.values.numel(),
                owner=optimizer.fp32_partitioned_groups_flat[group],
                offset=offset,
            )
        elif hasattr(param, "_hp_mapping"):  # ZeRO-1 and 2, and DeepSpeed's bf16 optimizer
            mapping = param._hp_mapping
            if mapping is None:  # no value of the parameter lies in this rank's range
                continue
            # DeepSpeed says high and low precision for the fp32 master and the parameter
            in_owner = mapping.hp_fragment_address
            in_param = mapping.lp_fragment_address
            fragment = Fragment(
                name=name,
                start=in_param.start,
                stop=in_param.start + in_param.numel,
                owner=inner.param_groups[mapping.param_group_index]["params"][0],
                offset=in_owner.start,
            )
        else:
            owner = getattr(param, "fp32_master", param)
            fragment = Fragment(name=name, start=0, stop=param.numel(), owner=owner, offset=0)
        fragments.append(fragment)
    return fragments


def values(engine: Engine, fragments: Sequence[Fragment], kind: str) -> list[Tensor]:
    """Return the values of each fragment, flat fp32: views, or 0 for a moment that does not exist yet."""
    state = inner_optimizer(engine).state
    views: list[Tensor] = []
    for fragment in fragments:
        count = fragment.stop - fragment.start
        # get(), because the optimizer's state is a defaultdict, in which a lookup would create an entry
        flat = fragment.owner if kind == MASTER else state.get(fragment.owner, {}).get(kind)
        if flat is None:
            views.append(torch.zeros(count))
        else:
            views.append(flat.detach().view(-1).narrow(0, fragment.offset, count))
    return views


def adam_steps(engine: Engine, fragments: Sequence[Fragment]) -> dict[str, int]:
    """Return Adam's step count of each fragment's parameter, which its bias correction depends on."""
    state = inner_optimizer(engine).state
    return {fragment.name: int(state.get(fragment.owner, {}).get("step", 0)) for fragment in fragments}


def prepare_moments(engine: Engine, fragments: Sequence[Fragment], steps: dict[str, int]) -> None:
    """Set the moments of the owners of ``fragments`` to 0, and their step counts to ``steps``, by parameter name.

    Parameters of one owner share the largest count. An owner without steps is left to the optimizer.
    """
    state = inner_optimizer(engine).state
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
    """Reset the owners of ``fragments`` to the optimizer state before the first step."""
    state = inner_optimizer(engine).state
    for fragment in fragments:
        for kept in state.get(fragment.owner, {}).values():
            if torch.is_tensor(kept):
                kept.zero_()


def set_counters(engine: Engine, *, applied: int, skipped: int, accumulation: int) -> None:
    """Let the engine continue the step counts of an earlier process."""
    engine.global_steps = applied + skipped  # DeepSpeed counts skipped steps too
    engine.skipped_steps = skipped
    if hasattr(engine, "micro_steps"):
        engine.micro_steps = engine.global_steps * accumulation
