"""Machines by name and from TOML files, and what is wrong with some."""

from __future__ import annotations

import pytest

from pst_ds.errors import InputError
from pst_ds.planning.machines import MACHINES, machine_of

LEAST = """
name = "4 x L40S a node"
flops = 180e12
memory_bytes = 0.7e12
node_size = 4
node_bytes = 20e9
network_bytes = 10e9
latency = 1e-5
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "mine.toml").write_text(text)
        return str(tmp_path / "mine.toml")

    return write


def test_a_file_has_the_fields_of_a_machine_and_the_rest_by_default(written):
    found = machine_of(written(LEAST + "update_seconds = 1e-12\n"))
    assert (found.name, found.flops, found.node_size, found.update_seconds) == ("4 x L40S a node", 180e12, 4, 1e-12)
    assert (found.code, found.launch_seconds, found.overlaps) == ("triton", 5.5e-6, True)
    assert (found.device, found.backend) == ("cuda", "nccl")
    on_cpu = machine_of(written(LEAST + 'code = "native"\nlaunch_seconds = 0\noverlaps = false\n'))
    assert (on_cpu.device, on_cpu.backend, on_cpu.launch_seconds) == ("cpu", "gloo", 0.0)
    assert isinstance(machine_of(written(LEAST.replace("180e12", "180000"))).flops, float)


def test_names_are_those_of_the_table():
    assert {"h100", "h200", "b200", "a100", "mi300x", "cpu"} == set(MACHINES)
    assert machine_of("b200") is MACHINES["b200"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LEAST.replace("flops = 180e12\n", ""), ("flops missing",)),
        (LEAST.replace("flops =", "flop ="), ("flops missing",)),
        (LEAST + "flop = 1\n", ("unknown key 'flop'", "Did you mean 'flops'?")),
        (LEAST + "colour = 'red'\n", ("unknown key 'colour'", "Known keys: name, flops")),
        (LEAST.replace("180e12", "0"), ("flops = 0", "a finite number above 0")),
        (LEAST.replace("180e12", "inf"), ("flops = inf", "a finite number above 0")),
        (LEAST.replace("180e12", "'fast'"), ("flops = 'fast'", "must be a number")),
        (LEAST.replace("1e-5", "-1e-5"), ("latency = -1e-05", "a finite number of at least 0")),
        (LEAST.replace("node_size = 4", "node_size = 4.5"), ("node_size = 4.5", "must be a whole number")),
        (LEAST.replace("node_size = 4", "node_size = true"), ("node_size = True", "must be a whole number")),
        (LEAST + "overlaps = 1\n", ("overlaps = 1", "true or false")),
        (LEAST + "code = 'cuda'\n", ("code = 'cuda'", "one of 'triton', 'torch', 'native'")),
        ("name = ", ("cannot be read as TOML",)),
    ],
)
def test_what_is_wrong_is_named_with_its_value_and_the_fix(written, text, words):
    path = written(text)
    with pytest.raises(InputError) as raised:
        machine_of(path)
    assert "\n" not in str(raised.value)
    for word in (path, *words):
        assert word in str(raised.value)


@pytest.mark.parametrize("name", ["h1000", "no/such.toml"])
def test_a_machine_that_is_not_there(name):
    with pytest.raises(InputError, match=r"[Nn]ame a TOML file") as raised:
        machine_of(name)
    assert repr(name) in str(raised.value)


def test_a_folder_is_no_machine(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        machine_of(str(tmp_path / "folder.toml"))
