"""A Llama as a Mixtral whose experts are copies of its MLPs: it computes the same, whatever the router chooses.

For what the router gives the k experts of a token adds up to 1 in a Mixtral, and copies make the same of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

from pst_ds.errors import InputError

_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "attention_dropout", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Settings that both families have."""
STACKS = ("experts.gate_up_proj", "experts.down_proj")


def mixtral_config(config: Any, experts: int, per_token: int) -> MixtralConfig:
    """Return the config of a Llama's with so many ``experts`` in place of each MLP. Raises InputError."""
    if type(config) is not LlamaConfig or config.attention_bias or config.mlp_bias:
        raise InputError(f"a Mixtral is made of a Llama without biases, and this is {config.model_type}, or has some")
    if not 1 <= per_token <= experts:
        raise InputError(f"a token goes to {per_token} of {experts} experts; take 1 to {experts}")
    kept = {name: getattr(config, name) for name in _KEPT}
    return MixtralConfig(**kept, num_local_experts=experts, num_experts_per_tok=per_token, sliding_window=None)


@torch.no_grad()
def upcycled(model: Any, experts: int, per_token: int, seed: int = 0) -> MixtralForCausalLM:
    """Return a Mixtral in the dtype of ``model``, a Llama, that computes the same but for the rounding of sums.

    Routers are normal numbers of the config's ``initializer_range``, drawn from ``seed``: they spread tokens evenly,
    and training tells the copies apart by the tokens that each is given. Raises InputError.
    """
    config = mixtral_config(model.config, experts, per_token)
    with torch.device("meta"):
        made = MixtralForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = dict(model.state_dict())
    for block in range(config.num_hidden_layers):
        mlp = f"model.layers.{block}.mlp"
        gate, up, down = (state.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        state[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate, up]).repeat(experts, 1, 1)
        state[f"{mlp}.experts.down_proj"] = down.repeat(experts, 1, 1)
        router = torch.randn(experts, config.hidden_size, generator=generator) * config.initializer_range
        state[f"{mlp}.gate.weight"] = router.to(gate.dtype)
    made.load_state_dict(state, assign=True)
    made.model.rotary_emb = type(made.model.rotary_emb)(config)  # its buffers are in no state dict
    made.tie_weights()
    made.generation_config = model.generation_config
    return made.eval()


def apart(model: nn.Module) -> dict[str, float]:
    """Return how far experts are apart, by stack: the norm of what differs from their mean, over the norm of that mean.

    0: all are copies of one.
    """
    found = {}
    for name, stack in model.named_parameters():
        if name.endswith(STACKS):
            mean = stack.detach().float().mean(0)
            squares = sum(float((one.detach().float() - mean).square().sum()) for one in stack)
            found[name] = (squares / len(stack)) ** 0.5 / float(mean.norm())
    return found


@torch.no_grad()
def average_experts(model: nn.Module) -> None:
    """Put the mean of a stack's experts in the place of each, in every stack."""
    for name, stack in model.named_parameters():
        if name.endswith(STACKS):
            stack.copy_(stack.float().mean(0, keepdim=True).expand_as(stack))


@torch.no_grad()
def loss_of(model: Any, ids: Tensor) -> float:
    """Return the mean loss of a causal model on ``ids`` (B, T), in nats a token."""
    logits = torch.cat([model(row.unsqueeze(0)).logits for row in ids])[:, :-1]
    return float(cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()))


@torch.no_grad()
def token_shares(model: Any, ids: Tensor) -> dict[str, list[float]]:
    """Return the share of the tokens of ``ids`` (B, T) that each expert of a Mixtral is given, by the router's name.

    Each of the k experts of a token counts; the shares of a router add up to 1.
    """
    counts: dict[str, Tensor] = {}

    def count(name: str, chosen: Tensor) -> None:
        counts[name] = chosen.flatten().bincount(minlength=model.config.num_local_experts)

    routers = {name: module for name, module in model.named_modules() if name.endswith("mlp.gate")}
    hooks = [
        router.register_forward_hook(lambda _, __, output, name=name: count(name, output[2]))
        for name, router in routers.items()
    ]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (found / found.sum()).tolist() for name, found in counts.items()}
