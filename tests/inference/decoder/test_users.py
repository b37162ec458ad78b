"""Users of the native decoder: each token of a mixed batch is as if its user were alone, and as in transformers."""

import copy
import weakref

import pytest
import torch

from pst_ds.inference.decoder import Decoder, DecoderError
from pst_ds.nn.personal_updates import LEFT, RIGHT
from pst_ds.runtime import native_loop
from pst_ds.runtime.native_loop import LEVELS
from tests.inference.decoder.test_decoder_families import _model
from tests.pairs import every_pair
from tests.runtime.test_native_loop import AVAILABLE

BETA = 0.7
ODD = {"hidden_size": 52, "head_dim": 12, "intermediate_size": 75}
"""Sizes that are not multiples of a vector."""


def _state(model, seed, dtype, rank=5):
    rng, state = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            state[f"{name}.{LEFT}"] = (0.2 * torch.randn(module.out_features, rank, generator=rng)).to(dtype)
            state[f"{name}.{RIGHT}"] = (0.2 * torch.randn(rank, module.in_features, generator=rng)).to(dtype)
    return state


def _merged(model, state):
    """A copy of the model with W + beta U V in the place of each W."""
    merged = copy.deepcopy(model)
    for name in {name.rpartition(".")[0] for name in state or ()}:
        weight = merged.get_submodule(name).weight.data
        weight += BETA * state[f"{name}.{LEFT}"].float() @ state[f"{name}.{RIGHT}"].float()
    return merged


def _decoder(model, sequences=1, **options):
    decoder = Decoder.from_model(model, 64, sequences=sequences, cache="fp32", verify=False, **options)
    decoder._beta = BETA
    return decoder


@every_pair
@pytest.mark.parametrize("level", AVAILABLE, ids=lambda level: LEVELS[level])
@pytest.mark.parametrize(("family", "sizes"), [("Llama", ODD), ("Phi3", {})], ids=["odd", "fused"])
def test_each_token_of_a_mixed_batch_is_as_alone_and_as_in_transformers(level, family, sizes, monkeypatch):
    monkeypatch.setattr(native_loop, "best_level", lambda: level)
    model = _model(family, **sizes)
    fp32, bf16 = (_state(model, seed, dtype) for seed, dtype in ((1, torch.float32), (2, torch.bfloat16)))
    states, ids = [fp32, None, bf16, fp32], torch.randint(0, 97, (4, 22))
    decoder = _decoder(model, 4, threads=2)
    for sequence, state in enumerate(states):
        decoder.assign(state, sequence)
    parts = [[decoder.forward(row[:13], sequence=sequence, all_logits=True)] for sequence, row in enumerate(ids)]
    for i in range(13, 22):
        for part, logits in zip(parts, decoder.step(ids[:, i]), strict=True):
            part.append(logits[None])
    mixed = [torch.cat(part) for part in parts]
    for row, state, got in zip(ids, states, mixed, strict=True):
        alone = _decoder(model, threads=1)
        alone.assign(state)
        assert torch.equal(got, alone.forward(row, all_logits=True))
    assert torch.equal(mixed[1], _decoder(model).forward(ids[1], all_logits=True))
    with torch.no_grad():
        expected = [
            _merged(model, state)(input_ids=row[None], use_cache=False).logits[0]
            for row, state in zip(ids, states, strict=True)
        ]
    for got, wanted in zip(mixed, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))


def test_users_do_not_share_what_is_cached():
    model = _model("Llama")
    one, other = (_state(model, seed, torch.float32) for seed in (1, 2))
    decoder, ids = _decoder(model, 2), list(range(20))
    decoder.assign(one)
    first = decoder.forward(ids)
    decoder.assign(one)
    assert decoder.length == 20
    for state in (None, other, dict(one)):
        decoder.assign(state, 1)
        with pytest.raises(ValueError, match="different users"):
            decoder.copy(0, 1, 20)
    decoder.assign(one, 1)
    decoder.copy(0, 1, 19)
    assert torch.equal(decoder.forward(ids[19:], sequence=1), first)
    adapter = weakref.ref(decoder._adapters[0])
    decoder.assign(other)
    assert decoder.length == 0
    assert not torch.equal(decoder.forward(ids), first)
    assert adapter() is decoder._adapters[1]
    decoder.assign(None, 1)
    assert adapter() is None  # freed with the last sequence that used it


@pytest.mark.parametrize(("changed", "said"), [
    ({f"lm_head.{LEFT}": (97, 5), f"lm_head.{RIGHT}": (5, 48)}, "has no place for the users' updates of lm_head"),
    ({f"model.layers.1.mlp.up_proj.{LEFT}": (80, 4)}, "another shape than the users' updates of model.layers.1.mlp.up"),
    ({f"model.layers.0.self_attn.k_proj.{RIGHT}": (5, 24)}, "another shape"),
])  # fmt: skip
def test_states_that_do_not_fit_are_refused(changed, said):
    """Before C++ reads or writes by their shapes."""
    model = _model("Llama")
    decoder, state = _decoder(model), _state(model, 1, torch.float32)
    with pytest.raises(DecoderError, match=said):
        decoder.assign(state | {name: torch.zeros(shape) for name, shape in changed.items()})
