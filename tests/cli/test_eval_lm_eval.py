"""lm-eval on exported models: the figures are those of ``pst-ds eval``."""

from __future__ import annotations

import json

import datasets
import pytest

import pst_ds.hf  # noqa: F401  packed folders load after this import
from pst_ds.cli.main import main

pytest.importorskip("lm_eval", reason="the extra 'lm-eval' is not installed; the tests do not require it, it is large")

TEXT = "the warm film and the dull plot with a sharp scene"
TASK = """
task: prose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory, monkeypatch):
    """One process, with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("packing", ["dense", "bitmask"])
def test_perplexity_per_byte_is_the_same(tmp_path, packing, capsys):
    import lm_eval

    (tmp_path / "test.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (tmp_path / "prose.yaml").write_text(TASK.format(file=tmp_path / "test.jsonl"))
    more = {
        "output_dir": f"{tmp_path}/run", "deepspeed_config": "", "data.test": f"{tmp_path}/test.jsonl",
        "train.num_steps": 4, "schedule.final_sparsity": 0.5,
    }  # fmt: skip
    settings = [argument for key, value in more.items() for argument in ("--set", f"{key}={json.dumps(value)}")]
    assert main(["train", "tests/data/causal_lm.toml", "--quiet", *settings]) == 0
    assert main(["eval", f"{tmp_path}/run", "--json"]) == 0
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["export", f"{tmp_path}/run", "--format", packing, "--out", f"{tmp_path}/out"]) == 0
    found = lm_eval.simple_evaluate(
        model="hf",
        # the tokenizer begins every text with <s> by itself, and lm-eval would put another one before it
        model_args=f"pretrained={tmp_path}/out,dtype=float32,add_bos_token=False",
        tasks=["prose"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=1,
    )["results"]["prose"]
    assert found["byte_perplexity,none"] == pytest.approx(ours["byte_perplexity"], rel=1e-4)
    assert found["bits_per_byte,none"] == pytest.approx(ours["bits_per_byte"], rel=1e-4)
