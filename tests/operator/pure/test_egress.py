"""How the pods that the operator makes reach mirrors, proxies and private authorities."""

from __future__ import annotations

import json
from typing import Any

import pytest

from calotype.operator.kube.objects import Manifest
from calotype.operator.manifests import rayservice, singlepod
from calotype.operator.manifests.fetch_job import build_job
from calotype.operator.manifests.trainingjob import build_rayjob
from calotype.operator.planning.weights import fetch_task, volumes_of

from .parts import HUB, model, owner, settings, training

EGRESS = {
    "hfEndpoint": "https://hub.acme.example",
    "httpsProxy": "http://proxy.acme.example:3128",
    "noProxy": ["10.0.0.0/8"],
    "caConfigMap": "acme-authorities",
}
VARIABLES = {
    "HF_ENDPOINT": "https://hub.acme.example",
    "HTTPS_PROXY": "http://proxy.acme.example:3128",
    "NO_PROXY": "localhost,127.0.0.1,.svc,.cluster.local,10.0.0.0/8",
    "SSL_CERT_FILE": "/etc/calotype-ca/ca.crt",
}


def pods_in(found: Any) -> list[Manifest]:
    """Every pod spec below a manifest."""
    if isinstance(found, dict):
        inner = [pod for value in found.values() for pod in pods_in(value)]
        return [*([found] if "containers" in found else []), *inner]
    return [pod for item in found for pod in pods_in(item)] if isinstance(found, list) else []


def made(kind: str, **changed: Any) -> list[Manifest]:
    config = settings(**changed)
    flux = model("flux", source=HUB, resourceProfile="gpu")
    profile = config.profile("gpu")
    assert profile is not None
    volumes = volumes_of(flux, config)
    if kind == "fetch Job":
        return pods_in(
            build_job(fetch_task(owner("ImageModel", "flux"), flux, "", 0), volumes, config)
        )
    if kind == "Ray cluster":
        groups = rayservice.groups_of(flux, profile, None)
        return pods_in(rayservice.build_cluster("flux", groups, volumes, config))
    return pods_in(build_rayjob(owner("LoRATraining", "sneaker"), training(), profile, config))


@pytest.mark.parametrize("kind", ["fetch Job", "Ray cluster", "training"])
def test_every_pod_that_loads_something_knows_the_way_out(kind: str) -> None:
    pods = made(kind, egress=EGRESS)
    told = 0
    for pod in pods:
        for container in pod["containers"]:
            variables = {e["name"]: e.get("value") for e in container.get("env", ())}
            if "HF_ENDPOINT" not in variables:
                continue  # KubeRay's submitter of a training fetches nothing
            told += 1
            assert VARIABLES.items() <= variables.items()
            assert "HTTP_PROXY" not in variables
            (mount,) = [m for m in container["volumeMounts"] if m["name"] == "authorities"]
            assert mount["mountPath"] == "/etc/calotype-ca" and mount["readOnly"]
            (volume,) = [v for v in pod["volumes"] if v["name"] == "authorities"]
            assert volume["configMap"] == {"name": "acme-authorities"}
    assert told


@pytest.mark.parametrize("kind", ["fetch Job", "Ray cluster", "training"])
def test_nothing_of_it_stands_in_a_pod_without_the_settings(kind: str) -> None:
    text = json.dumps(made(kind))
    assert not any(name in text for name in (*VARIABLES, "authorities"))


def test_a_model_in_one_pod_knows_it_too() -> None:
    config = settings(egress=EGRESS)
    flux = model("flux", source=HUB, resourceProfile="gpu", runtime="SinglePod")
    assert singlepod.mounts(volumes_of(flux, config))[-1]["name"] == "authorities"
