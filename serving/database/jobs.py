"""The durable record of every job: transitions are compare-and-set, one terminal state each.

Synchronous and thread-safe: asynchronous callers use ``asyncio.to_thread``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Select, Update, bindparam, func, select, update
from sqlalchemy.exc import IntegrityError

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.database.accounts.queue_shares import QueueBound, check_queue
from calotype.serving.database.accounts.quotas import RateState, reserve, settle
from calotype.serving.database.accounts.usage import record_usage, used_seconds
from calotype.serving.database.blob_refs import add_ref, discard
from calotype.serving.database.connection import flush, reading, writing
from calotype.serving.database.intermediates import clear_intermediates
from calotype.serving.database.repository import ColumnValues, Repository, column_values
from calotype.serving.database.review.cases import add_refusals
from calotype.serving.database.review.held_images import add_held, held_reasons
from calotype.serving.database.review.picture_places import (
    is_forbidden,
    note_previews,
    note_sources,
)
from calotype.serving.database.review.takedown_order import check_order
from calotype.serving.database.schema.tables import assets, jobs
from calotype.serving.database.training.adapter_origins import is_quarantined, note_draws
from calotype.serving.database.webhooks import announce
from calotype.serving.jobs.endings import Ending, rights_revoked_ending, source_gone_ending
from calotype.serving.jobs.lease import LeaseProgress
from calotype.serving.jobs.lifecycle import Status, sources
from calotype.serving.jobs.moderation_record import ModerationRecord
from calotype.serving.jobs.outage import Outage
from calotype.serving.jobs.records import JobRecord, NewJob

# Built once: SQLAlchemy takes longer to put a statement together than SQLite to run it.
_BY_ID = select(jobs).where(jobs.c.id == bindparam("job"))
_OF_TEAM = _BY_ID.where(jobs.c.team_id == bindparam("team"))
_IDEMPOTENT = select(jobs).where(jobs.c.idempotency == bindparam("found"))
_OPEN = select(jobs).where(jobs.c.status == bindparam("state"))
_EXPIRED = select(jobs).where(
    jobs.c.status == "running", jobs.c.lease_expires <= bindparam("moment")
)
_CHANGE = update(jobs).where(jobs.c.id == bindparam("job"))
_RENEW = _CHANGE.where(
    jobs.c.status == "running",
    jobs.c.fence == bindparam("lease"),
    jobs.c.lease_replica == bindparam("replica"),
)
_INSERT, _INSERT_ASSET = jobs.insert(), assets.insert()


class Jobs(Repository):
    """Jobs and their transitions."""

    # -- making and finding jobs -------------------------------------------------------------

    def create_job(self, new: NewJob) -> JobRecord:
        """`admit_job` for who does not care about rate limits."""
        return self.admit_job(new)[0]

    def admit_job(
        self, new: NewJob, bound: QueueBound | None = None
    ) -> tuple[JobRecord, RateState | None]:
        """Inserts a queued job and charges its team, in one transaction that a power cut spares.

        Args:
            bound: of the queue of its model; None = there is none.

        Returns:
            The job (or the one of the same ``idempotency``), and the team's rate limit if it has
            one.

        Raises:
            QuotaExceeded, PermissionDenied: see `quotas.reserve` and `note_draws`; there is no
                job then.
            Overloaded: the queue is full, and the team has its share of it; likewise.
        """
        now = self.clock.time()
        values: ColumnValues = column_values(new) | {
            "status": "queued",
            "fence": 0,
            "attempts": 0,
            "step": 0,
            "steps": int(new.request.get("steps", 0)),
            "created": now,
        }
        try:
            with writing(self.engine, durable=True) as connection:
                rate, day = reserve(connection, new, now)
                if bound is not None:
                    check_queue(connection, new, bound)
                connection.execute(_INSERT, values | {"reserved_day": day})
                note_sources(connection, new)
                note_draws(connection, new)
                return _one(connection, new.id), rate
        except IntegrityError as error:
            first = self.find_idempotent(new.idempotency) if new.idempotency else None
            if first is None:
                raise InvalidRequest(f"The job cannot be recorded: {error.orig}.") from error
            flush(self.engine)  # who made it may not have come so far yet
            return first, None

    def get_job(self, job_id: str, team_id: str | None = None) -> JobRecord | None:
        """The job, or None when there is none or it is another team's."""
        return self._first(_BY_ID if team_id is None else _OF_TEAM, job=job_id, team=team_id)

    def find_idempotent(self, idempotency: str) -> JobRecord | None:
        return self._first(_IDEMPOTENT, found=idempotency)

    def forget_idempotency(self, job_id: str) -> None:
        """Frees the key of a job whose 24 hours are over."""
        with writing(self.engine) as connection:
            connection.execute(_CHANGE, {"job": job_id, "idempotency": None})

    def find_same_body(
        self, api_key_id: str, body_sha256: str, created_after: float
    ) -> JobRecord | None:
        """The newest job that one key made with one body: what an SDK's retry attaches to."""
        return self._first(
            select(jobs)
            .where(
                jobs.c.api_key_id == api_key_id,
                jobs.c.body_sha256 == body_sha256,
                jobs.c.created >= created_after,
            )
            .order_by(jobs.c.created.desc())
            .limit(1)
        )

    def list_jobs(
        self,
        team_id: str,
        *,
        limit: int = 20,
        after: str | None = None,
        status: Status | None = None,
        created_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[JobRecord]:
        """Newest first, without expired ones; ``after`` is the last id of the page before."""
        query = select(jobs).where(jobs.c.team_id == team_id, jobs.c.purged.is_(None))
        for name, value in (metadata or {}).items():
            query = query.where(jobs.c.metadata[name].as_string() == value)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if created_after is not None:
            query = query.where(jobs.c.created > created_after)
        rows = self.page(query, jobs, team_id, "job", limit=limit, after=after)
        return [JobRecord(**row) for row in rows]

    def open_jobs(self, model: str | None, status: Status) -> list[JobRecord]:
        """Every job of one state, oldest first: what a starting dispatcher reads."""
        return self._all(_open_jobs(model is not None), state=status, of_model=model)

    def expired_leases(self, model: str | None, now: float) -> list[JobRecord]:
        """Running jobs whose lease is over, as far as the database was told."""
        return self._all(_expired_leases(model is not None), moment=now, of_model=model)

    def queued_job_ids(self, model: str | None, made_after: float | None = None) -> list[str]:
        """Oldest first."""
        query = _queued_ids(model is not None, made_after is not None)
        with reading(self.engine) as connection:
            found = connection.execute(query, {"of_model": model, "since": made_after})
            return list(found.scalars())

    def count_jobs(self) -> dict[tuple[str, str], int]:
        """(model, status) -> how many."""
        query = select(jobs.c.model, jobs.c.status, func.count()).group_by(
            jobs.c.status, jobs.c.model
        )
        with reading(self.engine) as connection:
            return {(model, status): n for model, status, n in connection.execute(query)}

    def count_waiting(self) -> dict[tuple[str, str], int]:
        """(model, part that is away) -> how many queued jobs wait for it."""
        part = jobs.c.outage["part"].as_string()
        query = select(jobs.c.model, part, func.count()).group_by(jobs.c.model, part)
        query = query.where(jobs.c.status == "queued", part.is_not(None))
        with reading(self.engine) as connection:
            return {(model, found): n for model, found, n in connection.execute(query)}

    # -- transitions ---------------------------------------------------------------------------

    def start_job(self, job_id: str, replica: str, lease_expires: float) -> JobRecord | None:
        """queued -> running under a new fence; None when the job is not queued any more."""
        now = self.clock.time()
        values = {
            "now": now,
            "step": 0,
            "lease_replica": replica,
            "lease_expires": lease_expires,
        }
        with writing(self.engine) as connection:
            if not _moved(connection, _start(), job_id, "running", None, values):
                return None
            job = _one(connection, job_id)
            if job.fence == 1:
                announce(connection, job, now)
            return job

    def requeue_job(
        self,
        job_id: str,
        fence: int,
        count_attempt: bool = True,
        outage: Outage | None = None,
    ) -> JobRecord | None:
        """running -> queued; None when ``fence`` is not the current lease's.

        Args:
            outage: what it waits for now.
        """
        values: ColumnValues = {"step": 0, "lease_replica": None, "lease_expires": None}
        if outage is not None:
            values["outage"] = outage.to_payload()
        with writing(self.engine) as connection:
            statement = _requeue(count_attempt)
            if not _moved(connection, statement, job_id, "queued", fence, values):
                return None
            return _one(connection, job_id)

    def postpone_job(self, job_id: str, outage: Outage) -> None:
        """Notes what a queued job waits for."""
        with writing(self.engine) as connection:
            connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, jobs.c.status == "queued")
                .values(outage=outage.to_payload())
            )

    def renew_leases(
        self, replica: str, progress: Mapping[str, LeaseProgress], lease_expires: float
    ) -> None:
        """Records the progress of jobs, by ID, where the lease is this replica's."""
        with writing(self.engine) as connection:
            for job_id, reached in progress.items():
                measured = {"gpu_seconds": reached.gpu_seconds} if reached.gpu_seconds else {}
                lease = {"job": job_id, "lease": reached.fence, "replica": replica}
                values = {
                    "step": reached.step,
                    "steps": reached.steps,
                    "lease_expires": lease_expires,
                }
                connection.execute(_RENEW, lease | values | measured)

    def record_moderation(self, job_id: str, moderation: ModerationRecord) -> None:
        with writing(self.engine) as connection:
            values = {"job": job_id, "moderation": moderation.to_payload()}
            connection.execute(_CHANGE, values)

    def finish_job(self, job_id: str, ending: Ending) -> JobRecord | None:
        """Ends the job in one durable transaction; None when it was over before.

        With it: its assets, images that wait for a reviewer, its team's quota and usage, and the
        webhooks that tell of it. Where the ending has a fence, only the holder of that lease may
        end the job.

        Raises:
            Conflict: something was taken down since its images were checked
                (`CHECKED_TOO_EARLY`); nothing is written.
        """
        now = self.clock.time()
        values: ColumnValues = {"completed": now, "lease_replica": None, "lease_expires": None}
        with writing(self.engine, durable=True) as connection:
            drawn = ending.output is not None or ending.held
            if drawn and ending.newest_takedown is not None:
                check_order(connection, ending.newest_takedown)
            if drawn and is_forbidden(connection, job_id):
                left = [row.blob_key for row in ending.stored]
                discard(connection, [*left, *(row.blob_key for row in ending.held)])
                ending = replace(source_gone_ending(), fence=ending.fence, metrics=ending.metrics)
            elif drawn and is_quarantined(connection, job_id):
                left = [row.blob_key for row in ending.stored]
                discard(connection, [*left, *(row.blob_key for row in ending.held)])
                gone = rights_revoked_ending()
                ending = replace(gone, fence=ending.fence, metrics=ending.metrics)
            values |= ending.columns()
            status, fence = ending.status, ending.fence
            statement = _transition(status, fence is not None)
            if not _moved(connection, statement, job_id, status, fence, values):
                return None
            for asset in ending.stored:
                connection.execute(_INSERT_ASSET, column_values(asset))
            add_ref(connection, [asset.blob_key for asset in ending.stored])
            add_held(connection, ending.held, held_reasons(ending.moderation), now)
            job = _one(connection, job_id)
            add_refusals(connection, job.team_id, job_id, ending, now)
            settle(connection, job, used_seconds(job))
            record_usage(connection, job)
            clear_intermediates(connection, job_id, now, ending.shown_as_drawn)
            if ending.output is not None:
                note_previews(connection, job_id, ending.output.images)
            announce(connection, job, now)
            return job

    # -- inside --------------------------------------------------------------------------------

    def _first(self, query: Select[Any], **values: object) -> JobRecord | None:
        with reading(self.engine) as connection:
            row = connection.execute(query, values).mappings().first()
        return None if row is None else JobRecord(**row)

    def _all(self, query: Select[Any], **values: object) -> list[JobRecord]:
        with reading(self.engine) as connection:
            return [JobRecord(**row) for row in connection.execute(query, values).mappings()]


def _one(connection: Connection, job_id: str) -> JobRecord:
    return JobRecord(**connection.execute(_BY_ID, {"job": job_id}).mappings().one())


def _moved(
    connection: Connection,
    statement: Update,
    job_id: str,
    status: Status,
    fence: int | None,
    values: ColumnValues,
) -> bool:
    """Runs a compare-and-set; whether the job was in a state from which it leads on."""
    named = {"job": job_id, "status": status, "lease": fence}
    return connection.execute(statement, named | values).rowcount == 1


@functools.cache
def _transition(status: Status, fenced: bool) -> Update:
    statement = _CHANGE.where(jobs.c.status.in_(sorted(sources(status))))
    if fenced:
        statement = statement.where(jobs.c.status == "running", jobs.c.fence == bindparam("lease"))
    return statement


@functools.cache
def _start() -> Update:
    started = func.coalesce(jobs.c.started, bindparam("now", type_=jobs.c.started.type))
    statement = _transition("running", False)
    return statement.values(fence=jobs.c.fence + 1, attempts=jobs.c.attempts + 1, started=started)


@functools.cache
def _requeue(count_attempt: bool) -> Update:
    statement = _transition("queued", True).values(fence=jobs.c.fence + 1)
    return statement if count_attempt else statement.values(attempts=jobs.c.attempts - 1)


@functools.cache
def _open_jobs(of_model: bool) -> Select[Any]:
    return _of_model(_OPEN, of_model).order_by(jobs.c.created, jobs.c.id)


@functools.cache
def _expired_leases(of_model: bool) -> Select[Any]:
    return _of_model(_EXPIRED, of_model)


@functools.cache
def _queued_ids(of_model: bool, since: bool) -> Select[Any]:
    query = _of_model(select(jobs.c.id).where(jobs.c.status == "queued"), of_model)
    if since:
        query = query.where(jobs.c.created >= bindparam("since"))
    return query.order_by(jobs.c.created, jobs.c.id)


def _of_model(query: Select[Any], wanted: bool) -> Select[Any]:
    return query.where(jobs.c.model == bindparam("of_model")) if wanted else query
