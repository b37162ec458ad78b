"""Run one cell in its own process: preceding steps, training, dense export, verification and all tests.

    python -m tools.quality.run_cell runs/quality/cells/ID/spec.json

The outcome is written atomically next to the spec. When the process exceeds its CPU seconds, it ends with SIGXCPU.
"""

from __future__ import annotations

import fcntl
import json
import math
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pst_ds.atomic_files import write_text_atomic
from tools import onnx_int8, torchao_files
from tools.verbs import verb

Table = dict[str, Any]
Tests = dict[str, dict[str, float]]
FILES = "files"
"""Folder next to the run; removed when the cell has ended."""
OUTCOME = "outcome.json"
STEPS = "steps"
"""Folder, next to that of the cells, of results that several cells need; it is kept."""
MADE = "made.json"
"""File in the folder of a complete step."""


def main(spec_file: Path) -> int:
    spec, folder = json.loads(spec_file.read_text(encoding="utf-8")), spec_file.parent
    try:
        outcome = {"outcome": "done", **run_cell(spec, folder)}
    except Exception as error:
        traceback.print_exc()
        said = " ".join(str(error).split())
        outcome = {"outcome": "failed", "error": f"{type(error).__name__}: {said}"[:500]}
    write_text_atomic(folder / OUTCOME, json.dumps(outcome))
    return 0 if outcome["outcome"] == "done" else 1


def run_cell(spec: Table, folder: Path) -> Table:
    """Run the cell. Return its measurements, for its line."""
    from pst_ds.cli.main import quiet_libraries

    quiet_libraries()
    settings, steps = spec["settings"], {}
    started = time.monotonic()
    cpu = 0.0
    limit_cpu(spec["cpu_seconds"])
    for name, step in spec["steps"].items():
        made, place = make_step(step, folder.parent.parent / STEPS / step["id"], spec["cpu_seconds"])
        steps[name] = made
        if name == "base":
            settings = with_setting(settings, "model", "path", str(place))
        else:
            settings = with_setting(settings, "distillation", "teacher", str(place))
    if steps:
        started = time.monotonic()
        cpu = time.process_time()
        limit_cpu(spec["cpu_seconds"])
    if spec["shallow"]:
        from tools.quality import shallow

        shared = folder.parent.parent / STEPS
        result = shallow.measure(spec["shallow"], settings, spec["tests"], folder / FILES, shared)
    else:
        result = trained(spec, settings, folder) if spec["train"] else evaluated(spec, settings, folder)
    result |= {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    return {**result, "steps_before": steps} if steps else result


def trained(spec: Table, settings: Table, folder: Path) -> Table:
    """Train, export, verify and test."""
    run_file, run_folder, export = write_run(settings, folder, "run"), folder / "run", folder / "export"
    result = verb("train", str(run_file), "--quiet")
    exported = verb("export", str(run_folder), "--out", str(export))
    limit, reference = spec["verify_examples"], spec["reference"]
    verified = verb("verify", str(export), "--against", str(run_folder), *(["--limit", str(limit)] if limit else []))
    complete = spec["tests"] and not limit and not reference
    tests = {next(iter(spec["tests"])): verified["metrics"]} if complete else {}
    others = {name: path for name, path in spec["tests"].items() if name not in tests}
    tests |= test(run_file, export, others, reference)
    parameters = count_parameters(export)
    files = {}
    if spec["files"]:
        about = {**spec["files"], "tests": spec["tests"], "max_length": settings["data"]["max_length"]}
        files = measure_files(about, run_folder, export, lambda model: test(run_file, model, spec["tests"], reference))
    return {
        "validation": best_validation(run_file, result),
        "tests": tests,
        "steps": result["steps"],
        "training_seconds": result["seconds"],
        "sparsity_measured": exported["sparsity_measured"],
        "trained_parameters": result["trained_parameters"],
        "parameters": parameters,
        "trained_share": result["trained_parameters"] / parameters,
        "optimizer_bytes": result["optimizer_bytes_per_rank"],
        "verified": bool(verified["reloaded_equal"]),
        "files": files,
    }


def measure_files(spec: Table, run: Path, dense: Path, tested: Callable[[Path], Tests]) -> dict[str, Table]:
    """Write and test the files that ``spec`` names, of the folder ``run`` and its dense export ``dense``.

    ``tested`` returns the metrics of a model folder on each test file.
    """
    container = "bitmask" if spec["has_zeros"] else "dense"
    found = {}
    for name, options in spec["export"].items():
        out = run.parent / FILES / name
        exported = verb("export", str(run), "--format", container, *options, "--out", str(out))
        found[name] = {"bytes": exported["file_bytes"], "tests": tested(out)}
    if not spec["has_zeros"]:
        for name in spec["peers"]:
            found[name] = PEERS[name](dense, run.parent / FILES / name, spec["tests"], spec["max_length"])
    return found


def onnxruntime_int8(dense: Path, out: Path, tests: dict[str, str], max_length: int) -> Table:
    file = onnx_int8.write_int8(dense, out)
    right = {name: onnx_int8.accuracy(file, dense, Path(path), max_length) for name, path in tests.items()}
    return {"bytes": file.stat().st_size, "tests": {name: {"accuracy": share} for name, share in right.items()}}


def torchao(bits: int, dense: Path, out: Path, tests: dict[str, str], max_length: int) -> Table:
    found = {name: torchao_files.measure(dense, out, Path(path), max_length, bits) for name, path in tests.items()}
    nbytes = next(iter(found.values()))["file_bytes"]
    return {"bytes": nbytes, "tests": {name: {"accuracy": row["accuracy"]} for name, row in found.items()}}


PEERS: dict[str, Callable[[Path, Path, dict[str, str], int], Table]] = {
    "ONNX Runtime int8": onnxruntime_int8,
    "torchao int8": partial(torchao, 8),
    "torchao int4": partial(torchao, 4),
}
"""Values of ``files.peers``: (dense folder, output folder, test files, maximum length) to bytes and tests."""


def evaluated(spec: Table, settings: Table, folder: Path) -> Table:
    """Return the test metrics of an untrained model, and its sparsity."""
    run_file = write_run(settings, folder, "run")
    model = Path(settings["model"]["path"])
    validation = {"": settings["data"]["validation"]} if settings["data"].get("validation") else {}
    metrics = test(run_file, model, {**validation, **spec["tests"]}, spec["reference"])
    return {
        "validation": metrics.pop("", {}),
        "tests": metrics,
        "sparsity_measured": sparsity_of_targets(run_file, model),
        "parameters": count_parameters(model),
    }


def make_step(step: Table, place: Path, budget: float) -> tuple[Table, Path]:
    """Return (facts, model folder) of a step, which is made unless it exists.

    Cells that need the same step wait for each other.
    """
    with locked(place.with_suffix(".lock")):
        model = place / "model"
        if not (place / MADE).is_file():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            started = time.monotonic()
            cpu = time.process_time()
            made = pruned(step, place, model) if step["prune"] else taught(step, place, model)
            made |= {
                "seconds": round(time.monotonic() - started, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }
            write_text_atomic(place / MADE, json.dumps(made, indent=1) + "\n")
        limit_cpu(budget)
        return json.loads((place / MADE).read_text(encoding="utf-8")), model


def pruned(step: Table, place: Path, model: Path) -> Table:
    """Prune the base model in one shot."""
    prune = step["prune"]
    options = ["--method", prune["prune"], "--seed", str(prune["seed"]), "--out", str(model)]
    if ":" in prune["sparsity"]:
        options += ["--pattern", prune["sparsity"]]
    else:
        options += ["--sparsity", prune["sparsity"], *(["--pattern", prune["pattern"]] if prune.get("pattern") else [])]
    for name in ("samples", "reconstruct"):
        if prune.get(name):
            options += [f"--{name}", str(prune[name])]
    verb("prune", str(write_run(step["settings"], place, "run")), *options)
    return {"prune": prune["prune"]}


def taught(step: Table, place: Path, model: Path) -> Table:
    """Fine-tune a dense model."""
    result = verb("train", str(write_run(step["settings"], place, "run")), "--quiet")
    verb("export", str(place / "run"), "--out", str(model))
    shutil.rmtree(place / "run")
    return {"validation": result["metrics"]}


def test(run_file: Path, model: Path, tests: dict[str, str], reference: str) -> dict[str, dict[str, float]]:
    """Return the metrics of a model folder, loaded dense by transformers, on each file of ``tests``, with the KL
    divergence from the folder ``reference`` if there is one."""
    from pst_ds.config.toml import load_run
    from pst_ds.export.reference import load_folder
    from pst_ds.parallel.launch import LaunchEnvironment, device_of
    from pst_ds.train.evaluate import kl_divergence, predict
    from pst_ds.train.resolved import resolve
    from pst_ds.train.run_context import RunContext

    if not tests:
        return {}
    run, launch = load_run(run_file), LaunchEnvironment(0, 1, 0)
    context = RunContext(resolve(run), launch, None, device_of(launch))
    task, network = context.task, load_folder(model, context)
    other = load_folder(reference, context) if reference else None
    found = {}
    for name, path in tests.items():
        data = load_run(run_file, [f"data.test={json.dumps(path)}"]).data
        examples = task.load(data, "test", context.tokenizer, context.labels)
        found[name] = task.metrics(predict(network, context, examples), examples)
        if other is not None:
            found[name] |= kl_divergence(other, network, context, examples)
    return found


def best_validation(run_file: Path, result: Table) -> dict[str, float]:
    """Return the validation metrics of the exported checkpoint."""
    from pst_ds.config.toml import load_run
    from pst_ds.file_names import RUN_FILE
    from pst_ds.train.run_folder import open_checkpoint

    run = load_run(Path(load_run(run_file).output_dir) / RUN_FILE)  # whose base is what [start] made
    return dict(open_checkpoint(run, "best").state.metrics) or dict(result["metrics"])


def sparsity_of_targets(run_file: Path, model: Path) -> float:
    """Return the sparsity of the layers that the run would prune."""
    from pst_ds.config.toml import load_run
    from pst_ds.data.tasks import task_of
    from pst_ds.nn.targets import resolve_targets

    run = load_run(run_file)
    network = task_of(run).model_class().from_pretrained(model)
    weights = [target.weight for target in resolve_targets(network, run.injected_pst)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def count_parameters(model: Path) -> int:
    """Return the number of values in the weight files of a folder."""
    from safetensors import safe_open

    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  it is not a mapping
                total += math.prod(file.get_slice(name).get_shape())
    return total


def write_run(settings: Table, folder: Path, name: str) -> Path:
    """Write a run file ``name``.toml in ``folder`` whose run goes to ``folder``/``name``."""
    from pst_ds.config.toml import dump_run, run_from_table

    run = run_from_table({**settings, "output_dir": str(folder / name)})
    path = folder / f"{name}.toml"
    write_text_atomic(path, dump_run(run))
    return path


def with_setting(settings: Table, table: str, key: str, value: str) -> Table:
    return {**settings, table: {**settings.get(table, {}), key: value}}


def limit_cpu(seconds: float) -> None:
    """Limit the CPU seconds that this process may use from now on."""
    soft = int(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on ``path`` within the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
