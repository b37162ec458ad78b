"""Read and write the optimizer's fp32 masters and Adam moments in place, for every engine. No collectives.

Every engine holds the values of a trainable parameter in fp32 tensors, its *owners*: ZeRO-3 in one per sub-group with
this rank's shards, ZeRO-1 and 2 (and DeepSpeed's bf16 optimizer) in one per parameter group with an arbitrary range of
it, others in one per parameter. :meth:`pst_ds.parallel.sharding.Sharding.fragment` finds them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pst_ds.parallel import sharding
from pst_ds.parallel.engine import Engine, inner_optimizer
from pst_ds.parallel.sharding import Fragment, sharding_of

MASTER = "master"
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ)
"""Kinds of state of every trainable value: its fp32 master and Adam's two moments."""


def is_replicated(params: Iterable[nn.Parameter]) -> bool:
    """Return whether every rank holds the full optimizer state of all ``params``."""
    return all(sharding.replicates_optimizer(param) for param in params)


def is_cut_evenly(params: Iterable[nn.Parameter]) -> bool:
    """Return whether rank r holds equal share r of every parameter, as under ZeRO-3, and not as at ZeRO-1 or 2."""
    return all(sharding.cuts_optimizer_evenly(param) for param in params)


def local_fragments(engine: Engine, named: Sequence[tuple[str, nn.Parameter]]) -> list[Fragment]:
    """Return the fragments of trainable parameters in this rank's optimizer, in their order, without padding."""
    optimizer = inner_optimizer(engine)
    fragments: list[Fragment] = []
    for name, param in named:
        fragment = sharding.fragment_of(name, param, optimizer)
        if fragment is not None:
            fragments.append(fragment)
    return fragments


def values(engine: Engine, fragments: Sequence[Fragment], kind: str) -> list[Tensor]:
    """Return the values of each fragment, flat fp32: views, or 0 for a moment that does not exist yet."""
    state = inner_optimizer(engine).state
    views: list[Tensor] = []
    for fragment in fragments:
        count = fragment.stop - fragment.start
        # get(), because the optimizer's state is a defaultdict, in which a lookup would create an entry
        held = fragment.owner if kind == MASTER else state.get(fragment.owner, {}).get(kind)
        if held is None:
            views.append(torch.zeros(count))
        else:
            flat = sharding_of(held).rows(held).view(-1)  # under FSDP2 owners and moments are DTensors
            views.append(flat.narrow(0, fragment.offset, count))
    return views


def adam_steps(engine: Engine, fragments: Sequence[Fragment]) -> dict[str, int]:
    """Return Adam's step count of each fragment's parameter, which its bias correction depends on."""
    state = inner_optimizer(engine).state
    steps: dict[str, int] = {}
    for fragment in fragments:
        steps[fragment.name] = int(state.get(fragment.owner, {}).get("step", 0))
    return steps


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
            # fp32 on the CPU, as torch's AdamW creates it unless it is fused
            entry["step"] = torch.tensor(float(count))
            for kind in (EXP_AVG, EXP_AVG_SQ):
                if kind not in entry:
                    entry[kind] = torch.zeros_like(owner, memory_format=torch.preserve_format).detach()
                entry[kind].zero_()


def forget_moments(engine: Engine, fragments: Sequence[Fragment]) -> None:
    """Reset the owners of ``fragments`` to the optimizer state before the first step."""
    state = inner_optimizer(engine).state
    for fragment in fragments:
        # the moments, and torch's count of steps, which is a tensor too
        for value in state.get(fragment.owner, {}).values():
            if torch.is_tensor(value):
                value.zero_()


def set_counters(engine: Engine, *, applied: int, skipped: int, accumulation: int) -> None:
    """Let the engine continue the step counts of an earlier process."""
    engine.global_steps = applied + skipped  # DeepSpeed counts skipped steps too
    engine.skipped_steps = skipped
    if hasattr(engine, "micro_steps"):
        engine.micro_steps = engine.global_steps * accumulation
