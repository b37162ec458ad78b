"""Code that loops is stopped; jinja2's sandbox bounds one range, and neither nested nor chained ones."""

from __future__ import annotations

import sys

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

pytest.importorskip("fastapi", reason="needs pip install 'pst-ds[serve]'")

from pst_ds.inference.serve.cpu_limit import call_within

LOOPS = {
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "that write": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "in a macro": "{% macro m(n) %}{% for i in range(n) %}{{ m(n) }}{% endfor %}{% endmacro %}{{ m(99999) }}",
    "in filters": "{% for i in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}",
    "in a condition": "{% for i in range(99999) if range(99999) | select('odd') | list %}{% endfor %}",
}


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_is_stopped(kind):
    template = ImmutableSandboxedEnvironment().from_string(LOOPS[kind])
    with pytest.raises((TimeoutError, RecursionError)):
        call_within(0.05, template.render)


def test_other_code_is_not_traced_afterwards():
    def loop():
        while True:
            pass

    before = sys.gettrace()
    assert call_within(60.0, lambda: sum(range(9))) == 36
    assert sys.gettrace() is before
    with pytest.raises(TimeoutError, match=r"0\.001 seconds"):
        call_within(0.001, loop)
    assert sys.gettrace() is before
