"""Predict for every row of a data file, in one process or several: the function behind ``pst-ds predict``."""

import csv
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets

from pst_ds.atomic_files import atomic_file
from pst_ds.data.dataset import first_row, read_local, require_columns, row_place, text_column
from pst_ds.errors import InputError
from pst_ds.inference.encoder.encoder import Encoder, Prediction
from pst_ds.nn.folder_facts import data_of_run
from pst_ds.progress import Progress

ROWS = 512
"""Rows of a piece of the file. Batches are made of the rows of one piece, so they do not depend on the processes."""
FORMATS = (".jsonl", ".csv", ".parquet")
_USUAL_COLUMNS = ("text", "sentence")
_FORMULA = re.compile(r"[=+\-@\t\r]")
"""Start of a cell that a spreadsheet computes."""
_NUMBER = re.compile(r"[+-]?[0-9.]+")
"""Cells that start like a formula and are numbers."""


def require_no_formula(labels: Iterable[str], out: Path) -> None:
    """Raise InputError if a label of a model, which a stranger may have named, would be a formula in a spreadsheet."""
    for label in labels:
        if _FORMULA.match(label) and not _NUMBER.fullmatch(label):
            raise InputError(
                f"out = {str(out)!r}: the model's label {label[:80]!r} would be a formula in a spreadsheet. "
                "Write .jsonl or .parquet"
            )


# without slots, because cached_property needs a __dict__
@dataclass(frozen=True)
class TextFile:
    """The texts of a data file, and how to open the model that predicts for them. Pickled for each process."""

    file: str
    rows: datasets.Dataset
    columns: Sequence[str]
    open_model: Callable[[], Encoder]

    @cached_property
    def model(self) -> Encoder:
        """The model of this process, opened on first use: only processes that predict have one."""
        return self.open_model()

    def piece(self, first: int) -> list[Prediction]:
        """Return the predictions for up to :data:`ROWS` rows from ``first`` on. Raises InputError."""
        rows = self.rows[first : first + ROWS]

        def place(row: int) -> str:
            return row_place(self.rows, self.file, first + row)

        texts = []
        for column in self.columns:
            texts.append(text_column(rows[column], column, self.file, place))
        if len(texts) == 1:
            return self.model.predict(texts[0])
        # pairs of the texts of two columns
        return self.model.predict(list(zip(*texts, strict=True)))

    def pieces(self, processes: int) -> Iterator[list[Prediction]]:
        """Yield the predictions of all pieces in order. Raises InputError."""
        starts = range(0, len(self.rows), ROWS)
        if processes == 1:
            yield from map(self.piece, starts)
            return
        # a forked process would inherit the locks of torch's threads, but not the threads
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(starts)), spawn, _start_process, (self,)) as pool:
            try:
                yield from pool.map(_piece_in_process, starts)
            finally:
                # after an error, pieces that no process has started on would be computed for nothing
                pool.shutdown(cancel_futures=True)

    def predict(self, out: Path, processes: int = 1) -> None:
        """Write the predictions to ``out`` atomically, in one of :data:`FORMATS` by its name. Raises InputError.

        Each has the ``row`` of its text in the file, from 0; also for a slice.
        """
        write = _WRITERS[out.suffix]
        with atomic_file(out) as partial, Progress("predict", len(self.rows), "rows") as shown:
            write(partial, self._numbered(processes, shown))

    def _numbered(self, processes: int, shown: Progress) -> Iterator[list[dict[str, object]]]:
        """Yield the pieces with the row of each prediction, and count them on ``shown``."""
        row = first_row(self.rows, self.file)
        for piece in self.pieces(processes):
            numbered: list[dict[str, object]] = []
            for prediction in piece:
                numbered.append({"row": row, **prediction})
                row += 1
            yield numbered
            shown.add(len(piece))


def _write_jsonl(path: Path, pieces: Iterable[list[dict[str, object]]]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for piece in pieces:
            for prediction in piece:
                lines.write(json.dumps(prediction, ensure_ascii=False) + "\n")


def _write_csv(path: Path, pieces: Iterable[list[dict[str, object]]]) -> None:
    # newline="": the csv module writes line ends itself, and keeps those within a label
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        is_first = True
        for piece in pieces:
            for prediction in piece:
                flat = _flat(prediction)
                # all predictions of a model have the same columns
                if is_first:
                    rows.writerow(flat)
                    is_first = False
                rows.writerow(flat.values())


def _flat(prediction: Mapping[str, object]) -> dict[str, object]:
    """Return a prediction with a column for each label: "probabilities.good"."""
    flat: dict[str, object] = {}
    for name, value in prediction.items():
        if not isinstance(value, dict):
            flat[name] = value
            continue
        for label, probability in value.items():
            flat[f"{name}.{label}"] = probability
    return flat


def _write_parquet(path: Path, pieces: Iterable[list[dict[str, object]]]) -> None:
    # here, since importing it takes time and most files are text
    import pyarrow
    import pyarrow.parquet

    writer = None
    try:
        for piece in pieces:
            # all pieces get the schema of the first one, since a file has one schema
            schema = None if writer is None else writer.schema
            table = pyarrow.Table.from_pylist(piece, schema)
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


_WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}


def open_file(folder: str, file: str, columns: Sequence[str], open_model: Callable[[], Encoder]) -> TextFile:
    """Read a file. Texts are in ``columns``, or those of the run that ``folder`` was exported from, or the usual one.

    Raises InputError.
    """
    rows = read_local(file, "data", "line")
    setting = f"columns = {list(columns)}"
    recorded = data_of_run(Path(folder)).text_columns
    if not columns and recorded is not None:
        setting = f"data.text_columns of {folder}"
        columns = recorded
    if not columns:
        # a folder that pst-ds did not write: the first usual name that the file has
        usual = [name for name in _USUAL_COLUMNS if name in rows.column_names]
        columns = usual[:1]
    if len(columns) not in (1, 2) or not len(rows):
        names = ", ".join(rows.column_names)
        raise InputError(
            f"{file} has {len(rows)} rows. Name a column of texts, or two of pairs, such as columns = "
            f"{rows.column_names[:1]}. Columns: {names}"
        )
    require_columns(rows, dict.fromkeys(columns, setting), file)
    return TextFile(file, rows, columns, open_model)


# a global, since the functions of a process pool are called without an object of the process
_file: TextFile
"""The file of this process, if it is one of several."""


def _start_process(file: TextFile) -> None:
    global _file
    _file = file
    # Ctrl-C reaches all processes; the first one ends this one, without a traceback of each
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process, which would wait for work forever, when a signal kills the first one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        # not sys.exit, which would end this thread only
        os._exit(1)


def _piece_in_process(first: int) -> list[Prediction]:
    return _file.piece(first)
