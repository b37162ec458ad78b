"""Messages for settings of other packages' additions, whose types and ranges pst-ds itself does not use."""

from __future__ import annotations

from typing import Annotated

import pytest
from annotated_types import Le, Lt
from pydantic import Strict

from pst_ds.config.settings import ConfigError, Section, settings


@settings
class _AdditionSection(Section):
    at_most: Annotated[float, Le(2.0)] = 0.0
    below: Annotated[int, Lt(3)] = 0
    places: Annotated[tuple[int, ...], Strict(False)] = ()
    corners: tuple[int, int] = (0, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"at_most": 2.5}, "at_most = 2.5 must be at most 2"),
        ({"below": 3}, "below = 3 must be below 3"),
        ({"places": "1"}, "places = '1' must be a list of whole numbers"),
        ({"corners": "1"}, "corners = '1' must be a list of values"),
    ],
)
def test_a_message_says_the_range_and_the_items(values, message):
    with pytest.raises(ConfigError) as caught:
        _AdditionSection(**values)
    assert str(caught.value) == message
