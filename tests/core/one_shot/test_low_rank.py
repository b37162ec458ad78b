"""The low-rank fit against a weighted SVD in numpy, and against changes of U and V."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.one_shot.gram import damped_gram, unit_gram
from pst_ds.core.one_shot.low_rank import low_rank_fit, output_error
from tests.core.one_shot_references import correlated_inputs, normal_weight


def _error(residual, fit, gram):
    """tr((R - U V) H (R - U V)') in double precision."""
    rest = residual.double() - fit[0].double() @ fit[1].double()
    return float((rest @ gram * rest).sum())


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("rank", [1, 7])
def test_it_is_the_optimum_of_the_weighted_svd(outputs, inputs, rank):
    residual, x = normal_weight(outputs, inputs, 1), torch.tensor(correlated_inputs(200, inputs, 3))
    gram, _ = damped_gram(x.T @ x)
    fit = low_rank_fit(residual, unit_gram(x.T @ x), rank)
    # by the symmetric root of H instead of a triangular one, and by the SVD of the whole product
    sizes, vectors = np.linalg.eigh(gram.numpy())
    root = vectors * np.sqrt(sizes) @ vectors.T
    left, values, right = np.linalg.svd(residual.double().numpy() @ root)
    best = left[:, :rank] * values[:rank] @ right[:rank] @ np.linalg.inv(root)
    np.testing.assert_allclose((fit.left @ fit.right).numpy(), best, atol=1e-5)
    assert _error(residual, fit, gram) == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-5)
    assert output_error(residual - fit.left @ fit.right, unit_gram(x.T @ x)) == pytest.approx(
        _error(residual, fit, gram), rel=1e-4
    )
    assert torch.allclose(fit.left.norm(dim=0), fit.right.norm(dim=1), rtol=1e-5)


@given(outputs=st.integers(1, 9), inputs=st.integers(2, 9), rank=st.integers(1, 10), seed=st.integers(0, 99),
       size=st.floats(1e-3, 1.0))  # fmt: skip
def test_no_other_matrix_of_the_rank_is_nearer(outputs, inputs, rank, seed, size):
    residual, x = normal_weight(outputs, inputs, seed), torch.tensor(correlated_inputs(30, inputs, seed))
    x[:, 0] = 0.0  # a dead input
    gram, _ = damped_gram(x.T @ x)
    fit = low_rank_fit(residual, unit_gram(x.T @ x), rank)
    assert (fit.left.shape, fit.right.shape) == ((outputs, rank), (rank, inputs))
    generator = torch.Generator().manual_seed(seed)
    best = _error(residual, fit, gram)
    for moves_left, moves_right in ((1, 0), (0, 1), (1, 1)):
        left = fit.left + moves_left * size * torch.randn(fit.left.shape, generator=generator)
        right = fit.right + moves_right * size * torch.randn(fit.right.shape, generator=generator)
        assert best <= _error(residual, (left, right), gram) * (1 + 1e-6) + 1e-6 * _error(
            residual, (0 * left, right), gram
        )
    if rank >= min(outputs, inputs):
        assert best <= 1e-8 * _error(residual, (0 * fit.left, fit.right), gram)
