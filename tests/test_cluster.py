"""The examples in docs/cluster, against what Ray reads; the commands in them, against ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import typer.main
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as scaling_of,
)
from ray.autoscaler._private.util import fillout_defaults, prepare_config

from autoquant.cli import app

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "docs" / "cluster"
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.fixture
def launched() -> dict[str, Any]:
    """What `ray up` reads."""
    found: dict[str, Any] = yaml.safe_load((CLUSTER / "ray.yaml").read_text())
    return found


@pytest.fixture
def job() -> dict[str, Any]:
    """The KubeRay RayJob."""
    found: dict[str, Any] = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    return found


def scaling(job: dict[str, Any]) -> dict[str, Any]:
    """The autoscaler's configuration that Ray makes of the RayCluster which KubeRay makes of a
    job; Ray checks it against its schema."""
    cluster = {"metadata": job["metadata"], "spec": job["spec"]["rayClusterSpec"]}
    found: dict[str, Any] = scaling_of(cluster)
    return found


def test_a_cluster_for_ray_up_satisfies_rays_schema(launched: dict[str, Any]) -> None:
    jsonschema.validate(launched, SCHEMA)
    filled = prepare_config(fillout_defaults(launched))
    jsonschema.validate(filled, SCHEMA)
    nodes = filled["available_node_types"]
    assert set(nodes) == {"head", "worker", "latency"}
    assert nodes["head"]["resources"]["CPU"] == 0  # no trial beside the driver
    assert nodes["latency"]["resources"] == {"CPU": 0, "latency": 1}  # nor beside measurements
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launched, "worker_nodes": {}}, SCHEMA)


def test_a_job_for_kuberay_is_one_that_ray_can_scale(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    found = scaling(job)
    jsonschema.validate(found, SCHEMA)
    nodes = {n: t["resources"] for n, t in found["available_node_types"].items()}
    assert nodes["headgroup"]["CPU"] == 0
    assert nodes["workers"]["CPU"] == 8 and "latency" not in nodes["workers"]
    assert nodes["latency"]["CPU"] == 0 and nodes["latency"]["latency"] == 1
    most = found["available_node_types"]["workers"]["max_workers"]
    (asked,) = re.findall(r"--workers (\d+)", job["spec"]["entrypoint"])
    assert int(asked) == most * nodes["workers"]["CPU"]  # a trial for each core that may come
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] = "eight"
    with pytest.raises((jsonschema.ValidationError, TypeError)):
        scaling(job)


def test_the_job_runs_a_command_that_there_is(job: dict[str, Any]) -> None:
    known = {o for p in typer.main.get_command(app).commands["search"].params for o in p.opts}  # type: ignore[attr-defined]
    used = set(re.findall(r"--[a-z-]+", job["spec"]["entrypoint"]))
    assert used and used <= known
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    paths = {
        mount["mountPath"]
        for container in job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
            "containers"
        ]
        for mount in container["volumeMounts"]
    }
    assert paths == {"/runs"}  # the run outlives its pod


def test_both_examples_are_for_one_version_and_open_to_nobody(
    launched: dict[str, Any], job: dict[str, Any]
) -> None:
    version = job["spec"]["rayClusterSpec"]["rayVersion"]
    assert any(f"ray[default]=={version}" in c for c in launched["setup_commands"])
    for command in (*launched["head_start_ray_commands"], *launched["worker_start_ray_commands"]):
        assert "0.0.0.0" not in command
        assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
