"""Teams in the job database, and their limits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sqlalchemy import exists, select, update
from sqlalchemy.exc import IntegrityError

from calotype.serving.core.errors import Conflict, InvalidRequest, NotFound
from calotype.serving.database.accounts.quotas import RateState, locked_team, take_token
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository
from calotype.serving.database.schema.tables import api_keys, teams
from calotype.serving.jobs.records import TeamRecord, new_id

_MAX_NAME_CHARS = 255
_COUNTS = ("requests_per_minute", "concurrent_jobs")
_AMOUNTS = ("gpu_seconds_per_day", "budget_per_month")
_OTHER_LIMITS = ("weight", "allowed_models", "policy", "prompt_in_files")


@dataclass(frozen=True, slots=True)
class TeamOwner:
    """The Team object that a team belongs to."""

    namespace: str
    uid: str


class Teams(Repository):
    """Teams and their limits."""

    def ensure_team(self, name: str, weight: float = 1.0) -> TeamRecord:
        """The team of that name, made when it is missing.

        Raises:
            InvalidRequest: the name is empty or too long.
        """
        if not 1 <= len(name) <= _MAX_NAME_CHARS or not name.isprintable():
            raise InvalidRequest(
                f"The name of a team has 1 to {_MAX_NAME_CHARS} printable characters.",
                param="team",
            )
        found = self._team(teams.c.name == name)
        if found is not None:
            return found
        values = {
            "id": new_id("team"),
            "name": name,
            "weight": weight,
            "created": self.clock.time(),
            "prompt_in_files": False,
        }
        try:
            with writing(self.engine) as connection:
                connection.execute(teams.insert().values(values))
        except IntegrityError:
            # Another process made it a moment ago; what it wrote is the answer.
            pass
        found = self._team(teams.c.name == name)
        if found is None:
            raise NotFound(f"The team {name!r} was deleted while it was looked up.")
        return found

    def claim(self, name: str, owner: TeamOwner, *, take_over: bool = False) -> TeamRecord:
        """The team of that name, for its Team object; made when there is none.

        A name is given out once: a team that an administrator made, or that belongs to another
        object (a deleted one too), is not taken up with its jobs and pictures.

        Args:
            take_over: an administrator says that it is.

        Raises:
            Conflict: the name is another team's.
        """
        known = self._team(teams.c.name == name)
        found = known or self.ensure_team(name)
        if (found.namespace, found.uid) == (owner.namespace, owner.uid):
            return found
        nobodys = teams.c.uid.is_(None)
        if take_over:
            free = teams.c.id == found.id
        elif known is None:
            free = nobodys
        else:
            # Declared by a version that did not know owners, and still declared: the first owner.
            free = nobodys & exists().where(
                api_keys.c.team_id == teams.c.id, api_keys.c.declared, api_keys.c.revoked.is_(None)
            )
        values = {"namespace": owner.namespace, "uid": owner.uid}
        with writing(self.engine, durable=True) as connection:
            connection.execute(update(teams).where(teams.c.id == found.id, free).values(values))
        found = self.get_team(found.id) or found
        if (found.namespace, found.uid) != (owner.namespace, owner.uid):
            raise Conflict(_taken(found, owner))
        return found

    def set_team(self, name: str, **changes: Any) -> TeamRecord:
        """Sets weight and limits of a team, made when it is missing; what is not named stays.

        Args:
            changes: fields of `TeamRecord`: ``weight``, ``requests_per_minute``,
                ``concurrent_jobs``, ``gpu_seconds_per_day``, ``budget_per_month``,
                ``allowed_models``, ``policy``, ``prompt_in_files``.

        Raises:
            InvalidRequest: a limit is unknown, negative or no number.
        """
        for field, value in changes.items():
            _check_limit(field, value)
        team = self.ensure_team(name)
        if changes:
            with writing(self.engine) as connection:
                connection.execute(update(teams).where(teams.c.id == team.id).values(changes))
        return self.get_team(team.id) or team

    def list_teams(self) -> list[TeamRecord]:
        with reading(self.engine) as connection:
            rows = connection.execute(select(teams).order_by(teams.c.name)).mappings()
            return [TeamRecord(**row) for row in rows]

    def get_team(self, team_id: str) -> TeamRecord | None:
        return self._team(teams.c.id == team_id)

    def take_request(self, team_id: str) -> RateState | None:
        """Counts a request that makes no job against the team's `requests_per_minute`.

        Returns:
            The state of the limit, if the team has one.

        Raises:
            QuotaExceeded: the limit is reached.
        """
        team = self.get_team(team_id)
        if team is None or team.requests_per_minute is None:
            return None
        with writing(self.engine) as connection:
            return take_token(connection, locked_team(connection, team_id), self.clock.time())

    def _team(self, condition: Any) -> TeamRecord | None:
        with reading(self.engine) as connection:
            row = connection.execute(select(teams).where(condition)).mappings().first()
        return None if row is None else TeamRecord(**row)


def _taken(team: TeamRecord, owner: TeamOwner) -> str:
    whose = "an administrator made"
    if team.uid is not None:
        whose = f"belongs to the Team of namespace {team.namespace} with uid {team.uid or 'none'}"
    return (
        f"The name of the Team {owner.namespace}/{team.name} is taken: there is a team of this "
        f"name that {whose}, with its jobs and pictures. Give the Team another name; an "
        "administrator can hand the old one over (takes in operator.settings.teamGrants)."
    )


def _check_limit(field: str, value: Any) -> None:
    if field not in (*_COUNTS, *_AMOUNTS, *_OTHER_LIMITS):
        raise InvalidRequest(f"A team has no limit {field!r}.", param=field)
    if value is None and field not in ("weight", "prompt_in_files"):
        return
    if field in (*_COUNTS, *_AMOUNTS, "weight"):
        number = isinstance(value, int if field in _COUNTS else int | float)
        fits = number and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if not fits or (field == "weight" and value <= 0):
            raise InvalidRequest(
                f"{field} must be a {'whole ' if field in _COUNTS else ''}number of at least 0 "
                f"({'above 0' if field == 'weight' else 'or nothing for no limit'}); "
                f"got {value!r}.",
                param=field,
            )
