"""What may pass: categories, thresholds and actions, as one versioned document.

A policy is the spec of a ModerationPolicy manifest and, word for word, a YAML file such as
``policies/default.yaml``. It is immutable: a decision names the version it was made under, and a
changed document without a changed version still has another ``sha256``. Loading is strict, since a
misspelt threshold would silently let something through.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError

from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.categories import (
    OPENAI_CATEGORIES,
    Category,
    Modality,
    Verdict,
    is_score,
)
from calotype.moderation.policy.presets import preset_problem
from calotype.moderation.policy.rules import (
    VALIDATIONS,
    Action,
    CategoryRules,
    JudgeRules,
    PolicyModel,
    Preset,
    Presets,
    Privacy,
    Rule,
    Score,
    ShadowRules,
    Terms,
)
from calotype.moderation.policy.strictness import completed, laxer_at

__all__ = [
    "OPENAI_CATEGORIES",
    "POLICIES",
    "Action",
    "Category",
    "CategoryRules",
    "JudgeRules",
    "Modality",
    "Policy",
    "PolicyModel",
    "PolicySpec",
    "Preset",
    "Presets",
    "Privacy",
    "Rule",
    "Score",
    "ShadowRules",
    "Terms",
    "Verdict",
    "available_lists",
    "is_score",
]

POLICIES = pathlib.Path(__file__).with_name("builtin")


def _known_lists(schema: dict[str, Any]) -> None:
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
                }
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
        20.0, gt=0.0, le=600.0, description="Time for one judgement, in seconds."
    )
    picture_lists: tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...] = Field(
        (),
        max_length=16,
        description="Files of known pictures (PDQ) that are refused wherever they turn up, where "
        "pictures are judged. Default: none.",
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


class Policy(PolicySpec):
    """One immutable version of the rules, with its name."""

    name: str = Field("default", pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")

    @property
    def identity(self) -> str:
        """``default@1``: what a decision names."""
        return f"{self.name}@{self.version}"

    @cached_property
    def sha256(self) -> str:
        """Digest of the whole document, independent of key order and layout."""
        document = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(document.encode()).hexdigest()

    def rule(self, category: Category, modality: Modality) -> Rule:
        """The thresholds that apply; an empty rule for a category the policy does not name."""
        rules = self.categories.get(category)
        return getattr(rules, modality.value) if rules is not None else Rule()

    @property
    def judges(self) -> tuple[JudgeRules, ...]:
        """The guard models that are asked about prompts."""
        return () if self.judge is None else (self.judge,)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Policy:
        """Reads a YAML file: a bare policy, or a ModerationPolicy manifest."""
        path = pathlib.Path(path)
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PolicyError(f"{path}: cannot be read ({error.strerror or error}).") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise PolicyError(f"{path}: is not YAML ({reason}).") from error
        if not isinstance(document, Mapping):
            raise PolicyError(f"{path}: must be a mapping with version and categories.")
        if document.get("kind") == "ModerationPolicy":
            metadata, spec = document.get("metadata"), document.get("spec")
            if not isinstance(metadata, Mapping) or not isinstance(metadata.get("name"), str):
                raise PolicyError(f"{path}: metadata.name is missing.")
            if not isinstance(spec, Mapping):
                raise PolicyError(f"{path}: spec is missing.")
            return _validated(f"{path}", {**spec, "name": metadata["name"]})
        return _validated(f"{path}", {"name": path.stem, **document})

    @classmethod
    def from_spec(cls, name: str, spec: Mapping[str, Any]) -> Policy:
        """The policy of a ModerationPolicy manifest that somebody else has read."""
        return _validated(f"ModerationPolicy {name}", {**spec, "name": name})

    @classmethod
    def default(cls) -> Policy:
        """The policy that ships with calotype."""
        return cls.packaged("default")

    @classmethod
    def packaged(cls, name: str) -> Policy:
        """A policy of the package: ``default``, or the ``floor`` under it."""
        return cls.load(POLICIES / f"{name}.yaml")


def _validated(where: str, document: Mapping[str, Any]) -> Policy:
    """Checked alone first, so that a mistake is named as it was written, then on its floor."""
    own = _parsed(where, document)
    if own.extends is None:
        return _with_sound_presets(where, own)
    floor = Policy.packaged(own.extends)
    policy = _parsed(where, completed(dict(_without_nulls(document)), floor))
    looser = laxer_at(policy, floor)
    if looser is not None:
        raise PolicyError(
            f"{where}: {looser}: looser than the policy {floor.identity} that it extends. "
            "Make it at least as strict, or leave it out."
        )
    return _with_sound_presets(where, policy)


def _with_sound_presets(where: str, policy: Policy) -> Policy:
    if policy.presets != Presets():
        base = Policy.packaged(policy.extends) if policy.extends is not None else None
        problem = preset_problem(policy, base)
        if problem is not None:
            raise PolicyError(f"{where}: presets.{problem}")
    return policy


def _parsed(where: str, document: Mapping[str, Any]) -> Policy:
    try:
        text = json.dumps(_without_nulls(document), default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise PolicyError(f"{where}: cannot be written as JSON ({error}).") from error
    try:
        # As strictly as the API server, and through JSON as its YAML is: no "0.5" for 0.5.
        policy = Policy.model_validate_json(text, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "[key]") or "document"
        given = first.get("input")
        shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
        raise PolicyError(f"{where}: {field}: {first['msg']}{shown}.") from error
    unknown = sorted(set(policy.lists) - set(available_lists()))
    if unknown:
        raise PolicyError(
            f"{where}: lists: there is no list {unknown[0]!r};"
            f" there are {', '.join(available_lists())}."
        )
    return policy


def _without_nulls(given: Any) -> Any:
    """``field: null`` is a field that is not there: Kubernetes reads it so."""
    if isinstance(given, Mapping):
        return {key: _without_nulls(value) for key, value in given.items() if value is not None}
    return given


def available_lists() -> tuple[str, ...]:
    """The names that ``lists`` of a policy may hold."""
    folder = pathlib.Path(__file__).with_name("lists")
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))
