"""Compiled libraries in the cache: damaged ones are rebuilt, and those that another user could have planted unused."""

from __future__ import annotations

import os
import platform
import pwd
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from pathlib import Path

import pytest

from pst_ds.core import kernels as native
from pst_ds.core.kernels import INT, NativeSource, load
from pst_ds.core.kernels.library_cache import cache_folder, store_library
from pst_ds.data.tokens import loading as tokens
from tests.pairs import every_pair

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")
OURS, PLANTED, SOMEBODY = 2, 9, 54321


def program(number, name="pst_which"):
    return f'extern "C" long long {name}() {{ return {number}; }}\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source that says OURS; its cache is in a folder that only this user can change."""
    (tmp_path / "above").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "above" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("CXX", "PST_DS_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "which.cpp"
    path.write_text(program(OURS))
    return NativeSource(path, {"pst_which": ([], INT)}, "tests", ("-std=c++17",))


@pytest.fixture
def cached(source, tmp_path):
    """The file of ``source`` in the cache."""
    assert said_by(source) == OURS
    (path,) = (tmp_path / "above/cache/pst_ds").iterdir()
    return path


def said_by(source, before=lambda: None):
    """What ``source`` says in a fork, which a library may kill, and which has loaded none before."""
    pid = os.fork()
    if not pid:
        try:
            before()
            os._exit(load(source).pst_which())
        finally:
            os._exit(100)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def compiled(folder, text):
    (folder / "other.cpp").write_text(text)
    subprocess.run([COMPILER, "-shared", "-fPIC", folder / "other.cpp", "-o", folder / "other.so"], check=True)
    return (folder / "other.so").read_bytes()


def plant(cached, data):
    """Put ``data`` in the place of the library in the cache, under the name that it ought to have."""
    cached.unlink()
    return store_library(cached.parent, cached.name.rpartition("-")[0], data)


@pytest.mark.few(1)
@pytest.mark.parametrize("damage", ["truncated", "zeroed", "empty", "another"])
def test_a_damaged_library_is_compiled_again(source, cached, tmp_path, damage):
    whole = cached.read_bytes()
    data = {
        "truncated": whole[: len(whole) // 4], "zeroed": bytes(len(whole)), "empty": b"",
        "another": compiled(tmp_path, program(PLANTED)),
    }[damage]  # fmt: skip
    cached.unlink()
    cached.write_bytes(data)
    assert said_by(source) == OURS
    assert cached.read_bytes() == whole  # for the next process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(source).pst_which() == OURS


def test_a_library_without_a_function_is_compiled_again(source, cached, tmp_path):
    plant(cached, compiled(tmp_path, program(PLANTED, "pst_of_another_version")))
    assert said_by(source) == OURS


def test_a_library_is_on_disk_before_it_has_its_name(source, tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    assert load(source).pst_which() == OURS
    assert order == ["fsync", "replace"]


def _full(*_):
    raise OSError("No space left on device")


def test_a_full_disk_leaves_nothing_and_a_warning(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.warns(UserWarning, match="native code cannot be built: No space left on device: tests run in torch"):
        assert load(source) is None
    assert not list((tmp_path / "above/cache/pst_ds").iterdir())


def test_what_only_this_user_can_change_is_loaded(source, cached, tmp_path):
    plant(cached, compiled(tmp_path, program(PLANTED)))  # by this user
    (tmp_path / "above").chmod(0o1777)  # as /tmp, whose entries nobody but their owner can rename
    assert said_by(source) == PLANTED


@every_pair
@pytest.mark.parametrize("place", ["file", "folder", "parent", "parent of a link"])
@pytest.mark.parametrize("change", ["owner", "for all", "for a group"])
def test_what_others_could_have_put_there_is_not_loaded(source, cached, tmp_path, monkeypatch, place, change):
    if change == "owner" and os.geteuid() != 0:
        pytest.skip("gives files to other users")
    planted = plant(cached, compiled(tmp_path, program(PLANTED)))
    if place == "parent of a link":
        (tmp_path / "link").symlink_to(tmp_path / "above" / "cache")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
    path = {"file": planted, "folder": planted.parent}.get(place, tmp_path / "above")
    if change == "owner":
        os.chown(path, SOMEBODY, -1)
    else:
        path.chmod(0o777 if change == "for all" else 0o770)
        if os.geteuid() == 0:
            os.chown(path, -1, SOMEBODY)
    if place == "file":
        assert load(source).pst_which() == OURS
        return
    with pytest.warns(UserWarning, match=rf"is not used for compiled code: .* {path}\. Change that"):
        assert load(source).pst_which() == OURS
    assert [p.name for p in (tmp_path / f"pst_ds-{os.geteuid()}").iterdir()] == [cached.name]


def test_a_group_that_is_the_user_s_own_is_nobody_else(source, cached, tmp_path, monkeypatch):
    plant(cached, compiled(tmp_path, program(PLANTED)))
    cached.parent.chmod(0o770)
    monkeypatch.setattr("grp.getgrgid", lambda gid: _Group(pwd.getpwuid(os.geteuid()).pw_name, []))
    assert said_by(source) == PLANTED
    monkeypatch.setattr("grp.getgrgid", lambda gid: _Group(pwd.getpwuid(os.geteuid()).pw_name, ["somebody"]))
    with pytest.warns(UserWarning, match="other users can write to"):
        assert load(source).pst_which() == OURS


class _Group:
    def __init__(self, name, members):
        self.gr_name, self.gr_mem = name, members


def test_a_home_that_is_not_known_or_not_writable_is_no_hindrance(source, tmp_path, monkeypatch):
    in_temporary = tmp_path / f"pst_ds-{os.geteuid()}"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() == in_temporary
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert cache_folder() == in_temporary
    assert stat.S_IMODE(in_temporary.stat().st_mode) == 0o700
    in_temporary.chmod(0o777)
    with pytest.warns(UserWarning, match="other users can write"):
        other = cache_folder()
    assert other.parent == tmp_path
    assert stat.S_IMODE(other.stat().st_mode) == 0o700
    monkeypatch.delenv("PST_DS_CACHE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "~/.cache/huggingface")
    in_temporary.chmod(0o700)
    assert tokens.cache_folder() == in_temporary / "tokens"


@as_root
def test_a_user_without_a_home_or_a_name_compiles(source):
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # that such a user can read
        folder = Path(place)
        folder.chmod(0o755)
        shutil.copy(source.path, folder)
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o1777)

        def become_nobody():
            os.setgroups([])
            os.setgid(SOMEBODY)
            os.setuid(SOMEBODY)
            os.environ.clear()
            os.environ.update(PATH=os.defpath, TMPDIR=str(folder / "tmp"))
            tempfile.tempdir = None

        moved = NativeSource(folder / source.path.name, source.functions, source.purpose, source.flags)
        assert said_by(moved, become_nobody) == OURS
        assert [path.name for path in (folder / "tmp").iterdir()] == [f"pst_ds-{SOMEBODY}"]


def test_another_compiler_version_or_libc_has_its_own_library(source, cached, tmp_path, monkeypatch):
    wrapper = tmp_path / "a compiler"
    wrapper.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "$VERSION" && exit\nexec {COMPILER} "$@"\n')
    wrapper.chmod(0o755)
    names = [cached.name]
    for version, libc in (("1", "2.31"), ("2", "2.31"), ("2", "2.39"), ("1", "2.31")):
        native._version.cache_clear()
        monkeypatch.setenv("CXX", shlex.quote(str(wrapper)))
        monkeypatch.setenv("VERSION", version)
        monkeypatch.setattr(platform, "libc_ver", lambda libc=libc: ("glibc", libc))
        assert load(source).pst_which() == OURS
        names += [path.name for path in cached.parent.iterdir() if path.name not in names]
    assert len(names) == 4


def test_a_compiler_may_be_several_words(source, tmp_path, monkeypatch):
    launcher = tmp_path / "cached"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CXX", f"{launcher} {COMPILER} -pipe")
    assert load(source).pst_which() == OURS
    monkeypatch.setenv("CXX", "'not closed")
    with pytest.warns(UserWarning, match="native code cannot be built: No closing quotation"):
        assert load(source) is None
