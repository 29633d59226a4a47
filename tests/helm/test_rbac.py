"""The operator may do what it does, where it does it, and nothing else."""

from __future__ import annotations

from collections import defaultdict

import pytest
from controlplane.client.objects import Object
from helm.rendering import COMBINATIONS, NAMESPACE, RELEASE, Chart, Combinations, Rendered

READ = {"get", "list", "watch"}
APPLY = {"get", "create", "patch"}
WATCHED: dict[tuple[str, str], set[str]] = {
    ("calotype.dev", "imagemodels"): READ | {"patch"},
    ("calotype.dev", "loraadapters"): READ | {"create", "patch"},
    ("calotype.dev", "moderationpolicies"): READ | {"patch"},
    ("calotype.dev", "teams"): READ | {"patch"},
    ("calotype.dev", "loratrainings"): READ | {"patch"},
    ("calotype.dev", "imagemodels/status"): {"patch"},
    ("calotype.dev", "loraadapters/status"): {"patch"},
    ("calotype.dev", "moderationpolicies/status"): {"patch"},
    ("calotype.dev", "teams/status"): {"patch"},
    ("calotype.dev", "loratrainings/status"): {"patch"},
    ("apps", "deployments"): READ | APPLY | {"delete"},
    ("batch", "jobs"): {"list", "watch", "create", "delete"},
    ("", "services"): APPLY | {"delete"},
    ("", "configmaps"): APPLY,
    ("", "persistentvolumeclaims"): READ | APPLY,
    ("", "secrets"): APPLY,
    ("", "pods"): {"list"},
    ("", "namespaces"): {"get"},
    ("", "events"): {"create"},
    ("ray.io", "rayservices"): READ | APPLY | {"delete"},
    ("ray.io", "rayjobs"): READ | APPLY,
    ("ray.io", "rayclusters"): {"list", "watch", "patch"},
    ("monitoring.coreos.com", "podmonitors"): APPLY | {"delete"},
}
"""(API group, resource) -> verbs in a watched namespace."""


def rights(role: Object) -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                found[group, resource] |= set(rule["verbs"])
    return dict(found)


def test_the_role_is_exactly_what_the_operator_does(rendered: Rendered) -> None:
    assert rights(rendered.one("Role", f"{RELEASE}-operator")) == WATCHED
    lease = rendered.one("Role", f"{RELEASE}-operator-lease")
    assert rights(lease) == {("coordination.k8s.io", "leases"): {"get", "create", "patch"}}


def test_no_role_has_a_wildcard_or_makes_roles(rendered: Rendered) -> None:
    for role in [*rendered.kind("Role"), *rendered.kind("ClusterRole")]:
        for (group, resource), verbs in rights(role).items():
            assert "*" not in {group, resource, *verbs}
            assert "rbac" not in group and not verbs & {"escalate", "bind", "impersonate"}


def test_the_default_is_one_namespace(rendered: Rendered) -> None:
    assert rendered.kind("ClusterRole") == rendered.kind("ClusterRoleBinding") == []
    spaces = {item["metadata"]["namespace"] for item in rendered.kind("Role")}
    assert spaces == {NAMESPACE}
    assert rendered.settings()["namespaces"] == [NAMESPACE]


def test_every_binding_binds_a_role_and_an_account_of_the_chart(rendered: Rendered) -> None:
    bindings = rendered.kind("RoleBinding")
    assert len(bindings) >= 2
    for binding in bindings:
        rendered.one("Role", binding["roleRef"]["name"], binding["metadata"]["namespace"])
        (subject,) = binding["subjects"]
        assert subject["kind"] == "ServiceAccount" and subject["namespace"] == NAMESPACE
        rendered.one("ServiceAccount", subject["name"])


def test_further_namespaces_get_the_same_role(chart: Chart) -> None:
    rendered = chart.render(values={"rbac": {"namespaces": ["shoes", "hats"]}})
    assert rendered.settings()["namespaces"] == [NAMESPACE, "shoes", "hats"]
    for space in ("shoes", "hats", NAMESPACE):
        assert rights(rendered.one("Role", f"{RELEASE}-operator", space)) == WATCHED
        (subject,) = rendered.one("RoleBinding", f"{RELEASE}-operator", space)["subjects"]
        assert subject["namespace"] == NAMESPACE
    (release,) = rendered.kind("ClusterRole")
    assert rights(release) == {
        ("calotype.dev", "imagemodels"): {"get", "patch"},
        ("calotype.dev", "loraadapters"): {"get", "patch"},
    }
    assert len([r for r in rendered.kind("Role") if r["metadata"]["name"].endswith("lease")]) == 1


def test_scope_cluster_is_one_cluster_role(chart: Chart) -> None:
    rendered = chart.render(values={"rbac": {"scope": "cluster"}})
    (role,), (binding,) = rendered.kind("ClusterRole"), rendered.kind("ClusterRoleBinding")
    assert rights(role) == WATCHED
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"][0]["namespace"] == NAMESPACE
    assert rendered.settings()["namespaces"] == ["*"]
    roles = [role["metadata"]["name"] for role in rendered.kind("Role")]
    assert sorted(roles) == [f"{RELEASE}-gateway", f"{RELEASE}-operator-lease"]


def test_an_administrator_may_make_the_roles(chart: Chart) -> None:
    rendered = chart.render(values={"rbac": {"create": False}})
    for kind in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"):
        assert rendered.kind(kind) == []
    rendered.one("ServiceAccount", f"{RELEASE}-operator")
    pod = rendered.one("Deployment", f"{RELEASE}-gateway")["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False  # it reads the volume
    assert not any("--config-map" in argument for argument in pod["containers"][0]["args"])


@pytest.mark.parametrize("name", [n for n in COMBINATIONS if n not in ("defaults", "a100-a2")])
def test_the_hook_of_default_objects_may_only_apply_them(
    combination: Combinations, name: str
) -> None:
    role = combination(name).one("Role", f"{RELEASE}-defaults")
    kinds = ("imagemodels", "moderationpolicies", "teams")
    assert rights(role) == {("calotype.dev", kind): {"create", "patch"} for kind in kinds}
