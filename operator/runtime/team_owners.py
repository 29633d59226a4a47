"""Asks the gateways whose the names of teams are: the job database knows, and the operator has no
way to it."""

from __future__ import annotations

import time
from collections.abc import Callable

from pydantic import ValidationError

from calotype.operator.runtime.model_app import ModelApps, NoAnswer
from calotype.operator.settings import OperatorSettings
from calotype.serving.wire.team_owners import TEAMS_PATH, OwnedTeam, TeamOwners, operator_token

AGE_SECONDS = 10.0
"""An answer is good for so long, for a hundred Teams may ask at once."""


class TeamOwnersReader:
    """What the gateways answer."""

    def __init__(
        self,
        apps: ModelApps,
        settings: OperatorSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._apps, self._settings, self._clock = apps, settings, clock
        self._asked = float("-inf")
        self._known: dict[str, OwnedTeam] = {}

    async def owner_of(self, name: str) -> OwnedTeam | None:
        """The team of that name; None = there is none, or no gateway answers."""
        if self._settings.internal_token_secret_ref is None:
            return None
        if self._clock() - self._asked > AGE_SECONDS:
            self._asked = self._clock()
            try:
                url = f"{self._settings.job_store_url}{TEAMS_PATH}"
                answer = TeamOwners.model_validate_json(await self._apps.get(url, operator_token))
            except (NoAnswer, ValidationError):
                return None
            self._known = {team.name: team for team in answer.teams}
        return self._known.get(name)
