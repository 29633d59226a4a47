"""Values of ours as JSON objects: how a reader treats what another release has written.

A payload may say its ``version``; none means 1. New optional fields do not raise it, and a reader
ignores fields that it does not know. It is raised where a known field changes its meaning, and a
reader refuses a payload of a higher version than its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from calotype.serving.core.errors import EngineError
from calotype.serving.core.json_object import JsonObject


def check_version(payload: Mapping[str, object], newest: int, what: str) -> None:
    """Raises EngineError for a payload of a higher version; ``what`` names it in the message."""
    given = payload.get("version", 1)
    if not isinstance(given, int) or given > newest:
        raise EngineError(
            f"{what} of version {given!r} cannot be read: this release knows versions up to "
            f"{newest}."
        )


def known_fields(cls: type, payload: Mapping[str, object]) -> JsonObject:
    """The items of ``payload`` that are fields of the dataclass ``cls``."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in payload.items() if name in names}


def without_none(payload: Mapping[str, object]) -> JsonObject:
    return {name: value for name, value in payload.items() if value is not None}
