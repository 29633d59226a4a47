"""Who may speak to whom: the policies are evaluated as a network plugin does."""

from __future__ import annotations

import pytest
from controlplane.client.objects import Object
from helm.rendering import NAMESPACE, RELEASE, Chart, Combinations, Rendered

Pod = tuple[str, dict[str, str]]
"""A namespace and labels."""


def ours(component: str, namespace: str = NAMESPACE) -> Pod:
    return namespace, {
        "app.kubernetes.io/part-of": "calotype",
        "app.kubernetes.io/instance": RELEASE,
        "app.kubernetes.io/component": component,
    }


GATEWAY = ours("gateway")
STRANGER: Pod = (NAMESPACE, {"app": "wiki"})
INGRESS: Pod = ("ingress", {"app": "nginx"})
KUBERAY: Pod = ("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
WORLD: Pod | None = None
"""An address outside the cluster."""


def matches(selector: Object, labels: dict[str, str]) -> bool:
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def is_peer(peer: Object, pod: Pod | None, home: str) -> bool:
    if pod is None or "ipBlock" in peer:
        return pod is None and "ipBlock" in peer
    namespace, labels = pod
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}):
            return False
    elif namespace != home:
        return False
    return matches(peer.get("podSelector", {}), labels)


def allowed(rendered: Rendered, pod: Pod, other: Pod | None, port: int, *, way: str) -> bool:
    """Whether policies of ``pod`` let it speak (``Egress``) or be spoken to (``Ingress``)."""
    policies = [
        policy
        for policy in rendered.kind("NetworkPolicy")
        if policy["metadata"]["namespace"] == pod[0]
        and way in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], pod[1])
    ]
    if not policies:
        return True
    field = "from" if way == "Ingress" else "to"
    for policy in policies:
        for rule in policy["spec"].get(way.lower(), []):
            ports = [entry["port"] for entry in rule.get("ports", [])]
            if ports and port not in ports:
                continue
            if field not in rule or any(is_peer(peer, other, pod[0]) for peer in rule[field]):
                return True
    return False


def reaches(rendered: Rendered, source: Pod | None, target: Pod | None, port: int) -> bool:
    """Whether both ends let a connection through."""
    out = source is None or allowed(rendered, source, target, port, way="Egress")
    into = target is None or allowed(rendered, target, source, port, way="Ingress")
    return out and into


Connection = tuple[str, Pod | None, Pod | None, int]
"""What it is for, who asks, who is asked, and the port."""
NEEDED: list[Connection] = [
    ("clients come to the gateway", INGRESS, ours("gateway"), 8000),
    ("the gateway asks models", ours("gateway"), ours("model"), 8000),
    ("a model asks for its jobs", ours("model"), ours("gateway"), 8001),
    ("the gateway asks the API server", ours("gateway"), WORLD, 6443),
    ("the operator asks models", ours("operator"), ours("model"), 8000),
    ("the operator asks the API server", ours("operator"), WORLD, 6443),
    ("the operator asks whose teams are", ours("operator"), ours("gateway"), 8001),
    ("the operator resolves revisions", ours("operator"), WORLD, 443),
    ("Prometheus reads the gateway", INGRESS, ours("gateway"), 8002),
    ("Prometheus reads the operator", INGRESS, ours("operator"), 9090),
    ("Prometheus reads Ray", INGRESS, ours("model"), 8080),
    ("Ray speaks to Ray", ours("model"), ours("model"), 6379),
    ("KubeRay asks the head", KUBERAY, ours("model"), 8265),
    ("KubeRay asks the head of a training", KUBERAY, ours("training"), 8265),
    ("weights are fetched", ours("fetch"), WORLD, 443),
    ("a training fetches its pictures", ours("training"), WORLD, 443),
    ("Ray's autoscaler asks the API server", ours("model"), WORLD, 6443),
    ("default objects are applied", ours("defaults"), WORLD, 6443),
    ("the uninstallation asks the API server", ours("release"), WORLD, 6443),
    ("helm test asks the gateway", ours("test"), ours("gateway"), 8000),
    ("providers and web hooks are called", ours("gateway"), WORLD, 443),
]
STATE: list[tuple[str, Pod, int]] = [
    ("gateway and database", ours("gateway"), 5432),
    ("gateway and pictures", ours("gateway"), 443),
    ("model and Redis", ours("model"), 6379),
]
FORBIDDEN: list[Connection] = [
    ("a pod elsewhere labelled as the gateway", ours("gateway", "tenant"), ours("model"), 8000),
    ("a pod elsewhere labelled as KubeRay", ("tenant", KUBERAY[1]), ours("model"), 8265),
    ("the gateway and a pod elsewhere labelled as a model", GATEWAY, ours("model", "tenant"), 8000),
    ("strangers and the model's HTTP port", STRANGER, ours("model"), 8000),
    ("strangers and Ray's dashboard, which runs code", STRANGER, ours("model"), 8265),
    ("strangers and Ray's client port", INGRESS, ours("model"), 10001),
    ("the gateway and Ray's dashboard", ours("gateway"), ours("model"), 8265),
    ("strangers and the operator's other ports", STRANGER, ours("operator"), 8000),
    ("a model and the gateway", ours("model"), ours("gateway"), 8000),
    ("a training and the jobs of models", ours("training"), ours("gateway"), 8001),
    ("a pod elsewhere labelled as a model", ours("model", "tenant"), ours("gateway"), 8001),
    ("clients and the internal port", INGRESS, ours("gateway"), 8001),
    ("a model and the operator", ours("model"), STRANGER, 8000),
    ("a fetch Job and a model", ours("fetch"), ours("model"), 6379),
    ("a training and a model", ours("training"), ours("model"), 6379),
    ("a fetch Job and mail", ours("fetch"), WORLD, 25),
    ("the gateway and mail", ours("gateway"), WORLD, 25),
    ("a component that is not known", ours("other"), WORLD, 443),
]


def case(entry: tuple[object, ...]) -> str:
    return str(entry[0]).replace(" ", "-")


@pytest.mark.parametrize("entry", NEEDED, ids=case)
def test_what_is_needed_is_open(rendered: Rendered, entry: Connection) -> None:
    _, source, target, port = entry
    assert reaches(rendered, source, target, port)


@pytest.mark.parametrize("entry", FORBIDDEN, ids=case)
def test_what_is_not_needed_is_closed(rendered: Rendered, entry: Connection) -> None:
    _, source, target, port = entry
    assert not reaches(rendered, source, target, port)


@pytest.mark.parametrize("entry", STATE, ids=case)
def test_state_is_reached_where_it_is_elsewhere(
    combination: Combinations, entry: tuple[str, Pod, int]
) -> None:
    _, source, port = entry
    assert reaches(combination("production"), source, WORLD, port)
    if port != 443:  # which downloads use too
        assert not reaches(combination("trial"), source, WORLD, port)


@pytest.mark.parametrize(
    ("part", "port"), [("gateway", 6379), ("model", 5432), ("fetch", 5432), ("training", 5432)]
)
def test_state_is_for_those_who_keep_it(combination: Combinations, part: str, port: int) -> None:
    assert not reaches(combination("production"), ours(part), WORLD, port)


def test_every_pod_of_the_chart_is_under_default_deny(rendered: Rendered) -> None:
    for where, pod in rendered.pods():
        labels = pod["metadata"]["labels"]
        assert not reaches(rendered, (NAMESPACE, labels), WORLD, 25), where
        assert not reaches(rendered, STRANGER, (NAMESPACE, labels), 25), where


def test_everybody_may_ask_for_names(rendered: Rendered) -> None:
    for part in ("gateway", "operator", "model", "fetch", "training", "test", "release"):
        assert reaches(rendered, ours(part), WORLD, 53)


def test_clients_and_monitoring_can_be_named(chart: Chart) -> None:
    def only(name: str) -> list[Object]:
        return [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}]

    values: Object = {"networkPolicy": {"clients": only("ingress"), "monitoring": only("metrics")}}
    rendered = chart.render(values=values)
    prometheus: Pod = ("metrics", {"app": "prometheus"})
    assert reaches(rendered, INGRESS, ours("gateway"), 8000)
    assert reaches(rendered, prometheus, ours("gateway"), 8002)
    assert not reaches(rendered, prometheus, ours("gateway"), 8000)
    assert not reaches(rendered, INGRESS, ours("gateway"), 8002)
    assert reaches(rendered, ours("test"), ours("gateway"), 8000)
    assert not reaches(rendered, STRANGER, ours("gateway"), 8000)
    assert reaches(rendered, prometheus, ours("operator"), 9090)
    assert reaches(rendered, prometheus, ours("model"), 8080)
    assert not reaches(rendered, INGRESS, ours("operator"), 9090)
    assert not reaches(rendered, INGRESS, ours("model"), 8080)


def test_models_of_other_namespaces_are_under_the_same_rules(chart: Chart) -> None:
    rendered = chart.render(values={"rbac": {"namespaces": ["shoes"]}})
    model = ours("model", "shoes")
    assert reaches(rendered, ours("gateway"), model, 8000)
    assert reaches(rendered, ours("operator"), model, 8000)
    assert not reaches(rendered, ("shoes", {"app": "wiki"}), model, 8265)
    assert not reaches(rendered, ours("model"), model, 6379)


def test_further_egress_reaches_all_that_work(chart: Chart) -> None:
    proxy = {"ports": [{"protocol": "TCP", "port": 3128}]}
    rendered = chart.render(values={"networkPolicy": {"extraEgress": [proxy]}})
    for part in ("gateway", "operator", "model", "fetch", "training"):
        assert reaches(rendered, ours(part), WORLD, 3128)
    assert not reaches(rendered, ours("test"), WORLD, 3128)


def test_policies_can_be_left_to_others(chart: Chart) -> None:
    rendered = chart.render(values={"networkPolicy": {"enabled": False}})
    assert rendered.kind("NetworkPolicy") == []
