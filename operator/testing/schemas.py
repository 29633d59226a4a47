"""What the schemas of our kinds say of a status: a field that they do not know would be pruned by a
real API server, so here it is refused, as is a value that does not fit."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import yaml

from calotype.operator.kube.client import ApiError
from calotype.operator.kube.objects import Manifest

CRDS = pathlib.Path(__file__).resolve().parents[1] / "api" / "crds"
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


@functools.cache
def status_schema(plural: str) -> Manifest | None:
    """The schema of ``status`` of one of our kinds; None for other kinds."""
    path = CRDS / f"{plural}.yaml"
    if not path.is_file():
        return None
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    version = document["spec"]["versions"][0]
    found: Manifest = version["schema"]["openAPIV3Schema"]["properties"]["status"]
    return found


def check_status(plural: str, status: Any) -> None:
    """
    Raises:
        ApiError: 422, with everything that is wrong.
    """
    schema = status_schema(plural)
    problems = [] if schema is None else _problems(schema, status, "status")
    if problems:
        raise ApiError(422, "Invalid", f"{plural}: {'; '.join(problems)}")


def _problems(schema: Manifest, value: Any, where: str) -> list[str]:
    wanted = _TYPES[schema["type"]]
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        return [f"{where}: {value!r} is no {schema['type']}"]
    found: list[str] = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if isinstance(value, str) and len(value) > schema.get("maxLength", len(value)):
        found.append(f"{where}: longer than {schema['maxLength']}")
    if isinstance(value, list):
        if len(value) > schema.get("maxItems", len(value)):
            found.append(f"{where}: more than {schema['maxItems']}")
        for index, entry in enumerate(value):
            found += _problems(schema["items"], entry, f"{where}[{index}]")
    if isinstance(value, dict) and "properties" in schema:
        for name in schema.get("required", []):
            if name not in value:
                found.append(f"{where}.{name} is missing")
        for name, entry in value.items():
            inner = schema["properties"].get(name)
            if inner is None:
                found.append(f"{where}.{name} is not in the schema")
            else:
                found += _problems(inner, entry, f"{where}.{name}")
    return found
