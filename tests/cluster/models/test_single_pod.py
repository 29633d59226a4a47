"""The whole way as a platform engineer walks it: helm install, kubectl apply, a picture, an
adapter, helm test, kubectl delete, helm uninstall. Every pod really runs, with the chart's own
commands, accounts and probes."""

from __future__ import annotations

import concurrent.futures
import json

import httpx
import openai
import pytest
from cluster.models.release import Release
from controlplane.client.objects import Object
from helm.rendering import CHART

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]

EXAMPLES = CHART.parent / "examples"
SOFT_STRIPES: Object = {
    "apiVersion": "calotype.dev/v1alpha1",
    "kind": "LoRAAdapter",
    "metadata": {"name": "stripes-soft"},
    "spec": {
        "modelRef": {"name": "shapes"},
        "source": {"builtIn": {"name": "stripes"}},
        "scale": {"default": 0.6, "min": 0.0, "max": 1.0},
    },
}


@pytest.fixture(scope="module")
def examples(release: Release) -> Release:
    """The release with the examples applied, and their model Ready."""
    release.kubectl("apply", "-f", EXAMPLES)
    release.wait("imagemodel/shapes")
    release.wait("loraadapter/stripes")
    return release


def test_the_chart_s_pods_run_with_the_chart_s_accounts(release: Release) -> None:
    for component in ("gateway", "operator"):
        (pod,) = release.pods(component)
        assert pod["spec"]["serviceAccountName"] == f"calotype-{component}"
        (status,) = pod["status"]["containerStatuses"]
        assert status["ready"] and status["restartCount"] == 0
    assert "STATUS: deployed" in release.notes
    assert f"kubectl port-forward -n {release.namespace} service/calotype-gateway" in release.notes
    assert "KubeRay is not installed" not in release.notes  # this cluster has it


def test_the_default_model_of_the_trial_draws_without_any_further_word(release: Release) -> None:
    release.wait("imagemodel/shapes")
    assert len(release.draw()) == 3 * 128 * 128


def test_the_examples_are_served(examples: Release) -> None:
    table = examples.kubectl("get", "imagemodels,loraadapters,teams")
    assert "1/1" in table
    image = examples.draw()
    assert image == examples.draw()
    assert image != examples.draw([{"id": "stripes", "scale": 1.0}])


def test_the_examples_policy_checks(examples: Release) -> None:
    with pytest.raises(openai.BadRequestError) as refused, examples.client() as client:
        client.images.generate(model="shapes", prompt="a portrait of Zorblax the rival")
    assert refused.value.code == "moderation_blocked"


def test_the_team_s_key_opens_the_gateway(examples: Release) -> None:
    examples.wait("team/web-shop")
    key = examples.secret("calotype-key-web-shop", "api-key")
    assert examples.models(key) == ["shapes"]
    with pytest.raises(openai.AuthenticationError):
        examples.models("ct_live_nobody_has_this_key")


def test_an_adapter_that_is_applied_draws_and_one_that_is_deleted_does_not(
    examples: Release,
) -> None:
    plain = examples.draw()
    with pytest.raises(openai.APIStatusError) as unknown:
        examples.draw([{"id": "stripes-soft"}])
    assert unknown.value.status_code in (400, 404)

    examples.kubectl("apply", "-f", "-", stdin=json.dumps(SOFT_STRIPES))
    examples.wait("loraadapter/stripes-soft")
    assert "1/1" in examples.kubectl("get", "loraadapter", "stripes-soft")
    soft = examples.draw([{"id": "stripes-soft"}])
    assert soft not in (plain, examples.draw([{"id": "stripes", "scale": 1.0}]))
    assert soft == examples.draw([{"id": "stripes", "scale": 0.6}])

    examples.kubectl("delete", "loraadapter", "stripes-soft", "--timeout=250s")
    with pytest.raises(openai.APIStatusError) as gone:
        examples.draw([{"id": "stripes-soft"}])
    assert gone.value.status_code in (400, 404)
    assert examples.draw() == plain


def test_helm_test_is_content(examples: Release) -> None:
    answer = examples.helm("test", "calotype", "--logs")
    assert "Phase:          Succeeded" in answer
    assert "The gateway serves shapes" in answer


def test_upgrade_and_rollback_disturb_no_model(examples: Release) -> None:
    (model,), (gateway,) = examples.pods("model"), examples.pods("gateway")
    image = examples.draw()
    more = ("--set", "operator.settings.debounceSeconds=1", "--wait", "--timeout", "10m")
    examples.helm("upgrade", "calotype", str(CHART), "--reuse-values", *more)
    examples.helm("rollback", "calotype", "1", "--wait", "--timeout", "10m")
    examples.wait("imagemodel/shapes")
    assert [pod["metadata"]["uid"] for pod in examples.pods("model")] == [model["metadata"]["uid"]]
    assert [p["metadata"]["uid"] for p in examples.pods("gateway")] == [gateway["metadata"]["uid"]]
    assert examples.draw() == image


def test_no_account_of_the_release_was_refused_anything(examples: Release) -> None:
    account = f"system:serviceaccount:{examples.namespace}:"
    used: dict[str, int] = {}
    refused = []
    for event in examples.cluster.processes.audit(account):
        name = event["user"]["username"].removeprefix(account)
        used[name] = used.get(name, 0) + 1
        if event.get("responseStatus", {}).get("code") == 403:
            refused.append((name, event["verb"], event.get("objectRef")))
    assert refused == []
    assert {"calotype-operator", "calotype-gateway", "calotype-defaults"} <= set(used)


def test_what_is_deleted_drains_and_is_gone(examples: Release) -> None:
    slow: Object = {"steps": 50, "size": "512x512"}
    operations = examples.cluster.forward("svc/calotype-metrics", 8002, examples.namespace)
    with operations as port, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: examples.draw(**slow))
        model = lambda: httpx.get(f"{port}/metrics").text  # noqa: E731
        examples.cluster.until(
            lambda: 'calotype_jobs{model="shapes",status="running"} 1.0' in model(),
            "the picture is being drawn",
        )
        examples.kubectl("delete", "-f", EXAMPLES, "--timeout=250s")
        assert len(running.result(timeout=900)) == 3 * 512 * 512
    for kind in ("imagemodels", "loraadapters", "teams", "moderationpolicies"):
        assert examples.cluster.items(kind, examples.namespace) == []
    for kind in ("deployments", "services", "configmaps", "pods"):
        examples.cluster.until(
            lambda kind=kind: not examples.named(kind, "shapes"), f"the model's {kind} are gone"
        )
    assert examples.cluster.find("secret", "calotype-key-web-shop", examples.namespace) is None
    examples.cluster.until(lambda: examples.models() == [], "the gateway offers no model")


def test_after_an_uninstallation_everything_that_stays_can_be_deleted(examples: Release) -> None:
    pod_cluster, namespace = examples.cluster, examples.namespace
    examples.kubectl("apply", "-f", EXAMPLES)
    held = lambda found: "calotype.dev/operator" in found["metadata"].get("finalizers", [])  # noqa: E731
    pod_cluster.wait("imagemodel", "shapes", held, namespace)
    pod_cluster.until(lambda: examples.pods("model"), "the model has a pod")

    answer = examples.helm("uninstall", "calotype", "--timeout", "10m")
    assert "kept due to the resource policy" in answer
    for component in ("gateway", "operator"):
        pod_cluster.until(lambda c=component: not examples.pods(c), f"the {component} has ended")
    model = pod_cluster.get("imagemodel", "shapes", namespace)
    assert not model["metadata"].get("finalizers")
    pod_cluster.get("secret", "calotype-api-key", namespace)
    pod_cluster.get("pvc", "calotype-data", namespace)
    assert examples.pods("model")  # goes on until its ImageModel goes

    examples.kubectl("delete", "-f", EXAMPLES, "--timeout=250s")
    pod_cluster.wait_gone("deployment", "model-shapes", namespace)
    pod_cluster.until(lambda: not examples.pods("model"), "the model's pod is gone")
