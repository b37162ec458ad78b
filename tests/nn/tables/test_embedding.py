"""PSTEmbedding as a module: adopts its embedding, starts equal to it, and has the gradients of the formula."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from pst_ds.config.pst import PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.tables.embedding import PSTEmbedding, pst_embeddings
from pst_ds.nn.targets import InjectionError, find_embeddings
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine
from tests.pairs import every_pair

BOUND = 1e-6
ROWS, WIDTH, RANK, PADDING = 19, 24, 3, 2
BETA = 1.3
FACTORS = ["embed.pst_U", "embed.pst_V"]


class Toy(nn.Module):
    """Rows of two lookups in one embedding, through a layer to prune; loss is a weighted sum."""

    def __init__(self, checkpointing: bool = False):
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH, padding_idx=PADDING)
        self.position = nn.Embedding(5, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, 11)])
        self.classifier = nn.Linear(WIDTH, 2)
        self.checkpointing = checkpointing

    def rows(self, ids):
        return self.embed(ids) * self.embed(ids.flip(-1)) + self.position(torch.arange(ids.shape[-1]))

    def forward(self, ids, target):
        rows = checkpoint(self.rows, ids, use_reentrant=False) if self.checkpointing else self.rows(ids)
        return (torch.tanh(self.layers[0](rows)) * target).mean()


def injected(checkpointing: bool = False, *, num_shards: int | None = None, torch_seed: int = 0, **settings) -> Toy:
    torch.manual_seed(torch_seed)
    config = PSTConfig(**{"update_embeddings": ("embed",), "update_rank": RANK, "beta": BETA, **settings})
    return inject_pst(Toy(checkpointing), config, num_shards=num_shards)


def randomised(model: Toy) -> Toy:
    generator = torch.Generator().manual_seed(1)
    for param in (model.embed.pst_U, model.embed.pst_V):
        param.data.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return model


def batch(rank: int = 0, micro: int = 0):
    """(2, 5) row numbers, two of them the padding, and a target."""
    generator = torch.Generator().manual_seed(100 + 10 * rank + micro)
    ids = torch.randint(ROWS, (2, 5), generator=generator)
    ids[0, 3:] = PADDING
    return ids, torch.randn(2, 5, 11, generator=generator)


def reference(model: Toy, batches) -> dict[str, torch.Tensor]:
    """Float64 autograd of the loss, averaged over ``batches``; the linear layer multiplies with what it has."""
    values = {n: p.detach().double() for n, p in model.named_parameters()}
    left, right = (values[n].requires_grad_() for n in FACTORS)
    table = values["embed.weight"] + BETA * left @ right
    (layer,) = pst_layers(model).values()
    weight = layer.masked_weight().double()
    total = 0.0
    for ids, target in batches:
        first, second = (functional.embedding(i, table, padding_idx=PADDING) for i in (ids, ids.flip(-1)))
        rows = first * second + values["position.weight"]
        total = total + (torch.tanh(rows @ weight.t() + values["layers.0.bias"]) * target.double()).mean()
    (total / len(batches)).backward()
    return {"embed.pst_U": left.grad, "embed.pst_V": right.grad}


def assert_close(found, expected) -> None:
    for name in FACTORS:
        error = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert error <= BOUND, (name, float(error))


def test_adopts_the_weight_under_its_name():
    model = Toy()
    weight, names = model.embed.weight, set(model.state_dict())
    inject_pst(model, PSTConfig(update_embeddings=("embed",), update_rank=RANK))
    assert isinstance(model.embed, PSTEmbedding)
    assert model.embed.weight is weight
    added = {n for n in set(model.state_dict()) - names if n.startswith("embed")}
    assert added == set(FACTORS)
    assert names <= set(model.state_dict())
    trained = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("layers")}
    assert trained == {*FACTORS, "classifier.weight", "classifier.bias"}
    assert list(pst_embeddings(model)) == ["embed"]
    assert type(model.position) is nn.Embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_0_is_the_base_embedding(dtype):
    base = Toy().to(dtype).embed
    model = nn.ModuleDict({"embed": copy.deepcopy(base), "layers": nn.ModuleList([nn.Linear(4, 4)])})
    embedding = inject_pst(model, PSTConfig(update_embeddings=("embed",), update_init_scale=100.0))["embed"]
    ids = torch.arange(ROWS).view(1, -1)
    assert embedding(ids).dtype == embedding.pst_U.dtype == embedding.pst_V.dtype == dtype
    assert torch.equal(embedding(ids), base(ids))
    assert torch.equal(embedding.updated_weight(), base.weight)


@pytest.mark.parametrize(("kind", "std"), [("normal", 0.5), ("lora", 0.5 / (3 * WIDTH) ** 0.5)])
def test_shapes_and_start_of_the_factors(kind, std):
    embedding = injected(update_rank=16, update_init=kind, update_init_scale=0.5).embed
    assert embedding.pst_U.shape == (ROWS, 16)
    assert embedding.pst_V.shape == (16, WIDTH)
    assert embedding.num_factor_parameters == 16 * (ROWS + WIDTH)
    assert not embedding.pst_U.any()
    assert float(embedding.pst_V.detach().std()) == pytest.approx(std, rel=0.15)


def test_start_depends_on_seed_and_name_alone():
    first = injected().embed.pst_V
    assert torch.equal(first, injected(torch_seed=5, num_shards=3).embed.pst_V)
    assert not torch.equal(first, injected(seed=1).embed.pst_V)
    both = injected(update_embeddings=("embed", "position"))
    assert torch.equal(first, both.embed.pst_V)
    assert not torch.equal(first, both.position.pst_V)


def test_forward_is_the_rows_of_the_updated_weight():
    model = randomised(injected())
    table = model.embed.weight.double() + BETA * model.embed.pst_U.double() @ model.embed.pst_V.double()
    torch.testing.assert_close(model.embed.updated_weight().double(), table, rtol=1e-6, atol=1e-6)
    ids, _ = batch()
    assert torch.equal(model.embed(ids), model.embed.updated_weight()[ids])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_formula(checkpointing):
    model = randomised(injected(checkpointing))
    model(*batch()).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close(found, reference(model, [batch()]))
    assert not {n for n in found if n in ("embed.weight", "position.weight")}
    assert not found["embed.pst_U"][PADDING].any()


def test_bfloat16_factors_have_bfloat16_gradients():
    model = randomised(injected()).bfloat16()
    ids, target = batch()
    model(ids, target.bfloat16()).backward()
    assert {p.grad.dtype for p in (model.embed.pst_U, model.embed.pst_V)} == {torch.bfloat16}


def test_row_numbers_alone_are_saved_for_the_backward_pass():
    model = randomised(injected())
    ids, _ = batch()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.embed(ids)
    assert y.requires_grad
    assert [(t.data_ptr(), t.shape) for t in saved] == [(ids.data_ptr(), ids.shape)]


@every_pair
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_any_shape_of_row_numbers(shape, dtype):
    embedding = randomised(injected()).embed
    ids = torch.randint(ROWS, shape, dtype=dtype)
    y = embedding(ids)
    assert y.shape == (*shape, WIDTH)
    assert torch.equal(y, functional.embedding(ids, embedding.updated_weight()))
    y.sum().backward()
    assert embedding.pst_U.grad.any() == (ids != PADDING).any()


def _by_operator(embedding, ids):
    own = embedding.weight, embedding.pst_U, embedding.pst_V
    return torch.ops.pst_ds.updated_rows(ids, *own, embedding.beta, embedding.padding_idx)


@every_pair
@pytest.mark.parametrize("look_up", [lambda embedding, ids: embedding(ids), _by_operator], ids=["plain", "operator"])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 4)], ids=str)
def test_the_output_can_be_changed_in_place(look_up, shape):
    """Models add positions to the embeddings of tokens in place."""
    model, ids = randomised(injected()), torch.arange(math.prod(shape)).remainder(ROWS).view(shape)
    found = []
    for in_place in (True, False):
        rows = look_up(model.embed, ids)
        if in_place:
            rows += 1
        else:
            rows = rows + 1
        rows.square().sum().backward()
        found.append([rows.detach(), *(param.grad for param in (model.embed.pst_U, model.embed.pst_V))])
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("bad", [-1, ROWS])
def test_a_row_that_is_not_there_is_refused_as_by_the_base(bad):
    ids = torch.tensor([[0, bad]])
    for module in (Toy().embed, injected().embed):
        with pytest.raises(IndexError, match="out of range"):
            module(ids)


def test_an_embedding_under_two_parents_is_replaced_in_both():
    model = Toy()
    model.other = nn.ModuleDict({"embed": model.embed})
    inject_pst(model, PSTConfig(update_embeddings=("embed",)))
    assert model.other["embed"] is model.embed
    assert list(pst_embeddings(model)) == ["embed"]


def test_training_mode_is_kept():
    model = Toy()
    model.embed.eval()
    inject_pst(model, PSTConfig(update_embeddings=("embed", "position")))
    assert not model.embed.training
    assert model.position.training


def zero3_engine(world_size, accumulation=1, checkpointing=False):
    model = randomised(injected(checkpointing, num_shards=world_size, modules_to_save=()))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {
            "stage": 3, "reduce_bucket_size": 1 << 14, "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
        },
    }  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    return build_engine(model, [{"params": trained, "lr": 0.0}], ds_config=config)


def gradients(world_size, accumulation, checkpointing):
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    engine = zero3_engine(world_size, accumulation, checkpointing)
    for micro in range(accumulation):
        engine.backward(engine(*batch(dist.get_rank(), micro)))
        if micro < accumulation - 1:
            engine.step()
    values = dict(engine.module.named_parameters())
    return {n: safe_get_full_grad(values[n]).clone() for n in FACTORS}


@pytest.mark.zero3
@pytest.mark.parametrize(("world_size", "accumulation", "checkpointing"), [(2, 1, False), (2, 2, True)])
def test_zero3_gradients_match_float64(run_ranks, world_size, accumulation, checkpointing):
    batches = [batch(rank, micro) for rank in range(world_size) for micro in range(accumulation)]
    expected = reference(randomised(injected(modules_to_save=())), batches)
    for found in run_ranks(gradients, world_size, world_size, accumulation, checkpointing):
        assert_close(found, expected)


def embedding_gradients(world_size):
    """Of one lookup, behind the back of DeepSpeed, which would have the factors whole in the backward pass too."""
    embedding = (zero3_engine(world_size).module if world_size else randomised(injected())).embed
    factors = [embedding.pst_U, embedding.pst_V]
    ids, _ = batch()
    with sharding.gathered(embedding.parameters()):
        y = embedding.forward(ids)
    assert [sharding.is_released(p) for p in factors] == 2 * [world_size > 0]
    grads = torch.autograd.grad(y, factors, torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    assert [sharding.is_released(p) for p in factors] == 2 * [world_size > 0]
    return grads


@pytest.mark.zero3
def test_the_backward_pass_gathers_released_factors(run_ranks):
    expected = embedding_gradients(0)
    for found in run_ranks(embedding_gradients, 2, 2):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def refusal(model: nn.Module, *names: str, **settings) -> str:
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(InjectionError) as caught:
        inject_pst(model, PSTConfig(update_embeddings=names, **settings))
    assert not pst_layers(model)  # refused before anything is changed
    assert [p.requires_grad for p in model.parameters()] == before
    return str(caught.value)


def test_names_are_matched_as_a_list_of_targets_is():
    model = nn.ModuleDict({"a": Toy(), "b": Toy()})
    for names, expected in (
        ((), []),
        (("embed",), ["a.embed", "b.embed"]),
        (("b.position", "a.embed"), ["a.embed", "b.position"]),
    ):
        config = PSTConfig(update_embeddings=names)
        assert list(find_embeddings(model, config)) == expected


def test_an_unknown_name_is_refused_with_a_near_miss():
    message = refusal(Toy(), "embed", "postion")
    assert "update_embeddings names 'postion', which the model does not have. Did you mean 'position'?" in message
    assert "update_embeddings names 'bed', which" in refusal(Toy(), "bed")  # no part of a name
    assert "Did you mean" not in refusal(Toy(), "clasifier")  # a layer is no embedding


def test_what_is_no_plain_embedding_is_refused_by_name():
    assert "update_embeddings matches classifier, a Linear; only" in refusal(Toy(), "classifier", modules_to_save=())
    for settings in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        model = Toy()
        model.embed = nn.Embedding(ROWS, WIDTH, **settings)
        assert "update_embeddings matches embed, a Embedding; only a plain nn.Embedding (no max_norm" in refusal(
            model, "embed"
        )

    class Scaled(nn.Embedding):
        pass

    model = Toy()
    model.embed = Scaled(ROWS, WIDTH)
    assert "update_embeddings matches embed, a Scaled; only a plain" in refusal(model, "embed")


def test_a_tied_embedding_is_refused_by_both_names():
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    message = refusal(GPT2LMHeadModel(config), "wte")
    assert message.startswith("transformer.wte.weight is tied to lm_head.weight: ")
    assert "Take transformer.wte out of update_embeddings" in message
    model = inject_pst(GPT2LMHeadModel(config), PSTConfig(update_embeddings=("wpe",)))
    assert list(pst_embeddings(model)) == ["transformer.wpe"]


@pytest.mark.parametrize("saved", ["embed", "a"])
def test_an_embedding_that_trains_in_full_is_refused(saved):
    message = refusal(nn.ModuleDict({"a": Toy(), "b": Toy()}), "a.embed", modules_to_save=(saved,))
    assert message.startswith("a.embed is in update_embeddings and in modules_to_save")


def test_an_update_of_rank_0_is_refused():
    with pytest.raises(ValueError, match=r"update_embeddings = \['embed'\] with update_rank = 0 updates nothing"):
        PSTConfig(update_embeddings=("embed",), update_rank=0)
    assert PSTConfig(update_embeddings=(), update_rank=0).update_rank == 0
