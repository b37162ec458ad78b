"""Run folders made up from numbers, and a headless Chromium to look at pages with."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

REPLY_SECONDS = 60.0
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """``write_run(name, metrics=[…], layers=[…], result={…}, run_file="…")``: a run folder with these files."""

    def write(
        name: str = "mine",
        *,
        metrics: list[dict[str, Any]] | None = None,
        layers: list[dict[str, Any]] | None = None,
        result: dict[str, Any] | None = None,
        run_file: str = 'method = "pst"\n[schedule]\nfinal_sparsity = 0.9\n',
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "run.toml").write_text(run_file, encoding="utf-8")
        for file, lines in (("metrics.jsonl", metrics), ("layers.jsonl", layers)):
            if lines is not None:
                _lines(folder / file, lines)
        if result is not None:
            (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def a_run(write_run: Callable[..., Path]) -> Callable[..., Path]:
    """``a_run(name, steps, layers)``: a run with everything a report shows, of so many steps and layers."""

    def make(name: str = "mine", steps: int = 40, layers: int = 6) -> Path:
        updates = range(4, steps, 4)
        metrics: list[dict[str, Any]] = []
        for step in range(1, steps + 1):
            line = {"loss": 1.0 / step, "lr/head": 1e-3 * (steps - step), "lr/scores": 1e-2 * max(0, steps // 2 - step)}
            sparsity = {"sparsity/target": 0.9 * step / steps, "sparsity/actual": 0.9 * step / steps}
            common = {"seconds": 1.0, "flip_rate": 0.01, "tokens_per_second": 500.0, "peak_memory_bytes": 1 << 30}
            if step in updates:
                metrics.append({"step": step, "event": "mask_update", "flip_rate": 0.5 / step, **sparsity})
            metrics.append({"step": step, "event": "step", **line, **sparsity, **common})
        metrics.append({"step": steps, "event": "scores", "correlation": 0.7})
        metrics.append({"step": steps, "event": "evaluation", "eval/accuracy": 0.8})
        names = [f"model.layers.{i}.proj" for i in range(layers)]
        about: list[dict[str, Any]] = [{"layers": names, "weights": [1000] * layers}]
        for step in updates:
            kept = [1000 - 900 * step // steps - i for i in range(layers)]
            about.append({"step": step, "event": "masks", "kept": kept, "flipped": [step + i for i in range(layers)]})
        figures = {key: [0.1 * (i + 1) for i in range(layers)] for key in ("score_norm", "update_norm", "weight_norm")}
        correlation = [None, *(0.9 - 0.01 * i for i in range(1, layers))]
        about.append({"step": steps, "event": "scores", "correlation": correlation, **figures})
        result = {"steps": steps, "metrics": {"accuracy": 0.8}, "sparsity_in_masks": 0.9, "seconds": 3723.0}
        return write_run(name, metrics=metrics, layers=about, result=result)

    return make


class Tab:
    """A tab of a Chromium that is spoken to over its debugging pipe: JSON messages, a zero byte after each."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = to_browser, from_browser
        self._rest, self._count, self._session = b"", 0, ""
        self.problems: list[str] = []
        """Errors and warnings that the pages opened so far gave rise to."""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        reply = self._until(lambda found: found.get("id") == self._count)
        assert "error" not in reply, reply
        return reply["result"]

    def open(self, page: Path | str, *, width: int, dark: bool = False) -> None:
        """Show a page, of a file or an address, at this width in CSS pixels."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        self._until(lambda found: found.get("method") == "Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression in the page comes to."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as from a keyboard."""
        text = {"Enter": "\r", " ": " "}.get(key)
        code = {"Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("keyDown", "keyUp"):
            about = {"text": text} if text and kind == "keyDown" else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **about)

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path) -> None:
        """Save the whole page as PNG."""
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + REPLY_SECONDS
        while True:
            while b"\0" in self._rest:
                message, _, self._rest = self._rest.partition(b"\0")
                found = json.loads(message)
                if found.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                    self.problems.append(str(found["params"]))
                if is_it(found):
                    return found
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"Chromium said nothing for {REPLY_SECONDS} s"
            read = os.read(self._from, 1 << 20)
            assert read, "Chromium has ended"
            self._rest += read


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """One tab for all tests, in a Chromium without a window."""
    if CHROMIUM is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome on the path")
    to_browser, from_browser = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    profile = tmp_path_factory.mktemp("chromium")
    inner = f'exec 3<&{to_browser[0]} 4>&{from_browser[1]}; exec "$@"'  # the numbers that Chromium wants
    browser = subprocess.Popen(
        ["bash", "-c", inner, "bash", CHROMIUM, *options, f"--user-data-dir={profile}"],
        pass_fds=(to_browser[0], from_browser[1]), stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Tab(to_browser[1], from_browser[0])
    finally:
        os.close(to_browser[1])  # at which it ends
        with suppress(subprocess.TimeoutExpired):
            browser.wait(timeout=10)
        with suppress(ProcessLookupError):
            os.killpg(browser.pid, 9)
        browser.wait()
        os.close(from_browser[0])
