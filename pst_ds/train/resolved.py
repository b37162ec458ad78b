"""A run as all verbs see it: checked config, labels, tokenizer, and the model's shapes, each of them made once."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from pst_ds.config.pst import MaskRule, PSTConfig
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.core.layout import WeightLayout
from pst_ds.core.quantization import Grid, grid_of
from pst_ds.data.conversations import read_template
from pst_ds.data.model_limits import positions_of
from pst_ds.data.tasks import ExampleSet, Task, task_of
from pst_ds.data.tokens.loading import require_named_tokenizer
from pst_ds.data.tokens.tokenize import open_tokenizer
from pst_ds.errors import first_line
from pst_ds.nn.addition import attach_additions, extra_tokens_of
from pst_ds.nn.base_model import DTYPES, Pretrained
from pst_ds.nn.cut_config import cut_config, set_num_experts
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.model_structure import experts_modules, model_width
from pst_ds.nn.tables.rounded import set_table_grid
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import world_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ResolvedTarget:
    """A layer that the run prunes."""

    name: str
    layout: WeightLayout
    rule: MaskRule
    """Pattern and final sparsity, with the overrides that match the layer."""


@dataclass(frozen=True, slots=True)
class RunShapes:
    """The run's model on the meta device: names, shapes and trained parameters, with the modules of the method."""

    model: nn.Module
    targets: tuple[ResolvedTarget, ...]
    """The pruned layers in model order; empty for methods without PST layers."""
    own_dropout: Mapping[str, float]
    """Dropout in the model's config.json, by key. The model is built with ``model.dropout`` instead."""

    @property
    def width(self) -> int:
        """Hidden size of the model."""
        return model_width(self.model)

    def model_to_export(self) -> PreTrainedModel:
        """Return the model with the dropout of its config.json, which an export writes into its own.

        The modules keep the rates with which they were built; nothing computes with them on the meta device.
        """
        set_dropout(self.model.config, self.own_dropout)  # type: ignore[arg-type]
        return cast("PreTrainedModel", self.model)


@dataclass(frozen=True, slots=True)
class PlainModel:
    """A pretrained model on the meta device, without the modules of a method. Nothing changes it: see :meth:`copy`."""

    model: nn.Module
    own_dropout: Mapping[str, float]
    """Dropout in the model's config.json, by key."""

    def copy(self) -> nn.Module:
        """Return a copy to inject modules into, or to try a forward pass with: some modules keep what they compute."""
        return copy.deepcopy(self.model)


class MetaModels:
    """The models of a command on the meta device. Each is built once; methods change copies of it."""

    def __init__(self) -> None:
        self._plain: dict[Hashable, PlainModel] = {}
        self._shapes: dict[Hashable, RunShapes] = {}
        self._only_fp32: dict[Hashable, str] = {}

    def shapes(self, resolved: ResolvedRun) -> RunShapes:
        """Return the model of a run with the modules of its method. Raises InputError."""
        # by settings and not by run: the stages of a run, and the variants of a search, share most of them
        key = resolved.shape_settings
        if key not in self._shapes:
            self._shapes[key] = inject_shapes(resolved, self.plain(resolved))
        return self._shapes[key]

    def plain(self, resolved: ResolvedRun) -> PlainModel:
        """Return the model of a run without the modules of its method. Raises InputError."""
        key = resolved.model_settings
        if key not in self._plain:
            self._plain[key] = build_plain(resolved)
        return self._plain[key]

    def only_fp32(self, resolved: ResolvedRun) -> str:
        """Return why the model does not work in the run's precision, only in fp32; "" if it may."""
        key = resolved.model_settings
        if key not in self._only_fp32:
            # without a method, since PST layers hide what the model's own modules do with a dtype
            self._only_fp32[key] = _why_only_fp32(resolved.run, resolved.labels, self.plain(resolved))
        return self._only_fp32[key]


@dataclass(frozen=True, slots=True)
class ResolvedRun:
    """Facts about a run that do not depend on ranks and devices. The same on every rank."""

    run: RunConfig
    labels: list[str]
    """Names of the classes, in the order of their ids."""
    tokenizer: PreTrainedTokenizerBase | None
    """None for a plan without data."""
    num_shards: int = 1
    """Ranks over which ZeRO-3 splits each parameter; masks of the shapes are padded for them."""
    num_experts: int = 0
    """Experts of each stack of the shapes; 0 for those of ``model.path``."""
    shaped_by: RunConfig | None = None
    """The config that the shapes belong to, if it is an earlier stage's; None for ``run``."""
    models: MetaModels = field(default_factory=MetaModels, compare=False, repr=False)
    """Shared by all values that are made from this one."""

    @property
    def task(self) -> Task:
        """The run's task."""
        return task_of(self.run)

    @property
    def injected(self) -> PSTConfig:
        """The config of the PST layers, with the settings that the method fixes."""
        return self.run.injected_pst

    @property
    def shapes(self) -> RunShapes:
        """The model on the meta device, built on first use. Raises InputError for a model that cannot be trained."""
        return self.models.shapes(self)

    @property
    def only_fp32(self) -> str:
        """Why the model does not work in the run's precision, only in fp32; "" if it may. Raises InputError."""
        return self.models.only_fp32(self)

    @property
    def model_settings(self) -> Hashable:
        """The settings from which the model is built, without the modules of the method."""
        run = self.shaped_by or self.run
        model = (run.model.path, run.model.attn_implementation, run.model.dropout, run.start.ffn, self.num_experts)
        return (*model, run.train.precision, run.task, run.data, tuple(self.labels))

    @property
    def shape_settings(self) -> Hashable:
        """The settings on which names, shapes and trained parameters depend."""
        run = self.shaped_by or self.run
        stored = (run.model.base_bits, run.model.base_group, run.model.embedding_bits, run.quantization)
        divided = (self.num_shards, run.train.experts_divided_by(self.num_shards))
        return (self.model_settings, run.method, run.injected_pst, tuple(run.additions.items()), *stored, *divided)

    def load(self, split: str) -> ExampleSet:
        """Load the examples of a split. Raises ConfigError."""
        return self.task.load(self.run.data, split, self.require_tokenizer(), self.labels)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, which only a plan without data lacks."""
        assert self.tokenizer is not None
        return self.tokenizer

    def with_run(self, run: RunConfig) -> ResolvedRun:
        """Return the facts for a later stage of the run, which keeps tokenizer and shapes.

        Stages before the training ([finetune] and [start]) write other weights, and learning rates change how they
        train; names and shapes stay the same.
        """
        return replace(self, run=run, shaped_by=self.shaped_by or self.run)

    def with_settings(
        self, run: RunConfig, *, num_shards: int | None = None, num_experts: int | None = None
    ) -> ResolvedRun:
        """Return the facts for a changed config of the same task, with the same tokenizer and classes.

        Its shapes are those of this value if they do not depend on the changes, else they are made from the same model.
        """
        if num_shards is None:
            num_shards = self.num_shards
        if num_experts is None:
            num_experts = self.num_experts
        return replace(self, run=run, shaped_by=None, num_shards=num_shards, num_experts=num_experts)

    def with_shards(self, num_shards: int) -> ResolvedRun:
        """Return the facts for a number of ranks over which ZeRO-3 splits each parameter."""
        return replace(self, num_shards=num_shards)

    def with_experts(self, num_experts: int) -> ResolvedRun:
        """Return the facts for a model with another number of experts in each stack."""
        return replace(self, num_experts=num_experts)

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> ResolvedRun:
        """Return the facts with a tokenizer of fewer tokens."""
        return replace(self, tokenizer=tokenizer)


def resolve(
    run: RunConfig,
    *,
    labels: list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reads_data: bool = True,
    num_shards: int = 1,
) -> ResolvedRun:
    """Open the tokenizer of a run, and read the names of its classes. The model's shapes are built when first used.

    Args:
        labels: names of the classes of a trained run; None reads them from the data.
        tokenizer: the run's tokenizer, if it is open already.
        reads_data: False for a plan without data, which has no tokenizer and, if need be, two classes.
        num_shards: ranks over which ZeRO-3 splits each parameter; masks of the shapes are padded for them.

    Raises InputError.
    """
    task = task_of(run)
    if labels is None and reads_data:
        labels = task.label_names(run.data)
    elif labels is None:
        labels = []
        if task.new_head:
            labels = ["0", "1"]  # a head of two outputs; its size hardly matters for a plan
    if reads_data and run.task == "causal-lm":
        require_named_tokenizer(run.data, run.model.tokenizer)
    if tokenizer is None and reads_data:
        tokenizer = load_tokenizer(run)
    return ResolvedRun(run=run, labels=labels, tokenizer=tokenizer, num_shards=num_shards)


def build_plain(resolved: ResolvedRun) -> PlainModel:
    """Build a run's model on the meta device, without the modules of its method. Raises InputError."""
    run = resolved.shaped_by or resolved.run
    config = load_model_config(run, resolved.labels, resolved.tokenizer)
    # kept, because an export has the rates of the base model and not those of the run
    own_dropout = dropout_of(config)
    set_dropout(config, dict.fromkeys(own_dropout, run.model.dropout))
    if resolved.num_experts:
        set_num_experts(config, resolved.num_experts)
    if run.start.ffn is not None:
        cut_config(config, run.start.ffn)
    model = Pretrained(run.model.path, "model.path").shapes(
        task_of(run).model_class(),
        config,
        dtype=DTYPES[run.train.precision],
        purpose=f" with model.attn_implementation = {run.model.attn_implementation!r} and task {run.task!r}",
        fix="Choose another of them",
    )
    return PlainModel(model, own_dropout)


def inject_shapes(resolved: ResolvedRun, plain: PlainModel) -> RunShapes:
    """Return the shapes of a run: a copy of its ``plain`` model with the modules of the method. Raises InputError."""
    run = resolved.shaped_by or resolved.run
    model = plain.copy()
    # new factors and masks are made on this context's device, without memory
    with torch.device("meta"):
        prepare_for_method(model, run, num_shards=resolved.num_shards)
        if run.additions:
            attach_to_model(model, run, resolved.tokenizer or load_tokenizer(run))
    if not num_trainable(model):
        raise ConfigError(
            f"method = {run.method!r} with pst.update_rank = {run.pst.update_rank} would train nothing of model.path = "
            f"{run.model.path!r}. Fix: pst.update_rank of at least 1, or pst.modules_to_save with a module to train"
        )
    targets = tuple(ResolvedTarget(name, layer.layout, layer.rule) for name, layer in pst_layers(model).items())
    return RunShapes(model=model, targets=targets, own_dropout=plain.own_dropout)


def load_tokenizer(run: RunConfig) -> PreTrainedTokenizerBase:
    """Load the run's tokenizer, with a padding token if the task needs one. Raises InputError."""
    setting = "path"
    where = run.model.path
    if run.model.tokenizer:
        setting = "tokenizer"
        where = run.model.tokenizer
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


def load_model_config(run: RunConfig, labels: list[str], tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """Load the transformers config of the run's model, with its own dropout: see :func:`set_dropout`.

    Raises InputError for a model that cannot do the run's task; that is not checked without a ``tokenizer``.
    """
    task = task_of(run)
    base = Pretrained(run.model.path, "model.path")
    config = base.config(**task.config_options(labels), **attention_options(run))
    base.require_dense(config)
    set_padding(config, task, tokenizer)
    if tokenizer is not None:
        task.check_model(run.data, config, tokenizer)
    return config


def set_padding(config: PreTrainedConfig, task: Task, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Set the padding token of ``config`` to the tokenizer's, if the task pads."""
    padding = getattr(config, "pad_token_id", None) or 0
    if tokenizer is not None:
        padding = tokenizer.pad_token_id
    if task.pads and padding is not None:  # a decoder's head reads the token before the padding
        config.pad_token_id = padding


def attention_options(run: RunConfig) -> dict[str, str]:
    """Return the options of ``from_pretrained`` for the run's attention implementation."""
    if not run.model.attn_implementation:
        return {}  # transformers chooses
    return {"attn_implementation": run.model.attn_implementation}


def dropout_of(config: PreTrainedConfig) -> dict[str, float]:
    """Return the rates of dropout in ``config`` by key: hidden_dropout_prob, resid_pdrop, layerdrop and so on.

    A key without a number is omitted: its rate follows another one.
    """
    rates: dict[str, float] = {}
    for key, value in config.to_dict().items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and ("dropout" in key or key.endswith("pdrop")):
            rates[key] = value
    return rates


def set_dropout(config: PreTrainedConfig, rates: Mapping[str, float]) -> None:
    """Set rates of dropout in ``config``, by key."""
    for key, rate in rates.items():
        setattr(config, key, rate)


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
    if run.mask_method.trains_everything:
        for param in module.parameters():
            # masks are bytes, and torch refuses gradients of integers
            param.requires_grad_(param.dtype.is_floating_point)
    if run.quantization.embeddings:
        set_table_grid(module, grid_of(run.quantization.embeddings, run.quantization.group))


def attach_to_model(module: nn.Module, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Attach the run's additions. Works on the meta device; collective under ``zero.Init``.

    Raises InputError for a model that cannot have them, or whose positions they exceed.
    """
    attach_additions(module, run.additions, tokenizer, seed=run.seed)
    extra_tokens = extra_tokens_of(module)
    positions = positions_of(module.config)  # type: ignore[arg-type]
    if extra_tokens and 0 < positions < extra_tokens + run.data.max_length:
        raise ConfigError(
            f"data.max_length = {run.data.max_length}: with the {extra_tokens} tokens of {', '.join(run.additions)} "
            f"that is more than the {positions} positions of the model (max_position_embeddings). Set it to at most "
            f"{positions - extra_tokens}"
        )


def grid_of_run(run: RunConfig) -> Grid | None:
    """Return the scheme in which the run quantises its weights; None if it does not."""
    if not run.quantization.values:
        return None
    return grid_of(run.quantization.values, run.quantization.group)


def frozen_grid(run: RunConfig, bits: int) -> Grid | None:
    """Return the quantisation scheme of frozen weights stored in ``bits``; None for 16, weights as they were loaded."""
    if bits == 16:
        return None
    return grid_of(f"int{bits}", run.model.base_group)


def num_trainable(module: nn.Module) -> int:
    """Return the number of values that train, over all ranks."""
    trained = [param for param in module.parameters() if param.requires_grad]
    return sum(map(sharding.full_numel, trained))


def _why_only_fp32(run: RunConfig, labels: list[str], plain: PlainModel) -> str:
    """Return why the ``plain`` model on the meta device works in fp32 only; "" if the run's precision may do."""
    if run.train.precision == "fp32":
        return ""
    name = type(plain.model).__name__
    names = kept_in_fp32(plain.model)
    if names:
        return f"{name} keeps {names[0]} in fp32, and torch cannot multiply the two"
    if experts_modules(plain.model):  # whose operators have other rules on the meta device
        return ""
    problem = _forward_problem(plain.copy())
    if not problem:
        return ""
    # passes that depend on values always fail on the meta device, in every dtype
    config = load_model_config(run, labels, None)
    place = Pretrained(run.model.path, "model.path")
    in_fp32 = place.shapes(task_of(run).model_class(), config, dtype=torch.float32)
    if _forward_problem(in_fp32):
        return ""
    return f"{name} works in fp32 only; its forward pass ends in {problem!r}"


def _forward_problem(plain: nn.Module) -> str:
    """Return the error of a forward pass on the meta device; "" if there is none."""
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
    declared: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        declared.update(getattr(module, attribute, None) or ())
    names: list[str] = []
    for name, param in module.named_parameters():
        # factors are parameters of the method, not of the base
        if param.dtype != torch.float32 or ".pst_" in name:
            continue
        # declared are modules and last parts of names, so a parameter's name contains one of them
        if not any(part in name for part in declared):
            names.append(name)
    return names
