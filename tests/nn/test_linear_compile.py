"""torch.compile of models with PST layers: one graph a block, and all numbers are the eager ones."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pst_ds.config.pst import PSTConfig
from pst_ds.core.quantization import Grid
from pst_ds.masks.scales import update_scales
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.linear import PSTLinear

BLOCKS = 2


class Counting:
    """A backend that runs graphs, forward and backward, as ATen operators, and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs.append(graph)
        return aot_eager(graph, inputs)

    def operators(self):
        return [
            [str(node.target) for node in graph.graph.nodes if "pst_ds" in str(node.target)] for graph in self.graphs
        ]


@pytest.fixture(autouse=True)
def _no_graphs_of_others():
    torch.compiler.reset()


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + nn.functional.gelu(self.linear(torch.tanh(x)))


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=3)
        self.blocks = nn.ModuleList([_Block() for _ in range(BLOCKS)])
        self.classifier = nn.Linear(8, 2)

    def forward(self, ids, labels):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.classifier(x.mean(1)), labels)


def _model(grids=(), **config):
    torch.manual_seed(0)
    model = inject_pst(_Model(), PSTConfig(update_embeddings=("embedding",), **config), **dict(grids))
    generator = torch.Generator().manual_seed(2)
    for param in model.parameters():
        if param.requires_grad:
            param.data += torch.randn(param.shape, generator=generator) * 0.05
    return model


def _step(model, forward):
    ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = forward(ids, torch.tensor([0, 1, 1, 0]))
    loss.backward()
    return loss.detach(), {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def _assert_same_step(model, forward):
    loss, grads = _step(model, model)
    compiled_loss, compiled_grads = _step(model, forward)
    torch.testing.assert_close(compiled_loss, loss)
    assert set(compiled_grads) == set(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(compiled_grads[name], grad)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"train_weights": True, "update_rank": 0, "update_embeddings": ()},
        {"score_rank": 0, "structured_scores": False},
    ],
    ids=str,
)
def test_loss_and_gradients_are_the_eager_ones_and_new_masks_ask_for_no_new_graph(config):
    seen = Counting()
    config = {"update_embeddings": ("embedding",), **config}
    torch.manual_seed(0)
    model = inject_pst(_Model(), PSTConfig(**config))
    compiled = torch.compile(model, backend=seen, fullgraph=True)
    for sparsity in (0.3, 0.7):
        update_masks(model, sparsity)
        _assert_same_step(model, compiled)
    for layer in pst_layers(model).values():  # the masks are final
        layer.scores_train = False
    _assert_same_step(model, compiled)
    (operators,) = seen.operators()
    assert operators.count("pst_ds.masked_linear") == BLOCKS


@pytest.mark.parametrize("grids", [{"grid": Grid(4)}, {"base_grid": Grid(8)}], ids=lambda grids: next(iter(grids)))
def test_rounded_weights_and_codes_compute_as_eagerly_too(grids):
    seen = Counting()
    model = _model(grids)
    compiled = torch.compile(model, backend=seen, fullgraph=True)
    _assert_same_step(model, compiled)
    if "grid" in grids:
        update_scales(model)
        for layer in pst_layers(model).values():
            layer.rounds = True
        _assert_same_step(model, compiled)
    assert len(seen.graphs) == 1


def test_after_training_the_masks_have_the_same_bits():
    masks = []
    for is_compiled in (False, True):
        model = _model()
        forward = torch.compile(model, backend=Counting(), fullgraph=True) if is_compiled else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        checksums = []
        for step in range(4):
            _step(model, forward)
            optimizer.step()
            checksums.append(update_masks(model, 0.1 + 0.15 * step).checksum)
        masks.append(checksums)
    assert masks[0] == masks[1]


@pytest.mark.thorough
def test_a_call_is_seen_and_a_layer_may_be_bypassed():
    model = _model()
    compiled = torch.compile(model, backend=Counting(), fullgraph=True)
    _step(model, compiled)
    assert all(layer.was_called for layer in pst_layers(model).values())
    for layer in pst_layers(model).values():
        layer.bypassed = True
    ids, labels = torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1])
    torch.testing.assert_close(compiled(ids, labels), model(ids, labels))


def test_layers_that_zero3_has_split_stay_outside_the_graphs():
    model, seen = _model(), Counting()
    for layer in pst_layers(model).values():
        layer.pst_mask.ds_id, layer.pst_mask.ds_status = 0, SimpleNamespace(name="AVAILABLE")
        layer.pst_mask.ds_active_sub_modules = set()
    _assert_same_step(model, torch.compile(model, backend=seen))
    assert not any("pst_ds.masked_linear" in operators for operators in seen.operators())


def test_autocast_is_as_eager():
    model = _model()
    compiled = torch.compile(model, backend=Counting(), fullgraph=True)
    ids, labels = torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(ids, labels), model(ids, labels), rtol=2e-2, atol=2e-2)


def _llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = inject_pst(LlamaForCausalLM(config), PSTConfig(modules_to_save=()))
    update_masks(model, 0.5)
    return model


def test_blocks_alike_share_one_graph():
    model, seen = _model(), Counting()
    for block in model.blocks:
        block.compile(backend=seen, fullgraph=True)
    _step(model, model)
    assert len(seen.graphs) == 1


def test_a_transformer_block_is_one_graph():
    model, seen = _llama(), Counting()
    tokens = torch.arange(12).view(1, 12)
    expected = model(input_ids=tokens, labels=tokens).loss
    for block in model.model.layers:
        block.compile(backend=seen, fullgraph=True)  # a break in the graph would raise
    loss = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert [len(operators) for operators in seen.operators()] == [7] * BLOCKS  # the first one's input has no gradient
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)


@pytest.mark.thorough
def test_the_explanation_has_one_graph_a_block_and_no_break():
    model = _llama()
    hidden = torch.randn(1, 6, 32)
    positions = torch.arange(6).unsqueeze(0)
    rotary = model.model.rotary_emb(hidden, positions)
    for block in model.model.layers:
        found = torch._dynamo.explain(block)(hidden, position_embeddings=rotary, position_ids=positions)
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.thorough
def test_decoding_gives_the_tokens_of_eager():
    model = _llama().eval()
    tokens = torch.tensor([[3, 1, 4]])
    compiled = torch.compile(model, backend=Counting(), dynamic=True)
    with torch.no_grad():
        for _ in range(4):
            logits, others = (one(input_ids=tokens, use_cache=False).logits[:, -1] for one in (model, compiled))
            torch.testing.assert_close(others, logits)
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)


def test_a_copy_is_a_layer_of_its_own():
    model = _model()
    layer = model.blocks[0].linear
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    with torch.no_grad():
        for one in copies:
            one.pst_U.zero_()
    x = torch.randn(3, 8)
    for one in (layer, *copies):
        torch.testing.assert_close(torch.compile(one, backend="aot_eager", fullgraph=True)(x), one(x))
    assert not torch.equal(layer(x), copies[0](x))


def test_the_operators_are_what_their_schemas_say():
    model = _model()
    layer: PSTLinear = model.blocks[0].linear
    factors = [getattr(layer, f"pst_{name}") for name in "ABRCUV"]
    for x in (torch.randn(8), torch.randn(2, 3, 8)):
        arguments = (x.requires_grad_(), layer._number, 8, None, layer.bias, *factors)
        torch.library.opcheck(torch.ops.pst_ds.masked_linear, arguments)
    embedding = model.embedding
    ids = torch.tensor([[0, 3], [10, 0]])
    arguments = (ids, embedding.weight, embedding.pst_U, embedding.pst_V, embedding.beta, embedding.padding_idx)
    torch.library.opcheck(torch.ops.pst_ds.updated_rows, arguments)
