"""The code of the documents runs: Python in the order of its page, and commands of pst-ds, on tiny models.

The tutorial and the README's first commands run in test_tutorial.py, and what other commands are given is parsed in
test_commands.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from pst_ds.checkpoint.user_store import UserStore
from pst_ds.cli.main import main
from tests.checkpoint.test_user_store import COMMON, _state

from .pages import PAGES, ROOT, Block, blocks, commands
from .test_code import EXTRAS
from .test_tutorial import TUTORIAL

SETTINGS = {
    "deepspeed_config": "", "train.num_steps": 2, "train.batch_size": 4, "eval.interval": 0, "data.max_length": 16,
    "data.test": "tests/data/validation.jsonl", "schedule.initial_sparsity": 0.5, "schedule.final_sparsity": 0.5,
}  # fmt: skip
VERBS = ("eval", "export", "generate", "init", "inspect", "plan", "prune", "verify")
"""Verbs whose commands run on the pages of COMMANDS; the others take long, listen, or start ranks."""
COMMANDS = [
    *(
        f"docs/how-to/{page}.md"
        for page in ("export", "inference", "large-models", "methods", "monitor", "your-script")
    ),
    *(f"docs/reference/{page}.md" for page in ("command-line", "troubleshooting")),
]
"""Pages whose commands run, on a tiny decoder; a block under ``<!-- encoder -->`` on a tiny encoder."""
NOT_HERE = {
    "fewer-experts": "needs a mixture of experts; tests/prune/test_whole_experts.py",
    "--format gguf": "needs a BPE tokenizer; tests/writing/test_gguf.py",
    "export theirs": "needs a model that another library has quantised; tests/writing",
    "stores/web": "needs a token store; tests/cli/test_prepare.py",
    "init$": "asks questions",
}
"""Commands that do not run here, by a pattern for them."""
PYTHON = [page for page in PAGES if any(b.language == "python" for b in blocks(page)) and page != TUTORIAL]


def _classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=99, num_labels=2, **sizes))


def _llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=35, max_position_embeddings=2048, initializer_range=0.1, **sizes))


def _pruned() -> torch.nn.Module:
    return LlamaForCausalLM.from_pretrained("out/start")


def _args() -> object:
    from transformers import TrainingArguments

    return TrainingArguments("out", max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to=[])


def _rows() -> list[dict[str, Any]]:
    return [{"input_ids": torch.arange(8) + i, "labels": torch.tensor(i % 2)} for i in range(8)]


def _loader() -> object:
    return torch.utils.data.DataLoader(_rows(), batch_size=2)


def _conversations() -> object:
    from datasets import Dataset

    turns = [{"role": "user", "content": "a warm film"}, {"role": "assistant", "content": "a dull plot"}]
    return Dataset.from_dict({"messages": [turns] * 8})


def _deepspeed_config() -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}


_SCRIPT: dict[str, Callable[[], Any]] = {
    "model": _classifier, "base": _pruned, "args": _args, "data": _rows, "loader": _loader,
    "conversations": _conversations, "config": _deepspeed_config, "folder": str,
}  # fmt: skip
GIVEN: dict[str, dict[str, Callable[[], Any]]] = {
    "README.md": {"model": _classifier, "args": _args, "data": _rows},
    "docs/how-to/your-script.md": _SCRIPT,
    "docs/reference/api.md": _SCRIPT | {"base": _classifier},
    "docs/how-to/migrate.md": {"model": _llama},
}
"""What pages take from the reader's script, by name. A block that injects into a model begins with a new one."""
ON_A_CPU = {'SFTConfig("out", max_steps=500,': 'SFTConfig("out", max_steps=4, use_cpu=True, bf16=False,'}
"""Words that are written for a GPU, and what takes their place here."""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A folder for each tiny model: its run file, its run with exports, and what pages call by name."""
    top = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        for kind, run_file, model in (("decoder", "causal_lm", _llama()), ("encoder", "world_size", None)):
            (top / kind).mkdir()
            patch.chdir(top / kind)
            for name in ("tests", "tools", "launch", "ds_configs"):
                (top / kind / name).symlink_to(ROOT / name)
            settings = SETTINGS | {"output_dir": "runs/mine"}
            if model is not None:
                settings["model.path"] = "model"
                model.save_pretrained("model")
                AutoTokenizer.from_pretrained("tests/data/tiny-llama").save_pretrained("model")
            words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
            assert main(["train", f"tests/data/{run_file}.toml", "--quiet", *words]) == 0
            shutil.copy("runs/mine/run.toml", "run.toml")
            for out, how in (("export", []), ("packed", ["--format", "bitmask"])):
                assert main(["export", "runs/mine", "--out", f"runs/mine/{out}", *how]) == 0
        patch.chdir(top / "decoder")
        _name_what_pages_name(top / "decoder")
    return {kind: top / kind for kind in ("decoder", "encoder")}


def _name_what_pages_name(top: Path) -> None:
    for name in ("pst-90", "pst-50", "dense", "notes"):
        shutil.copytree(top / "runs/mine", top / "runs" / name)
    UserStore.create(top / "runs/films-users", COMMON).add("Some Film", _state())
    for name in ("train.jsonl", "validation.jsonl"):
        (top / name).symlink_to(ROOT / "tests/data" / name)
    texts = [json.loads(line)["text"] for line in (top / "train.jsonl").read_text().splitlines()]
    (top / "corpus.txt").write_text("\n\n".join(4 * texts))
    for name in ("pruned_model", "packed"):
        (top / name).symlink_to(f"runs/mine/{'export' if name == 'pruned_model' else name}")
    (top / "elsewhere").symlink_to("runs/mine")
    for name in ("path/to/llama", "path/to/model", "path/to/bert-base-uncased", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).symlink_to(ROOT / "tests/data/tiny-bert" if "bert" in name else top / "model")


@pytest.fixture
def place(places, tmp_path, monkeypatch) -> Callable[[str], None]:
    """``place("decoder")``: go to a copy of that model's folder."""

    def go(kind: str) -> None:
        shutil.copytree(places[kind], tmp_path / kind, symlinks=True)
        monkeypatch.chdir(tmp_path / kind)

    return go


def _run_page(page: str, python: bool, shell: bool, encoder: bool = False) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.is_encoder != encoder:
            continue
        if block.language == "python" and python and not block.not_run:
            _run_python(block, names)
        elif block.language == "bash" and shell and not block.not_run:
            for words in commands(block):
                line = " ".join(words)
                if words[0] == "pst-ds" and words[1] in VERBS and not re.search("|".join(NOT_HERE), line):
                    if words[1] == "init":
                        Path("run.toml").unlink(missing_ok=True)  # that of the commands after it
                    assert main(words[1:]) == 0, f"{block}: {line}"


def _run_python(block: Block, names: dict[str, Any]) -> None:
    if any(f"from {extra} import" in block.text and find_spec(extra) is None for extra in EXTRAS):
        return
    for name, make in GIVEN.get(block.page, {}).items():
        if f"inject_pst({name}," in block.text or (name not in names and re.search(rf"\b{name}\b", block.text)):
            names[name] = make()
    text = block.text
    for words, ours in ON_A_CPU.items():
        text = text.replace(words, ours)
    exec(compile(text, str(block), "exec"), names)


@pytest.mark.zero3
@pytest.mark.parametrize("page", [page for page in PAGES if page in {*COMMANDS, *PYTHON}])
@pytest.mark.few(6)
def test_a_page_runs(page, place, run_ranks):
    place("decoder")
    run_ranks(_run_page, 1, page, page in PYTHON, page in COMMANDS)


@pytest.mark.zero3
@pytest.mark.parametrize("page", [page for page in COMMANDS if any(b.is_encoder for b in blocks(page))])
def test_commands_about_an_encoder_run(page, place, run_ranks):
    place("encoder")
    run_ranks(_run_page, 1, page, False, True, True)


def test_code_that_uses_what_nobody_defined_is_found():
    with pytest.raises(NameError, match="trainer_of_nobody"):
        _run_python(Block("README.md", 1, "python", "trainer_of_nobody.train()"), {})
