"""One cell in a process of its own: what comes before it, training, dense export, verify, and every test.

    python -m tools.quality.run_cell runs/quality/cells/ID/spec.json

The outcome is written beside the spec, in one go. The CPU seconds of the process are limited: beyond them the system
ends it with SIGXCPU.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pst_ds.atomic_files import write_text_atomic
from tools.quality.files import measure_files
from tools.verbs import verb

Table = dict[str, Any]
OUTCOME = "outcome.json"
STEPS = "steps"
"""Folder, beside that of the cells, of what was made before cells; kept, for others need the same."""
MADE = "made.json"
"""In the folder of a step, once it is whole."""


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
    """What is measured in a cell: the part of its line that only the run can tell."""
    from pst_ds.cli.main import quiet_libraries

    quiet_libraries()
    settings, steps = spec["settings"], {}
    started, cpu = time.monotonic(), 0.0
    limit_cpu(spec["cpu_seconds"])
    for name, step in spec["steps"].items():
        made, place = make_step(step, folder.parent.parent / STEPS / step["id"], spec["cpu_seconds"])
        steps[name] = made
        if name == "base":
            settings = with_setting(settings, "model", "path", str(place))
        else:
            settings = with_setting(settings, "distillation", "teacher", str(place))
    if steps:
        started, cpu = time.monotonic(), cpu_seconds()
        limit_cpu(spec["cpu_seconds"])
    result = trained(spec, settings, folder) if spec["train"] else evaluated(spec, settings, folder)
    result |= {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(cpu_seconds() - cpu, 1)}
    return {**result, "steps_before": steps} if steps else result


def trained(spec: Table, settings: Table, folder: Path) -> Table:
    """Train, export, verify and test; with ``tune`` at the rates that are found first."""
    run_file, run_folder, export = write_run(settings, folder, "run"), folder / "run", folder / "export"
    tuned: Table = {}
    if spec["tune"]:
        tuned = verb("tune", str(run_file), "--budget", str(spec["tune"]), "--quiet")
        run_file = Path(tuned["out"])
    result = verb("train", str(run_file), "--quiet")
    exported = verb("export", str(run_folder), "--out", str(export))
    limit = spec["verify_examples"]
    verified = verb("verify", str(export), "--against", str(run_folder), *(["--limit", str(limit)] if limit else []))
    tests = {} if limit or not spec["tests"] else {next(iter(spec["tests"])): verified["metrics"]}
    tests |= test(run_file, export, {name: path for name, path in spec["tests"].items() if name not in tests})
    parameters = count_parameters(export)
    files = {}
    if spec["files"]:
        about = {**spec["files"], "tests": spec["tests"], "max_length": settings["data"]["max_length"]}
        files = measure_files(about, run_folder, export, lambda model: test(run_file, model, spec["tests"]))
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
        **({"tuned": tuned["chosen"], "trials": tuned["trials"]} if tuned else {}),
    }


def evaluated(spec: Table, settings: Table, folder: Path) -> Table:
    """The tests of a model as it is, and its zeros."""
    run_file = write_run(settings, folder, "run")
    model = Path(settings["model"]["path"])
    validation = {"": settings["data"]["validation"]} if settings["data"].get("validation") else {}
    metrics = test(run_file, model, {**validation, **spec["tests"]})
    return {
        "validation": metrics.pop("", {}),
        "tests": metrics,
        "sparsity_measured": sparsity_of_targets(run_file, model),
        "parameters": count_parameters(model),
    }


def make_step(step: Table, place: Path, budget: float) -> tuple[Table, Path]:
    """(what is known of it, the model folder) of a step, which is made unless it is there.

    Two cells that need the same one wait for each other.
    """
    with locked(place.with_suffix(".lock")):
        model = place / "model"
        if not (place / MADE).is_file():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            started, cpu = time.monotonic(), cpu_seconds()
            made = pruned(step, place, model) if step["prune"] else taught(step, place, model)
            made |= {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(cpu_seconds() - cpu, 1)}
            write_text_atomic(place / MADE, json.dumps(made, indent=1) + "\n")
        limit_cpu(budget)
        return json.loads((place / MADE).read_text(encoding="utf-8")), model


def pruned(step: Table, place: Path, model: Path) -> Table:
    """A one-shot mask over the base model."""
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
    """A fine-tuned dense model."""
    result = verb("train", str(write_run(step["settings"], place, "run")), "--quiet")
    verb("export", str(place / "run"), "--out", str(model))
    shutil.rmtree(place / "run")
    return {"validation": result["metrics"]}


def test(run_file: Path, model: Path, tests: dict[str, str]) -> dict[str, dict[str, float]]:
    """Metrics of a model folder, read dense by plain transformers, on each file of ``tests``."""
    from pst_ds.config.toml import load_run
    from pst_ds.core.packings import DENSE
    from pst_ds.data.tasks import task_of
    from pst_ds.inference.hf.config import PackedWeightsConfig
    from pst_ds.inference.hf.model_folder import open_model_folder
    from pst_ds.nn.base_model import DTYPES
    from pst_ds.parallel.launch import LaunchEnvironment, device_of
    from pst_ds.train.evaluate import predict
    from pst_ds.train.model import attention_options, load_tokenizer
    from pst_ds.train.run_context import RunContext

    if not tests:
        return {}
    run, launch = load_run(run_file), LaunchEnvironment(0, 1, 0)
    labels = task_of(run).label_names(run.data)
    context = RunContext(run, launch, labels, load_tokenizer(run), None, device_of(launch))
    task = context.task
    dtype = DTYPES[run.train.precision]
    options: dict[str, Any] = {**attention_options(run)}
    if open_model_folder(model).format != DENSE:
        options["quantization_config"] = PackedWeightsConfig(load_as="dense")
    network = task.model_class().from_pretrained(model, dtype=dtype, **options).to(context.device).eval()
    found = {}
    for name, path in tests.items():
        data = load_run(run_file, [f"data.test={json.dumps(path)}"]).data
        examples = task.load(data, "test", context.tokenizer, labels)
        found[name] = task.metrics(predict(network, context, examples), examples)
    return found


def best_validation(run_file: Path, result: Table) -> dict[str, float]:
    """The validation metrics of the checkpoint that was exported."""
    from pst_ds.config.toml import load_run
    from pst_ds.file_names import RUN_FILE
    from pst_ds.train.run_folder import open_checkpoint

    run = load_run(Path(load_run(run_file).output_dir) / RUN_FILE)  # whose base is what [start] made
    return dict(open_checkpoint(run, "best").state.metrics) or dict(result["metrics"])


def sparsity_of_targets(run_file: Path, model: Path) -> float:
    """Return the share of zeros in the layers that the run would prune, whatever the model has elsewhere."""
    from pst_ds.config.toml import load_run
    from pst_ds.data.tasks import task_of
    from pst_ds.nn.targets import resolve_targets

    run = load_run(run_file)
    network = task_of(run).model_class().from_pretrained(model)
    weights = [target.weight for target in resolve_targets(network, run.injected_pst)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def count_parameters(model: Path) -> int:
    """Numbers in the weight files of a folder."""
    from safetensors import safe_open

    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                total += math.prod(file.get_slice(name).get_shape())
    return total


def write_run(settings: Table, folder: Path, name: str) -> Path:
    """A run file ``name``.toml in ``folder`` whose run goes to ``folder``/``name``."""
    from pst_ds.config.toml import dump_run, run_from_table

    run = run_from_table({**settings, "output_dir": str(folder / name)})
    path = folder / f"{name}.toml"
    write_text_atomic(path, dump_run(run))
    return path


def with_setting(settings: Table, table: str, key: str, value: str) -> Table:
    return {**settings, table: {**settings.get(table, {}), key: value}}


def limit_cpu(seconds: float) -> None:
    """Let this process use so many CPU seconds from now on."""
    soft = int(cpu_seconds() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def cpu_seconds() -> float:
    """That this process has used, in all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone, of all processes that ask for the same ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
