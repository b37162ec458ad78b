"""Changes to other packages' code: each checks that its target exists, and they are all listed here."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from pst_ds.third_party import (
    PatchHolder,
    ThirdPartyError,
    appended,
    patched,
    patched_entry,
    require,
    supported,
    while_computing,
)
from tests.pairs import every_pair

PACKAGE = Path(__file__).resolve().parents[1] / "pst_ds"
USES = {
    ("hf/trainer_callback.py", "DEFAULT_CALLBACKS"),
    ("hf/config.py", "merge_quantization_configs"),
    ("nn/inject.py", "activation_relu_or_gelu"),
    ("nn/inject.py", "use_nested_tensor"),
    ("nn/sharded_weights.py", "_load_state_dict_into_zero3_model"),
    ("nn/sharded_weights.py", "load_state_dict"),
    ("parallel/engine.py", "save_checkpoint"),
    ("parallel/engine.py", "allreduce_gradients"),
    ("parallel/engine.py", "fetch_sub_module"),
    ("parallel/engine.py", "param_coordinator"),
    ("parallel/engine.py", "parameter_offload"),
    ("parallel/sequence.py", "attention"),  # by its name in transformers' registry
    ("parallel/traffic.py", "name"),  # of each collective of a process group
    ("parallel/sharding/zero3.py", "__init__"),
    ("parallel/sharding/zero3.py", "_ZERO_PARAM_INTRA_PARALLEL_GROUP"),
    ("parallel/sharding/zero3.py", "_convert_to_deepspeed_param"),
    ("parallel/sharding/zero3.py", "_partition_param_sec"),
    ("parallel/sharding/zero3.py", "_post_init_method"),
    ("planning/activations.py", "scaled_dot_product_attention"),
    ("train/sequences.py", "implementation"),  # of attention and of masks, by its name in transformers' registries
}
"""(file, changed or required attribute) of every use of pst_ds.third_party."""


def test_a_patch_inside_a_context_is_undone():
    module = ModuleType("transformers.x")
    module.read = lambda: 1
    before = module.read
    with patched(module, "read", lambda read: lambda: read() + 1):
        assert module.read() == 2
    assert module.read is before


def test_a_patch_of_an_object_leaves_the_attribute_to_its_class_again():
    module = nn.Linear(1, 1)
    with patched(module, "forward", lambda forward: lambda x: forward(x) + 1):
        assert "forward" in vars(module)
    assert "forward" not in vars(module)
    before = vars(nn.Linear)["forward"]
    with patched(nn.Linear, "extra_repr", lambda _: lambda self: "patched"):
        assert repr(module) == "Linear(patched)"
    assert vars(nn.Linear)["forward"] is before
    assert repr(module) == "Linear(in_features=1, out_features=1, bias=True)"


class _AppendsOne(PatchHolder):
    items: ClassVar[list[int]] = []

    @classmethod
    def change(cls):
        return appended(cls.items, 1)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda holder: pickle.loads(pickle.dumps(holder))])
def test_a_patch_lasts_until_the_last_of_its_holders_ends(copied):
    holder = _AppendsOne()
    other = copied(holder)
    holder.close()
    holder.close()  # once is enough
    assert _AppendsOne.items == [1]
    del other
    assert _AppendsOne.items == []
    third = _AppendsOne()
    assert _AppendsOne.items == [1]
    del third
    assert _AppendsOne.items == []


@pytest.mark.parametrize("make_registry", [dict, AttentionInterface])
def test_a_patched_entry_of_a_registry_is_undone_layer_by_layer(make_registry):
    registry = make_registry()
    registry["ours"] = before = object()
    for key in [key for key in ("sdpa", "ours") if key in registry]:
        original = registry[key]
        with patched_entry(registry, key, lambda entry: (entry,)):
            with pytest.raises(ValueError), patched_entry(registry, key, lambda entry: (entry,)):  # noqa: PT011, PT012
                assert registry[key] == ((original,),)
                raise ValueError
            assert registry[key] == (original,)
        assert registry[key] is original
    assert getattr(registry, "_local_mapping", registry) == {"ours": before}
    with pytest.raises(ThirdPartyError, match="'gone'"), patched_entry(registry, "gone", lambda entry: entry):
        pass


def test_a_scope_is_entered_once_for_a_model_and_for_a_part_by_itself():
    events = []

    @contextmanager
    def scope(name, module):
        events.append((name, "enter", type(module).__name__))
        yield
        events.append((name, "leave"))

    block = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleList([block])
    model.forward = lambda x: block(x)
    while_computing(model, partial(scope, "outer"))
    while_computing(model, partial(scope, "inner"))
    for module in (model, block):
        for x in (torch.zeros(1, 2), torch.zeros(1, 3)):  # the second raises
            with suppress(RuntimeError):
                module(x)
            name = type(module).__name__
            assert events == [
                ("outer", "enter", name),
                ("inner", "enter", name),
                ("inner", "leave"),
                ("outer", "leave"),
            ]
            events.clear()


@every_pair
@pytest.mark.parametrize("owner", [nn.Linear, nn.Linear(1, 1)], ids=["class", "object"])
@pytest.mark.parametrize("change", [require, lambda *target: patched(*target, lambda code: code).__enter__()])
def test_a_missing_target_is_an_error_that_names_the_versions(owner, change):
    found = rf"torch\.nn\.modules\.linear\.Linear\.gone: torch [\d.]+\S* does not have it.*'torch{re.escape('<3,>=2')}"
    with pytest.raises(ThirdPartyError, match=found):
        change(owner, "gone")


def test_the_versions_of_a_package_that_is_not_installed_are_unknown():
    with pytest.raises(ThirdPartyError, match=r"nowhere\.gone: nowhere of an unknown version does not have it"):
        require(ModuleType("nowhere"), "gone")
    assert supported("nowhere") == ""
    assert set(supported("deepspeed").split(",")) == {">=0.19.8", "<0.20"}
    assert require(SimpleNamespace(there=1), "there") == 1


def _trees():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_every_use_is_listed():
    found = set()
    for name, tree in _trees():
        helpers = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "pst_ds.third_party"
            for alias in node.names
        }
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id in helpers & {"patched", "patched_entry", "require"}:
                attribute = call.args[1]
                found |= {(name, text) for text in _names(tree, attribute)}
    assert found == USES


def _names(tree, attribute):
    """The literal ``attribute``, the names in the table ``_OFF`` that a loop goes through, or the variable's name."""
    if isinstance(attribute, ast.Constant):
        return [attribute.value]
    assigned = (node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign))
    tables = [node.value for node in assigned if getattr(node.target, "id", "") == "_OFF"]
    return [row.elts[1].value for row in tables[0].elts] if tables else [ast.unparse(attribute)]


def test_nothing_else_assigns_to_what_other_packages_define():
    """None of ``module.name = ...``, ``setattr(module, ...)`` and ``REGISTRY[key] = ...``, for imported names."""
    found = []
    for name, tree in _trees():
        foreign = {
            (alias.asname or alias.name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            and not (getattr(node, "module", "") or "").startswith("pst_ds")
            for alias in node.names
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
                targets = [ast.Attribute(node.args[0], "")]
            for target in targets:
                root = target.value if isinstance(target, ast.Attribute | ast.Subscript) else None
                is_environment = ast.unparse(root) == "os.environ" if root else False
                while isinstance(root, ast.Attribute):
                    root = root.value
                if getattr(root, "id", "") in foreign and not is_environment:
                    found.append(f"{name}, line {node.lineno}")
    assert found == []
