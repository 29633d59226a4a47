"""The part of the job database about who may: teams, API keys, secrets of the service."""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import Engine, select, update
from sqlalchemy.exc import IntegrityError

from calotype.serving.errors import NotFound
from calotype.serving.jobs.database import reading, writing
from calotype.serving.jobs.records import KeyRecord, TeamRecord, new_id
from calotype.serving.jobs.tables import api_keys, service_secrets, teams
from calotype.serving.protocols import Clock


class Accounts:
    """Base of `JobStore`; every method may raise `StorageFailed`."""

    engine: Engine
    clock: Clock

    def ensure_team(self, name: str, weight: float = 1.0) -> TeamRecord:
        """The team of that name, made when it is missing."""
        found = self._team(teams.c.name == name)
        if found is not None:
            return found
        values = {
            "id": new_id("team"),
            "name": name,
            "weight": weight,
            "created": self.clock.time(),
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
            with writing(self.engine) as connection:
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
        with writing(self.engine) as connection:
            changed = connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked.is_(None))
                .values(revoked=self.clock.time())
            )
        return changed.rowcount == 1

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
