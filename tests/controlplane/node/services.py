"""Services: their addresses really listen, and every pod knows them by name."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from controlplane.client.objects import Object
from controlplane.processes.network import join

Key = tuple[str, str]
API = ("default", "kubernetes")
CONNECT_SECONDS = 5.0


class Services:
    """Follows Services and EndpointSlices; `changed` is called after each round of changes."""

    def __init__(self, api_port: int, changed: Callable[[], None]) -> None:
        self._api_port, self._changed = api_port, changed
        self.services: dict[Key, Object] = {}
        self._slices: dict[Key, Object] = {}
        self._servers: dict[tuple[str, int], asyncio.Server] = {}
        self._due = asyncio.Event()

    def handle(self, change: str, found: Object) -> None:
        """Takes a change of a watch."""
        meta = found["metadata"]
        store = self.services if found["kind"] == "Service" else self._slices
        if change == "DELETED":
            store.pop((meta["namespace"], meta["name"]), None)
        else:
            store[meta["namespace"], meta["name"]] = found
        self._due.set()

    async def run(self) -> None:
        """Listens where the Services say, for ever."""
        while True:
            await self._due.wait()
            await asyncio.sleep(0.02)  # one round for changes that come together
            self._due.clear()
            await self._listen()
            self._changed()

    def endpoints(self, key: Key) -> list[tuple[str, dict[str, int]]]:
        """Address and ports by name of each ready endpoint of a Service."""
        found = []
        for piece in self._slices.values():
            meta = piece["metadata"]
            service = meta.get("labels", {}).get("kubernetes.io/service-name")
            if (meta["namespace"], service) != key:
                continue
            ports = {p.get("name") or "": int(p["port"]) for p in piece.get("ports") or []}
            for endpoint in piece.get("endpoints") or []:
                if endpoint.get("conditions", {}).get("ready", True):
                    found += [(address, ports) for address in endpoint["addresses"]]
        return found

    def hosts(self, namespace: str) -> str:
        """Lines of /etc/hosts as a pod of this namespace knows the Services."""
        lines = []
        for (where, name), service in sorted(self.services.items()):
            address = service["spec"].get("clusterIP")
            addresses = {address} if address and address != "None" else set()
            if address == "None":
                addresses = {ip for ip, _ in self.endpoints((where, name))}
            full = f"{name}.{where}.svc"
            names = [f"{full}.cluster.local", full, f"{name}.{where}"]
            if where == namespace:
                names.append(name)
            lines += [f"{one} {' '.join(names)}\n" for one in sorted(addresses)]
        return "".join(lines)

    async def _listen(self) -> None:
        wanted: dict[tuple[str, int], tuple[Key, str]] = {}
        for key, service in self.services.items():
            address = service["spec"].get("clusterIP")
            for port in service["spec"].get("ports", []):
                if address not in (None, "", "None") and port.get("protocol", "TCP") == "TCP":
                    wanted[address, port["port"]] = (key, port.get("name") or "")
        for gone in self._servers.keys() - wanted.keys():
            self._servers.pop(gone).close()
        for (address, number), (key, name) in wanted.items():
            if (address, number) not in self._servers:
                try:
                    server = await asyncio.start_server(self._carrier(key, name), address, number)
                except OSError as error:
                    print(f"service {key} at {address}:{number}: {error}", flush=True)
                else:
                    self._servers[address, number] = server

    def _carrier(self, key: Key, port: str) -> Callable[..., Any]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                host, number = self._target(key, port)
                async with asyncio.timeout(CONNECT_SECONDS):
                    inner_reader, inner_writer = await asyncio.open_connection(host, number)
            except (OSError, TimeoutError, LookupError):
                writer.transport.abort()  # refused, as where a Service has no endpoint
                return
            await join((reader, writer), (inner_reader, inner_writer))

        return serve

    def _target(self, key: Key, port: str) -> tuple[str, int]:
        if key == API:
            return "127.0.0.1", self._api_port
        address, ports = random.choice(self.endpoints(key))
        return address, ports[port]


def write_in_place(file: Path, text: str) -> None:
    """Changes a file that is bound into containers: another file of that name would not be seen."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
