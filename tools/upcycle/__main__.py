"""Makes runs/upcycled/start: SmolLM2-135M with four copies of every MLP and routers, a Mixtral of 373 M parameters.

It computes what the dense model does until it is trained. run.toml trains every weight on four corpora, with which the
copies part; --apart says how far they are, and with --text what share of its tokens each expert is given, and what the
loss is with and without their differences.

    python -m tools.upcycle
    pst-ds train tools/upcycle/run.toml
    pst-ds export runs/upcycled/run --out runs/upcycled/dense
    python -m tools.upcycle --apart runs/upcycled/dense --text runs/quality/data/brown-validation.txt
    python -m tools.quality tools/quality/experts.toml
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst_ds.atomic_files import atomic_folder
from tools.fetch_smollm2 import dense_folder
from tools.quality import texts
from tools.upcycle.mixtral import apart, average_experts, loss_of, token_shares, upcycled

START = Path("runs/upcycled/start")
CORPORA = ("brown", "films", "newsgroups", "reuters")
SEQUENCE, MOST_TOKENS = 256, 4096
"""Tokens of a sequence whose experts are counted, and of all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of a Llama (default: the package's SmolLM2-135M)")
    parser.add_argument("--out", type=Path, default=START)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--per-token", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--apart", type=Path, metavar="DIR", help="say how far the experts of a trained model are apart"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="with --apart, say who is given its first tokens, and their loss"
    )
    arguments = parser.parse_args()
    if arguments.apart:
        _describe(arguments.apart, arguments.text)
        return
    if arguments.base is None:
        texts.make(CORPORA)
    base, counts = arguments.base or dense_folder(), (arguments.experts, arguments.per_token)
    print(make_start(base, arguments.out, *counts, arguments.seed))


def _describe(folder: Path, text: Path | None) -> None:
    """Print how far the experts of a model are apart, and of the first tokens of ``text`` the experts' shares and the
    loss, as it is and with their mean in the place of each."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, distance in apart(model).items():
        print(f"{name}: {distance:.4f}")
    if text is not None:
        ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"))["input_ids"]
        rows = torch.tensor(ids[:MOST_TOKENS][: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)
        for name, shares in token_shares(model, rows).items():
            print(f"{name}: {' '.join(f'{share:.3f}' for share in shares)} of the tokens")
        own = loss_of(model, rows)
        average_experts(model)
        print(f"loss {own:.4f}, with every expert the mean of its stack {loss_of(model, rows):.4f}")


def make_start(base: Path, out: Path, experts: int, per_token: int, seed: int) -> Path:
    """Write ``out``, the model in ``base`` as a mixture, and its tokenizer; whole or not at all."""
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with atomic_folder(out) as partial:
        upcycled(dense, experts, per_token, seed).save_pretrained(partial)
        AutoTokenizer.from_pretrained(base).save_pretrained(partial)
    return out


if __name__ == "__main__":
    main()
