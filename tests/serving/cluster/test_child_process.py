"""A child process: told things, heard, and ended with everything that it has started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from calotype.serving.cluster import remote_backend
from calotype.serving.cluster.child_process import ChildProcess, session_members
from calotype.serving.cluster.remote_backend import RemoteBackend
from calotype.serving.cluster.stand_in import StandIn
from calotype.serving.cluster.supervisor import RestartPolicy, Supervisor
from calotype.serving.core.errors import Overloaded
from calotype.serving.database.database import Database
from calotype.serving.wire.model_status import ModelAppStatus
from calotype.serving.wire.ray_host import HostOrder

ECHO = """
import argparse, json, os, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--listener", type=int)
parser.add_argument("--reports", type=int)
options = parser.parse_args()
reports = os.fdopen(options.reports, "w")
nothing = subprocess.DEVNULL
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
grandchild = subprocess.Popen(sleep, stdin=nothing, stdout=nothing)
def tell(**report):
    print(json.dumps(report), file=reports, flush=True)
tell(kind="said", text=str(grandchild.pid))
for line in sys.stdin:
    order = json.loads(line)
    tell(kind="applied", number=order["number"], text=order["token"])
tell(kind="failed", text="nobody is there")
"""


@pytest.fixture
async def child() -> AsyncIterator[ChildProcess]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = await ChildProcess.start([sys.executable, "-c", ECHO], listener, os.environ)
        yield child
        await child.kill()
        await child.wait()


async def test_it_hears_orders_and_is_heard(child: ChildProcess) -> None:
    reports = child.reports()
    await anext(reports)
    for number in (1, 2):
        child.order(HostOrder(number=number, applications=[], token="secret"))
        answer = await anext(reports)
        assert (answer.kind, answer.number, answer.text) == ("applied", number, "secret")


async def test_the_token_is_in_no_representation() -> None:
    assert "secret" not in repr(HostOrder(number=1, applications=[], token="secret"))


async def test_a_kill_takes_orphans_with_it(child: ChildProcess) -> None:
    orphan = int((await anext(child.reports())).text)
    leader = child.pid
    assert {leader, orphan} <= set(session_members(leader))
    os.kill(leader, 9)
    assert await child.wait() == -9
    assert orphan in session_members(leader), "it outlives the one who started it"
    await child.kill()
    await until(lambda: not running(orphan))


async def test_a_child_that_was_killed_is_heard_to_be_gone(child: ChildProcess) -> None:
    reports = child.reports()
    await anext(reports)
    os.kill(child.pid, 9)
    assert [report async for report in reports] == []


async def test_the_end_of_whoever_supervises_is_the_end_of_its_input(
    tmp_path: pathlib.Path,
) -> None:
    """Also when that was killed and could not say anything."""
    parent = """
import asyncio, os, socket, sys
from calotype.serving.cluster import remote_backend
from calotype.serving.cluster.child_process import ChildProcess
async def main():
    listener = socket.create_server(("127.0.0.1", 0))
    child = await ChildProcess.start([sys.executable, "-c", sys.argv[1]], listener, os.environ)
    print((await anext(child.reports())).text, child.pid, flush=True)
    await child.wait()
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", parent, ECHO), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    grandchild, child = map(int, (await process.stdout.readline()).split())
    process.kill()
    try:
        await until(lambda: not running(child))
        await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(grandchild, 9)


def running(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(600):
        while not holds():
            await asyncio.sleep(0.01)


# -- who answers on its socket without it ----------------------------------------------------------


@pytest.fixture
async def stand_in() -> AsyncIterator[tuple[StandIn, socket.socket, list[bool]]]:
    healthy: list[bool] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        problem = Overloaded("Away.", retry_after=25, details={"estimated_seconds": 25.0})
        stand_in = StandIn(listener, lambda: problem, lambda: bool(healthy))
        await stand_in.open()
        yield stand_in, listener, healthy
        stand_in.close()


async def test_without_a_model_app_callers_are_told_when_it_is_expected(
    stand_in: tuple[StandIn, socket.socket, list[bool]], tmp_path: pathlib.Path
) -> None:
    port = stand_in[1].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        answer = await client.post("/internal/v1/moderate", content=b"x" * 3_000_000)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_not_ready"
        assert answer.json()["error"]["details"] == {"estimated_seconds": 25.0}
    database = Database.open(f"sqlite:///{tmp_path}/jobs.db")
    backend = RemoteBackend(database, "internal-token")
    backend.endpoints = {"shapes": f"http://127.0.0.1:{port}/shapes"}
    (status,) = await backend.status()
    assert (status.ready, status.message, status.away_seconds) == (False, "Away.", 25)
    await backend.close()
    database.close()


async def test_the_kubelet_is_told_whether_there_is_hope(
    stand_in: tuple[StandIn, socket.socket, list[bool]],
) -> None:
    url = f"http://127.0.0.1:{stand_in[1].getsockname()[1]}/-/healthz"
    async with httpx.AsyncClient(timeout=600) as client:
        assert (await client.get(url)).status_code == 503
        stand_in[2].append(True)
        assert (await client.get(url)).status_code == 200


async def test_the_socket_is_handed_over_without_a_gap(
    stand_in: tuple[StandIn, socket.socket, list[bool]],
) -> None:
    async def app(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    spare, listener, _ = stand_in
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/internal/v1/status"
    seen = []
    async with httpx.AsyncClient(timeout=600) as client:
        for _ in range(3):
            server = await asyncio.start_server(app, sock=listener.dup())
            spare.close()
            seen.append((await client.get(url)).status_code)
            server.close()
            await spare.open()
            seen.append((await client.get(url)).status_code)
    assert seen == [200, 503] * 3


async def test_a_connection_of_an_app_that_died_does_not_hide_the_stand_in(
    stand_in: tuple[StandIn, socket.socket, list[bool]],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_backend, "STATUS_AGE", 0.0)
    alive: list[asyncio.StreamWriter] = []

    async def app(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        alive.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        body = ModelAppStatus(name="shapes", ready=True).model_dump_json(by_alias=True).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    spare, listener, _ = stand_in
    database = Database.open(f"sqlite:///{tmp_path}/jobs.db")
    backend = RemoteBackend(database, "internal-token")
    backend.endpoints = {"shapes": f"http://127.0.0.1:{listener.getsockname()[1]}/shapes"}
    spare.close()
    server = await asyncio.start_server(app, sock=listener.dup())
    assert [status.ready for status in await backend.status()] == [True]
    server.close()
    asking = asyncio.create_task(backend.status())
    await asyncio.sleep(0)
    for writer in alive:
        writer.transport.abort()
    await spare.open()
    assert [status.away_seconds for status in await asking] == [25]
    await backend.close()
    database.close()


async def test_garbage_is_no_harm(stand_in: tuple[StandIn, socket.socket, list[bool]]) -> None:
    port = stand_in[1].getsockname()[1]
    for data in (b"", b"\r\n\r\n", b"GET", b"\xff" * 100_000 + b"\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        with contextlib.suppress(OSError):
            writer.write_eof()
            await reader.read()
        writer.close()
    async with httpx.AsyncClient(timeout=600) as client:
        answer = await client.get(f"http://127.0.0.1:{port}/x")
    assert json.loads(answer.content)["error"]["code"] == "model_not_ready"


HOST = """
import json, os, sys, time
reports = os.fdopen(int(sys.argv[-1]), "wb", buffering=0)
for kind in ("started", "serving", *["alive"] * 100_000):
    reports.write(json.dumps({"kind": kind}).encode() + b"\\n")
    time.sleep(0.05)
"""


async def test_a_child_that_hangs_is_killed_and_followed_by_another() -> None:
    children: list[ChildProcess] = []
    said: list[str] = []

    async def launch() -> ChildProcess:
        with socket.socket() as listener:
            command = [sys.executable, "-c", HOST]
            children.append(await ChildProcess.start(command, listener, dict(os.environ)))
        return children[-1]

    policy = RestartPolicy(silent_seconds=5, pauses=(0.1,))
    supervisor = Supervisor(launch, "token", said.append, policy)
    turns: asyncio.Queue[bool] = asyncio.Queue()
    supervisor.on_change = turns.put
    running = asyncio.create_task(supervisor.run())
    try:
        async with asyncio.timeout(240):
            assert [await turns.get() for _ in range(2)] == [False, True]
            supervisor.want([{"name": "large", "text": "x" * 1_000_000}])
            os.kill(children[0].pid, signal.SIGSTOP)
            assert [await turns.get() for _ in range(2)] == [False, True]
            assert await children[0].wait() == -signal.SIGKILL
        assert len(children) == 2, "a child that says that it lives is left alone"
        assert any("hangs: it has said nothing for 5 s" in sentence for sentence in said)
    finally:
        await supervisor.kill()
        await running
