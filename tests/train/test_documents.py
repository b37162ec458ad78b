"""Documents packed into one sequence do not see each other, and a model that cannot keep them apart is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pst_ds.cli.main import main
from pst_ds.data.tasks.causal_lm import Sequences, collate_sequences
from pst_ds.data.tokens.borders import Starts
from pst_ds.train.sequences.documents import flatten_packed_rows

_SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": _SMALL, "qwen2": _SMALL, "qwen3": _SMALL, "phi3": _SMALL, "gemma2": {**_SMALL, "sliding_window": 5},
    "gemma3_text": {**_SMALL, "sliding_window": 5}, "granite": _SMALL, "olmo2": _SMALL, "gpt2": _GPT2,
    "gpt_neox": {key: value for key, value in _SMALL.items() if key not in ("num_key_value_heads", "head_dim")},
}  # fmt: skip


def _model(family):
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.use_cache = False
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.normal_(std=0.3)  # small ones as drawn by transformers would hide a leak
    return model


def _packed(*lengths):
    """One sequence of documents of these lengths, and the documents."""
    tokens = np.random.default_rng(5).integers(3, 64, sum(lengths)).astype(np.int32)
    starts = np.cumsum([0, *lengths[:-1]])
    sequences = Sequences(tokens, len(tokens), borders=Starts(starts))
    return collate_sequences(sequences, [0]), [
        torch.from_numpy(part.astype(np.int64)) for part in np.split(tokens, starts[1:])
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_packed_document_has_the_logits_that_it_has_alone(family):
    model, (batch, documents) = _model(family), _packed(7, 12, 1, 9)
    alone = torch.cat([model(input_ids=document[None]).logits[0] for document in documents])
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()
    leaking = model(input_ids=batch["input_ids"]).logits[0]
    assert (leaking - alone).abs().max() > 1e-2 * alone.abs().max()  # so that the comparison could have failed


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_made_one_give_the_same_loss_and_gradients(family):
    one, other = _model(family), _model(family)
    flatten_packed_rows(other)
    seen = []
    other.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    tokens = np.random.default_rng(8).integers(3, 64, 36).astype(np.int32)
    sequences = Sequences(tokens, 12, borders=Starts(np.array([0, 5, 13, 20, 24, 31])))
    batch = collate_sequences(sequences, [2, 0, 1])
    results = [model(**batch, output_hidden_states=True) for model in (one, other)]
    assert seen == [(1, 36)]
    torch.testing.assert_close(results[1].logits, results[0].logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1].loss, results[0].loss)
    assert [h.shape for h in results[1].hidden_states] == [h.shape for h in results[0].hidden_states]
    for result in results:
        result.loss.backward()
    for (name, param), (_, flat) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(flat.grad, param.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mask", [True, False])
def test_a_model_that_reads_on_from_document_to_document_is_refused(mask, tmp_path, capsys):
    from transformers import AutoTokenizer

    config = AutoConfig.for_model(
        "opt", vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    AutoTokenizer.from_pretrained("tests/data/tiny-llama").save_pretrained(tmp_path / "opt")
    settings = {
        "output_dir": tmp_path / "run", "model.path": tmp_path / "opt", "deepspeed_config": "",
        "train.num_steps": 1, "data.document_mask": str(mask).lower(), "data.max_length": 16,
    }  # fmt: skip
    code = main(["train", "tests/data/causal_lm.toml", "--quiet", *(f"--set={k}={v}" for k, v in settings.items())])
    said = capsys.readouterr().err
    assert code == (2 if mask else 0), said
    assert ("(opt) reads on from one document to the next" in said) == mask
