"""Products with a stack of experts, forward and backward, against a loop over its experts in full fine-tuning.

The loop's backward pass is written out ("dense backward"), and as autograd does it, which makes a gradient as large as
the stack for each expert ("autograd backward"). Every expert gets as many tokens. Nanoseconds of processor time a
weight of the stack, medians of turns; bytes are the most that torch's allocator gave at a time in either pass, by the
bytes of one expert's matrix, without what it returns.

    python -m tools.bench.experts --json --experts 32 --outputs 1536 --inputs 2048 --tokens 16 64 256
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import pack_mask
from pst_ds.core.experts.routing import Routing
from pst_ds.core.layout import WeightLayout
from pst_ds.nn.base_model import DTYPES
from pst_ds.nn.experts import PSTExpertStack
from tools.bench.timing import conditions, medians, print_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--outputs", type=int, default=1536, help="of an expert, gate and up together (1536)")
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256], help="of each expert (16 64 256)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (5)")
    args = parser.parse_args()
    torch.manual_seed(0)
    stack = _stack(args.experts, args.outputs, args.inputs, DTYPES[args.precision])
    results = {str(tokens): _measured(stack, tokens, args.repeats) for tokens in args.tokens}
    for tokens, found in results.items():
        print(f"{tokens} tokens an expert: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    if args.json:
        print_json({"nanoseconds_a_weight": results, "conditions": conditions(**vars(args))})


def _stack(experts: int, outputs: int, inputs: int, dtype: torch.dtype) -> PSTExpertStack:
    """Gate and up of each expert with half of the weights masked, in training."""
    layout = WeightLayout(experts * outputs, inputs, num_matrices=2 * experts, num_experts=experts)
    weight = torch.nn.Parameter(torch.randn(experts, outputs, inputs, dtype=dtype) * 0.02, requires_grad=False)
    stack = PSTExpertStack(
        "bench", weight, layout, PSTConfig().rule_for("bench"), PSTConfig(), 1, (0.016,) * layout.num_matrices
    )
    stack.pst_mask.data = pack_mask(torch.rand(layout.numel) > 0.5)
    return stack


def _measured(stack: PSTExpertStack, tokens: int, repeats: int) -> dict[str, float]:
    layout = stack.layout
    index = torch.arange(layout.num_experts).repeat(tokens).unsqueeze(1)
    routing = Routing.of(index, torch.ones(len(index), 1), layout.num_experts)
    x = torch.randn(len(index), layout.in_features, dtype=stack.dtype)
    grad_y = torch.randn(len(index), layout.expert.out_features, dtype=stack.dtype)
    assert stack.weight is not None
    trained = stack.weight.detach().clone().requires_grad_()

    def pst() -> Tensor:
        return stack.product(x, routing, by_token=True)

    def pst_backward() -> object:
        return stack.gradients(x, grad_y, routing, True, need_x=True, need_weight=False)

    def dense() -> Tensor:
        return torch.cat([x[routing.tokens[rows]] @ trained[expert].t() for expert, rows in routing.runs()])

    def dense_backward() -> object:
        grad_x, grad = torch.empty_like(x), torch.zeros_like(trained)
        for expert, rows in routing.runs():
            torch.mm(grad_y[rows].t(), x[routing.tokens[rows]], out=grad[expert])
            grad_x[routing.tokens[rows]] = grad_y[rows] @ trained[expert]
        return grad_x, grad

    with torch.enable_grad():
        given = x.clone().requires_grad_()
        graph = torch.cat([given[routing.tokens[rows]] @ trained[expert].t() for expert, rows in routing.runs()])

    def autograd_backward() -> object:
        return torch.autograd.grad(graph, (given, trained), grad_y, retain_graph=True)

    runs: dict[str, Callable[[], object]] = {
        "forward": pst, "backward": pst_backward, "dense forward": dense, "dense backward": dense_backward,
        "autograd backward": autograd_backward,
    }  # fmt: skip
    with torch.no_grad():
        seconds = medians(runs, repeats, warmup=1, clock=time.process_time)
        one = layout.expert.numel * stack.dtype.itemsize
        matrices = {f"{name} matrices": _peak_bytes(runs[name]) / one for name in ("forward", "backward")}
    return {name: 1e9 * value / layout.numel for name, value in seconds.items()} | matrices


def _peak_bytes(run: Callable[[], object]) -> int:
    """The most that is allocated at a time, beyond what is left at the end: the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        result = run()
    del result
    events = measured.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = list(itertools.accumulate(nbytes for _, nbytes in changes))
    return max(alive) - alive[-1]


if __name__ == "__main__":
    main()
