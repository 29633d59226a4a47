"""Ray's processes on this machine alone: started, watched and ended."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import socket
import time
from typing import Any

import ray
import ray._raylet
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.services import get_node, get_node_ip_address

from calotype.serving.core.errors import ModelLoadFailed

OBJECT_STORE_BYTES = 100 * 1024 * 1024
AGENT_PORTS = range(20_000, 32_000)
"""Below the ports that Linux gives to outgoing connections."""
NODE_POLL_SECONDS = 0.1
NO_SERVICE = -1
"""How Ray writes the port of an agent's service that is not in use."""

_raylet: Any = ray._raylet  # compiled: its stubs name a part of it only
_node: Node | None = None


class _LocalNode(Node):  # type: ignore[misc]
    """A head node with the processes that one machine needs.

    `ray.init` also starts a monitor that scales clusters, and, with ``include_dashboard=False``
    too, the dashboard's process for usage statistics; neither has an option. And it waits until
    Ray's agents have said on which ports they listen, which takes them longer than all the rest,
    and gives up after 15 s, which they may need on a busy machine. Here their ports are written
    before they start, so that they start beside the replicas. Nobody asks for Ray's metrics here,
    so they are not collected. And it gives up when the node is not known to its head after 30 s,
    without a setting for it; here it is asked after before that wait begins.
    """

    start_seconds = 0.0

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        self._webui_url = ""

    def start_monitor(self) -> None:
        return

    def start_raylet(self, *arguments: Any, **options: Any) -> None:
        folder, node = self.get_session_dir_path(), self.node_id
        for service in (
            _raylet.METRICS_AGENT_PORT_NAME,
            _raylet.METRICS_EXPORT_PORT_NAME,
            _raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME,
        ):
            _raylet.persist_port(folder, node, service, NO_SERVICE)
        port = self._ray_params.runtime_env_agent_port
        _raylet.persist_port(folder, node, _raylet.RUNTIME_ENV_AGENT_PORT_NAME, port)
        super().start_raylet(*arguments, **options)

    def start_ray_processes(self) -> None:
        super().start_ray_processes()
        give_up = time.monotonic() + self.start_seconds
        while time.monotonic() < give_up and not self.dead_processes():
            with contextlib.suppress(RuntimeError):
                get_node(self.gcs_address, self.node_id)
                return
            time.sleep(NODE_POLL_SECONDS)


def start_ray(start_seconds: float, *, log_to_driver: bool) -> None:
    """Starts Ray's processes; from the main thread, since they die with the thread that asked.

    Args:
        start_seconds: for so long the node is waited for.
        log_to_driver: whether what replicas write appears here.

    Raises:
        ModelLoadFailed: they did not come up, for instance for want of memory or time; with
            ``retry_after`` where another try may do better.
    """
    global _node
    # What other processes of this machine would find under ray.init(address="local").
    address = get_node_ip_address()
    _LocalNode.start_seconds = start_seconds
    try:
        _node = _LocalNode(
            RayParams(
                node_ip_address=address,
                num_cpus=max(2, os.cpu_count() or 1),
                include_dashboard=False,
                include_log_monitor=log_to_driver,
                object_store_memory=OBJECT_STORE_BYTES,
                runtime_env_agent_port=_free_port(),
            ),
            head=True,
            shutdown_at_exit=False,
            spawn_reaper=True,
            ray_init_cluster=True,
        )
        ray.init(
            address=_node.gcs_address,
            log_to_driver=log_to_driver,
            logging_level=logging.ERROR,
            _node_ip_address=address,
        )
    except Exception as error:  # Ray raises whatever its processes could not do
        stop_ray()
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ModelLoadFailed(
            f"Ray could not be started: {said}. Free memory and room in /dev/shm and try again; "
            "its logs are in session_latest/logs of $RAY_TMPDIR, or else of /tmp/ray.",
            # A path that is too long stays so; being slow may pass.
            retry_after=1.0 if _may_pass(error) else None,
        ) from error


def _may_pass(error: Exception) -> bool:
    slow = isinstance(error, (TimeoutError, ConnectionError))
    return slow or not isinstance(error, (OSError, ValueError))


def lost_process() -> str | None:
    """A process of Ray's that has ended by itself, without which nothing works; None = all run."""
    dead = _node.dead_processes() if _node is not None else []
    return str(dead[0][0]) if dead else None


def stop_ray() -> None:
    """Ends Ray's processes. What they say of each other's end is dropped: nobody asked."""
    global _node
    node, _node = _node, None
    with contextlib.redirect_stderr(io.StringIO()):
        ray.shutdown()
        if node is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=True)


def _free_port() -> int:
    """A port for a process that starts later."""
    for port in random.sample(AGENT_PORTS, len(AGENT_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("every port is taken")
