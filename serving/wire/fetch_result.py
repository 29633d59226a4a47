"""What a fetch Job leaves behind: one JSON object in its container's termination message.

The Job writes it, the operator reads it. Fields that this version does not know are kept and have
no effect; a result of a higher version is no result (`wire.document`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from calotype.serving.wire.document import Document
from calotype.serving.wire.fetch_faults import fault_of

MAX_BYTES = 4096
"""Kubernetes cuts a longer termination message off, and it would be no JSON any more."""


class FetchedWeights(Document):
    """Weights that were found, checked and left on the volume."""

    ok: Literal[True] = True
    revision: str = Field(alias="resolvedRevision")
    sha256: str
    size_bytes: int
    path: str
    rank: int | None = Field(None, description="Of an adapter.")
    target_modules: tuple[str, ...] = Field((), description="Layers that an adapter changes.")


class FetchRefused(Document):
    """Why there are no weights."""

    ok: Literal[False] = False
    reason: str = Field(description="A `Fault`, or a word of a later version.")
    message: str

    @property
    def final(self) -> bool:
        """Whether trying the same again would change nothing; a word that is not known is not."""
        fault = fault_of(self.reason)
        return fault is not None and fault.final


FetchResult = FetchedWeights | FetchRefused
_RESULT: TypeAdapter[FetchResult] = TypeAdapter(
    Annotated[FetchedWeights | FetchRefused, Field(discriminator="ok")]
)


def read_result(text: str) -> FetchResult | None:
    """What a termination message says; None where it is none of ours."""
    try:
        return _RESULT.validate_json(text)
    except ValidationError:
        return None


def render(result: FetchResult) -> str:
    """The text of a result; the list of layers, or the sentence, is shortened to fit."""
    text = result.to_json()
    while len(text.encode()) > MAX_BYTES:
        if isinstance(result, FetchRefused):
            message = result.message.removesuffix(" ...")
            shorter = f"{message[: len(message) * 3 // 4]} ..."
            result = result.model_copy(update={"message": shorter})
        else:
            result = result.model_copy(update={"target_modules": result.target_modules[:-1]})
        text = result.to_json()
    return text
