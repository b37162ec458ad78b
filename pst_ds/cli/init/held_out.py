"""Validation data for ``pst-ds init``: rows of the training file that are held out."""

from typing import TYPE_CHECKING

from pst_ds.cli.init.first_table import Settings
from pst_ds.config.run import RunConfig
from pst_ds.config.toml import run_from_table
from pst_ds.data.dataset import file_and_slice
from pst_ds.data.tasks import task_of
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

PERCENT = 10
"""Rows of data.train that are held out for validation, in percent."""


def with_validation(table: Settings, tokenizer: "Tokenizer", labels: list[str]) -> tuple[Settings, str]:
    """Return ``table`` with the last rows of data.train held out for validation, and a sentence about it.

    Where that is not possible, return ``table`` unchanged; the sentence gives the reason.
    """
    where = table["data"]["train"]
    file, piece = file_and_slice(where)
    if piece:
        return table, f"no validation data: {where} is a slice, and --validation may name the rest of {file}"
    trained = 100 - PERCENT
    # the order of the settings is that of the run file
    data = {"train": f"{where}[:{trained}%]", "validation": f"{where}[{trained}%:]"}
    for name, value in table["data"].items():
        if name != "train":
            data[name] = value
    with_slices = {**table, "data": data}
    try:
        examples = _require_fair(run_from_table(with_slices), tokenizer, labels)
    except InputError as error:
        # a run without validation data still trains, so this is a remark and not an error
        return table, f"no validation data: {error}. Name a file with --validation"
    return with_slices, f"held out for validation: the last {PERCENT} % of {where}, {examples}"


def _require_fair(run: RunConfig, tokenizer: "Tokenizer", labels: list[str]) -> str:
    """Return the number of held-out examples, with their unit.

    Raises InputError if the remaining rows cannot be trained on, or if the rows are sorted by class.
    """
    task = task_of(run)
    data = run.data
    # the classes of the first rows, against those of all rows
    if task.label_names(data) != labels:
        raise InputError(f"{data.train} lacks some classes, so its rows may be in their order")
    # for its checks only: the first rows may be too few, or too short for a sequence
    task.load(data, "train", tokenizer, labels)
    examples = task.load(data, "validation", tokenizer, labels)
    # metrics of a single class say nothing: a constant prediction is always right
    if labels and task.num_labels(examples) == 1:
        raise InputError(f"{data.validation} has one class only, so its rows may be in the order of classes")
    return f"{len(examples)} {task.unit}"
