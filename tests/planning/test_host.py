"""The host's time against the measurements that its constants are from."""

import pytest

from pst_ds.planning.host import LAYER_BACKWARD, LAYER_FORWARD, OPERATOR, Hooks

BLOCKS = 6
PARAMETERS = 101
BLOCK = 128 * OPERATOR + 7 * (LAYER_FORWARD + LAYER_BACKWARD)
TENSORS = Hooks(reduced_tensors=252, optimizer_tensors=252)
FLAT = Hooks(reduced_tensors=2, optimizer_tensors=2)


@pytest.mark.parametrize(
    ("milliseconds", "turns", "tensors"),
    [
        (38.6, Hooks(fetches=165, releases=153, parameter_turns=2 * PARAMETERS), TENSORS),
        (21.9, Hooks(fetches=169, releases=159, parameter_turns=2 * PARAMETERS), FLAT),
        (18.9, Hooks(fetches=25, releases=21, parameter_turns=2 * PARAMETERS), FLAT),
        (16.4, Hooks(), Hooks(optimizer_tensors=252)),
        (10.3, Hooks(), Hooks(optimizer_tensors=2)),
    ],
)
def test_the_sum_of_the_parts_is_what_was_measured(milliseconds, turns, tensors):
    of_step = BLOCKS * BLOCK + turns.seconds + tensors.seconds
    assert 1000 * of_step / BLOCKS == pytest.approx(milliseconds, rel=0.006)


def test_hooks_take_their_calls_and_tensors_times_the_seconds_of_each():
    hooks = Hooks(fetches=1000, releases=1000, parameter_turns=100, reduced_tensors=10, optimizer_tensors=10)
    assert hooks.seconds == pytest.approx(0.078 + 0.049 + 0.0238 + 0.00257 + 0.00146)
