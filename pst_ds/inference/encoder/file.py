"""Predict for every row of a data file, in one process or several: the function behind ``pst-ds predict``."""

import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets

from pst_ds.atomic_files import atomic_file
from pst_ds.data.dataset import read_local, require_columns, text_column
from pst_ds.errors import InputError
from pst_ds.inference.encoder.encoder import Encoder, Prediction, data_of_run
from pst_ds.progress import Progress

ROWS = 512
"""Rows of a piece of the file. Batches are made of the rows of one piece, so they do not depend on the processes."""
FORMATS = (".jsonl", ".csv", ".parquet")
_USUAL_COLUMNS = ("text", "sentence")


@dataclass(frozen=True)
class TextFile:
    """The texts of a data file, and how to open the model that predicts for them. Pickled for each process."""

    file: str
    rows: datasets.Dataset
    columns: Sequence[str]
    open_model: Callable[[], Encoder]

    @cached_property
    def model(self) -> Encoder:
        return self.open_model()

    def piece(self, first: int) -> list[Prediction]:
        """Return the predictions for up to :data:`ROWS` rows from ``first`` on. Raises InputError."""
        rows = self.rows[first : first + ROWS]
        texts = [text_column(rows[column], column, self.file, first) for column in self.columns]
        return self.model.predict(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)))

    def pieces(self, processes: int) -> Iterator[list[Prediction]]:
        """Yield the predictions of all pieces in order. Raises InputError."""
        starts = range(0, len(self.rows), ROWS)
        if processes == 1:
            yield from map(self.piece, starts)
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(starts)), spawn, _start_process, (self,)) as pool:
            try:
                yield from pool.map(_piece_in_process, starts)
            finally:
                pool.shutdown(cancel_futures=True)

    def predict(self, out: Path, processes: int = 1) -> None:
        """Write the predictions to ``out`` atomically, in one of :data:`FORMATS` by its name. Raises InputError."""
        with atomic_file(out) as partial, tempfile.TemporaryDirectory(prefix="pst-ds-") as cache:
            with partial.open("w", encoding="utf-8") as lines, Progress("predict", len(self.rows), "rows") as shown:
                for piece in self.pieces(processes):
                    lines.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in piece)
                    shown.add(len(piece))
            if out.suffix != ".jsonl":
                table = datasets.load_dataset("json", data_files=str(partial), split="train", cache_dir=cache)
                (table.flatten().to_csv if out.suffix == ".csv" else table.to_parquet)(partial)


def open_file(folder: str, file: str, columns: Sequence[str], open_model: Callable[[], Encoder]) -> TextFile:
    """Read a file. Texts are in ``columns``, or those of the run that ``folder`` was exported from, or the usual one.

    Raises InputError.
    """
    rows = read_local(file, "--data", "line")
    setting, recorded = "--text", data_of_run(Path(folder)).get("text_columns")
    if not columns and isinstance(recorded, list):
        setting, columns = f"data.text_columns of {folder}", recorded
    columns = columns or [name for name in _USUAL_COLUMNS if name in rows.column_names][:1]
    if len(columns) not in (1, 2) or not len(rows):
        names = ", ".join(rows.column_names)
        raise InputError(f"{file} has {len(rows)} rows. Name a column of texts, or two of pairs, with --text: {names}")
    require_columns(rows, dict.fromkeys(columns, setting), file)
    return TextFile(file, rows, columns, open_model)


_file: TextFile
"""The file of this process, if it is one of several."""


def _start_process(file: TextFile) -> None:
    global _file
    _file = file
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process, which would wait for work forever, when a signal kills the first one."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _piece_in_process(first: int) -> list[Prediction]:
    return _file.piece(first)
