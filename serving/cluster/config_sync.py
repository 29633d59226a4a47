"""Follows the files in which the operator tells the gateways what is on offer and to whom.

What cannot be used changes nothing: the last good content stays, and one sentence says why. The
teams are a file of their own, and come first: no other mistake keeps a key valid that was revoked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence

from calotype.serving.api.state.catalog import Catalog
from calotype.serving.cluster.followed_file import FollowedFile
from calotype.serving.cluster.remote_backend import RemoteBackend
from calotype.serving.core.errors import CalotypeError, Conflict
from calotype.serving.database.accounts.teams import TeamOwner
from calotype.serving.database.database import Database
from calotype.serving.wire.document import parse_document
from calotype.serving.wire.gateway_config import GatewayConfig
from calotype.serving.wire.gateway_teams import DeclaredTeam, GatewayTeams

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""A changed ConfigMap switches a symbolic link, which no file watcher follows reliably."""
REFRESH_SECONDS = 0.5
"""Between two looks that were not due, however many ask for what is not known."""


class ConfigFollower:
    """Brings catalog, endpoints and teams to what the files say.

    Args:
        config: gateway.json.
        teams: teams.json.
        say: where sentences for whoever reads the log go.
    """

    def __init__(
        self,
        config: FollowedFile,
        teams: FollowedFile,
        catalog: Catalog,
        backend: RemoteBackend,
        database: Database,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._team_file = config, teams
        self._catalog, self._backend = catalog, backend
        self._database, self._say = database, say
        self._looking = asyncio.Lock()
        self._looked = -math.inf
        self._declared: list[DeclaredTeam] = []
        """The teams as the database has them."""
        self._told: dict[FollowedFile, str] = {}

    async def work(self) -> float:
        """Takes the contents that changed; the pause until the next look."""
        await self.look()
        return POLL_SECONDS

    async def refresh(self) -> bool:
        """Looks now, as somebody asks for what is not known; says whether anything is new."""
        before, asked = self._used(), time.monotonic()
        async with self._looking:
            if self._looked < asked:  # else somebody has looked since, for all who wait
                await asyncio.sleep(self._looked + REFRESH_SECONDS - time.monotonic())
                await self._look()
        return self._used() != before

    async def look(self) -> None:
        """Takes the contents that changed."""
        async with self._looking:
            await self._look()

    async def close(self) -> None:
        await self._config.close()
        await self._team_file.close()

    def _used(self) -> tuple[int, int]:
        return id(self._team_file.used), id(self._config.used)

    async def _look(self) -> None:
        self._looked = time.monotonic()
        await self._take(self._team_file, self._take_teams)
        await self._take(self._config, self._take_config)

    async def _take(self, file: FollowedFile, take: Callable[[bytes], Awaitable[str]]) -> None:
        try:
            raw = await file.read()
            if raw is None:
                return
            sentence = await take(raw)
        except OSError as error:
            if file.used is None and isinstance(error, FileNotFoundError):
                self._tell(file, f"There is no {file.path} yet: nothing of it is known.")
                return
            self._complain(file, f"{file.path} cannot be read ({error.strerror}).")
        except CalotypeError as error:
            self._complain(file, error.message)
        else:
            file.used = raw
            self._told.pop(file, None)
            self._say(sentence)

    async def _take_config(self, raw: bytes) -> str:
        config = parse_document(GatewayConfig, raw, self._config.path)
        models = [served.manifest for served in config.models]
        self._catalog.replace(models, config.adapters, config.default_model)
        self._backend.default_model = config.default_model
        self._backend.namespaces = {model.name: model.metadata.namespace for model in models}
        self._backend.endpoints = {
            served.manifest.name: url for served in config.models if (url := served.url)
        }
        names = ", ".join(served.manifest.name for served in config.models)
        return f"The configuration is used: {names or 'no model'}."

    async def _take_teams(self, raw: bytes) -> str:
        teams = parse_document(GatewayTeams, raw, self._team_file.path).teams
        refused = await asyncio.to_thread(self._declare, teams)
        closed = {team.name: team.refusal for team in teams if team.refusal}
        # A team that is not the manifest's is not closed by the manifest either.
        self._catalog.close({name: why for name, why in closed.items() if name not in refused})
        for sentence in refused.values():
            self._say(sentence)
        return f"{len(teams) - len(refused)} teams are known."

    def _declare(self, teams: Sequence[DeclaredTeam]) -> dict[str, str]:
        """Makes the declared teams and keys of the job database exactly these.

        Returns:
            The names that belong to other teams, with a sentence each.
        """
        keys, refused = self._database.api_keys, dict[str, str]()
        for team in teams:
            if team in self._declared:
                continue
            try:
                keys.declare_team(team.payload(), TeamOwner(team.namespace, team.uid))
            except Conflict as error:
                refused[team.name] = error.message
        kept = {team.name for team in teams} - refused.keys()
        declared = {key.team_id for key in keys.list_keys() if key.declared}
        for record in self._database.teams.list_teams():
            if record.id in declared and record.name not in kept:
                keys.declare_keys(record.name, [], [])
        self._declared = [team for team in teams if team.name in kept]
        return refused

    def _complain(self, file: FollowedFile, problem: str) -> None:
        self._tell(file, f"The configuration is not used; the last good one stays. {problem}")

    def _tell(self, file: FollowedFile, sentence: str) -> None:
        """Once, however often it is found again."""
        if sentence != self._told.get(file):
            self._told[file] = sentence
            self._say(sentence)
