"""Scales of a folder that ``pst-ds prune`` has quantised, so that an export has exactly the same values and scales."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pst_ds.core.packings import WHOLE_ROW
from pst_ds.core.quantization import Grid, first_off_grid, grid_of
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.formats.safetensors_file import TensorFile, TensorFileError
from pst_ds.prune.folder import RECORD_FILE, SCALES_FILE, scales_name
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import require_plain
from pst_ds.writing.pruning_record import read_pruning_record


@dataclass(frozen=True, slots=True)
class PrunedScales:
    """The quantisation that a folder's pruning record names."""

    folder: Path
    grid: Grid
    layers: tuple[str, ...]
    """Names of the quantised layers."""
    scales: TensorFile

    def names(
        self, model: nn.Module, linear: dict[str, nn.Module], stacks: Sequence[str], requested: Grid | None
    ) -> dict[str, str]:
        """Return the quantised layers of the plain ``model``, by the names of their weights.

        ``linear``: linear layers by the names of their weights. ``stacks``: names of stacks of experts. Raises
        ExportError if the quantisation ``requested`` for the export is another one, or ``model`` lacks a layer.
        """
        if requested not in (None, self.grid):
            raise ExportError(
                f"the export asks for {requested}, and {self.folder} was quantised to {self.grid}. Quantising it again "
                f'loses accuracy. Set values = "{self.grid.values}" and group = "{self.grid.group or WHOLE_ROW}", or '
                "prune the model with another quantisation"
            )
        modules = dict(model.named_modules())
        # an export without these scales would choose others, so a layer that cannot be found is an error
        layer_of: dict[int, str] = {}
        for layer in self.layers:
            if layer in modules:
                layer_of[id(modules[layer])] = layer
            elif layer not in stacks:
                raise ExportError(
                    f"{self.folder / RECORD_FILE} lists {layer[:200]}, a layer that the model does not have"
                )
        # by object, because ``linear`` has a weight under its names in the model and in the files
        layer_of_matrix: dict[str, str] = {}
        for name, module in linear.items():
            if id(module) in layer_of:
                layer_of_matrix[name] = layer_of[id(module)]
        for name in stacks:
            if name in self.layers:
                layer_of_matrix[name] = name
        return layer_of_matrix

    def scales_of(self, layer: str, weight: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """Return the scales of a layer, (O, groups) bf16, given its weight (O, I) in the dtype of the file.

        ``rows``: range of rows, if ``weight`` is a piece of a stack of experts. Raises ExportError for damaged scales,
        and if a weight is not exactly an integer times its scale.
        """
        path = self.scales.path
        name = scales_name(layer)
        try:
            if rows is None:
                scales = self.scales.read(name)
            else:
                first, last = rows
                scales = self.scales.read_rows(name, first, last)
            off = first_off_grid(weight, self.grid, scales)
        except (TensorFileError, ValueError) as error:  # damaged bytes, or scales of another shape
            raise ExportError(f"{path}: {name}: {error}. Prune again, or see {_opt_out(self.folder)}") from None
        if off is not None:
            raise ExportError(
                f"{layer}.weight does not match {self.folder / RECORD_FILE}, which says it is quantised ({self.grid}): "
                f"row {off[0]}, input {off[1]} is {float(weight[off]):g}, not an integer times its scale. If the "
                f"weights were changed on purpose, see {_opt_out(self.folder)}"
            )
        return scales


def read_pruned_scales(folder: Path) -> PrunedScales | None:
    """Return the quantisation of a folder that ``pst-ds prune`` has written; None for any other folder.

    Exports keep the pruning record, but their manifest takes precedence. Raises ExportError.
    """
    record = folder / RECORD_FILE
    # an export's scales are in its own files
    if not record.is_file() or (folder / MANIFEST_FILE).exists():
        return None
    recorded, _ = read_pruning_record(folder)
    if recorded.values is None:
        return None
    layers = tuple(layer.name for layer in recorded.layers)
    try:
        grid = grid_of(recorded.values, recorded.group)
    except ValueError as error:
        raise ExportError(f"{record} is damaged: {error!r}. Prune again, or see {_opt_out(folder)}") from None
    path = folder / SCALES_FILE
    require_plain(path, f"{path} is missing, although {record} names a quantisation. See {_opt_out(folder)}")
    scales = TensorFile(path)
    # all of them now, not after hours of writing the tensors before a missing one
    for layer in layers:
        if scales_name(layer) not in scales.slots:
            raise ExportError(f"{path} lacks {scales_name(layer)}. Prune again, or see {_opt_out(folder)}")
    return PrunedScales(folder=folder, grid=grid, layers=layers, scales=scales)


def _opt_out(folder: Path) -> str:
    """Return where a message says how to export without the recorded scales."""
    return f'docs/how-to/methods.md: without "values" in {folder / RECORD_FILE} they are quantised again'
