"""The launch scripts by themselves: help, refusals, shellcheck, and what they hand to srun and scontrol."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent.parent / "launch"
SOURCES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".sh", ".sbatch"))
SCRIPTS = [path for path in SOURCES if path.name != "common.sh"]
RUN_FILE = "tests/data/world_size.toml"
# srun of two tasks on two nodes, one after the other; its exit code is the largest
SRUN = """#!/bin/bash
echo "$*" >>"$RECORD/srun"
while [[ $1 == --* ]]; do shift; done
code=0
export SLURM_STEP_TASKS_PER_NODE="1(x2)"
for task in 0 1; do
  SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_LAUNCH_NODE_IPADDR=10.1.2.3 "$@" || code=$?
done
exit $code
"""
RECORD = '#!/bin/bash\necho "$*" >>"$RECORD/{name}"\n'
PST_DS = """#!/bin/bash
printf "%s\\n" "$PST_DS_SUBMITTED" >"$RECORD/submitted"
echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*" >>"$RECORD/pst-ds"
exit "${CODE:-0}"
"""


def _run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def _job(tmp_path: Path, script: str, *arguments: str, **variables: str) -> tuple[int, dict[str, str]]:
    """Runs an sbatch script as Slurm does, with programs that only record; its exit code, and the records by name."""
    programs, record = tmp_path / "bin", tmp_path / "record"
    programs.mkdir()
    record.mkdir()
    texts = {"srun": SRUN, "scontrol": RECORD.format(name="scontrol"), "pst-ds": PST_DS, "torchrun": TORCHRUN}
    texts["ft_launcher"] = TORCHRUN.replace("$RECORD/torchrun", "$RECORD/ft_launcher")
    for name, text in texts.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    spooled = shutil.copy(FOLDER / script, tmp_path / "slurm_script")
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": "41", "SLURM_SUBMIT_DIR": str(Path.cwd()), "RECORD": str(record), "PATH": path}
    done = _run("bash", str(spooled), *arguments, env={**os.environ, **job, **variables})
    return done.returncode, {path.name: path.read_text(encoding="utf-8") for path in record.iterdir()}


def test_triton_compiles_into_a_local_folder_of_the_user():
    script = f'source {FOLDER}/common.sh; echo "$TRITON_CACHE_DIR"'
    env = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    assert _run("bash", "-c", script, env=env).stdout == f"/tmp/triton-{os.getuid()}\n"
    assert _run("bash", "-c", script, env=env | {"TRITON_CACHE_DIR": "/scratch"}).stdout == "/scratch\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_says_how_to_start_it_and_no_arguments_are_refused(script):
    helped = _run("bash", str(script), "--help")
    assert helped.returncode == 0
    assert f"launch/{script.name}" in helped.stdout
    assert "run.toml" in helped.stdout
    assert "#SBATCH" not in helped.stdout
    refused = _run("bash", str(script))
    assert refused.returncode == 2
    assert f"{script.name}: " in refused.stderr
    assert "see --help" in refused.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("local.sh", "run.toml"),
        ("local.sh", "--ranks"),
        ("local.sh", "--ranks", "two", "run.toml"),
        ("local.sh", "--ranks", "2"),
        ("elastic.sh", "--hosts", "2"),
        ("elastic.sh", "--nodes", "2", "run.toml"),
    ],
)
def test_bad_arguments_exit_with_2(arguments):
    done = _run(f"launch/{arguments[0]}", *arguments[1:])
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"{arguments[0]}: ")


def test_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = _run("shellcheck", "-x", *map(str, SOURCES))
    assert done.returncode == 0, done.stdout


def test_every_slurm_task_becomes_a_rank_that_resumes(tmp_path):
    folder = tmp_path / "run"
    settings = ("--set", f"output_dir={folder}")
    code, records = _job(tmp_path, "slurm.sbatch", RUN_FILE, *settings, SLURM_CPUS_PER_TASK="3")
    assert code == 0
    said = f"train {RUN_FILE} --set output_dir={folder} --resume"
    assert records["pst-ds"].splitlines() == [f"{rank} 2 0 1 10.1.2.3 10041: {said}" for rank in (0, 1)]
    assert " --cpus-per-task=3 bash " in records["srun"]  # which srun does not take over from sbatch
    assert records["submitted"] == (FOLDER / "slurm.sbatch").read_text(encoding="utf-8")
    assert "scontrol" not in records


def test_a_site_s_container_and_modules_need_no_edit(tmp_path):
    site = {
        "PST_DS_SRUN_ARGS": "--container-image=an-image --gpu-bind=none",
        "PST_DS_SETUP": 'export CODE=7; echo "$RANK" >>"$RECORD/set-up"',
        "PST_DS_WRAP": "env IN_CONTAINER=1",
    }
    code, records = _job(tmp_path, "slurm.sbatch", RUN_FILE, "--set", f"output_dir={tmp_path}/run", **site)
    assert code == 7
    assert " --container-image=an-image --gpu-bind=none bash " in records["srun"]
    assert records["set-up"] == "0\n1\n"
    assert len(records["pst-ds"].splitlines()) == 2


ELASTIC = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURMD_NODENAME": "n1"}
TORCHRUN = """#!/bin/bash
echo "$PET_NNODES $PET_NPROC_PER_NODE $PET_RDZV_BACKEND $PET_RDZV_ENDPOINT $PET_MAX_RESTARTS: $*" >>"$RECORD/torchrun"
printf "%s\\n" "$PST_DS_SUBMITTED" >"$RECORD/submitted"
[[ -z ${CODE_OF_RANK:-} ]] || echo "$CODE_OF_RANK" >"$PST_DS_EXIT_CODES/rank-0"
exit "${CODE:-0}"
"""


@pytest.mark.parametrize(("least", "fewest"), [("1", "1:2"), ("2", "2:2")])
def test_an_elastic_job_starts_a_torchrun_on_each_node(tmp_path, least, fewest):
    settings = ("--set", f"output_dir={tmp_path}/run")
    site = {**ELASTIC, "PST_DS_SRUN_ARGS": "--gpu-bind=none"}
    code, records = _job(tmp_path, "slurm_elastic.sbatch", least, RUN_FILE, *settings, **site)
    assert code == 0
    said = f"{fewest} 8 c10d n1:10041 20: -m pst_ds train {RUN_FILE} {' '.join(settings)} --resume"
    assert records["torchrun"].splitlines() == [said] * 2
    assert " --wait=0 --ntasks-per-node=1 --ntasks=2 --gpu-bind=none bash " in records["srun"]
    assert records["submitted"] == (FOLDER / "slurm_elastic.sbatch").read_text(encoding="utf-8")
    assert "scontrol" not in records


def test_an_elastic_run_takes_another_engine_with_the_options_of_torchrun(tmp_path):
    code, records = _job(tmp_path, "slurm_elastic.sbatch", "1", RUN_FILE, PST_DS_ENGINE="ft_launcher", **ELASTIC)
    assert code == 0
    assert records["ft_launcher"].splitlines() == [f"1:2 8 c10d n1:10041 20: -m pst_ds train {RUN_FILE} --resume"] * 2
    assert "torchrun" not in records


@pytest.mark.parametrize("least", ["3", "0", "one"])
def test_an_elastic_job_asks_for_no_more_nodes_than_it_has(tmp_path, least):
    code, records = _job(tmp_path, "slurm_elastic.sbatch", least, RUN_FILE, **ELASTIC)
    assert (code, records) == (2, {})


@pytest.mark.parametrize(
    ("of_torchrun", "of_rank", "expected"), [("0", "0", 0), ("1", "1", 1), ("1", "2", 2), ("7", "75", 1)]
)
def test_an_elastic_run_ends_with_2_after_bad_input_though_torchrun_loses_it(tmp_path, of_torchrun, of_rank, expected):
    codes = {"CODE": of_torchrun, "CODE_OF_RANK": of_rank}
    ended, _ = _job(tmp_path, "slurm_elastic.sbatch", "1", RUN_FILE, **ELASTIC, **codes)
    assert ended == expected


def test_a_program_that_is_not_on_path_is_named(tmp_path):
    code, records = _job(tmp_path, "slurm.sbatch", RUN_FILE, PST_DS_WRAP="no-such-container exec image")
    assert code == 2
    assert "pst-ds" not in records


@pytest.mark.parametrize(("code", "requeues"), [(75, True), (1, False)])
def test_a_job_requeues_itself_after_75_and_not_after_a_failure(tmp_path, code, requeues):
    ended, records = _job(tmp_path, "slurm.sbatch", RUN_FILE, "--set", f"output_dir={tmp_path}/run", CODE=str(code))
    assert ended == code
    assert records.get("scontrol") == ("requeue 41\n" if requeues else None)


def test_a_task_of_an_array_has_its_sparsity_and_folder_and_requeues_only_itself(tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "75"}
    code, records = _job(tmp_path, "slurm_array.sbatch", f"{tmp_path}/a sweep", RUN_FILE, CODE="75", **array)
    assert code == 75
    settings = f'--set schedule.final_sparsity=0.075 --set output_dir="{tmp_path}/a sweep/sparsity-0.075"'
    assert f"train {RUN_FILE} {settings} --resume\n" in records["pst-ds"]
    assert records["scontrol"] == "requeue 41_75\n"
    assert records["submitted"] == (FOLDER / "slurm_array.sbatch").read_text(encoding="utf-8")
