"""Follows the file in which the operator tells the gateways what is on offer and to whom.

What cannot be used changes nothing: the last good content stays, and one sentence says why.
"""

from __future__ import annotations

import asyncio
import logging
import math
import pathlib
import time
from collections.abc import Callable, Sequence

from calotype.serving.api.state.catalog import Catalog
from calotype.serving.cluster.config_map import ConfigMapReader
from calotype.serving.cluster.remote_backend import RemoteBackend
from calotype.serving.core.errors import CalotypeError
from calotype.serving.database.database import Database
from calotype.serving.wire.gateway_config import (
    DeclaredTeam,
    GatewayConfig,
    parse_gateway_config,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""A changed ConfigMap switches a symbolic link, which no file watcher follows reliably."""
REFRESH_SECONDS = 0.5
"""Between two looks that were not due, however many ask for what is not known."""


class ConfigFollower:
    """Brings catalog, endpoints and teams to what the file says.

    Args:
        say: where sentences for whoever reads the log go.
        newest: knows what will be in the file, and is believed where it answers.
    """

    def __init__(
        self,
        path: pathlib.Path,
        catalog: Catalog,
        backend: RemoteBackend,
        database: Database,
        say: Callable[[str], None],
        newest: ConfigMapReader | None = None,
    ) -> None:
        self._path, self._catalog, self._backend = path, catalog, backend
        self._database, self._say, self._newest = database, say, newest
        self._heard = False
        """Whether ``newest`` has ever answered: the file may be older than what we have then."""
        self._looking = asyncio.Lock()
        self._looked = -math.inf
        self._seen: bytes | None = None
        self._teams: tuple[DeclaredTeam, ...] | None = None
        self._told = ""

    async def follow(self) -> None:
        """Looks again and again, for ever."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.look()
            except Exception:  # a bug of ours must not leave the gateway with what it has for ever
                log.exception("looking at %s failed", self._path)

    async def refresh(self) -> bool:
        """Looks now, as somebody asks for what is not known; says whether anything is new."""
        before, asked = self._seen, time.monotonic()
        async with self._looking:
            if self._looked < asked:  # else somebody has looked since, for all who wait
                await asyncio.sleep(self._looked + REFRESH_SECONDS - time.monotonic())
                await self._look()
        return self._seen is not before

    async def look(self) -> None:
        """Takes the content if it changed."""
        async with self._looking:
            await self._look()

    async def _look(self) -> None:
        self._looked = time.monotonic()
        try:
            raw = await self._read()
            if raw is None or raw == self._seen:
                return
            config = parse_gateway_config(raw, self._path)
            self._offer(config)
            # Last, because the job database may be away: then all of it is done again.
            await asyncio.to_thread(self._declare, tuple(config.teams))
        except OSError as error:
            if self._seen is None and isinstance(error, FileNotFoundError):
                self._tell(f"There is no {self._path} yet: no models and no teams are known.")
                return
            self._complain(f"{self._path} cannot be read ({error.strerror}).")
        except CalotypeError as error:
            self._complain(error.message)
        else:
            self._seen, self._told = raw, ""
            names = ", ".join(served.manifest.name for served in config.models)
            self._say(f"The configuration is used: {names or 'no model'}.")

    async def _read(self) -> bytes | None:
        """None = nothing is known beside what is used already."""
        found = None if self._newest is None else await self._newest.read()
        if found is not None:
            self._heard = True
        if self._heard:
            return found
        return await asyncio.to_thread(self._path.read_bytes)

    def _offer(self, config: GatewayConfig) -> None:
        closed = {team.name: team.refusal for team in config.teams if team.refusal}
        self._catalog.replace(
            [served.manifest for served in config.models], config.adapters, closed
        )
        self._backend.endpoints = {
            served.manifest.name: url for served in config.models if (url := served.url)
        }

    def _declare(self, teams: Sequence[DeclaredTeam]) -> None:
        """Makes the declared teams and keys of the job database exactly these."""
        if self._teams == teams:
            return
        for team in teams:
            if self._teams is None or team not in self._teams:
                self._database.api_keys.declare_team(team.payload())
        kept = {team.name for team in teams}
        declared = {key.team_id for key in self._database.api_keys.list_keys() if key.declared}
        for record in self._database.teams.list_teams():
            if record.id in declared and record.name not in kept:
                self._database.api_keys.declare_keys(record.name, [], [])
        self._teams = tuple(teams)

    def _complain(self, problem: str) -> None:
        self._tell(f"The configuration is not used; the last good one stays. {problem}")

    def _tell(self, sentence: str) -> None:
        """Once, however often it is found again."""
        if sentence != self._told:
            self._told = sentence
            self._say(sentence)
