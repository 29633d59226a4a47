"""Model apps that speak HTTPS: their pods, their addresses, and what cannot go with it."""

from __future__ import annotations

import json

from ray.serve.schema import ServeDeploySchema

from calotype.operator.kube.objects import Manifest
from calotype.operator.manifests import rayservice, singlepod
from calotype.operator.manifests.application import build_application, serve_config
from calotype.operator.manifests.custom_resources import Weights, model_manifest
from calotype.operator.manifests.podmonitor import build_podmonitor
from calotype.operator.manifests.pods import Volumes
from calotype.operator.planning.model_check import check_models
from calotype.operator.settings import OperatorSettings, ResourceProfile
from calotype.serving.core.tls import CA, CERTIFICATE, KEY
from calotype.serving.wire.application import ModeratorConfig

from .parts import model, owner, settings

TLS = {"modelsTls": {"secret": "models-tls"}}
ONE = ResourceProfile(gpus=1)
HTTPS = {"path": "/-/healthz", "port": "serve", "scheme": "HTTPS"}


def check_pod(pod: Manifest) -> Manifest:
    """That it is given the Secret, and told where its files are; its container."""
    (container,) = pod["containers"]
    (volume,) = [v["name"] for v in pod["volumes"] if v.get("secret")]
    assert {"name": volume, "secret": {"secretName": "models-tls"}} in pod["volumes"]
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == volume]
    assert mount["readOnly"] is True
    told = {entry["name"]: entry.get("value") for entry in container["env"]}
    for variable, file in ((CERTIFICATE, "tls.crt"), (KEY, "tls.key"), (CA, "ca.crt")):
        assert told[variable] == f"{mount['mountPath']}/{file}"
    for variable in ("CALOTYPE_DATABASE_URL", "CALOTYPE_BLOB_URL"):
        assert told[variable] == "https://calotype-internal.calotype.svc:8001"
    return dict(container)


def test_one_pod_is_given_a_certificate_and_asked_by_https() -> None:
    obj, config = owner("ImageModel", "shapes", "art"), settings(**TLS)
    built = singlepod.build_deployment(obj, ONE, Volumes(), config, suspended=False)
    container = check_pod(built["spec"]["template"]["spec"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == HTTPS
    (port,) = singlepod.build_service(obj, config)["spec"]["ports"]
    assert port["appProtocol"] == "https"
    shapes = model(namespace="art", runtime="SinglePod")
    monitor = build_podmonitor(obj, shapes, config)
    assert [o["uid"] for o in monitor["metadata"]["ownerReferences"]] == [obj["metadata"]["uid"]]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"] == {
        "ca": {"secret": {"name": "models-tls", "key": "ca.crt"}},
        "serverName": "model-shapes.art.svc",
    }


def cluster(config: OperatorSettings) -> Manifest:
    shapes = model(resourceProfile="gpu", runtime="RayService")
    groups = rayservice.groups_of(shapes, ONE, None)
    return rayservice.build_cluster("shapes", groups, Volumes(), config)


def test_every_pod_of_a_cluster_is_given_a_certificate_for_its_proxy() -> None:
    plain, built = cluster(settings()), cluster(settings(**TLS))
    for group in built["workerGroupSpecs"]:
        container = check_pod(group["template"]["spec"])
        # KubeRay's own check of a worker would speak plain HTTP to the proxy.
        assert container["readinessProbe"]["httpGet"] == HTTPS
    assert "readinessProbe" not in check_pod(built["headGroupSpec"]["template"]["spec"])
    # A proxy keeps what it was started with: KubeRay must make another cluster.
    assert rayservice.cluster_hash(plain) != rayservice.cluster_hash(built)
    assert (rayservice.has_certificate(plain), rayservice.has_certificate(built)) == (False, True)
    assert not rayservice.has_certificate({"workerGroupSpecs": []})


def test_proxies_of_a_cluster_speak_https_with_the_files_of_its_pods() -> None:
    shapes = model()
    manifest = model_manifest(shapes, Weights("/models/shapes"))
    application = build_application(shapes, manifest, [], ModeratorConfig(), ONE, None, groups=True)
    assert "http_options" not in json.loads(serve_config(application))
    document = json.loads(serve_config(application, tls=True))
    options = ServeDeploySchema.model_validate(document).http_options
    (pod,) = [g["template"]["spec"] for g in cluster(settings(**TLS))["workerGroupSpecs"][:1]]
    told = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert (options.ssl_certfile, options.ssl_keyfile) == (told[CERTIFICATE], told[KEY])


def test_incremental_upgrades_are_refused_with_what_to_choose_instead() -> None:
    shapes = model(runtime="RayService", upgradeStrategy="Incremental")
    address = ("calotype", "shapes")
    possible = settings(gatewayClassName="envoy")
    assert check_models({address: shapes}, {}, {}, possible) == {}
    refused = check_models({address: shapes}, {}, {}, settings(gatewayClassName="envoy", **TLS))
    assert "choose NewCluster or InPlaceOnly" in refused[address].message
