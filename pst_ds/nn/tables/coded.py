"""Frozen tables in few bits: the token embedding and the output layer of a language model as codes and scales.

What reads them, :func:`find_tables`, becomes a :class:`CodedEmbedding` or a :class:`CodedOutput`, which looks rows up
and multiplies without the whole table as weights. Under ZeRO-3 codes are gathered, a quarter or half of bf16's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.coded_weight import CodedWeight, CodeLayout, of_table_inputs, table_rows, times_table
from pst_ds.core.layout import WeightLayout
from pst_ds.core.quantization import Grid, StoredGrid
from pst_ds.nn.base_codes import BASE_CODES, BASE_SCALES, require_finite
from pst_ds.nn.targets import InjectionError, find_embeddings, modules_to_save, places_by_module, put
from pst_ds.parallel import zero3


@dataclass(frozen=True, slots=True)
class TableCodes:
    """A table as parameters of bytes, both in one shard."""

    layout: CodeLayout
    codes: nn.Parameter
    scales: nn.Parameter
    dtype: torch.dtype
    """Of the weights that were encoded."""


class CodedTable(nn.Module):
    """A frozen table of rows, such as a vocabulary's, as codes and scales of few bits; no weights stay in memory.

    Parameters, both uint8 and frozen: ``pst_base_codes`` and ``pst_base_scales``, as
    :class:`pst_ds.core.quantization.CodeLayout` has them in one shard, which ZeRO-3 may cut anywhere. Tied modules
    share them.
    """

    def __init__(self, codes: TableCodes):
        super().__init__()
        self.layout, self.dtype = codes.layout, codes.dtype
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
        """Return the rows in the dtype that the model computes in. The parameters must be gathered."""
        return CodedWeight(self.layout, self.codes.detach(), self.scales.detach(), self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedTable:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # follows a cast of the model, which codes do not
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, {self.layout.stored.grid}"


class CodedEmbedding(CodedTable):
    """Takes the place of a frozen ``nn.Embedding``: rows by number, made of their codes."""

    def __init__(self, base: nn.Embedding, codes: TableCodes):
        super().__init__(codes)
        self.padding_idx = base.padding_idx
        self.num_embeddings, self.embedding_dim = self.shape

    def forward(self, ids: Tensor) -> Tensor:
        """(...,) row numbers to (..., d)."""
        look_up = torch.compiler.disable(table_rows) if torch.compiler.is_compiling() else table_rows
        return look_up(self.table(), ids)


class CodedOutput(CodedTable):
    """Takes the place of a frozen output layer, an ``nn.Linear``: y = x W' + b, with a slice of W's rows at a time."""

    bias: nn.Parameter | None

    def __init__(self, base: nn.Linear, codes: TableCodes):
        super().__init__(codes)
        self.register_parameter("bias", base.bias)
        self.out_features, self.in_features = self.shape

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        multiply = torch.compiler.disable(self._eager) if torch.compiler.is_compiling() else self._eager
        return multiply(input)

    def _eager(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return _TimesTable.apply(x.to(self.dtype), self, self.bias)


class _Context(Protocol):
    """What autograd keeps from the forward pass to the backward pass."""

    module: CodedOutput
    needs_input_grad: tuple[bool, ...]


class _TimesTable(torch.autograd.Function):
    """Saves nothing: the gradient of x needs the codes alone, which ZeRO-3 has again in the backward pass."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, module: CodedOutput, bias: Tensor | None) -> Tensor:
        ctx.module = module
        rows = times_table(x.reshape(-1, module.in_features), module.table(), bias)
        return rows.view(*x.shape[:-1], module.out_features).detach()  # detach: see PSTLinear.product

    @staticmethod
    def backward(ctx: _Context, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        module = ctx.module
        rows = grad_y.reshape(-1, module.out_features)
        grad_x = None
        if ctx.needs_input_grad[0]:
            with zero3.gathered([p for p in module.parameters(recurse=False) if zero3.is_released(p)]):
                grad_x = of_table_inputs(rows, module.table()).view(*grad_y.shape[:-1], module.in_features)
        return grad_x, None, rows.sum(0) if ctx.needs_input_grad[2] else None


@dataclass(frozen=True, slots=True)
class TableTarget:
    """A table to encode, and the modules that read it, each with every (parent, attribute) that holds it."""

    name: str
    """Of the weight."""
    weight: nn.Parameter
    layout: CodeLayout
    modules: tuple[tuple[nn.Embedding | nn.Linear, tuple[tuple[nn.Module, str], ...]], ...]


def find_tables(model: nn.Module, config: PSTConfig, grid: Grid, pruned: Collection[nn.Module]) -> list[TableTarget]:
    """Return the token embedding of a model of transformers and its output layer, one table where they are tied.

    An output layer among the ``pruned`` is left out. Raises InjectionError for a table that ``config`` trains or
    updates, that a module reads which is no plain ``nn.Embedding`` or ``nn.Linear``, or whose rows ``grid`` does not
    fit.
    """
    weights = {id(p): p for p in (m.get_parameter("weight") for m in _ends(model) if m not in pruned)}
    if not weights:
        raise InjectionError(
            f"{type(model).__name__} says of no module that it embeds its tokens; leave embeddings in 16 bits"
        )
    places, names = places_by_module(model), {module: name for name, module in model.named_modules()}
    trained = {**modules_to_save(model, config), **{t.name: t.module for t in find_embeddings(model, config)}}
    inside = {module: name for name, part in trained.items() for module in part.modules()}
    found = []
    for weight in weights.values():
        readers = [m for m in names if any(param is weight for param in m.parameters(recurse=False))]
        for module in readers:
            _require_table(names[module], module, inside.get(module))
        name = f"{names[readers[0]]}.weight"
        readers_and_places = tuple((module, places[module]) for module in readers)
        found.append(TableTarget(name, weight, table_layout(name, weight, grid), readers_and_places))
    return found


def _ends(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that embed tokens and multiply with a vocabulary, as far as the model says which do."""
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(NotImplementedError, AttributeError):
            found = getattr(model, name)()
            if found is not None:
                yield found


def _require_table(name: str, module: nn.Module, trained_in: str | None) -> None:
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


def table_layout(name: str, weight: nn.Parameter, grid: Grid) -> CodeLayout:
    """Return how a table is encoded. Raises InjectionError for a grid that its rows are not on."""
    rows, width = zero3.full_shape(weight)
    fix = "or leave embeddings in 16 bits"
    try:
        layout = CodeLayout(StoredGrid(WeightLayout(rows, width), grid))
    except ValueError as error:
        raise InjectionError(f"{name}: embeddings in few bits: {error}; {fix}") from None
    if width * grid.bits % 8:
        raise InjectionError(f"{name}: {width} codes of {grid.bits} bits are no whole bytes; take 8 bits, {fix}")
    return layout


@torch.no_grad()
def encode_table(name: str, weight: nn.Parameter, layout: CodeLayout) -> TableCodes:
    """Encode a table and let go of it; on the meta device only shapes are made.

    Collective under ZeRO-3, where it is whole on every rank meanwhile. Raises InjectionError for values that are not
    finite.
    """
    sizes = layout.num_code_bytes, layout.num_scale_bytes
    if weight.is_meta:
        parts = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
    else:
        with zero3.gathered([weight]):
            require_finite(name, weight)
            parts = [zero3.own_part(weight, part) for part in layout.encode(weight, 0)]
    codes, scales = (zero3.bytes_split_as(weight, size, part) for size, part in zip(sizes, parts, strict=True))
    zero3.drop(weight)
    return TableCodes(layout, codes, scales, weight.dtype)


def encode_tables(targets: Sequence[TableTarget]) -> None:
    """Put coded tables in the places of ``targets``, and let go of their weights.

    Collective under ZeRO-3, where one table at a time is whole on every rank. Raises InjectionError for values that are
    not finite.
    """
    for target in targets:
        codes = encode_table(target.name, target.weight, target.layout)
        for module, places in target.modules:
            coded = CodedEmbedding(module, codes) if isinstance(module, nn.Embedding) else CodedOutput(module, codes)
            put(coded.train(module.training), places)


def coded_tables(model: nn.Module) -> dict[str, CodedTable]:
    """Return the coded tables of ``model`` by name, in model order; tied ones each."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CodedTable)}


def plain_tables(model: nn.Module) -> dict[str, CodeLayout]:
    """Put plain modules with the rounded weights in the places of the coded tables of ``model``, tied ones tied again.

    On the meta device these are shapes. Returns how each was held, by the name of its weight. Not under ZeRO-3.
    """
    tables = coded_tables(model)
    places, weights = places_by_module(model), {}
    for module in tables.values():
        key = id(module.codes)
        if key not in weights:
            weights[key] = nn.Parameter(module.table().dense(), requires_grad=False)
        put(_plain(module, weights[key]).train(module.training), places[module])
    return {f"{name}.weight": module.layout for name, module in tables.items()}


def _plain(module: CodedTable, weight: nn.Parameter) -> nn.Module:
    rows, width = module.shape
    plain: nn.Module
    if isinstance(module, CodedEmbedding):
        plain = nn.Embedding(rows, width, padding_idx=module.padding_idx, device="meta")
    else:
        assert isinstance(module, CodedOutput)
        plain = nn.Linear(width, rows, bias=False, device="meta")
        plain.register_parameter("bias", module.bias)
    plain.weight = weight
    return plain
