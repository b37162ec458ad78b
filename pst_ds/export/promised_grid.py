"""The grid that ``pst-ds prune`` rounded the weights of a folder to: an export has its very codes and scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pst_ds.core.quantization import Grid, first_off_grid, grid_of
from pst_ds.export.manifest import MANIFEST_FILE, ExportError, read_table, require_plain
from pst_ds.formats.safetensors_file import TensorFile, TensorFileError
from pst_ds.prune.folder import RECORD_FILE, SCALES_FILE, scales_name


@dataclass(frozen=True, slots=True)
class PromisedGrid:
    """What the record of a folder says of its weights; every export of them to this grid is exact."""

    folder: Path
    grid: Grid
    layers: tuple[str, ...]
    """Names of the layers that were rounded."""
    scales: TensorFile

    def names(
        self, model: nn.Module, linear: dict[str, nn.Module], stacks: Sequence[str], asked: Grid | None
    ) -> dict[str, str]:
        """Return the layers by the names of their weights, in ``linear`` and ``stacks``, for an export to ``asked``.

        Raises ExportError for another grid than theirs, and for layers that ``model`` does not have.
        """
        if asked not in (None, self.grid):
            raise ExportError(
                f"values in {asked}, but {self.folder} was rounded to {self.grid}, and rounding again loses more: take "
                f"{_words(self.grid)}, or prune the model for that grid"
            )
        modules = dict(model.named_modules())
        unknown = next((layer for layer in self.layers if layer not in modules and layer not in stacks), None)
        if unknown is not None:
            raise ExportError(
                f"{self.folder / RECORD_FILE} says that {unknown[:200]} was rounded, and there is no such layer"
            )
        layer_of = {id(modules[layer]): layer for layer in self.layers if layer in modules}
        found = {name: layer_of[id(module)] for name, module in linear.items() if id(module) in layer_of}
        return found | {name: name for name in stacks if name in self.layers}

    def scales_of(self, layer: str, weight: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """Return the scales of a layer, (O, groups) bf16. ``weight``: its own, (O, I), in the dtype of the file.

        ``rows``: first and last + 1 of those that ``weight`` has of a stack; None: all.

        Raises ExportError for damaged scales, and for a weight that is not code * scale to the bit.
        """
        path, name = self.scales.path, scales_name(layer)
        try:
            scales = self.scales.read(name) if rows is None else self.scales.read_rows(name, *rows)
            off = first_off_grid(weight, self.grid, scales)
        except (TensorFileError, ValueError) as error:
            raise ExportError(f"{path}: {name}: {error}; prune again, or see {_opt_out(self.folder)}") from None
        if off is not None:
            raise ExportError(
                f"{layer}.weight is not on the grid that {self.folder / RECORD_FILE} says it is on ({self.grid}): row "
                f"{off[0]}, input {off[1]} is {float(weight[off]):g}, no whole number times its scale. If the weights "
                f"were changed on purpose, see {_opt_out(self.folder)}"
            )
        return scales


def promised_grid(folder: Path) -> PromisedGrid | None:
    """Return the grid that the weights of ``folder`` were pruned to; None of any other folder. Raises ExportError.

    An export of such a folder has the record too; but its manifest says how its weights are stored.
    """
    record = folder / RECORD_FILE
    if not record.is_file() or (folder / MANIFEST_FILE).exists():
        return None
    table = read_table(record, f"{record} is missing")
    if table.get("values") is None:
        return None
    try:
        grid = grid_of(table["values"], table.get("group"))
        layers = tuple(str(layer["name"]) for layer in table["layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{record} is damaged: {error!r}; prune again, or see {_opt_out(folder)}") from None
    path = folder / SCALES_FILE
    require_plain(path, f"{path} is missing, which the grid of {record} goes with; see {_opt_out(folder)}")
    scales = TensorFile(path)
    lacking = next((layer for layer in layers if scales_name(layer) not in scales.slots), None)
    if lacking is not None:
        raise ExportError(f"{path} lacks {scales_name(lacking)}; prune again, or see {_opt_out(folder)}")
    return PromisedGrid(folder, grid, layers, scales)


def _opt_out(folder: Path) -> str:
    return f'docs/how-to/methods.md: without "values" in {folder / RECORD_FILE} they are rounded anew'


def _words(grid: Grid) -> str:
    return f"--values {grid.values} --group {grid.group or 'row'}"
