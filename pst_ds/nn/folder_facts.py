"""What a model folder says about itself in ``pst_manifest.json`` or ``pruning.json``, validated where it is read.

Verbs that use a model read a few facts only, whose types are checked because a stranger may have written the folder.
``pst-ds verify`` and ``inspect`` read and check the whole manifest (:mod:`pst_ds.writing.manifest`).
"""

import json
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from pst_ds.errors import InputError, first_problem
from pst_ds.file_names import MANIFEST_FILE

Model = TypeVar("Model", bound=BaseModel)
PRUNING_RECORD = "pruning.json"
"""Name of the record that ``pst-ds prune`` writes next to the weights."""


class DataOfRun(BaseModel):
    """Data settings of the run that a folder was exported from."""

    model_config = ConfigDict(strict=True)

    max_length: PositiveInt | None = None
    text_columns: list[str] | None = None


class RunOfFolder(BaseModel):
    """The run that a folder was exported from."""

    model_config = ConfigDict(strict=True)

    data: DataOfRun = DataOfRun()


class FolderFacts(BaseModel):
    """The facts of a manifest or a pruning record that are needed to use the model; the files have others."""

    model_config = ConfigDict(strict=True)

    base_model: str | None = None
    base_fingerprint: str | None = None
    sparsity_measured: Annotated[float, Field(ge=0, le=1)] | None = None
    run: RunOfFolder | None = None


def read_facts(folder: Path, name: str = MANIFEST_FILE) -> FolderFacts:
    """Return the facts in the file ``name`` of a folder; none if there is no such file.

    Raises InputError, with the file, the key and the value, for a file that is damaged or has a value of another type.
    """
    return read_typed(folder / name, FolderFacts, "Copy the folder again, or export the model again")


def data_of_run(folder: Path) -> DataOfRun:
    """Return the data settings of the run that a folder was exported from; none for others. Raises InputError."""
    run = read_facts(folder).run
    return DataOfRun() if run is None else run.data


def sparsity_of(folder: Path) -> float:
    """Return the sparsity of a folder's pruned layers, as its manifest or pruning record says; 0 without one.

    Raises InputError.
    """
    for name in (MANIFEST_FILE, PRUNING_RECORD):
        if sparsity := read_facts(folder, name).sparsity_measured:
            return sparsity
    return 0.0


def origin_of(path: str) -> str:
    """Return the model from which the folder ``path`` was pruned or fine-tuned; ``path`` for another folder.

    Raises InputError.
    """
    for name in (PRUNING_RECORD, MANIFEST_FILE):
        path = read_facts(Path(path), name).base_model or path
    return path


def read_typed(path: Path, kind: type[Model], fix: str) -> Model:
    """Return a JSON file as a pydantic model of ``kind``, with its defaults if there is no file.

    Raises InputError, with ``fix``, for a file that is damaged or has values of other types.
    """
    try:
        table = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return kind()
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}. {fix}") from None
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise InputError(f"{path} is damaged: {first_problem(error)}. {fix}") from None
