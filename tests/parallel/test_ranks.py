"""What one rank does for all."""

from __future__ import annotations

import pytest

from pst_ds.checkpoint.format import CheckpointError
from pst_ds.parallel.ranks import of_main, rank


def _asked():
    calls = []
    found = of_main(lambda: (calls.append(rank()), f"of rank {rank()}")[1])
    with pytest.raises(CheckpointError, match="of rank 0"):
        of_main(lambda: _refuse(CheckpointError(f"of rank {rank()}")))
    with pytest.raises(PermissionError, match="denied"):
        of_main(lambda: _refuse(PermissionError(13, "denied")))
    return found, calls


def _refuse(error):
    raise error


def test_one_process_is_its_own_main():
    assert _asked() == ("of rank 0", [0])


@pytest.mark.zero3
def test_rank_0_acts_and_all_have_what_it_found_or_its_error(run_ranks):
    assert run_ranks(_asked, 2) == [("of rank 0", [0]), ("of rank 0", [])]
