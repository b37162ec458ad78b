"""Quantised frozen tables: the token embedding and the output layer of a language model as int8 or int4 values.

:func:`find_tables` finds the modules that read them. Each becomes a :class:`CodedEmbedding` or :class:`CodedOutput`,
which never dequantises the full table. ZeRO-3 gathers the quantised values, a quarter or half of bf16's bytes.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.coded_weight import CodedWeight, CodeLayout, of_table_inputs, table_rows, times_table
from pst_ds.core.layout import WeightLayout
from pst_ds.core.quantization import Grid, StoredGrid
from pst_ds.nn.base_codes import BASE_CODES, BASE_SCALES, require_finite
from pst_ds.nn.model_structure import modules_of
from pst_ds.nn.targets import InjectionError, Places, find_embeddings, modules_to_save, places_by_module, put
from pst_ds.parallel import sharding


@dataclass(frozen=True, slots=True)
class TableCodes:
    """A quantised table as parameters of bytes, both in one shard."""

    layout: CodeLayout
    codes: nn.Parameter
    scales: nn.Parameter
    dtype: torch.dtype
    """Dtype of the original weights."""


class CodedTable(nn.Module):
    """Base class of modules that read a quantised frozen table of rows, such as a vocabulary's.

    Parameters, both uint8 and frozen: ``pst_base_codes`` and ``pst_base_scales``, laid out by
    :class:`pst_ds.core.coded_weight.CodeLayout` in one shard, which ZeRO-3 may partition anywhere. Tied modules share
    them.
    """

    def __init__(self, codes: TableCodes):
        super().__init__()
        self.layout = codes.layout
        self.dtype = codes.dtype
        self.register_parameter(BASE_CODES, codes.codes)
        self.register_parameter(BASE_SCALES, codes.scales)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width)."""
        return self.layout.stored.layout.shape

    @property
    def codes(self) -> nn.Parameter:
        return self.get_parameter(BASE_CODES)

    @property
    def scales(self) -> nn.Parameter:
        return self.get_parameter(BASE_SCALES)

    def table(self) -> CodedWeight:
        """Return the table, in the dtype that the model computes in. The parameters must be gathered."""
        return CodedWeight(self.layout, self.codes.detach(), self.scales.detach(), self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # a cast of the model leaves the bytes unchanged
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, {self.layout.stored.grid}"


class CodedEmbedding(CodedTable):
    """Replacement of a frozen ``nn.Embedding`` that dequantises the rows it looks up."""

    def __init__(self, base: nn.Embedding, codes: TableCodes):
        super().__init__(codes)
        self.padding_idx = base.padding_idx
        self.num_embeddings, self.embedding_dim = self.shape

    def forward(self, ids: Tensor) -> Tensor:
        """Map row numbers (...,) to rows (..., d)."""
        look_up = table_rows
        if torch.compiler.is_compiling():
            look_up = torch.compiler.disable(table_rows)
        return look_up(self.table(), ids)


class CodedOutput(CodedTable):
    """Replacement of a frozen output layer, an ``nn.Linear``: y = x W' + b, dequantising W slice by slice."""

    bias: nn.Parameter | None

    def __init__(self, base: nn.Linear, codes: TableCodes):
        super().__init__(codes)
        self.register_parameter("bias", base.bias)
        self.out_features, self.in_features = self.shape

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        multiply = self._eager
        if torch.compiler.is_compiling():
            multiply = torch.compiler.disable(self._eager)
        return multiply(input)

    def _eager(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return _TimesTable.apply(x.to(self.dtype), self, self.bias)


class _TimesTable(torch.autograd.Function):
    """Save nothing: the gradient of x only needs the quantised values, which ZeRO-3 gathers again."""

    @staticmethod
    def forward(ctx, x, module, bias):
        ctx.module = module
        rows = times_table(x.reshape(-1, module.in_features), module.table(), bias)  # (tokens, O)
        return rows.view(*x.shape[:-1], module.out_features).detach()  # detach: see PSTLinear.product

    @staticmethod
    def backward(ctx, grad_y):
        module = ctx.module
        rows = grad_y.reshape(-1, module.out_features)  # (tokens, O)
        grad_x = None
        grad_bias = None
        if ctx.needs_input_grad[0]:
            # Under ZeRO-3 the parameters may be released again between the forward and the backward pass.
            released = [param for param in module.parameters(recurse=False) if sharding.is_released(param)]
            with sharding.gathered(released):
                grad_x = of_table_inputs(rows, module.table()).view(*grad_y.shape[:-1], module.in_features)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, None, grad_bias


@dataclass(frozen=True, slots=True)
class TableTarget:
    """A table to quantise, and the modules that read it with their places."""

    name: str
    """Name of the weight."""
    weight: nn.Parameter
    layout: CodeLayout
    modules: tuple[tuple[nn.Embedding | nn.Linear, Places], ...]


def find_tables(model: nn.Module, config: PSTConfig, grid: Grid, pruned: Collection[nn.Module]) -> list[TableTarget]:
    """Return the token embedding and the output layer of a transformers model; one table if they are tied.

    An output layer among ``pruned`` is omitted. Raises InjectionError for a table that ``config`` trains or updates,
    that is read by other modules than a plain ``nn.Embedding`` or ``nn.Linear``, or whose rows ``grid`` does not fit.
    """
    weights = _table_weights(model, pruned)
    if not weights:
        raise InjectionError(f"{type(model).__name__} names no token embedding; leave embeddings in 16 bits")
    places = places_by_module(model)
    names = {module: name for name, module in model.named_modules()}
    trained_in: dict[nn.Module, str] = {}  # every module of a trained part, and the name of the part
    for name, trained in {**modules_to_save(model, config), **find_embeddings(model, config)}.items():
        for module in trained.modules():
            trained_in[module] = name
    targets: list[TableTarget] = []
    for weight in weights:
        readers = []
        for module in names:
            if any(param is weight for param in module.parameters(recurse=False)):
                _require_table(names[module], module, trained_in.get(module))
                readers.append(module)
        name = f"{names[readers[0]]}.weight"
        target = TableTarget(
            name=name,
            weight=weight,
            layout=_table_layout(name, weight, grid),
            modules=tuple((module, places[module]) for module in readers),
        )
        targets.append(target)
    return targets


def _table_weights(model: nn.Module, pruned: Collection[nn.Module]) -> list[nn.Parameter]:
    """Return the weights of the token embedding and of an output layer that is not ``pruned``; one if they are tied."""
    weights: dict[int, nn.Parameter] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module: nn.Module | None = None
        with suppress(NotImplementedError, AttributeError):  # models without text, or without an output layer
            module = getattr(model, getter)()
        if module is not None and module not in pruned:
            weight = module.get_parameter("weight")
            weights[id(weight)] = weight
    return list(weights.values())


def _require_table(name: str, module: nn.Module, trained_in: str | None) -> None:
    """Raise InjectionError for a module that trains, in the part ``trained_in``, or that is not a plain table."""
    if trained_in is not None:
        raise InjectionError(
            f"{name} would be frozen in few bits, and is trained as update_embeddings or modules_to_save name "
            f"{trained_in}; leave one of them out"
        )
    if type(module) not in (nn.Embedding, nn.Linear) or getattr(module, "max_norm", None) is not None:
        raise InjectionError(
            f"{name} is a {type(module).__name__}, and only a plain nn.Embedding (no max_norm) or nn.Linear is frozen "
            "in few bits; leave embeddings in 16 bits"
        )


def _table_layout(name: str, weight: nn.Parameter, grid: Grid) -> CodeLayout:
    rows, width = sharding.full_shape(weight)
    fix = "or leave embeddings in 16 bits"
    try:
        layout = CodeLayout(StoredGrid(WeightLayout(rows, width), grid))
    except ValueError as error:
        raise InjectionError(f"{name}: embeddings in few bits: {error}; {fix}") from None
    if width * grid.bits % 8:
        raise InjectionError(f"{name}: {width} values of {grid.bits} bits do not fill whole bytes; use 8 bits, {fix}")
    return layout


@torch.no_grad()
def encode_tables(targets: Sequence[TableTarget]) -> None:
    """Replace the modules of ``targets`` by those with quantised tables, and free the weights.

    Collective under ZeRO-3, where it gathers one table at a time on every rank. On the meta device it only creates
    shapes. Raises InjectionError for values that are not finite.
    """
    for target in targets:
        weight = target.weight
        layout = target.layout
        sizes = (layout.num_code_bytes, layout.num_scale_bytes)
        if weight.is_meta:
            parts = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
        else:
            # One shard, of which ranks keep any part: a table is only read when it is gathered.
            with sharding.gathered([weight]):
                require_finite(target.name, weight)
                parts = [sharding.own_part(weight, part) for part in layout.encode(weight, 0)]
        split: list[nn.Parameter] = []
        for size, part in zip(sizes, parts, strict=True):
            split.append(sharding.bytes_split_as(weight, size, part))
        codes, scales = split
        table = TableCodes(layout=layout, codes=codes, scales=scales, dtype=weight.dtype)
        sharding.drop(weight)  # before the next table is gathered
        for module, places in target.modules:
            coded = CodedEmbedding(module, table) if isinstance(module, nn.Embedding) else CodedOutput(module, table)
            put(coded.train(module.training), places)


def coded_tables(model: nn.Module) -> dict[str, CodedTable]:
    """Return all modules of ``model`` with a quantised table by name, in model order."""
    return modules_of(model, CodedTable)


def plain_tables(model: nn.Module) -> dict[str, CodeLayout]:
    """Replace quantised tables by plain modules with dequantised weights, tied ones tied again. Not under ZeRO-3.

    On the meta device these are shapes. Returns the former layouts by the name of the weight.
    """
    tables = coded_tables(model)
    places = places_by_module(model)
    weights: dict[int, nn.Parameter] = {}
    for module in tables.values():
        key = id(module.codes)  # tied modules share their codes
        if key not in weights:
            weights[key] = nn.Parameter(module.table().dense(), requires_grad=False)
        rows, width = module.shape
        plain: nn.Module
        if isinstance(module, CodedEmbedding):
            plain = nn.Embedding(rows, width, padding_idx=module.padding_idx, device="meta")
        else:
            plain = nn.Linear(width, rows, bias=False, device="meta")
            plain.register_parameter("bias", module.bias)  # type: ignore[arg-type]
        plain.weight = weights[key]
        put(plain.train(module.training), places[module])
    return {f"{name}.weight": module.layout for name, module in tables.items()}
