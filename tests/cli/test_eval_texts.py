"""``pst-ds eval --texts``: a file that cannot be written is refused before any text is generated."""

from __future__ import annotations

import pytest

from pst_ds.cli.main import main

RUN = """
output_dir = "{folder}/run"
task = "chat"

[model]
path = "tests/data/tiny-llama"

[data]
train = "tests/data/train.jsonl"
text_columns = ["messages"]
max_length = 32

[train]
num_steps = 1
batch_size = 2
"""


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("missing/texts.jsonl", "missing does not exist. Create it, or name another file"),
        (".", "is a folder. Name a file to write"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(tmp_path, capsys, file, words):
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN.format(folder=tmp_path))
    texts = tmp_path / file
    assert main(["eval", str(run_file), "--texts", str(texts)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"pst-ds eval: --texts {texts}")
    assert words in message
