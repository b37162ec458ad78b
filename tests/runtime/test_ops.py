"""The products as torch operators: their schema and shapes, torch.compile and torch.export."""

import pytest
import torch
from torch import nn

from tests.pairs import every_pair
from tools.packed_layers import packed_linear

IN, HIDDEN, OUT = 48, 40, 24
FORMATS = ["bitmask", "2:4"]


def layer(name, inputs, outputs, seed, dtype=torch.float32, sparsity=0.9, bias=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    if name == "2:4":
        weight = weight * torch.tensor([1, 0, 0, 1]).repeat(inputs // 4)
    else:
        weight = torch.where(torch.rand(outputs, inputs, generator=generator) >= sparsity, weight, 0)
    values = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    return packed_linear(weight.to(dtype), values, name)


def network(name, dtype=torch.float32):
    return nn.Sequential(layer(name, IN, HIDDEN, 0, dtype), nn.GELU(), layer(name, HIDDEN, OUT, 1, dtype, bias=False))


def operator_arguments(name, x, with_bias=True):
    made = layer(name, IN, OUT, 0, x.dtype)
    bias = made.bias.detach() if with_bias else None
    values = made.compressed.detach().view(-1)
    return torch.ops.pst_ds.bitmask_linear, (x, values, made.bitmask, made.row_offsets, bias)


@pytest.fixture(autouse=True)
def _no_graphs_of_others():
    torch.compiler.reset()


@every_pair
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_operators_are_what_their_schemas_say(name, dtype, with_bias):
    for shape in ((IN,), (3, IN), (2, 20, IN)):
        operator, arguments = operator_arguments(name, torch.ones(shape, dtype=dtype), with_bias)
        torch.library.opcheck(operator, arguments)


@every_pair
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(IN,), (3, IN), (40, IN), (2, 3, IN)])
def test_the_operator_gives_what_the_layer_gives_eagerly(name, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    operator, arguments = operator_arguments(name, x)
    assert torch.allclose(operator(*arguments), layer(name, IN, OUT, 0)(x), rtol=1e-5, atol=1e-5)


class Counting:
    """A backend for torch.compile that runs the graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, _):
        self.graphs.append(graph)
        return graph.forward

    def operators(self):
        return [
            [str(node.target) for node in graph.graph.nodes if "pst_ds" in str(node.target)] for graph in self.graphs
        ]


@pytest.mark.parametrize("name", FORMATS)
def test_one_compiled_graph_serves_every_batch(name):
    model, seen = network(name), Counting()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=seen)
    for vectors in (2, 3, 17, 33, 70):
        x = torch.randn(vectors, IN, generator=torch.Generator().manual_seed(vectors))
        assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert [len(operators) for operators in seen.operators()] == [2]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_aot_graph_equals_eager(name, dtype):
    model = network(name, dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((4, IN), (2, 5, IN)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
            assert torch.equal(compiled(x), model(x))


@pytest.mark.few(1)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_compiled_network_has_the_gradients_of_eager(name, dtype):
    model = network(name, dtype)
    model[0].bias.requires_grad_()
    compiled = torch.compile(model, backend="aot_eager")
    found = []
    for forward in (model, compiled):
        x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
        model.zero_grad()
        forward(x).square().sum().backward()
        found.append((x.grad, model[0].bias.grad))
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4 if dtype == torch.float32 else 0.05, atol=0.05)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["bitmask"])
def test_inductor_compiles_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = nn.Sequential(*list(network(name))[::2])
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        x = torch.randn(4, IN, generator=torch.Generator().manual_seed(5))
        assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_export_sees_shapes_and_any_batch(name):
    model = network(name).eval()
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=4096)},))
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    batch, features = output.args[0][0].meta["val"].shape
    assert isinstance(batch, torch.SymInt)
    assert features == OUT
    assert sum("pst_ds" in str(node.target) for node in program.graph.nodes) == 2
    for vectors in (3, 50):
        more = torch.randn(vectors, IN, generator=torch.Generator().manual_seed(vectors))
        assert torch.allclose(program.module()(more), model(more), rtol=1e-5, atol=1e-5)
