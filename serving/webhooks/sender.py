"""Sends webhooks as Standard Webhooks 1.0.0 says: signed, repeated for three days, never twice at
the same time.

    webhook-id: msg_...                  the same on every attempt
    webhook-timestamp: 1795353240        of this attempt
    webhook-signature: v1,<base64>       HMAC-SHA256 of "id.timestamp.body"; two after a rotation
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from calotype.serving.core.errors import CalotypeError, InvalidRequest
from calotype.serving.database.database import Database
from calotype.serving.jobs.records import AttemptRecord, DeliveryRecord, JobRecord, new_id
from calotype.serving.observability import metrics
from calotype.serving.webhooks.receivers import AT_ONCE, PER_RECEIVER, PER_TEAM, Receivers
from calotype.serving.webhooks.safe_http import (
    AddressRefused,
    Answer,
    OutboundFailed,
    OutboundPolicy,
    resolve_url,
    send,
)

log = logging.getLogger(__name__)

RETRY_DELAYS = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
"""Seconds between attempts, ten in all; some are longer by up to a tenth."""
TIMEOUT_SECONDS = 15.0
MAX_ANSWER_BYTES = 64 * 1024
MAX_BODY_BYTES = 20_000
_CLAIM_SECONDS = TIMEOUT_SECONDS + 15.0
_SLOW_DOWN = (429, 502, 504)
_GONE = 410

DescribeJob = Callable[[JobRecord], Mapping[str, object]]


def sign(secrets: Sequence[str], message_id: str, timestamp: int, body: str) -> str:
    """The ``webhook-signature`` header; one signature for each secret ``whsec_...``."""
    signed = f"{message_id}.{timestamp}.{body}".encode()
    found = []
    for secret in secrets:
        key = base64.b64decode(secret.removeprefix("whsec_"))
        digest = hmac.new(key, signed, hashlib.sha256).digest()
        found.append("v1," + base64.b64encode(digest).decode("ascii"))
    return " ".join(found)


def event_body(event_type: str, moment: float, data: Mapping[str, object]) -> str:
    """The JSON of an event: Standard Webhooks' fields and OpenAI's beside them."""
    body = {
        "type": event_type,
        "timestamp": datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z"),
        "id": new_id("evt"),
        "object": "event",
        "created_at": int(moment),
        "data": dict(data),
    }
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode("utf-8")) > MAX_BODY_BYTES:
        # A long prompt: the receiver asks for the job, whose id is all that it needs.
        body["data"] = {k: v for k, v in data.items() if k not in ("input", "recipe")}
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return text


class WebhookSender:
    """Sends what is due, as one of any number of senders over one database.

    Args:
        describe: the job as the API shows it, without pictures.
    """

    def __init__(self, database: Database, policy: OutboundPolicy, describe: DescribeJob) -> None:
        self._database, self._policy, self._describe = database, policy, describe
        self._receivers = Receivers(database.clock.time)
        self._running: set[asyncio.Task[None]] = set()

    async def work(self, pause: float) -> float:
        """One round; how long to wait for the next one, at most ``pause`` seconds.

        What is being sent goes on meanwhile: nobody waits for another one's receiver.
        """
        await self._start_due()
        if self._running:
            await asyncio.wait(self._running, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            return 0.0
        # What is due for a receiver that is left alone does not count: it would keep this busy.
        webhooks, left_alone = self._database.webhooks, self._receivers.left_alone()
        due = await asyncio.to_thread(webhooks.seconds_to_next_delivery, left_alone)
        return pause if due is None else min(pause, max(0.05, due))

    async def close(self) -> None:
        """Breaks off what is being sent: another sender tries it again."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def send_due(self) -> int:
        """One attempt for everything that is due, and all of them awaited; how many there were."""
        sent = 0
        while True:
            busy = bool(self._running)  # what ends while it is claimed makes room for more
            started = await self._start_due()
            if not started and not busy:
                return sent
            sent += started
            if self._running:
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)

    async def _start_due(self) -> int:
        """Begins to send what is due and may be sent now; how many there are."""
        receivers, taken = self._receivers, list[DeliveryRecord]()

        def wanted(delivery: DeliveryRecord) -> bool:
            if receivers.take(delivery):
                taken.append(delivery)
                return True
            return False

        try:
            claimed = await asyncio.to_thread(
                self._database.webhooks.claim_deliveries,
                AT_ONCE,
                _CLAIM_SECONDS,
                wanted=wanted,
                per_team=PER_TEAM,
                per_receiver=PER_RECEIVER,
                left_alone=receivers.left_alone(),
                busy_teams=receivers.busy_teams(),
            )
        except BaseException:
            for delivery in taken:
                receivers.give_back(delivery)
            raise
        for delivery in claimed:
            task = asyncio.create_task(self._send(delivery))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return len(claimed)

    async def _send(self, delivery: DeliveryRecord) -> None:
        try:
            await self._attempt(delivery)
        except CalotypeError as error:
            if not error.retryable:
                await self._spoiled(delivery, error)
            else:
                log.warning("a webhook is tried again later: %s", error)
        except Exception as error:  # a bug of ours, or of a library, over this event
            await self._spoiled(delivery, error)
        finally:
            self._receivers.give_back(delivery)

    async def _spoiled(self, delivery: DeliveryRecord, error: Exception) -> None:
        """An attempt that failed in our own code counts, so that it ends like the others."""
        log.error("webhook %s could not be sent: %r", delivery.id, error, exc_info=error)
        metrics.SET_ASIDE.labels("webhook_attempt").inc()
        reason = f"it could not be prepared ({type(error).__name__})"
        now = self._database.clock.time()
        state, due = self._verdict(delivery, None, reason, refused=False)
        attempt = AttemptRecord(delivery.id, delivery.attempts, now, 0.0, None, reason)
        await asyncio.to_thread(
            self._database.webhooks.record_attempt, delivery, attempt, state, due
        )

    async def _attempt(self, delivery: DeliveryRecord) -> None:
        begun, started = self._database.clock.time(), time.monotonic()
        answer: Answer | None = None
        refused = False
        error: str | None = None
        try:
            answer = await self._post(delivery, begun)
        except AddressRefused as problem:
            refused, error = True, problem.message
        except (OutboundFailed, InvalidRequest) as problem:
            error = str(problem)
        except TimeoutError:
            error = "its name was not resolved in time"
        seconds = time.monotonic() - started
        status = None if answer is None else answer.status
        if answer is not None and not 200 <= answer.status < 300:
            error = f"the receiver answered {answer.status}"
        self._receivers.answered(delivery, status is not None and status < 500)
        state, due = self._verdict(delivery, answer, error, refused)
        attempt = AttemptRecord(
            delivery.id,
            delivery.attempts,
            begun,
            round(seconds, 3),
            status,
            None if error is None else error[:512],
        )
        await asyncio.to_thread(
            self._database.webhooks.record_attempt, delivery, attempt, state, due
        )
        metrics.WEBHOOKS.labels(delivery.event_type, "sent" if error is None else "failed").inc()
        if status == _GONE and delivery.endpoint_id is not None:
            await asyncio.to_thread(
                self._database.webhooks.disable_endpoint,
                delivery.endpoint_id,
                "It answered 410 Gone.",
            )

    async def _post(self, delivery: DeliveryRecord, now: float) -> Answer:
        if delivery.endpoint_id is None:
            secret = await asyncio.to_thread(
                self._database.secrets.webhook_secret, delivery.team_id
            )
            secrets = [secret]
        else:
            secrets = await asyncio.to_thread(self._database.webhooks.endpoint_secrets, delivery)
        if not secrets:
            raise AddressRefused("The webhook endpoint was deleted.")
        body = delivery.body or await self._write_body(delivery)
        stamp = int(now)
        headers = {
            "content-type": "application/json",
            "user-agent": "calotype-webhooks/1",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(stamp),
            "webhook-signature": sign(secrets, delivery.id, stamp, body),
        }
        async with asyncio.timeout(TIMEOUT_SECONDS + 5):
            target = await resolve_url(delivery.url, self._policy)
            return await send(
                target,
                "POST",
                headers,
                body.encode("utf-8"),
                seconds=TIMEOUT_SECONDS,
                max_bytes=MAX_ANSWER_BYTES,
                policy=self._policy,
            )

    async def _write_body(self, delivery: DeliveryRecord) -> str:
        job = await asyncio.to_thread(self._database.jobs.get_job, delivery.job_id or "")
        data: Mapping[str, object]
        data = {"id": delivery.job_id} if job is None else self._describe(job)
        body = event_body(delivery.event_type, delivery.created, data)
        await asyncio.to_thread(self._database.webhooks.write_body, delivery.id, body)
        return body

    def _verdict(
        self, delivery: DeliveryRecord, answer: Answer | None, error: str | None, refused: bool
    ) -> tuple[str, float | None]:
        """The state after an attempt, and when the next one is due."""
        if error is None:
            return "delivered", None
        gone = answer is not None and answer.status == _GONE
        # After a redelivery the count goes on; the schedule ends with its last delay.
        if refused or gone or delivery.attempts > len(RETRY_DELAYS):
            return "failed", None
        delay = RETRY_DELAYS[delivery.attempts - 1] * random.uniform(1.0, 1.1)
        if answer is not None and answer.status in _SLOW_DOWN:
            delay *= 2
            with contextlib.suppress(ValueError):
                delay = max(delay, min(86_400.0, float(answer.headers.get("retry-after", ""))))
        return "pending", self._database.clock.time() + delay
