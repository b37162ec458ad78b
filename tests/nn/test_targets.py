"""Which layers are pruned: PEFT's meaning of the names, and refusals that say what to do."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pst_ds.config.pst import Override, PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.linear import PSTLinear
from pst_ds.nn.model_structure import model_width
from pst_ds.nn.targets import InjectionError, modules_to_save, resolve_targets

ENCODER_LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
GPT2_LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LLAMA_LINEARS = (*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down")))
TINY = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def tiny_bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**TINY, max_position_embeddings=16))


def tiny_roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**TINY, max_position_embeddings=16))


def tiny_gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def tiny_gpt2_classifier() -> nn.Module:
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def tiny_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**TINY, max_position_embeddings=16))


def tiny_deberta() -> nn.Module:
    return DebertaV2ForSequenceClassification(DebertaV2Config(**TINY, max_position_embeddings=16))


def tiny_distilbert() -> nn.Module:
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=20, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=16)
    )


def tiny_masked_lm() -> nn.Module:
    return BertForMaskedLM(BertConfig(**TINY, max_position_embeddings=16))


DEBERTA_LINEARS = tuple(n.replace("query", "query_proj").replace("key", "key_proj").replace("value", "value_proj")
                        for n in ENCODER_LINEARS)  # fmt: skip
DISTILBERT_LINEARS = (*(f"attention.{n}_lin" for n in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2")
FAMILIES = {
    "deberta": (tiny_deberta, "deberta.encoder.layer", DEBERTA_LINEARS, ["pooler", "classifier"]),
    "distilbert": (tiny_distilbert, "distilbert.transformer.layer", DISTILBERT_LINEARS,
                   ["pre_classifier", "classifier"]),
    "masked-lm": (tiny_masked_lm, "bert.encoder.layer", ENCODER_LINEARS, []),
    "bert": (tiny_bert, "bert.encoder.layer", ENCODER_LINEARS, ["bert.pooler", "classifier"]),
    "roberta": (tiny_roberta, "roberta.encoder.layer", ENCODER_LINEARS, ["classifier"]),
    "gpt2": (tiny_gpt2, "transformer.h", GPT2_LINEARS, []),
    "gpt2-classifier": (tiny_gpt2_classifier, "transformer.h", GPT2_LINEARS, ["score"]),
    "llama": (tiny_llama, "model.layers", LLAMA_LINEARS, []),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)


class Toy(nn.Module):
    """Two blocks, an embedding outside them, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.project_in = nn.Linear(6, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.classifier = nn.Linear(6, 2)


BLOCK_LINEARS = [f"layers.{i}.{n}_proj" for i in range(2) for n in "qv"]


def names(model: nn.Module, **settings) -> list[str]:
    return [target.name for target in resolve_targets(model, PSTConfig(**settings))]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_inside_the_blocks(family):
    build, blocks, linears, heads = FAMILIES[family]
    model = build()
    expected = [f"{blocks}.{i}.{linear}" for i in range(2) for linear in linears]
    assert names(model) == expected
    assert list(modules_to_save(model, PSTConfig())) == heads
    inject_pst(model, PSTConfig())
    assert list(pst_layers(model)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_and_the_task_head_alone_are_trained(family):
    build, _, _, heads = FAMILIES[family]
    model = inject_pst(build(), PSTConfig())
    for name, param in model.named_parameters():
        is_factor = ".pst_" in name and not name.endswith("pst_mask")
        assert param.requires_grad == (is_factor or name.startswith(tuple(f"{head}." for head in heads))), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_width_is_the_hidden_size_injected_or_not(family):
    model = FAMILIES[family][0]()
    assert model_width(model) == model_width(inject_pst(model, PSTConfig())) == 16


def test_gpt2_fuses_q_k_v_alone():
    layouts = {t.name.rpartition(".")[2]: t.layout for t in resolve_targets(tiny_gpt2(), PSTConfig())}
    assert {n: (layout.num_matrices, layout.transposed) for n, layout in layouts.items()} == {
        "c_attn": (3, True),
        "c_proj": (1, True),
        "c_fc": (1, True),
    }
    unfused = resolve_targets(tiny_gpt2(), PSTConfig(fused_modules=()))
    assert {t.layout.num_matrices for t in unfused} == {1}


def test_bert_base_trains_2_820_096_numbers():
    with torch.device("meta"):
        model = BertModel(BertConfig())
    inject_pst(model, PSTConfig(score_rank=8, update_rank=8, relative_magnitude=False))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_820_096


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, BLOCK_LINEARS),
        ({"target_modules": ("q_proj",)}, BLOCK_LINEARS[::2]),
        ({"target_modules": ("q_proj", "1.v_proj")}, ["layers.0.q_proj", "layers.1.q_proj", "layers.1.v_proj"]),
        ({"target_modules": ("layers.0.v_proj", "project_in")}, ["project_in", "layers.0.v_proj"]),
        ({"target_modules": r".*\.1\.[qv]_proj"}, BLOCK_LINEARS[2:]),
        ({"target_modules": r"layers\.0\.q_proj"}, ["layers.0.q_proj"]),
        ({"exclude_modules": ("v_proj",)}, BLOCK_LINEARS[::2]),
        ({"exclude_modules": r"layers\.0\..*"}, BLOCK_LINEARS[2:]),
        ({"target_modules": ("q_proj", "v_proj"), "exclude_modules": ("layers.1.q_proj",)},
         ["layers.0.q_proj", "layers.0.v_proj", "layers.1.v_proj"]),
        ({"modules_to_save": ("layers.0",)}, BLOCK_LINEARS[2:]),
        ({"modules_to_save": ("q_proj",)}, BLOCK_LINEARS[1::2]),
        ({"target_modules": ("classifier", "q_proj")}, BLOCK_LINEARS[::2]),
        ({"target_modules": ("classifier",), "modules_to_save": ()}, ["classifier"]),
    ],
    ids=repr,
)  # fmt: skip
def test_names_mean_what_they_mean_in_peft(settings, expected):
    assert names(Toy(), **settings) == expected


@pytest.mark.parametrize("pattern", ["q_proj", r"layers\.0\.q", ("proj",), ("layers.0.q",)], ids=repr)
def test_a_pattern_must_match_the_whole_name_or_a_dotted_ending(pattern):
    with pytest.raises(InjectionError, match="matched no linear layer"):
        names(Toy(), target_modules=pattern)


def test_modules_to_save_are_trained_in_full():
    model = inject_pst(Toy(), PSTConfig(modules_to_save=("norm", "project_in")))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".pst_" not in n}
    modules = ["project_in", "layers.0.norm", "layers.1.norm"]
    assert trained == {f"{m}.{p}" for m in modules for p in ("weight", "bias")}


def test_an_empty_list_trains_no_head():
    model = inject_pst(Toy(), PSTConfig(modules_to_save=()))
    assert not model.classifier.weight.requires_grad


def test_nothing_matches_names_the_layers_seen_and_a_near_miss():
    with pytest.raises(InjectionError) as caught:
        names(Toy(), target_modules=("q_porj",))
    message = str(caught.value)
    assert "target_modules ['q_porj'] matched no linear layer" in message
    assert "Did you mean 'q_proj'?" in message
    assert "Names seen: project_in, q_proj, v_proj, classifier" in message


@pytest.mark.parametrize(
    "options", [{"target_modules": "q_proj"}, {"overrides": (Override(modules="q_proj", pattern="row"),)}]
)
def test_a_name_as_a_string_is_told_from_a_list_of_it(options):
    with pytest.raises(InjectionError, match=r'for the layers of that name write \["q_proj"\]'):
        inject_pst(Toy(), PSTConfig(**options))


def test_unknown_modules_to_save_are_refused_with_a_near_miss():
    with pytest.raises(InjectionError, match=r"modules_to_save names 'clasifier'.*Did you mean 'classifier'"):
        names(Toy(), modules_to_save=("clasifier",))


def test_a_module_that_is_not_linear_is_refused_by_name():
    with pytest.raises(InjectionError, match=r"matches layers\.0\.norm, which is a LayerNorm and not a linear layer"):
        names(Toy(), target_modules=("norm",))


def test_tied_weights_are_refused_by_name():
    with pytest.raises(InjectionError, match=r"lm_head\.weight is tied to transformer\.wte\.weight.*exclude_modules"):
        names(tiny_gpt2(), target_modules=("lm_head",))


def test_two_targets_with_one_weight_are_refused():
    model = Toy()
    model.layers[1].q_proj.weight = model.layers[0].v_proj.weight
    with pytest.raises(InjectionError, match=r"is tied to layers\.[01]\.[qv]_proj\.weight"):
        names(model)
    assert names(model, exclude_modules=("layers.1.q_proj", "layers.0.v_proj")) == [BLOCK_LINEARS[0], BLOCK_LINEARS[3]]


def test_an_excluded_layer_may_not_share_a_targets_weight():
    model = Toy()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    with pytest.raises(InjectionError, match=r"layers\.0\.q_proj\.weight is tied to layers\.1\.q_proj\.weight"):
        names(model, exclude_modules=("layers.1.q_proj",))


def test_a_module_under_two_parents_is_replaced_in_both():
    model = Toy()
    model.layers[1].q_proj = model.layers[0].q_proj
    inject_pst(model, PSTConfig())
    assert isinstance(model.layers[0].q_proj, PSTLinear)
    assert model.layers[1].q_proj is model.layers[0].q_proj
    assert list(pst_layers(model)) == [BLOCK_LINEARS[0], BLOCK_LINEARS[1], BLOCK_LINEARS[3]]


def test_a_module_held_twice_by_one_parent_is_replaced_in_both():
    model = Toy()
    model.layers[0].v_proj = model.layers[0].q_proj
    inject_pst(model, PSTConfig())
    assert isinstance(model.layers[0].v_proj, PSTLinear)
    assert model.layers[0].v_proj is model.layers[0].q_proj


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_refused(dtype):
    model = Toy()
    quantised = nn.Parameter(torch.zeros(6, 6, dtype=torch.uint8).view(dtype), requires_grad=False)
    model.layers[1].v_proj.weight = quantised
    with pytest.raises(InjectionError, match=rf"layers\.1\.v_proj\.weight is {dtype}: quantised.*bfloat16"):
        names(model)
    assert names(model, exclude_modules=("layers.1.v_proj",)) == BLOCK_LINEARS[:3]


def test_a_weight_of_an_unexpected_shape_is_refused():
    model = Toy()
    model.layers[0].q_proj.weight = nn.Parameter(torch.zeros(3, 12))
    with pytest.raises(InjectionError, match=r"layers\.0\.q_proj\.weight has shape \(3, 12\), not the \(6, 6\)"):
        names(model)


def test_an_all_zero_weight_is_refused():
    model = Toy()
    nn.init.zeros_(model.layers[1].q_proj.weight)
    with pytest.raises(InjectionError, match=r"layers\.1\.q_proj\.weight is all zeros; leave it out"):
        inject_pst(model, PSTConfig())


def test_a_refused_model_is_left_as_it_was():
    model = Toy()
    nn.init.zeros_(model.layers[1].q_proj.weight)
    with pytest.raises(InjectionError):
        inject_pst(model, PSTConfig())
    assert not pst_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_injecting_twice_is_refused():
    model = inject_pst(Toy(), PSTConfig())
    with pytest.raises(InjectionError, match="already has PST modules"):
        inject_pst(model, PSTConfig())


def test_training_mode_is_kept():
    model = Toy()
    model.layers[0].eval()
    inject_pst(model, PSTConfig())
    assert not model.layers[0].q_proj.training
    assert model.layers[1].q_proj.training


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_base_weight_that_is_not_finite_is_refused_by_name(bad):
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})
    model["layers"][1].weight.data[3, 3] = bad
    with pytest.raises(InjectionError, match=r"layers\.1\.weight has NaN or infinite values"):
        inject_pst(model, PSTConfig())


def _linear_model(inputs, outputs):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(inputs, outputs)])
    return model


def test_a_pattern_that_does_not_divide_names_the_layer_the_number_and_the_fix():
    with pytest.raises(InjectionError) as caught:
        inject_pst(_linear_model(6, 8), PSTConfig(pattern="2:4", modules_to_save=()))
    assert "layers.0: pattern 2:4 needs in_features divisible by 4, got 6" in str(caught.value)
    assert 'exclude_modules = ["layers.0"]' in str(caught.value)


def test_an_override_for_no_layer_is_refused():
    config = PSTConfig(modules_to_save=(), overrides=(Override(modules=("q_proj",), pattern="row"),))
    with pytest.raises(InjectionError, match=r"overrides for \['q_proj'\] match none of the pruned layers"):
        inject_pst(_linear_model(4, 8), config)
