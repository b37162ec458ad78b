"""The floors of the package: imports run downward only, and ZeRO-3 and DeepSpeed are known in one place.

Packages on one floor do not import each other. Every import counts, wherever it stands: inside a function, under
TYPE_CHECKING, or by ``importlib.import_module``.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pst_ds"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "backward_pass": 0,
    "errors": 0,
    "json_text": 0,
    "progress": 0,
    "tensor_layout": 0,
    "text_table": 0,
    "core": 0,
    "atomic_files": 1,
    "config": 1,
    "parallel": 1,
    "data": 2,
    "nn": 2,
    "supervise": 2,
    "checkpoint": 3,
    "masks": 3,
    "planning": 3,
    "prune": 3,
    "runtime": 3,
    "export": 4,
    "monitor": 4,
    "hf": 5,
    "onnx": 6,
    "train": 5,
    "decoder": 6,
    "tune": 6,
    "users": 6,
    "bench": 7,
    "serve": 7,
    "report": 8,
    "cli": 9,
    "__init__": 9,
    "__main__": 10,
}
MODULES_IN_A_FOLDER = 20
"""Floor of every package and single file right below pst_ds."""
CORE_MAY_IMPORT = {"torch", "numpy", "triton", *sys.stdlib_module_names}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "misc"}
ATTRIBUTE_FUNCTIONS = {"getattr", "hasattr", "setattr", "delattr"}


def unit_of(path: Path) -> str:
    """The package or file right below pst_ds that ``path`` (relative to pst_ds) belongs to."""
    return path.parts[0].removesuffix(".py")


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


def floor_problems(tree: ast.AST, path: Path) -> Iterator[str]:
    """Upward imports, imports between siblings, and anything foreign in core."""
    unit = unit_of(path)
    if unit not in FLOORS:
        yield f"pst_ds.{unit} has no floor: give it one in FLOORS"
        return
    lazy = nodes_not_run_at_import(tree)
    for name, node in imports_of(tree, path):
        first, _, rest = name.partition(".")
        if first != "pst_ds":
            if unit == "core" and first not in CORE_MAY_IMPORT:
                yield f"line {node.lineno}: core imports {name}; it may import torch, numpy, triton and no other"
            continue
        other = rest.partition(".")[0]
        if _is_attribute_of_package(other):
            other = "__init__"
        if unit == "__init__" and id(node) not in lazy:
            yield f"line {node.lineno}: pst_ds imports {name} at once, and every import of core with it; do it lazily"
        if other == unit or (rest == "__version__" and unit != "core"):
            continue
        if other not in FLOORS:
            yield f"line {node.lineno}: {name} has no floor: give it one in FLOORS"
        elif unit == "core":
            yield f"line {node.lineno}: core imports {name}; of pst_ds it may import core alone"
        elif FLOORS[other] > FLOORS[unit]:
            yield f"line {node.lineno}: {unit} (floor {FLOORS[unit]}) imports {name} (floor {FLOORS[other]})"
        elif FLOORS[other] == FLOORS[unit]:
            yield f"line {node.lineno}: {unit} imports its sibling {name}; what both need lives lower"


def _is_attribute_of_package(name: str) -> bool:
    """``from pst_ds import inject_pst``: a name in pst_ds/__init__.py, no module."""
    is_module = name in FLOORS or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
    return not name or not is_module


def deepspeed_problems(tree: ast.AST, path: Path) -> Iterator[str]:
    lazy = nodes_not_run_at_import(tree)
    for name, node in imports_of(tree, path):
        if name.partition(".")[0] != "deepspeed":
            continue
        if unit_of(path) != "parallel":
            yield f"line {node.lineno}: imports {name}; pst_ds/parallel alone may"
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
            yield f"line {node.lineno}: reads {name}; pst_ds/parallel/zero3.py owns every ds_* attribute"


def name_problems(tree: ast.AST, path: Path) -> Iterator[str]:
    if VAGUE_NAMES & {part.removesuffix(".py") for part in path.parts}:
        yield f"{path}: name the module for what it does, or put the helper beside its only user"


CHECKS = [floor_problems, deepspeed_problems, zero3_attribute_problems, name_problems]


def problems(source: str, path: Path) -> list[str]:
    tree = ast.parse(source)
    return [problem for check in CHECKS for problem in check(tree, path)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_floors_hold(path):
    assert problems(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE)) == []


def test_there_are_sources_of_every_lower_floor():
    assert {"core", "parallel", "nn", "train"} <= {unit_of(path.relative_to(PACKAGE)) for path in SOURCES}


def imports_at_once(path: Path) -> set[Path]:
    """Files of the package that ``path`` imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = nodes_not_run_at_import(tree)
    found = set()
    for name, node in imports_of(tree, path.relative_to(PACKAGE)):
        parts = name.split(".")
        candidates = [PACKAGE.parent.joinpath(*parts[:n]).with_suffix(".py") for n in (len(parts), len(parts) - 1)]
        if id(node) not in lazy and parts[0] == "pst_ds":
            found |= {next((c for c in candidates if c.exists()), path)} - {path}
    return found


def test_no_module_waits_for_itself():
    graphlib.TopologicalSorter({path: imports_at_once(path) for path in SOURCES}).prepare()


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=lambda p: p.name)
def test_a_folder_can_be_taken_in_at_a_look(folder):
    assert len(list(folder.glob("*.py"))) <= MODULES_IN_A_FOLDER


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("core/x.py", "from pst_ds.nn.linear import PSTLinear", "core imports pst_ds.nn.linear.PSTLinear"),
        ("core/x.py", "from pst_ds.errors import InputError", "of pst_ds it may import core alone"),
        ("core/x.py", "import transformers", "core imports transformers"),
        ("core/x.py", "from ..parallel import zero3", "core imports pst_ds.parallel.zero3"),
        ("core/x.py", "from pst_ds import __version__", "of pst_ds it may import core alone"),
        ("parallel/x.py", "import pst_ds.nn.linear as c", "parallel (floor 1) imports pst_ds.nn.linear (floor 2)"),
        ("nn/x.py", "def f():\n    from pst_ds.train import loop", "line 2: nn (floor 2) imports pst_ds.train.loop"),
        ("nn/x.py", "from pst_ds import cli", "nn (floor 2) imports pst_ds.cli (floor 9)"),
        ("nn/x.py", "import importlib\nimportlib.import_module('pst_ds.train')", "nn (floor 2) imports pst_ds.train"),
        ("train/x.py", "from pst_ds.hf.callback import x", "train imports its sibling pst_ds.hf.callback"),
        ("runtime/x.py", "from ..prune import rules", "runtime imports its sibling pst_ds.prune.rules"),
        ("errors.py", "from pst_ds.cli import main", "errors (floor 0) imports pst_ds.cli.main (floor 9)"),
        ("nn/x.py", "from pst_ds import inject_pst", "nn (floor 2) imports pst_ds.inject_pst (floor 9)"),
        ("nn/x.py", "import pst_ds", "nn (floor 2) imports pst_ds (floor 9)"),
        ("__init__.py", "from pst_ds.nn.inject import inject_pst", "at once, and every import of core with it"),
        ("novel/x.py", "", "pst_ds.novel has no floor"),
        ("train/x.py", "import deepspeed", "pst_ds/parallel alone may"),
        ("train/x.py", "def f():\n    from deepspeed.utils import logger", "pst_ds/parallel alone may"),
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
        ("nn/x.py", "import transformers\nfrom pst_ds.parallel import zero3\nfrom pst_ds.nn import config"),
        ("train/x.py", "from pst_ds import __version__\nfrom pst_ds.nn.linear import PSTLinear"),
        ("train/x.py", "path = 'ds_configs/zero3.json'\nds_config = run.ds_config\nload(path, 'ds_id')"),
        ("train/x.py", "from transformers.integrations.deepspeed import HfDeepSpeedConfig"),
        ("cli/x.py", "from pst_ds.train import loop\nfrom pst_ds.export import merge\nfrom pst_ds.cli import main"),
        ("__init__.py", "def __getattr__(name):\n    from pst_ds.nn.inject import inject_pst"),
        ("__main__.py", "from pst_ds.cli.main import main"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert problems(source, Path(path)) == []
