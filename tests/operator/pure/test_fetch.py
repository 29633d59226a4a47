"""A fetch: what the Job is asked, what became of it, and when it is tried again."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from calotype.operator.kube.objects import Manifest
from calotype.operator.kube.resources import IMAGE_MODELS, JOBS
from calotype.operator.manifests.custom_resources import Weights, model_manifest
from calotype.operator.manifests.fetch_job import (
    FetchTask,
    build_config,
    build_job,
    build_secret_copy,
)
from calotype.operator.manifests.pods import Volumes
from calotype.operator.planning.adapters import adapter_task
from calotype.operator.planning.fetch_outcome import FetchFailure, FetchRunning, read_outcome
from calotype.operator.planning.weights import fetch_task
from calotype.operator.runtime.fetch_runner import FetchRunner, FetchSlots
from calotype.operator.runtime.metrics import Metrics
from calotype.operator.runtime.workqueue import Key
from calotype.operator.runtime.writers.children import ChildWriter
from calotype.operator.testing.client import DirectKubeClient
from calotype.serving.wire.fetch_order import FetchOrder
from calotype.serving.wire.fetch_result import FetchedWeights

from .. import manifests
from ..virtual import World
from .parts import HUB, VOLUME, adapter, model, owner, settings

LICENCE = {"name": "flux-dev-non-commercial-license", "accepted": True}
NOW = datetime.datetime(2026, 11, 23, 10, tzinfo=datetime.UTC)
JOB: Manifest = {
    "metadata": {"name": "fetch-a", "creationTimestamp": "2026-11-23T09:59:50Z"},
    "spec": {"activeDeadlineSeconds": 600},
}
FAILED = {"type": "Failed", "status": "True"}


def order_of(config_map: Manifest) -> FetchOrder:
    """fetch.json as the Job reads it."""
    return FetchOrder.model_validate_json(config_map["data"]["fetch.json"])


def job_of(task: FetchTask, adapter_source: str | None = None) -> Manifest:
    """The Job as the API server has it."""
    job = build_job(task, Volumes(data="data", adapter_source=adapter_source), settings())
    return job | {"metadata": {**job["metadata"], "uid": "uid-job"}}


def test_the_order_of_a_model_carries_its_licence() -> None:
    flux = model("flux", source=HUB, licence=LICENCE)
    task = fetch_task(owner("ImageModel", "flux"), flux, "", 0)
    order = order_of(build_config(task, job_of(task)))
    assert order.licence is not None
    assert (order.licence.name, order.licence.accepted) == (LICENCE["name"], True)
    assert (order.kind, order.name, order.source_type) == ("model", "flux", "huggingFace")
    assert str(order.folder) == "/var/lib/calotype/cache/models/calotype/flux"


def test_a_corrected_licence_is_another_fetch() -> None:
    """One that is refused for its licence is final, so the correction must be tried at once."""

    def fingerprint(licence: Any) -> str:
        spec = {"source": HUB} | ({"licence": licence} if licence else {})
        return fetch_task(owner("ImageModel", "flux"), model(**spec), "", 0).fingerprint

    assert len({fingerprint(one) for one in (None, LICENCE, LICENCE | {"name": "other"})}) == 3


def test_the_order_of_an_adapter_says_what_it_must_fit() -> None:
    base = model(adapters={"maxRank": 16, "memoryBudget": "1Gi"})
    manifest = model_manifest(base, Weights("/models/shapes"))
    sneaker = adapter("sneaker", "shoes", source=VOLUME, sha256="a" * 64)
    task = adapter_task(
        *(owner("LoRAAdapter", "sneaker", "shoes"), sneaker, base, owner("ImageModel", "shapes")),
        *(manifest, "", 0, settings()),
    )
    job = job_of(task, "files")
    order = order_of(build_config(task, job))
    assert (order.max_rank, order.max_bytes, order.sha256) == (16, 1024**3, "a" * 64)
    assert str(order.volume_dir) == "/var/lib/calotype/adapter-source"
    assert order.base_model().spec.source.path == "/models/shapes"
    assert job["metadata"]["ownerReferences"][0]["name"] == "shapes", "dies with the model"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in json.dumps(container["resources"])


def test_a_job_is_named_by_what_it_does() -> None:
    def name(secret: str, attempt: int) -> str:
        return fetch_task(owner("ImageModel", "flux"), model(source=HUB), secret, attempt).job_name

    assert name("s1", 0) == name("s1", 0)
    assert len({name("s1", 0), name("s2", 0), name("s1", 1)}) == 3


def test_credentials_of_another_namespace_are_copied_key_by_key() -> None:
    base = model()
    task = adapter_task(
        owner("LoRAAdapter", "sneaker", "shoes"),
        adapter("sneaker", "shoes", source=HUB, credentialsSecretRef={"name": "hub"}),
        *(base, owner("ImageModel", "shapes"), model_manifest(base, None), "v", 0),
        settings(),
    )
    secret = {"data": {"HF_TOKEN": "dA==", "OTHER": "cHJpdmF0ZQ=="}}
    copy = build_secret_copy(task, job_of(task), secret)
    assert copy["data"] == {"HF_TOKEN": "dA=="}
    assert copy["metadata"]["name"] == task.secret == task.job_name


def ended(message: str = "", reason: str = "Error", code: int = 1) -> Manifest:
    """The pod of a Job whose container has ended."""
    state = {"terminated": {"exitCode": code, "reason": reason, "message": message}}
    status = {"phase": "Failed", "containerStatuses": [{"state": state}]}
    return {"metadata": {"creationTimestamp": "2026-11-23T09:59:55Z"}, "status": status}


@pytest.mark.parametrize(
    ("job", "pods", "reason", "words"),
    [
        ({"conditions": [FAILED]}, [ended(reason="OOMKilled")], "FetchOutOfMemory", "memory"),
        ({"conditions": [FAILED]}, [ended("not JSON")], "FetchFailed", "exit code 1"),
        ({"conditions": [FAILED | {"reason": "DeadlineExceeded"}]}, [], "FetchTimedOut", "600 s"),
        ({"conditions": [FAILED | {"message": "evicted"}]}, [], "FetchFailed", "evicted"),
    ],
)
def test_a_job_without_a_result_may_be_tried_again(
    job: Manifest, pods: list[Manifest], reason: str, words: str
) -> None:
    outcome = read_outcome(JOB | {"status": job}, pods, NOW)
    assert isinstance(outcome, FetchFailure)
    assert outcome.reason == reason
    assert words in outcome.message
    assert not outcome.final


@pytest.mark.parametrize(
    ("reason", "final"),
    [("ModelIncomplete", True), ("BadWeights", True), ("OrderInvalid", True),
     ("LicenceNotAllowed", True), ("CredentialsRejected", True), ("Unreachable", False),
     ("VolumeFull", False), ("LaterWord", False)],
)  # fmt: skip
def test_what_a_job_says_decides_whether_it_is_tried_again(reason: str, final: bool) -> None:
    message = json.dumps({"ok": False, "reason": reason, "message": "Why."})
    outcome = read_outcome(JOB, [ended(message)], NOW)
    assert outcome == FetchFailure(reason, "Why.", final)


def test_a_job_that_found_its_weights() -> None:
    told = {"ok": True, "resolvedRevision": "r", "sha256": "s", "sizeBytes": 3, "path": "/p"}
    outcome = read_outcome(JOB, [ended(json.dumps(told), "Completed", 0)], NOW)
    assert isinstance(outcome, FetchedWeights)
    assert (outcome.revision, outcome.path) == ("r", "/p")


def waiting(**status: Any) -> Manifest:
    return {"metadata": {}, "status": {"phase": "Pending", **status}}


@pytest.mark.parametrize(
    ("pods", "seconds", "reason", "words"),
    [
        ([], 0, "Fetching", "starts"),
        ([], 300, "FetchNotStarted", "quota"),
        ([waiting()], 0, "Fetching", "running"),
        (
            [waiting(containerStatuses=[
                {"state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}
            ])],
            0, "FetchNotStarted", "no such image",
        ),
        (
            [waiting(conditions=[
                {"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}
            ])],
            0, "FetchNotStarted", "0/3 nodes",
        ),
    ],
)  # fmt: skip
def test_a_job_that_has_not_ended_says_what_it_waits_for(
    pods: list[Manifest], seconds: float, reason: str, words: str
) -> None:
    outcome = read_outcome(JOB, pods, NOW + datetime.timedelta(seconds=seconds))
    assert isinstance(outcome, FetchRunning)
    assert outcome.reason == reason
    assert words in outcome.message


async def test_retries_become_rarer_and_final_failures_are_never_retried(world: World) -> None:
    world.apply(manifests.model("flux", source=HUB))
    flux, key = model("flux", source=HUB), Key("ImageModel", "calotype", "flux")
    config = world.settings().model_copy(update={"longest_retry_seconds": 100.0})
    kube = DirectKubeClient(world.server)
    children = ChildWriter(kube, Metrics())
    runner = FetchRunner(kube, config, FetchSlots(1, lambda key: None), children)
    obj = await kube.get(IMAGE_MODELS, "calotype", "flux")
    assert obj is not None
    world.cluster.fetch = lambda order: {"ok": False, "reason": "Unreachable", "message": "Away."}

    async def step(failure: Any) -> Any:
        for _ in range(20):
            found = await runner.step(
                key, lambda n: fetch_task(obj, flux, "", n), failure, Volumes(data="data"), None
            )
            if found.failed and found.failure != failure:
                return found
            await world.settle()
            world.clock.seconds += (found.again or 0) if found.failed else 0
        raise AssertionError("the Job never ended")

    pauses, failure = [], None
    for _ in range(9):
        ended = await step(failure)
        pauses.append(ended.again)
        failure = ended.failure
        world.clock.seconds += ended.again + 1
    assert failure is not None and failure.attempts == 9
    assert [0.9 * 2**n <= pause <= 1.1 * 2**n for n, pause in enumerate(pauses[:6])] == [True] * 6
    assert max(pauses) <= 110
    world.cluster.fetch = lambda order: {"ok": False, "reason": "BadWeights", "message": "NaN."}
    final = await step(failure)
    assert (final.again, final.failure.next_retry_time) == (None, None)
    world.clock.seconds += 1_000_000
    count = len(world.cluster.started_jobs)
    again = await runner.step(
        key, lambda n: fetch_task(obj, flux, "", n), final.failure, Volumes(data="data"), None
    )
    assert again.failed and again.again is None
    assert len(world.cluster.started_jobs) == count
    assert world.server.objects.all(JOBS)
