"""The part of the job database about who may: teams, API keys, secrets of the service."""

from __future__ import annotations

import base64
import math
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine, select, update
from sqlalchemy.exc import IntegrityError

from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.core.protocols import Clock
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.schema.tables import api_keys, service_secrets, teams
from calotype.serving.jobs.records import KeyRecord, TeamRecord, new_id

_MAX_NAME_CHARS = 255
_COUNTS = ("requests_per_minute", "concurrent_jobs")
_AMOUNTS = ("gpu_seconds_per_day", "budget_per_month")
_OTHER_LIMITS = ("weight", "allowed_models", "policy", "prompt_in_files")


def make_webhook_secret() -> str:
    """``whsec_`` and 32 random bytes in standard base64, as Standard Webhooks wants it."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode("ascii")


class Teams:
    """Base of `JobStore`; every method may raise `StorageFailed`."""

    engine: Engine
    clock: Clock

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

    def _team(self, condition: Any) -> TeamRecord | None:
        with reading(self.engine) as connection:
            row = connection.execute(select(teams).where(condition)).mappings().first()
        return None if row is None else TeamRecord(**row)

    def add_key(self, key: KeyRecord) -> bool:
        """False when a key of the same digest is there already."""
        values = {name: getattr(key, name) for name in key.__dataclass_fields__}
        try:
            with writing(self.engine, durable=True) as connection:
                connection.execute(api_keys.insert().values(values))
        except IntegrityError:
            return False
        return True

    def find_key(self, digest: str) -> KeyRecord | None:
        """The key of that sha256, revoked or not."""
        with reading(self.engine) as connection:
            query = select(api_keys).where(api_keys.c.digest == digest)
            row = connection.execute(query).mappings().first()
        return None if row is None else KeyRecord(**row)

    def list_keys(self, team_id: str | None = None) -> list[KeyRecord]:
        query = select(api_keys).order_by(api_keys.c.created, api_keys.c.id)
        if team_id is not None:
            query = query.where(api_keys.c.team_id == team_id)
        with reading(self.engine) as connection:
            return [KeyRecord(**row) for row in connection.execute(query).mappings()]

    def revoke_key(self, key_id: str) -> bool:
        """False when there is no such key or it is revoked already."""
        with writing(self.engine, durable=True) as connection:
            changed = connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked.is_(None))
                .values(revoked=self.clock.time())
            )
        return changed.rowcount == 1

    def expire_key(self, key_id: str, moment: float) -> None:
        """Lets a key end at ``moment``: what a rotation does to the old one."""
        with writing(self.engine, durable=True) as connection:
            connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked.is_(None))
                .values(expires=moment)
            )

    def declare_keys(self, team: str, digests: Sequence[str], scopes: Sequence[str]) -> None:
        """Makes the declared keys of a team exactly these (sha256 hex of the whole key).

        Keys that were made by `create_key` are not touched.
        """
        team_id, now = self.ensure_team(team).id, self.clock.time()
        known = {key.digest: key for key in self.list_keys(team_id) if key.declared}
        for digest in digests:
            if digest in known:
                self._set_revoked(known[digest], None)
                continue
            key = KeyRecord(
                id=new_id("key"),
                team_id=team_id,
                name="declared",
                prefix="",
                digest=digest,
                scopes=list(scopes),
                created=now,
                declared=True,
            )
            self.add_key(key)
        for digest, key in known.items():
            if digest not in digests:
                self._set_revoked(key, now)

    def _set_revoked(self, key: KeyRecord, moment: float | None) -> None:
        if (key.revoked is None) != (moment is None):
            with writing(self.engine) as connection:
                connection.execute(
                    update(api_keys).where(api_keys.c.id == key.id).values(revoked=moment)
                )

    def webhook_secret(self, team_id: str) -> str:
        """What signs the webhooks that this team's jobs name; made at first use."""
        fresh = make_webhook_secret()
        with writing(self.engine) as connection:
            connection.execute(
                update(teams)
                .where(teams.c.id == team_id, teams.c.webhook_secret.is_(None))
                .values(webhook_secret=fresh)
            )
            query = select(teams.c.webhook_secret).where(teams.c.id == team_id)
            return str(connection.execute(query).scalar_one())

    def service_secret(self, name: str) -> bytes:
        """A random secret that every process of this service shares; made at first use."""
        found = self._secret(name)
        if found is not None:
            return found
        try:
            with writing(self.engine) as connection:
                connection.execute(
                    service_secrets.insert().values(name=name, value=secrets.token_bytes(32))
                )
        except IntegrityError:
            # Another process was first; its secret is the one.
            pass
        found = self._secret(name)
        if found is None:
            raise NotFound(f"The service secret {name!r} was deleted while it was made.")
        return found

    def _secret(self, name: str) -> bytes | None:
        query = select(service_secrets.c.value).where(service_secrets.c.name == name)
        with reading(self.engine) as connection:
            return connection.execute(query).scalar_one_or_none()


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
