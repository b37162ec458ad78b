"""How messages quote the errors of libraries."""

import pytest

from pst_ds.errors import first_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one.\ntwo", "one"),
        ("\n one \n", "one"),
        ("", "ValueError"),
        ("one:", "one:"),
        ("error in a regex:\n    ((((\n       ^\nerror: unclosed group", "error in a regex: error: unclosed group"),
        (
            "invalid config:\n    ValueError: a head has an odd size.",
            "invalid config: ValueError: a head has an odd size",
        ),
    ],
)
def test_the_first_line_of_an_error_has_its_cause(text, line):
    assert first_line(ValueError(text)) == line
