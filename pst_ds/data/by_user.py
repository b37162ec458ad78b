"""Group the rows of a split by user, and load the examples of one user at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.dataset import DataInMemory, appearance, place_in_split, read_rows, values_of
from pst_ds.data.tasks.task import E, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True, slots=True)
class RowsByUser:
    """Rows of a split, grouped by user."""

    data: DataConfig
    split: str
    rows: "Dataset"
    places: dict[str, list[int]]
    """Row indices of each user, ascending; users in the order of their first rows."""

    @property
    def where(self) -> str:
        """File or split of the rows."""
        return str(getattr(self.data, self.split))

    def count(self, user: str) -> int:
        """Return the number of rows of a user; 0 for unknown users."""
        return len(self.places.get(user, ()))

    def load(self, task: Task[E], user: str, tokenizer: "Tokenizer", labels: Sequence[str]) -> E:
        """Return a user's examples, without caching them on disk. Raises ConfigError."""
        places = self.places[user]
        # rows in memory are not cached: there may be millions of users
        data_of_user = DataInMemory.of(self.data, self.rows.select(places), places)
        return task.load(data_of_user, self.split, tokenizer, labels)


def read_by_user(data: DataConfig, split: str, column: str) -> RowsByUser:
    """Read a split and group its rows by the user in ``column``, a text or a number. Raises ConfigError for a missing
    column, and for a row without a user."""
    where = getattr(data, split)
    rows = read_rows(data, split, {})
    if column not in rows.column_names:
        raise ConfigError(
            f"{where} has no column {column!r}, with the user of each row. Columns: {', '.join(rows.column_names)}"
        )
    places: dict[str, list[int]] = {}
    for row, value in enumerate(values_of(rows, column)):
        # NaN is a missing number; white space would be the name of a folder
        is_missing = value is None or (isinstance(value, float) and math.isnan(value))
        if is_missing or isinstance(value, list | dict) or not str(value).strip():
            raise ConfigError(
                f"{where}: column {column!r} has {value!r} in {place_in_split(data, split, rows, row)}, which is not a "
                "user. Use a text or a number, or remove the row"
            )
        # users are named by texts, also where a file has numbers
        places.setdefault(str(value), []).append(row)
    by_user = RowsByUser(data, split, rows, places)
    _require_distinct(by_user, column)
    return by_user


def _require_distinct(by_user: RowsByUser, column: str) -> None:
    """Raise ConfigError for users that look the same, such as "ann" and "ann ", whose rows would be divided."""
    user_of: dict[str, str] = {}
    for user, places in by_user.places.items():
        first = user_of.setdefault(appearance(user), user)
        if first != user:
            place = place_in_split(by_user.data, by_user.split, by_user.rows, places[0])
            # escaped, since two accents may be printed alike
            raise ConfigError(
                f"{by_user.where}: column {column!r} has the users {first!a} and {user!a}, which look the same, in "
                f"{place}. Write each user in one way"
            )
