"""``pruning.json``: the record of a folder that ``pst-ds prune`` has written, validated where it is read."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pst_ds.errors import first_problem
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.formats.safetensors_file import CODE_OF_DTYPE
from pst_ds.prune.folder import RECORD_FILE
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import Facts, read_table

_Count = Annotated[int, Field(ge=0, lt=1 << 48)]
_Share = Annotated[float, Field(ge=0, le=1)]
_DTYPES = "|".join(str(dtype).removeprefix("torch.") for dtype in CODE_OF_DTYPE)


class RecordedLayer(BaseModel):
    """The outcome for one layer; see :class:`pst_ds.prune.outcome.PrunedLayer`."""

    model_config = ConfigDict(strict=True)

    name: str
    shape: Annotated[tuple[_Count, ...], Field(strict=False, min_length=2, max_length=2)]
    pattern: str
    sparsity_requested: _Share
    zeros: _Count
    pruned: _Count = 0
    dtype: Annotated[str, Field(pattern=rf"^({_DTYPES}|)$")] = ""
    expert_zeros: list[_Count] = []
    expert_tokens: list[_Count] = []


class PruningRecord(BaseModel):
    """The values of a record that readers use; it has others, for information only."""

    model_config = ConfigDict(strict=True)

    layers: list[RecordedLayer]
    base_model: str | None = None
    base_fingerprint: str | None = None
    method: str | None = None
    values: str | None = None
    group: int | str | None = None
    sparsity_requested: _Share | None = None
    sparsity_measured: _Share | None = None
    weights: _Count | None = None
    pruned_weights: _Count | None = None
    modules: dict[str, dict[str, Any]] = {}


def read_pruning_record(folder: Path) -> tuple[PruningRecord, Facts]:
    """Return the record of a folder, and all its values. Raises ExportError if it is missing or damaged."""
    path = folder / RECORD_FILE
    table = read_table(path, f"{path} is missing")
    # validated, because users edit the record, as its messages suggest
    try:
        return PruningRecord.model_validate(table), table
    except ValidationError as error:
        raise ExportError(f"{path} is damaged: {first_problem(error)}. Prune the model again") from None


def zeros_in_record(folder: Path) -> dict[str, int]:
    """Return the zeros of each layer by name, as pruning left them; empty for another folder, or for an export.

    Raises ExportError for a damaged record.
    """
    # an export has a copy of its source's record, which counts zeros before the export
    if not (folder / RECORD_FILE).is_file() or (folder / MANIFEST_FILE).exists():
        return {}
    record, _ = read_pruning_record(folder)
    return {layer.name: layer.zeros for layer in record.layers}
