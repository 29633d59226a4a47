"""The job store of a model app: the gateways', over HTTP.

A model app has no way to the job database. What its dispatcher asks of it goes to the gateways
(`cluster.job_store_api`), which answer for the jobs of its model alone. The repositories here have
the methods of those in `database` that a dispatcher calls, and raise what they raise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from calotype.moderation.records.heads import Head
from calotype.serving.core.errors import StorageFailed, error_from_payload
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.tls import believed_certificates
from calotype.serving.database.review.takedowns import TakedownRecord
from calotype.serving.jobs.endings import Ending
from calotype.serving.jobs.forecast import Forecast
from calotype.serving.jobs.lease import LeaseProgress
from calotype.serving.jobs.lifecycle import Status
from calotype.serving.jobs.moderation_record import ModerationRecord
from calotype.serving.jobs.outage import Outage
from calotype.serving.jobs.records import Checkpoint, JobRecord, PreviewRecord, TeamRecord
from calotype.serving.wire.job_calls import PATH, ending_payload, row_of, row_payload

CALL_SECONDS = 15.0
CONNECT_SECONDS = 3.0


class RemoteJobStore:
    """The repositories that a dispatcher and a moderator use.

    Args:
        url: of the gateways' internal port.
        token: the model's (`wire.model_token`).
    """

    def __init__(self, url: str, token: str) -> None:
        calls = _Calls(url, token)
        self.jobs = _Jobs(calls)
        self.intermediates = _Intermediates(calls)
        self.forecasts = _Forecasts(calls)
        self.teams = _Teams(calls)
        self.takedowns = _Takedowns(calls)
        self.audit_heads = _AuditHeads(calls)
        self.close = calls.close


class _Calls:
    """One HTTP client; threads may share it."""

    def __init__(self, url: str, token: str) -> None:
        self._client = httpx.Client(
            base_url=url.rstrip("/") + PATH,
            headers={"authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(CALL_SECONDS, connect=CONNECT_SECONDS),
            verify=believed_certificates(),
            trust_env=False,
        )

    def __call__(self, name: str, **arguments: object) -> Any:
        """
        Raises:
            StorageFailed: no gateway answers.
            CalotypeError: what the gateway raised.
        """
        try:
            answer = self._client.post(f"/{name}", json=arguments)
            body = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise StorageFailed(
                f"No gateway answers for the jobs of this model: {error}.", retry_after=5
            ) from error
        if answer.is_success:
            return body["result"]
        raise error_from_payload(body.get("error") or {"class": "StorageFailed"})

    def close(self) -> None:
        self._client.close()


class _Jobs:
    def __init__(self, call: _Calls) -> None:
        self._call = call

    def get_job(self, job_id: str) -> JobRecord | None:
        return row_of(JobRecord, self._call("get_job", job_id=job_id))

    def open_jobs(self, model: str | None, status: Status) -> list[JobRecord]:
        return _jobs(self._call("open_jobs", status=status))

    def expired_leases(self, model: str | None, now: float) -> list[JobRecord]:
        return _jobs(self._call("expired_leases", now=now))

    def queued_job_ids(self, model: str | None, made_after: float | None = None) -> list[str]:
        return [str(found) for found in self._call("queued_job_ids", made_after=made_after)]

    def start_job(self, job_id: str, replica: str, lease_expires: float) -> JobRecord | None:
        found = self._call("start_job", job_id=job_id, replica=replica, lease_expires=lease_expires)
        return row_of(JobRecord, found)

    def requeue_job(
        self,
        job_id: str,
        fence: int,
        count_attempt: bool = True,
        outage: Outage | None = None,
    ) -> JobRecord | None:
        found = self._call(
            "requeue_job",
            job_id=job_id,
            fence=fence,
            count_attempt=count_attempt,
            outage=None if outage is None else outage.to_payload(),
        )
        return row_of(JobRecord, found)

    def postpone_job(self, job_id: str, outage: Outage) -> None:
        self._call("postpone_job", job_id=job_id, outage=outage.to_payload())

    def renew_leases(
        self, replica: str, progress: Mapping[str, LeaseProgress], lease_expires: float
    ) -> None:
        reached = {job_id: at.to_payload() for job_id, at in progress.items()}
        self._call("renew_leases", replica=replica, progress=reached, lease_expires=lease_expires)

    def record_moderation(self, job_id: str, moderation: ModerationRecord) -> None:
        self._call("record_moderation", job_id=job_id, moderation=moderation.to_payload())

    def finish_job(self, job_id: str, ending: Ending) -> JobRecord | None:
        found = self._call("finish_job", job_id=job_id, ending=ending_payload(ending))
        return row_of(JobRecord, found)


class _Intermediates:
    def __init__(self, call: _Calls) -> None:
        self._call = call

    def get_checkpoint(self, job_id: str) -> Checkpoint | None:
        return row_of(Checkpoint, self._call("get_checkpoint", job_id=job_id))

    def save_checkpoint(self, checkpoint: Checkpoint) -> bool:
        return bool(self._call("save_checkpoint", checkpoint=row_payload(checkpoint)))

    def drop_checkpoint(self, job_id: str) -> None:
        self._call("drop_checkpoint", job_id=job_id)

    def add_preview(self, preview: PreviewRecord) -> bool:
        return bool(self._call("add_preview", preview=row_payload(preview)))


class _Forecasts:
    def __init__(self, call: _Calls) -> None:
        self._call = call

    def save_forecast(self, forecast: Forecast) -> None:
        self._call("save_forecast", updated=forecast.updated, figures=forecast.to_payload())


class _Teams:
    def __init__(self, call: _Calls) -> None:
        self._call = call

    def get_team(self, team_id: str) -> TeamRecord | None:
        return row_of(TeamRecord, self._call("get_team", team_id=team_id))


class _Takedowns:
    def __init__(self, call: _Calls) -> None:
        self._call = call

    def stamp(self) -> tuple[int, int]:
        count, newest = self._call("takedown_stamp")
        return int(count), int(newest)

    def list_takedowns(self) -> list[TakedownRecord]:
        rows = self._call("list_takedowns")
        return [found for row in rows if (found := row_of(TakedownRecord, row)) is not None]


class _AuditHeads:
    def __init__(self, call: _Calls) -> None:
        self._call = call

    def note(self, head: Head) -> None:
        self._call("note_head", log=head.log, lines=head.lines, digest=head.hash, time=head.time)


def _jobs(rows: list[JsonObject]) -> list[JobRecord]:
    return [job for row in rows if (job := row_of(JobRecord, row)) is not None]
