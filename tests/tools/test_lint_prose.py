"""The writing check finds its patterns in pages and in code, and nothing in quotations or code blocks."""

from __future__ import annotations

from tools.lint_prose import code_texts, offences, page_text


def test_a_page_is_checked_without_code_and_quotations():
    page = 'It goes on.\n```text\nhas none\n```\n`is no key`, *"… has none"*\nOf each.\n'
    found = list(offences("page", page_text(page)))
    assert [line.partition(", not: ")[0] for line in found] == [
        "page: write start with the subject",
        'page: write "continue", "resume"',
    ]


def test_docstrings_messages_and_comments_are_checked_and_other_strings_are_not():
    source = '"""Of each."""\nx = "has none"  # goes on\nraise ValueError(f"a {x} begins")\n'
    assert list(code_texts(source)) == ["Of each.", "a ", " begins", "# goes on"]
