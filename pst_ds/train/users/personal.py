"""A finished run's model, or its checkpoint, with per-user parameters: U and V of the layers, and the output layer."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.checkpoint.restore import load_into
from pst_ds.checkpoint.user_store import Common, Form, State, UserStore, UserStoreError
from pst_ds.config.pst import PSTConfig, name_matches
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.update_forms import only_low_rank
from pst_ds.core.factors import SCORE_FACTORS
from pst_ds.errors import shortened
from pst_ds.nn.base_model import DTYPES
from pst_ds.nn.inject import configured_parameters, freeze_scores, pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.linear import PSTLinear
from pst_ds.nn.personal_updates import LEFT, RIGHT, add_update
from pst_ds.nn.targets import modules_named_to_save
from pst_ds.parallel import optimizer_state, sharding
from pst_ds.parallel.ds_config import zero_stage
from pst_ds.parallel.engine import build_engine
from pst_ds.train.model import build_model
from pst_ds.train.resume import on_base_of
from pst_ds.train.run_context import RunContext

UPDATES = ("pst_U", "pst_V", LEFT, RIGHT)
"""Last parts of the names of a layer's personal parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonalPart:
    """The parameters of a model that are trained per user."""

    form: Form = "masked"
    """"masked": U and V of the layers themselves, so an export keeps the base's sparsity; "beside": separate updates
    next to the layers, which different users in one batch can have over one packed base."""
    layers: tuple[str, ...] = ()
    """Names of the layers, or dotted endings; empty for all layers that the run prunes."""
    rank: int = 0
    """Rank of the updates of form "beside"; 0 for the run's ``pst.update_rank``."""
    dtype: str = "bf16"
    """Dtype of the stored values: "bf16" or "fp32"."""


class PersonalModel:
    """The model of a checkpoint with an engine over its personal parameters.

    Creating it and calling any method is collective.

    Attributes:
        engine: Engine whose optimizer has the groups "updates" and "head".
        common: Facts that all states of this model share, for the store's index.
        shared: Values of the personal parameters before any user has trained: {name: fp32 tensor on the CPU}.

    Raises:
        InputError: The run has no parameters that can be personal, or its masks are not final.
    """

    def __init__(self, context: RunContext, checkpoint: Checkpoint, part: PersonalPart):
        self.context = context
        run = context.run
        ds_config = context.ds_config
        _require_finished(run, checkpoint)
        zero3_config = ds_config if zero_stage(ds_config) == 3 else None
        whole = replace(run, train=replace(run.train, expert_parallel=1))  # an adapter has factors of all experts
        built = build_model(on_base_of(whole, checkpoint), context.labels, context.tokenizer, zero3_config=zero3_config)
        module = built.module
        # transformers forgets the ZeRO-3 config with which it loads models once this object is gone
        self._keep_alive = built.keep_alive
        load_into(module, checkpoint)
        freeze_scores(module)
        self.personal = _make_personal(module, run, part)
        if ds_config is None:
            module.to(context.device)
        self.engine = build_engine(
            module, _groups(self.personal, run), ds_config=ds_config, gradient_clipping=run.train.gradient_clipping
        )
        self._named = list(self.personal.items())
        self._fragments = optimizer_state.local_fragments(self.engine, self._named)
        self._dtype = DTYPES[part.dtype]
        self.shared = self._values()
        shapes = {name: list(values.shape) for name, values in self.shared.items()}
        self.common = common_of(checkpoint, run, shapes, form=part.form, dtype=part.dtype)

    def activate(self, state: Mapping[str, Tensor] | None) -> None:
        """Set the personal parameters to ``state``, or to the shared values for None, and reset the optimizer's
        moments, so that nothing depends on the user before."""
        values: Mapping[str, Tensor] = self.shared
        if state is not None:
            values = state
        if values.keys() != self.shared.keys():
            raise UserStoreError(f"a state has {len(values)} tensors, and the model {len(self.shared)} personal ones")
        masters = optimizer_state.values(self.engine, self._fragments, optimizer_state.MASTER)
        with torch.no_grad():
            # masters are views of the optimizer's tensors; each rank writes the part that it holds
            for fragment, master in zip(self._fragments, masters, strict=True):
                flat = values[fragment.name].flatten()
                master.copy_(flat[fragment.start : fragment.stop])
            # the parameters themselves, which the engine would refresh from the masters only after a step
            for name, param in self._named:
                sharding.write_whole(param, values[name])
        optimizer_state.forget_moments(self.engine, self._fragments)

    def state(self) -> State:
        """Return the current personal values in the store's dtype, on every rank."""
        return {name: values.to(self._dtype) for name, values in self._values().items()}

    def _values(self) -> State:
        masters = sharding.fp32_masters([param for _, param in self._named])
        values: State = {}
        for (name, _), master in zip(self._named, masters, strict=True):
            # a copy, because without sharding the master is the optimizer's tensor itself
            values[name] = master.detach().to("cpu", torch.float32, copy=True)
        return values


def common_of(
    checkpoint: Checkpoint, run: RunConfig, shapes: Mapping[str, list[int]], *, form: Form, dtype: str
) -> Common:
    """Return the facts that all states over ``checkpoint`` share. ``shapes``: shape of each personal value, by name."""
    masks: dict[str, str] = {}
    for name, bits in checkpoint.masks.items():
        masks[name] = hashlib.sha256(bits.numpy().data).hexdigest()
    others = hashlib.sha256()
    # sorted, because the order in a checkpoint is that of the model's code, which another version may change
    for name in sorted(checkpoint.contents.trained):
        # factors of scores do not count: masks are final, so they change nothing any more
        is_score_factor = name.rpartition(".")[2].removeprefix("pst_") in SCORE_FACTORS
        if name not in shapes and not is_score_factor:
            others.update(name.encode())
            others.update(checkpoint.trained[name].contiguous().numpy().data)
    return Common(
        form=form,
        task=run.task,
        labels=checkpoint.state.labels,
        base_path=checkpoint.state.base_path,
        base_fingerprint=checkpoint.state.base_fingerprint,
        masks_sha256=masks,
        shared_sha256=others.hexdigest(),
        beta=run.pst.beta,
        dtype="bf16" if dtype == "bf16" else "fp32",
        shapes=dict(shapes),
    )


class UserCheckpoint(Checkpoint):
    """A run's checkpoint with the personal values of one user."""

    def __init__(self, checkpoint: Checkpoint, state: State):
        super().__init__(checkpoint.folder, checkpoint.state, checkpoint.contents)
        self._state = state

    def values(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        # a state has no moments, which an export does not read
        if kind == optimizer_state.MASTER and name in self._state:
            return self._state[name].flatten()[start:stop].float()
        return super().values(name, kind, start, stop)


def user_checkpoint(checkpoint: Checkpoint, run: RunConfig, store: UserStore, user: str) -> UserCheckpoint:
    """Return ``checkpoint`` with the state of ``user``. Raises UserStoreError when the store belongs to another model,
    or its form is "beside": merging such an update would fill the pruned weights."""
    if store.common.form == "beside":
        raise UserStoreError(
            f"{store.folder}: its updates lie next to the layers, and merging them would fill the pruned weights. "
            'Train the users with form = "masked" to export them, or serve them over the base\'s export.'
        )
    stored = store.common
    trained = checkpoint.contents.trained
    shapes = {name: list(trained[name]) for name in stored.shapes if name in trained}
    # what the store would record for this checkpoint: it must be what it does record
    store.require_common(common_of(checkpoint, run, shapes, form=stored.form, dtype=stored.dtype))
    return UserCheckpoint(checkpoint, store.state(user))


def _require_finished(run: RunConfig, checkpoint: Checkpoint) -> None:
    if not run.mask_method.injects:
        raise ConfigError(
            f"method = {run.method!r} trains no low-rank updates, which are what users own. Use a run of another "
            'method, such as "lora" or "pst".'
        )
    if run.mask_method.masks == "ramp" and not checkpoint.state.masks_frozen:
        raise ConfigError(
            f"{checkpoint.folder}: its masks still change after step {checkpoint.state.step}, and users share the "
            "final ones. Let the run end, or name another checkpoint."
        )


def _make_personal(module: nn.Module, run: RunConfig, part: PersonalPart) -> dict[str, nn.Parameter]:
    """Freeze everything but the personal parameters and return them by name. Raises ConfigError."""
    layers = pst_layers(module)
    chosen: dict[str, PSTLayer] = {}
    for name, layer in layers.items():
        if not part.layers or name_matches(name, part.layers):
            chosen[name] = layer
    if not chosen:
        some = shortened(list(layers), 6)
        raise ConfigError(f"layers = {list(part.layers)} names none of the run's layers. Choose from {some}.")
    config = run.injected_pst
    trained = configured_parameters(module, config) & _head_parameters(module, config)
    for param in module.parameters():
        param.requires_grad_(False)
    personal: dict[str, nn.Parameter] = {}
    for name, layer in chosen.items():
        if part.form == "beside":
            rank = part.rank or config.update_rank
            if not rank:
                raise ConfigError("pst.update_rank = 0: users need updates of a rank. Set one, such as rank = 8.")
            if not isinstance(layer, PSTLinear):
                raise ConfigError(
                    f'form = "beside": {name} is a stack of experts, and this form needs linear layers. '
                    'Use form = "masked".'
                )
            personal |= add_update(
                layer,
                name,
                outputs=layer.out_features,
                inputs=layer.in_features,
                rank=rank,
                beta=config.beta,
                seed=run.seed,
                dtype=layer.dtype,
                device=sharding.shard_of(layer.pst_mask).values.device,
            )
        elif not layer.constants.form.has_kernels:
            refusal = only_low_rank('form = "masked"', config.update_form)
            raise ConfigError(f'{refusal}, or use form = "beside"')
        elif not layer.update_specs:
            raise ConfigError(
                f"method = {run.method!r} with pst.update_rank = {run.pst.update_rank} has no U and V that a user "
                'could own. Use form = "beside", or a run with updates.'
            )
        else:
            for factor, param in layer.update_parameters().items():
                personal[f"{name}.pst_{factor}"] = param
    for name, param in module.named_parameters():
        if param in trained:
            personal[name] = param
    for param in personal.values():
        param.requires_grad_(True)
    return personal


def _head_parameters(module: nn.Module, config: PSTConfig) -> set[nn.Parameter]:
    """Return the parameters of the layers that output the classes; without such a layer, of all modules trained in
    full."""
    saved = modules_named_to_save(module, config).values()
    classes = getattr(module.config, "num_labels", 0)
    # hidden layers of a head are shared by all users: they are much larger than its outputs
    outputs: list[nn.Module] = []
    for head in saved:
        for part in head.modules():
            if getattr(part, "out_features", None) == classes:
                outputs.append(part)
    parameters: set[nn.Parameter] = set()
    for part in outputs or saved:
        parameters.update(part.parameters())
    return parameters


def _groups(personal: Mapping[str, nn.Parameter], run: RunConfig) -> list[dict[str, object]]:
    train = run.train
    groups: dict[str, list[nn.Parameter]] = {"updates": [], "head": []}
    for name, param in personal.items():
        is_update = name.rpartition(".")[2] in UPDATES
        group = "updates" if is_update else "head"
        groups[group].append(param)
    rates = {"updates": train.update_learning_rate, "head": train.head_learning_rate}
    betas = (train.adam_beta1, train.adam_beta2)
    settings: list[dict[str, object]] = []
    for name, params in groups.items():
        if not params:
            continue  # users of a model without a new head have only updates
        settings.append(
            {
                "params": params,
                "name": name,
                "lr": rates[name],
                "peak_lr": rates[name],
                "betas": betas,
                "weight_decay": 0.0,
            }
        )
    return settings
