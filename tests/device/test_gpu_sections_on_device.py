"""The sections of ``make gpu`` on the pretended device, which refuses tensors of the host next to its own."""

from __future__ import annotations

import pytest

from tools.gpu import checks, timings
from tools.gpu.bench import TINY, Bench

from .pretended import DEVICE, pretended

pytestmark = [pytest.mark.device]


@pytest.mark.parametrize(
    "section", [checks.bits, checks.merge, timings.kernels, timings.steps, timings.updates, timings.decode]
)
def test_a_section_has_its_tensors_on_the_device(section):
    with pretended() as counts:
        rows = list(section(Bench(DEVICE, TINY)))
        assert counts.launches > 0
    assert rows
    assert [row for row in rows if row["measured"] is False] == []
