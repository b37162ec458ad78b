"""Embedding tables and output layers that train with quantised values: after every step the parameter holds them.

The optimizer's fp32 master keeps the unrounded values, so gradients pass straight through in every model family. The
values are what :func:`pst_ds.core.quantization.quantize` makes of the master in the run's precision, and exports repeat
that.
"""

from collections.abc import Container

import torch
from torch import nn

from pst_ds.core.quantization import Grid, round_to_grid
from pst_ds.errors import InputError
from pst_ds.formats.base_weights import names_in_files
from pst_ds.nn.model_structure import is_inside_block
from pst_ds.nn.tables.embedding import PSTEmbedding, pst_embeddings
from pst_ds.parallel import sharding

MIN_ROWS = 16
"""Smaller tables, such as token types, would save nothing, and their error would affect every token."""


def embedding_tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of embeddings outside the blocks and of the output layer, by their names in model and files.

    A tied output layer shares its table.
    """
    readers: list[nn.Module] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | PSTEmbedding) and not is_inside_block(name, model):
            readers.append(module)
    getter = getattr(model, "get_output_embeddings", None)
    if getter is not None:
        output = getter()
        if isinstance(output, nn.Linear):  # not one that is frozen in few bits, nor a pruned one
            readers.append(output)
    return named_parameters(model, {id(module.get_parameter("weight")) for module in readers})


def quantisable_tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return those of :func:`embedding_tables` with at least :data:`MIN_ROWS` rows."""
    return {name: table for name, table in embedding_tables(model).items() if sharding.full_shape(table)[0] >= MIN_ROWS}


def named_parameters(model: nn.Module, chosen: Container[int]) -> dict[str, nn.Parameter]:
    """Return the parameters with these identities, by each of their names in the model and in its files."""
    named: dict[str, nn.Parameter] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) in chosen:
            named[name] = param
    return named | {name_in_file: named[name] for name_in_file, name in names_in_files(model, named).items()}


def set_table_grid(model: nn.Module, grid: Grid) -> None:
    """Set the quantisation that :func:`round_tables` applies. Raises InputError for tables that do not support it."""
    tables = quantisable_tables(model)
    if not tables:
        raise InputError(
            f'quantization.embeddings = "{grid.values}": {type(model).__name__} has no plain embedding or output layer '
            "in 16 bits. Remove it, or set model.embedding_bits = 16"
        )
    for name, table in tables.items():
        try:
            grid.num_groups(sharding.full_shape(table)[1])
        except ValueError as error:
            raise InputError(f'quantization.embeddings = "{grid.values}": {name}: {error}') from None
        if table.requires_grad and table.dtype == torch.float32:
            raise InputError(
                f'quantization.embeddings = "{grid.values}": {name} trains, and in train.precision = "fp32" it has no '
                'separate master with the unrounded values. Set train.precision = "bf16"'
            )
    model.pst_table_grid = grid  # type: ignore[assignment]


def table_grid(model: nn.Module) -> Grid | None:
    """Return the grid of :func:`set_table_grid`."""
    return vars(model).get("pst_table_grid")


def rounded_grid(model: nn.Module) -> Grid | None:
    """Return the grid of tables that :func:`round_tables` has quantised."""
    return vars(model).get("pst_rounded_grid")


@torch.no_grad()
def round_tables(model: nn.Module) -> None:
    """Quantise the tables, or from now on the rows that an updated embedding looks up; nothing without a grid.

    Call it after every step, which writes the masters to the parameters. Collective; gathers one table at a time.
    """
    grid = table_grid(model)
    if grid is None:
        return
    sharding.release(model)  # what is written to a table that FSDP2 keeps gathered would be lost
    model.pst_rounded_grid = grid  # type: ignore[assignment]
    updated = pst_embeddings(model).values()
    for embedding in updated:
        embedding.grid = grid
    done = {id(embedding.weight) for embedding in updated}
    for table in quantisable_tables(model).values():  # a table may have several names
        # A frozen table that differs from its master was quantised by an earlier call.
        if id(table) not in done and (table.requires_grad or not sharding.differs_from_master(table)):
            _round_own_part(table, grid)
        done.add(id(table))


def _round_own_part(table: nn.Parameter, grid: Grid) -> None:
    """Quantise this rank's shard of a table. Collective.

    A group of values with one scale may cross the ends of the shard, but not those of a row. Therefore the rows that
    the shard touches are quantised.
    """
    shard = sharding.shard_of(table)
    width = sharding.full_shape(table)[1]
    start = shard.start
    stop = shard.start + shard.values.numel()
    first_row = start // width
    last_row = -(-stop // width)  # rounded up; excluded
    with sharding.gathered([table]):
        rows = round_to_grid(table.detach()[first_row:last_row], None, grid)
    offset = first_row * width
    sharding.write_beside_master(table, rows.flatten()[start - offset : stop - offset])
