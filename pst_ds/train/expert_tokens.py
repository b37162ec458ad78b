"""Tokens that each expert was trained on, and pruned weights of each expert."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pst_ds.core.experts.tokens import unused_experts
from pst_ds.nn.experts import expert_stacks
from pst_ds.parallel.ranks import all_gather_numbers

CountsOfExperts = dict[str, dict[str, list[int]]]
""" "expert_tokens" by module and "expert_zeros" by stack; empty for a model without stacks."""


def tokens_by_module(model: nn.Module) -> dict[str, Tensor]:
    """Return the tokens of each expert since this process started, over all ranks: {module: (E,) int64}. Collective."""
    counts = {}
    device = torch.device("cpu")
    for name, stack in expert_stacks(model).items():
        module = name.rpartition(".")[0]
        # a module has two stacks, through which the same tokens go
        counts[module] = stack.tokens_of_experts()
        device = stack.pst_mask.device
    if not counts:
        return {}
    # one collective for all modules, on the device that the process group exchanges tensors of
    total = all_gather_numbers(torch.cat(list(counts.values())).to(device)).sum(0).cpu()
    return dict(zip(counts, total.split([len(count) for count in counts.values()]), strict=True))


def token_figures(model: nn.Module) -> dict[str, float]:
    """Return figures of the experts' tokens for metrics.jsonl: minimum, median, and number without any. Collective."""
    tokens = list(tokens_by_module(model).values())
    if not tokens:
        return {}
    every = torch.cat(tokens)
    return {
        "expert_tokens/least": int(every.min()),
        "expert_tokens/median": float(every.double().quantile(0.5)),
        "expert_tokens/none": int((every == 0).sum()),
    }


def counts_of_experts(model: nn.Module) -> CountsOfExperts:
    """Return the counts for result.json, over all ranks; {} for a model without stacks of experts. Collective."""
    tokens = {name: counts.tolist() for name, counts in tokens_by_module(model).items()}
    pruned = {name: stack.pruned_of_experts().tolist() for name, stack in expert_stacks(model).items()}
    if not tokens:
        return {}
    return {"expert_tokens": tokens, "expert_zeros": pruned}


def warning_of_unused(tokens: Mapping[str, Sequence[int]], first_step: int) -> str:
    """Return a warning that names experts without tokens since ``first_step``; "" if all had some."""
    since = f" since step {first_step}" if first_step else ""
    unused = unused_experts(tokens, since)
    if not unused:
        return ""
    return f"{unused}, which leaves their masks to their weights. Train on more text, or on text that they are for"
