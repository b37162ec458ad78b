"""The divergence of predictions against torch's distributions, in float64."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from pst_ds.core.kl_divergence import KLDivergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_are_those_of_all_rows_together(dtype):
    generator = torch.Generator().manual_seed(0)
    ours = (4 * torch.randn(301, 1000, generator=generator)).to(dtype)
    reference = (ours + torch.rand(301, 1, generator=generator) * torch.randn(301, 1000, generator=generator)).to(dtype)
    ours[0] = -reference[0]  # far beyond the 99th percentile
    kl = KLDivergence()
    for part in (slice(0, 7), slice(7, 300), slice(300, 301)):
        kl.add(reference[part], ours[part])
    p, q = Categorical(logits=reference.double()), Categorical(logits=ours.double())
    wanted = kl_divergence(p, q).numpy()
    same = float((p.probs.argmax(-1) == q.probs.argmax(-1)).double().mean())
    assert kl.result() == pytest.approx(
        {"kl_mean": wanted.mean(), "kl_p99": sorted(wanted)[298 - 1], "same_top": same}, rel=1e-5
    )
    assert 0.0 < same < 1.0


def test_excluded_classes():
    """0 log 0 is 0; a class that only the model excludes is infinitely far."""
    reference, ours = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[1.0, 0.0, 3.0]])
    kl = KLDivergence()
    kl.add(reference, ours)
    p, q = torch.softmax(reference.double(), -1)[0], torch.softmax(ours.double(), -1)[0]
    assert kl.result()["kl_mean"] == pytest.approx(sum(float(p[i] * (p[i] / q[i]).log()) for i in range(2)), rel=1e-6)
    kl.add(ours, reference)
    assert (kl.result()["kl_mean"], kl.result()["kl_p99"]) == (math.inf, math.inf)


def test_a_model_that_is_not_finite_has_no_divergence():
    kl = KLDivergence()
    kl.add(torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [math.nan, 0.0, 0.0]]))
    assert math.isnan(kl.result()["kl_mean"])
