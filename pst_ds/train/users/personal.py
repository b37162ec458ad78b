"""A run's finished model, of which U, V and the head are one user's at a time; all else is shared, and stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.checkpoint.restore import load_into
from pst_ds.config.pst import PSTConfig, name_matches
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.nn.base_model import DTYPES
from pst_ds.nn.batched_updates import LEFT, RIGHT, add_update
from pst_ds.nn.inject import configured_parameters, freeze_scores, pst_layers
from pst_ds.nn.linear import PSTLinear
from pst_ds.nn.targets import modules_named_to_save
from pst_ds.parallel import optimizer_state, zero3
from pst_ds.parallel.ds_config import zero_stage
from pst_ds.parallel.engine import Engine, LocalEngine, build_engine, split_frozen
from pst_ds.train.model import build_model
from pst_ds.train.run import Prepared
from pst_ds.train.users.fingerprint import common_of
from pst_ds.train.users.store import Form, State, UserStoreError

UPDATES = ("pst_U", "pst_V", "pst_G", LEFT, RIGHT)
"""Last parts of the names of personal values that are a layer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonalPart:
    """What of a model is a user's own."""

    form: Form = "masked"
    """"masked": the U and V of the layers, so that an export has the base's zeros; "beside": others beside them, which
    users of one batch can have over one packed base; "gates": the gates of the layers' U V, which stay shared: a few
    numbers a layer, of a run with ``pst.update_gates``."""
    layers: tuple[str, ...] = ()
    """Names of the layers, or dotted endings; empty is all that the run prunes."""
    rank: int = 0
    """Of the updates beside the layers; 0 is the run's ``pst.update_rank``."""
    dtype: str = "bf16"
    """Of states: "bf16" or "fp32"."""


class PersonalModel:
    """The model of a checkpoint with an engine over its personal parameters. Making it and all methods are collective.

    Attributes:
        engine: the engine, whose optimizer has the groups "updates" or "gates", and "head".
        common: what states of it have in common.
        shared: the values of the personal parameters before any user has trained: {name: fp32 tensor}.
    """

    def __init__(self, prepared: Prepared, checkpoint: Checkpoint, part: PersonalPart, *, own_of_rank: bool = False):
        """With ``own_of_rank`` the personal parameters are those of another user on each rank.

        Raises InputError where the run has nothing that can be personal, or its masks are not final.
        """
        run = prepared.run
        _require_finished(run, checkpoint)
        ds_config = prepared.ds_config
        partitioned = zero_stage(ds_config) == 3
        if own_of_rank and (ds_config is None or not partitioned or part.form != "beside"):
            raise ConfigError(
                "--user-per-rank trains updates beside the layers of a base that ZeRO-3 splits: take --form beside, a "
                "launcher, and --set deepspeed_config=ds_configs/zero3.json"
            )
        built = build_model(run, prepared.labels, prepared.tokenizer, zero3_config=ds_config if partitioned else None)
        module, self._keep_alive = built.module, built.keep_alive
        load_into(module, checkpoint)
        freeze_scores(module)
        self.personal = _make_personal(module, run, part, own_of_rank=own_of_rank)
        if ds_config is None:
            module.to(prepared.device)
        groups, clipping = _groups(self.personal, run), run.train.gradient_clipping
        self.engine: Engine
        if own_of_rank:
            assert ds_config is not None
            self._split = split_frozen(module, ds_config)
            self.engine = LocalEngine(module, groups, gradient_clipping=clipping)
        else:
            self.engine = build_engine(module, groups, ds_config=ds_config, gradient_clipping=clipping)
        self._named = list(self.personal.items())
        self._fragments = optimizer_state.local_fragments(self.engine, self._named)
        self._dtype = DTYPES[part.dtype]
        self.shared = self._values()
        shapes = {name: list(values.shape) for name, values in self.shared.items()}
        self.common = common_of(checkpoint, run, shapes, form=part.form, dtype=part.dtype)

    def activate(self, state: Mapping[str, Tensor] | None) -> None:
        """Give the personal parameters the values of ``state``, or the shared ones for None, and the optimizer the
        memory of a new one: what was done before leaves no trace."""
        values = self.shared if state is None else state
        if values.keys() != self.shared.keys():
            raise UserStoreError(f"a state has {len(values)} tensors, and the model {len(self.shared)} personal ones")
        masters = optimizer_state.values(self.engine, self._fragments, optimizer_state.MASTER)
        with torch.no_grad():
            for fragment, master in zip(self._fragments, masters, strict=True):
                flat = values[fragment.name].flatten()
                master.copy_(flat[fragment.start : fragment.stop])
            for name, param in self._named:
                own = zero3.shard_of(param)
                stop = own.start + own.values.numel()
                zero3.write_shard(param, values[name].flatten()[own.start : stop].to(own.values))
        optimizer_state.forget_moments(self.engine, self._fragments)

    def state(self) -> State:
        """Return the personal values as they are now, as a store keeps them; on every rank."""
        return {name: values.to(self._dtype) for name, values in self._values().items()}

    def _values(self) -> State:
        masters = zero3.fp32_masters([param for _, param in self._named])
        pairs = zip(self._named, masters, strict=True)
        return {name: master.detach().to("cpu", torch.float32, copy=True) for (name, _), master in pairs}


def _require_finished(run: RunConfig, checkpoint: Checkpoint) -> None:
    if not run.mask_method.injects:
        raise ConfigError(
            f"method = {run.method!r} has no layers with updates, and those of a user are what is personal; take a "
            'run of another method, such as "lora" or "pst"'
        )
    masks = run.mask_method.masks
    if masks == "ramp" and not checkpoint.state.masks_frozen:
        raise ConfigError(
            f"{checkpoint.folder} has masks that still change, after step {checkpoint.state.step}; users share the "
            "final ones: let the run end, or name another --checkpoint"
        )


def _make_personal(
    module: nn.Module, run: RunConfig, part: PersonalPart, *, own_of_rank: bool = False
) -> dict[str, nn.Parameter]:
    """Freeze all but the personal parameters, which are returned by name. Raises ConfigError."""
    layers = pst_layers(module)
    chosen = {name: layer for name, layer in layers.items() if not part.layers or name_matches(name, part.layers)}
    if not chosen:
        raise ConfigError(
            f"--layers {' '.join(part.layers)} names none of the run's layers; there are {', '.join(list(layers)[:6])}"
            f"{' and more' if len(layers) > 6 else ''}"
        )
    config = run.mask_method.pst_config(run.seeded_pst)
    trained = configured_parameters(module, config) & _head_parameters(module, config)
    if own_of_rank and trained:
        raise ConfigError(
            "--user-per-rank is for updates alone, and the state of a user of this run has a head too; leave it out"
        )
    for param in module.parameters():
        param.requires_grad_(False)
    personal: dict[str, nn.Parameter] = {}
    for name, layer in chosen.items():
        if part.form == "beside":
            rank = part.rank or config.update_rank
            if not rank:
                raise ConfigError("the run has pst.update_rank = 0; give the updates of users one with --rank")
            if not isinstance(layer, PSTLinear):
                raise ConfigError(
                    f"--form beside is for linear layers, and {name} is a stack of experts; --form masked"
                )
            personal |= add_update(
                layer, name, outputs=layer.out_features, inputs=layer.in_features, rank=rank, beta=config.beta,
                seed=run.seed, dtype=layer.dtype, device=zero3.shard_of(layer.pst_mask).values.device,
                registers=not own_of_rank,
            )  # fmt: skip
        elif part.form == "gates":
            if layer.pst_G is None:
                raise ConfigError(
                    f'--form gates is for a run with gates, and this one has pst.update_gates = "{config.update_gates}"'
                    "; take --form masked or beside"
                )
            personal[f"{name}.pst_G"] = layer.pst_G
        elif layer.get_parameter("pst_U") is None:
            raise ConfigError(_no_updates(run))
        else:
            personal |= {f"{name}.{factor}": getattr(layer, factor) for factor in ("pst_U", "pst_V")}
    personal |= {name: param for name, param in module.named_parameters() if param in trained}
    for param in personal.values():
        param.requires_grad_(True)
    return personal


def _head_parameters(module: nn.Module, config: PSTConfig) -> set[nn.Parameter]:
    """Return the parameters of the layers that give the classes; where there is none, of what is trained in full."""
    saved = modules_named_to_save(module, config).values()
    classes = getattr(module.config, "num_labels", 0)
    outputs = [part for head in saved for part in head.modules() if getattr(part, "out_features", None) == classes]
    return {param for part in outputs or saved for param in part.parameters()}


def _no_updates(run: RunConfig) -> str:
    return (
        f"method = {run.method!r} with pst.update_rank = {run.pst.update_rank} has no U and V that could be a user's; "
        "take --form beside, or a run with updates"
    )


def _groups(personal: Mapping[str, nn.Parameter], run: RunConfig) -> list[dict[str, object]]:
    train = run.train
    groups: dict[str, list[nn.Parameter]] = {"updates": [], "gates": [], "head": []}
    for name, param in personal.items():
        last = name.rpartition(".")[2]
        groups["gates" if last == "pst_G" else "updates" if last in UPDATES else "head"].append(param)
    rates = {
        "updates": train.update_learning_rate, "gates": train.gate_learning_rate, "head": train.head_learning_rate
    }  # fmt: skip
    betas = (train.adam_beta1, train.adam_beta2)
    return [
        {"params": params, "name": name, "lr": rates[name], "peak_lr": rates[name], "betas": betas, "weight_decay": 0.0}
        for name, params in groups.items()
        if params
    ]
