"""What clients, reviewers and administrators do in one run; it follows from the seed."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from simulation.client import Answer, Client, Lost
from simulation.parts.receiver import URL
from simulation.parts.services import BLOCKED_WITH_REFERENCES, BLURRED, REFUSED, REVIEW
from simulation.world import World

from calotype.serving.api.routes import assets, batches, cases, files, images, jobs, takedowns
from calotype.serving.jobs.records import KeyRecord


def _data_url() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


PNG = _data_url()
PROMPTS = ("a lamp", "a lamp", "a boat", REVIEW, REFUSED, BLURRED, BLOCKED_WITH_REFERENCES)
OVER = ("succeeded", "failed", "canceled")
PATIENCE = 900.0
"""Seconds after which a client stops asking for its job."""


@dataclass
class Wish:
    """One picture that somebody wants, however often it must be asked for."""

    number: int
    prompt: str
    seed: int
    references: bool = False
    kind: str = "job"
    """``job``, ``wait`` (a synchronous request), ``stream`` or ``line`` (of a batch)."""
    cancel_at: float | None = None
    hangup_at: float | None = None
    delete: bool = False
    accepted: set[str] = field(default_factory=set)
    """Jobs that the service said it took."""
    seen: list[tuple[str, str]] = field(default_factory=list)
    """Job and terminal state, as it was told."""
    refused: list[str] = field(default_factory=list)
    """Answers by which the service would not take it."""

    @property
    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "model": "shapes",
            "prompt": self.prompt,
            "size": "64x64",
            "steps": 3,
            "seed": self.seed,
            "metadata": {"wish": str(self.number)},
        }
        if self.references:
            found["reference_images"] = [PNG]
        if self.kind == "stream":
            found |= {"stream": True, "partial_images": 1}
        return found

    @property
    def headers(self) -> dict[str, str]:
        return {"idempotency-key": f"wish-{self.number}"}


@dataclass
class Taken:
    """A picture that was taken down."""

    asset_id: str
    digests: set[str]
    acknowledged: float | None = None
    """When the administrator was told that it is gone."""
    refused: list[str] = field(default_factory=list)
    """Answers that say that it cannot be taken down."""


class Scenario:
    """Args:
    artist, reviewer: keys of two teams.
    """

    def __init__(
        self, world: World, rng: random.Random, artist: KeyRecord, reviewer: KeyRecord, kind: str
    ) -> None:
        self.world, self.rng, self.kind = world, rng, kind
        self.artist, self.reviewer = Client(world, artist), Client(world, reviewer)
        count = rng.choice((1, 1, 2, 2)) + (kind == "delete")
        self.wishes = [self._wish(number) for number in range(count)]
        self.taken: list[Taken] = []
        self.approved: dict[str, float] = {}
        """Asset -> when a reviewer let it go."""
        self.batch: str | None = None
        self._open = 0
        self.started = False

    @property
    def leaves_garbage(self) -> bool:
        return self.kind in ("takedown", "delete", "batch")

    @property
    def over(self) -> bool:
        """Everybody has what they wanted, or has given up."""
        return not self._open

    def start(self) -> None:
        self.started = True
        for wish in self.wishes:
            delay = self.rng.choice((0.0, 0.0, 1.0, 4.0)) * self.rng.random()
            if self.kind == "delete" and wish.number:
                delay = 6 + 25 * self.rng.random()  # the same picture, after the first one is gone
            if wish.kind != "line":
                self._begin(self._pursue(wish, delay))
        if self.kind == "batch":
            self._begin(self._pursue_batch())
        if self.kind == "review":
            self._begin(self._review())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._open += 1

        async def run() -> None:
            try:
                await work
            finally:
                self._open -= 1

        self.world.loop.create_task(run())

    def _wish(self, number: int) -> Wish:
        rng, kind = self.rng, self.kind
        wish = Wish(number, rng.choice(PROMPTS[:3]), rng.choice((1, 1, 2)))
        wish.kind = rng.choice(("job", "job", "wait", "stream"))
        if kind == "references":
            wish.references = rng.random() < 0.8
            wish.prompt = rng.choice(("a lamp", BLOCKED_WITH_REFERENCES))
            wish.kind = "stream"
        elif kind == "review":
            wish.prompt = rng.choice((REVIEW, REVIEW, "a lamp", BLURRED, REFUSED))
        elif kind == "batch":
            wish.kind = "line"
        elif kind == "takedown":
            wish.kind = rng.choice(("job", "wait", "stream"))
        if kind == "plain":
            if rng.random() < 0.3:
                wish.cancel_at = 10 * rng.random()
            if rng.random() < 0.2:
                wish.hangup_at = 8 * rng.random()
        if kind == "delete":
            wish.prompt, wish.seed, wish.delete = "a lamp", 1, number == 0
        return wish

    # -- drawing -------------------------------------------------------------------------------

    async def _pursue(self, wish: Wish, delay: float) -> None:
        await asyncio.sleep(delay)
        if wish.kind == "job":
            job = await self._as_job(wish)
        else:
            job = await self._waiting(wish)
        if job is None or job["status"] != "succeeded":
            return
        await self._look_at(job)
        asset_ids = [image["asset_id"] for image in job["output"]["images"]]
        if wish.delete and asset_ids:
            self.world.faults.arm("gateway")
            await self._insist(assets.delete_asset, "/v1/assets/x", {}, asset_id=asset_ids[0])
            await asyncio.sleep(60 * self.rng.random())
        if self.kind == "takedown" and asset_ids and not self.taken:
            await asyncio.sleep(6 * self.rng.random())
            await self._take_down(asset_ids[0], job)

    async def _as_job(self, wish: Wish) -> dict[str, Any] | None:
        body = {"type": "image.generate", "input": wish.body}
        if wish.number % 2:
            body["webhook"] = {"url": URL}
        found = await self._insist(jobs.create_job, "/v1/jobs", body, headers=wish.headers)
        if found is None or found.status >= 300:
            wish.refused.append("nothing" if found is None else found.body.decode())
            return None
        job_id = found.json["id"]
        wish.accepted.add(job_id)
        if wish.cancel_at is not None:
            await asyncio.sleep(wish.cancel_at)
            self.world.faults.arm()
            await self._insist(jobs.cancel_job, f"/v1/jobs/{job_id}/cancel", {}, job_id=job_id)
        return await self._ended(wish, job_id)

    async def _ended(self, wish: Wish, job_id: str) -> dict[str, Any] | None:
        """The job when it is over."""
        end, pause = self.world.loop.time() + PATIENCE, 5.0
        while self.world.loop.time() < end:
            found = await self._try(jobs.get_job, f"/v1/jobs/{job_id}", job_id=job_id)
            if found is not None and found.status == 200 and found.json["status"] in OVER:
                wish.seen.append((job_id, found.json["status"]))
                return found.json
            await asyncio.sleep(pause)
            pause = min(20.0, pause * 1.5)
        return None

    async def _waiting(self, wish: Wish) -> dict[str, Any] | None:
        """A synchronous request, sent again under its key as SDKs do."""
        end = self.world.loop.time() + PATIENCE
        hangup = wish.hangup_at
        while self.world.loop.time() < end:
            found = await self._try(
                images.generate,
                "/v1/images/generations",
                wish.body,
                headers=wish.headers,
                hangup=hangup,
            )
            if found is not None and not found.again:
                break
            if hangup is not None and self.rng.random() < 0.5:
                return None
            hangup = None
            await asyncio.sleep(2.0)
        rows = self.world.database.rows("SELECT id, metadata, status FROM jobs ORDER BY created")
        mine = [
            row["id"] for row in rows if json.loads(row["metadata"]).get("wish") == str(wish.number)
        ]
        if found is None or found.status != 200 or not mine:
            if not mine:
                wish.refused.append("nothing" if found is None else found.body.decode())
            return None
        wish.accepted.add(mine[-1])
        return await self._ended(wish, mine[-1])

    async def _look_at(self, job: dict[str, Any]) -> None:
        for image in job["output"]["images"]:
            url = str(image["url"])
            path, _, query = url.partition("?")
            signed = dict(part.split("=") for part in query.split("&"))
            asset_id = path.split("/")[-2]
            await self._try(assets.get_content, path, keyed=False, asset_id=asset_id, **signed)

    # -- batches -------------------------------------------------------------------------------

    async def _pursue_batch(self) -> None:
        lines = []
        for wish in self.wishes:
            line = {"custom_id": str(wish.number), "method": "POST", "body": wish.body}
            lines.append(json.dumps(line | {"url": "/v1/images/generations"}))
        file_id = self.world.store_file("\n".join(lines).encode(), self.artist.key.team_id)
        body = {
            "input_file_id": file_id,
            "endpoint": "/v1/images/generations",
            "completion_window": "24h",
        }
        found = None
        while found is None or found.again:
            found = await self._try(batches.create_batch, "/v1/batches", body)
            await asyncio.sleep(1.0)
        self.batch = batch_id = found.json["id"]
        end = self.world.loop.time() + PATIENCE
        while self.world.loop.time() < end:
            found = await self._try(batches.get_batch, f"/v1/batches/{batch_id}", batch_id=batch_id)
            if found is not None and found.status == 200 and found.json["output_file_id"]:
                await self._read_file(found.json["output_file_id"])
                if self.rng.random() < 0.5:
                    await self._take_down_first(found.json["output_file_id"])
                return
            if found is not None and found.status == 200 and found.json["status"] == "completed":
                return
            await asyncio.sleep(6.0)

    async def _read_file(self, file_id: str) -> Answer | None:
        path = f"/v1/files/{file_id}/content"
        return await self._try(files.get_file_content, path, file_id=file_id)

    async def _take_down_first(self, file_id: str) -> None:
        rows = self.world.database.rows("SELECT id, job_id FROM assets ORDER BY id")
        if rows:
            await self._take_down(rows[0]["id"], None)
            await self._read_file(file_id)

    # -- people --------------------------------------------------------------------------------

    async def _take_down(self, asset_id: str, job: dict[str, Any] | None) -> None:
        rows = self.world.database.rows("SELECT blob_key FROM assets WHERE id = ?", asset_id)
        if not rows:
            return
        previews = "SELECT previews.blob_key FROM previews JOIN assets USING (job_id) WHERE id = ?"
        keys = [row["blob_key"] for row in (*rows, *self.world.database.rows(previews, asset_id))]
        digests = set().union(*(self.world.digests_of(key) for key in keys))
        taken = Taken(asset_id, digests)
        self.taken.append(taken)
        body = {"asset_id": asset_id, "category": "violence", "reason": "It must not exist."}
        self.world.faults.arm("gateway")
        for _ in range(self.rng.choice((1, 1, 12))):
            try:
                found = await self.reviewer.call(
                    takedowns.take_down, "/v1/moderation/takedowns", body
                )
            except Lost:
                found = None
            if found is not None and found.status == 200 and found.json["id"]:
                taken.acknowledged = self.world.loop.time()
                break
            if found is not None and found.status == 404:
                break  # done by an attempt whose answer was lost, or deleted meanwhile
            if found is not None and found.status != 200 and not found.again:
                taken.refused.append(found.body.decode())
            await asyncio.sleep(3.0)
        if job is not None:
            await self._look_at(job)
            path = f"/v1/jobs/{job['id']}/events"
            await self._try(jobs.stream_events, path, job_id=job["id"])

    async def _review(self) -> None:
        """Decides on whatever is held, until nothing comes any more."""
        end = self.world.loop.time() + 300
        while self.world.loop.time() < end:
            await asyncio.sleep(self.rng.choice((3.0, 8.0, 20.0)))
            found = await self._as_reviewer(cases.take_case, "/v1/moderation/cases/take", {})
            if found is None or found.status != 200:
                if self._open <= 1:
                    return
                continue
            case = found.json
            verdict = self.rng.choice(("approved", "approved", "rejected"))
            if verdict == "approved":
                self.approved.setdefault(case["asset_id"], self.world.loop.time())
            self.world.faults.arm("gateway")
            await self._as_reviewer(
                cases.decide_case,
                f"/v1/moderation/cases/{case['id']}/decide",
                {"verdict": verdict, "note": ""},
                case_id=case["id"],
            )

    async def _as_reviewer(self, *arguments: Any, **more: str) -> Answer | None:
        try:
            return await self.reviewer.call(*arguments, **more)
        except Lost:
            return None

    # -- inside --------------------------------------------------------------------------------

    async def _try(self, *arguments: Any, **more: Any) -> Answer | None:
        try:
            return await self.artist.call(*arguments, **more)
        except Lost:
            return None

    async def _insist(self, *arguments: Any, **more: Any) -> Answer | None:
        """Until there is an answer that is worth believing."""
        end = self.world.loop.time() + PATIENCE
        found = None
        while self.world.loop.time() < end:
            found = await self._try(*arguments, **more)
            if found is not None and not found.again:
                return found
            await asyncio.sleep(2.0)
        return found
