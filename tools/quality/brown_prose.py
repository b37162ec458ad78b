"""The Brown corpus as plain prose: its tags taken off, its punctuation put where a printer would."""

from __future__ import annotations

import re

_CLOSING = frozenset(",.;:?!)")
_DOUBLED = frozenset(";?!")
"""The corpus has each of these twice."""
_INSIDE_QUOTES = frozenset(",.?!")
"""An American printer puts these before the closing quotation mark; the corpus has them after it."""


def prose(tagged: str) -> str:
    """Paragraphs, with an empty line between, of a sample of ``word/tag`` tokens; headings stand by themselves."""
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", tagged):
        words: list[str] = []
        for line in block.splitlines():
            tokens = [token.rpartition("/")[::2] for token in line.split()]
            of_line = [word for word, _ in tokens if word]
            if tokens and all(tag.endswith("-hl") for _, tag in tokens):
                paragraphs += [_joined(words), _joined(of_line)]
                words = []
            else:
                words += of_line
        paragraphs.append(_joined(words))
    return "\n\n".join(filter(None, paragraphs))


def _joined(words: list[str]) -> str:
    """Words and punctuation marks as one line of text."""
    text, glued, single_open = "", True, False
    for word in _in_printers_order(words):
        if word == "``" or word == "(" or (word == "'" and not single_open):
            text += ("" if glued else " ") + {"``": '"'}.get(word, word)
            glued = True
        elif word == "''" or word == "'" or word in _CLOSING:
            if not (word == "." and text.endswith(".")):  # the point of an abbreviation ends a sentence too
                text += {"''": '"'}.get(word, word)
            glued = False
        else:
            text += ("" if glued else " ") + word.replace("''", '"')  # inches
            glued = False
        if word == "'":
            single_open = not single_open
    return text


def _in_printers_order(words: list[str]) -> list[str]:
    """Without the second of doubled marks and the codes of formulas (``**f``); marks move inside quotation marks."""
    ordered: list[str] = []
    for word in words:
        if word.startswith("**") or (word in _DOUBLED and word in ordered[-1:]):
            continue
        if word in _DOUBLED and ordered[-1:] == ["''"] and ordered[-2:-1] == [word]:
            continue  # the first of the two has moved inside
        if word in _INSIDE_QUOTES and ordered[-1:] == ["''"]:
            ordered.insert(-1, word)
        else:
            ordered.append(word)
    return ordered
