"""Webhooks in the database: who wants to be told, what is on its way, what became of it.

An event is written in the transaction that made it happen, so none is lost; a sender claims due
deliveries, and one that dies leaves them to the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, func, select, update

from calotype.serving.core.errors import NotFound
from calotype.serving.database.accounts.service_secrets import make_webhook_secret
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository, column_values
from calotype.serving.database.schema.tables import (
    webhook_attempts,
    webhook_deliveries,
    webhook_endpoints,
)
from calotype.serving.jobs.events import TERMINAL_EVENTS
from calotype.serving.jobs.records import (
    AttemptRecord,
    DeliveryRecord,
    EndpointRecord,
    JobRecord,
    new_id,
)

ROTATION_SECONDS = 24 * 3600.0
"""After a rotation both secrets sign for so long."""

_DELIVERY = webhook_deliveries.c
# Built once: SQLAlchemy takes longer to put a statement together than SQLite to run it.
_WANTED = select(webhook_endpoints).where(
    webhook_endpoints.c.team_id == bindparam("team"), webhook_endpoints.c.disabled.is_(None)
)
_ENDPOINT = select(webhook_endpoints).where(
    webhook_endpoints.c.id == bindparam("endpoint"),
    webhook_endpoints.c.team_id == bindparam("team"),
)
_RECEIVER = func.coalesce(_DELIVERY.endpoint_id, _DELIVERY.url)
_NEXT_DUE = (
    select(_DELIVERY.due)
    .where(
        _DELIVERY.status == "pending",
        _DELIVERY.team_id.not_in(bindparam("teams", expanding=True)),
        _RECEIVER.not_in(bindparam("receivers", expanding=True)),
    )
    .order_by(_DELIVERY.due)
    .limit(1)
)
_CLAIM = (
    select(webhook_deliveries)
    .where(
        _DELIVERY.id.in_(bindparam("found", expanding=True)),
        _DELIVERY.status == "pending",
        _DELIVERY.due <= bindparam("now"),
    )
    .with_for_update(skip_locked=True)
)
_CHANGE = update(webhook_deliveries).where(_DELIVERY.id == bindparam("delivery"))
# Not one that was given up or sent again meanwhile.
_ATTEMPTED = _CHANGE.where(_DELIVERY.status == "pending", _DELIVERY.attempts == bindparam("number"))
_INSERT, _INSERT_ATTEMPT = webhook_deliveries.insert(), webhook_attempts.insert()


def announce(connection: Connection, job: JobRecord, now: float, event: str = "") -> None:
    """Notes that whoever wants to know must be told of the job's new state, or of ``event``."""
    state = "started" if job.status == "running" else job.status
    event = event or f"image.job.{state}"
    wanted: list[tuple[str | None, str]] = []
    if job.webhook is not None and event in (job.webhook.get("events") or TERMINAL_EVENTS):
        wanted.append((None, str(job.webhook["url"])))
    endpoints = connection.execute(_WANTED, {"team": job.team_id})
    wanted += [
        (row["id"], row["url"]) for row in endpoints.mappings() if event in row["event_types"]
    ]
    for endpoint_id, url in wanted:
        _add(connection, job.team_id, endpoint_id, url, event, now, job_id=job.id)


class Webhooks(Repository):
    """Endpoints, deliveries and attempts."""

    # -- endpoints -----------------------------------------------------------------------------

    def add_endpoint(self, team_id: str, name: str, url: str, events: list[str]) -> EndpointRecord:
        now = self.clock.time()
        endpoint = EndpointRecord(
            id=new_id("wh"),
            team_id=team_id,
            name=name,
            url=url,
            event_types=events,
            secret=make_webhook_secret(),
            old_secret=None,
            old_secret_expires=None,
            disabled=None,
            disabled_reason=None,
            created=now,
            updated=now,
        )
        with writing(self.engine, durable=True) as connection:
            connection.execute(webhook_endpoints.insert().values(column_values(endpoint)))
        return endpoint

    def get_endpoint(self, endpoint_id: str, team_id: str) -> EndpointRecord:
        """Raises NotFound when the team has no such endpoint."""
        named = {"endpoint": endpoint_id, "team": team_id}
        with reading(self.engine) as connection:
            row = connection.execute(_ENDPOINT, named).mappings().first()
        if row is None:
            raise NotFound(f"There is no webhook endpoint '{endpoint_id[:80]}'.")
        return EndpointRecord(**row)

    def list_endpoints(self, team_id: str) -> list[EndpointRecord]:
        """Newest first."""
        query = (
            select(webhook_endpoints)
            .where(webhook_endpoints.c.team_id == team_id)
            .order_by(webhook_endpoints.c.created.desc(), webhook_endpoints.c.id.desc())
        )
        with reading(self.engine) as connection:
            return [EndpointRecord(**row) for row in connection.execute(query).mappings()]

    def change_endpoint(self, endpoint_id: str, team_id: str, **changes: Any) -> EndpointRecord:
        """Raises NotFound when the team has no such endpoint."""
        self.get_endpoint(endpoint_id, team_id)
        values = changes | {"updated": self.clock.time()}
        with writing(self.engine) as connection:
            connection.execute(
                update(webhook_endpoints)
                .where(webhook_endpoints.c.id == endpoint_id)
                .values(values)
            )
        return self.get_endpoint(endpoint_id, team_id)

    def rotate_endpoint(self, endpoint_id: str, team_id: str, keep_old: bool) -> EndpointRecord:
        """Gives an endpoint a new secret; the old one signs along for a day, or not at all."""
        old = self.get_endpoint(endpoint_id, team_id)
        return self.change_endpoint(
            endpoint_id,
            team_id,
            secret=make_webhook_secret(),
            old_secret=old.secret if keep_old else None,
            old_secret_expires=self.clock.time() + ROTATION_SECONDS if keep_old else None,
        )

    def delete_endpoint(self, endpoint_id: str, team_id: str) -> None:
        """Forgets an endpoint; what was on its way there is given up. Raises NotFound."""
        self.get_endpoint(endpoint_id, team_id)
        with writing(self.engine) as connection:
            connection.execute(
                delete(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id)
            )
            _give_up(connection, endpoint_id, self.clock.time())

    def disable_endpoint(self, endpoint_id: str, reason: str) -> None:
        now = self.clock.time()
        with writing(self.engine) as connection:
            connection.execute(
                update(webhook_endpoints)
                .where(webhook_endpoints.c.id == endpoint_id)
                .values(disabled=now, disabled_reason=reason[:512], updated=now)
            )
            _give_up(connection, endpoint_id, now)

    def endpoint_secrets(self, delivery: DeliveryRecord) -> list[str]:
        """What a delivery to an endpoint is signed with, newest first; empty when that is gone."""
        try:
            endpoint = self.get_endpoint(str(delivery.endpoint_id), delivery.team_id)
        except NotFound:
            return []
        old = endpoint.old_secret
        if old is not None and (endpoint.old_secret_expires or 0.0) > self.clock.time():
            return [endpoint.secret, old]
        return [endpoint.secret]

    # -- deliveries ----------------------------------------------------------------------------

    def add_delivery(
        self, team_id: str, endpoint_id: str, url: str, event: str, body: str
    ) -> DeliveryRecord:
        """An event of no job, such as a test."""
        with writing(self.engine) as connection:
            delivery_id = _add(
                connection, team_id, endpoint_id, url, event, self.clock.time(), body=body
            )
        return self.get_delivery(delivery_id, team_id)

    def claim_deliveries(
        self,
        limit: int,
        claim_seconds: float,
        *,
        wanted: Callable[[DeliveryRecord], bool] = lambda delivery: True,
        per_team: int | None = None,
        per_receiver: int | None = None,
        left_alone: Sequence[str] = (),
        busy_teams: Sequence[str] = (),
    ) -> list[DeliveryRecord]:
        """Takes due deliveries for one attempt each; nobody else gets them meanwhile.

        The first of every team comes before the second of any.

        Args:
            wanted: asked for each that is found, in order; those that it refuses stay due.
            per_team, per_receiver: most that are found of each.
            left_alone: endpoints, or addresses of jobs' own webhooks, that get none.
            busy_teams: teams that get none.
        """
        now = self.clock.time()
        # Mostly nothing is due, and whoever asks that must not lock out those who write.
        if self.seconds_to_next_delivery(left_alone, busy_teams) != 0.0:
            return []
        bounds = {"per_receiver": per_receiver, "per_team": per_team, "most": limit}
        besides = {"teams": list(busy_teams), "receivers": list(left_alone)}
        with writing(self.engine) as connection:
            first = _first_due(per_receiver is not None, per_team is not None)
            ids = list(connection.execute(first, {"now": now} | bounds | besides).scalars())
            rows = connection.execute(_CLAIM, {"found": ids, "now": now}).mappings()
            there = {row["id"]: DeliveryRecord(**row) for row in rows}
            found = [there[name] for name in ids if name in there and wanted(there[name])]
            for delivery in found:
                values = {"attempts": delivery.attempts + 1, "due": now + claim_seconds}
                connection.execute(_CHANGE, {"delivery": delivery.id} | values)
        return [replace(delivery, attempts=delivery.attempts + 1) for delivery in found]

    def seconds_to_next_delivery(
        self, left_alone: Sequence[str] = (), busy_teams: Sequence[str] = ()
    ) -> float | None:
        """Until something is due; None when nothing is on its way.

        Args:
            left_alone, busy_teams: whose deliveries do not count; see `claim_deliveries`.
        """
        besides = {"teams": list(busy_teams), "receivers": list(left_alone)}
        with reading(self.engine) as connection:
            due = connection.execute(_NEXT_DUE, besides).scalar_one_or_none()
        return None if due is None else max(0.0, due - self.clock.time())

    def write_body(self, delivery_id: str, body: str) -> None:
        with writing(self.engine) as connection:
            connection.execute(_CHANGE, {"delivery": delivery_id, "body": body})

    def record_attempt(
        self, delivery: DeliveryRecord, attempt: AttemptRecord, status: str, due: float | None
    ) -> None:
        """Notes how an attempt went, and when the next one is due (``pending``)."""
        over = None if status == "pending" else self.clock.time()
        mine = {"delivery": delivery.id, "number": delivery.attempts}
        with writing(self.engine) as connection:
            connection.execute(_INSERT_ATTEMPT, column_values(attempt))
            connection.execute(_ATTEMPTED, mine | {"status": status, "due": due, "completed": over})

    def get_delivery(self, delivery_id: str, team_id: str) -> DeliveryRecord:
        """Raises NotFound when the team has no such delivery."""
        query = select(webhook_deliveries).where(
            webhook_deliveries.c.id == delivery_id, webhook_deliveries.c.team_id == team_id
        )
        with reading(self.engine) as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFound(f"There is no webhook delivery '{delivery_id[:80]}'.")
        return DeliveryRecord(**row)

    def list_deliveries(
        self,
        team_id: str,
        *,
        limit: int,
        after: str | None = None,
        job_id: str | None = None,
        endpoint_id: str | None = None,
        status: str | None = None,
    ) -> list[DeliveryRecord]:
        """Newest first; ``after`` is the last id of the page before."""
        table = webhook_deliveries.c
        query = select(webhook_deliveries).where(table.team_id == team_id)
        for column, value in (
            (table.job_id, job_id),
            (table.endpoint_id, endpoint_id),
            (table.status, status),
        ):
            if value is not None:
                query = query.where(column == value)
        rows = self.page(
            query, webhook_deliveries, team_id, "webhook delivery", limit=limit, after=after
        )
        return [DeliveryRecord(**row) for row in rows]

    def list_attempts(self, delivery_ids: Sequence[str]) -> dict[str, list[AttemptRecord]]:
        query = select(webhook_attempts).where(
            webhook_attempts.c.delivery_id.in_(list(delivery_ids))
        )
        found: dict[str, list[AttemptRecord]] = {}
        with reading(self.engine) as connection:
            rows = connection.execute(query.order_by(webhook_attempts.c.number)).mappings()
            for row in rows:
                found.setdefault(row["delivery_id"], []).append(AttemptRecord(**row))
        return found

    def redeliver(self, delivery_id: str, team_id: str) -> DeliveryRecord:
        """Sends an event again, with the same id and body, now. Raises NotFound."""
        delivery = self.get_delivery(delivery_id, team_id)
        with writing(self.engine) as connection:
            connection.execute(
                update(webhook_deliveries)
                .where(webhook_deliveries.c.id == delivery.id)
                .values(status="pending", due=self.clock.time(), completed=None)
            )
        return self.get_delivery(delivery_id, team_id)


def _add(
    connection: Connection,
    team_id: str,
    endpoint_id: str | None,
    url: str,
    event: str,
    now: float,
    *,
    job_id: str | None = None,
    body: str | None = None,
) -> str:
    delivery_id = new_id("msg")
    values = {
        "id": delivery_id,
        "team_id": team_id,
        "endpoint_id": endpoint_id,
        "job_id": job_id,
        "event_type": event,
        "url": url,
        "body": body,
        "status": "pending",
        "attempts": 0,
        "due": now,
        "created": now,
    }
    connection.execute(_INSERT, values)
    return delivery_id


@functools.cache
def _first_due(of_receiver: bool, of_team: bool) -> Select[tuple[str]]:
    """See `Webhooks.claim_deliveries`."""
    nth = func.row_number().over(partition_by=_RECEIVER, order_by=(_DELIVERY.due, _DELIVERY.id))
    due = (
        select(_DELIVERY.id, _DELIVERY.team_id, _DELIVERY.due, nth.label("nth"))
        .where(
            _DELIVERY.status == "pending",
            _DELIVERY.due <= bindparam("now"),
            _DELIVERY.team_id.not_in(bindparam("teams", expanding=True)),
            _RECEIVER.not_in(bindparam("receivers", expanding=True)),
        )
        .subquery()
    )
    place = func.row_number().over(partition_by=due.c.team_id, order_by=(due.c.due, due.c.id))
    fair = select(due.c.id, due.c.due, place.label("place"))
    if of_receiver:
        fair = fair.where(due.c.nth <= bindparam("per_receiver"))
    ranked = fair.subquery()
    first = select(ranked.c.id)
    if of_team:
        first = first.where(ranked.c.place <= bindparam("per_team"))
    return first.order_by(ranked.c.place, ranked.c.due).limit(bindparam("most"))


def _give_up(connection: Connection, endpoint_id: str, now: float) -> None:
    connection.execute(
        update(webhook_deliveries)
        .where(
            webhook_deliveries.c.endpoint_id == endpoint_id,
            webhook_deliveries.c.status == "pending",
        )
        .values(status="failed", due=None, completed=now)
    )
