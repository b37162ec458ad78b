"""The page as a document: whole, sealed off from the network, with nothing of the data taken for markup."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from pst_ds.errors import InputError
from pst_ds.report.charts import charts
from pst_ds.report.page import page
from pst_ds.report.run_data import read_runs

VOID = {"meta", "img"}
NAMES = "<script>alert(1)</script> & \"quoted\" 'too' {{ 7 * 7 }} $x_$ \x01"
SVG = "{http://www.w3.org/2000/svg}"


class Document(HTMLParser):
    """Tags with their attributes, and all texts; fails when tags are not balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.text += data

    def count(self, tag):
        return sum(found == tag for found, _ in self.tags)


@pytest.mark.parametrize("names", [("one",), ("one", "two", "three")])
def test_the_page_is_whole_and_refers_to_nothing_outside(a_run, names):
    text = page(read_runs([a_run(name) for name in names]))
    document = Document(text)
    assert document.count("h1") == 1
    assert document.count("img") == document.count("figure") == 7
    for tag, attributes in document.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base"), tag
        assert not {"href", "srcset", "action", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"https?://|@import|url\(", text)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_what_the_data_says_is_text(write_run):
    values = {f"eval/{NAMES}": 0.5, f"lr/{NAMES}": 0.1, "lr/b": 0.1}
    metrics = [{"step": step, "event": "evaluation", **values} for step in (1, 2)]
    layers = [
        {"layers": [f"a.{NAMES}", "a.b"], "weights": [10, 10]},
        {"step": 1, "event": "masks", "kept": [5, 5], "flipped": [5, 5]},
    ]
    run_file = f"method = {json.dumps(NAMES)}\n{json.dumps(NAMES)} = 3\n"
    result = {"metrics": {NAMES: 1.0}}
    run = write_run(NAMES.replace("/", ""), metrics=metrics, layers=layers, result=result, run_file=run_file)
    runs = read_runs([run, write_run("other")])
    document = Document(page(runs, {NAMES: {NAMES: NAMES}}, [NAMES]))
    assert document.count("script") == 0
    assert document.text.count("<script>alert(1)") >= 15
    assert "{{ 7 * 7 }}" in document.text


def test_a_chart_has_the_extremes_of_its_curves_and_no_text_of_the_data(a_run, write_run):
    """A spike within 100,000 steps stays, in a file of few kilobytes."""
    spike = [{"step": s, "event": "step", "loss": 5.0 if s == 70_001 else 1.0 / s} for s in range(1, 100_001)]
    (chart,) = charts(read_runs([write_run("<a>", metrics=spike)]))
    assert (chart.title, chart.legend) == ("Loss", [("#1f77b4", "― 1e-05")])
    assert len(chart.svg) < 100_000
    (path,) = [p for p in ElementTree.fromstring(chart.svg).iter(f"{SVG}path") if "#1f77b4" in p.get("style", "")]
    points = [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path.get("d"))]
    highest = min(points, key=lambda point: point[1])
    left, right = min(points)[0], max(points)[0]
    assert (highest[0] - left) / (right - left) == pytest.approx(0.7, abs=0.01)
    both = {chart.title: chart for chart in charts(read_runs([a_run("one"), a_run("two")]))}
    assert [text for _, text in both["Sparsity"].legend] == [
        "― one target 0.9", "╌ one actual 0.9", "― two target 0.9", "╌ two actual 0.9",
    ]  # fmt: skip
    assert not any("two" in chart.svg for chart in both.values())


def test_values_at_one_step_and_zeros_are_drawn(write_run):
    lines = [
        {"step": 2, "event": "evaluation", "eval/loss": 0.5},
        {"step": 2, "event": "mask_update", "flip_rate": 0.0},
    ]
    found = list(charts(read_runs([write_run("one", metrics=lines)])))
    assert [chart.title for chart in found] == ["Flip rate", "Evaluation: loss"]
    assert all(base64.b64decode(chart.uri.partition(",")[2]).decode() == chart.svg for chart in found)


def test_a_run_that_has_just_begun_has_a_page(write_run):
    document = Document(page(read_runs([write_run()])))
    assert document.count("figure") == 0
    assert document.count("details") == 1


def test_without_matplotlib_one_message_says_what_to_install(a_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'pst-ds\[plots\]'"):
        page(read_runs([a_run("one")]))
