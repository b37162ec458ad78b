"""Sample a corpus from a language model's own distribution.

    python -m tools.quality.own_text runs/smollm2/dense --out runs/quality/data/smollm2-own.jsonl --samples 128

A pruned model can recover from it what the dense one knows, without a corpus of the original training data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pst_ds.atomic_files import write_text_atomic
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationMixin

BATCH = 64
"""Samples per batch. The result depends on it, since all samples come from one generator."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--samples", type=int, default=128, help="number of samples (128)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per sample (256)")
    parser.add_argument("--first", default="<|endoftext|>", help="first token: the separator of documents in training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    documents = write(args.model, args.out, args.samples, args.tokens, args.first, args.seed)
    print(f"{args.out}: {documents} documents")


def write(folder: str, out: Path, samples: int, tokens: int, first: str, seed: int) -> int:
    """Write the documents of ``samples`` samples as rows {"text": ...}. Return their number. Raises InputError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # "eager" is a third faster than "sdpa" for single tokens on a CPU
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = tokenizer.get_vocab().get(first)
    if start is None:
        special = ", ".join(tokenizer.all_special_tokens)
        raise InputError(
            f"--first = {first!r}: {folder!r} has no such token. Choose one of its special tokens: {special}"
        )
    torch.manual_seed(seed)
    documents: list[str] = []
    for done in range(0, samples, BATCH):
        for row in draw(model, start, min(BATCH, samples - done), tokens).tolist():
            documents += [str(tokenizer.decode(part)).strip() for part in parted(row, set(tokenizer.all_special_ids))]
    documents = [text for text in documents if text]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    return len(documents)


def draw(model: GenerationMixin, start: int, samples: int, tokens: int) -> Tensor:
    """Return (samples, tokens) int64, sampled from the softmax of ``model``'s logits after ``start``."""
    model.generation_config.eos_token_id = None  # a sample continues after the end of a document
    first = torch.full((samples, 1), start)
    drawn = model.generate(
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        pad_token_id=start,
    )
    return drawn[:, 1:]


def parted(row: list[int], special: set[int]) -> list[list[int]]:
    """Split a row into documents at special tokens, which are removed."""
    documents: list[list[int]] = [[]]
    for token in row:
        if token in special:
            documents.append([])
        else:
            documents[-1].append(token)
    return [document for document in documents if document]


if __name__ == "__main__":
    main()
