"""A gateway within a limit of memory, asked for the largest that each of its routes takes.

A child of `test_memory`; ``argv`` is a folder and the limit in bytes. It prints a JSON object: the
status of every request, and the most memory that the process had.
"""

from __future__ import annotations

import resource
import sys

LIMIT = int(sys.argv[2])
# Of the data segment, which is what counts against a pod's limit; libraries are shared.
resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))

import asyncio  # noqa: E402
import base64  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import secrets  # noqa: E402
from collections.abc import Generator, Iterable, Sequence  # noqa: E402
from typing import Any  # noqa: E402
from urllib.parse import urlsplit  # noqa: E402

from PIL import Image  # noqa: E402
from servers.routes import routes_of  # noqa: E402

from calotype.serving.api.app import create_app  # noqa: E402
from calotype.serving.api.background.batch_runner import BatchRunner  # noqa: E402
from calotype.serving.api.routes.moderations import MAX_PIXELS  # noqa: E402
from calotype.serving.api.state.catalog import Catalog  # noqa: E402
from calotype.serving.api.state.settings import GatewaySettings  # noqa: E402
from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL  # noqa: E402
from calotype.serving.core.protocols import PART_BYTES, OpenBlob  # noqa: E402
from calotype.serving.database.connection import sqlite_url  # noqa: E402
from calotype.serving.database.database import Database  # noqa: E402
from calotype.serving.testing.in_memory import MemoryBlobStore, PaintingBackend  # noqa: E402

MEGABYTE = 2**20
LARGE = 150 * MEGABYTE
"""Of each stored picture."""


class HugeBlobs(MemoryBlobStore):
    """Pictures that are large when they are read; of written files only the size is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}

    def put_parts(self, key: str, parts: Iterable[bytes]) -> None:
        self.sizes[key] = sum(map(len, parts))

    def get(self, key: str) -> bytes:
        return bytes(LARGE) if key.endswith(".png") else super().get(key)

    def open(self, key: str) -> OpenBlob:
        if not key.endswith(".png") and key not in self.sizes:
            return super().open(key)
        size = self.sizes.get(key, LARGE)

        def parts() -> Generator[bytes]:
            for start in range(0, size, PART_BYTES):
                yield bytes(min(PART_BYTES, size - start))

        return OpenBlob(size, parts())


def bomb(pixels: int, mode: str, kind: str = "PNG", **more: Any) -> bytes:
    """A small file that is a large picture."""
    side, file = int(pixels**0.5), io.BytesIO()
    Image.new(mode, (side, side), 0).save(file, kind, compress_level=1, **more)
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def form(*parts: tuple[str, str, list[bytes]]) -> tuple[list[bytes], str]:
    """(name, file name or "", content) of each -> body in pieces, content type."""
    mark, body = secrets.token_hex(8), []
    for name, filename, content in parts:
        named = f'; filename="{filename}"' if filename else ""
        head = f'--{mark}\r\ncontent-disposition: form-data; name="{name}"{named}\r\n\r\n'
        body += [head.encode(), *content, b"\r\n"]
    return [*body, f"--{mark}--\r\n".encode()], f"multipart/form-data; boundary={mark}"


class Attacker:
    def __init__(self, app: Any, key: str) -> None:
        self.app, self.key = app, key
        self.statuses: dict[str, int] = {}

    async def ask(
        self,
        method: str,
        path: str,
        body: Sequence[bytes] = (),
        kind: str = "application/json",
    ) -> bytes:
        """One request; of the answer only the beginning is kept."""
        parts, left, size = urlsplit(path), iter(body), sum(map(len, body))
        head, status, ended = bytearray(), 0, False
        headers = {"authorization": f"Bearer {self.key}", "content-type": kind, "host": "gateway"}
        headers |= {"content-length": str(size), "prefer": "wait=20"}
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": parts.path, "raw_path": parts.path.encode(),
            "query_string": parts.query.encode(), "root_path": "", "server": ("gateway", 80),
            "client": ("127.0.0.1", 1), "app": self.app,
            "headers": [(n.encode(), v.encode()) for n, v in headers.items()],
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            nonlocal ended
            if ended:
                await asyncio.Event().wait()
            part = next(left, b"")
            ended = not part
            return {"type": "http.request", "body": part, "more_body": not ended}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            for name, value in message.get("headers", ()):
                if name == b"location":
                    head.extend(value)
            head.extend(message.get("body", b"")[: max(0, 4000 - len(head))])

        await self.app(scope, receive, send)
        self.statuses[f"{method} {parts.path}"] = status
        return bytes(head)

    async def send_json(self, path: str, **body: Any) -> bytes:
        return await self.ask("POST", path, [json.dumps(body).encode()])


async def send_to_check(attacker: Attacker, mode: str) -> None:
    """A picture that unfolds."""
    part = {"type": "image_url", "image_url": {"url": data_url(bomb(MAX_PIXELS, mode))}}
    await attacker.send_json("/v1/moderations", input=[part])


async def send_edit(attacker: Attacker) -> None:
    """A picture that unfolds; its job is not drawn, for here the generator would unfold it too."""
    photo, mask = [bomb(49_000_000, "RGB")], [bomb(49_000_000, "LA")]
    parts = ("image", "a.png", photo), ("mask", "m.png", mask), ("prompt", "", [b"x"])
    parts += (("deadline_seconds", "", [b"0.5"]),)
    await attacker.ask("POST", "/v1/images/edits", *form(*parts))


async def send_file(attacker: Attacker) -> None:
    file = ("file", "a.bin", [bytes(MEGABYTE)] * 100)
    await attacker.ask("POST", "/v1/files", *form(("purpose", "", [b"user_data"]), file))


async def send_everywhere(attacker: Attacker) -> None:
    """Every route: nonsense of the largest size."""
    nonsense = json.dumps({"input": "", "prompt": "A" * MEGABYTE})
    pieces = [nonsense[:-2].encode(), *[b"A" * MEGABYTE] * 30, b'"}']
    for method, path in sorted(routes_of(attacker.app.routes)):
        await attacker.ask(method, path, pieces if method == "POST" else ())


async def fetch(attacker: Attacker, gateway: Any) -> None:
    """Pictures, answers and a batch that are larger than the memory."""
    database, wanted = gateway.database, {"prompt": "x", "n": 4, "size": "128x128"}
    line = {"custom_id": "a", "url": "/v1/images/generations", "body": wanted}
    body, kind = form(("purpose", "", [b"batch"]), ("file", "b.jsonl", [json.dumps(line).encode()]))
    file = json.loads(await attacker.ask("POST", "/v1/files", body, kind))
    asked = {"endpoint": line["url"], "completion_window": "24h", "input_file_id": file["id"]}
    batch_id = json.loads(await attacker.send_json("/v1/batches", **asked))["id"]
    runner = BatchRunner(gateway)
    while (batch := database.batches.get_batch(batch_id)).status == "in_progress":
        await runner.work_once()
    await attacker.ask("GET", f"/v1/files/{batch.output_file_id}/content")
    await attacker.send_json("/v1/images/generations", **wanted)
    [job, *_] = database.jobs.list_jobs(batch.team_id, limit=1)
    picture = f"/v1/assets/{job.output['images'][0]['asset_id']}/content"
    await attacker.ask("GET", (await attacker.ask("GET", picture)).decode())


async def attack(folder: pathlib.Path) -> dict[str, int]:
    database, blobs = Database.open(sqlite_url(folder)), HugeBlobs()
    backend = PaintingBackend(database, blobs)
    app = create_app(
        GatewaySettings(webhook_seconds=None, batch_seconds=None, sweep_seconds=None),
        database,
        blobs,
        backend,
        Catalog([BUILT_IN_MODEL], [BUILT_IN_ADAPTER]),
        backend.lifespan,
    )
    attacker = Attacker(app, database.api_keys.create()[0])
    async with app.router.lifespan_context(app):
        await send_everywhere(attacker)
        checked = (send_to_check(attacker, mode) for mode in ("LA", "I;16"))
        await asyncio.to_thread(backend.pause)
        await asyncio.gather(*checked, send_edit(attacker), send_file(attacker))
        backend.resume()
        await fetch(attacker, app.state.gateway)
    return attacker.statuses


if __name__ == "__main__":
    statuses = asyncio.run(attack(pathlib.Path(sys.argv[1])))
    # Not getrusage's: that one counts what whoever started this process held when it forked.
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps({"statuses": statuses, "peak": peak}))
