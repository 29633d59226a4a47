"""What replicas tell the dispatcher of themselves, every two seconds."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from calotype.serving.core.errors import CalotypeError
from calotype.serving.core.json_object import JsonObject
from calotype.serving.deployments.remote import call
from calotype.serving.observability.loops import Loop

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)

REPORT_SECONDS = 2.0
EAGER_SECONDS = 0.2
"""Pause while a replica is still loading, so that a service says soon that it is ready."""


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """The state of one replica. Within one model app, so both ends are of one release."""

    kind: Literal["generator", "text_encoder"]
    replica: str
    ready: bool
    message: str
    """What is wrong; "" = nothing."""
    node: str = ""
    config_hash: str = ""
    """`config_hash` of the ``user_config`` that it has."""
    engine: JsonObject | None = None
    """How it draws (`EngineState.to_payload`); None while it loads."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Name -> ``loading``, ``ready`` or why not."""
    load_states: Mapping[str, JsonObject] = field(default_factory=dict)
    """Name -> `AdapterLoad.to_payload`."""


async def report_forever(
    dispatcher: DeploymentHandle,
    state: Callable[[], ReplicaReport],
    heard: Callable[[float], None] = lambda backlog_seconds: None,
) -> None:
    """Sends ``state()``; hands the dispatcher's backlog in seconds to ``heard``."""

    async def report() -> float:
        now = state()
        try:
            backlog = await call(
                functools.partial(dispatcher.report.remote, now),
                "The dispatcher",
                patience=0,
                limit=10,
            )
            heard(float(backlog))
        except CalotypeError as error:
            log.warning("a report was not heard: %s", error.message)
        return REPORT_SECONDS if now.ready else EAGER_SECONDS

    await Loop("reports", report).run()
