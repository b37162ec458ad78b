"""Fixtures: a checkpoint of a pruned model that was not trained, which is quick to make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pst_ds.checkpoint.format import Checkpoint, CheckpointState, read_checkpoint
from pst_ds.checkpoint.restore import magnitude_scales, trainable
from pst_ds.config.pst import PSTConfig
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel.engine import build_engine
from tests.checkpoint.small_engine import save_checkpoint
from tests.exporting import export_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Pruned:
    """A model with PST modules, its base and its checkpoint."""

    model: Any
    checkpoint: Checkpoint
    tokenizer: Any
    base: Path

    def export(self, out: Path, **settings: Any) -> dict[str, Any]:
        return export_checkpoint(self.model, self.checkpoint, self.tokenizer, out, **settings)

    def masked_weights(self) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": layer.masked_weight() for name, layer in pst_layers(self.model).items()}


def prune(
    folder: Path, model: Any, *, sparsity: float = 0.5, pattern: str = "matrix", precision: str = "fp32"
) -> Pruned:
    """``model`` with masks at ``sparsity``, saved as a base and a checkpoint in ``folder``."""
    model.save_pretrained(folder / "base")
    inject_pst(model, PSTConfig(pattern=pattern))
    update_masks(model, sparsity)
    with torch.no_grad():  # an update that shows
        for layer in pst_layers(model).values():
            layer.pst_V.normal_(std=0.02)
    state = CheckpointState(
        step=3, sparsity=sparsity, masks_frozen=True, precision=precision, device_type="cpu",
        base_path=str(folder / "base"), base_fingerprint="f00d", labels=[], magnitude_scales=magnitude_scales(model),
        metrics={"loss": 1.5},
    )  # fmt: skip
    params = [{"params": [param for _, param in trainable(model)], "name": "all"}]
    save_checkpoint(folder / "checkpoint", build_engine(model, params, ds_config=None), state)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/data/tiny-llama")
    return Pruned(model, read_checkpoint(folder / "checkpoint"), tokenizer, folder / "base")


def tiny_llama(*, tied: bool = False, hidden: int = 24, layers: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    """Of 24 and 36 inputs, so that rows do not all end with a byte."""
    config = LlamaConfig(
        vocab_size=67, hidden_size=hidden, intermediate_size=hidden * 3 // 2, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def tiny_gpt2() -> Any:
    """Its layers are stored (I, O) and q, k and v are fused; its head is tied."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=20, n_layer=2, n_head=2, n_positions=32))


@pytest.fixture(scope="session")
def make_pruned() -> Callable[..., Pruned]:
    return prune


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pruned]:
    """Pruned tiny models by name."""
    torch.manual_seed(4)
    made = {
        "llama": prune(tmp_path_factory.mktemp("llama"), tiny_llama()),
        "2:4": prune(tmp_path_factory.mktemp("two-four"), tiny_llama(tied=True), pattern="2:4"),
        "bf16": prune(
            tmp_path_factory.mktemp("bf16"), tiny_llama(hidden=64, dtype=torch.bfloat16), sparsity=0.8, precision="bf16"
        ),
        "gpt2": prune(tmp_path_factory.mktemp("gpt2"), tiny_gpt2(), sparsity=0.7),
    }
    return made
