"""Training with one parameter for all factors moves them as training with a tensor per factor does, bit for bit."""

from __future__ import annotations

import pytest
import torch

from pst_ds.checkpoint.restore import trainable
from pst_ds.config.pst import PSTConfig
from pst_ds.nn.flat_factors import flatten_factors
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.optimizer import pst_parameter_groups
from pst_ds.parallel import optimizer_state, sharding
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.optimizer_state import KINDS
from pst_ds.parallel.ranks import rank

STEPS = 3
VOCABULARY = 32
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}


def _decoder():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=VOCABULARY, attention_dropout=0.0, use_cache=False, **SIZES)
    return LlamaForCausalLM(config)


def _encoder_with_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config)


MODELS = {"a decoder": _decoder, "an encoder with a decoder": _encoder_with_decoder}


def _trained(kind: str, stage: int, is_flat: bool, recomputes: str):
    """Train on this rank; return what is trained by name: its master, the parts of the optimizer state, and counts."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    # an update from the first step on: with zeros in U or V, the scores of neither would matter
    model = inject_pst(
        model, PSTConfig(score_rank=2, update_rank=3, update_init="normal"), num_shards=2 if stage == 3 else 1
    )
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": recomputes == "reentrant"})
    model.train()
    groups = pst_parameter_groups(model, score_learning_rate=1e-2, update_learning_rate=3e-2, head_learning_rate=1e-2)
    if is_flat:
        flatten_factors(model, groups)
    num_tensors = sum(len(group["params"]) for group in groups)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": False},
        "zero_optimization": zero,
    }
    engine = build_engine(model, groups, ds_config=config)
    generator = torch.Generator().manual_seed(rank())
    for _ in range(2 * STEPS):
        tokens = torch.randint(VOCABULARY, (2, 6), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    named = trainable(engine.module)
    masters = sharding.fp32_masters([param for _, param in named])
    fragments = optimizer_state.local_fragments(engine, named)
    held = {}
    for state in KINDS:
        for fragment, values in zip(fragments, optimizer_state.values(engine, fragments, state), strict=True):
            held[state, fragment.name, fragment.start] = values.clone()
    layers = [layer.factor_names for layer in pst_layers(engine.module).values()]
    return {name: master.clone() for (name, _), master in zip(named, masters, strict=True)}, held, num_tensors, layers


def _whole(by_rank: list, state: str, masters: dict) -> dict:
    """Return the values of all ranks' fragments in their places, and check that each value is held once."""
    whole = {}
    for name, master in masters.items():
        flat = torch.full((master.numel(),), float("nan"))
        times = torch.zeros(master.numel(), dtype=torch.int)
        for _, held, *_ in by_rank:
            for (kind, of, start), values in held.items():
                if (kind, of) == (state, name):
                    flat[start : start + values.numel()] = values
                    times[start : start + values.numel()] += 1
        assert set(times.tolist()) == {1}, name
        whole[name] = flat
    return whole


@pytest.mark.zero3
@pytest.mark.parametrize("recomputes", ["", "reentrant", "not reentrant"])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", list(MODELS))
def test_masters_and_moments_equal_those_of_a_tensor_per_factor(kind, stage, recomputes, run_ranks):
    apart = run_ranks(_trained, 2, kind, stage, False, recomputes)
    flat = run_ranks(_trained, 2, kind, stage, True, recomputes)
    masters, _, tensors_apart, layers = apart[0]
    flat_masters, _, tensors_flat, _ = flat[0]
    assert list(flat_masters) == list(masters), "names, in the model's order"
    assert len(layers) * 6 <= tensors_apart
    assert tensors_flat <= tensors_apart - len(layers) * 6 + 2, "one parameter for the scores, and one for the updates"
    start = _untrained(kind)
    for name, master in masters.items():
        assert torch.equal(flat_masters[name], master), name
        assert not torch.equal(master, start[name]), f"{name} was trained"
    for state in KINDS:
        of_apart = _whole(apart, state, masters)
        of_flat = _whole(flat, state, masters)
        assert all(torch.equal(of_flat[name], of_apart[name]) for name in masters), state


def _untrained(kind: str) -> dict:
    torch.manual_seed(0)
    model = inject_pst(MODELS[kind](), PSTConfig(score_rank=2, update_rank=3, update_init="normal"))
    return {name: param.detach() for name, param in trainable(model)}
