"""Changes to other packages' code: each checks that its target exists, and they are all listed here."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from torch import nn

from pst_ds.third_party import ThirdPartyError, patch, patched, require, supported

PACKAGE = Path(__file__).resolve().parents[1] / "pst_ds"
USES = {
    ("inference/hf/quantizer.py", "merge_quantization_configs"),
    ("nn/inject.py", "activation_relu_or_gelu"),
    ("nn/inject.py", "use_nested_tensor"),
    ("nn/sharded_weights.py", "_load_state_dict_into_zero3_model"),
    ("nn/sharded_weights.py", "load_state_dict"),
    ("parallel/engine.py", "save_checkpoint"),
    ("parallel/engine.py", "allreduce_gradients"),
    ("parallel/engine.py", "fetch_sub_module"),
    ("parallel/engine.py", "param_coordinator"),
    ("parallel/engine.py", "parameter_offload"),
    ("parallel/traffic.py", "name"),  # of each collective of a process group
    ("parallel/zero3.py", "__init__"),
    ("parallel/zero3.py", "_ZERO_PARAM_INTRA_PARALLEL_GROUP"),
    ("parallel/zero3.py", "_convert_to_deepspeed_param"),
    ("parallel/zero3.py", "_partition_param_sec"),
    ("parallel/zero3.py", "_post_init_method"),
    ("planning/activations.py", "scaled_dot_product_attention"),
    ("train/trainer_callback.py", "DEFAULT_CALLBACKS"),
}
"""(file, changed or required attribute) of every use of pst_ds.third_party."""


def test_a_patch_inside_a_context_is_undone():
    module = ModuleType("transformers.x")
    module.read = lambda: 1
    before = module.read
    with patched(module, "read", lambda read: lambda: read() + 1):
        assert module.read() == 2
    assert module.read is before
    patch(module, "read", lambda read: lambda: read() + 2)
    assert module.read() == 3


@pytest.mark.parametrize("owner", [nn.Linear, nn.Linear(1, 1)], ids=["class", "object"])
@pytest.mark.parametrize("change", [require, lambda *target: patch(*target, lambda code: code)])
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
            if isinstance(call.func, ast.Name) and call.func.id in helpers & {"patch", "patched", "require"}:
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
    """Neither ``module.name = ...`` nor ``setattr(module, ...)`` on a name that was imported from elsewhere."""
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
                root = target.value if isinstance(target, ast.Attribute) else None
                while isinstance(root, ast.Attribute):
                    root = root.value
                if getattr(root, "id", "") in foreign:
                    found.append(f"{name}, line {node.lineno}")
    assert found == []
