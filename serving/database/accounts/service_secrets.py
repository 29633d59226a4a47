"""Secrets that all processes of a service share, made at first use."""

from __future__ import annotations

import base64
import secrets

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from calotype.serving.core.errors import NotFound
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository
from calotype.serving.database.schema.tables import service_secrets, teams


def make_webhook_secret() -> str:
    """``whsec_`` and 32 random bytes in standard base64, as Standard Webhooks wants it."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode("ascii")


class ServiceSecrets(Repository):
    """What signs webhooks and asset URLs."""

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
