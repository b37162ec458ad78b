"""Mixture of experts and other matrices that are no linear layers: refused by name, or left dense on purpose."""

import json
import re

import pytest
import torch
import transformers
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.errors import InputError
from pst_ds.nn.inject import inject_pst, layers_never_called, pst_layers
from pst_ds.nn.model_structure import loose_matrices, router_names
from pst_ds.nn.targets import InjectionError, listed, resolve_targets
from pst_ds.prune.blocks import find_blocks

TINY = {
    "vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 10, "max_position_embeddings": 16,
}  # fmt: skip
ATTENTION = [f"self_attn.{n}_proj" for n in "qkvo"]


def qwen2_moe():
    config = transformers.Qwen2MoeConfig(
        **TINY,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=9,
        pad_token_id=19,
    )
    return transformers.Qwen2MoeForSequenceClassification(config)


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY, num_local_experts=4))


def phimoe():
    """Its router is a subclass of nn.Linear."""
    return transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**TINY, num_local_experts=4))


def llama4():
    """transformers lets no other code compute its experts."""
    config = transformers.Llama4TextConfig(
        **TINY, head_dim=6, num_local_experts=4, intermediate_size_mlp=10, interleave_moe_layer_step=1
    )
    return transformers.Llama4ForCausalLM(config)


def jetmoe():
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**TINY, num_local_experts=4, kv_channels=6))


def xlnet():
    """No experts: q, k, v and o are Parameters (width, heads, head width)."""
    config = transformers.XLNetConfig(vocab_size=20, d_model=12, n_layer=2, n_head=2, d_inner=10)
    return transformers.XLNetForSequenceClassification(config)


def names(model, **settings):
    return [target.name for target in resolve_targets(model, PSTConfig(**settings))]


@pytest.mark.parametrize(
    ("build", "owner", "shape", "dense", "excluded"),
    [
        (llama4, "feed_forward.experts (Llama4TextExperts) has gate_up_proj", (4, 12, 20), 4 * 360, ["experts"]),
        (
            jetmoe, "mlp.input_linear (JetMoeParallelExperts) has weight", (4, 20, 12), 4 * (360 + 2 * 12 * 6),
            ["input_linear", "output_linear"],
        ),
        (xlnet, "rel_attn (XLNetRelativeAttention) has q", (12, 2, 6), 5 * 12 * 12 + 2 * 12, ["rel_attn"]),
    ],
)  # fmt: skip
def test_stacks_of_matrices_are_refused_by_name_shape_and_number(build, owner, shape, dense, excluded):
    with pytest.raises(InjectionError) as caught:
        inject_pst(build(), PSTConfig())
    message = str(caught.value)
    first = f"{owner} of shape {shape}, a stack of matrices outside any linear layer"
    assert re.match(rf"(model\.layers|transformer\.layer)\.0\.{re.escape(first)}", message)
    assert f" {2 * dense:,} weights would stay dense" in message
    assert message.endswith(f"exclude_modules = {listed(excluded)}")


_MAMBA = {"vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 2, "state_size": 8}
_JAMBA = {**TINY, "num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False,
          "mamba_d_state": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "config", "mixer"),
    [("Mamba", _MAMBA, "mixer"), ("FalconMamba", _MAMBA, "mixer"), ("Jamba", _JAMBA, "mamba")],
)
def test_states_of_mamba_layers_are_excluded_as_the_message_says(family, config, mixer):
    """The mixers' linear layers are pruned then, and every pruned one is called."""
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config))
    with pytest.raises(InjectionError, match=r"has A_log of shape .*, a matrix or a state outside") as caught:
        names(model)
    suggested = tuple(json.loads(str(caught.value).rpartition("exclude_modules = ")[2]))
    assert suggested == ("A_log", "dt_proj")
    found = names(model, exclude_modules=suggested)
    assert [name.rpartition(".")[2] for name in found if f".0.{mixer}." in name] == ["in_proj", "x_proj", "out_proj"]
    inject_pst(model.train(), PSTConfig(exclude_modules=suggested))
    model(input_ids=torch.arange(8).view(2, 4))
    assert not [name for name in layers_never_called(model) if mixer in name]


def gemma3n(shared):
    """Its last ``shared`` layers use keys and values of those before."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3nTextConfig(
        **{**TINY, "num_hidden_layers": 4, "intermediate_size": [10] * 4}, head_dim=6, layer_types=kinds,
        num_kv_shared_layers=shared, hidden_size_per_layer_input=6, laurel_rank=4, vocab_size_per_layer_input=20,
        activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    return transformers.Gemma3nForCausalLM(config)


def test_a_list_of_projections_next_to_the_blocks_is_no_stack_of_blocks():
    found = names(model := gemma3n(0))
    assert len(model.model.altup_projections) == 3
    assert find_blocks(model, found)[0] == "model.layers"
    assert not any("altup_projections" in name or "altup_unembed" in name for name in found)
    assert "model.layers.0.altup.modality_router" in found


def test_blocks_that_use_keys_and_values_of_others_are_not_replayed_alone():
    model = gemma3n(2)
    with pytest.raises(InputError, match=r'num_kv_shared_layers = 2: .* Set method = "magnitude"'):
        find_blocks(model, names(model))


def test_blocks_with_two_layers_of_the_cache_run_once():
    """LongCat-Flash's blocks have two attentions, and its config counts those."""
    config = transformers.LongcatFlashConfig(
        vocab_size=20, hidden_size=12, ffn_hidden_size=16, expert_ffn_hidden_size=8, num_layers=2,
        num_attention_heads=2, n_routed_experts=2, zero_expert_num=1, moe_topk=1, kv_lora_rank=4, q_lora_rank=4,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6, head_dim=4,
    )  # fmt: skip
    model = transformers.LongcatFlashForCausalLM(config)
    stack, blocks = find_blocks(model, names(model, exclude_modules=("experts",)))
    assert (stack, len(blocks), config.num_hidden_layers) == ("model.layers", 2, 4)


def test_blocks_that_run_in_cycles_are_not_replayed_alone():
    """ALBERT's only group of layers is a block for each of its layers."""
    config = transformers.AlbertConfig(
        vocab_size=20, embedding_size=8, hidden_size=12, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = transformers.AlbertForMaskedLM(config)
    with pytest.raises(InputError, match="a block that runs more than once"):
        find_blocks(model, names(model))


def test_qwen2_moe_with_its_experts_left_dense():
    model = inject_pst(qwen2_moe(), PSTConfig(exclude_modules=("experts",)))
    linears = [*ATTENTION, *(f"mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down"))]
    assert list(pst_layers(model)) == [f"model.layers.{i}.{n}" for i in range(2) for n in linears]
    for layer in model.model.layers:
        assert isinstance(layer.mlp.shared_expert_gate, nn.Linear)  # a router of one
        for dense in (layer.mlp.experts, layer.mlp.gate, layer.mlp.shared_expert_gate):
            assert not any(p.requires_grad for p in dense.parameters())
    model.train()
    loss = model(input_ids=torch.arange(8).view(2, 4), labels=torch.tensor([0, 1])).loss
    loss.backward()
    factors = [p for layer in pst_layers(model).values() for _, p in layer.factor_parameters()]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in factors)


@pytest.mark.parametrize("build", [mixtral, phimoe])
def test_routers_stay_dense_until_they_are_named(build):
    model = build()
    routers = {n for n, m in model.named_modules() if type(m).__name__.endswith("TopKRouter")}
    assert len(routers) == 2
    assert router_names(model) == routers
    assert names(model, exclude_modules=("experts",)) == [f"model.layers.{i}.{n}" for i in range(2) for n in ATTENTION]


def test_a_linear_router_is_pruned_when_it_is_named():
    targets = names(qwen2_moe(), target_modules=("q_proj", "shared_expert_gate"))
    assert [t.rpartition(".")[2] for t in targets] == ["q_proj", "shared_expert_gate"] * 2


def test_naming_the_targets_oneself_needs_no_exclusion():
    assert names(mixtral(), target_modules=("q_proj",)) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)


class Block(nn.Module):
    """Experts in a ModuleList, a linear router beside them, and other Parameters."""

    def __init__(self, **parameters):
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(Expert() for _ in range(3))
        self.other = nn.Module()
        for name, shape in parameters.items():
            self.other.register_parameter(name, nn.Parameter(torch.ones(shape)))


def blocks(**parameters):
    return nn.ModuleDict({"layers": nn.ModuleList([Block(**parameters), Block(**parameters)])})


def test_experts_that_are_linear_layers_are_pruned_and_their_router_is_not():
    assert names(blocks()) == [
        f"layers.{i}.experts.{e}.{n}" for i in range(2) for e in range(3) for n in ("up", "down")
    ]


@pytest.mark.parametrize("shape", [(6,), (1, 1, 6), (60, 1, 4), (6, 1), (4, 6)], ids=str)
def test_vectors_kernels_and_small_tables_are_no_matrices_to_prune(shape):
    assert len(names(blocks(scale=shape))) == 12


@pytest.mark.parametrize(
    ("shape", "kind"), [((2, 3, 4), "a stack of matrices"), ((9, 6), "a matrix or a state")], ids=str
)
def test_what_is_as_large_as_a_pruned_layer_is_refused(shape, kind):
    model = blocks(weight=shape)
    with pytest.raises(InjectionError, match=rf"layers\.0\.other \(Module\) has weight of shape .*, {kind} outside"):
        names(model)
    assert len(names(model, exclude_modules=("other",))) == 12
    assert len(names(model, modules_to_save=("other",))) == 12


def test_convolutions_embeddings_and_what_is_outside_the_blocks_are_no_loose_matrices():
    inside = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv1d(6, 6, 3), "table": nn.Embedding(30, 6)})])
    model = nn.ModuleDict({"layers": inside})
    model.register_parameter("latents", nn.Parameter(torch.ones(3, 4, 5)))
    assert loose_matrices(model) == []
