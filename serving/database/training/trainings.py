"""Trainings: jobs that take minutes to hours, with a lease, a fence, and what they told.

A worker leases one, beats while it runs, and learns by each beat what the owner wants. Whoever lost
the lease is refused by the fence, whatever it has to say. Every end is written once, with what it
cost, in the ledger of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, and_, case, func, or_, select, update

from calotype.serving.core.errors import CalotypeError, Conflict, NotFound
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.accounts.quotas import day_of
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import ColumnValues, Repository, column_values
from calotype.serving.database.schema.tables import jobs, teams, usage_records
from calotype.serving.database.schema.training_tables import training_events, trainings
from calotype.serving.database.training.training_records import (
    OPEN,
    Order,
    Result,
    StoredEvent,
    TrainingRecord,
    TrainingStatus,
    Wanted,
)

_WORKING = ("queued", "running")
_MEASURED = 5
"""Trainings from which the time of a step is told."""
_KEPT = 64
"""Checkpoints and samples that a row names; the events have them all."""


class LeaseLost(Conflict):
    """Somebody else has the training, or it is over."""


class Trainings(Repository):
    """Trainings, their leases, and their events."""

    def add_training(self, record: TrainingRecord) -> None:
        """Raises Conflict: another team's adapter of the model has this name."""
        theirs = and_(
            trainings.c.model == record.model,
            trainings.c.name == record.name,
            trainings.c.team_id != record.team_id,
        )
        with writing(self.engine, durable=True) as connection:
            if connection.execute(select(trainings.c.id).where(theirs).limit(1)).first():
                raise Conflict(
                    f"The name '{record.name}' is taken: choose another one.",
                    code="name_taken",
                    param="name",
                )
            connection.execute(trainings.insert().values(column_values(record)))
            self._tell(connection, record.id, "queued")

    def get_training(self, training_id: str, team_id: str | None = None) -> TrainingRecord:
        """Raises NotFound when the team has no such training."""
        with reading(self.engine) as connection:
            return _find(connection, training_id, team_id)

    def list_trainings(
        self, team_id: str, *, limit: int, after: str | None = None
    ) -> list[TrainingRecord]:
        """Newest first; ``after`` is the last id of the page before."""
        query = select(trainings).where(trainings.c.team_id == team_id)
        rows = self.page(query, trainings, team_id, "training", limit=limit, after=after)
        return [TrainingRecord(**row) for row in rows]

    def events_after(self, training_id: str, number: int, limit: int = 500) -> list[StoredEvent]:
        """What was told after event ``number``, oldest first."""
        query = (
            select(training_events)
            .where(training_events.c.training_id == training_id, training_events.c.number > number)
            .order_by(training_events.c.number)
            .limit(limit)
        )
        with reading(self.engine) as connection:
            rows = connection.execute(query).mappings().all()
        return [StoredEvent(r["number"], r["type"], r["data"], r["created"]) for r in rows]

    def model_is_asked(self, model: str) -> bool:
        """Whether pictures of the model wait or are drawn: paid traffic that comes first."""
        query = select(jobs.c.id).where(jobs.c.model == model, jobs.c.status.in_(_WORKING))
        with reading(self.engine) as connection:
            return connection.execute(query.limit(1)).first() is not None

    def step_seconds(self, model: str) -> float | None:
        """Device time of a step of the model's last trainings; None where none has ended well."""
        query = (
            select(trainings.c.device_seconds, trainings.c.progress)
            .where(trainings.c.model == model, trainings.c.status == "succeeded")
            .order_by(trainings.c.ended.desc())
            .limit(_MEASURED)
        )
        with reading(self.engine) as connection:
            rows = connection.execute(query).all()
        steps = sum(int(row.progress.get("total_steps", 0)) for row in rows)
        return sum(row.device_seconds for row in rows) / steps if steps else None

    # --- what owners want ---------------------------------------------------------------------

    def want(self, training_id: str, team_id: str, wanted: Wanted) -> TrainingRecord:
        """Cancels, suspends or resumes; one that runs does so when its worker next beats.

        Raises:
            NotFound: the team has no such training.
            Conflict: it is over; a second cancel is no error.
        """
        with writing(self.engine, durable=True) as connection:
            record = _find(connection, training_id, team_id, lock=True)
            if record.over:
                if wanted == "cancel":
                    return record
                raise Conflict(
                    f"The training '{training_id}' is {record.status}: it can be neither "
                    "suspended nor resumed. Create another one.",
                    code="training_over",
                )
            if record.status != "running" and wanted == "cancel":
                self._end(connection, record, "canceled", None, {"wanted": wanted})
            elif record.status != "running":
                status = "queued" if wanted == "run" else "suspended"
                _set(connection, record.id, {"wanted": wanted, "status": status})
                if status != record.status:
                    self._tell(connection, record.id, status)
            else:
                _set(connection, record.id, {"wanted": wanted})
            return _find(connection, training_id, team_id)

    def promote(self, training_id: str, team_id: str) -> TrainingRecord:
        """Lets a finished adapter serve.

        Raises:
            NotFound: the team has no such training.
            Conflict: it has no adapter, or its acceptance set refused it.
        """
        with writing(self.engine, durable=True) as connection:
            record = _find(connection, training_id, team_id, lock=True)
            if record.adapter_file_id is None:
                raise Conflict(
                    f"The training '{training_id}' is {record.status} and has no adapter.",
                    code="training_not_finished",
                )
            if record.acceptance is None or record.acceptance["outcome"] == "refused":
                raise Conflict(
                    f"The adapter of '{training_id}' has not passed an acceptance set, so it is "
                    "not served: `acceptance` of the training has the reasons.",
                    code="acceptance_failed",
                )
            if record.promoted is None:
                _set(connection, record.id, {"promoted": self.clock.time()})
                self._tell(connection, record.id, "promoted")
            return _find(connection, training_id, team_id)

    def to_serve(self, models: Sequence[str]) -> list[TrainingRecord]:
        """Trainings whose adapters serve or have served, in the order of their promotion."""
        query = (
            select(trainings)
            .where(trainings.c.model.in_(models), trainings.c.promoted.is_not(None))
            .order_by(trainings.c.promoted, trainings.c.id)
        )
        with reading(self.engine) as connection:
            return [TrainingRecord(**row) for row in connection.execute(query).mappings()]

    # --- workers ------------------------------------------------------------------------------

    def lease(self, models: Sequence[str], seconds: float) -> TrainingRecord | None:
        """Takes a training that waits, or whose worker has died; None where there is none.

        First comes the team whose open trainings have used the least device time for its weight.
        """
        now = self.clock.time()
        used = (
            select(trainings.c.team_id, func.sum(trainings.c.device_seconds).label("seconds"))
            .where(trainings.c.status.in_(OPEN))
            .group_by(trainings.c.team_id)
            .subquery()
        )
        weight = case((teams.c.weight > 0, teams.c.weight), else_=1.0)
        query = (
            select(trainings)
            .join(used, used.c.team_id == trainings.c.team_id)
            .join(teams, teams.c.id == trainings.c.team_id)
            .where(trainings.c.model.in_(models), _free(now))
            .order_by(used.c.seconds / weight, trainings.c.created, trainings.c.id)
            .limit(1)
        )
        with writing(self.engine, durable=True) as connection:
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            record = TrainingRecord(**row)
            mine = and_(trainings.c.id == record.id, trainings.c.fence == record.fence)
            taken = connection.execute(
                update(trainings)
                .where(mine, _free(now))
                .values(
                    status="running",
                    fence=record.fence + 1,
                    leased_until=now + seconds,
                    started=now if record.started is None else record.started,
                )
                .returning(trainings.c.id)
            ).first()
            if taken is None:
                return None  # another worker was faster
            self._tell(connection, record.id, "started" if not record.fence else "taken_up")
            return _find(connection, record.id)

    def beat(
        self,
        training_id: str,
        fence: int,
        lease_seconds: float,
        device_seconds: float,
        events: Sequence[tuple[str, JsonObject]] = (),
    ) -> Order:
        """Keeps the lease, and writes down what was told and used since the last beat.

        Args:
            device_seconds: used since the last beat.
            events: (type, fields) of what the trainer told.

        Raises:
            LeaseLost: somebody else has it.
        """
        with writing(self.engine) as connection:
            record = _leased(connection, training_id, fence)
            used = record.device_seconds + device_seconds
            leased_until = self.clock.time() + lease_seconds
            values: ColumnValues = {"leased_until": leased_until, "device_seconds": used}
            _set(connection, training_id, values | _learnt(record, events))
            for kind, data in events:
                self._tell(connection, training_id, kind, data)
        if record.wanted == "run" and record.budget_seconds is not None:
            return "stop" if used >= record.budget_seconds else "run"
        return record.wanted

    def give_back(self, training_id: str, fence: int) -> TrainingRecord:
        """The worker stopped at a checkpoint: suspended, or queued again. Raises LeaseLost."""
        with writing(self.engine, durable=True) as connection:
            record = _leased(connection, training_id, fence)
            status = "suspended" if record.wanted == "suspend" else "queued"
            _set(connection, training_id, {"status": status, "leased_until": None})
            self._tell(connection, training_id, status)
            return _find(connection, training_id)

    def finish(
        self, training_id: str, fence: int, outcome: Result | CalotypeError | None
    ) -> TrainingRecord:
        """Writes the end, once, with what it cost.

        Args:
            outcome: what it made, why it failed, or None = it was canceled.

        Raises:
            LeaseLost: somebody else has it.
        """
        with writing(self.engine, durable=True) as connection:
            record = _leased(connection, training_id, fence)
            if outcome is None:
                self._end(connection, record, "canceled", None, {})
            elif isinstance(outcome, CalotypeError):
                self._end(connection, record, "failed", outcome, {})
            else:
                report = outcome.acceptance
                promoted = report is not None and report["outcome"] == "promoted"
                values: ColumnValues = {
                    "adapter_file_id": outcome.adapter_file_id,
                    "report_file_id": outcome.report_file_id,
                    "adapter_sha256": outcome.adapter_sha256,
                    "acceptance": report,
                    "promoted": self.clock.time() if promoted else None,
                }
                self._end(connection, record, "succeeded", None, values)
                if promoted:
                    self._tell(connection, training_id, "promoted")
            return _find(connection, training_id)

    def _end(
        self,
        connection: Connection,
        record: TrainingRecord,
        status: TrainingStatus,
        error: CalotypeError | None,
        values: ColumnValues,
    ) -> None:
        now = self.clock.time()
        payload = None if error is None else error.to_payload()
        changed = {"status": status, "ended": now, "leased_until": None, "error": payload}
        _set(connection, record.id, values | changed)
        self._tell(connection, record.id, status, {} if payload is None else {"error": payload})
        connection.execute(
            usage_records.insert().values(
                job_id=record.id,
                team_id=record.team_id,
                api_key_id=record.api_key_id,
                model=record.model,
                adapters=record.name,
                time=now,
                day=day_of(now),
                status=status,
                images=0,
                megapixels=0.0,
                gpu_seconds=record.device_seconds,
                cost=record.cost,
                input_tokens=0,
                output_tokens=0,
                promise_kept=None,
            )
        )

    def _tell(
        self, connection: Connection, training_id: str, kind: str, data: JsonObject | None = None
    ) -> None:
        last = select(func.coalesce(func.max(training_events.c.number), 0)).where(
            training_events.c.training_id == training_id
        )
        connection.execute(
            training_events.insert().values(
                training_id=training_id,
                number=connection.execute(last).scalar_one() + 1,
                type=kind,
                data=data or {},
                created=self.clock.time(),
            )
        )


def _free(now: float) -> ColumnElement[bool]:
    """It waits, or whoever has it has not beaten in time."""
    dead = and_(trainings.c.status == "running", trainings.c.leased_until <= now)
    return or_(trainings.c.status == "queued", dead)


def _find(
    connection: Connection, training_id: str, team_id: str | None = None, *, lock: bool = False
) -> TrainingRecord:
    query = select(trainings).where(trainings.c.id == training_id)
    if team_id is not None:
        query = query.where(trainings.c.team_id == team_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None:
        raise NotFound(f"There is no training '{training_id[:80]}'.")
    return TrainingRecord(**row)


def _leased(connection: Connection, training_id: str, fence: int) -> TrainingRecord:
    record = _find(connection, training_id, lock=True)
    if record.status != "running" or record.fence != fence:
        raise LeaseLost(f"The training '{training_id}' is another worker's, or over.")
    return record


def _set(connection: Connection, training_id: str, values: ColumnValues) -> None:
    connection.execute(update(trainings).where(trainings.c.id == training_id).values(**values))


def _learnt(record: TrainingRecord, events: Sequence[tuple[str, JsonObject]]) -> ColumnValues:
    """What events change of the row."""
    progress: JsonObject = dict(record.progress)
    checkpoints, samples = list(record.checkpoints), list(record.samples)
    for kind, data in events:
        if kind == "checkpoint_saved":
            checkpoints.append(data)
        elif kind == "sample_drawn":
            samples.append(data)
        else:
            progress |= data
        if "sequence" in data:
            progress["sequence"] = data["sequence"]
    return {
        "progress": progress,
        "checkpoints": checkpoints[-_KEPT:],
        "samples": samples[-_KEPT:],
    }
