"""What a step of decoding computes for single tokens, ours beside torch's: some texts' attention, and an output layer.

    OMP_NUM_THREADS=1 python -m tools.bench.single_tokens

The shapes are those of the 135M Llama of tools/fetch_smollm2.py in bf16: nine heads of 64 that share three keys and
values, and 49,152 x 576. torch's attention is called as transformers does: without a mask, and with one that hides
nothing. Contestants take turns; times are medians of the processor's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pst_ds.inference.runtime.attention import one_query
from pst_ds.inference.runtime.dense import VectorLinear
from tools.bench.timing import conditions, medians, print_json

HEADS, GROUPS, SIZE = 9, 3, 64
OUTPUTS, INPUTS = 49_152, 576


class _Layer(nn.Module):
    """What torch's attention asks of the module that it is for."""

    num_key_value_groups = HEADS // GROUPS
    is_causal = True


def milliseconds(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    found = medians(contestants, repeats, warmup=1, clock=time.process_time)
    return {name: round(1e3 * seconds, 3) for name, seconds in found.items()}


def attention(texts: int, length: int, repeats: int) -> dict[str, float]:
    query, layer, scale = torch.randn(texts, HEADS, 1, SIZE).bfloat16(), _Layer(), SIZE**-0.5
    key, value = torch.randn(2, texts, GROUPS, length, SIZE).bfloat16()
    mask = torch.ones(texts, 1, 1, length, dtype=torch.bool)

    def torchs(mask: Tensor | None) -> Callable[[], object]:
        return lambda: sdpa_attention_forward(layer, query, key, value, mask, scaling=scale)

    ours = lambda: one_query(query, key, value, [0] * texts, scale)  # noqa: E731
    return milliseconds({"torch": torchs(None), "torch_masked": torchs(mask), "ours": ours}, repeats)


def output_layer(repeats: int) -> dict[str, float]:
    layer, x = nn.Linear(INPUTS, OUTPUTS, bias=False).bfloat16(), torch.randn(1, INPUTS).bfloat16()
    weight, quick = layer.weight.detach(), VectorLinear.of(layer)
    made = {"mv": lambda: torch.mv(weight, x[0]), "linear": lambda: linear(x, weight), "ours": lambda: quick(x)}
    return milliseconds(made, repeats)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = {f"{n} x {length}": attention(n, length, args.repeats) for n in (1, 8) for length in (64, 256, 1024)}
    print_json({
        **conditions(repeats=args.repeats), "attention_ms_by_texts_and_tokens": rows,
        "output_layer_ms": output_layer(args.repeats),
    })  # fmt: skip


if __name__ == "__main__":
    main()
