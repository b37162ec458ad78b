"""Make runs/upcycled/dense: a mixture of eight experts, 692 M parameters, whose experts differ (branch, train, mix).

Each corpus trains the MLPs of a copy of SmolLM2-135M. The copies' MLPs become the experts of a Mixtral. Its routers
are fitted to tell the corpora apart, and then trained on all of them. An interrupted command resumes. Stages whose
folder exists are skipped, so remove the folder after changing an option. --apart describes the result, --recovered what
the grid of the last command has measured.

    python -m tools.upcycle
    python -m tools.upcycle --apart
    python -m tools.quality tools/quality/experts.toml
    python -m tools.upcycle --recovered
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralForCausalLM, PreTrainedTokenizerBase

from pst_ds.atomic_files import atomic_folder
from pst_ds.file_names import CHECKPOINTS
from tools.fetch_smollm2 import dense_folder
from tools.quality.__main__ import RESULTS
from tools.quality.cells import Lines
from tools.quality.grid import load_grid
from tools.upcycle import corpora
from tools.upcycle.mixtral import distances, fitted_routers, loss_and_shares, mixture
from tools.upcycle.recovered import recovered
from tools.verbs import verb

RUN_FILE, GRID = Path(__file__).with_name("run.toml"), Path("tools/quality/experts.toml")
SEQUENCE, FITTED, DESCRIBED = 256, 8, 8
"""Tokens of a sequence, and sequences of each corpus that routers are fitted to and that are described."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of a Llama (default: the package's SmolLM2-135M)")
    parser.add_argument("--out", type=Path, default=Path("runs/upcycled"))
    parser.add_argument("--steps", type=int, default=64, help="training steps of every branch (64)")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of the branches (3e-4)")
    parser.add_argument("--router-steps", type=int, default=16, help="training steps of the routers (16)")
    parser.add_argument("--router-rate", type=float, default=1e-3, help="learning rate of the routers (1e-3)")
    parser.add_argument("--per-token", type=int, default=2, help="experts per token (2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a runs' setting")
    parser.add_argument("--apart", action="store_true", help="print distances, losses and routing of what --out has")
    parser.add_argument("--recovered", action="store_true", help="print what removed experts cost, and what comes back")
    arguments = parser.parse_args()
    if arguments.recovered:
        grid = load_grid(GRID)
        print(recovered(grid, Lines(RESULTS / f"{grid.name}.jsonl").by_id))
    elif arguments.apart:
        describe(arguments.out)
    else:
        print(make(arguments))


def make(options: argparse.Namespace) -> Path:
    """Run the missing stages in ``options.out``. Return the folder of the mixture."""
    base, top = options.base or dense_folder(), options.out
    data = corpora.make(top / "data")
    files = {name: str(data / f"{name}-train.jsonl") for name in corpora.CORPORA}
    branches = []
    for name, file in files.items():
        change = {"data.train": file, "pst.modules_to_save": ["mlp"], "train.num_steps": options.steps}
        change |= {"model.path": str(base), "train.head_learning_rate": options.rate}
        branches.append(trained(top / "branches" / name / "dense", change, options))
    mixed = top / "mixture"
    if not mixed.is_dir():
        mix(base, branches, list(files.values()), options.per_token, mixed)
    sources = [{"path": file, "weight": 1 / len(files)} for file in files.values()]
    change = {"data.sources": sources, "pst.modules_to_save": ["mlp.gate"], "train.num_steps": options.router_steps}
    change |= {"model.path": str(mixed)}
    return trained(top / "dense", change | {"train.head_learning_rate": options.router_rate}, options)


def trained(out: Path, change: dict[str, Any], options: argparse.Namespace) -> Path:
    """Train :data:`RUN_FILE` with changed settings, resuming, and export the result as ``out``, unless it is there."""
    if not out.is_dir():
        run = out.with_name("run")
        change |= {"output_dir": str(run), "seed": options.seed}
        settings = [*(f"{key}={toml(value)}" for key, value in change.items()), *options.set]
        verb("train", str(RUN_FILE), "--resume", *(part for setting in settings for part in ("--set", setting)))
        verb("export", str(run), "--out", str(out))
        shutil.rmtree(run / CHECKPOINTS)
    return out


def toml(value: Any) -> str:
    """Return strings, numbers, and lists of them or of tables as TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {toml(inner)}' for key, inner in value.items())}}}"
    return json.dumps(value)


def mix(base: Path, branches: list[Path], files: list[str], per_token: int, out: Path) -> None:
    """Write ``out``, atomically: the mixture of the branches with fitted routers, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    samples = [sequences(tokenizer, Path(file), FITTED) for file in files]
    routers = fitted_routers(LlamaForCausalLM.from_pretrained(base), samples)
    models = [LlamaForCausalLM.from_pretrained(branch) for branch in branches]
    with atomic_folder(out) as partial:
        mixture(models, routers, per_token).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def sequences(tokenizer: PreTrainedTokenizerBase, file: Path, most: int) -> Tensor:
    """Return the first ``most`` sequences of a corpus (B, T), fewer if it is shorter."""
    text = tokenizer.eos_token.join(json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines())
    ids = torch.tensor(tokenizer(text)["input_ids"][: most * SEQUENCE])
    return ids[: len(ids) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)


def describe(top: Path) -> None:
    """Print how far the experts are apart, and for each corpus its loss and the share of tokens of every expert."""
    model, tokenizer = MixtralForCausalLM.from_pretrained(top / "dense"), AutoTokenizer.from_pretrained(top / "dense")
    apart = torch.tensor(list(distances(model).values()))
    print(f"apart: {apart.mean():.3f} of the mean expert's norm, {apart.min():.3f} to {apart.max():.3f} by stack")
    print(f"{'':12}loss   share of tokens by expert, mean of blocks: {' '.join(corpora.CORPORA)}")
    for name in corpora.CORPORA:
        rows = sequences(tokenizer, top / "data" / f"{name}-test.jsonl", DESCRIBED)
        loss, shares = loss_and_shares(model, rows)
        print(f"{name:12}{loss:.3f}  {' '.join(f'{share:.2f}' for share in shares.mean(0))}")


if __name__ == "__main__":
    main()
