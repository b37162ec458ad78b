"""The site that ``make docs`` writes: every page is in it, links are checked, and every public name is described."""

from __future__ import annotations

import importlib.util
import inspect
import operator
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import pst_ds
import pst_ds.hf

from .pages import PAGES, PLANNED, ROOT

CONFIG = ROOT / "tools" / "docs" / "mkdocs.yml"
PUBLIC = {f"{module.__name__}.{name}" for module in (pst_ds, pst_ds.hf) for name in module.__all__} - {
    "pst_ds.__version__"
}


@pytest.fixture(scope="module")
def site_pages():
    spec = importlib.util.spec_from_file_location("site_pages", CONFIG.with_name("site_pages.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation():
    assert sorted(page for page in PAGES if page.startswith("docs/")) == sorted(PLANNED)


def test_the_front_page_leads_to_pages_only(site_pages):
    targets = re.findall(r"\]\(([^)]+)\)", site_pages.front_page())
    links = [target for target in targets if not target.startswith("https://")]
    assert len(links) > 15
    assert not [link for link in links if not (ROOT / "docs" / link.partition("#")[0]).exists()]


def test_links_that_leave_the_folder_become_words(site_pages):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="how-to/export.md"))
    text = "[a](../../README.md), [b](../../tools/examples), [c](../reference/run-file.md), [d](https://arxiv.org)"
    expected = "[a](../index.md), b, [c](../reference/run-file.md), [d](https://arxiv.org)"
    assert site_pages.on_page_markdown(text, page=page) == expected


def test_the_reference_has_every_public_name(site_pages):
    assert set(re.findall(r'heading: "(.+)"', site_pages.api_reference())) == PUBLIC


def test_the_api_page_has_the_signature_of_every_public_name():
    """Parameters are those of the function, in their order; ``...`` leaves out the rest."""
    headings = re.findall(r"^(?:###|\|) `([\w.]+)(?:\((.*)\))?`(?: \||$)", PAGES["docs/reference/api.md"], flags=re.M)
    assert {f"pst_ds.{name}" for name, _ in headings} == PUBLIC, "docs/reference/api.md has another API"
    for name, shown in headings:
        value = operator.attrgetter(name)(pst_ds)
        if isinstance(value, type) and issubclass(value, Exception):
            continue
        names = [part.strip().partition("=")[0] for part in re.sub(r"\([^()]*\)", "", shown).split(",")]
        names = [part.lstrip("*") for part in names if part not in ("", "*")]
        actual = list(inspect.signature(value).parameters)
        assert (names[:-1] == actual[: len(names) - 1]) if names[-1:] == ["..."] else (names == actual), name


def test_make_docs_is_strict_and_lets_warnings_count():
    done = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True)
    (command,) = [line for line in done.stdout.splitlines() if "mkdocs build" in line]
    assert "--strict" in command
    assert "--quiet" not in command  # mkdocs counts only the warnings that it prints


def test_the_site_is_built_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="mkdocs is not installed: pip install 'pst-ds[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", CONFIG, "--site-dir", tmp_path],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "api.html").read_text(encoding="utf-8")
    assert {name for name in PUBLIC if name in reference} == PUBLIC
    assert 'class="doc doc-contents' in reference
