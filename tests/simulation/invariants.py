"""What must hold at the end of every run, whatever went wrong in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from simulation.parts.services import BLOCKED_WITH_REFERENCES, REFUSED, REVIEW
from simulation.scenario import OVER, Scenario
from simulation.world import REQUEST_SECONDS, STEP_SECONDS, World

from calotype.serving.core.errors import (
    ContentBlocked,
    DeadlineExceeded,
    error_from_payload,
)

_ROUNDING = 0.001
_HARMLESS = ("away", "silent", "jumps")
"""Faults that never cost a worker its life or its lease."""


def broken_promises(world: World, scenario: Scenario) -> list[str]:
    """One sentence for each."""
    jobs = {row["id"]: dict(row) for row in world.database.rows("SELECT * FROM jobs")}
    changes = [dict(row) for row in world.database.rows("SELECT * FROM simulated_changes")]
    return [
        *_endings(world, scenario, jobs, changes),
        *_failures(world, scenario, jobs),
        *_attempts(world, jobs, changes),
        *_fences(world, jobs, changes),
        *_pictures(world, jobs),
        *_charges(world, jobs, changes),
        *_webhooks(world, jobs),
        *_checked(world, scenario),
        *_taken_down(world, scenario),
        *_bugs(world),
    ]


def _endings(
    world: World, scenario: Scenario, jobs: dict[str, Any], changes: list[Any]
) -> Iterator[str]:
    """Every accepted job reaches one terminal state; none is lost, none doubled."""
    for job_id, job in jobs.items():
        if job["status"] not in OVER:
            yield f"{job_id} is still {job['status']}"
        ends = [c for c in changes if c["job_id"] == job_id and c["after"] in OVER]
        ends = [c for c in ends if c["before"] != "preview" and c["before"] != "checkpoint"]
        if len(ends) > 1:
            yield f"{job_id} ended {len(ends)} times"
    for change in changes:
        if change["before"] in OVER or change["before"] == "over":
            yield f"{change['job_id']} changed after it was {change['before']}"
    by_wish: dict[str, list[Any]] = {}
    for job in jobs.values():
        by_wish.setdefault(json.loads(job["metadata"]).get("wish", ""), []).append(job)
    for wish in scenario.wishes:
        mine = by_wish.get(str(wish.number), [])
        for text in wish.refused:
            yield f"wish {wish.number} was refused: {text}"
        for job_id in wish.accepted - {job["id"] for job in mine}:
            yield f"{job_id} was accepted, and is gone"
        for job_id, status in wish.seen:
            if job_id in jobs and jobs[job_id]["status"] != status:
                yield f"{job_id} was told to be {status}, and is {jobs[job_id]['status']}"
        good = [job for job in mine if not _worth_repeating(job)]
        if len(good) > 1:
            yield f"wish {wish.number} was drawn {len(good)} times"
        if scenario.batch and len(mine) > 1:
            yield f"line {wish.number} made {len(mine)} jobs"


def _worth_repeating(job: Any) -> bool:
    if job["status"] == "canceled":
        return True
    if job["status"] != "failed":
        return False
    return error_from_payload(json.loads(job["error"] or "{}")).retryable


def _failures(world: World, scenario: Scenario, jobs: dict[str, Any]) -> Iterator[str]:
    """A job fails by what was asked, by its deadline, or because it killed its workers.

    Nothing in a plan is away for as long as a job waits for it.
    """
    deadly = [fault for fault in world.faults.plan if not fault.what.endswith(_HARMLESS)]
    for job_id, job in jobs.items():
        if job["status"] != "failed":
            continue
        error = error_from_payload(json.loads(job["error"] or "{}"))
        if isinstance(error, ContentBlocked):
            wished = json.loads(job["request"]).get("prompt", "")
            if wished not in (REVIEW, REFUSED, BLOCKED_WITH_REFERENCES) and not scenario.taken:
                yield f"{job_id} was refused: {error.message}"
        elif isinstance(error, DeadlineExceeded):
            waited = job["completed"] - job["created"]
            if job["completed"] < job["deadline"] - 1 and waited < REQUEST_SECONDS:
                yield f"{job_id} ended {job['deadline'] - job['completed']:.0f} s before its time"
        elif error.details.get("reason") == "worker_died":
            if job["attempts"] < 2 or not deadly:
                yield f"{job_id} was given up as poison after {job['attempts']} attempts"
        else:
            yield f"{job_id} failed: {error.code}: {error.message}"


def _attempts(world: World, jobs: dict[str, Any], changes: list[Any]) -> Iterator[str]:
    """A lease that its generator gave back, because a part was away, counts as no attempt."""
    begun = Counter(
        c["job_id"] for c in changes if (c["before"], c["after"]) == ("queued", "running")
    )
    given_back = Counter(job_id for job_id, _ in set(world.given_back))
    for job_id, job in jobs.items():
        most = begun[job_id] - given_back[job_id]
        if job["attempts"] > most:
            yield f"{job_id} counts {job['attempts']} attempts, and had {most}"


def _fences(world: World, jobs: dict[str, Any], changes: list[Any]) -> Iterator[str]:
    """Whoever lost its lease changes nothing."""
    for job_id, fence in world.completed:
        job = jobs.get(job_id)
        if job is not None and job["fence"] != fence:
            yield f"the result of lease {fence} of {job_id} was taken under {job['fence']}"
    for change in changes:
        if change["before"] in ("preview", "checkpoint"):
            if change["fence"] or change["after"] != "running":
                yield f"a stale lease left a {change['before']} at {change['job_id']}"


def _pictures(world: World, jobs: dict[str, Any]) -> Iterator[str]:
    """A job that succeeded has its pictures, another one has none; what rows name is stored."""
    assets = world.database.rows("SELECT * FROM assets")
    owners = Counter(asset["job_id"] for asset in assets)
    held = Counter(row["job_id"] for row in world.database.rows("SELECT * FROM held_pictures"))
    for job_id, job in jobs.items():
        output = json.loads(job["output"] or "null")
        if job["status"] == "succeeded":
            shown = len(output["images"])
            if owners[job_id] > shown + _released(job):
                yield f"{job_id} has {owners[job_id]} pictures for {shown}"
        elif owners[job_id] > _released(job):
            yield f"{job_id} is {job['status']}, and has {owners[job_id]} pictures"
        if held[job_id] > int(json.loads(job["request"]).get("n", 1)):
            yield f"{job_id} holds {held[job_id]} pictures"
    for table in ("assets", "files", "previews", "checkpoints", "held_pictures"):
        for row in world.database.rows(f"SELECT * FROM {table}"):
            if row["blob_key"] not in world.blobs.blobs:
                yield f"a row of {table} names {row['blob_key']}, which is gone: {dict(row)}"


def _released(job: Any) -> int:
    held = json.loads(job["moderation"] or "{}").get("held") or []
    return sum(1 for entry in held if entry.get("status") == "released")


def _charges(world: World, jobs: dict[str, Any], changes: list[Any]) -> Iterator[str]:
    """Each job that ended is charged once, for what was done and no more."""
    usage = Counter[str]()
    for row in world.database.rows("SELECT * FROM usage_records"):
        job_id, charged = row["job_id"], row["gpu_seconds"]
        usage[job_id] += 1
        worked = world.ledger.worked.get(job_id, 0.0)
        if charged > worked + _ROUNDING:
            yield f"{job_id} was charged {charged} s for {worked} s of work"
        job = jobs.get(job_id)
        if job is None:
            continue
        needed = STEP_SECONDS * int(json.loads(job["request"])["steps"])
        if job["status"] == "succeeded" and abs(charged - needed) > _ROUNDING:
            yield f"{job_id} was charged {charged} s for pictures of {needed} s"
        known = job["gpu_seconds"] if job["status"] != "succeeded" else 0.0
        if charged + _ROUNDING < known:
            yield f"{job_id} was charged {charged} s, though {known} s were measured"
        if not world.faults.plan and charged + 6.0 < worked:
            yield f"{job_id} was charged {charged} s for {worked} s of work without any fault"
    for job_id, job in jobs.items():
        if job["status"] in OVER and usage[job_id] != 1:
            yield f"{job_id} is over, and has {usage[job_id]} records of usage"


def _webhooks(world: World, jobs: dict[str, Any]) -> Iterator[str]:
    """One event for each ending and receiver, which arrives."""
    rows = world.database.rows("SELECT * FROM webhook_deliveries")
    arrived = {received.id for received in world.receiver.received}
    counts = Counter((row["job_id"], row["endpoint_id"]) for row in rows)
    for (job_id, endpoint), count in counts.items():
        ended = [
            row["event_type"]
            for row in rows
            if (row["job_id"], row["endpoint_id"]) == (job_id, endpoint)
            and row["event_type"].rpartition(".")[2] in OVER
        ]
        if len(ended) > 1:
            yield f"{job_id} has {count} events for {endpoint}: {ended}"
    for job_id, job in jobs.items():
        if job["status"] not in OVER:
            continue
        wanted = 1 + (json.loads(job["webhook"] or "null") is not None)
        told = [
            r for r in rows if r["job_id"] == job_id and r["event_type"].endswith(job["status"])
        ]
        if len(told) != wanted:
            yield f"{job_id} is {job['status']}: {len(told)} events instead of {wanted}"
        for row in told:
            if row["id"] not in arrived and row["status"] != "pending":
                yield f"the event {row['id']} of {job_id} is {row['status']}, and never arrived"
            if row["status"] == "pending" and row["attempts"] < 3:
                yield f"the event {row['id']} of {job_id} was sent {row['attempts']} times only"
    for received in world.receiver.received:
        job = jobs.get(received.job_id)
        if job is None or (received.status and received.status != job["status"]):
            yield f"the event {received.id} says {received.status} of {received.job_id}"


def _checked(world: World, scenario: Scenario) -> Iterator[str]:
    """Every picture that was ever shown was checked before, with all that it was drawn from."""
    ledger = world.ledger
    for shown in (*scenario.artist.shown, *scenario.reviewer.shown):
        digest = ledger.blurs.get(shown.digest, shown.digest)
        source = ledger.sources.get(digest)
        if source is None:
            yield f"nobody drew the picture {shown.digest} of {shown.where}"
            continue
        verdicts = [
            v for prompt, refs, v in ledger.checked.get(digest, ()) if (prompt, refs) == source
        ]
        fitting = {"ALLOW"} if digest == shown.digest else {"BLUR"}
        if not verdicts:
            yield f"the picture {digest} of {shown.where} was checked without its sources"
        elif not fitting & set(verdicts) and not _approved(world, scenario, shown.digest):
            yield f"the picture {digest} of {shown.where} was shown in spite of {verdicts}"


def _approved(world: World, scenario: Scenario, digest: str) -> bool:
    for row in world.database.rows("SELECT id, blob_key FROM assets"):
        if digest in world.digests_of(row["blob_key"]) and row["id"] in scenario.approved:
            return True
    return False


def _taken_down(world: World, scenario: Scenario) -> Iterator[str]:
    """Nothing is served after its takedown, which is done whole or not at all."""
    for taken in scenario.taken:
        for text in taken.refused:
            yield f"{taken.asset_id} could not be taken down: {text}"
        if taken.acknowledged is not None:
            for shown in scenario.artist.shown:
                if shown.time > taken.acknowledged and shown.digest in taken.digests:
                    yield f"{shown.where} showed a picture that was taken down"
    listed = {row["payload"] for row in world.database.rows("SELECT payload FROM taken_down")}
    for table in ("assets", "files", "held_pictures"):
        for row in world.database.rows(f"SELECT * FROM {table}"):
            if world.digests_of(row["blob_key"]) & listed:
                yield f"a row of {table} still has a picture that was taken down: {dict(row)}"


def _bugs(world: World) -> Iterator[str]:
    """No task of the service died of a bug."""
    for fault in world.loop.faults:
        yield f"nobody caught: {fault.get('message')} {fault.get('exception')!r}"
    for line in world.trace:
        if " ends: " in line:
            yield line.strip()
