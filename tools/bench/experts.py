"""Forward and backward pass of a pruned stack of experts, compared with full fine-tuning of a loop over the experts.

The backward pass of the loop is written by hand ("dense backward"), and computed by autograd, which allocates a
gradient as large as the stack for each expert ("autograd backward"). Every expert gets the same number of tokens. Times
are medians in nanoseconds of CPU time per weight of the stack. "matrices" is the peak of memory that torch allocates in
a pass without its result, in units of one expert's matrix.

    python -m tools.bench.experts --json --experts 32 --outputs 1536 --inputs 2048 --tokens 16 64 256
"""

from __future__ import annotations

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
from tools.bench.timing import benchmark_parser, conditions, medians, print_result


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--outputs", type=int, default=1536, help="outputs per expert, gate and up together (1536)")
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256], help="tokens per expert (16 64 256)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (5)")
    args = parser.parse_args()
    torch.manual_seed(0)
    stack = _stack(args.experts, args.outputs, args.inputs, DTYPES[args.precision])
    results = {str(tokens): _measured(stack, tokens, args.repeats) for tokens in args.tokens}
    result = {"nanoseconds_a_weight": results, "conditions": conditions(**vars(args))}
    print_result(result, as_json=args.json)


def _stack(experts: int, outputs: int, inputs: int, dtype: torch.dtype) -> PSTExpertStack:
    """Return a trainable stack of gate and up projections at 50 % sparsity."""
    layout = WeightLayout(experts * outputs, inputs, num_matrices=2 * experts, num_experts=experts)
    weight = torch.nn.Parameter(torch.randn(experts, outputs, inputs, dtype=dtype) * 0.02, requires_grad=False)
    config, scales = PSTConfig(), (0.016,) * layout.num_matrices
    stack = PSTExpertStack("bench", weight, None, layout, config.rule_for("bench"), config.of_experts, 1, scales)
    stack.pst_mask.data = pack_mask(torch.rand(layout.numel) > 0.5)
    return stack


def _measured(stack: PSTExpertStack, tokens: int, repeats: int) -> dict[str, float]:
    layout = stack.layout
    index = torch.arange(layout.num_experts).repeat(tokens).unsqueeze(1)
    routing = Routing.of(index, torch.ones(len(index), 1), layout.num_experts)
    tokens_of = routing.tokens
    x = torch.randn(len(index), layout.in_features, dtype=stack.dtype)
    grad_y = torch.randn(len(index), layout.expert.out_features, dtype=stack.dtype)
    assert stack.weight is not None
    trained = stack.weight.detach().clone().requires_grad_()

    def pst() -> Tensor:
        return stack.product(x, routing, by_token=True)

    def pst_backward() -> object:
        return stack.gradients(x, grad_y, routing, True, need_x=True, need_weight=False)

    def dense() -> Tensor:
        return torch.cat([x[tokens_of[rows]] @ trained[expert].t() for expert, rows in routing.runs()])

    def dense_backward() -> object:
        grad_x, grad = torch.empty_like(x), torch.zeros_like(trained)
        for expert, rows in routing.runs():
            torch.mm(grad_y[rows].t(), x[tokens_of[rows]], out=grad[expert])
            grad_x[tokens_of[rows]] = grad_y[rows] @ trained[expert]
        return grad_x, grad

    with torch.enable_grad():
        given = x.clone().requires_grad_()
        graph = torch.cat([given[tokens_of[rows]] @ trained[expert].t() for expert, rows in routing.runs()])

    def autograd_backward() -> object:
        return torch.autograd.grad(graph, (given, trained), grad_y, retain_graph=True)

    runs: dict[str, Callable[[], object]] = {
        "forward": pst,
        "backward": pst_backward,
        "dense forward": dense,
        "dense backward": dense_backward,
        "autograd backward": autograd_backward,
    }
    with torch.no_grad():
        seconds = medians(runs, repeats, warmup=1, clock=time.process_time)
        one = layout.expert.numel * stack.dtype.itemsize
        matrices = {f"{name} matrices": _peak_bytes(runs[name]) / one for name in ("forward", "backward")}
    return {name: 1e9 * value / layout.numel for name, value in seconds.items()} | matrices


def _peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of allocated bytes, without the bytes of the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        result = run()
    del result
    events = measured.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = list(itertools.accumulate(nbytes for _, nbytes in changes))
    return max(alive) - alive[-1]


if __name__ == "__main__":
    main()
