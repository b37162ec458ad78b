"""``import pst_ds``: every name is there when it is asked for, and nothing heavy before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pst_ds


@pytest.mark.parametrize("name", pst_ds.__all__)
def test_every_name_is_there(name):
    assert name in dir(pst_ds)
    value = getattr(pst_ds, name)
    assert value is getattr(pst_ds, name)
    assert name == "__version__" or value.__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pst_ds' has no attribute 'inject'"):
        _ = pst_ds.inject


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, pst_ds; print(sorted({'torch', 'numpy', 'transformers', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
