"""Every values file of the chart, as a real API server judges it in a `restricted` namespace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object
from helm.rendering import CHART, COMBINATIONS, WITH_MODEL, Chart, Rendered

pytestmark = pytest.mark.cluster

CRDS = Path(__file__).parents[3] / "operator" / "api" / "crds"
MONITORING = {"ServiceMonitor": "endpoints", "PodMonitor": "podMetricsEndpoints"}


def monitoring_kinds() -> list[Object]:
    """The kinds of the Prometheus operator, as strict as our objects need."""

    def definition(kind: str, spec: Object) -> Object:
        plural = f"{kind.lower()}s"
        schema = {"type": "object", "required": ["spec"], "properties": {"spec": spec}}
        version = {"name": "v1", "served": True, "storage": True}
        return {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.monitoring.coreos.com"},
            "spec": {
                "group": "monitoring.coreos.com",
                "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
                "versions": [version | {"schema": {"openAPIV3Schema": schema}}],
            },
        }

    text: Object = {"type": "string"}
    texts = {"type": "object", "additionalProperties": text}
    selector = {"type": "object", "properties": {"matchLabels": texts}}
    endpoint = {"type": "object", "properties": {n: text for n in ("port", "path", "interval")}}
    found = []
    for kind, field in MONITORING.items():
        endpoints = {"type": "array", "items": endpoint}
        fields: dict[str, Any] = {"selector": selector, field: endpoints}
        spec = {"type": "object", "required": list(fields), "properties": fields}
        found.append(definition(kind, spec))
    rule = {
        "type": "object",
        "required": ["expr", "alert"],
        "properties": {name: text for name in ("alert", "expr", "for")}
        | {"labels": texts, "annotations": texts},
    }
    rules = {"type": "array", "items": rule}
    group = {"type": "object", "required": ["name"], "properties": {"name": text, "rules": rules}}
    groups = {"groups": {"type": "array", "items": group}}
    found.append(definition("PrometheusRule", {"type": "object", "properties": groups}))
    return found


@pytest.fixture(scope="module")
def chart(cluster_binaries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Chart:
    return Chart(cluster_binaries["helm"], tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="module")
def cluster(control_plane: Cluster) -> Iterator[Cluster]:
    """The control plane with our kinds, and for these tests with those of monitoring."""
    control_plane.apply(CRDS, "--server-side", "--force-conflicts")
    found = control_plane.kubectl("get", "crd", "-o", "name")
    strange = [kind for kind in monitoring_kinds() if kind["metadata"]["name"] not in found]
    if strange:
        control_plane.apply(strange, "--server-side")
    control_plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    yield control_plane
    for kind in strange:
        control_plane.delete("crd", kind["metadata"]["name"])


def render(chart: Chart, name: str, namespace: str) -> Rendered:
    clouds = name in ("a100-p4d", "a100-a2", "lambda")
    values = WITH_MODEL if clouds else None
    return chart.render(*COMBINATIONS[name], values=values, namespace=namespace)


@pytest.fixture(params=COMBINATIONS)
def rendered(request: pytest.FixtureRequest, chart: Chart, namespace: str) -> Rendered:
    return render(chart, request.param, namespace)


def test_the_api_server_takes_every_object(
    cluster: Cluster, namespace: str, rendered: Rendered
) -> None:
    answer = cluster.apply(
        rendered.objects, "--server-side", "--force-conflicts", "--dry-run=server", "-n", namespace
    )
    assert len(answer.splitlines()) == len(rendered.objects)
    assert "Warning" not in answer.err


def test_pod_security_admits_every_pod(
    cluster: Cluster, namespace: str, rendered: Rendered
) -> None:
    accounts = rendered.kind("ServiceAccount")
    cluster.apply(accounts, "--server-side", "-n", namespace)
    pods = list(rendered.pods())
    for where, template in pods:
        name = where.replace("/", "-").lower()
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": template["metadata"]["labels"]},
            "spec": {"restartPolicy": "Always", **template["spec"]},
        }
        answer = cluster.apply(pod, "--server-side", "--dry-run=server", "-n", namespace)
        assert "Warning" not in answer.err, where
    assert len(pods) >= 4


def test_pod_security_is_really_asked(cluster: Cluster, namespace: str, chart: Chart) -> None:
    open_pod: Object = {"containerSecurityContext": {"allowPrivilegeEscalation": True}}
    rendered = chart.render(values=open_pod, namespace=namespace)
    deployment = rendered.one("Deployment", "acme-gateway", namespace)
    answer = cluster.apply(deployment, "--server-side", "--dry-run=server", "-n", namespace)
    assert "would violate PodSecurity" in answer.err
    assert "allowPrivilegeEscalation" in answer.err


@pytest.mark.parametrize("name", ["trial", "production", "a100-p4d", "a100-a2", "lambda"])
def test_the_default_objects_are_ones_that_the_api_server_takes(
    cluster: Cluster, namespace: str, chart: Chart, name: str
) -> None:
    config = render(chart, name, namespace).one("ConfigMap", "acme-defaults", namespace)
    manifests = [json.loads(v) for file, v in config["data"].items() if file.endswith(".json")]
    assert manifests
    for manifest in manifests:
        answer = cluster.apply(manifest, "--server-side", "--dry-run=server")
        assert "serverside-applied" in answer and "Warning" not in answer.err


@pytest.mark.parametrize("name", COMBINATIONS)
def test_helm_s_own_dry_run_at_the_server(cluster: Cluster, namespace: str, name: str) -> None:
    files = [word for file in COMBINATIONS[name] for word in ("-f", str(CHART / file))]
    answer = cluster.helm(
        *("install", "dry", str(CHART), "-n", namespace, "--dry-run=server"),
        *("--take-ownership", *files),
    )
    assert "Your first request" in answer
    assert cluster.helm("list", "-n", namespace, "-q") == ""
    assert cluster.find("deployment", "dry-gateway", namespace) is None


def test_an_unknown_value_installs_nothing(cluster: Cluster, namespace: str) -> None:
    answer = cluster.helm(
        *("install", "wrong", str(CHART), "-n", namespace),
        *("--set", "gateway.replica=2"),
        check=False,
    )
    assert answer.code != 0
    assert "additional properties 'replica' not allowed" in answer.err
    assert cluster.helm("list", "-n", namespace, "-q") == ""
    assert cluster.items("configmaps", namespace, "app.kubernetes.io/instance=wrong") == []
