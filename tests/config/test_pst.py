"""What a PSTConfig takes for names: PEFT's lists, sets and bare names, which all end as tuples."""

from __future__ import annotations

import json

import pytest
from torch import nn

from pst_ds.checkpoint.adapter import load_pretrained, save_pretrained
from pst_ds.config.pst import Override, PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("target_modules", {"v", "q"}, ("q", "v")),
        ("target_modules", ["v", "q"], ("v", "q")),
        ("target_modules", "v", "v"),  # an expression, as in PEFT
        ("exclude_modules", frozenset({"v", "q"}), ("q", "v")),
        ("exclude_modules", "self_attn.out_proj", ("self_attn.out_proj",)),
        ("exclude_modules", r".*\.v", r".*\.v"),
        ("exclude_modules", "", ""),
        ("modules_to_save", "classifier", ("classifier",)),
        ("modules_to_save", ["a", "b"], ("a", "b")),
        ("modules_to_save", [], ()),
        ("modules_to_save", None, None),
        ("fused_modules", "qkv", ("qkv",)),
        ("update_embeddings", {"words"}, ("words",)),
        ("overrides", [Override(modules=["q"], pattern="row")], (Override(modules=("q",), pattern="row"),)),
    ],
)
def test_names_end_as_tuples(name, given, kept):
    config = PSTConfig(**{name: given})
    assert getattr(config, name) == kept
    assert config == PSTConfig(**{name: kept})


@pytest.mark.parametrize("name", ["modules_to_save", "fused_modules", "update_embeddings"])
def test_an_expression_is_no_name(name):
    with pytest.raises(ValueError, match=rf"{name} = '\.\*head' must be a list of strings"):
        PSTConfig(**{name: ".*head"})


def _model():
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({n: nn.Linear(6, 6) for n in "qkv"})]),
                          "head": nn.Linear(6, 2)})  # fmt: skip


def test_sets_and_bare_names_inject_and_are_saved(tmp_path):
    model = inject_pst(_model(), PSTConfig(target_modules={"v", "q"}, modules_to_save="head"))
    assert list(pst_layers(model)) == ["layers.0.q", "layers.0.v"]
    assert model["head"].weight.requires_grad
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "pst_config.json").read_text())["pst_config"]["target_modules"] == ["q", "v"]
    assert load_pretrained(_model(), tmp_path).pst_config == model.pst_config
    assert "layers.0.v" not in pst_layers(inject_pst(_model(), PSTConfig(exclude_modules="v", modules_to_save=())))
