"""The groups that PST trains in, each with a learning rate of its own, and AdamW over them."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import nn

from pst_ds.config.train import TrainConfig
from pst_ds.core.schedule import USUAL_STEPS, default_learning_rates
from pst_ds.errors import InputError
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import SCORE_FACTORS
from pst_ds.nn.model_structure import model_width
from pst_ds.nn.prompt import NAME as PROMPT
from pst_ds.nn.tables.embedding import pst_embeddings
from pst_ds.parallel import zero3
from pst_ds.parallel.master_adamw import MasterAdamW

_DEFAULTS = TrainConfig(num_steps=1)


def pst_parameter_groups(
    model: nn.Module,
    *,
    score_learning_rate: float | None = None,
    update_learning_rate: float | None = None,
    gate_learning_rate: float | None = None,
    prompt_learning_rate: float | None = None,
    embedding_learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    betas: tuple[float, float] = (_DEFAULTS.adam_beta1, _DEFAULTS.adam_beta2),
    num_steps: int = USUAL_STEPS,
    epochs: float = 1.0,
) -> list[dict[str, Any]]:
    """Sort the trained parameters of ``model`` into AdamW's groups; none is empty or has weight decay.

    Args:
        model: a model with PST modules.
        score_learning_rate: of the group "scores": A, B, R and C, or a score of each weight. None, here and below, is
            the rate of :func:`pst_ds.core.schedule.default_learning_rates` for the model's width and ``num_steps``, and
            for what it predicts: tokens, or as many classes as its config has labels (one: numbers of many values).
        update_learning_rate: of the group "updates": U and V.
        gate_learning_rate: of the group "gates": those of learned ranks.
        prompt_learning_rate: of the group "prompt".
        embedding_learning_rate: of the group "embeddings": U and V of embeddings.
        head_learning_rate: of the group "head": all that is trained in full.
        betas: Adam's two, of all groups. The default is the run file's.
        num_steps: optimizer steps of the run, for rates that are None; like ``epochs``, its passes over the data.

    Returns:
        Groups for ``torch.optim.AdamW``, each with "name", "lr" and "peak_lr" (what a warmup goes up to).
    """
    default = default_learning_rates(
        width=model_width(model), num_steps=num_steps, epochs=epochs, num_labels=_num_labels(model),
        predicts_tokens=_predicts_tokens(model),
    )  # fmt: skip
    whole = all(param.requires_grad for param in model.parameters() if param.dtype.is_floating_point)
    head = default.everything if whole else default.head
    multiplies = any(layer.constants.multiplicative for layer in pst_layers(model).values())
    updates = default.multiplicative if multiplies else default.updates
    rates = {
        "scores": default.scores if score_learning_rate is None else score_learning_rate,
        "updates": updates if update_learning_rate is None else update_learning_rate,
        "gates": default.gates if gate_learning_rate is None else gate_learning_rate,
        "prompt": default.prompt if prompt_learning_rate is None else prompt_learning_rate,
        "embeddings": default.embeddings if embedding_learning_rate is None else embedding_learning_rate,
        "head": head if head_learning_rate is None else head_learning_rate,
    }
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    embeddings = pst_embeddings(model)
    for name, param in model.named_parameters():
        if param.requires_grad:
            groups[_group_of(name, embeddings)].append(param)
    shared = {"weight_decay": 0.0, "betas": betas}
    return [
        {"params": params, "name": name, "lr": rates[name], "peak_lr": rates[name], **shared}
        for name, params in groups.items()
        if params
    ]


def _predicts_tokens(model: nn.Module) -> bool:
    output_layer = getattr(model, "get_output_embeddings", lambda: None)
    return output_layer() is not None


def _num_labels(model: nn.Module) -> int:
    """Return how many classes a classifier's config has; 0 for a regression, whose labels may have many values."""
    labels: int = getattr(getattr(model, "config", None), "num_labels", 0)
    return labels if labels > 1 else 0


def _group_of(name: str, embeddings: Container[str]) -> str:
    """Name of the group of a trained parameter. ``embeddings``: names of the modules that are PST embeddings."""
    owner, _, last = name.rpartition(".")
    if owner in embeddings:
        return "embeddings"
    if owner.rpartition(".")[2] == PROMPT:
        return "prompt"
    if last == "pst_G":
        return "gates"
    if last.startswith("pst_"):
        return "scores" if last.removeprefix("pst_") in SCORE_FACTORS else "updates"
    return "head"


def pst_optimizer(model: nn.Module, **rates: Any) -> MasterAdamW:
    """Return AdamW over :func:`pst_parameter_groups`, on fp32 masters where the model is in bf16.

    Under DeepSpeed the engine keeps the masters, and this is plain AdamW; ``deepspeed.initialize`` itself wants torch's
    class: ``torch.optim.AdamW(pst_parameter_groups(model))``.

    Args:
        model: a model with PST modules.
        rates: learning rates and betas, as :func:`pst_parameter_groups` takes them.

    Raises:
        InputError: the model is in fp16 and not under ZeRO-3, which alone has masters for it at once.
    """
    groups = pst_parameter_groups(model, **rates)
    params = [param for group in groups for param in group["params"]]
    is_partitioned = any(zero3.is_partitioned(param) for param in model.parameters())
    if not is_partitioned and any(param.dtype == torch.float16 for param in params):
        raise InputError(
            "the trained parameters are torch.float16, which AdamW cannot train: load the model in torch.float32 and "
            "let the loss be scaled (fp16=True), or load it in torch.bfloat16"
        )
    stays_here = not torch.accelerator.is_available() and not is_partitioned  # fused is for the CPU, see LocalEngine
    return MasterAdamW(groups, fused=stays_here)
