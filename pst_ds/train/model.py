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
from pst_ds.core.quantization import Grid, grid_of
from pst_ds.data.conversations import read_template
from pst_ds.data.tasks import Task, task_of
from pst_ds.data.tokens.tokenize import open_tokenizer
from pst_ds.errors import first_line, shortened
from pst_ds.nn.base_model import DTYPES, Pretrained
from pst_ds.nn.cut_config import cut_config, set_num_experts
from pst_ds.nn.experts import expert_stacks
from pst_ds.nn.inject import inject_pst, persistent_buffers, plain_name, pst_layers
from pst_ds.nn.model_structure import experts_modules
from pst_ds.nn.optimizer import pst_parameter_groups
from pst_ds.nn.sharded_weights import read_now
from pst_ds.nn.tables.coded import coded_tables
from pst_ds.nn.tables.rounded import set_table_grid
from pst_ds.nn.targets import modules_to_save
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import raise_on_all_ranks, world_size
from pst_ds.train.sequences import keep_documents_apart

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

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
        chosen, found = set(map(id, self.outputs)), []
        for group in parameter_groups(self.module, run):
            own = [param for param in group["params"] if id(param) in chosen]
            rest = [param for param in group["params"] if id(param) not in chosen]
            rate = group["peak_lr"] * self.unit
            found += [{**group, "params": rest}] if rest else []
            found += [{**group, "params": own, "name": "outputs", "lr": rate, "peak_lr": rate}] if own else []
        return found


def grid_of_run(run: RunConfig) -> Grid | None:
    """Return the scheme in which the run quantises its weights; None if it does not."""
    return grid_of(run.quantization.values, run.quantization.group) if run.quantization.values else None


def frozen_grid(run: RunConfig, bits: int) -> Grid | None:
    """Return the quantisation scheme of frozen weights stored in ``bits``; None for 16, weights as they were loaded."""
    return None if bits == 16 else grid_of(f"int{bits}", run.model.base_group)


def load_tokenizer(run: RunConfig) -> PreTrainedTokenizerBase:
    """Load the run's tokenizer, with a padding token if the task needs one. Raises InputError."""
    setting, where = ("tokenizer", run.model.tokenizer) if run.model.tokenizer else ("path", run.model.path)
    place = Pretrained(where, f"model.{setting}")
    place.require_place()
    if setting == "path":
        place.config()  # raises if it is missing; without it transformers finds no tokenizer
    tokenizer = open_tokenizer(where, str(place), "Name the folder that has one with model.tokenizer")
    if run.data.chat_template:
        tokenizer.chat_template = read_template(run.data.chat_template, "data.chat_template")
    if tokenizer.pad_token is None and task_of(run).pads:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(
    run: RunConfig, labels: list[str], tokenizer: PreTrainedTokenizerBase | None, *, own_dropout: bool = False
) -> PreTrainedConfig:
    """Load the transformers config of the run's model, with the run's dropout unless ``own_dropout``.

    Raises InputError for a model that cannot do the run's task; that is not checked without a ``tokenizer``.
    """
    task, base = task_of(run), Pretrained(run.model.path, "model.path")
    config = base.config(**task.config_options(labels), **attention_options(run))
    base.require_dense(config)
    set_padding(config, task, tokenizer)
    if tokenizer is not None:
        task.check_model(run.data, config, tokenizer)
    # hidden_dropout_prob, resid_pdrop, dropout_rate and so on; None follows another, and layerdrop skips layers
    for key, value in config.to_dict().items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not own_dropout and is_number and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, run.model.dropout)
    return config


def set_padding(config: PreTrainedConfig, task: Task, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Set the padding token of ``config`` to the tokenizer's, if the task pads."""
    padding = getattr(config, "pad_token_id", None) or 0 if tokenizer is None else tokenizer.pad_token_id
    if task.pads and padding is not None:  # a decoder's head reads the token before the padding
        config.pad_token_id = padding


def attention_options(run: RunConfig) -> dict[str, str]:
    """Return the options of ``from_pretrained`` for the run's attention implementation."""
    return {"attn_implementation": run.model.attn_implementation} if run.model.attn_implementation else {}


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

    config, task = load_model_config(run, labels, tokenizer), task_of(run)
    keep_alive = HfDeepSpeedConfig(zero3_config) if zero3_config is not None else None
    base, misfit = Pretrained(run.model.path, "model.path"), "Name one that the config belongs to"
    if task.new_head:
        misfit += f", or the model without that head (the data has {config.num_labels} classes)"
    options = {"config": config, "dtype": DTYPES[run.train.precision]}
    quantises_base = run.mask_method.injects and run.model.base_bits != 16
    module, missing = raise_on_all_ranks(  # only rank 0 reads what is not read in shards
        lambda: base.load(task.model_class(), misfit, linear_later=quantises_base, **options)
    )
    if not task.new_head:
        base.require_whole(module, missing, "Name a model that was saved with its language modelling head")
    _initialise_missing(module, missing, run)
    mean, unit = label_scale or (0.0, 1.0)
    unit = 1.0 if run.mask_method.trains_everything else unit
    outputs = _scaled_outputs(module, missing, config.num_labels, mean, unit) if label_scale else []
    _keep_statistics(module)
    prepare_for_method(module, run, num_shards=None if keep_alive else 1)
    _refuse_untrained(module, missing, run)
    module.config.use_cache = False  # no run generates text; a cache would hold every layer's keys and values
    keep_documents_apart(module)
    if run.model.gradient_checkpointing:
        reentrant = run.model.gradient_checkpointing_reentrant
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return BuiltModel(module, keep_alive, outputs, unit)


def prepare_for_method(module: nn.Module, run: RunConfig, *, num_shards: int | None) -> None:
    """Inject PST modules and freeze parameters for the run's method. Works on the meta device; collective under
    ``zero.Init``."""
    if run.mask_method.injects:
        inject_pst(
            module,
            run.injected_pst,
            num_shards=num_shards,
            grid=grid_of_run(run),
            base_grid=frozen_grid(run, run.model.base_bits),
            embedding_grid=frozen_grid(run, run.model.embedding_bits),
            expert_parallel=run.train.experts_divided_by(num_shards or world_size()),
        )
    if run.mask_method.trains_everything:  # that can have a gradient
        for param in module.parameters():
            param.requires_grad_(param.dtype.is_floating_point)
    if run.quantization.embeddings:
        set_table_grid(module, grid_of(run.quantization.embeddings, run.quantization.group))


def meta_model(
    run: RunConfig,
    labels: list[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_shards: int = 1,
    own_dropout: bool = False,
    experts: int = 0,
) -> nn.Module:
    """Build the run's model on the meta device, with names, shapes and trainable parameters. Raises InputError.

    With ``own_dropout`` it has the dropout of its config, not the run's. ``experts``: number of experts if it is not
    that of model.path.
    """
    config = load_model_config(run, labels, tokenizer, own_dropout=own_dropout)
    if experts:
        set_num_experts(config, experts)
    if run.start.ffn is not None:
        cut_config(config, run.start.ffn)
    purpose = f" with model.attn_implementation = {run.model.attn_implementation!r} and task {run.task!r}"
    base, kind, dtype = (
        Pretrained(run.model.path, "model.path"),
        task_of(run).model_class(),
        DTYPES[run.train.precision],
    )
    module = base.shapes(kind, config, dtype=dtype, purpose=purpose, fix="Choose another of them")
    with torch.device("meta"):
        prepare_for_method(module, run, num_shards=num_shards)
    if not num_trainable(module):
        raise ConfigError(
            f"method = {run.method!r} with pst.update_rank = {run.pst.update_rank} would train nothing of model.path = "
            f"{run.model.path!r}. Fix: pst.update_rank of at least 1, or pst.modules_to_save with a module to train"
        )
    return module


def why_not_in_precision(run: RunConfig, labels: list[str], shapes: nn.Module) -> str:
    """Return why the model of :func:`meta_model` only works in fp32; "" if the run's precision may do."""
    if run.train.precision == "fp32":
        return ""
    name = type(shapes).__name__
    if names := kept_in_fp32(shapes):
        return f"{name} keeps {names[0]} in fp32, and torch cannot multiply the two"
    if experts_modules(shapes):  # whose operators have other rules on the meta device
        return ""
    problem = _forward_problem(run, labels, DTYPES[run.train.precision])
    if problem and not _forward_problem(run, labels, torch.float32):
        return f"{name} works in fp32 only; its forward pass ends in {problem!r}"
    return ""


def _forward_problem(run: RunConfig, labels: list[str], dtype: torch.dtype) -> str:
    """Return the error of a forward pass of the model before injection, on the meta device; "" if there is none.

    Passes that depend on values always fail there, in every dtype.
    """
    config = load_model_config(run, labels, None)
    plain = Pretrained(run.model.path, "model.path").shapes(task_of(run).model_class(), config, dtype=dtype)
    try:
        with torch.no_grad():
            plain(input_ids=torch.ones(1, 8, dtype=torch.long, device="meta"))
    except Exception as error:  # any operator or model may raise anything
        return first_line(error)
    return ""


def kept_in_fp32(module: nn.Module) -> list[str]:
    """Return names of the base's parameters that are fp32 although their class does not declare it to transformers.

    In a bf16 model a forward pass that uses them fails, such as DeBERTa's with q_bias.
    """
    lists = (getattr(module, name, None) or () for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    declared = {part for parts in lists for part in parts}
    return [
        name
        for name, param in module.named_parameters()
        if param.dtype == torch.float32 and ".pst_" not in name and not any(part in name for part in declared)
    ]


def parameter_groups(module: nn.Module, run: RunConfig) -> Groups:
    """Return :func:`pst_parameter_groups` with the run's rates."""
    rates = {name: getattr(run.train, name) for name in RATES}
    return pst_parameter_groups(module, **rates, betas=(run.train.adam_beta1, run.train.adam_beta2))


def num_trainable(module: nn.Module) -> int:
    return sum(sharding.full_numel(p) for p in module.parameters() if p.requires_grad)


def frozen_bytes(module: nn.Module, run: RunConfig, ranks: int) -> int:
    """Return the bytes of frozen parameters and masks, unsharded, that a node may copy: without experts on ranks."""
    stacks = expert_stacks(module).values() if run.train.experts_divided_by(ranks) > 1 else ()
    on_ranks = {param for stack in stacks for param in stack.parameters()}
    frozen = (p for p in module.parameters() if not p.requires_grad and p not in on_ranks)
    return sum(sharding.full_numel(param) * param.element_size() for param in frozen)


def head_names(module: nn.Module, run: RunConfig) -> list[str]:
    """Return the names of modules trained in full."""
    return ["(every weight)"] if run.mask_method.trains_everything else list(modules_to_save(module, run.pst))


def _initialise_missing(module: nn.Module, missing: list[str], run: RunConfig) -> None:
    """Draw the parameters that the base checkpoint lacks, by the model's own rule, from the seed and their names.
    Raises ConfigError for buffers, which nothing trains."""
    buffers = sorted(set(missing) & set(persistent_buffers(module)))
    if buffers:
        raise ConfigError(
            f"model.path = {run.model.path!r} lacks {shortened(buffers)}, which training does not change; name a model "
            "that was saved with its buffers"
        )
    for owner in sorted({name.rpartition(".")[0] for name in missing}):
        part = module.get_submodule(owner)
        params = dict(part.named_parameters(recurse=False))
        read_now(params.values())
        with sharding.gathered(params.values(), writer_rank=0), torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(zlib.crc32(f"{run.seed}/{owner}".encode()))
            for name, param in params.items():
                param._is_hf_initialized = f"{owner}.{name}" not in missing  # type: ignore[attr-defined]
            module._init_weights(part)  # type: ignore[operator]


def _scaled_outputs(
    module: nn.Module, missing: list[str], num_labels: int | None, mean: float, unit: float
) -> list[nn.Parameter]:
    """Scale the outputs of a new head to a mean and a standard deviation ``unit``, without a bias only the latter.

    Return the parameters of the head's last layer, which has ``num_labels`` outputs. Collective.
    """
    new = {name: param for name, param in module.named_parameters() if name in missing}
    owners = [name.rpartition(".")[0] for name, param in new.items() if sharding.full_shape(param)[:1] == (num_labels,)]
    outputs = [param for name, param in new.items() if owners and name.rpartition(".")[0] == owners[-1]]
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
    frozen |= {f"{name}.weight" for name in coded_tables(module)}
    frozen |= {plain_name(name, layer) for name, layer in pst_layers(module).items() if layer.weight is None}
    owners = sorted({name.rpartition(".")[0] for name in missing if name in frozen})
    if owners:
        trained = [*head_names(module, run), *owners]
        raise ConfigError(
            f"model.path = {run.model.path!r} has no {', '.join(owners)}: it would be random and never trained. "
            f"Train it in full with pst.modules_to_save = [{', '.join(chr(34) + name + chr(34) for name in trained)}]"
        )
