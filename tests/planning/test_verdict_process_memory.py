"""What a process on a CPU needs, against sums by hand."""

from __future__ import annotations

import pytest

from pst_ds.planning.verdict import LEAST_SHARE, PROCESS_BYTES, SCATTERED, SCATTERED_AMONG_KEPT, need_of_rank


def test_a_process_needs_its_imports_copies_to_save_and_a_share_that_is_scattered():
    need = need_of_rank("cpu", 1_000_000_000, 0, 50_000_000)
    assert need.enough == pytest.approx(PROCESS_BYTES + (1 + SCATTERED) * 1_050_000_000, abs=1)
    assert need.least == pytest.approx(LEAST_SHARE * need.enough, abs=1)


def test_activations_that_are_kept_scatter_more():
    alike, kept = (need_of_rank("cpu", 1_000_000_000, kept, 0) for kept in (0, 400_000_000))
    assert kept.enough - alike.enough == pytest.approx(SCATTERED_AMONG_KEPT * 400_000_000, abs=1)
