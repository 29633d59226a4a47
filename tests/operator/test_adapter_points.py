"""What peers get wrong about adapters, one test each; the numbers are those of the design page.

1 restarts, 2 one revision, 3 switching, 4 partly loaded, 5 bad files, 6 Secrets.
"""

from __future__ import annotations

import json
from typing import Any

from calotype.operator.kube.resources import CONFIG_MAPS, JOBS, LORA_ADAPTERS, PODS, SECRETS
from calotype.operator.testing.cluster import good_fetch

from . import manifests
from .virtual import World

NO_PODS = ("/pods/", "exec", "portforward", "proxy")


def told(world: World, name: str) -> dict[str, Any]:
    """An adapter as the replicas are told of it."""
    config = json.loads(world.find(CONFIG_MAPS, "model-shapes-app")["data"]["model.json"])
    generator = next(d for d in config["deployments"] if d["name"] == "Generator")
    found = [a for a in generator["user_config"]["adapters"] if a["metadata"]["name"] == name]
    return dict(found[0]) if found else {}


async def test_point_1_adapters_are_configuration_and_no_pod_is_ever_touched(world: World) -> None:
    world.apply(manifests.model())
    world.apply(manifests.of_hub())
    await world.start()
    await world.ready(LORA_ADAPTERS, "sneaker")
    # A replica that replaces a dead one is given the same user_config by Serve.
    assert told(world, "sneaker")["spec"]["source"]["path"].startswith("/var/lib/calotype/cache/")
    writes = [c for c in world.server.calls if c.method != "GET"]
    assert not [c for c in writes if any(word in c.path for word in NO_PODS)]


async def test_point_2_main_is_resolved_once_to_what_every_replica_gets(world: World) -> None:
    """`main` moves on at the hub; nobody loads something else because of it."""
    calls = 0

    def moving(config: dict[str, Any]) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        return good_fetch(config) | {
            "resolvedRevision": f"commit{calls}",
            "sha256": f"{calls:064x}",
        }

    world.cluster.fetch = moving
    world.apply(manifests.model())
    world.apply(manifests.of_hub())
    await world.start()
    found = await world.ready(LORA_ADAPTERS, "sneaker")
    assert found["status"]["resolvedRevision"] == "commit1"
    assert found["status"]["sha256"] == f"{1:064x}"
    adapter = told(world, "sneaker")
    assert adapter["metadata"]["annotations"] == {"calotype.dev/revision": "commit1"}
    assert adapter["spec"]["sha256"] == f"{1:064x}"
    world.apply(manifests.of_hub(triggerWords=["acme"]))
    await world.stop()
    await world.start()
    await world.ready(LORA_ADAPTERS, "sneaker")
    await world.until(lambda: told(world, "sneaker")["spec"].get("triggerWords"), "words travel")
    assert told(world, "sneaker")["metadata"]["annotations"] == {"calotype.dev/revision": "commit1"}
    assert calls == 1


async def test_point_3_a_changed_source_switches_only_when_it_is_checked(world: World) -> None:
    world.apply(manifests.model())
    world.apply(manifests.of_hub())
    await world.start()
    old = (await world.ready(LORA_ADAPTERS, "sneaker"))["status"]
    world.cluster.hold_jobs = True
    world.apply(manifests.of_hub(repo="acme/sneaker-2"))
    await world.condition(LORA_ADAPTERS, "sneaker", "Ready", "False", "OldRevisionServing")
    assert told(world, "sneaker")["spec"]["source"]["path"] == old["path"]
    world.cluster.resume_jobs()
    await world.ready(LORA_ADAPTERS, "sneaker")
    new = world.find(LORA_ADAPTERS, "sneaker")["status"]
    assert new["path"] != old["path"]
    assert told(world, "sneaker")["spec"]["source"]["path"] == new["path"]


async def test_point_3_a_failing_new_source_leaves_the_old_one_serving_and_says_so(
    world: World,
) -> None:
    world.apply(manifests.model())
    world.apply(manifests.of_hub())
    await world.start()
    old = (await world.ready(LORA_ADAPTERS, "sneaker"))["status"]
    world.cluster.fetch = lambda config: {
        "ok": False,
        "reason": "WrongBaseModel",
        "message": "It was trained on another model.",
    }
    world.apply(manifests.of_hub(repo="acme/wrong"))
    await world.condition(LORA_ADAPTERS, "sneaker", "Checked", "False", "WrongBaseModel")
    status = world.find(LORA_ADAPTERS, "sneaker")["status"]
    assert status["phase"] == "Degraded"
    assert status["lastFailure"]["reason"] == "WrongBaseModel"
    assert "another model" in status["lastFailure"]["message"]
    assert status["loaded"] == "1/1"
    assert told(world, "sneaker")["spec"]["source"]["path"] == old["path"]
    world.cluster.fetch = good_fetch
    world.apply(manifests.of_hub(repo="acme/right"))
    await world.ready(LORA_ADAPTERS, "sneaker")


async def test_point_3_replicas_that_cannot_load_the_new_revision_keep_the_old_one(
    world: World,
) -> None:
    world.apply(manifests.model())
    world.apply(manifests.of_hub())
    await world.start()
    await world.ready(LORA_ADAPTERS, "sneaker")
    app = world.cluster.apps.app("calotype", "shapes")
    app.failing = {"sneaker": "out of memory"}
    world.apply(manifests.of_hub(repo="acme/large"))
    condition = await world.condition(LORA_ADAPTERS, "sneaker", "Loaded", "False", "LoadFailed")
    assert "out of memory" in condition["message"]
    assert "revision before" in condition["message"]
    assert world.find(LORA_ADAPTERS, "sneaker")["status"]["phase"] == "Degraded"
    app.failing = {}
    await world.ready(LORA_ADAPTERS, "sneaker")


async def test_point_4_three_of_five_replicas_is_not_ready(world: World) -> None:
    world.apply(manifests.model())
    world.apply(manifests.adapter())
    await world.start()
    await world.ready(LORA_ADAPTERS, "stripes")
    app = world.cluster.apps.app("calotype", "shapes")
    app.replicas, app.failing, app.failing_replicas = 5, {"stripes": "no room"}, 2
    condition = await world.condition(LORA_ADAPTERS, "stripes", "Ready", "False", "PartiallyLoaded")
    assert "3/5" in condition["message"]
    assert "no room" in condition["message"]
    status = world.find(LORA_ADAPTERS, "stripes")["status"]
    assert (status["phase"], status["loaded"]) == ("Degraded", "3/5")
    assert status["replicas"] == {"desired": 5, "loaded": 3, "failed": 2}
    assert [s["state"] for s in status["loadStates"]] == ["failed"] * 2 + ["ready"] * 3
    app.failing = {}
    await world.ready(LORA_ADAPTERS, "stripes")
    assert world.find(LORA_ADAPTERS, "stripes")["status"]["loaded"] == "5/5"


async def test_point_5_a_bad_file_never_reaches_a_replica(world: World) -> None:
    configs: list[dict[str, Any]] = []

    def refuse(config: dict[str, Any]) -> dict[str, Any]:
        configs.append(config)
        return {"ok": False, "reason": "NotSafetensors", "message": "It is a pickle."}

    world.cluster.fetch = refuse
    world.apply(manifests.model(adapters={"maxRank": 16, "memoryBudget": "1Gi"}))
    world.apply(manifests.of_hub())
    await world.start()
    condition = await world.condition(
        LORA_ADAPTERS, "sneaker", "Checked", "False", "NotSafetensors"
    )
    assert "pickle" in condition["message"]
    assert world.find(LORA_ADAPTERS, "sneaker")["status"]["phase"] == "Failed"
    await world.quiet(1.2)
    assert len(configs) == 1, "the file's fault is not tried again"
    assert told(world, "sneaker") == {}
    assert (configs[0]["maxRank"], configs[0]["maxBytes"]) == (16, 1024**3)
    assert configs[0]["model"]["spec"]["source"] == {"builtIn": {"name": "shapes"}}
    job = next(iter(world.server.objects.all(JOBS).values()))
    limits = job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" not in limits


async def test_point_6_secrets_missing_wrong_and_rotated(world: World) -> None:
    world.apply(manifests.model())
    world.apply(manifests.of_hub(credentialsSecretRef={"name": "hub"}))
    await world.start()
    condition = await world.condition(
        LORA_ADAPTERS, "sneaker", "CredentialsReady", "False", "SecretMissing"
    )
    assert "Secret hub in namespace calotype" in condition["message"]
    world.secret("hub", TOKEN="abc")
    condition = await world.condition(
        LORA_ADAPTERS, "sneaker", "CredentialsReady", "False", "SecretKeyMissing"
    )
    assert "HF_TOKEN" in condition["message"]
    rejected = {"ok": False, "reason": "CredentialsRejected", "message": "403 of the hub."}
    world.cluster.fetch = lambda config: rejected
    world.secret("hub", HF_TOKEN="old")
    await world.condition(LORA_ADAPTERS, "sneaker", "Resolved", "False", "CredentialsRejected")
    await world.quiet(1.2)
    assert len(world.cluster.started_jobs) == 1, "rejected credentials wait for others"
    world.cluster.fetch = good_fetch
    world.secret("hub", HF_TOKEN="new")
    await world.ready(LORA_ADAPTERS, "sneaker")
    assert "lastFailure" in world.find(LORA_ADAPTERS, "sneaker")["status"]


async def test_point_6_only_named_secrets_are_read_and_copies_die_with_their_job(
    world: World,
) -> None:
    world.cluster.namespace("shoes")
    world.secret("hub", "shoes", HF_TOKEN="t-1", OTHER="private")
    world.secret("unrelated", "shoes", HF_TOKEN="t-2")
    world.apply(manifests.model(adapters={"namespaces": {"from": "All"}}))
    sneaker = manifests.of_hub(
        modelRef={"name": "shapes", "namespace": "calotype"}, credentialsSecretRef={"name": "hub"}
    )
    sneaker["metadata"]["namespace"] = "shoes"
    await world.start()
    world.apply(sneaker)
    await world.ready(LORA_ADAPTERS, "sneaker", "shoes")
    await world.quiet()
    reads = {c.path.split("?")[0] for c in world.server.calls if "/secrets" in c.path}
    assert not [path for path in reads if path.endswith("/secrets") or "unrelated" in path]
    made = [c.obj for c in world.server.objects.changes if c.resource == SECRETS]
    copy = next(o for o in made if o["metadata"]["namespace"] == "calotype")
    assert set(copy["data"]) == {"HF_TOKEN"}
    assert copy["metadata"]["ownerReferences"][0]["kind"] == "Job"
    assert not [o for (ns, _), o in world.server.objects.all(SECRETS).items() if ns == "calotype"]
    assert not world.server.objects.all(JOBS)
    assert not world.server.objects.all(PODS)
    assert "t-1" not in json.dumps([c.path for c in world.server.calls])


async def test_a_gated_revision_waits_for_its_acceptance_and_can_be_taken_back(
    world: World,
) -> None:
    """With spec.acceptance what was checked serves when the annotation names its digest."""
    commits = iter(range(1, 10))

    def moving(config: dict[str, Any]) -> dict[str, Any]:
        number = next(commits)
        found = good_fetch(config)
        return found | {"resolvedRevision": f"commit{number}", "sha256": f"{number:064x}"}

    def gated(repo: str) -> Any:
        return manifests.of_hub(repo=repo, acceptance={"pictures": 24})

    world.cluster.fetch = moving
    world.apply(manifests.model())
    world.apply(gated("acme/one"))
    await world.start()
    await world.condition(LORA_ADAPTERS, "sneaker", "Loaded", "False", "NotAccepted")
    ready = await world.condition(LORA_ADAPTERS, "sneaker", "Ready", "False", "NotAccepted")
    assert "calotype adapters accept" in json.dumps(ready)
    assert told(world, "sneaker") == {}
    world.annotate(LORA_ADAPTERS, "sneaker", accepted=f"{1:064x}")
    await world.ready(LORA_ADAPTERS, "sneaker")
    assert told(world, "sneaker")["spec"]["sha256"] == f"{1:064x}"
    # A new revision: the one before it serves on, and the status says why.
    world.apply(gated("acme/two"))
    await world.condition(LORA_ADAPTERS, "sneaker", "Ready", "False", "OldRevisionServing")
    await world.until(
        lambda: world.find(LORA_ADAPTERS, "sneaker")["status"]["sha256"] == f"{2:064x}", "fetched"
    )
    assert told(world, "sneaker")["spec"]["sha256"] == f"{1:064x}"
    for number in (2, 1):  # promoted, and taken back
        world.annotate(LORA_ADAPTERS, "sneaker", accepted=f"{number:064x}")
        await world.until(
            lambda n=number: told(world, "sneaker")["spec"]["sha256"] == f"{n:064x}", "it serves"
        )
        await world.ready(LORA_ADAPTERS, "sneaker")
    accepted = world.find(LORA_ADAPTERS, "sneaker")["status"]["acceptedRevisions"]
    assert [one["sha256"] for one in accepted] == [f"{1:064x}", f"{2:064x}"]
