"""The served model, a tiny one with users, and the expected answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.chaos.launch import ROOT
from tools.verbs import verb

RUN_FILE = ROOT / "tests/data/causal_lm.toml"
ROWS = ROOT / "tests/data/train.jsonl"
LOOP = "loop without end"
TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% if m.content == '" + LOOP + "' %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
)
"""Template that repeats its input, and loops on one message."""
PROMPTS = ("the film", "a very clever plot and a fine cast", "vague", "the end was tired and the story")
MOST_TOKENS = 16
Answers = dict[tuple[str | None, str, int | None], str]
"""Texts by user, prompt and seed; greedy ones without a seed."""


@dataclass(frozen=True, slots=True)
class Served:
    """Folders that a server is started with."""

    model: Path
    store: Path
    template: Path

    def arguments(self, engine: str) -> list[str]:
        """Return the arguments of ``pst-ds serve``; transformers serves no users."""
        users = ["--store", str(self.store)] if engine == "native" else []
        return [str(self.model), *users, "--chat-template", str(self.template), "--engine", engine]


def tiny_model(top: Path, users: int, values: str = "bf16") -> Served:
    """Train a tiny Llama and ``users`` adapters for a few steps, into ``top``; takes seconds."""
    run, rows = top / "run", top / "rows.jsonl"
    settings = {
        "output_dir": str(run),
        "deepspeed_config": "",
        "train.num_steps": 4,
        "data.max_length": 16,
        "model.path": str(ROOT / "tests/data/tiny-llama"),
        **{f"data.{split}": str(ROWS) for split in ("train", "validation", "test")},
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    verb("train", str(RUN_FILE), "--quiet", *words)
    served = Served(top / "tiny", top / "users", top / "template.jinja")
    verb("export", str(run), "--format", "bitmask", "--values", values, "--out", str(served.model), "--quiet")
    lines = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[: 4 * users]]
    named = [json.dumps(line | {"who": f"user {i % users:02}"}) + "\n" for i, line in enumerate(lines)]
    rows.write_text("".join(named), encoding="utf-8")
    words = ["users", "train", str(run), "--store", str(served.store), "--by", "who", "--data", str(rows), "--quiet"]
    verb(*words, "--form", "beside", "--epochs", "4", "--learning-rate", "0.05")
    served.template.write_text(TEMPLATE, encoding="utf-8")
    return served


def answers(served: Served) -> Answers:
    """Return what transformers' ``generate`` writes for each prompt separately, greedily."""
    import torch

    from pst_ds.hf.model_folder import open_model_folder

    folder = open_model_folder(served.model)
    model: Any = folder.load()
    tokenizer: Any = folder.tokenizer()
    tokenizer.chat_template = served.template.read_text(encoding="utf-8")
    found: Answers = {}
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            written = model.generate(**ids, do_sample=False, max_new_tokens=MOST_TOKENS)
        new = written[0, ids["input_ids"].shape[1] :]
        found[None, prompt, None] = tokenizer.decode(new, skip_special_tokens=True)
    return found
