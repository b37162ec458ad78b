"""The rows of a split by the value of a column that names users, read once, and loaded as examples user by user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.dataset import DataInMemory, read_rows
from pst_ds.data.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True, slots=True)
class RowsByUser:
    """All rows of a split, and whose they are."""

    data: DataConfig
    split: str
    rows: Dataset
    places: dict[str, list[int]]
    """The rows of each user, in their order, by users in the order of their first rows."""

    @property
    def where(self) -> str:
        """The file or split that the rows are of."""
        return str(getattr(self.data, self.split))

    def count(self, user: str) -> int:
        """Return how many rows a user has; 0 for one that has none."""
        return len(self.places.get(user, ()))

    def load(self, task: Task[Any], user: str, tokenizer: Tokenizer, labels: Sequence[str]) -> Any:
        """Return the task's examples of a user. Nothing of them is cached on disk. Raises ConfigError."""
        own = DataInMemory.of(self.data, self.rows.select(self.places[user]))
        return task.load(own, self.split, tokenizer, labels)


def read_by_user(data: DataConfig, split: str, column: str) -> RowsByUser:
    """Read a split, whose ``column`` names the user of each row: a text or a number.

    Raises ConfigError for a split that is no table of rows, a column that is missing, and a row without a user.
    """
    where = getattr(data, split)
    rows = read_rows(data, split, {})
    if column not in rows.column_names:
        raise ConfigError(
            f"{where} has no column {column!r}, which is to name the user of each row. Columns: "
            f"{', '.join(rows.column_names)}"
        )
    places: dict[str, list[int]] = {}
    for row, value in enumerate(rows[column]):
        if value is None or isinstance(value, list | dict) or not str(value).strip():
            raise ConfigError(
                f"{where}: column {column!r} has {value!r} in row {row}, which names no user; give it a text or a "
                "number, or take the row out"
            )
        places.setdefault(str(value), []).append(row)
    return RowsByUser(data, split, rows, places)
