"""What one-shot pruning adds to the loss of a language model, by method: nats a token above the dense model.

Every method, with options of pst-ds prune if need be, prunes the run's model to every share of zeros ("2:4" names a
pattern), and the folder is tested on the first sequences of data.test, and of other texts. From ``--values`` on options
are those of pst-ds export, which rounds the folder that the method made without them. With --train a run file is
trained from every folder too, or from those of --train-from, and what it exports is tested. What is there already is
read, so a killed comparison goes on.

    python -m tools.quality.one_shot run.toml --out runs/one-shot --set train.precision=fp32 --json
    python -m tools.quality.one_shot run.toml --out runs/one-shot --methods sparsegpt "alps --budgets owl" --zeros 0.7
    python -m tools.quality.one_shot run.toml --out runs/one-shot --zeros 0.5 0.8 --methods sparsegpt
        "sparsegpt --values int4 --group 64" "sparsegpt --bits 4 --group 64"
    python -m tools.quality.one_shot run.toml --out runs/one-shot --zeros 0.5 --train masked-lora.toml
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pst_ds.atomic_files import write_text_atomic
from tools.bench.timing import hardware
from tools.quality.grid import sparsity_settings
from tools.verbs import verb

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pst_ds.config.run import RunConfig

REFERENCE = "sparsegpt"
"""What the others are compared with."""
OUTCOME = "loss.json"
ROUNDS = "--values"
"""From this word on the options of a method are those of an export."""
OWN_TEXT = "test"
"""The name of data.test among the texts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN.toml", help='run file of task "causal-lm"')
    parser.add_argument("--out", type=Path, required=True, help="folder for the pruned models")
    words = "each in one word: a method, options of pst-ds prune, and from --values on of pst-ds export"
    parser.add_argument("--methods", nargs="+", default=[REFERENCE, "alps"], help=words)
    parser.add_argument("--zeros", nargs="+", default=["0.5", "0.7", "2:4"], help="shares or patterns")
    parser.add_argument("--samples", default="64", help="sequences to calibrate on")
    parser.add_argument("--tested", type=int, default=96, help="sequences of each text")
    parser.add_argument("--texts", nargs="+", default=[], metavar="FILE", help="texts to test on besides data.test")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the tested models (fp32)")
    parser.add_argument("--train", type=Path, metavar="RUN.toml", help="a run to train from every pruned folder")
    parser.add_argument("--train-from", nargs="+", default=[], metavar="METHOD", help="of these methods alone (all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run but --train's")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    args = parser.parse_args()
    dense = measured(args, "", args.out / "dense", {})["losses"]
    print("dense: " + ", ".join(f"{text} {loss:.4f}" for text, loss in dense.items()) + " nats a token")
    rows: list[dict[str, Any]] = []
    for zeros in args.zeros:
        for method in args.methods:
            found = pruned(args, method, zeros)
            added = {text: loss - dense[text] for text, loss in found["losses"].items()}
            rows.append({"zeros": zeros, "method": method, **found, "added": added})
            rows[-1]["of_reference"] = shares_of_reference(rows)
            if args.train and (not args.train_from or method in args.train_from):
                after = trained(args, folder_of(args, method, zeros), zeros)
                rows[-1] |= {"trained": after, "won_back": shares_won_back(rows, after["losses"], dense)}
            print(f"{zeros} {method}: {_said(rows[-1])}; pruned in {found['prune_cpu_seconds']:.0f} CPU s")
    if args.json:
        facts = {"samples": int(args.samples), "tested": args.tested, "dtype": args.dtype, "dense": dense}
        print(json.dumps({"comparison": "one_shot", "hardware": hardware(), **facts, "rows": rows}))


def _said(row: dict[str, Any]) -> str:
    shares, losses, won = row["of_reference"], row.get("trained", {}).get("losses", {}), row.get("won_back", {})
    of = {text: f" ({share:.3f} of {REFERENCE}'s)" for text, share in shares.items()}
    back = {text: f" ({share:.3f} of it won back)" for text, share in won.items()}
    after = {text: f", trained {loss:.4f}{back.get(text, '')}" for text, loss in losses.items()}
    found = row["added"].items()
    return ", ".join(f"{text} {added:.4f} above dense{of.get(text, '')}{after.get(text, '')}" for text, added in found)


def shares_of_reference(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By text, where it is known: what the last row adds, as a share of what the reference adds with as many zeros."""
    return {text: rows[-1]["added"][text] / added for text, added in _added_by_reference(rows).items()}


def shares_won_back(rows: list[dict[str, Any]], trained: dict[str, float], dense: dict[str, float]) -> dict[str, float]:
    """By text, where it is known: 1 less what is left of the loss that the reference adds, before it is trained, once
    the last row's folder was."""
    return {text: 1.0 - (trained[text] - dense[text]) / added for text, added in _added_by_reference(rows).items()}


def _added_by_reference(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the reference adds with as many zeros as the last row, by text, where it adds any."""
    known = [row for row in rows if row["method"] == REFERENCE and row["zeros"] == rows[-1]["zeros"]]
    return {text: added for text, added in known[0]["added"].items() if added > 0} if known else {}


def folder_of(args: argparse.Namespace, method: str, zeros: str) -> Path:
    """Where the pruned model and its losses are."""
    name, *options = method.split()
    return args.out / "-".join([name, *(word.lstrip("-") for word in options), zeros.replace(":", "of")])


def pruned(args: argparse.Namespace, method: str, zeros: str) -> dict[str, Any]:
    """Prune by a method and test what it made."""
    name, *options = method.split()
    folder = folder_of(args, method, zeros)
    if (folder / OUTCOME).is_file():
        return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    if ROUNDS in options:
        return rounded(args, method, zeros, folder)
    share = ["--pattern", zeros] if ":" in zeros else ["--sparsity", zeros]
    settings = [word for setting in args.set for word in ("--set", setting)]
    model, start = folder / "model", time.process_time()
    words = ["--method", name, *options, "--out", str(model), "--samples", args.samples, "--quiet"]
    verb("prune", args.run, *words, *share, *settings)
    return measured(args, str(model), folder, {"prune_cpu_seconds": time.process_time() - start})


def rounded(args: argparse.Namespace, method: str, zeros: str, folder: Path) -> dict[str, Any]:
    """Round what the method makes without its options of an export, and test that."""
    words = method.split()
    plain = " ".join(words[: words.index(ROUNDS)])
    made = pruned(args, plain, zeros)
    model, source = folder / "model", folder_of(args, plain, zeros) / "model"
    verb("export", str(source), "--format", "dense", *words[words.index(ROUNDS) :], "--out", str(model))
    return measured(args, str(model), folder, {"prune_cpu_seconds": made["prune_cpu_seconds"]})


def trained(args: argparse.Namespace, pruned_folder: Path, zeros: str) -> dict[str, Any]:
    """Train ``args.train`` from a pruned folder, export it dense and test it."""
    folder = pruned_folder / f"trained-{args.train.stem}"
    if (folder / OUTCOME).is_file():
        return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    run_folder, export, start = folder / "run", folder / "model", time.process_time()
    settings = [f"output_dir={json.dumps(str(run_folder))}", *training_settings(args.train, pruned_folder, zeros)]
    verb("train", str(args.train), "--resume", "--quiet", *(word for one in settings for word in ("--set", one)))
    seconds = time.process_time() - start
    verb("export", str(run_folder), "--out", str(export))
    return measured(args, str(export), folder, {"train_cpu_seconds": seconds})


def training_settings(run_file: Path, pruned_folder: Path, zeros: str) -> list[str]:
    """What a run has to be told to start from a pruned folder, and where its masks are fixed, to keep those zeros."""
    from pst_ds.config.methods import METHODS
    from pst_ds.config.toml import load_run

    settings: dict[str, object] = {"model.path": str(pruned_folder / "model")}
    for table, values in sparsity_settings(zeros).items():
        settings |= {f"{table}.{key}": value for key, value in values.items()}
    if METHODS[load_run(str(run_file)).method].masks == "fixed":
        settings["pst.initial_mask"] = "zeros"
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def measured(args: argparse.Namespace, model: str, folder: Path, facts: dict[str, float]) -> dict[str, Any]:
    """Return the losses of a ``model``, "" for the run's own, with the ``facts``; kept in ``folder`` once known."""
    if (folder / OUTCOME).is_file():
        return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    found = {**facts, "losses": losses_of(args.run, model, args.set, args.texts, args.tested, args.dtype)}
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / OUTCOME, json.dumps(found) + "\n")
    return found


def losses_of(
    run_file: str, model: str, settings: list[str], texts: list[str], limit: int, dtype: str = "fp32"
) -> dict[str, float]:
    """The mean loss, in nats a token, of a folder (of the run's model: "") on the first sequences of each text."""
    from transformers import AutoModelForCausalLM

    import pst_ds.hf  # noqa: F401  which folders of codes need
    from pst_ds.config.toml import load_run
    from pst_ds.nn.base_model import DTYPES

    run = load_run(run_file, settings)
    causal = AutoModelForCausalLM.from_pretrained(model or run.model.path, dtype=DTYPES[dtype]).eval()
    found = {OWN_TEXT: _loss(run, causal, limit)}
    for text in texts:
        of_text = load_run(run_file, [*settings, f"data.test={json.dumps(text)}"])
        found[Path(text).stem] = _loss(of_text, causal, limit)
    return found


def _loss(run: RunConfig, causal: PreTrainedModel, limit: int) -> float:
    from pst_ds.data.tasks import task_of
    from pst_ds.train.model import load_tokenizer

    task, tokenizer = task_of(run), load_tokenizer(run)
    examples, total, predicted = task.load(run.data, "test", tokenizer, []), 0.0, 0
    for i in range(min(limit, len(examples))):
        batch = task.collate(examples, [i], tokenizer)
        with torch.no_grad():
            total += float(task.outcomes(causal(input_ids=batch["input_ids"]).logits, batch).sum())
        predicted += int((batch["labels"][:, 1:] >= 0).sum())
    return total / predicted


if __name__ == "__main__":
    main()
