"""Values: complete and described in the schema, nothing unknown taken, wrong ones explained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from controlplane.client.objects import Object
from helm.rendering import CHART, COMBINATIONS, WITH_MODEL, Chart
from helm.schema import FIELDS, SCHEMA

VALUES: Object = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def leaves(values: Any, path: str = "") -> Iterator[str]:
    if isinstance(values, dict) and values:
        for name, child in values.items():
            yield from leaves(child, f"{path}.{name}".lstrip("."))
    else:
        yield path


@pytest.mark.parametrize("files", COMBINATIONS.values(), ids=COMBINATIONS)
def test_helm_has_nothing_against_the_chart(chart: Chart, files: tuple[str, ...]) -> None:
    assert "0 chart(s) failed" in chart.lint(*files)


def test_every_values_file_is_tried() -> None:
    tried = {file for files in COMBINATIONS.values() for file in files}
    assert tried == {file.name for file in CHART.glob("values-*.yaml")}


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_is_described(path: str) -> None:
    description = FIELDS[path].get("description", "")
    assert description.endswith(".") and len(description) > 6, path


def test_every_object_is_closed_or_passed_on_as_it_is() -> None:
    assert SCHEMA["additionalProperties"] is False
    open_ones = {
        path.rpartition(".")[2]
        for path, schema in FIELDS.items()
        if schema.get("type") == "object" and "additionalProperties" not in schema
    }
    assert open_ones == {
        "affinity", "podSecurityContext", "containerSecurityContext", "spec", "kuberay", "global",
    }  # fmt: skip


def test_values_yaml_shows_every_value() -> None:
    shown = set(leaves(VALUES))
    shown |= {path[:i] for path in shown for i, sign in enumerate(path) if sign == "."}
    deeper = ("global", "operator.settings.", "resourceProfiles.*", ".claims")
    hidden = {
        path
        for path, schema in FIELDS.items()
        if path not in shown and not any(part in path for part in deeper)
    }
    # Text maps and lists of values.yaml are shown whole; their insides have no path of their own.
    assert {path for path in hidden if path.rpartition(".")[0] not in shown} == set()
    assert hidden == set()


UNKNOWN: list[Object] = [
    {"gatway": {}},
    {"gateway": {"replica": 2}},
    {"gateway": {"autoscaling": {"enable": True}}},
    {"gateway": {"service": {"nodePort": 30000}}},
    {"operator": {"replicas": 2}},
    {"operator": {"settings": {"debounce": 1}}},
    {"image": {"name": "x"}},
    {"database": {"url": "postgresql://user:password@host/db"}},
    {"persistence": {"storageClass": "fast"}},
    {"resourceProfiles": {"mine": {"gpu": 1}}},
    {"networkPolicy": {"egress": []}},
    {"monitoring": {"alerts": True}},
    {"defaultModel": {"enable": True}},
    {"secrets": {"apiKey": {"value": "ct_live_x"}}},
]


@pytest.mark.parametrize("values", UNKNOWN, ids=json.dumps)
def test_an_unknown_value_is_refused_by_its_name(chart: Chart, values: Object) -> None:
    unknown = next(leaves(values)).rpartition(".")[2]
    assert f"additional properties '{unknown}' not allowed" in chart.refusal(values=values)


WRONG: list[tuple[str, Object, str]] = [
    ("scope", {"rbac": {"scope": "all"}}, "value must be one of 'namespace', 'cluster'"),
    ("pull policy", {"image": {"pullPolicy": "Sometimes"}}, "'Always', 'IfNotPresent', 'Never'"),
    ("digest", {"image": {"serve": {"digest": "abc"}}}, "sha256:"),
    ("bucket", {"objectStore": {"url": "gs://bucket"}}, "s3://"),
    ("port as text", {"gateway": {"service": {"port": "80"}}}, "want integer"),
    ("label as number", {"gateway": {"nodeSelector": {"gpus": 8}}}, "want string"),
    ("redis without port", {"redis": {"address": "redis"}}, ":[0-9]+"),
    ("registry with slash", {"image": {"registry": "registry.example.com/"}}, "/image/registry"),
    ("size", {"persistence": {"size": "many"}}, "/persistence/size"),
    (
        "gateways on SQLite",
        {"gateway": {"replicas": 3}},
        "gateway.replicas is 3, but the embedded SQLite database serves one gateway. Write "
        "gateway.replicas: 1, or name a PostgreSQL with database.existingSecret.name.",
    ),
    (
        "autoscaling on SQLite",
        {"gateway": {"autoscaling": {"enabled": True}}},
        "Write gateway.autoscaling.enabled: false, or name a PostgreSQL",
    ),
    (
        "pictures of several gateways",
        {"gateway": {"replicas": 3}, "database": {"existingSecret": {"name": "db"}}},
        "Name a bucket with objectStore.url, or write persistence.accessModes: [ReadWriteMany].",
    ),
    (
        "bounds of autoscaling",
        {
            "gateway": {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}},
            "database": {"existingSecret": {"name": "db"}},
            "objectStore": {"url": "s3://bucket"},
        },
        "Write a maxReplicas of at least 5.",
    ),
    (
        "namespaces and cluster",
        {"rbac": {"scope": "cluster", "namespaces": ["shoes"]}},
        "Write rbac.namespaces: [], or rbac.scope: namespace.",
    ),
    (
        "ingress without host",
        {"gateway": {"ingress": {"enabled": True}}},
        "Write gateway.ingress.host, for example images.example.com.",
    ),
    (
        "model without source",
        {"defaultModel": {"enabled": True}},
        "Write for example defaultModel.spec.source.huggingFace.repo",
    ),
    (
        "unknown profile",
        {
            "defaultModel": {
                "enabled": True,
                "spec": {
                    "runtime": "SinglePod",
                    "resourceProfile": "a100",
                    "source": {"builtIn": {"name": "shapes"}},
                },
            }
        },
        'defaultModel.spec.resourceProfile is "a100", which resourceProfiles does not have. '
        "Write one of a100-40gb, a100-80gb, cpu, default, h100, or add the profile.",
    ),
    (
        "Ray pods on SQLite",
        {"defaultModel": {"enabled": True, "spec": {"source": {"builtIn": {"name": "shapes"}}}}},
        "Name a PostgreSQL with database.existingSecret.name and a bucket with objectStore.url "
        "(values-production.yaml does), or write defaultModel.spec.runtime: SinglePod.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "sentence"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_value_is_refused_with_what_to_write(
    chart: Chart, name: str, values: Object, sentence: str
) -> None:
    assert sentence in " ".join(chart.refusal(values=values).split())


def test_audit_logs_need_a_durable_place_in_production(chart: Chart) -> None:
    message = chart.refusal("values-production.yaml", values={"audit": {"existingClaim": ""}})
    assert "Name a ReadWriteMany claim with audit.existingClaim." in " ".join(message.split())
    settings = chart.render("values-production.yaml").settings()
    assert settings["auditClaim"] == "calotype-audit"
    assert "auditClaim" not in chart.render().settings(), "the volume of the release has them"


@pytest.mark.parametrize("cloud", ["values-a100-p4d.yaml", "values-a100-a2.yaml"])
def test_the_licence_is_accepted_by_whoever_installs(chart: Chart, cloud: str) -> None:
    files = ("values-production.yaml", cloud)
    assert chart.render(*files).kind("Job") == chart.render("values-production.yaml").kind("Job")
    message = chart.refusal(*files, values={"defaultModel": {"enabled": True}})
    assert '"flux-dev-non-commercial-license"' in message
    assert "add --set defaultModel.spec.licence.accepted=true" in message
    rendered = chart.render(*files, values=WITH_MODEL)
    assert "2-imagemodel.json" in rendered.one("ConfigMap", "acme-defaults")["data"]
