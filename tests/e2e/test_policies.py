"""Policies of the model and of a team through the running service, also switched under load."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from e2e.conftest import ModelFile

from calotype.moderation.records.audit import verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

JOBS = 24
AT_ONCE = 4
SMALL = {"width": 64, "height": 64, "steps": 4}


def manifest(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    }


def house(version: int) -> dict[str, Any]:
    """Version 2 makes no lighthouses any more."""
    terms = [{"category": "ip_character", "terms": ["captain calotype"], "action": "flag"}]
    if version > 1:
        terms.append({"category": "ip_character", "terms": ["lighthouse"], "action": "block"})
    return manifest(
        "ModerationPolicy", "house", version=version, extends="default",
        categories={"shocking": {"text": {"flag": 0.7}}}, terms=terms,
        presets={"strict": {"tolerances": [0, 1],
                            "categories": {"violence": {"text": {"block": 0.0}}}}},
    )  # fmt: skip


# Read first, and named by nobody: a model that names no policy would have it.
ANOTHER = manifest("ModerationPolicy", "another", version=1, categories={"violence": {}})
KIDS = manifest(
    "ModerationPolicy", "kids", version=1, extends="default", categories={"violence": {}},
    terms=[{"category": "ip_character", "terms": ["captain calotype", "lighthouse"]}],
)  # fmt: skip
TEAM = manifest("Team", "kids", moderationPolicyRef={"name": "kids"})


@pytest.fixture(scope="module")
def folder(shapes: ModelFile) -> pathlib.Path:
    return shapes.folder


@pytest.fixture(scope="module")
def running(service: Any, folder: pathlib.Path, shapes: ModelFile) -> Iterator[Any]:
    """The shared service, whose model names the policy `house` while these tests run."""
    documents = {"another": ANOTHER, "house": house(1), "kids": KIDS, "team": TEAM}
    for name, document in documents.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
    shapes.write(moderationPolicyRef={"name": "house"})
    with service.http() as client:
        service.wait_for(
            lambda: policies_of(drawn(client, "a red circle")) == {"house@1"}, "the policy is used"
        )
        yield service
        shapes.clear()
        service.wait_for(
            lambda: "house@2" not in policies_of(drawn(client, "a red circle")), "it is gone"
        )


@pytest.fixture(scope="module")
def kids(running: Any) -> Iterator[httpx.Client]:
    """The API as the team with a policy of its own."""
    made = subprocess.run(
        [sys.executable, "-m", "calotype.serving", "keys", "create", "--team", "kids",
         "--data-dir", str(running.data_dir)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (key,) = [word for word in made.stdout.split() if word.startswith("ct_live_")]
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=240) as client:
        yield client


def drawn(client: httpx.Client, prompt: str, **more: Any) -> dict[str, Any]:
    """The job of a prompt, over."""
    answer = client.post(
        "/v1/jobs",
        json={"input": {"prompt": prompt, **SMALL, **more}},
        headers={"prefer": "wait=60"},
    )
    assert answer.status_code in (200, 202), answer.text
    job: dict[str, Any] = answer.json()
    while job["status"] in ("queued", "running"):
        job = looked_at(client, job)
    return job


def looked_at(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job as it is a moment later: a team may not ask without end."""
    time.sleep(0.05)
    answer = client.get(f"/v1/jobs/{job['id']}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def policies_of(job: dict[str, Any]) -> set[str]:
    """Every policy that a decision of a job names."""
    return {decision["policy"] for stage in job["moderation"].values() for decision in stage} | (
        {job["error"]["moderation"]["policy"]} if job["error"] else set()
    )


def test_a_team_is_checked_by_the_strictest_of_its_policy_and_the_models(
    running: Any, kids: httpx.Client
) -> None:
    prompt = "captain calotype on a blue background"
    with running.http() as anybody:
        job = drawn(anybody, prompt)
    assert job["status"] == "succeeded" and policies_of(job) == {"house@1"}
    refused = drawn(kids, prompt)
    assert refused["status"] == "failed"
    assert refused["error"]["code"] == "moderation_blocked"
    assert policies_of(refused) == {"kids@1"}
    assert policies_of(drawn(kids, "a red circle")) == {"kids@1"}
    checked = kids.post("/v1/moderations", json={"input": prompt}).json()["results"][0]
    assert checked["flagged"]


def test_a_level_is_checked_by_and_what_is_not_granted_is_said(running: Any) -> None:
    prompt = "a red circle"
    with running.http() as client:
        strict = drawn(client, prompt, safety_tolerance=1)
        low = drawn(client, prompt, moderation="low")
        body = client.post(
            "/v1/images/generations", json={"prompt": prompt, "steps": 4, "safety_tolerance": 6}
        ).json()
    assert strict["error"]["code"] == "moderation_blocked"
    assert low["status"] == "succeeded" and low["input"]["moderation"] == "low"
    assert "safety_tolerance 6 is not granted by the policy house@1" in body["warnings"][0]


def test_two_versions_under_load(running: Any, kids: httpx.Client, folder: pathlib.Path) -> None:
    """Every request is answered, by one version; after the switch by the new one."""
    half, jobs = threading.Event(), []

    def one(number: int) -> dict[str, Any]:
        with running.http() as client:
            found = drawn(client, f"a red circle, number {number}", n=1 + number % 2)
        jobs.append(found)
        if len(jobs) >= JOBS // 4:
            half.set()
        return found

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        asked = [pool.submit(one, number) for number in range(JOBS)]
        assert half.wait(600)
        (folder / "house.yaml").write_text(yaml.safe_dump(house(2)))
        answered = [job.result() for job in asked]

    def switched() -> bool:
        with running.http() as client:
            return drawn(client, "a lighthouse")["status"] == "failed"

    running.wait_for(switched, "the new version checks")
    assert policies_of(drawn(kids, "a lighthouse")) == {"kids@1"}
    with running.http() as client:
        after = [drawn(client, f"a blue star, number {number}") for number in range(4)]
    assert {job["status"] for job in [*answered, *after]} == {"succeeded"}
    assert all(len(policies_of(job)) == 1 for job in answered)
    named = [next(iter(policies_of(job))) for job in answered]
    assert set(named) <= {"house@1", "house@2"} and "house@1" in named
    assert [policies_of(job) for job in after] == [{"house@2"}] * 4
    digests: dict[str, set[str]] = {}
    for log in (running.data_dir / "audit").glob("audit-*.jsonl"):
        lines = log.read_text().splitlines()
        decisions = [json.loads(line)["decision"] for line in lines]
        if any(decision["policy"] == "house@1" for decision in decisions):
            assert verify(log) > JOBS
        for decision in decisions:
            digests.setdefault(decision["policy"], set()).add(decision["policy_sha256"])
    assert {name: len(digests[name]) for name in ("house@1", "house@2", "kids@1")} == {
        "house@1": 1, "house@2": 1, "kids@1": 1,
    }  # fmt: skip


def test_a_classifier_that_is_missing_refuses_and_one_on_trial_does_not(
    running: Any, kids: httpx.Client, folder: pathlib.Path
) -> None:
    nowhere = str(folder / "no-such-model")
    checked = {**KIDS["spec"], "version": 2, "judge": {
        "format": "qwen3guard", "model": nowhere, "when": "always"}}  # fmt: skip
    (folder / "kids.yaml").write_text(yaml.safe_dump({**KIDS, "spec": checked}))

    def waits() -> bool:
        """Whether a job is not checked, and waits for that; it is canceled."""
        answer = kids.post("/v1/jobs", json={"input": {"prompt": "a red circle", **SMALL}})
        job = answer.json()
        while job["status"] in ("queued", "running") and not job["waiting_for"]:
            job = looked_at(kids, job)
        kids.post(f"/v1/jobs/{job['id']}/cancel")
        return bool(job["waiting_for"] == "safety_stage")

    running.wait_for(waits, "the judge that is not there is asked")
    with running.http() as client:
        assert drawn(client, "a red circle")["status"] == "succeeded", "of other teams nobody is"
    tried = {**KIDS["spec"], "version": 3, "shadow": [
        {"classifier": "qwen3guard", "model": nowhere, "sample": 1.0}]}  # fmt: skip
    (folder / "kids.yaml").write_text(yaml.safe_dump({**KIDS, "spec": tried}))
    running.wait_for(
        lambda: drawn(kids, "a red circle")["status"] == "succeeded", "it is only on trial"
    )
    shadows = running.data_dir / "audit" / "shadow"
    running.wait_for(lambda: bool(list(shadows.glob("shadow-*.jsonl"))), "the shadow is logged")
    (log,) = shadows.glob("shadow-*.jsonl")
    assert "no model in" in json.loads(log.read_text().splitlines()[0])["error"]


def test_held_pictures_are_released_by_a_person(
    running: Any, kids: httpx.Client, folder: pathlib.Path
) -> None:
    held = {**KIDS["spec"], "version": 4, "categories": {"sexual": {"image": {"review": 0.0}}}}
    (folder / "kids.yaml").write_text(yaml.safe_dump({**KIDS, "spec": held}))
    found: list[dict[str, Any]] = []

    def holds() -> bool:
        found.append(drawn(kids, "a red circle"))
        return str((found[-1]["error"] or {}).get("code")) == "held_for_review"

    running.wait_for(holds, "the pictures wait for a person")
    (told,) = found[-1]["moderation"]["held"]
    assert kids.get(f"/v1/assets/{told['asset_id']}").status_code == 404
    with running.http() as reviewer:
        case = reviewer.post("/v1/moderation/cases/take").json()
        assert case["asset_id"] == told["asset_id"]
        image = reviewer.get(f"/v1/moderation/cases/{case['id']}/picture")
        assert image.content.startswith(b"\x89PNG")
        done = reviewer.post(
            f"/v1/moderation/cases/{case['id']}/decide", json={"verdict": "approved"}
        )
        assert done.json()["status"] == "approved", done.text
    (now,) = kids.get(f"/v1/jobs/{found[-1]['id']}").json()["moderation"]["held"]
    assert now["status"] == "released"
    assert kids.get(now["url"].removeprefix(running.url)).content.startswith(b"\x89PNG")
