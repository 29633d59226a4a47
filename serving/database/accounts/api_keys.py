"""API keys: ``ct_live_`` and 32 random bytes, shown once and stored as a hash."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from calotype.serving.core.errors import InvalidRequest, NotFound, Unauthenticated
from calotype.serving.database.jobs import JobStore
from calotype.serving.jobs.records import KeyRecord, new_id

KEY_PREFIX = "ct_live_"
TEAM_SCOPES = ("images", "jobs", "adapters", "trainings")
"""Of a key that a manifest declares."""
SCOPES = (*TEAM_SCOPES, "moderation", "admin")
"""``moderation`` is for reviewers: appeals and reports of every team."""
DEFAULT_TEAM = "default"
_SHOWN_CHARS = len(KEY_PREFIX) + 4
_MAX_KEY_CHARS = 512
_MIN_KEY_CHARS = 8


def make_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def key_digest(key: str) -> str:
    """What is stored of a key. A plain hash is enough: nobody can guess 256 random bits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def create_key(
    store: JobStore,
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
        team_id=store.ensure_team(team).id,
        name=name,
        # A key that was chosen elsewhere may be short: then nothing of it is kept.
        prefix=plain[:_SHOWN_CHARS] if plain.startswith(KEY_PREFIX) else "",
        digest=key_digest(plain),
        scopes=list(scopes),
        created=store.clock.time(),
    )
    if not store.add_key(record):
        raise InvalidRequest("This API key exists already.")
    return plain, record


def ensure_first_key(store: JobStore, given: str | None = None) -> str | None:
    """Makes sure that somebody may use the service.

    ``given`` (the environment's ``CALOTYPE_API_KEY``) is recorded when it is not known yet. Without
    it a key is made if there is none at all, and returned: print it, it is shown this once.
    """
    if given:
        if store.find_key(key_digest(given)) is None:
            try:
                create_key(store, name="CALOTYPE_API_KEY", key=given)
            except InvalidRequest:
                # Two processes that start at once record the same key; the second finds it there.
                if store.find_key(key_digest(given)) is None:
                    raise
        return None
    if store.list_keys():
        return None
    return create_key(store, name="first")[0]


def authenticate(store: JobStore, key: str) -> KeyRecord:
    """The record of a valid key.

    Raises:
        Unauthenticated: the key is unknown or revoked.
    """
    digest = key_digest(key)
    record = store.find_key(digest) if len(key) <= _MAX_KEY_CHARS else None
    # The look-up is by hash, so its timing says nothing of the key; the comparison is for form.
    if record is None or not hmac.compare_digest(record.digest, digest):
        raise Unauthenticated(
            "Incorrect API key provided. Ask the operator of this service for one, "
            "or make one with `calotype keys create`."
        )
    if record.revoked is not None:
        raise Unauthenticated("This API key was revoked. Ask the operator for a new one.")
    if record.expires is not None and record.expires <= store.clock.time():
        raise Unauthenticated("This API key was rotated; use the new one.")
    return record


def rotate_key(store: JobStore, key_id: str, overlap_seconds: float) -> tuple[str, KeyRecord]:
    """Makes a key like this one; the old one works for ``overlap_seconds`` more.

    Raises:
        NotFound: no such key, or it was revoked.
    """
    old = next((key for key in store.list_keys() if key.id == key_id), None)
    if old is None or old.revoked is not None:
        raise NotFound(f"There is no key {key_id!r} that is valid. `calotype keys list` shows all.")
    team = store.get_team(old.team_id)
    if team is None:
        raise NotFound(f"The team of the key {key_id!r} is gone.")
    made = create_key(store, team=team.name, name=old.name, scopes=old.scopes)
    store.expire_key(key_id, store.clock.time() + overlap_seconds)
    return made


def declare_team(store: JobStore, team: Mapping[str, Any]) -> None:
    """Applies a team of the gateway's configuration; what it does not name has no limit.

    Args:
        team: ``name``, ``weight``, ``quotas`` (names as in a Team manifest, camelCase), ``models``
            (none = all), ``moderationPolicy`` (name of the policy that its requests are judged by
            too), ``keyHashes`` (sha256 hex of each whole key).

    Raises:
        InvalidRequest: a limit is no number.
    """
    quotas = team.get("quotas") or {}
    store.set_team(
        str(team["name"]),
        weight=float(team.get("weight", 1.0)),
        requests_per_minute=quotas.get("requestsPerMinute"),
        concurrent_jobs=quotas.get("concurrentJobs"),
        gpu_seconds_per_day=quotas.get("gpuSecondsPerDay"),
        budget_per_month=quotas.get("budgetPerMonth"),
        allowed_models=list(team.get("models") or []) or None,
        policy=team.get("moderationPolicy"),
    )
    store.declare_keys(str(team["name"]), list(team.get("keyHashes") or []), TEAM_SCOPES)
