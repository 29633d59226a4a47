"""The API server's answer to a call that stores nothing: what it refuses, and of what it warns."""

from dataclasses import dataclass

import httpx

PARAMETERS = {"dryRun": "All", "fieldValidation": "Strict"}


@dataclass(frozen=True)
class DryRun:
    """The API server's answer to a call that stores nothing; `message` is "" where it agrees."""

    status: int
    message: str
    warnings: list[str]

    @classmethod
    def of(cls, answer: httpx.Response) -> "DryRun":
        message = str(answer.json().get("message")) if answer.is_error else ""
        return cls(answer.status_code, message, answer.headers.get_list("warning"))
