"""Rows of W0 + beta U V and their gradients against float64, and the same bits however many rows are merged at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from pst_ds.core.updates import rows as low_rank_rows
from pst_ds.core.updates.rows import row_gradients, updated_rows
from tests.pairs import every_pair

ROWS, WIDTH, RANK = 23, 37, 3
BETA, PADDING = 1.3, 4
IDS = torch.tensor([7, 4, 0, 7, 22, 4, 7, 1, 0, 16, 5])
"""Several rows more than once, that of the padding too, and most of the table never."""

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def random_table(
    dtype=torch.float32, seed: int = 0, rank: int = RANK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W0 (n, d), U (n, r) and V (r, d), none with a zero."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator).to(dtype) for shape in ((ROWS, WIDTH), (ROWS, rank), (rank, WIDTH))
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@every_pair
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=str
)
@pytest.mark.parametrize("beta", [1.0, BETA])
def test_updated_rows_are_the_formula(monkeypatch, dtype, tolerance, beta):
    """In bf16 the sum is rounded once: to within half a unit in the last place."""
    monkeypatch.setattr(low_rank_rows, "TILE_ELEMENTS", 5 * WIDTH)  # five slices, the last of three rows
    weight, left, right = random_table(dtype)
    before = [t.clone() for t in (weight, left, right)]
    found = updated_rows(weight, left, right, beta)
    expected = weight.double() + beta * left.double() @ right.double()
    assert found.dtype == dtype
    high = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=10 * torch.finfo(high).eps)
    assert all(torch.equal(now, then) for now, then in zip((weight, left, right), before, strict=True))


@given(
    ids=st.lists(st.integers(0, ROWS - 1), max_size=40),
    tile_elements=st.integers(1, 2 * ROWS * WIDTH),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(ids, tile_elements, dtype):
    weight, left, right = random_table(dtype, rank=8)
    whole = updated_rows(weight, left, right, BETA)
    picked = torch.tensor(ids, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank_rows, "TILE_ELEMENTS", tile_elements)
        assert torch.equal(updated_rows(weight, left, right, BETA), whole)
        assert torch.equal(updated_rows(weight[picked], left[picked], right, BETA), whole[picked])


@each_dtype
def test_rows_without_an_update_keep_their_values(dtype):
    weight, left, right = random_table(dtype)
    weight[0, 0], weight[0, 1] = torch.finfo(dtype).max, torch.finfo(dtype).tiny / 4  # a subnormal
    left[::2] = 0
    found = updated_rows(weight, left, right * 1e3, BETA)
    integers = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(found[::2].view(integers), weight[::2].view(integers))
    assert (found[1::2] != weight[1::2]).any(1).all()


def reference(left, right, ids, grad_y, padding_idx):
    """Float64 autograd of torch's own embedding; W0 has no part in the gradients of U and V."""
    own = [t.double().requires_grad_() for t in (left, right)]
    table = torch.randn(ROWS, WIDTH, dtype=torch.float64) + BETA * own[0] @ own[1]
    functional.embedding(ids, table, padding_idx=padding_idx).backward(grad_y.double())
    return own[0].grad, own[1].grad


@every_pair
@pytest.mark.parametrize("padding_idx", [None, PADDING, 0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)], ids=str
)
def test_gradients_are_those_of_the_formula(dtype, tolerance, padding_idx):
    _, left, right = random_table(dtype)
    grad_y = torch.randn(len(IDS), WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = row_gradients(IDS, grad_y, left, right, BETA, padding_idx=padding_idx)
    for ours, expected in zip(found, reference(left, right, IDS, grad_y, padding_idx), strict=True):
        assert ours.dtype == torch.promote_types(dtype, torch.float32)
        assert relative_error(ours, expected) <= tolerance
    named = {int(i) for i in IDS} - {padding_idx}
    assert {i for i in range(ROWS) if found[0][i].any()} == named


def test_padding_alone_has_no_gradient():
    _, left, right = random_table()
    ids = torch.full((6,), PADDING)
    grad_y = torch.randn(6, WIDTH)
    assert not any(g.any() for g in row_gradients(ids, grad_y, left, right, BETA, padding_idx=PADDING))
    assert all(g.any() for g in row_gradients(ids, grad_y, left, right, BETA))
