"""Find the 32-bit products in a compiled kernel from which addresses are computed."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from triton._C.libtriton import ir, nvidia

PRODUCTS = ("arith.muli", "arith.shli")
# What is read from memory, and what decides between two values, is not part of an offset.
_DATA = ("tt.load", "tt.atomic_rmw", "tt.atomic_cas", "arith.cmpi", "arith.cmpf")
_CONSTANTS = ("arith.constant", "tt.make_range")
_PLACE = re.compile(r'"([^"]+\.py)":(\d+):(\d+)')


def products_in_offsets(intermediate: str, folder: Path) -> set[str]:
    """Return the 32-bit products and shifts that feed an offset of ``tt.addptr``, as their source code reads.

    ``intermediate``: a kernel in Triton's intermediate representation. Products of constants do not count.
    """
    path = folder / "kernel.ttir"
    path.write_text(intermediate)
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    module = ir.parse_mlir_module(str(path), context)
    graph = _Graph(module)
    return {_source_of(str(place)) for place in graph.products()}


class _Graph:
    """Which values of a module each value is computed from."""

    def __init__(self, module: Any):
        self._sources = defaultdict[int, set[int]](set)
        self._products: dict[int, Any] = {}
        """Places in the source of 32-bit products, by their value."""
        self._known: dict[int, bool] = {}
        """Whether a value is a constant."""
        self._offsets: set[int] = set()
        # the operations of each block, and the blocks of each region; the bindings only go upwards
        self._operations = defaultdict[int, list[Any]](list)
        self._blocks = defaultdict[int, list[Any]](list)
        operations: list[Any] = []
        module.walk(operations.append)
        for operation in operations:
            block = operation.get_block()
            if block is None:
                continue
            if block.id() not in self._operations:
                self._blocks[block.get_parent().id()].append(block)
            self._operations[block.id()].append(operation)
        for operation in operations:
            self._add(operation)

    def products(self) -> Iterator[Any]:
        """Yield the places of the products that offsets are computed from."""
        seen: set[int] = set()
        waiting = list(self._offsets)
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            waiting += self._sources[value]
            if value in self._products and not self._is_constant(value):
                yield self._products[value]

    def _is_constant(self, value: int) -> bool:
        """Return whether a value is computed from constants and ranges only."""
        if value not in self._known:
            self._known[value] = False  # what a loop carries is computed from itself
            sources = self._sources[value]
            self._known[value] = bool(sources) and all(map(self._is_constant, sources))
        return self._known[value]

    def _add(self, operation: Any) -> None:
        name = operation.get_name()
        operands = [operation.get_operand(i).id() for i in range(operation.get_num_operands())]
        results = [operation.get_result(i) for i in range(operation.get_num_results())]
        if name == "tt.addptr":
            self._offsets.add(operands[1])
        if name == "scf.for":
            # bounds and step; then what the loop carries, which its block has after the counter
            self._link_loop(operation, results, operands[:3], operands[3:])
        elif name == "scf.while":
            self._link_while(operation, results, operands)
        elif name == "scf.if":
            for region in range(operation.get_num_regions()):
                self._link(results, self._last(operation, region))
        elif name in _CONSTANTS:
            self._known.update((result.id(), True) for result in results)
        elif name not in _DATA:
            if name == "arith.select":
                operands = operands[1:]
            for result in results:
                self._sources[result.id()].update(operands)
                if name in PRODUCTS and "i32" in str(result.get_type()):
                    self._products[result.id()] = result.get_loc()

    def _link(self, values: list[Any], sources: list[int]) -> None:
        for value, source in zip(values, sources, strict=False):
            self._sources[value.id()].add(source)

    def _link_loop(self, operation: Any, results: list[Any], bounds: list[int], initial: list[int]) -> None:
        counter, *carried = self._arguments(operation, 0)
        self._sources[counter.id()].update(bounds)
        for values in (carried, results):
            self._link(values, initial)
            self._link(values, self._last(operation, 0))

    def _link_while(self, operation: Any, results: list[Any], initial: list[int]) -> None:
        before = self._arguments(operation, 0)
        self._link(before, initial)
        self._link(before, self._last(operation, 1))
        # the first operand of scf.condition is the condition
        passed = self._last(operation, 0)[1:]
        self._link(self._arguments(operation, 1), passed)
        self._link(results, passed)

    def _arguments(self, operation: Any, region: int) -> list[Any]:
        block = self._block(operation, region)
        return [block.get_argument(i) for i in range(block.get_num_arguments())]

    def _last(self, operation: Any, region: int) -> list[int]:
        """Return the operands of the last operation of a region: what it yields."""
        block = self._block(operation, region)
        if block is None:
            return []
        last = self._operations[block.id()][-1]
        return [last.get_operand(i).id() for i in range(last.get_num_operands())]

    def _block(self, operation: Any, region: int) -> Any:
        blocks = self._blocks[operation.get_region(region).id()]
        return blocks[0] if blocks else None


def _source_of(place: str) -> str:
    """Return the product at ``place``, where Triton notes the right operand; innermost calls come first."""
    found = _PLACE.search(place)
    assert found is not None, place
    path, line, column = found.groups()
    return _products_of(path)[int(line), int(column)]


@cache
def _products_of(path: str) -> dict[tuple[int, int], str]:
    """Return the source of the products in a file by line and column of their right operands."""
    found: dict[tuple[int, int], str] = {}
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.LShift):
            found[node.right.lineno, node.right.col_offset] = ast.unparse(node)
    return found


def kernels_of(modules: list[Any]) -> dict[str, Any]:
    """Return the jitted functions of ``modules`` that no other jitted function calls, by name."""
    jitted: dict[str, Any] = {}
    called: set[str] = set()
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(getattr(value, "fn", None), Callable) and value.fn.__module__ == module.__name__:
                jitted[name] = value
    for name, function in jitted.items():
        called |= set(re.findall(r"(\w+)\(", function.src)) - {name}
    return {name: function for name, function in jitted.items() if name not in called}
