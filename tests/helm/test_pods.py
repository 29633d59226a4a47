"""Every pod of the chart: hardened, bounded, and what the contract between the processes says."""

from __future__ import annotations

import base64
import json
import pathlib

import pytest
from controlplane.client.objects import Object
from helm.rendering import CHART, RELEASE, Chart, Combinations, Rendered

from calotype.operator.settings import OperatorSettings
from calotype.serving.core.tls import CA, CERTIFICATE, KEY


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def environment(container: Object) -> dict[str, Object]:
    return {entry["name"]: entry for entry in container.get("env", [])}


def test_every_pod_passes_pod_security_restricted(rendered: Rendered) -> None:
    pods = list(rendered.pods())
    assert len(pods) >= 4
    for where, pod in pods:
        spec = pod["spec"]
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True, where
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001, where
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where
        for volume in spec.get("volumes", []):
            kinds = set(volume) - {"name"}
            allowed = {"configMap", "secret", "projected", "emptyDir", "persistentVolumeClaim"}
            assert kinds <= allowed, where
        for container in containers(pod):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, where
            assert security["capabilities"] == {"drop": ["ALL"]}, where
            assert security["readOnlyRootFilesystem"] is True, where
            assert not any("hostPort" in port for port in container.get("ports", [])), where


def test_every_container_asks_for_its_share_and_is_bounded_in_memory(rendered: Rendered) -> None:
    for where, pod in rendered.pods():
        for container in containers(pod):
            assert set(container["resources"]["requests"]) == {"cpu", "memory"}, where
            assert "memory" in container["resources"]["limits"], where


def test_only_pods_that_speak_to_the_api_server_get_a_token(rendered: Rendered) -> None:
    with_token = {w for w, pod in rendered.pods() if pod["spec"]["automountServiceAccountToken"]}
    without = {w for w, pod in rendered.pods()} - with_token
    assert without == {f"Pod/{RELEASE}-test"}


def test_the_gateway_may_read_its_configuration_and_nothing_else(rendered: Rendered) -> None:
    name = f"{RELEASE}-gateway"
    (rule,) = rendered.one("Role", name)["rules"]
    wanted = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}
    assert rule == {**wanted, "resourceNames": [f"{name}-config", f"{name}-teams"]}
    (subject,) = rendered.one("RoleBinding", name)["subjects"]
    assert (subject["kind"], subject["name"]) == ("ServiceAccount", name)
    rendered.one("ConfigMap", f"{name}-config")


def test_no_pod_gets_the_services_of_its_neighbours_as_environment(rendered: Rendered) -> None:
    assert all(pod["spec"]["enableServiceLinks"] is False for _, pod in rendered.pods())


def test_every_mounted_volume_exists_and_every_volume_is_mounted(rendered: Rendered) -> None:
    for where, pod in rendered.pods():
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        mounted = {m["name"] for c in containers(pod) for m in c.get("volumeMounts", [])}
        assert volumes == mounted, where


def test_every_config_map_and_account_that_a_pod_names_is_in_the_chart(rendered: Rendered) -> None:
    for where, pod in rendered.pods():
        for volume in pod["spec"].get("volumes", []):
            for source in (volume, *volume.get("projected", {}).get("sources", ())):
                if "configMap" in source:
                    rendered.one("ConfigMap", source["configMap"]["name"])
        if account := pod["spec"].get("serviceAccountName"):
            rendered.one("ServiceAccount", account)
        assert account or not pod["spec"]["automountServiceAccountToken"], where


def test_selectors_match_the_pods_and_nothing_else(rendered: Rendered) -> None:
    pods = {where: pod["metadata"]["labels"] for where, pod in rendered.pods()}

    def selected(selector: Object) -> set[str]:
        return {where for where, labels in pods.items() if selector.items() <= labels.items()}

    gateway, operator = {f"Deployment/{RELEASE}-gateway"}, {f"Deployment/{RELEASE}-operator"}
    for name, expected in (("gateway", gateway), ("operator", operator)):
        deployment = rendered.one("Deployment", f"{RELEASE}-{name}")
        assert selected(deployment["spec"]["selector"]["matchLabels"]) == expected
    assert selected(rendered.one("Service", f"{RELEASE}-gateway")["spec"]["selector"]) == gateway
    for budget in rendered.kind("PodDisruptionBudget"):
        assert selected(budget["spec"]["selector"]["matchLabels"]) == gateway
    for constraint in rendered.one("Deployment", f"{RELEASE}-gateway")["spec"]["template"]["spec"][
        "topologySpreadConstraints"
    ]:
        assert selected(constraint["labelSelector"]["matchLabels"]) == gateway
    monitors = [*rendered.kind("ServiceMonitor"), *rendered.kind("PodMonitor")]
    for monitor in monitors:
        part = monitor["metadata"]["labels"]["app.kubernetes.io/component"]
        assert monitor["metadata"]["name"] == f"{RELEASE}-{part}"
        matched = selected(monitor["spec"]["selector"]["matchLabels"])
        assert matched == {f"Deployment/{RELEASE}-{part}"}


def test_the_gateway_speaks_tls_where_a_certificate_is_named(chart: Chart) -> None:
    rendered = chart.render(values={"gateway": {"tls": {"existingSecret": "images-tls"}}})
    pod = rendered.one("Deployment", f"{RELEASE}-gateway")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {
        "--tls-certificate=/etc/calotype/tls/tls.crt",
        "--tls-key=/etc/calotype/tls/tls.key",
    } <= set(container["args"])
    (volume,) = [v for v in pod["volumes"] if v.get("secret") == {"secretName": "images-tls"}]
    assert {"name": volume["name"], "mountPath": "/etc/calotype/tls", "readOnly": True} in (
        container["volumeMounts"]
    )
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == "operations", probe
    (port,) = rendered.one("Service", f"{RELEASE}-gateway")["spec"]["ports"]
    assert port["appProtocol"] == "https"
    (check,) = rendered.one("Pod", f"{RELEASE}-test")["spec"]["containers"]
    assert environment(check)["CALOTYPE_URL"]["value"].startswith("https://")


def test_gateways_operator_and_models_speak_tls_where_a_secret_is_named(chart: Chart) -> None:
    rendered = chart.render(values={"models": {"tls": {"existingSecret": "models-tls"}}})
    settings = OperatorSettings.model_validate({**rendered.settings(), "operatorNamespace": "art"})
    assert settings.models_tls is not None
    assert settings.models_tls.secret == "models-tls"
    assert settings.job_store_url == f"https://{RELEASE}-internal.art.svc:8001"
    (port,) = rendered.one("Service", f"{RELEASE}-internal")["spec"]["ports"]
    assert port["appProtocol"] == "https"
    secrets = {"gateway": {"secretName": "models-tls"}}
    secrets["operator"] = secrets["gateway"] | {"items": [{"key": "ca.crt", "path": "ca.crt"}]}
    for part, secret in secrets.items():
        pod = rendered.one("Deployment", f"{RELEASE}-{part}")["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        (volume,) = [v["name"] for v in pod["volumes"] if v.get("secret") == secret]
        (folder,) = [m for m in container["volumeMounts"] if m["name"] == volume]
        assert folder["readOnly"] is True
        if part == "operator":
            assert settings.models_tls.ca_file == f"{folder['mountPath']}/ca.crt"
            continue
        told = environment(container)
        for variable, file in ((CERTIFICATE, "tls.crt"), (KEY, "tls.key"), (CA, "ca.crt")):
            assert told[variable]["value"] == f"{folder['mountPath']}/{file}"
        # The public port has a certificate of its own, or none.
        assert "scheme" not in container["readinessProbe"]["httpGet"]


def test_the_gateway_is_started_as_agreed(combination: Combinations) -> None:
    deployment = combination("trial").one("Deployment", f"{RELEASE}-gateway")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert [*container["command"], *container["args"]] == [
        "calotype", "gateway", "--config=/etc/calotype/gateway/gateway.json",
        f"--config-map={RELEASE}-gateway-config", f"--teams-config-map={RELEASE}-gateway-teams",
        "--host=0.0.0.0", "--port=8000", "--internal-port=8001", "--operations-port=8002",
    ]  # fmt: skip
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    config = volumes[mounts["/etc/calotype/gateway"]]
    assert config["projected"]["sources"] == [
        {"configMap": {"name": f"{RELEASE}-gateway-{part}"}} for part in ("config", "teams")
    ]
    claim = volumes[mounts["/var/lib/calotype"]]["persistentVolumeClaim"]
    assert claim == {"claimName": f"{RELEASE}-data"}
    assert "emptyDir" in volumes[mounts["/tmp"]]
    found = environment(container)
    assert found["CALOTYPE_DATA_DIR"]["value"] == "/var/lib/calotype"
    assert found["CALOTYPE_DATABASE_URL"]["value"] == "sqlite:////var/lib/calotype/calotype.db"
    assert found["CALOTYPE_BLOB_URL"]["value"] == "file:///var/lib/calotype/assets"
    keys = {
        name: entry["valueFrom"]["secretKeyRef"]
        for name, entry in found.items()
        if "valueFrom" in entry
    }
    assert keys == {
        "CALOTYPE_INTERNAL_TOKEN": {"name": f"{RELEASE}-internal", "key": "token"},
        "CALOTYPE_SIGNING_SECRET": {"name": f"{RELEASE}-internal", "key": "signing-secret"},
        "CALOTYPE_AUDIT_KEY": {"name": f"{RELEASE}-audit", "key": "audit-key"},
        "CALOTYPE_API_KEY": {"name": f"{RELEASE}-api-key", "key": "api-key"},
    }
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness")}
    assert all(probe == {"path": "/healthz", "port": "operations"} for probe in probes.values())
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "operations"}
    assert container["ports"] == [
        {"name": "http", "containerPort": 8000, "protocol": "TCP"},
        {"name": "internal", "containerPort": 8001, "protocol": "TCP"},
        {"name": "operations", "containerPort": 8002, "protocol": "TCP"},
    ]
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}


def test_only_gateways_have_the_key_that_signs_audit_logs(rendered: Rendered) -> None:
    """Whoever writes a log must not be able to sign its head."""
    name = f"{RELEASE}-audit"
    having = [where for where, pod in rendered.pods() if name in json.dumps(pod)]
    assert having == [f"Deployment/{RELEASE}-gateway"]
    assert name not in json.dumps(rendered.settings()), "the operator puts it into no model pod"
    (secret,) = [s for s in rendered.kind("Secret") if s["metadata"]["name"] == name]
    key = base64.b64decode(secret["data"]["audit-key"]).decode()
    assert len(bytes.fromhex(key)) == 32


def test_in_production_all_state_is_elsewhere(combination: Combinations) -> None:
    rendered = combination("production")
    deployment = rendered.one("Deployment", f"{RELEASE}-gateway")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    database = environment(container)["CALOTYPE_DATABASE_URL"]["valueFrom"]["secretKeyRef"]
    assert database == {"name": "calotype-database", "key": "database-url"}
    blobs = environment(container)["CALOTYPE_BLOB_URL"]["value"]
    assert blobs == "s3://calotype-pictures/production"
    assert {"secretRef": {"name": "calotype-object-store"}} in container["envFrom"]
    assert rendered.kind("PersistentVolumeClaim") == []
    assert not any("persistentVolumeClaim" in volume for volume in pod["volumes"])
    assert "replicas" not in deployment["spec"]  # the autoscaler has them
    (scaler,) = rendered.kind("HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    rolling = deployment["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxUnavailable": 0, "maxSurge": 1}


def test_a_gateway_has_time_to_end_its_requests(combination: Combinations) -> None:
    from calotype.serving.api.state.settings import GatewaySettings

    deployment = combination("production").one("Deployment", f"{RELEASE}-gateway")
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > GatewaySettings().request_timeout


def test_the_operator_is_started_as_agreed(combination: Combinations) -> None:
    deployment = combination("trial").one("Deployment", f"{RELEASE}-operator")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "calotype.operator"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/etc/calotype"]]["configMap"] == {"name": f"{RELEASE}-operator"}
    namespace = environment(container)["CALOTYPE_OPERATOR_NAMESPACE"]["valueFrom"]
    assert namespace == {"fieldRef": {"fieldPath": "metadata.namespace"}}
    assert {p["name"]: p["containerPort"] for p in container["ports"]} == {
        "health": 8080,
        "metrics": 9090,
    }


def test_other_settings_are_another_operator_pod(chart: Chart) -> None:
    def checksum(values: Object) -> str:
        deployment = chart.render(values=values).one("Deployment", f"{RELEASE}-operator")
        annotations = deployment["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["checksum/settings"])

    assert checksum({}) == checksum({"gateway": {"service": {"port": 81}}})
    assert checksum({}) != checksum({"operator": {"settings": {"debounceSeconds": 3}}})


def test_images_have_one_prefix_and_may_be_pinned_by_digest(chart: Chart) -> None:
    digest = "sha256:" + "ab" * 32
    values = {
        "image": {
            "registry": "registry.example.com/imaging",
            "tag": "1.2.3",
            "pullSecrets": ["registry"],
            "operator": {"digest": digest},
        }
    }
    rendered = chart.render("values-trial.yaml", values=values)
    images = {where: containers(pod)[0]["image"] for where, pod in rendered.pods()}
    prefix = "registry.example.com/imaging/calotype-"
    assert images[f"Deployment/{RELEASE}-gateway"] == f"{prefix}gateway:1.2.3"
    assert images[f"Deployment/{RELEASE}-operator"] == f"{prefix}operator@{digest}"
    assert all(image.startswith(prefix) for image in images.values())
    for where, pod in rendered.pods():
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}], where
    assert rendered.settings()["serveImage"] == f"{prefix}serve:1.2.3"
    assert rendered.settings()["imagePullSecrets"] == ["registry"]


def test_hooks_run_scripts_that_are_in_the_chart(combination: Combinations) -> None:
    rendered = combination("trial")
    scripts = 0
    for where, pod in rendered.pods():
        mounts = {v["name"]: v.get("configMap", {}).get("name") for v in pod["spec"]["volumes"]}
        for container in containers(pod):
            for word in container["command"]:
                if not word.endswith(".py"):
                    continue
                scripts += 1
                folder, name = str(pathlib.PurePosixPath(word).parent), pathlib.Path(word).name
                (source,) = [
                    mounts[m["name"]] for m in container["volumeMounts"] if m["mountPath"] == folder
                ]
                text = rendered.one("ConfigMap", source)["data"][name]
                assert text.strip() == (CHART / "scripts" / name).read_text().strip(), where
    assert scripts == 3


def test_names_fit_the_longest_release(chart: Chart) -> None:
    longest = "r" * 53
    rendered = chart.render("values-trial.yaml", release=longest)
    for item in rendered.objects:
        name = item["metadata"]["name"]
        limit = 63 if item["kind"] in ("Service", "Job", "Pod", "Deployment") else 253
        assert len(name) <= limit, f"{item['kind']} {name}"
        labels = item["metadata"].get("labels", {})
        assert all(len(value) <= 63 for value in labels.values())


@pytest.mark.parametrize("name", ["gateway", "operator"])
def test_placement_reaches_the_pods(chart: Chart, name: str) -> None:
    placement: Object = {
        "nodeSelector": {"pool": "cpu"},
        "tolerations": [{"key": "pool", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {}}},
        "priorityClassName": "high",
    }
    extra = {"podLabels": {"team": "imaging"}, "podAnnotations": {"note": "1"}}
    env = [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}]
    rendered = chart.render(values={name: {**placement, **extra, "extraEnv": env}})
    template = rendered.one("Deployment", f"{RELEASE}-{name}")["spec"]["template"]
    assert placement.items() <= template["spec"].items()
    assert template["metadata"]["labels"]["team"] == "imaging"
    assert template["metadata"]["annotations"]["note"] == "1"
    assert env[0] in template["spec"]["containers"][0]["env"]
