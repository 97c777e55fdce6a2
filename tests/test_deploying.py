"""The RayJob manifest and what a submission carries, checked offline against the rest of the project."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pbd_ray.config import load_recipe

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
# Fields of KubeRay's API (ray-operator/apis/ray/v1, release 1.5): a misspelt one is dropped in silence there.
JOB = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
    "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata",
    "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig",
    "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
CLUSTER = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions",
    "headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "workerGroupSpecs",
}  # fmt: skip
GROUP = {
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts",
    "rayStartParams", "replicas", "resources", "scaleStrategy", "suspend", "template",
}  # fmt: skip
AUTOSCALER = {
    "env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext",
    "upscalingMode", "version", "volumeMounts",
}  # fmt: skip
MOST_BYTES = 50 * 2**20


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"]


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def test_kuberay_knows_every_field(manifest: dict[str, Any], cluster: dict[str, Any]) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["spec"].keys() <= JOB
    assert cluster.keys() <= CLUSTER
    assert cluster["autoscalerOptions"].keys() <= AUTOSCALER
    assert cluster["autoscalerOptions"]["upscalingMode"] in {"Default", "Aggressive", "Conservative"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group.keys() <= GROUP
        assert group["rayStartParams"].keys() <= {"num-cpus"}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert pod(group).keys() <= {"containers", "volumes"}
        volumes = {volume["name"] for volume in pod(group)["volumes"]}
        (container,) = pod(group)["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_its_entrypoint_is_a_job_of_the_image(manifest: dict[str, Any], cluster: dict[str, Any]) -> None:
    python, script, name, *overrides = shlex.split(manifest["spec"]["entrypoint"])
    image = (DEPLOY / "Dockerfile").read_text()
    (home,) = re.findall(r"^WORKDIR (.+)$", image, re.MULTILINE)
    assert python == "python"
    assert (ROOT / Path(script).relative_to(home)).is_file()
    execution = load_recipe(name, overrides).execution
    shared = {"/shared/thumos14.json", "/shared/videos", "/shared/runs/thumos14_s"}
    assert {execution.annotations, execution.data_root, execution.run_dir} == shared
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    for container in (pod(group)["containers"][0] for group in groups):
        assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_its_workers_hold_the_recipe(manifest: dict[str, Any], cluster: dict[str, Any]) -> None:
    name = shlex.split(manifest["spec"]["entrypoint"])[2]
    execution = load_recipe(name).execution
    (group,) = cluster["workerGroupSpecs"]
    limits = pod(group)["containers"][0]["resources"]["limits"]
    assert execution.cpus_per_worker <= int(limits["cpu"])
    assert execution.gpus_per_worker <= int(limits["nvidia.com/gpu"])
    assert execution.max_workers <= group["maxReplicas"]


def test_one_ray_everywhere(cluster: dict[str, Any]) -> None:
    """Manifest, image and cluster.yaml; tests/test_cluster_yaml.py holds the last to pyproject.toml."""
    launcher = yaml.safe_load((ROOT / "cluster.yaml").read_text())["docker"]
    (base,) = re.findall(r"^ARG BASE=(.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert base == launcher["image"]
    assert f"rayproject/ray:{cluster['rayVersion']}-py311-gpu" == base
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_a_submission_is_small() -> None:
    """Ray packs what git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    files = [ROOT / name for name in listed.split("\0") if name]
    assert sum(path.stat().st_size for path in files if path.is_file()) < MOST_BYTES
