"""What all kinds share: strict models, rules with one sentence each, names and references.

A rule is written twice, in Python for files and in CEL (the Common Expression Language of
Kubernetes) for the API server, side by side and with one message, so that `calotype serve -f` and
`kubectl apply` refuse the same manifest with the same words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

API_VERSION: Literal["calotype.dev/v1alpha1"] = "calotype.dev/v1alpha1"
VALIDATIONS = "x-kubernetes-validations"
"""Key of a schema under which Kubernetes looks for CEL rules."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What must hold of a whole object.

    ``cel`` sees the object as ``self`` with camelCase fields and defaults filled in, as ``holds``
    does with snake_case ones.
    """

    holds: Callable[[Any], bool]
    cel: str
    message: str
    field: str = ""
    """The field that is to blame, as in ``.defaults.size``; empty = the object itself."""


@dataclass(frozen=True, slots=True)
class Transition:
    """What must hold between the stored object (``oldSelf``) and a new one; files have no past."""

    cel: str
    message: str
    field: str = ""


def unchanged(field: str) -> str:
    """CEL: a field that may be missing is as it was."""
    return (
        f"has(self.{field}) == has(oldSelf.{field}) && "
        f"(!has(self.{field}) || self.{field} == oldSelf.{field})"
    )


def without_nulls(given: Any) -> Any:
    """``field: null`` is a field that is not there, also in a map: Kubernetes reads it so."""
    if isinstance(given, Mapping):
        return {key: without_nulls(value) for key, value in given.items() if value is not None}
    return given


def validation(rule: Rule | Transition) -> dict[str, str]:
    """A rule as Kubernetes writes it."""
    found = {"rule": rule.cel, "message": rule.message}
    return found | ({"fieldPath": rule.field} if rule.field else {})


class Ruled(BaseModel):
    """A model whose class names its rules."""

    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, frozen=True, allow_inf_nan=False
    )

    rules: ClassVar[tuple[Rule, ...]] = ()
    transitions: ClassVar[tuple[Transition, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return without_nulls(given)

    @model_validator(mode="after")
    def _rules_hold(self) -> Ruled:
        for rule in type(self).rules:
            if not rule.holds(self):
                raise ValueError(rule.message)
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        found = handler(schema)
        rules: list[Rule | Transition] = [*cls.rules, *cls.transitions]
        if rules:
            target = handler.resolve_ref_schema(found)
            target[VALIDATIONS] = [validation(rule) for rule in rules]
        return found


class Spec(Ruled):
    """Base of everything inside a manifest: camelCase on the wire, no unknown fields."""

    model_config = ConfigDict(alias_generator=to_camel)


class StatusModel(BaseModel):
    """Base of what the operator reports; unknown fields of a newer operator are let through."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


@dataclass(frozen=True, slots=True)
class Matches:
    """A text that a pattern describes, with a sentence for everybody who cannot read patterns.

    The pattern is a whole-text one in the common part of Python's and Go's dialects.
    """

    pattern: str
    message: str

    def _check(self, text: str) -> str:
        if re.fullmatch(self.pattern, text) is None:
            raise ValueError(f"{self.message}; got {text[:100]!r}")
        return text

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        found = handler(schema)
        quoted = self.pattern.replace("\\", "\\\\").replace("'", "\\'")
        rule = {"rule": f"self.matches('^(?:{quoted})$')", "message": self.message}
        found.setdefault(VALIDATIONS, []).append(rule)
        return found


@dataclass(frozen=True, slots=True)
class Unique:
    """A list without repetitions, which Kubernetes calls a set."""

    def _check(self, values: Any) -> Any:
        for index, value in enumerate(values):
            if value in values[:index]:
                raise ValueError(f"Duplicate value: {value!r} stands here twice; write it once")
        return values

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(schema) | {"x-kubernetes-list-type": "set"}


NAME = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?"
NAME_RULE = Matches(
    NAME,
    "a name has lower-case letters, digits, '-' and '.', and begins and ends with a letter or "
    "digit, for example 'flux-2-dev'",
)
LABEL = r"[a-z]([a-z0-9-]*[a-z0-9])?"

Name = Annotated[str, Field(min_length=1, max_length=253), NAME_RULE]
"""Name of a resource, as a reference writes it."""
Namespace = Annotated[
    str,
    Field(min_length=1, max_length=63),
    Matches(
        r"[a-z0-9]([a-z0-9-]*[a-z0-9])?",
        "a namespace has lower-case letters, digits and '-', and begins and ends with a letter "
        "or digit",
    ),
]
Sha256 = Annotated[
    str,
    Field(max_length=64),
    Matches(
        "[0-9a-f]{64}",
        "a sha256 is 64 hexadecimal digits in lower case, as sha256sum prints them",
    ),
]
ProfileName = Annotated[str, Field(min_length=1, max_length=63), NAME_RULE]


def leads_up(path: str | None) -> bool:
    """Whether a path has a part ``..``, by which it could leave its folder."""
    return path is not None and ".." in path.split("/")


def no_way_up(field: str) -> Rule:
    """A path that may be missing stays inside its folder."""
    return Rule(
        lambda spec: not leads_up(getattr(spec, field)),
        f"!has(self.{field}) || !('/' + self.{field} + '/').contains('/../')",
        f"{field} must not have the part '..': write the path without it",
        f".{field}",
    )


class ModelRef(Spec):
    """An ImageModel, also one of another namespace."""

    name: Name = Field(description="Name of the ImageModel.")
    namespace: Namespace | None = Field(
        None,
        description="Namespace of the ImageModel. Default: the namespace of this object.",
    )


class PolicyRef(Spec):
    """A ModerationPolicy of the same namespace."""

    name: Name = Field(description="Name of the ModerationPolicy.")


class SecretRef(Spec):
    """A Secret of the same namespace."""

    name: Name = Field(description="Name of the Secret.")


class Metadata(BaseModel):
    """The part of Kubernetes' ObjectMeta that is read from files; the rest is kept unread."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Name
    namespace: Namespace = "default"


def name_rule(most: int, because: str, pattern: str = NAME) -> Rule:
    """The name of a kind whose children Kubernetes names more strictly than the object itself."""
    shown = "lower-case letters, digits and '-', beginning with a letter"
    if pattern == NAME:
        shown = "lower-case letters, digits, '-' and '.'"
    return Rule(
        lambda resource: (
            len(resource.metadata.name) <= most
            and re.fullmatch(pattern, resource.metadata.name) is not None
        ),
        f"self.metadata.name.size() <= {most} && self.metadata.name.matches('^{pattern}$')",
        f"metadata.name may have {most} characters at most, {shown}: {because}",
        ".metadata.name",
    )


class Resource(Ruled):
    """Base of the kinds."""

    api_version: Literal["calotype.dev/v1alpha1"] = Field(API_VERSION, alias="apiVersion")
    metadata: Metadata
    status: Any = Field(None, exclude=True)
    """What an operator wrote, in a file taken from a cluster; never read, never passed on."""

    @property
    def name(self) -> str:
        return self.metadata.name
