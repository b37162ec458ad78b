"""The manifests and the Containerfile: valid for what reads them, and in agreement with themselves and pst-ds."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "launch" / "kubernetes"


def _object(required, **properties):
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
TEXTS = {"type": "array", "minItems": 1, "items": TEXT}
MOUNT = _object(["name", "mountPath"], name=NAME, mountPath={"type": "string", "pattern": "^/"})
VOLUME = {
    **_object(
        ["name"], name=NAME,
        persistentVolumeClaim=_object(["claimName"], claimName=NAME),
        emptyDir=_object([], medium={"enum": ["", "Memory"]}),
    ),
    "minProperties": 2,
    "maxProperties": 2,
}  # fmt: skip
CONTAINER = _object(
    ["name", "image", "command"], name=NAME, image=TEXT, workingDir={"type": "string", "pattern": "^/"}, command=TEXTS,
    resources=_object(["limits"], limits={"type": "object", "additionalProperties": COUNT}),
    volumeMounts={"type": "array", "items": MOUNT},
    env={"type": "array", "items": _object(["name", "value"], name=TEXT, value={"type": "string"})},
)  # fmt: skip


def _pod(**properties):
    containers, volumes = {"type": "array", "minItems": 1, "items": CONTAINER}, {"type": "array", "items": VOLUME}
    pod = {"terminationGracePeriodSeconds": COUNT, "containers": containers, "volumes": volumes, **properties}
    return _object(["spec"], spec=_object(["containers"], **pod))


EXIT_CODES = _object(
    ["operator", "values"], containerName=NAME, operator={"enum": ["In", "NotIn"]},
    values={"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 1}},
)  # fmt: skip
ACTIONS = {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}
POD_FAILURE = _object(
    ["rules"],
    rules={"type": "array", "items": _object(["action", "onExitCodes"], action=ACTIONS, onExitCodes=EXIT_CODES)},
)
JOB = _object(
    ["template"], completionMode={"enum": ["NonIndexed", "Indexed"]}, completions=COUNT, parallelism=COUNT,
    backoffLimit=COUNT, podFailurePolicy=POD_FAILURE, template=_pod(restartPolicy={"enum": ["Never", "OnFailure"]}),
)  # fmt: skip
JOB_SET_RULE = _object(
    ["action"], action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons={"type": "array", "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded",
        "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]}},
)  # fmt: skip
REPLICATED = _object(
    ["name", "template"], name=NAME, replicas=COUNT, template=_object(["spec"], spec=JOB),
)  # fmt: skip
REPLICA = _object(
    ["replicas", "restartPolicy", "template"], replicas=COUNT,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]}, template=_pod(),
)  # fmt: skip
SPECS = {
    "jobset.yaml": ("jobset.x-k8s.io/v1alpha2", "JobSet", _object(
        ["replicatedJobs"],
        failurePolicy=_object([], maxRestarts=COUNT, rules={"type": "array", "items": JOB_SET_RULE}),
        replicatedJobs={"type": "array", "minItems": 1, "items": REPLICATED},
    )),
    "pytorchjob.yaml": ("kubeflow.org/v1", "PyTorchJob", _object(
        ["pytorchReplicaSpecs"],
        elasticPolicy=_object(
            [], rdzvBackend={"enum": ["c10d", "etcd", "etcd-v2"]}, minReplicas=COUNT, maxReplicas=COUNT,
            nProcPerNode=COUNT, maxRestarts=COUNT,
        ),
        runPolicy=_object([], backoffLimit=COUNT, cleanPodPolicy={"enum": ["Running", "All", "None"]}),
        pytorchReplicaSpecs=_object(["Worker"], Master=REPLICA, Worker=REPLICA),
    )),
}  # fmt: skip
"""Of the fields that the manifests use: those of batch/v1, JobSet v1alpha2 and the training operator's v1."""


def _manifest(name):
    return yaml.safe_load((MANIFESTS / name).read_text(encoding="utf-8"))


def _in_image(path):
    """The file here that the Containerfile copies to ``path``."""
    return ROOT / Path(path).relative_to("/opt/pst-ds")


def _pods(manifest):
    """The pod templates of a manifest."""
    spec = manifest["spec"]
    if "replicatedJobs" in spec:
        return [job["template"]["spec"]["template"]["spec"] for job in spec["replicatedJobs"]]
    return [replica["template"]["spec"] for replica in spec["pytorchReplicaSpecs"].values()]


def test_every_manifest_has_a_schema():
    assert {path.name for path in MANIFESTS.iterdir()} == SPECS.keys()


@pytest.mark.parametrize("name", SPECS)
def test_a_manifest_has_the_fields_of_its_kind(name):
    version, kind, spec = SPECS[name]
    head = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": _object(["name"], name=NAME)}
    schema = _object(["apiVersion", "kind", "metadata", "spec"], **head, spec=spec)
    jsonschema.Draft202012Validator(schema).validate(_manifest(name))


@pytest.mark.parametrize("name", SPECS)
def test_a_pod_has_what_it_mounts_and_time_to_save(name):
    for pod in _pods(_manifest(name)):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
        assert "persistentVolumeClaim" in mounts[container["workingDir"]]
        assert pod["terminationGracePeriodSeconds"] > 300


def test_a_job_set_counts_its_hosts_alike_and_restarts_all_but_bad_input():
    manifest = _manifest("jobset.yaml")
    name, (hosts,) = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    script, *words = container["command"]
    assert _in_image(script).is_file()
    *options, run = words
    assert run == "run.toml"
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert job["completions"] == job["parallelism"] == int(given["--hosts"])
    assert int(given["--ranks"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert given["--meet"] == f"{name}-{hosts['name']}-0-0.{name}:29400"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # which a podFailurePolicy asks for
    assert job["backoffLimit"] == 0
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


@pytest.mark.parametrize(("code", "of_rank", "expected"), [(0, 0, 0), (1, 2, 2), (1, 75, 130), (1, 1, 130)])
def test_a_pytorch_job_tries_again_all_but_bad_input(tmp_path, code, of_rank, expected):
    manifest = _manifest("pytorchjob.yaml")
    policy = manifest["spec"]["elasticPolicy"]
    worker = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # where the operator puts its variables
    assert policy["nProcPerNode"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert policy["minReplicas"] <= worker["replicas"] == policy["maxReplicas"]
    script, run = container["command"]
    assert run == "run.toml"
    (tmp_path / "torchrun").write_text(f'#!/bin/sh\necho {of_rank} >"$PST_DS_EXIT_CODES/rank-0"\nexit {code}\n')
    (tmp_path / "torchrun").chmod(0o755)
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    env["PATH"] = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run([str(_in_image(script)), run], env=env, check=False)
    assert done.returncode == expected


def test_the_containerfile_copies_what_is_there_and_installs_what_there_is():
    text = (ROOT / "launch" / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    known = ("ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD")
    assert [word for word, _ in lines if word not in known] == []
    assert re.search(r"^ARG BASE=\S+:[\w.-]+$", text, flags=re.M)  # a tag, so that a build can be repeated
    copied = [path for word, rest in lines if word == "COPY" for path in rest.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"} <= set(copied)
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", text)
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()
    if shutil.which("hadolint"):
        done = subprocess.run(["hadolint", "launch/Containerfile"], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout
