"""Without ``import pst_ds.hf`` plain transformers refuses a packed folder, whatever class loads it."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pst_ds":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())

import transformers
from transformers.models.auto import modeling_auto

outcomes = {}
for folder in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, auto_class in vars(modeling_auto).items():
        if not (isinstance(auto_class, type) and hasattr(auto_class, "from_pretrained")):
            continue
        if auto_class._model_mapping is None or type(config) not in auto_class._model_mapping.keys():
            continue
        for kwargs in ({}, {"dtype": "auto", "device_map": "cpu"}, {"ignore_mismatched_sizes": True}):
            try:
                auto_class.from_pretrained(folder, **kwargs)
                outcomes[f"{folder} {name} {kwargs}"] = "loaded"
            except Exception as error:
                outcomes[f"{folder} {name} {kwargs}"] = type(error).__name__
assert not [name for name in sys.modules if name.startswith("pst_ds")]
print(json.dumps(outcomes))
"""


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "form"), [("bert", "2:4"), ("llama", "bitmask"), ("gpt2", "csr")])
def test_every_auto_class_raises_and_none_gives_random_weights(packed, name, form):
    folders = [str(packed(name, form, shards=shards)[0]) for shards in (1, 2)]
    # our verbs, run in this process by other tests, quiet it in the environment
    loud = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders], capture_output=True, text=True, check=False, env=loud
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    classes = {key.split()[1] for key in outcomes}
    assert {"AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"} <= classes
    assert {key: outcome for key, outcome in outcomes.items() if outcome != "OSError"} == {}
    assert len(outcomes) > 2 * 3 * 3
    assert "Unknown quantization type, got pst_ds" in done.stderr


def test_the_package_imports_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import pst_ds, pst_ds.runtime, pst_ds.formats"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
