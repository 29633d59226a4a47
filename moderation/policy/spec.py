"""The fields of a policy: the spec of a ModerationPolicy manifest.

Only the fields and their bounds; reading a document, its base policy and its presets are checked in
`policy`.
"""

from __future__ import annotations

import pathlib
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator

from calotype.moderation.documents import JsonObject
from calotype.moderation.policy.categories import Category
from calotype.moderation.policy.rules import (
    VALIDATIONS,
    CategoryRules,
    JudgeRules,
    PolicyModel,
    Presets,
    Privacy,
    ShadowRules,
    Terms,
)

TERMS_CHARS = 16_000
"""Characters of all terms of a policy: policies travel with the configuration of every model."""
TOO_MANY_TERMS = (
    f"all terms of a policy together have {TERMS_CHARS:,} characters at most: shorten them, or "
    "name a list of the package"
)
LISTS = pathlib.Path(__file__).with_name("lists")


def available_lists() -> tuple[str, ...]:
    """The names that ``lists`` of a policy may hold."""
    return tuple(sorted(path.stem for path in LISTS.glob("*.yaml")))


def _known_lists(schema: JsonObject) -> None:
    schema["items"] = {"type": "string", "enum": list(available_lists())}


class PolicySpec(PolicyModel):
    """One immutable version of the rules, as the spec of a ModerationPolicy says it."""

    model_config = ConfigDict(
        json_schema_extra={
            VALIDATIONS: [
                {
                    "rule": "self == oldSelf || self.version > oldSelf.version",
                    "message": "decisions name the version they were made under: raise "
                    "spec.version with every change",
                    "fieldPath": ".version",
                },
                {
                    "rule": "!has(self.terms) || self.terms.map(group, "
                    f"group.terms.map(term, term.size()).sum()).sum() <= {TERMS_CHARS}",
                    "message": TOO_MANY_TERMS,
                    "fieldPath": ".terms",
                },
            ]
        }
    )

    version: int = Field(ge=1, description="Raise it with every change; decisions name it.")
    extends: Literal["floor", "default"] | None = Field(
        None,
        description="Policy of the package that this one adds to: what is left out is taken from "
        "there, and nothing may be looser. Default: it stands alone.",
    )
    description: str = Field("", max_length=2000, description="For people: what it is for.")
    categories: dict[Category, CategoryRules] = Field(
        min_length=1,
        description="Thresholds, category by category. A category that is left out is neither "
        "blocked nor flagged by its score.",
    )
    lists: tuple[str, ...] = Field(
        (),
        max_length=16,
        json_schema_extra=_known_lists,
        description="Term lists of the package to apply. Default: none.",
    )
    terms: tuple[Terms, ...] = Field(
        (), max_length=32, description="Terms of this policy's owner. Default: none."
    )
    on_error: Literal["block", "review"] = Field(
        "block", description="What happens when a classifier fails. Nothing lets it pass."
    )
    timeout_seconds: float = Field(
        20.0, gt=0.0, le=600.0, description="Time for one check, in seconds."
    )
    picture_lists: tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...] = Field(
        (),
        max_length=16,
        description="Files of known pictures (PDQ) that are refused wherever they turn up, where "
        "pictures are checked. Default: none.",
    )
    picture_models: dict[
        Literal["falconsai", "sd-safety-checker", "shieldgemma-2"],
        Annotated[str, Field(min_length=1, max_length=1000)],
    ] = Field(
        default_factory=dict,
        description="Further classifiers of pictures and the folders they lie in. They look at "
        "whole pictures and at parts that another one finds suspicious. Default: none.",
    )
    judge: JudgeRules | None = Field(
        None, description="A guard model for prompts. Default: none is asked."
    )
    presets: Presets = Field(
        Presets(),
        description="What callers may ask for by moderation and safety_tolerance. Default: nothing "
        "else than the policy.",
    )
    shadow: tuple[ShadowRules, ...] = Field(
        (), max_length=8, description="Classifiers on trial, which decide nothing. Default: none."
    )
    privacy: Privacy = Field(Privacy(), description="What is kept of prompts.")
    messages: dict[Category, Annotated[str, Field(max_length=1000)]] = Field(
        default_factory=dict,
        description="What the caller is told, category by category. Default: a sentence for all.",
    )

    @field_validator("terms")
    @classmethod
    def _bounded(cls, terms: tuple[Terms, ...]) -> tuple[Terms, ...]:
        if sum(len(term) for group in terms for term in group.terms) > TERMS_CHARS:
            raise ValueError(TOO_MANY_TERMS)
        return terms
