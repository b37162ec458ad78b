"""torch.compile of a model with PST layers: the layers stay outside the graph, and all numbers are the eager ones."""

from __future__ import annotations

import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + nn.functional.gelu(self.linear(torch.tanh(x)))


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.classifier = nn.Linear(8, 2)

    def forward(self, ids, labels):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.classifier(x.mean(1)), labels)


def _step(model, forward):
    ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = forward(ids, torch.tensor([0, 1, 1, 0]))
    loss.backward()
    return loss.detach(), {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def test_a_compiled_model_has_the_eager_one_s_loss_and_gradients():
    from torch._dynamo.backends.debugging import aot_eager

    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch.manual_seed(0)
    model = inject_pst(_Model(), PSTConfig(update_embeddings=("embedding",)))
    compiled = torch.compile(model, backend=counting)
    counts = []
    for sparsity in (0.3, 0.7):
        update_masks(model, sparsity)
        loss, grads = _step(model, model)
        compiled_loss, compiled_grads = _step(model, compiled)
        torch.testing.assert_close(compiled_loss, loss)
        assert set(compiled_grads) == set(grads)
        for name, grad in grads.items():
            torch.testing.assert_close(compiled_grads[name], grad)
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0  # new masks ask for no new graph
    assert not any("pst" in str(node.target) for graph in graphs for node in graph.graph.nodes)
