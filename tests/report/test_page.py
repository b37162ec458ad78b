"""The page as a document: whole, sealed off from the network, with nothing of the data taken for markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from html.parser import HTMLParser

import pytest

from pst_ds.report import charts as axes
from pst_ds.report.page import TEMPLATES, page
from pst_ds.report.run_data import read_runs

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}
SVG_LEAVES = {"line", "path", "circle"}
NAMES = "<script>alert(1)</script> & \"quoted\" 'too' {{ 7 * 7 }}"


class Document(HTMLParser):
    """Tags with their attributes, and the texts of scripts and of everything else; fails when tags are not balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SVG_LEAVES
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        inside_script = bool(self.open) and self.open[-1] == "script"
        (self.scripts if inside_script else self.texts).append(data)

    def count(self, tag):
        return sum(found == tag for found, _ in self.tags)


@pytest.fixture
def report():
    """The page about the runs of these folders."""
    return lambda *folders: page(read_runs(folders), [], [])


@pytest.mark.parametrize("names", [("one",), ("one", "two", "three")])
def test_the_page_is_whole_and_refers_to_nothing_outside(a_run, report, names):
    text = report(*(a_run(name) for name in names))
    document = Document(text)
    for tag, attributes in document.tags:
        assert tag not in ("link", "iframe", "object", "embed", "form", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "href", "srcset", "action", "data"), (tag, name, value)
    assert not re.search(r"https?://|@import|url\(", text)
    assert document.count("h1") == 1
    assert document.count("table") == document.count("caption")


def test_every_drawing_has_a_name_and_every_heading_a_scope(a_run, report):
    document = Document(report(a_run("one")))
    plots = [attributes for tag, attributes in document.tags if tag == "svg" and attributes.get("class") == "plot"]
    assert len(plots) == 5
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in plots)
    assert document.count("title") == 1 + len(plots)
    assert all(attributes.get("scope") for tag, attributes in document.tags if tag == "th")


def test_what_was_measured_once_is_a_number_and_no_chart(write_run, report):
    once = {"step": 200, "event": "evaluation", "eval/accuracy": 0.8512, "eval/loss": 0.25}
    steps = [{"step": step, "event": "step", "loss": 1.0 / step} for step in (1, 200)]
    text = report(write_run("one", metrics=[*steps, once]))
    assert re.findall(r'aria-label="(.*) by step"', text) == ["Loss"]
    row = r"Evaluation: accuracy</th><td>one</td>\s*<td [^>]*>200</td>\s*<td [^>]*>0.8512</td>"
    assert re.search(row, text)
    assert Document(text).texts.count("Measured once") == 1
    text = report(write_run("two", metrics=[once]), write_run("three", metrics=[{**once, "step": 300}]))
    assert "by step" not in text
    assert re.findall(r"Evaluation: loss</th><td>(\w+)</td>\s*<td [^>]*>(\d+)<", text) == [
        ("two", "200"),
        ("three", "300"),
    ]
    text = report(write_run("four", metrics=[once, {**once, "step": 300}]))
    assert re.findall(r'aria-label="(.*) by step"', text) == ["Evaluation: accuracy", "Evaluation: loss"]
    assert "Measured once" not in text


def test_only_our_script_may_run(a_run, report):
    text = report(a_run("one"))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src 'none'" in policy
    (allowed,) = re.findall(r"script-src 'sha256-([^']*)'", policy)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == allowed


def test_what_the_data_says_is_text(write_run, report):
    name = NAMES.replace("/", "")
    metrics = [
        {"step": s, "event": "evaluation", f"eval/{NAMES}": 0.5, "loss": 1.0, f"lr/{NAMES}": 0.1} for s in (1, 2)
    ]
    layers = [
        {"layers": [f"a.{NAMES}", "a.b"], "weights": [10, 10]},
        {"step": 1, "event": "masks", "kept": [5, 5], "flipped": [5, 5]},
    ]
    run_file = f"method = {json.dumps(NAMES)}\n{json.dumps(NAMES)} = 3\n"
    one = write_run(name, metrics=metrics, layers=layers, result={"metrics": {NAMES: 1.0}}, run_file=run_file)
    text = report(one, write_run("other"))
    document = Document(text)
    assert document.count("script") == 1 + sum("application/json" in (a.get("type") or "") for _, a in document.tags)
    shown = "".join(document.texts)
    assert shown.count("<script>alert(1)") >= 7
    assert "{{ 7 * 7 }}" in shown
    assert text.count("alert(1)</script>") == 0
    for script in document.scripts[:-1]:
        json.loads(script)


def test_a_run_that_has_just_begun_has_a_page(write_run, report):
    document = Document(report(write_run()))
    assert document.count("figure") == 0
    assert document.count("details") == 1


@pytest.mark.thorough
def test_a_long_run_of_a_large_model_makes_a_page_of_few_megabytes(a_run, report):
    folder = a_run("long", steps=8000, layers=300)  # 2,000 mask updates
    with (folder / "metrics.jsonl").open("a") as stream:
        for step in range(8001, 100_001):
            stream.write(json.dumps({"step": step, "event": "step", "loss": 1.0 / step, "lr/head": 1e-3}) + "\n")
    started = time.process_time()
    text = report(folder)
    print(f"{len(text):,} bytes in {time.process_time() - started:.1f} s of CPU")
    assert len(text) < 2_500_000
    Document(text)


def test_the_plot_is_where_the_script_looks_for_it():
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    (line,) = re.findall(r"^const (WIDTH = .*);$", script, flags=re.M)
    assert dict(pair.split(" = ") for pair in line.split(", ")) == {
        name: str(getattr(axes, name)) for name in ("WIDTH", "LEFT", "RIGHT")
    }


def _luminance(colour):
    """Relative luminance of "#rgb" or "#rrggbb", as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_and_lines_stand_out_from_the_page(scheme):
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, flags=re.S)[scheme]
    colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{3,6});", block))
    page_luminance = _luminance(colours["page"])
    for name in ("ink", "faint", "link", *(f"c{i}" for i in range(6))):
        low, high = sorted((page_luminance, _luminance(colours[name])))
        wanted = 4.5 if name in ("ink", "faint", "link") else 3.0  # of WCAG AA: texts, and what must be seen
        assert (high + 0.05) / (low + 0.05) >= wanted, (name, (high + 0.05) / (low + 0.05))


def test_a_verdict_comes_before_everything_else(a_run, write_run, report):
    fit = {"verdict": "underfits", "reason": "it <does>", "fixes": [{"train.num_steps": 1800}]}
    slow = write_run("slow", metrics=[{"step": 1, "event": "step", "loss": 1.0}], result={"steps": 9, "fit": fit})
    page = report(slow)
    said = "The run underfits: it &lt;does&gt;. Fix: train.num_steps = 1800."
    assert page.count(said) == 1
    assert page.index(said) < page.index("<table")
    assert 'class="verdict"' not in report(a_run("fine"))
    assert f'<p class="verdict">slow: {said}</p>' in report(slow, a_run("other"))
    for odd in (3, {"verdict": 3, "fixes": 3}, {"verdict": "x", "fixes": [3]}, None):
        (slow / "result.json").write_text(json.dumps({"steps": 9, "fit": odd}))
        assert "<table" in report(slow)
