"""A file that a verb writes at its end is checked before the work starts."""

from __future__ import annotations

import pytest

from pst_ds.cli.output_file import require_file_place
from pst_ds.errors import InputError


def test_a_new_file_and_an_existing_one_may_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.jsonl").touch()
    for file in (tmp_path / "new.jsonl", tmp_path / "old.jsonl", tmp_path.relative_to(tmp_path) / "new.jsonl"):
        require_file_place(file, "--out")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (".", "is a folder. Name a file to write"),
        ("missing/new.jsonl", "missing does not exist. Create it, or name another file"),
        ("old.jsonl/new.jsonl", "old.jsonl does not exist. Create it, or name another file"),
    ],
)
def test_other_places_are_refused(tmp_path, file, words):
    (tmp_path / "old.jsonl").touch()
    with pytest.raises(InputError) as caught:
        require_file_place(tmp_path / file, "--out")
    message = str(caught.value)
    assert message.startswith(f"--out {tmp_path / file}")
    assert words in message
