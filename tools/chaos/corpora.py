"""Train a language model on a mixture of three corpora, kill it halfway, and check that the result is bit-identical.

    python -m tools.chaos.corpora --out DIR

The 135M-parameter Llama of tools/fetch_smollm2.py is pruned to 50 % sparsity while it trains for two epochs on American
prose of 1961 (Brown), the World English Bible and posts of 20 newsgroups, all from registry packages. Each corpus
becomes a store by ``pst-ds prepare``; two ranks under ZeRO-3 draw from them by weight. ``tools.chaos`` trains twice,
once without interruption and once with a kill halfway, and compares masks, moments, weights and losses.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tools.fetch_smollm2 import dense_folder
from tools.quality import texts
from tools.verbs import verb

WEIGHTS = {"brown": 0.5, "bible": 0.25, "newsgroups": 0.25}
RUN = """
output_dir = "{out}/run"
deepspeed_config = "ds_configs/zero3_cpu.json"
task = "causal-lm"

[model]
path = "{base}"

[data]
max_length = {length}

[schedule]
final_sparsity = 0.5
update_interval = 4

[train]
num_epochs = 2
batch_size = {batch}

[pst]
update_rank = 8

[checkpoint]
interval = 5
"""
SOURCE = """
[[data.sources]]
path = "{out}/stores/{name}"
weight = {weight}
"""


def documents(name: str) -> list[str]:
    """Return the documents of a corpus, which is made if missing."""
    texts.make([name])
    if name == "newsgroups":
        with (texts.DATA / "newsgroups" / "train.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]
    part = "test" if name == "bible" else "train"
    return (texts.DATA / f"{name}-{part}.txt").read_text(encoding="utf-8").split("\n\n")


def first_words(documents: list[str], words: int) -> list[str]:
    """Return the first documents, truncated to ``words`` words in total."""
    kept: list[str] = []
    for document in documents:
        left = words - sum(len(one.split()) for one in kept)
        if left <= 0:
            break
        kept.append(" ".join(document.split()[:left]))
    return kept


def make(out: Path, args: argparse.Namespace) -> Path:
    """Prepare the stores and write the run file. Return its path."""
    out.mkdir(parents=True, exist_ok=True)
    base = dense_folder()
    table = RUN.format(out=out, base=base, length=args.length, batch=args.batch)
    for name, weight in WEIGHTS.items():
        path, store = out / f"{name}.jsonl", out / "stores" / name
        rows = (json.dumps({"text": text}) + "\n" for text in first_words(documents(name), args.words))
        path.write_text("".join(rows), encoding="utf-8")
        if not store.is_dir():
            verb("prepare", str(path), "--tokenizer", str(base), "--out", str(store), "--workers", "1")
        table += SOURCE.format(out=out, name=name, weight=weight)
    run = out / "run.toml"
    run.write_text(table, encoding="utf-8")
    return run


def main() -> int:
    args = _parser().parse_args()
    out = Path(args.out).absolute()
    run = make(out, args)
    command = [sys.executable, "-m", "tools.chaos", "--run", str(run), "--kills", "1", "--where", "half", "--json"]
    return subprocess.run([*command, "--out", str(out / "chaos")], check=False).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for texts, stores and runs")
    parser.add_argument("--words", type=int, default=1500, help="of each corpus (default: 1500)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (default: 128)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step, over both ranks (default: 4)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
