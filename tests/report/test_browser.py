"""The page in a real browser: it fits, it says nothing on the console, its tables sort, its figures answer."""

from __future__ import annotations

import pytest

from pst_ds.report.charts import LEFT, RIGHT
from pst_ds.report.page import page
from pst_ds.report.run_data import read_runs

NAMES = "[...document.querySelectorAll('.sortable tbody th')].map((cell) => cell.textContent.trim())"
LEGEND = "document.querySelector('figure.{} .legend').innerText.replace(/\\s+/g, ' ').trim()"
CENTRE = """(() => {{
  const plot = document.querySelector('figure.{} .plot');
  plot.scrollIntoView({{block: 'center'}});
  const box = plot.getBoundingClientRect();
  return [box.x + box.width * {}, box.y + box.height * {}];
}})()"""


@pytest.fixture
def written(a_run, tmp_path):
    """A page about two runs, and one about one of them."""
    two, one = tmp_path / "two.html", tmp_path / "one.html"
    folders = [a_run("first"), a_run("second <b>", layers=12)]
    two.write_text(page(read_runs(folders), [], []), encoding="utf-8")
    one.write_text(page(read_runs(folders[1:]), [], []), encoding="utf-8")
    return two, one


def _heading(text):
    return f"[...document.querySelectorAll('.sortable th button')].find((b) => b.textContent.startsWith('{text}'))"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_is_drawn_in_the_scheme_that_is_asked_for(tab, written, tmp_path, width, dark):
    tab.problems.clear()
    for path in written:
        tab.open(path, width=width, dark=dark)
        assert tab.value("document.documentElement.scrollWidth") <= width
        tab.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert tab.value("document.documentElement.scrollWidth") <= width
    red, green, blue = tab.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(red, green, blue) < 60) if dark else (min(red, green, blue) > 230)
    picture = tmp_path / "page.png"
    tab.picture(picture)
    assert picture.stat().st_size > 20_000
    assert tab.problems == []


def test_a_table_sorts_by_click_and_by_keyboard(tab, written):
    tab.open(written[1], width=1280)
    names = tab.value(NAMES)
    assert names == [f"{i}.proj" for i in range(12)]
    correlation = _heading("correlation")
    tab.value(f"{correlation}.click()")
    assert tab.value(f"{correlation}.closest('th').getAttribute('aria-sort')") == "descending"
    assert tab.value(NAMES) == [*names[1:], names[0]]  # the first has none, and 0.9 - 0.01 i falls
    tab.value(f"{correlation}.focus()")
    tab.press("Enter")
    assert tab.value(f"{correlation}.closest('th').getAttribute('aria-sort')") == "ascending"
    assert tab.value(NAMES) == [*reversed(names[1:]), names[0]]
    layer = _heading("layer")
    tab.value(f"{layer}.focus()")
    tab.press(" ")
    assert tab.value(NAMES) == names  # 10 after 9
    assert tab.value("document.querySelectorAll('[aria-sort]').length") == 1


def test_a_chart_says_the_values_at_the_pointer_and_by_arrow_keys(tab, written):
    tab.open(written[0], width=1280)
    at_rest = tab.value(LEGEND.format("chart"))
    assert at_rest == "last values first 0.025 second <b> 0.025"
    tab.point(*tab.value(CENTRE.format("chart", (LEFT + (RIGHT - LEFT) / 2) / 360, 0.5)))  # step 20 of 40
    assert tab.value(LEGEND.format("chart")) == "step 20 first 0.05 second <b> 0.05"
    tab.value("document.querySelector('figure.chart .plot').focus()")
    tab.press("ArrowLeft")
    assert tab.value(LEGEND.format("chart")) == "step 19 first 0.05263 second <b> 0.05263"
    tab.point(1, 1)
    assert tab.value(LEGEND.format("chart")) == at_rest


def test_nine_runs_have_a_line_each_that_looks_like_no_other(tab, a_run, tmp_path):
    path = tmp_path / "nine.html"
    folders = [a_run(f"run-{i}", layers=1) for i in range(9)]
    path.write_text(page(read_runs(folders), [], []), encoding="utf-8")
    tab.open(path, width=1280)
    lines = tab.value("""[...document.querySelectorAll('figure.chart')].map((figure) =>
      [...figure.querySelectorAll('.plot path.curve')].map((line) => {
        const style = getComputedStyle(line);
        return `${style.stroke} ${style.strokeDasharray}`;
      }))""")
    assert max(map(len, lines)) == 18  # target and actual sparsity
    for of_chart in lines:
        assert len(set(of_chart)) == len(of_chart)


def test_the_labels_of_an_axis_have_room_beside_the_plot(tab, write_run, tmp_path):
    path = tmp_path / "close.html"
    firsts = {"tokens_per_second": 12_345.6, "loss": 0.9, "correlation": -1.0001, "lr/head": 1.0001e-5, "eval/f1": 0.1}
    metrics = [
        {"step": i, "event": "step", **{name: value * (1 + 1e-7 * i) for name, value in firsts.items()}}
        for i in range(2)
    ]
    path.write_text(page(read_runs([write_run(metrics=metrics)]), [], []), encoding="utf-8")
    tab.open(path, width=1280)
    left = tab.value("""[...document.querySelectorAll('figure.chart .axes text[text-anchor=end]')]
      .map((label) => [label.textContent, label.getBBox().x])""")
    assert len(left) >= 15
    assert min(x for _, x in left) >= 0, left
    assert tab.value("""[...document.querySelectorAll('figure.chart .plot path.curve')]
      .every((line) => line.getBBox().x >= Number(document.querySelector('.axes line').getAttribute('x1')))""")


def test_markup_in_the_data_is_not_run(tab, write_run, tmp_path):
    hostile = "<img src=x onerror=window.ran=1><script>window.ran=1<\\u002fscript>"
    metrics = [{"step": s, "event": "step", "loss": 1.0, f"eval/{hostile}": 1.0} for s in (1, 2)]
    path = tmp_path / "hostile.html"
    run = write_run(metrics=metrics, run_file=f'method = "{hostile}"\n', result={"metrics": {hostile: 1.0}})
    path.write_text(page(read_runs([run]), [], []), encoding="utf-8")
    tab.problems.clear()
    tab.open(path, width=1280)
    assert tab.value("window.ran") is None
    assert tab.value("document.querySelectorAll('script').length") == 3
    assert "<script>window.ran" in tab.value("document.body.innerText")
    assert tab.problems == []
