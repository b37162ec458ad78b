"""The loss of a language model in chunks of tokens against head and cross-entropy of whole logits, as transformers has.

Seconds of processor time, forward and backward, medians of turns; bytes are the most that torch's allocator gave at a
time, of a token and vocabulary entry, without the gradients that both return.

    python -m tools.bench.loss --json --classes 49152 --width 576 --tokens 512
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.profiler import ProfilerActivity, profile

from pst_ds.core.head_loss import Readout, head_loss
from pst_ds.nn.base_model import DTYPES
from tools.bench.timing import conditions, medians, print_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--classes", type=int, default=49152, help="entries of the vocabulary (49152)")
    parser.add_argument("--width", type=int, default=576, help="of the hidden states (576)")
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch (512)")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--trained", action="store_true", help="the head has a gradient too")
    parser.add_argument("--repeats", type=int, default=5, help="turns of either (5)")
    args = parser.parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.width).to(DTYPES[args.precision]).requires_grad_()
    weight = (torch.randn(args.classes, args.width) / args.width**0.5).to(hidden).requires_grad_(args.trained)
    targets = torch.randint(args.classes, (args.tokens,))
    candidates = _candidates(hidden, weight, targets)
    seconds = medians(candidates, args.repeats, warmup=1, clock=time.process_time)
    returned = hidden.nbytes + weight.nbytes * args.trained
    entries = args.tokens * args.classes
    nbytes = {name: (_peak_bytes(run) - returned) / entries for name, run in candidates.items()}
    for name in candidates:
        print(f"{name}: {seconds[name]:.3f} s, {nbytes[name]:.2f} bytes a token and entry")
    print(f"chunks / whole: {seconds['chunks'] / seconds['whole']:.2f} of the time")
    if args.json:
        print_json({"seconds": seconds, "bytes_an_entry": nbytes, "conditions": conditions()})


def _candidates(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], object]]:
    def chunks() -> None:
        hidden.grad = weight.grad = None
        head_loss(hidden, Readout(weight, None), targets).backward()

    def whole() -> None:
        hidden.grad = weight.grad = None
        cross_entropy(linear(hidden, weight).float(), targets).backward()

    return {"chunks": chunks, "whole": whole}


def _peak_bytes(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    events = measured.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in changes))


if __name__ == "__main__":
    main()
