"""From pydantic models to the structural schemas that Kubernetes wants in a CRD.

A structural schema has no references and no alternatives, and says the type of everything. The API
server estimates what a CEL rule may cost at most, so every text, list and map has a bound.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from calotype.serving.config.base import VALIDATIONS

JsonSchema = dict[str, Any]

KEPT = (
    "type",
    "format",
    "enum",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
)


class SchemaError(Exception):
    """A model says something that no structural schema can."""


class _WithFactories(GenerateJsonSchema):
    """Also says the defaults that a factory makes, which pydantic leaves out."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        found = super().default_schema(schema)
        factory = schema.get("default_factory")
        if factory is not None and "default" not in found:
            found = {**found, "default": factory()}  # type: ignore[call-arg]
        if "default" in found:
            found["default"] = plain(found["default"])
        return found


class _WithoutDefaults(GenerateJsonSchema):
    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])


def plain(value: Any) -> Any:
    """A default as it is written in a manifest: camelCase, nothing that is not given."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def structural_schema(model: type[BaseModel], *, defaults: bool = True) -> JsonSchema:
    """The structural schema of a model.

    Args:
        defaults: whether the API server fills in what is not given; not in a status, where what
            nobody said is not known.

    Raises:
        SchemaError: a field has no description or no bound, or a type that cannot be said.
    """
    generator = _WithFactories if defaults else _WithoutDefaults
    document = model.model_json_schema(by_alias=True, schema_generator=generator)
    found = _structural(document, document.get("$defs", {}), model.__name__)
    problems = list(_problems(found, model.__name__))
    if problems:
        raise SchemaError("; ".join(problems))
    return found


def _structural(schema: JsonSchema, defs: JsonSchema, where: str) -> JsonSchema:
    schema = _resolved(schema, defs, where)
    found: JsonSchema = {}
    if "description" in schema:
        found["description"] = " ".join(schema["description"].split())
    if "const" in schema:
        schema = {**schema, "enum": [schema["const"]]}
    found |= {key: schema[key] for key in KEPT if key in schema}
    for bound, plain in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in schema:  # a number in JSON Schema, a switch in OpenAPI 3.0
            found |= {plain: schema[bound], bound: True}
    if schema.get("x-kubernetes-int-or-string"):
        found["anyOf"] = schema["anyOf"]
    elif found.get("type") == "integer":
        found["format"] = "int64"
    rules = [dict(rule) for rule in schema.get(VALIDATIONS, [])]
    if found.get("type") == "object":
        rules += _add_fields(found, schema, defs, where)
    elif found.get("type") == "array":
        found["items"] = _structural(schema["items"], defs, f"{where}[]")
    if schema.get("default") is not None:
        found["default"] = schema["default"]
        _say_default(found)
    if rules:
        found[VALIDATIONS] = rules
    return found


def _say_default(schema: JsonSchema) -> None:
    """`kubectl explain` shows descriptions but no defaults, so those that are short go there."""
    default, said = schema["default"], schema.get("description", "")
    if not said or "Default:" in said or (isinstance(default, dict) and default):
        return
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    shown = json.dumps(default).strip('"') if default not in ([], {}, "") else "none"
    schema["description"] = f"{said.removesuffix('.')}. Default: {shown}."


def _resolved(schema: JsonSchema, defs: JsonSchema, where: str) -> JsonSchema:
    """Without references and without the `null` of optional fields: null is an absent field."""
    if "$ref" in schema:
        target = defs[schema["$ref"].removeprefix("#/$defs/")]
        return _resolved(
            {**target, **{k: v for k, v in schema.items() if k != "$ref"}}, defs, where
        )
    if "anyOf" in schema and not schema.get("x-kubernetes-int-or-string"):
        real = [branch for branch in schema["anyOf"] if branch.get("type") != "null"]
        if len(real) != 1:
            raise SchemaError(f"{where}: {len(real)} alternatives; a structural schema has one")
        if schema.get("default") is not None and len(real) < len(schema["anyOf"]):
            raise SchemaError(f"{where}: null would mean something else than the default")
        rest = {key: value for key, value in schema.items() if key != "anyOf"}
        inner = _resolved(real[0], defs, where)
        return {**inner, **rest}
    return schema


def _add_fields(
    found: JsonSchema, schema: JsonSchema, defs: JsonSchema, where: str
) -> list[JsonSchema]:
    """Fields, or the values of a map; returns the rule on a map's keys."""
    if "properties" in schema:
        found["properties"] = {
            name: _structural(field, defs, f"{where}.{name}")
            for name, field in schema["properties"].items()
        }
        if schema.get("required"):
            found["required"] = schema["required"]
        return []
    values = schema.get("additionalProperties")
    if not isinstance(values, dict):
        raise SchemaError(f"{where}: an object that could hold anything")
    found["additionalProperties"] = _structural(values, defs, f"{where}{{}}")
    if "propertyNames" not in schema:
        return []
    keys = _resolved(schema["propertyNames"], defs, where)["enum"]
    found["maxProperties"] = len(keys)
    listed = ", ".join(f"'{key}'" for key in keys)
    return [
        {
            "rule": f"self.all(key, key in [{listed}])",
            "message": f"there are only these names: {', '.join(keys)}",
        }
    ]


def _problems(schema: JsonSchema, where: str) -> Iterator[str]:
    kind = schema.get("type")
    if kind is None and not schema.get("x-kubernetes-int-or-string"):
        yield f"{where} has no type"
    if kind == "string" and not {"maxLength", "enum", "format"} & schema.keys():
        yield f"{where} has no maxLength"
    if kind == "array":
        if "maxItems" not in schema:
            yield f"{where} has no maxItems"
        yield from _problems(schema["items"], f"{where}[]")
    if "additionalProperties" in schema:
        if "maxProperties" not in schema:
            yield f"{where} has no maxProperties"
        yield from _problems(schema["additionalProperties"], f"{where}{{}}")
    for name, field in schema.get("properties", {}).items():
        if not field.get("description"):
            yield f"{where}.{name} has no description"
        yield from _problems(field, f"{where}.{name}")
