"""Layers of the package: imports run downward only, ZeRO-3 is known in one place, and tests are where their module is.

Packages in one layer do not import each other, and modules form no cycle. Every import counts, wherever it stands: in
a function, under TYPE_CHECKING, or by ``importlib.import_module``.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pst_ds"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [
    {
        "core",
        "atomic_files",
        "errors",
        "file_names",
        "json_text",
        "plugins",
        "progress",
        "remote_folder",
        "text_table",
        "third_party",
    },
    {"config", "formats", "parallel"},
    {"data", "nn", "storage_format"},
    {"additions", "checkpoint", "masks", "prune"},
    {"runtime", "writing"},
    {"hf"},
    {"inference", "train"},
    {"export", "planning"},
    {"cli", "__init__", "storage_formats"},
]
"""Packages and single files below pst_ds, lowest layer first. Core may import nothing else, not even single files."""
LAYER_OF = {unit: number for number, units in enumerate(LAYERS) for unit in units}
SINGLE_FILES = {path.stem for path in PACKAGE.glob("*.py")} - {"__main__"}
CORE_MAY_IMPORT = {"torch", "numpy", "triton", *sys.stdlib_module_names}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "misc"}
ATTRIBUTE_FUNCTIONS = {"getattr", "hasattr", "setattr", "delattr"}


def unit_of(path: Path) -> str:
    """The package or file right below pst_ds that ``path`` (relative to pst_ds) belongs to."""
    name = path.parts[0].removesuffix(".py")
    return "cli" if name == "__main__" else name


def imports_of(tree: ast.AST, path: Path) -> Iterator[tuple[str, ast.AST]]:
    """(absolute dotted name, node) of every import; ``from a import b`` gives "a.b"."""
    package = ["pst_ds", *path.parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            lead = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*lead, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value), node


def nodes_not_run_at_import(tree: ast.AST) -> set[int]:
    """Everything inside functions and under ``if TYPE_CHECKING``."""
    later: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            later.append(node)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            later += node.body
    return {id(inner) for node in later for inner in ast.walk(node)}


def layer_problems(tree: ast.AST, path: Path) -> Iterator[str]:
    """Upward imports, imports between packages of one layer, and anything foreign in core."""
    unit = unit_of(path)
    if unit not in LAYER_OF:
        yield f"pst_ds.{unit} has no layer: give it one in LAYERS"
        return
    lazy = nodes_not_run_at_import(tree)
    for name, node in imports_of(tree, path):
        first, _, rest = name.partition(".")
        if first != "pst_ds":
            if unit == "core" and first not in CORE_MAY_IMPORT:
                yield f"line {node.lineno}: core imports {name}; it may import torch, numpy and triton only"
            continue
        other = rest.partition(".")[0]
        if _is_attribute_of_package(other):
            other = "__init__"
        if unit == "__init__" and id(node) not in lazy:
            yield f"line {node.lineno}: pst_ds imports {name} at once, and every import of core with it; do it lazily"
        if other == unit or (rest == "__version__" and unit != "core"):
            continue
        if other not in LAYER_OF:
            yield f"line {node.lineno}: {name} has no layer: give it one in LAYERS"
        elif unit == "core":
            yield f"line {node.lineno}: core imports {name}; within pst_ds it may import core only"
        elif LAYER_OF[other] > LAYER_OF[unit]:
            yield f"line {node.lineno}: {unit} (layer {LAYER_OF[unit]}) imports {name} (layer {LAYER_OF[other]})"
        elif LAYER_OF[other] == LAYER_OF[unit] and not {unit, other} <= SINGLE_FILES:
            yield f"line {node.lineno}: {unit} imports {name} of the same layer; move what both need to a lower layer"


def _is_attribute_of_package(name: str) -> bool:
    """``from pst_ds import inject_pst``: a name in pst_ds/__init__.py, no module."""
    is_module = name in LAYER_OF or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
    return not name or not is_module


def deepspeed_problems(tree: ast.AST, path: Path) -> Iterator[str]:
    lazy = nodes_not_run_at_import(tree)
    for name, node in imports_of(tree, path):
        if name.partition(".")[0] != "deepspeed":
            continue
        if unit_of(path) != "parallel":
            yield f"line {node.lineno}: imports {name}; only pst_ds/parallel may"
        elif id(node) not in lazy:
            yield f"line {node.lineno}: imports {name} at module level; do it inside the function that needs it"


def zero3_attribute_problems(tree: ast.AST, path: Path) -> Iterator[str]:
    """``param.ds_shape`` and ``getattr(param, "ds_shape")``; ds_config is a name of ours."""
    if unit_of(path) == "parallel":
        return
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ATTRIBUTE_FUNCTIONS and len(node.args) > 1:
            name = str(getattr(node.args[1], "value", ""))
        if name.startswith("ds_") and not name.startswith("ds_config"):
            yield f"line {node.lineno}: reads {name}; pst_ds/parallel/sharding/zero3.py owns every ds_* attribute"


def name_problems(tree: ast.AST, path: Path) -> Iterator[str]:
    if VAGUE_NAMES & {part.removesuffix(".py") for part in path.parts}:
        yield f"{path}: name the module for what it does, or put the helper beside its only user"


CHECKS = [layer_problems, deepspeed_problems, zero3_attribute_problems, name_problems]


def problems(source: str, path: Path) -> list[str]:
    tree = ast.parse(source)
    return [problem for check in CHECKS for problem in check(tree, path)]


def test_the_layers_hold():
    paths = {str(path.relative_to(PACKAGE)): path for path in SOURCES}
    found = {name: problems(path.read_text(encoding="utf-8"), Path(name)) for name, path in paths.items()}
    assert {name: listed for name, listed in found.items() if listed} == {}


def test_every_package_has_a_layer():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert packages | SINGLE_FILES == set(LAYER_OF)


def imported_files(path: Path) -> set[Path]:
    """Files of the package that ``path`` imports anywhere, other than pst_ds/__init__.py."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for name, _ in imports_of(tree, path.relative_to(PACKAGE)):
        stem = PACKAGE.parent.joinpath(*name.split("."))
        modules = (stem, stem.parent)
        candidates = [file for module in modules for file in (module.with_suffix(".py"), module / "__init__.py")]
        if name.startswith("pst_ds."):
            found |= {next((c for c in candidates if c.exists()), path)}
    return found - {path, PACKAGE / "__init__.py"}


def test_no_imports_form_a_cycle():
    graph = {path: imported_files(path) for path in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("core/x.py", "from pst_ds.nn.linear import PSTLinear", "core imports pst_ds.nn.linear.PSTLinear"),
        ("core/x.py", "from pst_ds.errors import InputError", "within pst_ds it may import core only"),
        ("core/x.py", "import transformers", "core imports transformers"),
        ("core/x.py", "from ..parallel import zero3", "core imports pst_ds.parallel.zero3"),
        ("core/x.py", "from pst_ds import __version__", "within pst_ds it may import core only"),
        ("parallel/x.py", "import pst_ds.nn.linear as c", "parallel (layer 1) imports pst_ds.nn.linear (layer 2)"),
        ("nn/x.py", "def f():\n    from pst_ds.train import loop", "line 2: nn (layer 2) imports pst_ds.train.loop"),
        ("nn/x.py", "from pst_ds import cli", "nn (layer 2) imports pst_ds.cli (layer 8)"),
        ("nn/x.py", "import importlib\nimportlib.import_module('pst_ds.train')", "nn (layer 2) imports pst_ds.train"),
        ("masks/x.py", "from pst_ds.checkpoint import format", "masks imports pst_ds.checkpoint.format of"),
        ("export/x.py", "from ..cli import main", "export (layer 7) imports pst_ds.cli.main (layer 8)"),
        ("errors.py", "from pst_ds.cli import main", "errors (layer 0) imports pst_ds.cli.main (layer 8)"),
        ("nn/x.py", "from pst_ds import inject_pst", "nn (layer 2) imports pst_ds.inject_pst (layer 8)"),
        ("nn/x.py", "import pst_ds", "nn (layer 2) imports pst_ds (layer 8)"),
        ("__init__.py", "from pst_ds.nn.inject import inject_pst", "at once, and every import of core with it"),
        ("novel/x.py", "", "pst_ds.novel has no layer"),
        ("train/x.py", "import deepspeed", "only pst_ds/parallel may"),
        ("train/x.py", "def f():\n    from deepspeed.utils import logger", "only pst_ds/parallel may"),
        ("parallel/x.py", "import deepspeed", "at module level"),
        ("parallel/x.py", "class A:\n    from deepspeed import zero", "at module level"),
        ("nn/x.py", "shape = weight.ds_shape", "reads ds_shape"),
        ("train/x.py", "getattr(weight, 'ds_id', None)", "reads ds_id"),
        ("train/x.py", "hasattr(weight, 'ds_tensor')", "reads ds_tensor"),
        ("train/utils.py", "", "name the module for what it does"),
        ("core/common.py", "", "name the module for what it does"),
        ("nn/utils/x.py", "", "name the module for what it does"),
    ],
)
def test_the_checks_can_fail(path, source, problem):
    (found,) = problems(source, Path(path))
    assert problem in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/x.py", "import math\nimport numpy as np\nimport torch.nn.functional as F\nfrom pst_ds.core import bits"),
        ("core/x.py", "from . import bits\nfrom .layout import Rect"),
        ("parallel/x.py", "from pst_ds.core.select import RankSums\nfrom pst_ds.errors import InputError"),
        ("parallel/x.py", "def f(p):\n    import deepspeed\n    return p.ds_shape"),
        ("nn/x.py", "import transformers\nfrom pst_ds.parallel import sharding\nfrom pst_ds.nn import config"),
        ("train/x.py", "from pst_ds import __version__\nfrom pst_ds.nn.linear import PSTLinear"),
        ("train/x.py", "path = 'ds_configs/zero3.json'\nds_config = run.ds_config\nload(path, 'ds_id')"),
        ("train/x.py", "from transformers.integrations.deepspeed import HfDeepSpeedConfig"),
        ("cli/x.py", "from pst_ds.train import loop\nfrom pst_ds.writing import merge\nfrom pst_ds.cli import main"),
        ("__init__.py", "def __getattr__(name):\n    from pst_ds.nn.inject import inject_pst"),
        ("__main__.py", "from pst_ds.cli.main import main"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert problems(source, Path(path)) == []


TESTS = PACKAGE.parent / "tests"
ROOMS_WITHOUT_MODULES = {
    "cluster": "a real Slurm and hosts in network namespaces",
    "device": "an emulated accelerator, in a process with nothing else",
    "docs": "the pages of docs/, and what they show",
    "errors": "wrong input of every kind, for every verb",
    "golden": "numbers of whole runs, which stay",
    "kernels": "compiled and interpreted kernels, in a process with nothing else",
    "launch": "the scripts of launch/",
    "tools": "the programs of tools/",
}
"""Folders of tests that mirror no package, with what they test."""
JOURNEYS = {
    "parallel/test_fsdp2.py": "scripts that train under FSDP2",
    "parallel/test_fsdp2_families.py": "scripts that train under FSDP2, by family",
    "train/test_criteria.py": "runs whose criterion another package adds",
    "train/test_update_forms.py": "runs whose update form another package adds",
    "cli/test_hub.py": "every verb that names a model of the hub",
    "hf/test_start.py": "prune_pretrained in a script, followed by a Trainer",
    "hf/test_unpatched.py": "what every class of hf changes in transformers",
    "test_docs.py": "generated pages and tracked paths",
    "test_gates.py": "the Makefile, CI and the release",
    "test_layers.py": "imports of the whole package, and where its tests are",
    "test_pairs.py": "a helper of the tests",
    "test_public_names.py": "names of pst_ds/__init__.py",
    "test_public_settings.py": "every public class of settings",
    "test_types.py": "types that the package ships",
}
"""Test files that are not of one module, with what they follow."""


def names_that_tests_may_have(room: Path) -> set[str]:
    """Return the names of modules and packages right below ``room``; a room that is itself a module has any."""
    return {path.stem for path in room.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_tests_are_where_their_module_is(path):
    """pst_ds/a/b.py is tested in tests/a/test_b.py, tests/a/test_b_SUBJECT.py or files of any name in tests/a/b."""
    relative = path.relative_to(TESTS)
    if relative.parts[0] in ROOMS_WITHOUT_MODULES or relative.as_posix() in JOURNEYS:
        return
    room = PACKAGE / relative.parent
    if room.with_suffix(".py").exists():
        return
    assert room.is_dir(), f"{relative}: pst_ds has no {relative.parent}. Move it to the room of its module."
    tested = path.stem.removeprefix("test_")
    assert any(tested == name or tested.startswith(f"{name}_") for name in names_that_tests_may_have(room)), (
        f"{relative}: pst_ds/{relative.parent} has no module of that name. "
        f"Call it test_MODULE.py or test_MODULE_SUBJECT.py, or list it in JOURNEYS."
    )


def test_every_journey_is_there():
    assert [name for name in JOURNEYS if not (TESTS / name).exists()] == []
