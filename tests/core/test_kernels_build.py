"""The library that an installation makes: what a wheel holds, and when it is used, compiled anew, or done without."""

import os
import re
import shutil
import subprocess
import sys
import venv
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from pst_ds.core import kernels, quantization, stats
from pst_ds.core.kernels import INT, NativeSource, library_file, load
from pst_ds.formats import rows
from pst_ds.inference.onnx import operators as onnx
from pst_ds.runtime import native
from pst_ds.runtime import native_loop as decoder

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
AGES = {"older": -100, "newer": 100}


def program(number, name="pst_which"):
    return f'extern "C" long long {name}() {{ return {number}; }}\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source that says 2, with a header, in a checkout; its prebuilt library is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PST_DS_NATIVE", raising=False)
    monkeypatch.setattr(kernels, "_PACKAGE", tmp_path / "checkout" / "pst_ds")
    monkeypatch.setattr(kernels, "_FOLDER", tmp_path)
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "which.cpp").write_text('#include "which.hpp"\n' + program(2))
    (tmp_path / "cpp" / "which.hpp").write_text("// nothing\n")
    return NativeSource("which.cpp", {"pst_which": ([], INT)}, "tests", ("-std=c++17",))


def prebuild(source, text, age="newer"):
    """Puts a library of ``text`` in the place of the prebuilt one; its date is before, or after, the sources'."""
    code = source.prebuilt.with_suffix(".cpp")
    code.write_text(text)
    subprocess.run([COMPILER, "-shared", "-fPIC", code, "-o", source.prebuilt], check=True)
    date_it(source, age)


def date_it(source, age):
    when = source.path.stat().st_mtime + AGES[age]
    os.utime(source.prebuilt, (when, when))


@needs_compiler
@pytest.mark.parametrize(("age", "used"), [("newer", 1), ("older", 2)])
def test_a_prebuilt_library_is_used_unless_a_source_is_newer(source, age, used):
    prebuild(source, program(1), age)
    assert load(source).pst_which() == used


@needs_compiler
def test_a_newer_header_makes_it_stale_too(source):
    prebuild(source, program(1))
    when = source.path.stat().st_mtime + 2 * AGES["newer"]
    os.utime(source.sources[1], (when, when))
    assert load(source).pst_which() == 2


@needs_compiler
def test_an_installation_uses_its_own_whatever_the_dates(source, tmp_path):
    """pip writes a wheel's files in the order of their names, and the library comes before its sources."""
    prebuild(source, program(1), "older")
    (tmp_path / "checkout" / "pst_ds-9.0.dist-info").mkdir(parents=True)
    assert load(source).pst_which() == 1


@needs_compiler
def test_one_that_does_not_load_is_compiled_here(source):
    source.prebuilt.write_bytes(b"\x7fELF of another machine")
    date_it(source, "newer")
    assert load(source).pst_which() == 2


@needs_compiler
def test_one_that_lacks_a_function_is_compiled_here(source):
    prebuild(source, program(1, "pst_of_an_older_version"))
    assert load(source).pst_which() == 2


@needs_compiler
def test_flags_that_the_compiler_refuses_are_left_out(source):
    assert load(replace(source, may_flags=("-fno-such-flag",))).pst_which() == 2
    with pytest.warns(UserWarning, match="native code cannot be built"):
        assert load(replace(source, flags=("-fno-such-flag",))) is None


@pytest.mark.parametrize("prebuilt", [True, False])
def test_with_neither_there_is_none_and_a_warning(source, prebuilt, monkeypatch):
    if prebuilt:
        source.prebuilt.write_bytes(b"no library")
        date_it(source, "newer")
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(UserWarning, match="tests run in torch, several times slower"):
        assert load(source) is None


def test_the_environment_can_do_without(source, monkeypatch):
    monkeypatch.setenv("PST_DS_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(source) is None


@pytest.mark.parametrize(("switch", "fix"), [("0", "PST_DS_NATIVE = '0'.*Unset it"), (None, "name one in CXX")])
def test_a_missing_decoder_loop_is_refused_by_its_cause(switch, fix, monkeypatch):
    """Unsetting a variable that is not set fixes nothing."""
    monkeypatch.setattr(decoder, "library", lambda: None)
    if switch is not None:
        monkeypatch.setenv("PST_DS_NATIVE", switch)
    with pytest.raises(RuntimeError, match=fix) as caught:
        decoder.require_library()
    assert ("PST_DS_NATIVE" in str(caught.value)) == (switch == "0")


def included(path):
    """The files that a source or a header includes by a path, and those that these include."""
    names = re.findall(r'^#include "(.+)"$', path.read_text(), re.MULTILINE)
    direct = {(path.parent / name).resolve() for name in names}
    return direct.union(*(included(header) for header in direct))


NATIVE = [
    value
    for module in (kernels, decoder, native, onnx, quantization, rows, stats)
    for value in vars(module).values()
    if isinstance(value, NativeSource)
]


@pytest.mark.parametrize("of", NATIVE, ids=lambda of: of.path.name)
def test_every_header_that_is_included_is_looked_at(of):
    assert included(of.path) <= set(of.sources)


def test_every_source_is_among_them():
    assert {of.path for of in NATIVE} == set((ROOT / "pst_ds").rglob("*.cpp"))


@needs_compiler
def test_a_library_for_others_is_the_prebuilt_one_or_compiled(source):
    assert library_file(source).parent.name == "pst_ds"  # the cache
    prebuild(source, program(1))
    assert library_file(source) == source.prebuilt


def test_a_library_for_others_that_cannot_be_built_is_an_error(source, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="tests cannot be built"):
        library_file(source)


def built_wheel(folder, **environment):
    """A wheel of a copy of this tree, unpacked as an installer does; returns (it, its names, where it is). Compiled
    without optimisation, in a fraction of the time."""
    tree = folder / "tree"
    shutil.copytree(ROOT / "pst_ds", tree / "pst_ds", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("README.md", "LICENSE", "setup.py"):
        shutil.copy(ROOT / name, tree)
    (tree / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text().replace('"-O3"', '"-O0"'))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree]
    done = subprocess.run(build, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        return wheel, set(archive.namelist()), folder / "site"


USE = """
import sys, torch, pst_ds
from pst_ds.formats import FORMATS
from pst_ds.runtime import SparseLinear, native
layer = SparseLinear(40, 40, 40, bias=False)
layer.load_state_dict(FORMATS["bitmask"].pack(torch.eye(40).bfloat16()))
layer.check("eye")
y = layer(torch.ones(1, 40).bfloat16())
assert torch.equal(y, torch.ones(1, 40).bfloat16()), y
print(pst_ds.__file__, getattr(native.library(), "_name", None))
"""


def used_library(site, folder, **environment):
    """(where the package is, the library of kernels that it uses or "None"), after a product that is right."""
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(folder / "cache"), **environment}
    done = subprocess.run([sys.executable, "-c", USE], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    package, library = done.stdout.split()
    assert Path(package).is_relative_to(site)
    return library


SOURCES = {
    str(path.relative_to(ROOT))
    for pattern in ("*.cpp", "*.hpp", "py.typed", "*.toml", "*.md", "*.html", "*.css")
    for path in (ROOT / "pst_ds").rglob(pattern)
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("setuptools", "77")
    return built_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.thorough
@needs_compiler
def test_a_wheel_holds_the_kernels_and_their_sources_and_an_installation_uses_them(built, tmp_path):
    wheel, names, site = built
    assert "-py3-none-linux_" in wheel.name
    assert names >= SOURCES
    kernels = site / "pst_ds" / "core" / "kernels"
    assert used_library(site, tmp_path) == str(kernels / "_bitmask.so")
    asked = "from pst_ds.inference.onnx.operators import operator_library; print(operator_library())"
    environment = {**os.environ, "PYTHONPATH": str(site), "CXX": "false"}
    done = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(kernels / "_operators.so"), done.stderr[-2000:]


@pytest.mark.thorough
@needs_compiler
def test_a_new_environment_serves_without_a_compiler(built, tmp_path):
    """With the dependencies of this one. The program that CI runs in its own asserts that no compiler was called."""
    pytest.importorskip("fastapi")
    venv.create(tmp_path / "venv", symlinks=True)
    python, (site,) = tmp_path / "venv" / "bin" / "python", (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[0]]
    subprocess.run(install, check=True, capture_output=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    check = [python, ROOT / "tools" / "check_wheel.py"]
    done = subprocess.run(check, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"\n{decoder.LEVELS[decoder.best_level()]} '" in done.stdout


@pytest.mark.thorough
def test_without_a_compiler_the_installation_goes_on_and_torch_computes(tmp_path):
    pytest.importorskip("setuptools", "77")
    _, names, site = built_wheel(tmp_path, CC="false", CXX="false")
    assert names >= SOURCES
    assert not [name for name in names if name.endswith(".so")]
    assert used_library(site, tmp_path, CXX="false") == "None"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("driver", "arguments"),
    [("runtime/native_loop", "20 1"), ("inference/onnx/sanitizer", "60 1 300"), ("runtime/asan", "50 1")],
)
def test_the_kernels_are_right_on_arm64(driver, arguments, tmp_path):
    """Each driver compares the portable kernels with loops written out."""
    compiler, emulator = map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64"))
    if not compiler or not emulator:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    source = ROOT / "tests" / f"{driver}_driver.cpp"
    flags = ["-std=c++17", "-O2", "-Wno-psabi", "-fno-math-errno", "-static", "-pthread"]
    subprocess.run([compiler, *flags, source, "-o", tmp_path / "driver"], check=True)
    done = subprocess.run([emulator, tmp_path / "driver", *arguments.split()], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[-2:]) == (0, ["0", "wrong"]), done.stdout[-2000:] + done.stderr[-2000:]
