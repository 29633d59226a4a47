"""How the images of a job are encoded, checked and traced: a part of its ``input``.

The rest of ``input`` is what the client asked for and only the gateway reads; it also writes these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from calotype.serving.core.decision import CheckScope
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.payloads import known_fields


@dataclass(frozen=True, slots=True)
class JobOptions:
    request_id: str
    """Of the HTTP request, for messages."""
    output_format: str = "png"
    """``png``, ``jpeg`` or ``webp``."""
    output_compression: int | None = None
    """Quality 0 to 100 of jpeg and webp."""
    prompt_in_files: bool = False
    """Whether the files carry the prompt."""
    scope: CheckScope | None = None
    traceparent: str | None = None
    """W3C trace context of the HTTP request."""

    def to_payload(self) -> JsonObject:
        scope = None if self.scope is None else self.scope.to_payload()
        return asdict(self) | {"scope": scope}

    @classmethod
    def from_payload(cls, payload: Mapping[str, object], job_id: str = "") -> JobOptions:
        """Of a job's ``input``; its other fields are ignored."""
        known = {k: v for k, v in known_fields(cls, payload).items() if v is not None}
        known["scope"] = CheckScope.from_payload(known.get("scope"))
        return cls(**{"request_id": job_id} | known)
