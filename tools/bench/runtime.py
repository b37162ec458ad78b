"""How fast products with packed weights are against dense bf16, on this CPU.

Each variant has matrices of its own, as many as fill --input-bytes (default: twice the last-level cache), and goes
through them in turn, so that weights come from memory; variants take turns too. Times are medians. ``dense`` is the
fastest of F.linear, matmul (x W' and W x') and prepacked oneDNN, all shown. ``speedup`` is dense / variant.

Roofline: ``bytes_per_weight`` is what a product must read of the weight, ``gb_per_second`` what that came to, and
``share_of_bandwidth`` that against the bandwidth measured in the same run (torch.dot of a large fp32 vector with
itself, as many threads).

    python -m tools.bench.runtime --json
    python -m tools.bench.runtime --batch 1 8 --sparsity 0.5 --levels avx2 avx512 amx --threads 1
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m tools.bench.runtime --levels avx512     # as on a CPU without AMX
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
from pst_ds.inference.runtime import SparseLinear, native, ops
from tools.bench.pack import default_input_bytes, shape_of
from tools.bench.timing import conditions, print_json, progress

BARS = {
    1: {0.5: 1.7, 0.7: 2.2, 0.8: 2.5, 0.9: 3.0},
    4: {0.5: 1.0, 0.8: 1.3, 0.9: 1.5},
    8: {0.5: 0.95, 0.8: 1.1, 0.9: 1.3},
}
"""Speed-ups that are asked of the bitmask kernel; at every other batch and sparsity :data:`BAR_ELSEWHERE`."""
BAR_ELSEWHERE = 0.9
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
        dtype="bfloat16", input_bytes=arguments.input_bytes, best_level=native.LEVELS[native.best_level()],
        onednn_max_isa=os.environ.get("ONEDNN_MAX_CPU_ISA", "as found"), memory_gb_per_second=bandwidth,
        clock="wall, medians, variants in turn",
    )  # fmt: skip
    stated["threads_per_rank"] = arguments.threads
    report = {"benchmark": "runtime", "conditions": stated, "rows": rows}
    if arguments.json:
        print_json(report)
    else:
        _print(report)


def memory_bandwidth(threads: int) -> float:
    """GB/s at which this many threads read memory."""
    torch.set_num_threads(threads)
    vector = torch.ones(1 << 28)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.dot(vector, vector)
        seconds.append(time.perf_counter() - start)
    return vector.nbytes / min(seconds) / 1e9


def measure_shape(shape: tuple[int, int], arguments: argparse.Namespace, bandwidth: dict[int, float]) -> list[Any]:
    """All rows of one shape. The dense matrices are made once; those of a sparsity for all batches."""
    dense = copies(torch.randn(shape).mul_(0.02).bfloat16(), arguments.input_bytes)
    rows = []
    for sparsity in arguments.sparsity:
        layers = sparse_layers(dense[0], sparsity, arguments)
        for batch, threads in itertools.product(arguments.batch, arguments.threads):
            progress(f"{shape[0]}x{shape[1]}, {sparsity:.0%} zeros, batch {batch}, {threads} threads")
            torch.set_num_threads(threads)
            x = torch.randn(batch, shape[1]).bfloat16()
            variants = dense_contestants(dense, batch) | sparse_contestants(layers, arguments.levels)
            seconds = take_turns(variants, x, arguments.seconds)
            for row in summary(seconds, layers, shape, batch, sparsity):
                rows.append({**row, "threads": threads, **_roofline(row, bandwidth[threads])})
    return rows


def copies(value: Any, total_bytes: int) -> list[Any]:
    """The tensor, or the layer, as often as fills ``total_bytes``; at least twice."""
    size = value.nbytes if isinstance(value, Tensor) else resident_bytes(value)
    return [copy.deepcopy(value) for _ in range(max(2, -(-total_bytes // size)))]


def resident_bytes(layer: SparseLinear) -> int:
    return sum(t.nbytes for t in itertools.chain(layer.parameters(), layer.buffers()))


def sparse_layers(weight: Tensor, sparsity: float, arguments: argparse.Namespace) -> dict[str, list[SparseLinear]]:
    """Copies of a layer of each format with ``sparsity`` of its weights zero, at random places."""
    pruned = torch.where(torch.rand(weight.shape) < sparsity, 0.0, weight.float()).bfloat16()
    made = {name: SparseLinear.from_dense(pruned, format=name) for name in arguments.formats}
    if "2:4" in FORMATS and arguments.two_four and abs(sparsity - 0.5) < 1e-9:
        made["2:4"] = SparseLinear.from_dense(_two_of_four(weight), format="2:4")
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
    """The layers as they are used, and the ways of computing that they choose among."""
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
    """Median seconds of each. Variants that share matrices are far apart in them: none finds one in the cache."""
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
    """A row for each sparse variant."""
    dense = {name: seconds[name] for name in DENSE if name in seconds}
    best = min(dense.values())
    for name in seconds.keys() - dense.keys():
        layer = layers[name.partition("/")[0]][0]
        speedup = best / seconds[name]
        bar = BARS.get(batch, {}).get(round(sparsity, 2), BAR_ELSEWHERE) if name == "bitmask" else None
        yield {
            "shape": f"{shape[0]}x{shape[1]}",
            "batch": batch,
            "sparsity": sparsity,
            "backend": name,
            "speedup": speedup,
            "speedup_over_f_linear": dense["F.linear"] / seconds[name],
            "bar": bar,
            "met": None if bar is None else speedup >= bar,
            "milliseconds": seconds[name] * 1e3,
            "dense_milliseconds": {n: s * 1e3 for n, s in dense.items()},
            "bytes_per_weight": resident_bytes(layer) / (shape[0] * shape[1]),
        }


def _roofline(row: dict[str, Any], bandwidth: float) -> dict[str, float]:
    rows, columns = shape_of(row["shape"])
    reached = row["bytes_per_weight"] * rows * columns / row["milliseconds"] / 1e6
    return {"gb_per_second": reached, "share_of_bandwidth": reached / bandwidth}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(4096, 4096), (11008, 4096)], metavar="OxI")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8, 16, 64, 128, 256, 512])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--formats", nargs="+", default=["bitmask"], choices=["bitmask", "csr"])
    parser.add_argument("--two-four", action="store_true", help="the 2:4 format too, at 50 %%")
    parser.add_argument(
        "--levels", nargs="*", default=[], choices=native.LEVELS, help="these kernels by themselves too"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape, sparsity, batch and thread count")
    parser.add_argument("--input-bytes", type=int, default=default_input_bytes(), help="of matrices of a variant")
    parser.add_argument("--json", action="store_true")
    return parser


def _print(report: dict[str, Any]) -> None:
    for key, value in report["conditions"].items():
        print(f"{key}: {value}")
    print(f"{'shape':>11} {'batch':>5} {'zeros':>5} {'threads':>7} {'backend':<18} {'ms':>8} {'dense ms':>8} "
          f"{'speed-up':>8} {'bar':>5} {'/F.linear':>9} {'GB/s':>6} {'share':>5}")  # fmt: skip
    for row in report["rows"]:
        bar = "" if row["bar"] is None else f"{row['bar']}{'' if row['met'] else '!'}"
        print(f"{row['shape']:>11} {row['batch']:>5} {row['sparsity']:>5.0%} {row['threads']:>7} {row['backend']:<18} "
              f"{row['milliseconds']:>8.3f} {min(row['dense_milliseconds'].values()):>8.3f} {row['speedup']:>8.2f} "
              f"{bar:>5} {row['speedup_over_f_linear']:>9.2f} {row['gb_per_second']:>6.1f} "
              f"{row['share_of_bandwidth']:>5.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
