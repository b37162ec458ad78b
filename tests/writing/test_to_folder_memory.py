"""Peak memory of an export: at most three times the largest tensor above that of a tiny one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 4096 * 1024 * 2
"""Bytes of an MLP's weight in bf16."""
CONSTANT = 4 << 20
"""Bands of rows under the mask, and what grows a little with a model: its names, the pages of its files' headers."""
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from tests.exporting import export_checkpoint, export_folder
from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config.pst import PSTConfig
from pst_ds.core.quantization import grid_of
from pst_ds.nn.inject import inject_pst

torch.set_num_threads(1)


def export(source, folder, out, packing, values=""):
    how = {"packing": packing, "values": grid_of(values, 64) if values else None}
    if source == "folder":
        export_folder(Path(folder) / "bitmask", Path(out), **how)
        return
    config = AutoConfig.from_pretrained(folder + "/base")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        inject_pst(model, PSTConfig(relative_magnitude=False))
    checkpoint = read_checkpoint(Path(folder) / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-llama")
    export_checkpoint(model, checkpoint, tokenizer, Path(out), **how)


def peak(*job):
    with open("/proc/self/clear_refs", "w") as file:  # forgets the peak before
        file.write("5")
    export(*job)
    # not getrusage, whose peak begins with that of the process that started this one
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


jobs = json.load(sys.stdin)
peak(*jobs[0])  # loads what is loaded late
print(json.dumps([peak(*job) for job in jobs]))
"""
JOBS = [("run", "dense"), ("run", "bitmask"), ("run", "csr"), ("folder", "csr"), ("folder", "dense"),
        ("run", "bitmask", "int4"), ("run", "dense", "int8"), ("folder", "bitmask", "int4")]  # fmt: skip


@pytest.fixture(scope="module")
def folders(make_pruned, tmp_path_factory):
    """Of a tiny run and of one whose model is ten times its largest tensor, with a packed export in each."""
    made = {}
    for name, hidden, inner in (("tiny", 64, 64), ("large", 1024, 4096)):
        config = LlamaConfig(
            vocab_size=67, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=3, num_attention_heads=4,
            tie_word_embeddings=True,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder
        pruned = make_pruned(folder, LlamaForCausalLM(config).bfloat16(), sparsity=0.6, precision="bf16")
        pruned.export(folder / "bitmask", packing="bitmask")
        total = sum(p.numel() * 2 for n, p in pruned.model.named_parameters() if "pst_" not in n)
        assert name == "tiny" or total > 10 * LARGEST
    return made


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_an_export_holds_at_most_three_times_the_largest_tensor(folders, tmp_path):
    jobs = [(src, str(folders[name]), str(tmp_path / "out"), *how) for src, *how in JOBS for name in ("tiny", "large")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(jobs), capture_output=True, text=True, timeout=600,
        # tensors as large as real ones are given back at once; glibc would keep these, which are smaller, for later
        check=False, cwd=ROOT, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = json.loads(done.stdout.splitlines()[-1])
    for job, tiny, large in zip(JOBS, peaks[::2], peaks[1::2], strict=True):
        print(f"{job}: {(large - tiny) / LARGEST:.2f} of the largest tensor")
        assert LARGEST < large - tiny <= 3 * LARGEST + CONSTANT, job
