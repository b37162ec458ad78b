"""Llamas as the experts of a Mixtral: their MLPs are its experts, and everything else is their mean."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pst_ds.errors import InputError

_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "attention_dropout", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Settings that both families have."""


def mixtral_config(config: Any, experts: int, per_token: int) -> MixtralConfig:
    """Return the config of a Llama with ``experts`` experts in place of each MLP. Raises InputError."""
    if type(config) is not LlamaConfig or config.attention_bias or config.mlp_bias:
        raise InputError(f"model_type = {config.model_type!r}: not a Llama without biases. Choose another --base")
    if not 1 <= per_token <= experts:
        raise InputError(f"--per-token = {per_token}: there are {experts} experts. Choose 1 to {experts}")
    kept = {name: getattr(config, name) for name in _KEPT}
    return MixtralConfig(**kept, num_local_experts=experts, num_experts_per_tok=per_token, sliding_window=None)


@torch.no_grad()
def mixture(branches: Sequence[LlamaForCausalLM], routers: Sequence[Tensor], per_token: int) -> MixtralForCausalLM:
    """Return a Mixtral in the branches' dtype with the MLPs of branch e as expert e, and ``routers`` (E, H) by block.

    Gates of a token sum to 1, so equal branches make what each of them makes. Raises InputError.
    """
    config = mixtral_config(branches[0].config, len(branches), per_token)
    with torch.device("meta"):
        made = MixtralForCausalLM(config)
    states = [branch.state_dict() for branch in branches]
    stacks = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    state = {name: stack.float().mean(0).to(stack.dtype) for name, stack in stacks.items() if ".mlp." not in name}
    for block, router in enumerate(routers):
        mlp = f"model.layers.{block}.mlp"
        gate, up, down = (stacks[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        state |= {f"{mlp}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{mlp}.experts.down_proj": down}
        state[f"{mlp}.gate.weight"] = router.to(gate.dtype)
    made.load_state_dict(state, assign=True)
    made.model.rotary_emb = type(made.model.rotary_emb)(config)  # its buffers are not in the state dict
    made.tie_weights()
    made.generation_config = branches[0].generation_config
    return made.eval()


@torch.no_grad()
def fitted_routers(model: LlamaForCausalLM, corpora: Sequence[Tensor]) -> list[Tensor]:
    """Return routers (E, H) by block, which classify the inputs of its MLP by their corpus, of E corpora (B, T).

    Random routers would first send tokens to arbitrary experts.
    """
    inputs: list[list[Tensor]] = [[] for _ in model.model.layers]
    with ExitStack() as hooks:
        for block, layer in enumerate(model.model.layers):
            hooks.callback(layer.mlp.register_forward_pre_hook(partial(_keep, inputs[block])).remove)
        for rows in corpora:
            for row in rows:
                model.model(row.unsqueeze(0))
    labels = torch.arange(len(corpora)).repeat_interleave(torch.tensor([rows.numel() for rows in corpora]))
    from sklearn.linear_model import LogisticRegression  # half a second, which only this function needs

    classifier = LogisticRegression(fit_intercept=False, tol=1e-2)  # routers have no bias, and training follows
    return [torch.from_numpy(classifier.fit(torch.cat(tokens), labels).coef_).float() for tokens in inputs]


def _keep(kept: list[Tensor], module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    kept.append(arguments[0].flatten(0, 1).float())


def distances(model: nn.Module) -> dict[str, float]:
    """Return how far experts are apart, by stack: the norm of differences from their mean over the norm of the mean."""
    found = {}
    for name, stack in model.named_parameters():
        if ".experts." in name:
            weights = stack.detach().float()
            mean = weights.mean(0)
            found[name] = float((weights - mean).square().sum((1, 2)).mean().sqrt() / mean.norm())
    return found


@torch.no_grad()
def loss_and_shares(model: MixtralForCausalLM, rows: Tensor) -> tuple[float, Tensor]:
    """Return the loss on ``rows`` (B, T) in nats per token, and shares of their tokens by (block, expert)."""
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts)
    losses = []
    with ExitStack() as hooks:
        for block, layer in enumerate(model.model.layers):
            hooks.callback(layer.mlp.gate.register_forward_hook(partial(_count, counts[block])).remove)
        for row in rows:
            logits = model(row.unsqueeze(0)).logits[0, :-1]
            losses.append(cross_entropy(logits.float(), row[1:]))
    return float(torch.stack(losses).mean()), counts / counts.sum(1, keepdim=True)


def _count(counts: Tensor, router: nn.Module, arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    counts += output[2].flatten().bincount(minlength=len(counts))
