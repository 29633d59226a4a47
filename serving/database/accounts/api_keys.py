"""API keys: ``ct_live_`` and 32 random bytes, shown once and stored as a hash."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, select, update
from sqlalchemy.exc import IntegrityError

from calotype.serving.config.team import ADMINISTRATORS
from calotype.serving.core.errors import InvalidRequest, NotFound, Unauthenticated
from calotype.serving.core.protocols import Clock
from calotype.serving.database.accounts.teams import TeamOwner, Teams
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository
from calotype.serving.database.schema.tables import api_keys
from calotype.serving.jobs.records import KeyRecord, new_id

KEY_PREFIX = "ct_live_"
TEAM_SCOPES = ("images", "jobs", "adapters", "trainings")
"""Of a key that a manifest declares."""
SCOPES = (*TEAM_SCOPES, "moderation", "admin")
"""``moderation`` is for reviewers: appeals and reports of every team."""
DEFAULT_TEAM = ADMINISTRATORS
_SHOWN_CHARS = len(KEY_PREFIX) + 4
_MAX_KEY_CHARS = 512
_MIN_KEY_CHARS = 8


def make_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def key_digest(key: str) -> str:
    """What is stored of a key. A plain hash is enough: nobody can guess 256 random bits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class ApiKeys(Repository):
    """The keys of all teams."""

    def __init__(self, engine: Engine, clock: Clock, teams: Teams) -> None:
        super().__init__(engine, clock)
        self._teams = teams

    def create(
        self,
        *,
        team: str = DEFAULT_TEAM,
        name: str = "",
        scopes: Sequence[str] = SCOPES,
        key: str | None = None,
    ) -> tuple[str, KeyRecord]:
        """Makes a key (or records the given one) and returns it in plain, for the only time.

        Raises:
            InvalidRequest: a scope is unknown, the given key is too short, or it exists already.
        """
        unknown = sorted(set(scopes) - set(SCOPES))
        if unknown:
            raise InvalidRequest(
                f"Unknown scope {unknown[0]!r}; known are {', '.join(SCOPES)}.", param="scopes"
            )
        if key is not None and not _MIN_KEY_CHARS <= len(key) <= _MAX_KEY_CHARS:
            raise InvalidRequest(
                f"An API key has {_MIN_KEY_CHARS} to {_MAX_KEY_CHARS} characters; "
                f"this one has {len(key)}."
            )
        plain = key or make_key()
        record = KeyRecord(
            id=new_id("key"),
            team_id=self._teams.ensure_team(team).id,
            name=name,
            # A key that was chosen elsewhere may be short: then nothing of it is kept.
            prefix=plain[:_SHOWN_CHARS] if plain.startswith(KEY_PREFIX) else "",
            digest=key_digest(plain),
            scopes=list(scopes),
            created=self.clock.time(),
        )
        if not self.add_key(record):
            raise InvalidRequest("This API key exists already.")
        return plain, record

    def ensure_first(self, given: str | None = None) -> str | None:
        """Makes sure that somebody may use the service.

        ``given`` (the environment's ``CALOTYPE_API_KEY``) is recorded when it is not known yet.
        Without it a key is made if there is none at all, and returned: print it, it is shown
        this once.
        """
        if given:
            if self.find_key(key_digest(given)) is None:
                try:
                    self.create(name="CALOTYPE_API_KEY", key=given)
                except InvalidRequest:
                    # Two processes that start at once record the same key; the second finds it.
                    if self.find_key(key_digest(given)) is None:
                        raise
            return None
        if self.list_keys():
            return None
        return self.create(name="first")[0]

    def authenticate(self, key: str) -> KeyRecord:
        """The record of a valid key.

        Raises:
            Unauthenticated: the key is unknown or revoked.
        """
        digest = key_digest(key)
        record = self.find_key(digest) if len(key) <= _MAX_KEY_CHARS else None
        # The look-up is by hash, so its timing says nothing of the key; the comparison is for form.
        if record is None or not hmac.compare_digest(record.digest, digest):
            raise Unauthenticated(
                "Incorrect API key provided. Ask the operator of this service for one, "
                "or make one with `calotype keys create`."
            )
        if record.revoked is not None:
            raise Unauthenticated("This API key was revoked. Ask the operator for a new one.")
        if record.expires is not None and record.expires <= self.clock.time():
            raise Unauthenticated("This API key was rotated; use the new one.")
        return record

    def rotate(self, key_id: str, overlap_seconds: float) -> tuple[str, KeyRecord]:
        """Makes a key like this one; the old one works for ``overlap_seconds`` more.

        Raises:
            NotFound: no such key, or it was revoked.
        """
        old = next((key for key in self.list_keys() if key.id == key_id), None)
        if old is None or old.revoked is not None:
            raise NotFound(
                f"There is no key {key_id!r} that is valid. `calotype keys list` shows all."
            )
        team = self._teams.get_team(old.team_id)
        if team is None:
            raise NotFound(f"The team of the key {key_id!r} is gone.")
        made = self.create(team=team.name, name=old.name, scopes=old.scopes)
        self.expire_key(key_id, self.clock.time() + overlap_seconds)
        return made

    def declare_team(self, team: Mapping[str, Any], owner: TeamOwner | None = None) -> None:
        """Applies a team of the gateway's configuration; what it does not name has no limit.

        Args:
            team: ``name``, ``weight``, ``quotas`` (names as in a Team manifest, camelCase),
                ``models`` (none = all), ``moderationPolicy`` (name of the policy that its requests
                are checked by too), ``keyHashes`` (sha256 hex of each whole key), ``takesOver``
                (whether an administrator gives it the team of its name).
            owner: the Team object; None = a file of the administrator's.

        Raises:
            Conflict: the team of that name is not this object's.
            InvalidRequest: a limit is no number.
        """
        if owner is not None:
            take_over = bool(team.get("takesOver"))
            self._teams.claim(str(team["name"]), owner, take_over=take_over)
        quotas = team.get("quotas") or {}
        self._teams.set_team(
            str(team["name"]),
            weight=float(team.get("weight", 1.0)),
            requests_per_minute=quotas.get("requestsPerMinute"),
            concurrent_jobs=quotas.get("concurrentJobs"),
            gpu_seconds_per_day=quotas.get("gpuSecondsPerDay"),
            budget_per_month=quotas.get("budgetPerMonth"),
            allowed_models=list(team.get("models") or []) or None,
            policy=team.get("moderationPolicy"),
        )
        self.declare_keys(str(team["name"]), list(team.get("keyHashes") or []), TEAM_SCOPES)

    def add_key(self, key: KeyRecord) -> bool:
        """False when a key of the same digest is there already."""
        values = {name: getattr(key, name) for name in key.__dataclass_fields__}
        try:
            with writing(self.engine, durable=True) as connection:
                connection.execute(api_keys.insert().values(values))
        except IntegrityError:
            return False
        return True

    def is_revoked(self, key_id: str) -> bool:
        """Also when there is no such key any more."""
        query = select(api_keys.c.revoked).where(api_keys.c.id == key_id)
        with reading(self.engine) as connection:
            row = connection.execute(query).first()
        return row is None or row[0] is not None

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

        One that another takes the place of was rotated, and work that was accepted by it goes on;
        the keys of a team that has none any more are revoked. Keys that were made by `create` are
        not touched.
        """
        team_id, now = self._teams.ensure_team(team).id, self.clock.time()
        known = {key.digest: key for key in self.list_keys(team_id) if key.declared}
        for digest in digests:
            if digest in known:
                self._restore(known[digest])
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
            if digest in digests:
                continue
            if not digests:
                self.revoke_key(key.id)
            elif key.expires is None or key.expires > now:
                self.expire_key(key.id, now)

    def _restore(self, key: KeyRecord) -> None:
        if key.revoked is not None or key.expires is not None:
            with writing(self.engine) as connection:
                connection.execute(
                    update(api_keys)
                    .where(api_keys.c.id == key.id)
                    .values(revoked=None, expires=None)
                )
