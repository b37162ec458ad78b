"""Object stores: runs are mirrored to a server of S3's protocol, and come back from there, as tokens do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pst_ds.checkpoint.mirror import copies
from pst_ds.config.data import DataConfig
from pst_ds.data.preparation.pieces import Reading
from pst_ds.data.preparation.prepare import plan_store, prepare_store
from pst_ds.data.tokens.loading import load_sequences
from pst_ds.errors import InputError
from pst_ds.file_names import step_folders
from pst_ds.remote_folder import RemoteFolder
from tests.s3_server import s3_bucket
from tests.train.stopping import train_here

pytestmark = pytest.mark.thorough

RUN_FILE = "tests/data/world_size.toml"
STEPS = 12


@pytest.fixture(scope="module")
def bucket():
    with s3_bucket() as address:
        yield address


def _train(folder, mirror, *, resume=False, stop_at=0):
    settings = [
        f"output_dir={json.dumps(str(folder))}", f"checkpoint.mirror={json.dumps(mirror)}", "checkpoint.interval=3",
        f"train.num_steps={STEPS}",
    ]  # fmt: skip
    return train_here(RUN_FILE, settings, resume=resume, stop_at=stop_at, ranks=False)


def test_a_run_whose_folder_is_gone_resumes_from_the_bucket(bucket, imported_by_ranks, tmp_path):
    whole = _train(tmp_path / "whole", "")
    mirror = f"{bucket}/mirror"
    _train(tmp_path / "run", mirror, stop_at=7)
    shutil.rmtree(tmp_path / "run")
    result = _train(tmp_path / "run", mirror, resume=True)
    assert {**result, "seconds": 0} == {**whole, "seconds": 0}
    kept = [path.name for path in step_folders(tmp_path / "run" / "checkpoints")]
    assert copies(RemoteFolder(mirror, "checkpoint.mirror")) == kept


def test_a_token_store_is_read_from_the_bucket(bucket, alone, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).resolve().parent / "data" / "tiny-llama")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the warm film {number}"}) + "\n" for number in range(40)))
    prepare_store(plan_store([str(text)], tokenizer, Reading(), piece_bytes=200), tokenizer, tmp_path / "store")
    remote = RemoteFolder(f"{bucket}/tokens", "data.train")
    for path in (tmp_path / "store").iterdir():
        remote.put(path, path.name)

    def loaded(where):
        settings = DataConfig(train=where, max_length=4, cache=str(tmp_path / "cache"))
        return load_sequences(settings, "train", tokenizer)

    assert loaded(f"{bucket}/tokens").digest == loaded(str(tmp_path / "store")).digest


def test_a_bucket_that_does_not_exist_is_one_message_before_the_run(bucket, tmp_path):
    with pytest.raises(InputError, match=r"checkpoint.mirror = 's3://nobody/here' cannot be written: .*bucket"):
        _train(tmp_path / "run", "s3://nobody/here")
    assert not (tmp_path / "run").exists()
