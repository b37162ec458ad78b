"""The loops behind the operators touch no byte outside their arrays, in every instruction set that this machine has."""

from pathlib import Path

from tests.sanitizers import run_sanitized

DRIVER = Path(__file__).with_name("sanitizer_driver.cpp")


def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path):
    """Products of codes with the best instructions, then with AMX (pretended) if these have all else of it."""
    for level in ("", "amx"):
        environment, flags = {"PST_DS_INSTRUCTIONS": level}, ["-DPST_PRETENDED_TILES=1"]
        done = run_sanitized(DRIVER, tmp_path, "100", "1", flags=flags, environment=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")
