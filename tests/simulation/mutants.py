"""Bugs that are planted to see whether the simulation finds them.

Each replaces a piece of production code by the mistake that its name says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from calotype.serving.api.generation import creation
from calotype.serving.core.errors import StorageFailed
from calotype.serving.database import jobs as database_jobs
from calotype.serving.database.connection import writing
from calotype.serving.database.jobs import Jobs
from calotype.serving.dispatch import dispatcher
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.outcomes import Outcomes
from calotype.serving.jobs.endings import Ending
from calotype.serving.worker import intermediates, postprocess
from calotype.serving.worker.drawn_images import Fate
from calotype.serving.worker.output_check import Sources

Bug = Iterator[tuple[Any, str, Any]]
"""What is replaced: an object, the name of its attribute, and the attribute with the mistake."""
MUTANTS: dict[str, Callable[[], Bug]] = {}


def mutant(function: Callable[[], Bug]) -> Callable[[], Bug]:
    MUTANTS[function.__name__] = function
    return function


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug is there while the context lasts."""
    with contextlib.ExitStack() as stack:
        for target, attribute, value in MUTANTS[name]():
            stack.enter_context(mock.patch.object(target, attribute, value))
        yield


@mutant
def text_encoder_outage_fails_the_job() -> Bug:
    yield dispatcher, "part_at_fault", lambda error: None


@mutant
def poison_is_counted_on_an_outage() -> Bug:
    requeue = Jobs.requeue_job

    def counted(self: Jobs, job_id: str, fence: int, count: bool = True, *rest: Any) -> Any:
        return requeue(self, job_id, fence, True, *rest)

    yield Jobs, "requeue_job", counted


@mutant
def a_loop_dies_at_its_first_fault() -> Bug:
    async def once(self: Any, *arguments: Any) -> None:
        while True:
            await self._sleep(await self._work())

    from calotype.serving.observability.loops import Loop

    yield Loop, "run", once


@mutant
def a_lease_is_not_fenced() -> Bug:
    end = Outcomes.end

    async def unfenced(self: Outcomes, job_id: str, ending: Ending) -> bool:
        return await end(self, job_id, dataclasses.replace(ending, fence=None))

    yield Outcomes, "end", unfenced


@mutant
def a_cancelled_job_is_not_charged() -> Bug:
    used = database_jobs.used_seconds

    def free(job: Any) -> float:
        return 0.0 if job.status == "canceled" else used(job)

    from calotype.serving.database.accounts import usage

    yield usage, "used_seconds", free
    yield database_jobs, "used_seconds", free


@mutant
def usage_is_recorded_in_another_transaction() -> Bug:
    yield from _after_finish("record_usage", database_jobs.record_usage)


@mutant
def webhooks_are_announced_in_another_transaction() -> Bug:
    announce = database_jobs.announce
    yield from _after_finish(
        "announce", lambda connection, job: announce(connection, job, job.completed)
    )


def _after_finish(name: str, write: Callable[[Any, Any], None]) -> Bug:
    finish, real = Jobs.finish_job, getattr(database_jobs, name)

    def later(self: Jobs, job_id: str, ending: Ending) -> Any:
        setattr(database_jobs, name, lambda *arguments: None)
        try:
            job = finish(self, job_id, ending)
        finally:
            setattr(database_jobs, name, real)
        if job is not None:
            with writing(self.engine) as connection:
                write(connection, job)
        return job

    yield Jobs, "finish_job", later


@mutant
def previews_are_checked_without_references() -> Bug:
    check = intermediates.check_output

    async def alone(safety: Any, lease: Any, pixels: Any, sources: Sources, retries: Any) -> Any:
        return await check(safety, lease, pixels, Sources(sources.files, ()), retries)

    yield intermediates, "check_output", alone


@mutant
def previews_are_shown_when_nobody_can_check() -> Bug:
    check = intermediates.check_output

    async def open_to_all(*arguments: Any) -> Any:
        try:
            return await check(*arguments)
        except Exception:
            lease = arguments[1]
            return _allowed(lease)

    def _allowed(lease: Any) -> Any:
        from calotype.serving.core.decision import Decision

        version = lease.prompt_policy
        return Decision("ALLOW", False, False, False, policy_sha256=version.sha256)

    yield intermediates, "check_output", open_to_all


@mutant
def a_held_picture_is_shown_before_its_release() -> Bug:
    fate = postprocess.fate_of

    def shown(*arguments: Any, **more: Any) -> Fate:
        found = fate(*arguments, **more)
        return Fate.SHOW if found is Fate.HOLD else found

    yield postprocess, "fate_of", shown


@mutant
def an_idempotency_key_is_forgotten_at_a_restart() -> Bug:
    scoped = creation._idempotency

    def forgotten(request: Any, key: Any) -> str | None:
        found = scoped(request, key)
        return found and f"{found[:40]}{id(request.app.state.gateway)}"

    yield creation, "_idempotency", forgotten


@mutant
def a_restarted_dispatcher_forgets_what_runs() -> Bug:
    async def start(self: Dispatcher) -> None:
        for job in await self._call(self._database.jobs.open_jobs, self._model, "queued"):
            await self._admission.admit(job)

    async def find(self: Dispatcher, now: float) -> None:
        """Nothing is found."""

    yield Dispatcher, "_take_over", start
    yield Dispatcher, "_find_unleased", find


@mutant
def a_takedown_stops_in_the_middle() -> Bug:
    from calotype.serving.database.review import takedowns

    def first_the_record(self: Any, order: Any, actor: str) -> Any:
        nothing = dataclasses.replace(order, asset_ids=(), sha256s=())
        with writing(self.engine) as connection:
            record = self.take_down_in(connection, nothing, actor)[0]
        try:
            with writing(self.engine) as connection:
                found = (order.asset_ids, order.sha256s, self.clock.time())
                return record, takedowns.remove_pictures(connection, *found)
        except StorageFailed:
            return record, takedowns.Removal()  # nobody comes back to it

    yield takedowns.Takedowns, "take_down", first_the_record


@mutant
def the_sweeper_deletes_what_is_about_to_be_named() -> Bug:
    def by_content(team_id: str, data: bytes, suffix: str) -> str:
        digest = hashlib.sha256(data).hexdigest()
        return f"{team_id}/{digest[:2]}/{digest}.{suffix}"

    yield postprocess, "new_key", by_content
    yield intermediates, "new_key", by_content
