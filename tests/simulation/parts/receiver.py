"""A customer's webhook receiver: what reached it, and when it is silent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calotype.serving.webhooks.safe_http import Answer, OutboundPolicy

if TYPE_CHECKING:
    from simulation.world import World

URL = "https://customer.test/hook"


@dataclass(frozen=True, slots=True)
class Received:
    """One webhook that arrived."""

    id: str
    type: str
    job_id: str
    status: str
    body: bytes


class Receiver:
    """In place of the connection that `webhooks.safe_http` would make."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.received: list[Received] = []
        self.policy = OutboundPolicy(resolve=self._resolve)

    async def exchange(
        self, target: Any, method: str, headers: Mapping[str, str], body: bytes, *rest: Any
    ) -> Answer:
        """In place of `safe_http._exchange`."""
        if self._world.away("receiver"):
            await asyncio.sleep(3600)
        await asyncio.sleep(0.1)
        told = json.loads(body)
        data = told["data"]
        received = Received(
            headers["webhook-id"], told["type"], data["id"], data.get("status", ""), body
        )
        self.received.append(received)
        self._world.note(f"webhook {received.type} of {received.job_id}: {received.id}")
        return Answer(200, {}, b"")

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        return ["93.184.216.34"]
