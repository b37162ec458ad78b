"""Speed of products with packed weights compared with dense bf16, on this CPU.

Each variant has matrices of --input-bytes together (default: twice the last-level cache) and cycles through them, so
that weights come from memory; variants take turns too. Times are medians. ``dense`` is the fastest of F.linear, matmul
(x W' and W x') and prepacked oneDNN, all shown. ``speedup`` is dense / variant.

Roofline: ``bytes_per_weight`` is what a product must read of the weight, ``gb_per_second`` the resulting rate, and
``share_of_bandwidth`` its share of the bandwidth measured in the same run (torch.dot of a large fp32 vector with
itself, on the same number of threads).

    python -m tools.bench.runtime --json
    python -m tools.bench.runtime --batch 1 8 --sparsity 0.5 --levels avx2 avx512 amx --threads 1
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m tools.bench.runtime --levels avx512     # emulates a CPU without AMX
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pst_ds.formats import FORMATS
from pst_ds.runtime import SparseLinear, native, ops
from tools.bench.pack import default_input_bytes, shape_of
from tools.bench.timing import benchmark_parser, conditions, print_result, progress
from tools.packed_layers import packed_linear

DENSE = ("F.linear", "matmul", "matmul_weight_first", "prepacked")
Product = Callable[[Any, Tensor], Tensor]
Variant = tuple[Product, list[Any]]


def main() -> None:
    arguments = _parser().parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    bandwidth = {threads: memory_bandwidth(threads) for threads in arguments.threads}
    for shape in arguments.shapes:
        rows += measure_shape(shape, arguments, bandwidth)
    stated = conditions(
        dtype="bfloat16",
        input_bytes=arguments.input_bytes,
        best_level=native.LEVELS[native.best_level()],
        onednn_max_isa=os.environ.get("ONEDNN_MAX_CPU_ISA", "as found"),
        memory_gb_per_second=bandwidth,
        clock="wall, medians, variants in turn",
    )
    stated["threads_per_rank"] = arguments.threads
    report = {"benchmark": "runtime", "conditions": stated, "rows": rows}
    print_result(report, as_json=arguments.json)


def memory_bandwidth(threads: int) -> float:
    """Return the GB/s at which ``threads`` threads read memory."""
    torch.set_num_threads(threads)
    vector = torch.ones(1 << 28)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.dot(vector, vector)
        seconds.append(time.perf_counter() - start)
    return vector.nbytes / min(seconds) / 1e9


def measure_shape(shape: tuple[int, int], arguments: argparse.Namespace, bandwidth: dict[int, float]) -> list[Any]:
    """Return all rows of one shape. Dense matrices are made once, packed ones once per sparsity."""
    dense = copies(torch.randn(shape).mul_(0.02).bfloat16(), arguments.input_bytes)
    rows = []
    for sparsity in arguments.sparsity:
        layers = sparse_layers(dense[0], sparsity, arguments)
        for batch, threads in itertools.product(arguments.batch, arguments.threads):
            progress(f"{shape[0]}x{shape[1]}, {sparsity:.0%} sparsity, batch {batch}, {threads} threads")
            torch.set_num_threads(threads)
            x = torch.randn(batch, shape[1]).bfloat16()
            variants = dense_contestants(dense, batch) | sparse_contestants(layers, arguments.levels)
            seconds = take_turns(variants, x, arguments.seconds)
            for row in summary(seconds, layers, shape, batch, sparsity):
                rows.append({**row, "threads": threads, **_roofline(row, bandwidth[threads])})
    return rows


def copies(value: Any, total_bytes: int) -> list[Any]:
    """Return copies of a tensor or layer of ``total_bytes`` together, at least two."""
    size = value.nbytes if isinstance(value, Tensor) else resident_bytes(value)
    return [copy.deepcopy(value) for _ in range(max(2, -(-total_bytes // size)))]


def resident_bytes(layer: SparseLinear) -> int:
    return sum(t.nbytes for t in itertools.chain(layer.parameters(), layer.buffers()))


def sparse_layers(weight: Tensor, sparsity: float, arguments: argparse.Namespace) -> dict[str, list[SparseLinear]]:
    """Return copies of a randomly pruned layer in each format."""
    pruned = torch.where(torch.rand(weight.shape) < sparsity, 0.0, weight.float()).bfloat16()
    made = {name: packed_linear(pruned, format=name) for name in arguments.formats}
    if "2:4" in FORMATS and arguments.two_four and abs(sparsity - 0.5) < 1e-9:
        made["2:4"] = packed_linear(_two_of_four(weight), format="2:4")
    return {name: copies(layer, arguments.input_bytes) for name, layer in made.items()}


def _two_of_four(weight: Tensor) -> Tensor:
    groups = weight.float().abs().view(-1, 4)
    keep = torch.zeros_like(groups).scatter_(1, groups.topk(2, dim=1).indices, 1.0).view_as(weight)
    return (weight * keep.to(weight.dtype)).contiguous()


def dense_contestants(weights: list[Tensor], batch: int) -> dict[str, Variant]:
    found: dict[str, Variant] = {
        "F.linear": (lambda w, x: linear(x, w), weights),
        "matmul": (lambda w, x: torch.mm(x, w.t()), weights),
        "matmul_weight_first": (lambda w, x: torch.mv(w, x[0]) if len(x) == 1 else torch.mm(w, x.t()), weights),
    }
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, batch) for weight in weights]
        found["prepacked"] = (lambda w, x: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), packed)
    return found


def sparse_contestants(layers: dict[str, list[SparseLinear]], levels: list[str]) -> dict[str, Variant]:
    """Return the layers as users call them, and the kernels that they choose from."""
    found: dict[str, Variant] = {name: (lambda layer, x: layer(x), these) for name, these in layers.items()}
    bits = layers.get("bitmask", [])
    for level in levels if bits else []:
        found[f"bitmask/{level}"] = (_at_level(native.LEVELS.index(level)), bits)
    if bits and levels:
        found["bitmask/expand"] = (
            lambda layer, x: ops.bitmask_linear(x, layer.compressed, layer.bitmask, layer.row_offsets, None, "expand"),
            bits,
        )
    return found


def _at_level(level: int) -> Product:
    return lambda layer, x: native.bitmask_linear(x, layer.compressed, layer.bitmask, layer.row_offsets, None, level)


def take_turns(variants: dict[str, Variant], x: Tensor, seconds: float) -> dict[str, float]:
    """Return the median seconds of each variant. Variants with common matrices start at different ones, so that no
    variant finds a matrix in the cache."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    starts = {name: i / len(variants) for i, name in enumerate(variants)}
    with torch.inference_mode():
        for product, weights in variants.values():
            product(weights[-1], x)
        end = time.perf_counter() + seconds
        for turn in itertools.count():
            for name, (product, weights) in variants.items():
                weight = weights[(turn + int(starts[name] * len(weights))) % len(weights)]
                start = time.perf_counter()
                product(weight, x)
                times[name].append(time.perf_counter() - start)
            if turn >= 4 and time.perf_counter() > end:
                break
    return {name: statistics.median(values) for name, values in times.items()}


def summary(
    seconds: dict[str, float],
    layers: dict[str, list[SparseLinear]],
    shape: tuple[int, int],
    batch: int,
    sparsity: float,
) -> Iterator[dict[str, Any]]:
    """Yield a row per sparse variant."""
    dense = {name: seconds[name] for name in DENSE if name in seconds}
    best = min(dense.values())
    for name in seconds.keys() - dense.keys():
        layer = layers[name.partition("/")[0]][0]
        yield {
            "shape": f"{shape[0]}x{shape[1]}",
            "batch": batch,
            "sparsity": sparsity,
            "backend": name,
            "speedup": best / seconds[name],
            "speedup_over_f_linear": dense["F.linear"] / seconds[name],
            "milliseconds": seconds[name] * 1e3,
            "dense_milliseconds": {n: s * 1e3 for n, s in dense.items()},
            "bytes_per_weight": resident_bytes(layer) / (shape[0] * shape[1]),
        }


def _roofline(row: dict[str, Any], bandwidth: float) -> dict[str, float]:
    rows, columns = shape_of(row["shape"])
    reached = row["bytes_per_weight"] * rows * columns / row["milliseconds"] / 1e6
    return {"gb_per_second": reached, "share_of_bandwidth": reached / bandwidth}


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(4096, 4096), (11008, 4096)], metavar="OxI")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8, 16, 64, 128, 256, 512])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--formats", nargs="+", default=["bitmask"], choices=["bitmask", "csr"])
    parser.add_argument("--two-four", action="store_true", help="also measure the 2:4 format, at 50 %%")
    parser.add_argument(
        "--levels", nargs="*", default=[], choices=native.LEVELS, help="also measure these kernels separately"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="per shape, sparsity, batch and thread count")
    parser.add_argument("--input-bytes", type=int, default=default_input_bytes(), help="matrices of a variant")
    return parser


if __name__ == "__main__":
    main()
