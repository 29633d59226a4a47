"""The generator as a Ray Serve deployment: replicas that pull leases."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import TYPE_CHECKING

from ray import serve

from calotype.serving.config.environment import NODE_NAME
from calotype.serving.core.errors import EngineError
from calotype.serving.core.json_object import JsonObject
from calotype.serving.deployments.remote import RemoteLeases, RemotePrompts, RemoteSafety
from calotype.serving.deployments.reporting import ReplicaReport, report_forever
from calotype.serving.observability.logs import set_up_logs
from calotype.serving.storage import open_blobs
from calotype.serving.wire.application import GeneratorConfig
from calotype.serving.wire.config_hash import config_hash
from calotype.serving.worker.replica import GeneratorReplica, ReplicaSettings

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


log = logging.getLogger(__name__)


class GeneratorDeployment:
    """Thin: a `GeneratorReplica` with remote ends."""

    def __init__(
        self,
        blob_url: str,
        torch_threads: int,
        dispatcher: DeploymentHandle,
        moderator: DeploymentHandle,
        text_encoder: DeploymentHandle,
    ) -> None:
        set_up_logs()
        settings = ReplicaSettings(
            serve.get_replica_context().replica_tag, torch_threads, on_lost=_end
        )
        self._replica = GeneratorReplica(
            settings,
            RemoteLeases(dispatcher),
            RemotePrompts(text_encoder),
            RemoteSafety(moderator),
            open_blobs(blob_url),
        )
        self._config_hash = ""
        self._node = os.environ.get(NODE_NAME) or socket.gethostname()
        self._backlog_seconds = 0.0
        self._target_seconds = 0.0
        self._reporting = asyncio.get_running_loop().create_task(
            report_forever(dispatcher, self._state, self._hear)
        )

    async def reconfigure(self, config: JsonObject) -> None:
        """Takes a `GeneratorConfig`: it is recorded, and loaded afterwards."""
        self._config_hash = config_hash(config)
        wanted = GeneratorConfig.model_validate(config)
        self._target_seconds = wanted.model.spec.autoscaling.target_queue_seconds
        self._replica.configure(wanted.model, wanted.adapters)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve; read by `autoscaling.QueueSecondsPolicy`."""
        return {
            "backlog_seconds": self._backlog_seconds,
            "target_queue_seconds": self._target_seconds,
        }

    def check_health(self) -> None:
        if not self._replica.healthy:
            raise EngineError("The engine's thread has died.")

    async def __del__(self) -> None:
        """Called by Serve when the replica shall stop: drains."""
        self._reporting.cancel()
        await self._replica.close()

    def _state(self) -> ReplicaReport:
        state = self._replica.state()
        return ReplicaReport(
            kind="generator",
            replica=state.replica,
            ready=state.ready,
            message=state.message,
            node=self._node,
            config_hash=self._config_hash,
            engine=None if state.engine is None else state.engine.to_payload(),
            adapters=dict(state.adapters),
            load_states={name: load.to_payload() for name, load in state.loads.items()},
        )

    def _hear(self, backlog_seconds: float) -> None:
        self._backlog_seconds = backlog_seconds


def _end(reason: str) -> None:
    """Ends the process: a device that draws along is gone, and Serve starts another replica.

    At once, because the engine may wait for the lost device for ever.
    """
    log.error("this replica ends, and another takes its place: %s", reason)
    logging.shutdown()
    os._exit(1)
