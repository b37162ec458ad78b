"""Blocks of code in the documents: run files load, Python compiles and calls what there is."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pst_ds.config.toml import run_from_table
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.optimizer import pst_optimizer
from pst_ds.planning.machines import Machine, read_machine

from .pages import PAGES, ROOT, Block, all_blocks, blocks

EXTRAS = ("trl", "openai")
"""Modules of extras that tests do without."""
FOR_THE_REST = {"output_dir": "runs/x", "model": {"path": "model"}, "data": {"train": "a.jsonl"}, "train": {}}


def _is_machine(block):
    return "memory_bytes" in tomllib.loads(block.text)


@pytest.mark.parametrize("block", [b for b in all_blocks("toml") if _is_machine(b)], ids=str)
def test_a_machine_loads_and_has_every_field(block, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(block.text)
    assert read_machine(path).overlaps
    assert tomllib.loads(block.text).keys() == {field.name for field in dataclasses.fields(Machine)}


@pytest.mark.parametrize("block", [b for b in all_blocks("toml") if not _is_machine(b)], ids=str)
def test_a_run_file_loads(block):
    """With the least that a run needs where the block is a part of one."""
    table = {**FOR_THE_REST, **tomllib.loads(block.text)}
    table["model"] = {**FOR_THE_REST["model"], **table["model"]}
    if not table["train"].keys() & {"num_steps", "num_epochs"}:
        table["train"] = {**table["train"], "num_steps": 10}
    run_from_table(table)


@pytest.mark.parametrize("block", all_blocks("python"), ids=str)
def test_imports_resolve_and_calls_fit(block):
    """Names that are imported exist; functions of ours have the arguments that they are called with."""
    ours = {}
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and find_spec(node.module.partition(".")[0]) is None:
            assert node.module in EXTRAS, node.module
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                value = getattr(module, alias.name)
                if node.module.startswith("pst_ds"):
                    ours[alias.name] = value
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ours:
            _require_fit(ours[node.func.id], node)


def _require_fit(function: Any, call: ast.Call) -> None:
    if any(isinstance(value, ast.Constant) and value.value is ... for value in call.args):
        return  # f(...): the arguments are left out
    if isinstance(function, type) and issubclass(function, Exception):
        return  # a builtin base class has no signature
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    inspect.signature(function).bind(*([None] * len(call.args)), **named)


def test_a_script_trains_under_the_zeros_of_a_pruned_model(tmp_path, monkeypatch):
    code = next(block for block in blocks("docs/how-to/your-script.md") if "initial_mask=" in block.text)
    monkeypatch.chdir(tmp_path)
    Path("path/to").mkdir(parents=True)
    Path("path/to/llama").symlink_to(ROOT / "tests/data/tiny-llama")
    rows = torch.arange(96).view(4, 3, 8) % 30 + 3
    names: dict[str, Any] = {"loader": [{"input_ids": ids, "labels": ids} for ids in rows]}
    exec(compile(code.text, str(code), "exec"), names)
    model, masks = names["model"], names["masks"]
    optimizer = pst_optimizer(model)
    kept = [layer.weight != 0 for layer in pst_layers(model).values()]
    model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    optimizer.step()
    masks.after_step(optimizer)
    assert masks.masks.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(not layer.masked_weight()[~of].any() for layer, of in zip(pst_layers(model).values(), kept, strict=True))
    assert any((layer.masked_weight() != layer.weight).any() for layer in pst_layers(model).values())


def test_every_block_says_its_language():
    known = {"bash", "toml", "python", "text"}
    unknown = [
        f"{block}: {block.language!r}" for page in PAGES for block in blocks(page) if block.language not in known
    ]
    assert not unknown


def test_the_checks_find_what_is_wrong():
    wrong = Block("a", 1, "python", "from pst_ds import PSTConfig\nPSTConfig(rank=1)\n")
    with pytest.raises(TypeError, match="rank"):
        test_imports_resolve_and_calls_fit(wrong)
    with pytest.raises(Exception, match="final_sparsty"):
        test_a_run_file_loads(Block("a", 1, "toml", "[schedule]\nfinal_sparsty = 0.5\n"))
