"""The chart's values.schema.json, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator

from controlplane.client.objects import Object
from helm.rendering import CHART

SCHEMA: Object = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


def resolved(schema: Object) -> Object:
    """A schema with what its reference says; its own words win."""
    if "$ref" not in schema:
        return schema
    return {**SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], **schema}


def fields(schema: Object, path: str = "") -> Iterator[tuple[str, Object]]:
    """(path, schema) of every property, also of maps' values and of lists' entries."""
    for name, child in schema.get("properties", {}).items():
        child = resolved(child)
        yield f"{path}.{name}".lstrip("."), child
        yield from fields(child, f"{path}.{name}")
    inner = schema.get("additionalProperties")
    if isinstance(inner, dict) and resolved(inner).get("type") == "object":
        yield from fields(resolved(inner), f"{path}.*")


FIELDS: dict[str, Object] = dict(fields(SCHEMA))
"""Dotted path -> schema; ``*`` stands for the keys of a map."""
