"""The counts of ``tools.readability`` on short modules."""

import pytest

from tools import readability


def test_comments_docstrings_and_code_are_counted_apart():
    counts = readability.count('"""A module."""\n\n# Why.\nx = 1  # one\ny = 2  # noqa: E501\n')
    assert counts.code_lines == 2
    assert counts.comment_lines == 2


@pytest.mark.parametrize(
    ("statement", "count"),
    [
        ("a, b = 1, 2", 1),
        ("a, b = f(x), g(y)", 1),
        ("a, b = f(x)", 0),
        ("a, b = a or 1, b or 2", 1),
        ("a, b = b, a", 0),
        ("a, b = b, a + b", 0),
        ("pair = 1, 2", 0),
    ],
)
def test_only_a_written_tuple_of_other_values_is_unrelated(statement, count):
    assert readability.count(statement).unrelated_assignments == count


def test_every_kind_of_comprehension_and_conditional_expressions_are_counted():
    counts = readability.count("[x for x in y]; {x for x in y}; {x: 1 for x in y}; f(x for x in y); a if b else c")
    assert counts.comprehensions == 4
    assert counts.conditional_expressions == 1


def test_the_table_adds_up_files_and_folders(tmp_path):
    folder = tmp_path / "room"
    folder.mkdir()
    (folder / "one.py").write_text("a, b = 1, 2\n")
    (tmp_path / "two.py").write_text("x = 1\ny = 2\nz = 3\n")
    *_, total = readability.table([folder, tmp_path / "two.py"]).splitlines()
    assert total.split() == ["4", "0.0", "250.0", "0.0", "0.0", "total"]
