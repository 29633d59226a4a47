"""``python -m calotype.serving.deployments.ray_host.process``: Ray, its driver, and model apps.

Started by `cluster.supervisor`, never by hand: orders come on the standard input, reports go to a
pipe (`wire.ray_host`). It ends when its input ends, for then nobody is there any more, and when a
process of Ray's has died: all that is in this process depends on it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import BinaryIO, NoReturn

from calotype.serving.cluster.child_process import session_members
from calotype.serving.core.errors import CalotypeError, ModelLoadFailed
from calotype.serving.core.tls import TlsFiles, tls_files
from calotype.serving.deployments.ray_host.environment import prepare_ray
from calotype.serving.observability.logs import set_up_logs
from calotype.serving.wire.ray_host import ALIVE_SECONDS, HostOrder, HostReport

REFUSED, LOST = 2, 3
"""Exit statuses: what it said cannot be done; Ray is lost."""
POLL_SECONDS = 0.25
WATCH_SECONDS = 0.5
DRAIN_SECONDS = 300.0


class Reports:
    """Says what happens, to whoever supervises."""

    def __init__(self, fd: int) -> None:
        self._pipe = os.fdopen(fd, "wb", buffering=0)

    def tell(self, kind: str, text: str = "", number: int = 0, *, final: bool = False) -> None:
        report = HostReport.model_validate(
            {"kind": kind, "text": text, "number": number, "final": final}
        )
        with contextlib.suppress(BrokenPipeError):
            self._pipe.write(report.model_dump_json().encode() + b"\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="calotype.serving.deployments.ray_host.process")
    parser.add_argument("--listener", type=int, required=True)
    parser.add_argument("--reports", type=int, required=True)
    parser.add_argument("--start-seconds", type=float, required=True)
    parser.add_argument("--log-to-driver", action="store_true")
    parser.add_argument("--tls-certificate")
    parser.add_argument("--tls-key")
    options = parser.parse_args(argv)
    for fd in (options.listener, options.reports):
        os.set_inheritable(fd, False)  # Ray's processes shall not keep them open
    reports = Reports(options.reports)
    set_up_logs(level=logging.WARNING)
    prepare_ray(options.start_seconds)
    orders = _own_input()
    first = _next_order(orders)
    if first is None:
        return
    try:
        _run(options, orders, first, reports)
    except CalotypeError as error:
        final = error.retry_after is None
        reports.tell("failed", error.message, final=final)
        sys.exit(REFUSED)


def _run(options: argparse.Namespace, orders: BinaryIO, first: HostOrder, reports: Reports) -> None:
    tls = tls_files(options.tls_certificate, options.tls_key)
    # Imported here: Ray reads its environment when it is imported.
    from calotype.serving.deployments.ray_host.node import start_ray, stop_ray

    start_ray(options.start_seconds, log_to_driver=options.log_to_driver)
    reports.tell("started")
    try:
        with socket.socket(fileno=options.listener) as listener:
            asyncio.run(Host(reports, listener, first.token, tls).run(first, orders))
    finally:
        stop_ray()


def _own_input() -> BinaryIO:
    """The standard input, which the processes that Ray starts shall not have."""
    own = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return os.fdopen(own, "rb")


def _next_order(orders: BinaryIO) -> HostOrder | None:
    """None = nobody is there any more."""
    line = orders.readline()
    return HostOrder.model_validate_json(line) if line.endswith(b"\n") else None


class Host:
    """The applications that run here."""

    def __init__(
        self, reports: Reports, listener: socket.socket, token: str, tls: TlsFiles | None
    ) -> None:
        from calotype.serving.deployments.ray_host.ingress import HostIngress, IngressServer

        self._reports, self._listener = reports, listener
        self._ingress = HostIngress(token)
        self._server = IngressServer(self._ingress, tls)
        self._answering: asyncio.Task[None] | None = None
        self._good = HostOrder(number=0, applications=[])
        """The last order that could be carried out."""
        self._running: list[str] = []
        """Applications that may be drawing pictures."""
        self._stop = asyncio.Event()
        self._orders: asyncio.Queue[HostOrder | None] = asyncio.Queue()

    async def run(self, first: HostOrder, orders: BinaryIO) -> None:
        """Until SIGTERM.

        Raises:
            ModelLoadFailed: Serve, or the first applications, cannot be started.
        """
        loop = asyncio.get_running_loop()
        # After Ray's own handlers, which kill. An interrupt is for whoever supervises.
        loop.add_signal_handler(signal.SIGTERM, self._begin_to_stop)
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        threading.Thread(target=self._read_orders, args=(loop, orders), daemon=True).start()
        watching = asyncio.gather(self._watch(), self._say_alive())
        try:
            self._reports.tell("stage", "Starting Ray Serve")
            await asyncio.to_thread(_start_serve)
            await self._carry_out(first, first=True)
            while (order := await self._next()) is not None:
                await self._carry_out(order)
        finally:
            await self._end()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def _begin_to_stop(self) -> None:
        self._stop.set()
        self._orders.put_nowait(None)

    async def _next(self) -> HostOrder | None:
        """The newest order, those before it are out of date; None = it shall stop."""
        order = await self._orders.get()
        while not self._orders.empty():
            order = self._orders.get_nowait()
        return None if self._stop.is_set() else order

    async def _carry_out(self, order: HostOrder, *, first: bool = False) -> None:
        try:
            await self._deploy(order)
        except ModelLoadFailed as error:
            if first:
                raise
            self._reports.tell("refused", error.message, order.number)
            with contextlib.suppress(ModelLoadFailed):  # Serve has given up what ran before
                await self._deploy(self._good)
            return
        self._good = order
        if self._stop.is_set():
            return
        if self._answering is None:
            self._answering = asyncio.create_task(self._server.answer_on(self._listener))
            while not self._server.started:
                await asyncio.sleep(0.01)
            self._reports.tell("serving")
        self._reports.tell("applied", "", order.number)

    async def _deploy(self, order: HostOrder) -> None:
        """Returns when the applications run.

        Raises:
            ModelLoadFailed: one of them cannot; names it.
        """
        from calotype.serving.deployments.ray_host.applications import deploy, statuses

        await asyncio.to_thread(deploy, order.applications)
        apps = {
            str(app.get("route_prefix", "/")): str(app.get("name", "default"))
            for app in order.applications
        }
        names = list(apps.values())
        self._reports.tell("stage", f"Deploying {', '.join(names)}")
        while not self._stop.is_set():
            found = await asyncio.to_thread(statuses, names)
            for name, (status, message) in found.items():
                detail = f": {message}" if message else ""
                if status == "DEPLOY_FAILED":
                    raise ModelLoadFailed(f"The application {name} cannot run{detail}.")
            if all(status == "RUNNING" for status, _ in found.values()):
                await asyncio.to_thread(self._ingress.offer, apps)
                self._running = names
                self._reports.tell("stage")
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _end(self) -> None:
        """Finishes the running pictures, leaves the queued jobs to the database, ends Serve."""
        from calotype.serving.deployments.ray_host.applications import drain, shut_down

        await asyncio.gather(*(drain(name, DRAIN_SECONDS) for name in self._running))
        if self._answering is not None:
            self._server.should_exit = True
            await self._answering
        # Ray reports the end of its own processes as errors: nobody who reads this asked.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            await asyncio.to_thread(shut_down)

    async def _say_alive(self) -> None:
        """From the event loop that carries out orders: while it hangs nothing is said."""
        while True:
            self._reports.tell("alive")
            await asyncio.sleep(ALIVE_SECONDS)

    async def _watch(self) -> None:
        """Ends this process when Ray's head or its raylet has: nothing here works without them,
        and Ray itself would notice only after a minute."""
        from calotype.serving.deployments.ray_host.node import lost_process

        while True:
            await asyncio.sleep(WATCH_SECONDS)
            lost = lost_process()
            if lost is not None:
                self._reports.tell("failed", f"Ray is lost: its process {lost} has ended.")
                _end_now(LOST)

    def _read_orders(self, loop: asyncio.AbstractEventLoop, orders: BinaryIO) -> None:
        while True:
            try:
                order = _next_order(orders)
            except ValueError as error:
                self._reports.tell("failed", f"An order cannot be read: {error}", final=True)
                _end_now(REFUSED)
            if order is None:
                _end_now(0)
            loop.call_soon_threadsafe(self._orders.put_nowait, order)


def _start_serve() -> None:
    from ray import serve

    from calotype.serving.deployments.serve_config import QUIET_LOG

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(proxy_location="Disabled", logging_config=QUIET_LOG)
    except Exception as error:  # Ray raises whatever its processes could not do
        raise ModelLoadFailed(f"Ray Serve could not be started: {error}", retry_after=1) from error


def _end_now(status: int) -> NoReturn:
    """With everything that was started here: some of Ray's agents would stay for minutes."""
    own = os.getpid()
    for pid in session_members(own):  # nobody, where it leads no session
        if pid != own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    os._exit(status)


if __name__ == "__main__":
    main()
