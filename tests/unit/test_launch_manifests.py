"""``launch/kubernetes/jobset.yaml``: fields by a list held here, and types by Kubernetes' own client if it is there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from batch_tokenizer.cli import run_parser
from batch_tokenizer.config import RunConfig

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).resolve().parents[2]
VOLUME_CLAIM, JOBSET = yaml.safe_load_all((ROOT / "launch/kubernetes/jobset.yaml").read_text(encoding="utf-8"))

#: Fields of a JobSet by the reference of jobset.x-k8s.io/v1alpha2: those that must be there, and others.
JOBSET_FIELDS = {
    "": ({"apiVersion", "kind", "metadata", "spec"}, set()),
    "spec": (
        {"replicatedJobs"},
        {"network", "successPolicy", "failurePolicy", "suspend", "coordinator", "managedBy", "ttlSecondsAfterFinished"},
    ),
    "spec.failurePolicy": ({"maxRestarts"}, {"restartStrategy", "rules"}),
    "spec.failurePolicy.rules": ({"action"}, {"name", "onJobFailureReasons", "targetReplicatedJobs"}),
    "spec.replicatedJobs": ({"name", "template"}, {"groupName", "replicas", "dependsOn"}),
}

#: Fields of a job and of what is in it that this one needs.
JOB_FIELDS = {
    "spec": {"completionMode", "parallelism", "completions", "backoffLimit", "podFailurePolicy", "template"},
    "spec.podFailurePolicy.rules": {"action", "onPodConditions"},
    "spec.template.spec": {"restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes"},
    "spec.template.spec.containers": {"name", "image", "command", "args", "env", "resources", "volumeMounts"},
}


def at(document: Any, path: str) -> list[Any]:
    """The objects at a path; of lists on the way, all."""
    found = [document]
    for name in filter(None, path.split(".")):
        values = [item[name] for item in found if name in item]
        found = [item for value in values for item in (value if isinstance(value, list) else [value])]
    assert found, path
    return found


def job() -> Any:
    (template,) = at(JOBSET, "spec.replicatedJobs.template")
    return template


def container() -> Any:
    (found,) = at(job(), "spec.template.spec.containers")
    return found


def torchrun_flags(script: str) -> set[str]:
    """The flags of torchrun in a script, and the keys of its ``--rdzv_conf``."""
    command = script[script.index("-m batch_tokenizer.runtime.torchrun") : script.index("-m batch_tokenizer ")]
    return set(re.findall(r"--[a-z_]+", command))


@pytest.mark.parametrize("path", JOBSET_FIELDS)
def test_a_jobsets_fields(path: str) -> None:
    required, others = JOBSET_FIELDS[path]
    for item in at(JOBSET, path):
        assert required <= item.keys() <= required | others, path


@pytest.mark.parametrize("path", JOB_FIELDS)
def test_a_jobs_fields(path: str) -> None:
    for item in at(job(), path):
        assert item.keys() >= JOB_FIELDS[path], path


def test_names_and_numbers_fit_each_other() -> None:
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = job()["spec"]
    env = {item["name"]: item.get("value") for item in container()["env"]}
    assert str(spec["parallelism"]) == str(spec["completions"]) == env["NNODES"]
    limits, requests = container()["resources"]["limits"], container()["resources"]["requests"]
    assert limits["nvidia.com/gpu"] == env["NPROC"]
    assert limits["memory"] == requests["memory"]
    (name,) = at(JOBSET, "spec.replicatedJobs.name")
    script = container()["command"][2]
    assert f"$JOBSET_NAME-{name}-0-0.$JOBSET_NAME:{container()['ports'][0]['containerPort']}" in script
    pod = spec["template"]["spec"]
    claims = {item["persistentVolumeClaim"]["claimName"] for item in pod["volumes"] if "persistentVolumeClaim" in item}
    assert claims == {VOLUME_CLAIM["metadata"]["name"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # torchrun gives the ranks 30 s, and the ranks themselves --grace.
    settings = {name: value for name, value in vars(run_parser().parse_args(container()["args"])).items() if value}
    known = RunConfig.__dataclass_fields__.keys()
    assert (
        pod["terminationGracePeriodSeconds"] > 30 > RunConfig(**{k: settings[k] for k in settings if k in known}).grace
    )


def test_it_starts_torchrun_as_the_slurm_script_does() -> None:
    script = container()["command"][2]
    assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
    assert torchrun_flags(script) == torchrun_flags((ROOT / "launch/slurm.sbatch").read_text(encoding="utf-8"))


def test_a_pod_runs_the_command_that_is_meant(tmp_path: Path) -> None:
    """The script with a ``python`` that prints its arguments."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    env = {item["name"]: item.get("value", "tokens") for item in container()["env"]}
    env |= {"RESTART": "2", "JOB_COMPLETION_INDEX": "1", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = [*container()["command"], *container()["args"]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[:2] == ["-m", "batch_tokenizer.runtime.torchrun"]
    assert "--rdzv_id=tokens.2" in words
    assert "--rdzv_conf=is_host=false,read_timeout=600" in words
    assert "--rdzv_endpoint=tokens-nodes-0-0.tokens:29400" in words
    assert words[-len(container()["args"]) - 2 :] == ["-m", "batch_tokenizer", *container()["args"]]


def yaml_blocks() -> list[Any]:
    page = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]


def test_the_pages_other_manifests_start_torchrun_with_flags_that_there_are() -> None:
    array, sky = yaml_blocks()
    (pod,) = array["spec"]["template"]["spec"]["containers"]
    for script in (pod["args"][0], sky["run"]):
        assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
        flags = script[script.rindex("-m batch_tokenizer") :].replace('"$JOB_COMPLETION_INDEX"', "0").split()[2:]
        assert run_parser().parse_args([flag for flag in flags if flag != "\\"]).task == "wav2token"
    assert torchrun_flags(sky["run"]) == torchrun_flags(container()["command"][2])
    assert f"--num_shards={array['spec']['completions']}" in pod["args"][0]


@pytest.mark.parametrize("kind", ["V1PersistentVolumeClaim", "V1JobTemplateSpec", "V1Job"])
def test_kubernetes_client_knows_every_field(kind: str) -> None:
    client = pytest.importorskip("kubernetes.client", reason="kubernetes, the Python client, is not installed")
    document = {"V1PersistentVolumeClaim": VOLUME_CLAIM, "V1JobTemplateSpec": job(), "V1Job": yaml_blocks()[0]}[kind]
    api = client.ApiClient()
    read = api.deserialize(json.dumps(document), kind, "application/json")
    # What the client does not know is left out of what it writes.
    assert api.sanitize_for_serialization(read) == document
