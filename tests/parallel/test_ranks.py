"""What one rank does for all."""

from __future__ import annotations

import pytest

from pst_ds.checkpoint.format import CheckpointError
from pst_ds.errors import InputError
from pst_ds.parallel import ranks
from pst_ds.parallel.ranks import of_main, of_main_at_length, on_all_ranks_at_length, rank
from pst_ds.progress import Progress


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


def _at_length(beat_seconds):
    ranks._BEAT_SECONDS, heard, goes_on = beat_seconds, [], ranks._continues
    ranks._continues = lambda said: heard.append(goes_on(said)) or heard[-1]

    def work():
        with Progress("work", 3) as shown:
            for _ in range(3):
                shown.add(1)
        return f"of rank {rank()}"

    try:
        found = of_main_at_length(work)
        with pytest.raises(CheckpointError, match="of rank 0"):
            of_main_at_length(lambda: _refuse(CheckpointError(f"of rank {rank()}")))
    finally:
        ranks._continues = goes_on
    with Progress("other work", 1) as shown:
        shown.add(1)  # nobody listens any more
    return found, heard


@pytest.mark.zero3
@pytest.mark.parametrize(("seconds", "beats"), [(0.0, 3), (3600.0, 0)])
def test_the_others_hear_of_long_work_as_it_continues(run_ranks, seconds, beats):
    expected = ("of rank 0", [*[True] * beats, False, False])
    assert run_ranks(_at_length, 2, seconds) == [expected, expected]


def test_long_work_of_one_process():
    assert _at_length(0.0) == ("of rank 0", [True, True, True, False, False])


def _on_all_at_length(failing):
    done = []
    on_all_ranks_at_length(lambda: done.append(rank()))
    message = ""
    try:
        on_all_ranks_at_length(lambda: _refuse(InputError(f"of rank {rank()}")) if rank() in failing else None)
    except InputError as error:
        message = str(error)
    return done, message


@pytest.mark.zero3
def test_long_work_of_every_rank_is_waited_for_and_fails_on_all(run_ranks):
    (first, message), (second, other) = run_ranks(_on_all_at_length, 2, [1])
    assert (first, second) == ([0], [1])
    assert message == other
    assert message.startswith("rank 1 on ")
    assert message.endswith(": of rank 1")


def test_long_work_of_the_only_rank():
    assert _on_all_at_length([]) == ([0], "")
    assert _on_all_at_length([0]) == ([0], "of rank 0")
