"""A report that is served: over HTTP, and in a browser that follows a run."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request

import pytest

from pst_ds.cli.main import main
from pst_ds.errors import InputError
from pst_ds.report.live import LiveReport, server_of, state_of
from pst_ds.report.page import page
from pst_ds.report.run_data import read_runs

SECONDS = 60.0
LOSS = "document.querySelector('figure.chart .legend b').textContent"


@pytest.fixture
def served(a_run):
    """``served`` is the folder of a run, the address of its live report, and what was rendered."""
    folder, rendered = a_run(), []

    def render(state):
        rendered.append(state)
        return page(read_runs([folder]), [], [], state=state, seconds=0.05).encode()

    with server_of(LiveReport([folder], render), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}", rendered
        server.shutdown()
        thread.join()


def _add_step(folder, step, loss):
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "event": "step", "loss": loss}) + "\n")


def _get(url):
    with urllib.request.urlopen(url, timeout=SECONDS) as answer:
        return answer.status, answer.headers, answer.read().decode()


def test_the_page_is_made_anew_only_when_the_run_has_changed(served):
    folder, url, rendered = served
    status, headers, text = _get(f"{url}/")
    assert status == 200
    assert headers["Cache-Control"] == "no-store"
    _, _, state = _get(f"{url}/state")
    assert f'data-state="{state}"' in text
    assert "connect-src 'self'" in text
    assert _get(f"{url}/")[2] == text
    assert rendered == [state]
    _add_step(folder, 41, 0.5)
    assert _get(f"{url}/state")[2] != state
    assert _get(f"{url}/")[2] != text
    assert len(rendered) == 2


def test_a_page_that_cannot_be_made_now_or_is_not_there_is_said(served):
    folder, url, _ = served
    (folder / "run.toml").unlink()
    for path, status in (("/", 503), ("/else", 404)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            _get(url + path)
        assert caught.value.code == status


def test_a_page_in_a_file_follows_nothing(a_run):
    text = page(read_runs([a_run()]), [], [])
    assert "data-state" not in text.partition("<script>")[0]
    assert "connect-src" not in text


def test_a_port_that_is_taken_is_refused(served):
    folder, url, _ = served
    with pytest.raises(InputError, match="cannot be listened on"):
        server_of(LiveReport([folder], lambda state: b""), "127.0.0.1", int(url.rpartition(":")[2]))


def test_files_that_are_not_there_yet_have_a_state(tmp_path):
    before = state_of([tmp_path])
    assert state_of([tmp_path]) == before
    (tmp_path / "result.json").write_text("{}")
    assert state_of([tmp_path]) != before


def test_the_verb_serves_until_it_is_interrupted(a_run, capsys, monkeypatch):
    def serve(server):
        thread = threading.Thread(target=server._handle_request_noblock)
        thread.start()
        assert "pst-ds report" in _get(f"http://127.0.0.1:{server.server_port}/")[2]
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", serve)
    assert main(["report", str(a_run()), "--watch", "--port", "0", "--json"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[-1])["url"] in said[0]


def test_a_browser_follows_the_run(tab, served):
    folder, url, _ = served
    tab.problems.clear()
    tab.open(f"{url}/", width=1280)
    tab.value("document.querySelector('details').open = true")
    assert tab.value(LOSS) == "0.025"
    _add_step(folder, 41, 0.0125)
    deadline = time.monotonic() + SECONDS
    while tab.value(LOSS) != "0.0125" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tab.value(LOSS) == "0.0125"
    assert tab.value("document.querySelector('details').open")
    tab.value("document.querySelector('figure.chart .plot').focus()")
    tab.press("ArrowLeft")  # the new figures answer too
    assert tab.value("document.querySelector('figure.chart output').textContent").startswith("step ")
    assert tab.problems == []
    tab.open("about:blank", width=1280)
