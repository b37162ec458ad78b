"""The documents point to what there is: pages, headings, files, settings; and the index has every page."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import PurePosixPath

import pytest

from ..test_layers import LAYER_OF
from .pages import PAGES, PLANNED, ROOT, settings

TREE_FOLDERS = ("pst_ds", "tests", "tools", "launch", "docs", "ds_configs")


def _prose(page: str) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)


def _anchors(page: str) -> set[str]:
    """Of the page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = PurePosixPath(page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        named = page if not path else (ROOT / folder / path).resolve().relative_to(ROOT).as_posix()
        assert (ROOT / named).exists(), target
        if anchor:
            assert anchor in _anchors(named), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for words in re.findall(r"`([^`\n]+)`", _prose(page)):
        path = words.split()[0]
        if re.fullmatch(rf"({'|'.join(TREE_FOLDERS)})/[\w./-]*", path):
            assert (ROOT / path).exists(), path
        for module in re.findall(r"python -m (tools(?:\.[a-z_0-9]+)*)", words):
            assert find_spec(module), module


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_are_named_exist(page):
    sections = {key.partition(".")[0] for key in settings() if "." in key}
    for section, name in re.findall(r"`(\w+)\.([a-z_0-9]+)(?: = [^`]*)?`", _prose(page)):
        is_file = name in ("json", "jsonl", "toml", "txt", "csv", "parquet", "safetensors", "tsv", "onnx")
        if section in sections and not is_file:
            assert f"{section}.{name}" in settings(), f"{section}.{name}"


def test_the_readme_links_to_every_page():
    assert {*re.findall(r"\]\((docs/[\w/-]+\.md)\)", PAGES["README.md"])} == {*PLANNED}


def test_the_layers_of_the_architecture_page_are_those_of_the_code():
    page = PAGES["docs/background/architecture.md"]
    rows = re.findall(r"^\| `pst_ds/(\w+)` \| (\d) \|", page, flags=re.M)
    packages = {path.name for path in (ROOT / "pst_ds").iterdir() if (path / "__init__.py").exists()}
    assert {name: int(layer) for name, layer in rows} == {name: LAYER_OF[name] for name in packages}


def test_the_readme_shows_what_it_is_before_how_to_install_it():
    text = PAGES["README.md"]
    table = text.index("\n| model |")
    assert table < text.index("## Installation") < text.index("## A first run")
    assert text[:table].count("\n") < 15
