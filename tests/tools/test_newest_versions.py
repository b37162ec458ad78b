"""The newest versions of the packages; no registry."""

import pytest

from tools import newest_versions


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--helo", 2)])
def test_help_and_wrong_arguments_install_nothing(argument, code, monkeypatch):
    monkeypatch.setattr(newest_versions, "newest_versions", lambda: pytest.fail("it asked for versions"))
    with pytest.raises(SystemExit) as ended:
        newest_versions.main([argument])
    assert ended.value.code == code
