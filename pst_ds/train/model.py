"""Build a run's model with PST modules, whole or partitioned by ``zero.Init``."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.train import RATES
from pst_ds.data.tasks import task_of
from pst_ds.errors import shortened
from pst_ds.nn.base_model import DTYPES, Pretrained
from pst_ds.nn.checkpointing import recompute_activations
from pst_ds.nn.experts import expert_stacks
from pst_ds.nn.inject import persistent_buffers, plain_name, pst_layers
from pst_ds.nn.optimizer import pst_parameter_groups
from pst_ds.nn.sharded_weights import read_now
from pst_ds.nn.tables.coded import coded_tables
from pst_ds.nn.targets import modules_to_save
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import raise_on_all_ranks
from pst_ds.train.resolved import attach_to_model, dropout_of, load_model_config, prepare_for_method, set_dropout
from pst_ds.train.sequences import keep_documents_apart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Groups: TypeAlias = list[dict[str, Any]]
"""Parameter groups, as for torch's optimizers."""


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model ready for the engine."""

    module: nn.Module
    keep_alive: object = None
    """transformers finds the ZeRO-3 config through a weak reference to this."""
    outputs: list[nn.Parameter] = field(default_factory=list)
    """Parameters of the last layer of a new head, if labels have a scale."""
    unit: float = 1.0
    """Standard deviation of these labels."""

    def parameter_groups(self, run: RunConfig) -> Groups:
        """Return :func:`parameter_groups` of the module, whose outputs train at their rate times ``unit``.

        The length of Adam's step is its rate, independent of the loss. At this rate, the head trains as it would on
        labels scaled to a standard deviation of 1.
        """
        # by identity: comparing tensors would compare their values
        output_ids = set(map(id, self.outputs))
        groups = []
        for group in parameter_groups(self.module, run):
            outputs = []
            others = []
            for param in group["params"]:
                if id(param) in output_ids:
                    outputs.append(param)
                else:
                    others.append(param)
            rate = group["peak_lr"] * self.unit
            if others:
                groups.append({**group, "params": others})
            if outputs:
                groups.append({**group, "params": outputs, "name": "outputs", "lr": rate, "peak_lr": rate})
        return groups


def build_model(
    run: RunConfig,
    labels: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    zero3_config: Mapping[str, object] | None,
    label_scale: tuple[float, float] | None = None,
) -> BuiltModel:
    """Build the pretrained model of the run's task with the PST modules of the run's method.

    A new head is drawn from the run's seed and its name, so it is the same for every world size. Collective.

    Args:
        zero3_config: Resolved DeepSpeed config of stage 3, to partition the weights while they load.
        label_scale: Mean and standard deviation on which the outputs of a new head start; the latter is 1 for methods
            that train every weight, at one rate.

    Raises InputError if other weights are missing from the pretrained model, or have another shape.
    """
    from transformers.integrations import HfDeepSpeedConfig

    config = load_model_config(run, labels, tokenizer)
    set_dropout(config, dict.fromkeys(dropout_of(config), run.model.dropout))
    task = task_of(run)
    keep_alive = None
    if zero3_config is not None:
        # from here on transformers builds models inside zero.Init, as long as this object lives
        keep_alive = HfDeepSpeedConfig(zero3_config)
    base = Pretrained(run.model.path, "model.path")
    misfit = "Name one that the config belongs to"
    if task.new_head:
        misfit += f", or the model without that head (the data has {config.num_labels} classes)"
    options = {"config": config, "dtype": DTYPES[run.train.precision]}
    quantises_base = run.mask_method.injects and run.model.base_bits != 16
    # only rank 0 reads what is not read in shards, so an error may be on one rank
    module, missing = raise_on_all_ranks(
        lambda: base.load(task.model_class(), misfit, linear_later=quantises_base, **options)
    )
    if not task.new_head:
        base.require_whole(module, missing, "Name a model that was saved with its language modelling head")
    _initialise_missing(module, missing, run)
    outputs: list[nn.Parameter] = []
    unit = 1.0
    if label_scale is not None:
        mean, unit = label_scale
        if run.mask_method.trains_everything:
            unit = 1.0  # one rate for every weight, which must not grow with the labels
        outputs = _scaled_outputs(module, missing, config.num_labels, mean, unit)
    _keep_statistics(module)
    num_shards = 1 if keep_alive is None else None  # None: as zero.Init has divided each parameter
    prepare_for_method(module, run, num_shards=num_shards)
    attach_to_model(module, run, tokenizer)
    _refuse_untrained(module, missing, run)
    module.config.use_cache = False  # no run generates text; a cache would hold every layer's keys and values
    keep_documents_apart(module)
    if run.model.gradient_checkpointing:
        recompute_activations(
            module, num_blocks=run.model.recomputed_blocks, reentrant=run.model.gradient_checkpointing_reentrant
        )
    return BuiltModel(module, keep_alive, outputs, unit)


def parameter_groups(module: nn.Module, run: RunConfig) -> Groups:
    """Return :func:`pst_parameter_groups` with the run's rates."""
    rates = {name: getattr(run.train, name) for name in RATES}
    return pst_parameter_groups(module, **rates, betas=(run.train.adam_beta1, run.train.adam_beta2))


def frozen_bytes(module: nn.Module, run: RunConfig, ranks: int) -> int:
    """Return the bytes of frozen parameters and masks, unsharded, that a node may copy: without experts on ranks."""
    on_ranks: set[nn.Parameter] = set()
    if run.train.experts_divided_by(ranks) > 1:
        for stack in expert_stacks(module).values():
            on_ranks.update(stack.parameters())
    total = 0
    for param in module.parameters():
        if not param.requires_grad and param not in on_ranks:
            total += sharding.full_numel(param) * param.element_size()
    return total


def head_names(module: nn.Module, run: RunConfig) -> list[str]:
    """Return the names of modules trained in full."""
    if run.mask_method.trains_everything:
        return ["(every weight)"]
    return list(modules_to_save(module, run.pst))


def _initialise_missing(module: nn.Module, missing: list[str], run: RunConfig) -> None:
    """Draw the parameters that the base checkpoint lacks, by the model's own rule, from the seed and their names.
    Raises ConfigError for buffers, which nothing trains."""
    buffers = sorted(set(missing) & set(persistent_buffers(module)))
    if buffers:
        raise ConfigError(
            f"model.path = {run.model.path!r} lacks {shortened(buffers)}, which training does not change; name a model "
            "that was saved with its buffers"
        )
    # sorted, so that all ranks gather in the same order: sets of strings differ between processes
    for owner in sorted({name.rpartition(".")[0] for name in missing}):
        part = module.get_submodule(owner)
        params = dict(part.named_parameters(recurse=False))
        read_now(params.values())
        # rank 0 draws and the others receive its values when the gathered parameters are partitioned again
        with sharding.gathered(params.values(), writer_rank=0), torch.random.fork_rng(), torch.no_grad():
            # by name, so that a head does not depend on what was drawn before it
            torch.manual_seed(zlib.crc32(f"{run.seed}/{owner}".encode()))
            for name, param in params.items():
                # transformers' initialisation skips parameters with this mark, which have values from the files
                param._is_hf_initialized = f"{owner}.{name}" not in missing  # type: ignore[attr-defined]
            module._init_weights(part)  # type: ignore[operator]


def _scaled_outputs(
    module: nn.Module, missing: list[str], num_labels: int | None, mean: float, unit: float
) -> list[nn.Parameter]:
    """Scale the outputs of a new head to a mean and a standard deviation ``unit``, without a bias only the latter.

    Return the parameters of the head's last layer, which has ``num_labels`` outputs. Collective.
    """
    new = {name: param for name, param in module.named_parameters() if name in missing}
    last_layer = None
    for name, param in new.items():
        if sharding.full_shape(param)[:1] == (num_labels,):
            last_layer = name.rpartition(".")[0]
    outputs = [param for name, param in new.items() if name.rpartition(".")[0] == last_layer]
    with sharding.gathered(outputs, writer_rank=0), torch.no_grad():
        for param in outputs:
            param.mul_(unit)
            if sharding.full_shape(param).numel() == len(param):  # a bias
                param.add_(mean)
    return outputs


def _keep_statistics(module: nn.Module) -> None:
    """Keep batch norms on the base's statistics; batch statistics would depend on padding, ranks and micro-batches."""
    for part in module.modules():
        if isinstance(part, _NormBase) and part.track_running_stats:
            part.eval().train = lambda mode=True, part=part: part  # type: ignore[method-assign, misc]


def _refuse_untrained(module: nn.Module, missing: list[str], run: RunConfig) -> None:
    """Raise ConfigError for modules that the base model lacks and the run freezes: their values would stay random."""
    frozen = {name for name, param in module.named_parameters() if not param.requires_grad}
    # weights that are stored quantised are no longer parameters under their names
    frozen.update(f"{name}.weight" for name in coded_tables(module))
    for name, layer in pst_layers(module).items():
        if layer.weight is None:
            frozen.add(plain_name(name, layer))
    owners = sorted({name.rpartition(".")[0] for name in missing if name in frozen})
    if owners:
        trained = [*head_names(module, run), *owners]
        names = ", ".join(f'"{name}"' for name in trained)  # with TOML's quotes, to copy into the run file
        raise ConfigError(
            f"model.path = {run.model.path!r} has no {', '.join(owners)}: it would be random and never trained. "
            f"Train it in full with pst.modules_to_save = [{names}]"
        )
