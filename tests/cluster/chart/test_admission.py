"""Every values file of the chart, as a real API server checks it in a `restricted` namespace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object
from helm.rendering import CHART, COMBINATIONS, Chart, Rendered

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def chart(cluster_binaries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Chart:
    return Chart(cluster_binaries["helm"], tmp_path_factory.mktemp("helm"))


@pytest.fixture(params=COMBINATIONS)
def rendered(request: pytest.FixtureRequest, chart: Chart, namespace: str) -> Rendered:
    return chart.combination(request.param, namespace)


def test_the_api_server_takes_every_object(
    kinds: Cluster, namespace: str, rendered: Rendered
) -> None:
    for found in rendered.objects:
        answer = kinds.dry_run(found, namespace)
        assert (answer.message, answer.warnings) == ("", []), found


def test_pod_security_admits_every_pod(kinds: Cluster, namespace: str, rendered: Rendered) -> None:
    kinds.apply_objects(*rendered.kind("ServiceAccount"), namespace=namespace)
    pods = list(rendered.pods())
    for where, template in pods:
        name = where.replace("/", "-").lower()
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": template["metadata"]["labels"]},
            "spec": {"restartPolicy": "Always", **template["spec"]},
        }
        answer = kinds.dry_run(pod, namespace)
        assert (answer.message, answer.warnings) == ("", []), where
    assert len(pods) >= 4


def test_pod_security_is_really_asked(kinds: Cluster, namespace: str, chart: Chart) -> None:
    open_pod: Object = {"containerSecurityContext": {"allowPrivilegeEscalation": True}}
    rendered = chart.render(values=open_pod, namespace=namespace)
    answer = kinds.dry_run(rendered.one("Deployment", "acme-gateway", namespace), namespace)
    [warning] = answer.warnings
    assert "would violate PodSecurity" in warning
    assert "allowPrivilegeEscalation" in warning


@pytest.mark.parametrize("name", ["trial", "production", "a100-p4d", "a100-a2", "lambda"])
def test_the_default_objects_are_ones_that_the_api_server_takes(
    kinds: Cluster, namespace: str, chart: Chart, name: str
) -> None:
    config = chart.combination(name, namespace).one("ConfigMap", "acme-defaults", namespace)
    manifests = [json.loads(v) for file, v in config["data"].items() if file.endswith(".json")]
    assert manifests
    for manifest in manifests:
        answer = kinds.dry_run(manifest)
        assert (answer.message, answer.warnings) == ("", [])


@pytest.mark.parametrize("name", COMBINATIONS)
def test_helm_s_own_dry_run_at_the_server(kinds: Cluster, namespace: str, name: str) -> None:
    files = [word for file in COMBINATIONS[name] for word in ("-f", str(CHART / file))]
    answer = kinds.helm(
        *("install", "dry", str(CHART), "-n", namespace, "--dry-run=server"),
        *("--take-ownership", *files),
    )
    assert "Your first request" in answer
    assert kinds.helm("list", "-n", namespace, "-q") == ""
    assert kinds.find("deployment", "dry-gateway", namespace) is None


def test_an_unknown_value_installs_nothing(kinds: Cluster, namespace: str) -> None:
    answer = kinds.helm(
        *("install", "wrong", str(CHART), "-n", namespace),
        *("--set", "gateway.replica=2"),
        check=False,
    )
    assert answer.code != 0
    assert "additional properties 'replica' not allowed" in answer.err
    assert kinds.helm("list", "-n", namespace, "-q") == ""
    assert kinds.items("configmaps", namespace, "app.kubernetes.io/instance=wrong") == []
