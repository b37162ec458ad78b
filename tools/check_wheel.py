"""Check an installed wheel: its compiled code serves a small int8 model at every instruction set, without a compiler.

    python tools/check_wheel.py

Run it with the Python of the environment that has the wheel and its extra ``serve``. Prints one answer per instruction
set.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from safetensors.torch import load_file, save_file

import pst_ds
from pst_ds.runtime.native_loop import LEVELS, require_library

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
PROGRAM = str(Path(sys.executable).with_name("pst-ds"))
COMPILERS = ("c++", "g++", "clang++")
CHAT = {"model": "int8", "messages": [{"role": "user", "content": "the film"}], "max_tokens": 8, "temperature": 0}


def answer(folder: Path, environment: dict[str, str]) -> str:
    """Return the first answer of a server of ``folder``, which the native decoder writes."""
    command = [PROGRAM, "serve", str(folder), "--port", "0", "--engine", "native"]
    command += ["--chat-template", str(DATA / "chat.jinja")]
    body, headers = json.dumps(CHAT), {"Content-Type": "application/json"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = urlsplit(server.stdout.readline().partition(" at ")[2].split()[0])
            while server.poll() is None:
                connection = HTTPConnection(address.netloc, timeout=120)
                with suppress(ConnectionRefusedError):  # it has a port, and does not listen yet
                    connection.request("POST", f"{address.path}/chat/completions", body, headers)
                    return str(json.load(connection.getresponse())["choices"][0]["message"]["content"])
            raise AssertionError("the server ended")
        finally:
            server.terminate()


def main() -> None:
    native = require_library()
    assert Path(native._name).is_relative_to(Path(pst_ds.__file__).parent), f"{native._name} is not the wheel's"
    levels = [name for level, name in enumerate(LEVELS) if native.pst_decoder_supports(level)]
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        shutil.copytree(DATA / "tiny-llama", top / "half")
        tensors = load_file(top / "half" / "model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                tensor[:, ::2] = 0.0
        save_file(tensors, top / "half" / "model.safetensors", {"format": "pt"})
        how = ["--format", "bitmask", "--values", "int8", "--embeddings", "int8"]
        subprocess.run([PROGRAM, "export", top / "half", *how, "--out", top / "int8"], check=True)
        (top / "bin").mkdir()
        for name in COMPILERS:  # found before any other, and leaves a trace
            (top / "bin" / name).write_text(f"#!/bin/sh\necho {name} \"$@\" >> '{top}/called'\nexit 1\n")
            (top / "bin" / name).chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "PST_DS_NATIVE")}
        environment |= {"PATH": f"{top}/bin:{environment['PATH']}", "XDG_CACHE_HOME": str(top / "cache")}
        for level in levels:
            print(level, repr(answer(top / "int8", environment | {"PST_DS_INSTRUCTIONS": level})), flush=True)
        called = top / "called"
        assert not called.exists(), f"a compiler was called:\n{called.read_text()}"


if __name__ == "__main__":
    main()
