"""Which plain texts are read as one document: those whose lines continue one another, and no others."""

from __future__ import annotations

import random
import textwrap

import pytest

from pst_ds.data import plain_text
from pst_ds.data.plain_text import lines_belong_together, proposed_sample_by, sampled_lines
from tests.pairs import every_pair

SENTENCES = """
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.
However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so
well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other
of their daughters. "My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at
last?" Mr. Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has just been here, and she told me
all about it." Mr. Bennet made no answer. "Do not you want to know who has taken it?" cried his wife impatiently. "You
want to tell me, and I have no objection to hearing it." This was invitation enough. Mrs. Long says that Netherfield is
taken by a young man of large fortune from the north of England; that he came down on Monday in a chaise and four to see
the place, and was so much delighted with it that he agreed with Mr. Morris immediately.
"""
PROSE = " ".join(SENTENCES.split())
PARAGRAPHS = [PROSE[:270], PROSE[270:520], PROSE[520:700], PROSE[700:]] * 5
"""Cut anywhere, so that the last lines of some end within a sentence."""
DIALOGUE = ['"What is his name?"', '"Bingley."', '"Is he married or single?"', '"Oh! Single, my dear, to be sure!"']
POEM = """
Tyger Tyger, burning bright,
In the forests of the night;
What immortal hand or eye,
Could frame thy fearful symmetry?

In what distant deeps or skies,
Burnt the fire of thine eyes?
On what wings dare he aspire?
What the hand, dare seize the fire?

And what shoulder, & what art,
Could twist the sinews of thy heart?
And when thy heart began to beat,
What dread hand? & what dread feet?
"""
CODE = '''
def kept(scores, share):
    """Return the mask of the largest scores."""
    count = int(share * scores.numel())
    if count == 0:
        return torch.zeros_like(scores)
    return scores >= scores.flatten().topk(count).values[-1]


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))

    def forward(self, x):
        return x @ self.weight.T
'''
MARKDOWN = (
    f"# A novel\n\n{textwrap.fill(PROSE, 79)}\n\n* one thing\n* another, which is longer\n\n## More\n\n"
    + "\n\n".join(textwrap.fill(text, 79) for text in PARAGRAPHS[:4])
)
CHAT = [
    "<ann> morning",
    "<bob> hi! did the build pass?",
    "<ann> no",
    "<ann> the linker again, I'll have a look after lunch",
]
REVIEWS = [
    "a warm , funny and wholly engaging film .",
    "the plot is thin and the jokes are thinner , but the leads have chemistry and the city has never looked better .",
    "dull",
    "there's a script in here somewhere that would have made a decent short",
    "it never quite recovers from a first half hour in which nothing happens to people nobody could care about",
]
TITLES = ["Stainless Steel Vegetable Peeler with Soft Grip, Dishwasher Safe, Pack of 2 (Black)"] * 3 + [
    "Men's Waterproof Hiking Boots, Leather, Wide Fit, Size 10, Brown with Grey Laces"
]


def _novel(width=72, gap="\n\n", paragraphs=PARAGRAPHS):
    return gap.join(textwrap.fill(text, width) for text in paragraphs)


def _long_lines():
    return "\n\n".join(PARAGRAPHS)


def _shuffled(rows, count=200):
    return "\n".join(random.Random(0).choices(rows, k=count))


@every_pair
@pytest.mark.parametrize(
    ("text", "together"),
    [
        pytest.param(_novel(), True, id="a wrapped novel"),
        pytest.param(_novel(width=45), True, id="in narrow columns"),
        pytest.param(_novel(gap="\n"), True, id="without empty lines"),
        pytest.param(_novel(gap="\n    "), True, id="with indented paragraphs"),
        pytest.param(_novel(paragraphs=PARAGRAPHS[:4] + DIALOGUE * 4), True, id="with dialogue"),
        pytest.param("\n\n".join(DIALOGUE * 9) + "\n\n" + _novel(), True, id="with more dialogue"),
        pytest.param(MARKDOWN, True, id="Markdown"),
        pytest.param(POEM * 4, True, id="a poem"),
        pytest.param(CODE * 4, True, id="code"),
        pytest.param("\n\n".join("\n".join(CHAT) for _ in range(9)), True, id="conversations apart"),
        pytest.param("天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏閏餘成歲律呂調陽\n" * 30, True, id="Chinese"),
        pytest.param(_long_lines(), False, id="a paragraph a line"),
        pytest.param("\n".join(PARAGRAPHS), False, id="a paragraph a line, without empty lines"),
        pytest.param(_shuffled(REVIEWS), False, id="a review a line"),
        pytest.param(_shuffled([*REVIEWS * 3, ""]), False, id="with empty ones"),
        pytest.param("\n\n".join(REVIEWS * 9), False, id="a review a line, empty lines between"),
        pytest.param(_shuffled(CHAT), False, id="chat"),
        pytest.param(_shuffled(TITLES), False, id="titles of one length"),
        pytest.param(_shuffled(["film", "plot", "warm"]), False, id="words"),
        pytest.param("\n".join(textwrap.wrap(PROSE, 72)[:5]), False, id="a few lines"),
        pytest.param("", False, id="nothing"),
    ],
)
@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_lines_that_are_parts_of_a_text(tmp_path, text, together, line_break):
    path = tmp_path / "a.txt"
    path.write_bytes(text.replace("\n", line_break).encode())
    assert lines_belong_together(sampled_lines(path)) is together
    assert proposed_sample_by(path) == ("document" if together else "line")


def test_a_large_file_is_sampled_and_read_by_paragraphs(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(REVIEWS * 9000) + "\n\n" + "é" + _novel(paragraphs=PARAGRAPHS * 900))
    lines = sampled_lines(path)
    assert sum(map(len, lines)) < 5 << 16 < path.stat().st_size
    assert REVIEWS[0] in lines
    assert max(map(len, lines)) == max(map(len, REVIEWS))  # no line that a window cut is at its front
    path.write_text(_novel(paragraphs=PARAGRAPHS * 100))
    assert proposed_sample_by(path) == "document"
    monkeypatch.setattr(plain_text, "DOCUMENT_BYTES", 1 << 16)
    assert proposed_sample_by(path) == "paragraph"
