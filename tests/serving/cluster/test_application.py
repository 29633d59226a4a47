"""What the replicas of a model app are told, and a Ray that does not start."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml

from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL, load_manifests
from calotype.serving.deployments.serve_config import applications, user_config

pytestmark = pytest.mark.slow


def taken_from_a_cluster(resource: Any, version: int) -> dict[str, Any]:
    """As `kubectl get -o yaml` writes it."""
    document: dict[str, Any] = resource.model_dump(mode="json", by_alias=True, exclude_none=True)
    document["metadata"] |= {
        "uid": "0b8f3e9e-3b1c-4a57-9a3e-0d6b3f0c8a11",
        "resourceVersion": str(version),
        "generation": 3,
        "creationTimestamp": "2026-11-23T09:00:00Z",
        "managedFields": [{"manager": "kubectl", "operation": "Apply"}],
        "annotations": {
            "kubectl.kubernetes.io/last-applied-configuration": "{}",
            "calotype.dev/revision": "0123abcd",
        },
    }
    document["status"] = {"phase": "Ready", "observedGeneration": version}
    return document


def test_what_a_cluster_notes_in_an_object_is_no_change_for_its_replicas(
    tmp_path: pathlib.Path,
) -> None:
    told = []
    for version in (41, 42):
        objects = [taken_from_a_cluster(r, version) for r in (BUILT_IN_MODEL, BUILT_IN_ADAPTER)]
        file = tmp_path / f"{version}.yaml"
        file.write_text(yaml.safe_dump_all(objects))
        found = load_manifests([file])
        told.append(user_config(found.models[0], found.adapters, None))
    assert told[0] == told[1]
    (adapter,) = told[0]["Generator"]["adapters"]
    assert adapter["metadata"] == {
        "name": BUILT_IN_ADAPTER.name,
        "namespace": "default",
        "annotations": {"calotype.dev/revision": "0123abcd"},
    }


def test_more_devices_for_a_picture_are_no_reason_to_restart_every_replica(
    tmp_path: pathlib.Path,
) -> None:
    """Serve rebuilds an application whose arguments change."""
    told = []
    for devices in (1, 2):
        document = BUILT_IN_MODEL.model_dump(mode="json", by_alias=True, exclude_none=True)
        document["spec"]["acceleration"] = {"devicesPerPicture": devices}
        file = tmp_path / f"{devices}.yaml"
        file.write_text(yaml.safe_dump(document))
        (application,) = applications(load_manifests([file]), threads=1)
        told.append(application)
    for name in ("name", "args", "import_path", "route_prefix"):
        assert told[0][name] == told[1][name]
    assert [application["gpus"]["devices"] for application in told] == [1, 2]


def test_a_ray_that_does_not_start_is_one_sentence(tmp_path: pathlib.Path) -> None:
    program = shutil.which("calotype", path=str(pathlib.Path(sys.executable).parent))
    assert program is not None
    folder = tmp_path / ("deep" * 30)  # no socket can have so long a path
    folder.mkdir()
    ended = subprocess.run(
        [program, "serve", "--port", "1", "--data-dir", str(tmp_path / "data")],
        env={**os.environ, "RAY_TMPDIR": str(folder), "CALOTYPE_API_KEY": "ct_live_" + "a" * 43},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 2
    assert "Ray could not be started" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
