"""What the chart tells the operator and applies for the user is what their own classes read."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from controlplane.client.objects import Object
from helm.rendering import NAMESPACE, RELEASE, Chart, Combinations, Rendered
from helm.schema import FIELDS
from pydantic import BaseModel

from calotype.moderation.policy.policy import Policy
from calotype.operator.settings import OperatorSettings, ResourceProfile, TeamGrant, load_settings
from calotype.serving.api.state.settings import SETTING, read_settings
from calotype.serving.config import ImageModel
from calotype.serving.core.request import ImageSize
from calotype.serving.engine.sizing.memory_plan import plan_memory


def camel(model: type[BaseModel]) -> set[str | None]:
    return {field.alias for field in model.model_fields.values()}


def test_the_operator_reads_its_settings(
    rendered: Rendered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = rendered.one("ConfigMap", f"{RELEASE}-operator")["data"]["operator.yaml"]
    (tmp_path / "operator.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("CALOTYPE_OPERATOR_NAMESPACE", NAMESPACE)
    settings = load_settings(tmp_path / "operator.yaml")
    assert settings.release == RELEASE
    assert settings.watched == [NAMESPACE]
    assert settings.gateway_config == f"{RELEASE}-gateway-config"
    rendered.one("ConfigMap", settings.gateway_config)
    rendered.one("ConfigMap", settings.gateway_teams)
    stranger, own = settings.team_grant("anywhere"), settings.team_grant(NAMESPACE)
    assert (stranger.weight, stranger.teams, stranger.takes) == (1, 5, [])
    assert stranger.quotas.requests_per_minute and own.quotas.requests_per_minute is None
    assert settings.internal_token_secret_ref is not None
    secret = rendered.one("Secret", settings.internal_token_secret_ref.name)
    assert settings.internal_token_secret_ref.key in secret["data"]
    assert settings.pod_security_context["runAsNonRoot"] is True
    assert {"default", "cpu", "a100-80gb", "a100-40gb", "h100"} <= set(settings.resource_profiles)
    assert (settings.health_port, settings.metrics_port) == (8080, 9090)


def test_models_reach_their_jobs_through_the_gateways(rendered: Rendered) -> None:
    settings = rendered.settings()
    pod = rendered.one("Deployment", f"{RELEASE}-gateway")["spec"]["template"]["spec"]
    env = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
    service = rendered.one("Service", f"{RELEASE}-internal")
    (port,) = service["spec"]["ports"]
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    url = OperatorSettings.model_fields["gateway_url"].default
    url = url.format(scheme="http", release=RELEASE, namespace=NAMESPACE)
    assert url == f"http://{name}.{namespace}.svc:{port['port']}"
    told = {entry["name"] for entry in pod["containers"][0]["ports"]}
    assert port["targetPort"] in told
    token = env["CALOTYPE_INTERNAL_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert settings["internalTokenSecretRef"] == token
    claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert [{"claimName": claim} for claim in [settings.get("dataClaim")] if claim] == claims
    assert [c["metadata"]["name"] for c in rendered.kind("PersistentVolumeClaim")] == [
        claim["claimName"] for claim in claims
    ]


def test_the_limits_of_jobs_reach_gateways_and_dispatchers(rendered: Rendered) -> None:
    pod = rendered.one("Deployment", f"{RELEASE}-gateway")["spec"]["template"]["spec"]
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    settings = read_settings({k: v for k, v in env.items() if v and k.startswith(SETTING)})
    assert rendered.settings()["maxOutageSeconds"] == settings.max_outage_seconds == 900
    assert (settings.outage_patience_seconds, settings.max_queue) == (60, 1000)


def test_redis_reaches_the_operator(combination: Combinations) -> None:
    assert combination("production").settings()["redis"] == {
        "address": "redis-master.redis.svc:6379",
        "passwordSecretRef": {"name": "calotype-redis", "key": "password"},
    }
    assert "redis" not in combination("trial").settings()


def test_ray_is_the_version_of_the_image(combination: Combinations) -> None:
    assert combination("defaults").settings()["rayVersion"] == importlib.metadata.version("ray")


def test_the_schema_offers_only_what_the_operator_reads() -> None:
    offered = {p.split(".")[2] for p in FIELDS if p.startswith("operator.settings.")}
    assert offered and offered <= camel(OperatorSettings)
    grant = {p.split(".")[4] for p in FIELDS if ".settings.teamGrants.default." in p}
    assert grant == camel(TeamGrant)
    profile = {p.split(".")[2] for p in FIELDS if p.startswith("resourceProfiles.*.")}
    assert profile == camel(ResourceProfile)


def objects(rendered: Rendered) -> dict[str, Object]:
    """Default objects by kind."""
    (config,) = [
        item
        for item in rendered.kind("ConfigMap")
        if item["metadata"]["name"].endswith("-defaults")
    ]
    found = [json.loads(v) for name, v in config["data"].items() if name.endswith(".json")]
    return {item["kind"]: item for item in found}


@pytest.mark.parametrize(
    ("name", "gpu"),
    [("trial", None), ("a100-p4d", "a100-40gb"), ("a100-a2", "a100-80gb"), ("lambda", "a100-80gb")],
)
def test_the_default_model_is_one_that_fits_its_gpu(
    combination: Combinations, name: str, gpu: str | None
) -> None:
    rendered = combination(name)
    manifest = objects(rendered)["ImageModel"]
    assert manifest["metadata"]["namespace"] == NAMESPACE
    model = ImageModel.model_validate(manifest)
    profile = rendered.settings()["resourceProfiles"][model.spec.resource_profile]
    if gpu is None:
        assert model.spec.runtime == "SinglePod" and profile["gpus"] == 0
        return
    assert profile["gpus"] == 1 and profile["tolerations"]
    assert model.spec.text_encoder is not None
    pixels = ImageSize.parse(model.spec.defaults.size, "size").pixels
    plan_memory("flux-2-dev", gpu, model.spec.precision, pixels, "separate")


def test_a_cloud_s_nodes_are_selected_by_its_own_labels(combination: Combinations) -> None:
    profiles = combination("a100-a2").settings()["resourceProfiles"]
    for name, accelerator in (
        ("a100-40gb", "nvidia-tesla-a100"),
        ("a100-80gb", "nvidia-a100-80gb"),
    ):
        assert profiles[name]["nodeSelector"] == {"cloud.google.com/gke-accelerator": accelerator}
    p4d = combination("a100-p4d").settings()["resourceProfiles"]["a100-40gb"]
    assert p4d["nodeSelector"]["node.kubernetes.io/instance-type"] == "p4d.24xlarge"
    # Eight of them on one node of 96 vCPU and 1,152 GiB, with room for what every node runs.
    assert 8 * int(p4d["limits"]["cpu"]) <= 92
    assert 8 * int(p4d["limits"]["memory"].removesuffix("Gi")) <= 1100


def test_the_default_policy_is_a_policy_that_blocks(combination: Combinations) -> None:
    manifest = objects(combination("production"))["ModerationPolicy"]
    policy = Policy.from_spec(manifest["metadata"]["name"], manifest["spec"])
    shipped = Policy.default()
    assert policy.lists == shipped.lists
    for category, rules in policy.categories.items():
        assert rules == shipped.categories[category]


def test_all_three_kinds_of_default_objects_are_applied_policy_first(chart: Chart) -> None:
    values: Object = {
        "defaultModel": {
            "enabled": True,
            "spec": {"runtime": "SinglePod", "source": {"builtIn": {"name": "shapes"}}},
        },
        "defaultPolicy": {"enabled": True, "spec": {"version": 1}},
        "defaultTeam": {"enabled": True, "name": "shoes", "spec": {"weight": 2}},
    }
    rendered = chart.render(values=values)
    assert set(objects(rendered)) == {"ImageModel", "ModerationPolicy", "Team"}
    names = sorted(rendered.one("ConfigMap", f"{RELEASE}-defaults")["data"])
    assert names == ["1-moderationpolicy.json", "1-team.json", "2-imagemodel.json", "hook.py"]


def test_an_applied_object_says_nothing_that_helm_would_own(combination: Combinations) -> None:
    for manifest in objects(combination("trial")).values():
        assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
        assert "annotations" not in manifest["metadata"]
