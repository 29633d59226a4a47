"""The base of documents that one process writes and another one reads.

Every document carries a ``version``. Fields that this version does not know are kept: they have no
effect here, and are there again when the document is written. A change that an older reader would
misunderstand raises the version, and a document of a higher version is refused.
"""

from __future__ import annotations

import json
import pathlib
from typing import Annotated, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
)
from pydantic.alias_generators import to_camel

from calotype.serving.config import ImageModel, LoRAAdapter, describe
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject as JsonObject


def _as_given(manifest: ImageModel | LoRAAdapter) -> JsonObject:
    return manifest.model_dump(mode="json", by_alias=True, exclude_unset=True)


ModelManifest = Annotated[ImageModel, PlainSerializer(_as_given)]
"""Read strictly; written with the fields that were given and no others."""
AdapterManifest = Annotated[LoRAAdapter, PlainSerializer(_as_given)]
"""As `ModelManifest`: with all defaults, a thousand of them would not fit into one ConfigMap."""


class Part(BaseModel):
    """Base of what is inside a document: camelCase on the wire, unknown fields are kept."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="allow", frozen=True
    )

    def payload(self) -> JsonObject:
        """As JSON, without what is None."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Document(Part):
    """Base of whole documents."""

    newest: ClassVar[int] = 1
    """The highest version that this code reads, and the one that it writes."""

    version: int = Field(1, ge=1, description="Raised where older readers would be wrong.")

    @field_validator("version")
    @classmethod
    def _known(cls, version: int) -> int:
        if version > cls.newest:
            raise ValueError(
                f"the document has version {version}, and this program reads up to "
                f"{cls.newest}: bring both to the same release"
            )
        return version

    def to_json(self) -> str:
        """As compact text."""
        return json.dumps(self.payload(), separators=(",", ":"), ensure_ascii=False)


D = TypeVar("D", bound=Document)


def parse_document(kind: type[D], raw: bytes, path: pathlib.Path) -> D:
    """The document in a file's content; an empty file says nothing.

    Raises:
        InvalidRequest: it is no JSON, or says what no manifest may say; names file and field.
    """
    try:
        content = json.loads(raw.decode("utf-8") or "{}")
    except ValueError as error:
        raise InvalidRequest(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise InvalidRequest(f"{path} must hold a JSON object.")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InvalidRequest(f"{path}: {describe(error)}") from None
