"""How fast tokens go through packed experts against dense ones on this CPU: both stacks of a layer, without its gate.

A token has ``--chosen`` of ``--experts`` experts, others in every turn, so that weights come from memory. Dense is a
loop of F.linear over the chosen experts of a bf16 stack; packed is ``SparseExperts``, with
the bitmask format. Both take turns; medians.

    python -m tools.bench.packed_experts --json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pst_ds.core.experts.routing import Routing
from pst_ds.inference.runtime.experts import SparseExperts
from tools.bench.timing import conditions, medians, print_json, rounded

BARS = {0.5: 2.5, 0.8: 3.3}
"""Speed-ups that are asked for at one token and 8 of 128 experts, by sparsity."""


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    about = conditions(
        dtype="bfloat16", experts=arguments.experts, chosen=arguments.chosen, hidden=arguments.hidden,
        inner=arguments.inner, tokens=arguments.tokens, repeats=arguments.repeats,
    )  # fmt: skip
    rows = [measure(arguments, sparsity) for sparsity in arguments.sparsity]
    if arguments.json:
        print_json({"benchmark": "packed_experts", "conditions": about, "rows": rows})
        return
    print(about["hardware"])
    for row in rows:
        print(rounded(row))


@torch.no_grad()
def measure(arguments: argparse.Namespace, sparsity: float) -> dict[str, Any]:
    """Milliseconds of the tokens of one turn, dense and packed, and how much faster packed is."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2 * arguments.inner, arguments.hidden), (arguments.hidden, arguments.inner)
    dense = [_stack(arguments.experts, shape, sparsity, generator) for shape in shapes]
    packed = [SparseExperts.of_stack(stack) for stack in dense]
    turns = [_index(arguments, generator) for _ in range(16)]
    x = torch.randn(arguments.tokens, arguments.hidden, generator=generator).bfloat16()
    inner = torch.randn(arguments.tokens * arguments.chosen, arguments.inner, generator=generator).bfloat16()
    seconds = medians(
        {name: _in_turn(run, turns) for name, run in {
            "dense": partial(_dense, dense, x, inner), "packed": partial(_packed, packed, x, inner),
        }.items()},
        repeats=arguments.repeats,
    )  # fmt: skip
    stored = sum(tensor.numel() * tensor.element_size() for layer in packed for tensor in layer.parts().values())
    speedup = seconds["dense"] / seconds["packed"]
    return {
        "sparsity": sparsity,
        "dense_ms": seconds["dense"] * 1e3,
        "packed_ms": seconds["packed"] * 1e3,
        "speedup": speedup,
        "bytes_of_dense": stored / sum(stack.numel() * stack.element_size() for stack in dense),
        "bar": BARS.get(sparsity),
    }


def _stack(experts: int, shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    stack = torch.randn(experts, *shape, generator=generator).bfloat16()
    for expert in stack:
        expert.masked_fill_(torch.rand(shape, generator=generator) < sparsity, 0.0)
    return stack


def _index(arguments: argparse.Namespace, generator: torch.Generator) -> Routing:
    chosen = [
        torch.randperm(arguments.experts, generator=generator)[: arguments.chosen] for _ in range(arguments.tokens)
    ]
    index = torch.stack(chosen)
    return Routing.of(index, torch.ones(index.shape), arguments.experts)


def _in_turn(run: Callable[[Routing], object], turns: list[Routing]) -> Callable[[], object]:
    count = 0

    def one() -> object:
        nonlocal count
        count += 1
        return run(turns[count % len(turns)])

    return one


def _dense(stacks: list[Tensor], x: Tensor, inner: Tensor, routing: Routing) -> None:
    for stack, given, by_token in ((stacks[0], x, True), (stacks[1], inner, False)):
        for expert, rows in routing.runs():
            linear(routing.rows_of(given, rows, by_token), stack[expert])


def _packed(layers: list[SparseExperts], x: Tensor, inner: Tensor, routing: Routing) -> None:
    layers[0](x, routing, True)
    layers[1](inner, routing, False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--chosen", type=int, default=8, help="experts of a token")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768, help="width between an expert's two products")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(BARS))
    parser.add_argument("--repeats", type=int, default=51)
    return parser


if __name__ == "__main__":
    main()
