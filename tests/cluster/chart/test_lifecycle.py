"""The life of a release with helm as a user types it: what an upgrade, a rollback and an
uninstallation leave alone, and what the hooks of the chart do."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cluster.kinds.installing import await_kinds
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object
from controlplane.fixtures import foreign
from controlplane.processes.control_plane import ControlPlane
from controlplane.processes.fake_nodes import FakeNodes
from helm.rendering import CHART, Chart

pytestmark = pytest.mark.cluster

EXAMPLES = CHART.parent / "examples"
KINDS = [f"{file.stem}.calotype.dev" for file in sorted((CHART / "crd-files").glob("*.yaml"))]
TRIAL = ("-f", str(CHART / "values-trial.yaml"))
# Nothing runs on fake nodes, so the script of a hook would not either: it is run below.
NO_MODEL = (*TRIAL, "--set", "defaultModel.enabled=false")


@pytest.fixture(scope="module")
def cluster(
    cluster_binaries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A control plane of these tests alone: helm owns the kinds here, and deletes them once."""
    if foreign():
        pytest.skip("the kinds of a cluster that is not ours are not deleted")
    folder = tmp_path_factory.mktemp("chart-life")
    control_plane = ControlPlane(cluster_binaries, folder)
    try:
        control_plane.start()
        cluster = Cluster(control_plane.admin, cluster_binaries, folder, control_plane)
        nodes = FakeNodes(control_plane, cluster)
        nodes.start()
        nodes.add_plain()
        yield cluster
        cluster.close()
    finally:
        control_plane.stop()


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    with cluster.namespace() as name:
        yield name
    for kind in definitions(cluster):
        cluster.delete_all(kind, name)


def definitions(cluster: Cluster) -> dict[str, Object]:
    return {
        item["metadata"]["name"]: item
        for item in cluster.items("customresourcedefinitions", None)
        if item["spec"]["group"] == "calotype.dev"
    }


def belongings(cluster: Cluster, namespace: str) -> Object:
    """What belongs to users: kinds, custom resources, volume, keys, the gateway's configuration."""
    found: Object = {name: item["metadata"]["uid"] for name, item in definitions(cluster).items()}
    for kind in KINDS:
        for item in cluster.items(kind, namespace):
            found[f"{kind}/{item['metadata']['name']}"] = (item["metadata"]["uid"], item["spec"])
    for secret in ("calotype-internal", "calotype-api-key"):
        found[secret] = cluster.get("secret", secret, namespace)["data"]
    found["volume"] = cluster.get("pvc", "calotype-data", namespace)["metadata"]["uid"]
    return found


def configuration(cluster: Cluster, namespace: str) -> str | None:
    config = cluster.get("configmap", "calotype-gateway-config", namespace)
    return dict(config.get("data") or {}).get("gateway.json")


def write_configuration(cluster: Cluster, namespace: str, text: str) -> None:
    """As the operator does it."""
    manifest: Object = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "calotype-gateway-config", "namespace": namespace},
        "data": {"gateway.json": text},
    }
    cluster.apply(manifest, "--server-side", "--field-manager=calotype-operator")


def test_upgrade_rollback_and_uninstallation_keep_what_is_the_users(
    cluster: Cluster, namespace: str
) -> None:
    helm = ("calotype", str(CHART), "-n", namespace)
    cluster.helm("install", *helm, *NO_MODEL)
    assert set(definitions(cluster)) == set(KINDS)
    await_kinds(cluster, KINDS)
    assert configuration(cluster, namespace) is None  # the gateway takes that as: no models yet
    cluster.apply(EXAMPLES, "-n", namespace)
    write_configuration(cluster, namespace, '{"models": ["mine"]}')
    before = belongings(cluster, namespace)
    assert len([name for name in before if "/" in name]) >= 3
    key = base64.b64decode(before["calotype-api-key"]["api-key"]).decode()
    assert key.startswith("ct_live_") and len(key) == len("ct_live_") + 43

    cluster.helm("upgrade", *helm, *NO_MODEL, "--set", "operator.settings.debounceSeconds=5")
    settings = cluster.get("configmap", "calotype-operator", namespace)["data"]["operator.yaml"]
    assert "debounceSeconds: 5" in settings
    assert belongings(cluster, namespace) == before
    assert configuration(cluster, namespace) == '{"models": ["mine"]}'

    write_configuration(cluster, namespace, '{"models": ["mine", "yours"]}')
    cluster.helm("rollback", "calotype", "1", "-n", namespace)
    settings = cluster.get("configmap", "calotype-operator", namespace)["data"]["operator.yaml"]
    assert "debounceSeconds: 2" in settings
    assert belongings(cluster, namespace) == before
    assert configuration(cluster, namespace) == '{"models": ["mine", "yours"]}'

    answer = cluster.helm("uninstall", "calotype", "-n", namespace)
    for kept in ("PersistentVolumeClaim", "Secret", "CustomResourceDefinition"):
        assert kept in answer
    for name in ("calotype-gateway", "calotype-operator"):
        cluster.wait_gone("deployment", name, namespace)
    for kind in ("services", "jobs", "roles", "rolebindings", "networkpolicies"):
        assert cluster.items(kind, namespace, "app.kubernetes.io/part-of=calotype") == []
    assert belongings(cluster, namespace) == before

    cluster.helm("install", *helm, *NO_MODEL)
    assert belongings(cluster, namespace) == before


def test_notes_say_what_to_type_next(cluster: Cluster, namespace: str) -> None:
    answer = cluster.helm(
        *("install", "notes", str(CHART), "-n", namespace, "--dry-run=server"),
        *("--take-ownership", *TRIAL),
    )
    notes = answer.partition("NOTES:\n")[2]
    assert f"kubectl get secret -n {namespace} notes-api-key" in notes
    assert f"kubectl port-forward -n {namespace} service/notes-gateway 8000:80" in notes
    assert f"kubectl wait -n {namespace} --for=condition=Ready imagemodel/shapes" in notes
    assert 'curl $CALOTYPE_URL/v1/images/generations -H "Authorization: Bearer' in notes
    assert f"helm test notes -n {namespace}" in notes
    assert "* KubeRay is not installed." in notes
    assert "helm install kuberay-operator" in notes and "--version 1.7.0" in notes


def test_notes_warn_of_secrets_that_are_not_there(cluster: Cluster, namespace: str) -> None:
    files = ("values-production.yaml", "values-a100-p4d.yaml")
    more = ("defaultModel.enabled=true", "defaultModel.spec.licence.accepted=true")
    words = [word for file in files for word in ("-f", str(CHART / file))]
    words += [word for setting in more for word in ("--set", setting)]
    words += ["--set", "monitoring=null", "--take-ownership"]

    def notes() -> str:
        return cluster.helm(
            "install", "notes", str(CHART), "-n", namespace, "--dry-run=server", *words
        )

    wanted = {
        "calotype-database": "database-url",
        "calotype-object-store": "AWS_ACCESS_KEY_ID",
        "calotype-redis": "password",
        "hf-token": "HF_TOKEN",
    }
    text = notes()
    for name, key in wanted.items():
        assert f"There is no Secret {name} with the key {key}" in text
        assert f"kubectl create secret generic {name} -n {namespace}" in text
    for name, key in wanted.items():
        literal = f"--from-literal={key if name != 'hf-token' else 'TOKEN'}=x"
        cluster.kubectl("create", "secret", "generic", name, "-n", namespace, literal)
    text = notes()
    assert "There is no Secret hf-token with the key HF_TOKEN" in text  # it has another key
    assert "calotype-database with" not in text and "calotype-redis with" not in text


def test_the_kinds_belong_to_one_release(cluster: Cluster, namespace: str) -> None:
    """A second release in the cluster takes them as they are; a third one may take them over."""
    with cluster.namespace() as other:
        owner = ("--take-ownership", *NO_MODEL)
        cluster.helm("install", "calotype", str(CHART), "-n", namespace, *owner)
        refused = cluster.helm("install", "second", str(CHART), "-n", other, *NO_MODEL, check=False)
        assert refused.code != 0 and "calotype.dev" in refused.err
        cluster.helm(
            "install", "second", str(CHART), "-n", other, *NO_MODEL, "--set", "crds.install=false"
        )
        cluster.helm("uninstall", "second", "-n", other)
        assert len(definitions(cluster)) == len(KINDS)
        assert cluster.get("deployment", "calotype-operator", namespace)
        cluster.helm("uninstall", "calotype", "-n", namespace)


def test_kinds_that_are_not_to_be_kept_go_with_the_release(
    cluster: Cluster, namespace: str
) -> None:
    words = (*NO_MODEL, "--take-ownership", "--set", "crds.keep=false")
    answer = cluster.helm("install", "brief", str(CHART), "-n", namespace, *words)
    assert "crds.keep is false: helm uninstall deletes every ImageModel" in answer
    cluster.helm("uninstall", "brief", "-n", namespace)
    cluster.until(lambda: not definitions(cluster), "the kinds are gone")


def account(cluster: Cluster, name: str, namespace: str, folder: Path) -> Path:
    """The folder that a pod with this ServiceAccount finds."""
    folder.mkdir()
    (folder / "token").write_text(cluster.token(name, namespace), encoding="utf-8")
    (folder / "ca.crt").write_bytes(cluster.endpoint[1])
    return folder


def run_hook(
    cluster: Cluster, folder: Path, *words: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """The chart's script as its pod runs it."""
    server = httpx.URL(cluster.endpoint[0])
    address = {"KUBERNETES_SERVICE_HOST": server.host, "KUBERNETES_SERVICE_PORT": str(server.port)}
    return subprocess.run(
        [sys.executable, "-S", str(CHART / "scripts" / "hook.py"), *words],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, **address, "CALOTYPE_SERVICE_ACCOUNT": str(folder), **more},
    )


@pytest.fixture
def applying(
    cluster: Cluster, namespace: str, cluster_binaries: dict[str, Path], tmp_path: Path
) -> tuple[Path, Path]:
    """Folders of the account and of the objects that the hook of the trial values is given."""
    as_helm = ("--server-side", "--force-conflicts", "--field-manager=helm")
    cluster.apply(CHART / "crd-files", *as_helm)
    await_kinds(cluster, KINDS)
    (tmp_path / "scratch").mkdir()
    chart = Chart(cluster_binaries["helm"], tmp_path / "scratch")
    rendered = chart.render("values-trial.yaml", namespace=namespace)
    mine = [
        item
        for item in rendered.objects
        if item["metadata"]["name"] == "acme-defaults" and item["kind"] != "Job"
    ]
    cluster.apply_objects(*mine, namespace=namespace)
    objects = tmp_path / "objects"
    objects.mkdir()
    for name, text in rendered.one("ConfigMap", "acme-defaults", namespace)["data"].items():
        (objects / name).write_text(text, encoding="utf-8")
    return account(cluster, "acme-defaults", namespace, tmp_path / "account"), objects


def test_default_objects_are_applied_and_never_forced(
    cluster: Cluster, namespace: str, applying: tuple[Path, Path]
) -> None:
    folder, objects = applying
    done = run_hook(cluster, folder, "apply", str(objects))
    assert (done.returncode, done.stdout) == (0, "ImageModel shapes: applied.\n"), done.stderr
    model = cluster.get("imagemodel", "shapes", namespace)
    assert model["spec"]["runtime"] == "SinglePod"
    managers = {entry["manager"] for entry in model["metadata"]["managedFields"]}
    assert managers == {"calotype-chart"}

    change = {"defaults": {"steps": 15}, "aliases": ["dall-e-3"]}
    cluster.patch("imagemodel", "shapes", {"spec": change}, namespace)
    done = run_hook(cluster, folder, "apply", str(objects))
    assert done.returncode == 0
    assert "ImageModel shapes: left as it is." in done.stdout and ".spec.defaults" in done.stdout
    assert cluster.get("imagemodel", "shapes", namespace)["spec"]["defaults"]["steps"] == 15


def test_a_default_object_that_is_wrong_fails_the_installation_with_the_reason(
    cluster: Cluster, namespace: str, applying: tuple[Path, Path]
) -> None:
    folder, objects = applying
    file = objects / "2-imagemodel.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["spec"]["defaults"]["steps"] = 1000
    file.write_text(json.dumps(manifest), encoding="utf-8")
    done = run_hook(cluster, folder, "apply", str(objects))
    assert done.returncode == 1
    assert done.stderr.startswith("ImageModel shapes: ")
    assert "defaults.steps must not exceed limits.maxSteps" in done.stderr


def test_before_an_uninstallation_the_operator_stops(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    cluster.helm(
        *("install", "calotype", str(CHART), "-n", namespace, "--take-ownership", *NO_MODEL)
    )
    selector = "app.kubernetes.io/component=operator,app.kubernetes.io/instance=calotype"
    cluster.wait("deployment", "calotype-operator", "Available", namespace)
    folder = account(cluster, "calotype-operator", namespace, tmp_path / "account")
    environment = {
        "CALOTYPE_OPERATOR_NAMESPACE": namespace,
        "CALOTYPE_DEPLOYMENT": "calotype-operator",
        "CALOTYPE_SELECTOR": selector,
    }
    done = run_hook(cluster, folder, "stop", **environment)
    assert done.returncode == 0, done.stderr
    assert cluster.items("pods", namespace, selector) == []
    cluster.delete("deployment", "calotype-operator", namespace)
    cluster.wait_gone("deployment", "calotype-operator", namespace)
    assert run_hook(cluster, folder, "stop", **environment).returncode == 0
