"""AdamW over the parameter groups of PST, each with its learning rate."""

from collections.abc import Container
from typing import Any

import torch
from torch import nn

from pst_ds.config.additions import SECTION
from pst_ds.config.train import TrainConfig
from pst_ds.core.factors import SCORE_FACTORS
from pst_ds.core.forms.form import ParamSpec
from pst_ds.core.schedule import USUAL_STEPS, default_learning_rates
from pst_ds.errors import InputError
from pst_ds.nn.addition import AddedModule, added_modules
from pst_ds.nn.inject import settled_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.model_structure import model_width
from pst_ds.nn.tables.embedding import pst_embeddings
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import ParamGroup
from pst_ds.parallel.master_adamw import MasterAdamW

_DEFAULTS = TrainConfig(num_steps=1)  # the settings read here do not depend on the number of steps


def pst_parameter_groups(
    model: nn.Module,
    *,
    score_learning_rate: float | None = None,
    update_learning_rate: float | None = None,
    embedding_learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    betas: tuple[float, float] = (_DEFAULTS.adam_beta1, _DEFAULTS.adam_beta2),
    num_steps: int = USUAL_STEPS,
    epochs: float = 1.0,
) -> list[ParamGroup]:
    """Sort the trained parameters of ``model`` into groups for AdamW; empty groups are omitted.

    Args:
        model: a model with PST modules.
        score_learning_rate: peak rate of group "scores": A, B, R and C. None, here and below, selects
            :func:`pst_ds.core.schedule.default_learning_rates` for the model and the length of the run.
        update_learning_rate: peak rate of group "updates": the parameters of the update form, such as U and V.
        embedding_learning_rate: peak rate of group "embeddings": U and V of embeddings.
        head_learning_rate: peak rate of group "head": the modules trained in full.
        betas: Adam's betas for all groups. The default is the run file's.
        num_steps, epochs: length of the run, in optimizer steps and passes over the training data.

    Each group has "name", "lr" and "peak_lr" (the rate at the end of the warm-up). Parameters of an update form that
    learn faster or slower are in a separate group, such as "updates x 3", at 3 times the rate of "updates". So are
    those that a form penalises; no other group has weight decay. Each addition has a group, such as
    "additions.prompt", with the rate in its settings.
    """
    settled_layers(model)
    rates = _default_rates(model, num_steps, epochs)
    chosen_rates = {
        "scores": score_learning_rate,
        "updates": update_learning_rate,
        "embeddings": embedding_learning_rate,
        "head": head_learning_rate,
    }
    for name, rate in chosen_rates.items():
        if rate is not None:
            rates[name] = rate
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    embeddings = pst_embeddings(model)
    specs = _update_specs(model)
    added = _added_parameters(model)
    decays: dict[str, float] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if param in added:
            module = added[param]
            group = f"{SECTION}.{module.addition}"
            rates[group] = module.settings.learning_rate
            groups.setdefault(group, []).append(param)
            continue
        spec = specs.get(param)
        if spec is None:
            group = _group_of(name, embeddings)
        else:
            group = spec.group
            if spec.rate != 1.0 or spec.decay != 0.0:
                rate = rates[group] * spec.rate
                group = _name_of_subgroup(group, spec)
                rates[group] = rate
                decays[group] = spec.decay
                groups.setdefault(group, [])
        groups[group].append(param)
    parameter_groups: list[ParamGroup] = []
    for name, params in groups.items():
        if not params:
            continue
        parameter_groups.append(
            {
                "params": params,
                "name": name,
                "lr": rates[name],
                "peak_lr": rates[name],
                "weight_decay": decays.get(name, 0.0),
                "betas": betas,
            }
        )
    return parameter_groups


def _name_of_subgroup(group: str, spec: ParamSpec) -> str:
    """Return the name of the parameters in ``group`` with the rate and the decay of ``spec``."""
    name = group
    if spec.rate != 1.0:
        name += f" x {spec.rate:g}"
    if spec.decay != 0.0:
        name += f" with decay {spec.decay:g}"
    return name


def _default_rates(model: nn.Module, num_steps: int, epochs: float) -> dict[str, float]:
    """Return the default peak rate of each group, for this model and this length of the run."""
    labels: int = getattr(getattr(model, "config", None), "num_labels", 0)
    output_layer = getattr(model, "get_output_embeddings", lambda: None)
    rates = default_learning_rates(
        width=model_width(model),
        num_steps=num_steps,
        epochs=epochs,
        num_labels=labels if labels > 1 else 0,  # one label is a regression, whose targets have many values
        predicts_tokens=output_layer() is not None,
    )
    # Bytes such as masks have no gradient, also if everything trains.
    trains_all = all(param.requires_grad for param in model.parameters() if param.dtype.is_floating_point)
    head_rate = rates.everything if trains_all else rates.head
    return {
        "scores": rates.scores,
        "updates": rates.updates * _rate_factor(model),
        "embeddings": rates.embeddings,
        "head": head_rate,
    }


def _update_specs(model: nn.Module) -> dict[nn.Parameter, ParamSpec]:
    """Return the specification of every parameter of an update."""
    specs = {}
    for module in model.modules():
        if isinstance(module, PSTLayer):
            for name, param in module.update_parameters().items():
                specs[param] = module.update_specs[name]
    return specs


def _added_parameters(model: nn.Module) -> dict[nn.Parameter, AddedModule]:
    """Return the module of every parameter that an addition trains."""
    owners = {}
    for module in added_modules(model).values():
        for param in module.parameters():
            owners[param] = module
    return owners


def _rate_factor(model: nn.Module) -> float:
    """Return the factor of the default rate for the update form of the model; 1 without PST layers."""
    for module in model.modules():
        if isinstance(module, PSTLayer):  # all layers of a model have the same form
            return module.constants.form.rate_factor
    return 1.0


def _group_of(name: str, embeddings: Container[str]) -> str:
    """Return the group of a parameter that is neither an update's nor an addition's."""
    owner, _, last = name.rpartition(".")
    if owner in embeddings:
        return "embeddings"
    if last.startswith("pst_"):
        return "scores" if last.removeprefix("pst_") in SCORE_FACTORS else "updates"
    return "head"  # modules trained in full, and pruned weights that train


def pst_optimizer(model: nn.Module, **rates: Any) -> MasterAdamW:
    """Return AdamW over :func:`pst_parameter_groups`, on fp32 masters where the model is in bf16.

    Under DeepSpeed the engine keeps the masters, and this is plain AdamW. ``deepspeed.initialize`` requires torch's
    class instead: ``torch.optim.AdamW(pst_parameter_groups(model))``.

    Args:
        model: a model with PST modules.
        rates: keyword arguments of :func:`pst_parameter_groups`.

    Raises:
        InputError: the model is in fp16 and not under ZeRO-3, the only stage that has fp32 masters from the start.
    """
    groups = pst_parameter_groups(model, **rates)
    trained_dtypes: set[torch.dtype] = set()
    for group in groups:
        trained_dtypes.update(param.dtype for param in group["params"])
    is_partitioned = any(sharding.is_partitioned(param) for param in model.parameters())
    if not is_partitioned and torch.float16 in trained_dtypes:
        raise InputError(
            "the trained parameters are torch.float16, which AdamW cannot train: load the model in torch.float32 and "
            "let the loss be scaled (fp16=True), or load it in torch.bfloat16"
        )
    stays_here = not torch.accelerator.is_available() and not is_partitioned  # fused is for the CPU, see LocalEngine
    return MasterAdamW(groups, fused=stays_here)
