"""What may pass: categories, thresholds and actions, as one versioned document.

A policy is the spec of a ModerationPolicy manifest and, word for word, a YAML file such as
``policies/default.yaml``. It is immutable: a decision names the version it was made under, and a
changed document without a changed version still has another ``sha256``. Loading is strict, since a
misspelt threshold would silently let something through.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from calotype.moderation.errors import PolicyError
from calotype.moderation.strictness import completed, laxer_at

POLICIES = pathlib.Path(__file__).with_name("policies")


class Category(enum.StrEnum):
    """OpenAI's 13 names, as on the wire, then ours."""

    SEXUAL = "sexual"
    SEXUAL_MINORS = "sexual/minors"
    HARASSMENT = "harassment"
    HARASSMENT_THREATENING = "harassment/threatening"
    HATE = "hate"
    HATE_THREATENING = "hate/threatening"
    ILLICIT = "illicit"
    ILLICIT_VIOLENT = "illicit/violent"
    SELF_HARM = "self-harm"
    SELF_HARM_INTENT = "self-harm/intent"
    SELF_HARM_INSTRUCTIONS = "self-harm/instructions"
    VIOLENCE = "violence"
    VIOLENCE_GRAPHIC = "violence/graphic"
    IP_CHARACTER = "ip_character"
    PUBLIC_FIGURE = "public_figure"
    POLITICAL = "political"
    PROMPT_INJECTION = "prompt_injection"
    SHOCKING = "shocking"
    REAL_PERSON_INTIMATE = "real_person_intimate"


OPENAI_CATEGORIES: tuple[Category, ...] = tuple(Category)[:13]


class Verdict(enum.StrEnum):
    """What happens to a prompt or a picture. REVIEW holds it for a person: it is not served."""

    ALLOW = "ALLOW"
    FLAG = "FLAG"
    BLUR = "BLUR"
    REVIEW = "REVIEW"
    BLOCK = "BLOCK"
    ERROR = "ERROR"

    @property
    def severity(self) -> int:
        return _SEVERITY[self]

    @property
    def served(self) -> bool:
        """Whether the caller gets what was judged."""
        return self in (Verdict.ALLOW, Verdict.FLAG)


_SEVERITY = {verdict: rank for rank, verdict in enumerate(Verdict)}


class Modality(enum.StrEnum):
    """What a score was measured on; each has its own thresholds."""

    TEXT = "text"
    IMAGE = "image"
    TILE = "tile"
    JUDGE = "judge"


Score = Annotated[float, Field(ge=0.0, le=1.0)]
Action = Literal["block", "review", "blur", "flag"]
VALIDATIONS = "x-kubernetes-validations"
"""Key of a schema for rules in CEL: the API server refuses with the same words as this file."""


class PolicyModel(BaseModel):
    """camelCase in YAML, nothing unknown, nothing changeable."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )


_FLAG_ABOVE_BLOCK = "flag must not be above block: it would never be seen"


class Rule(PolicyModel):
    """Thresholds of one category in one modality; a score at or above one has its effect."""

    model_config = ConfigDict(
        json_schema_extra={
            VALIDATIONS: [
                {
                    "rule": "!has(self.flag) || !has(self.block) || self.flag <= self.block",
                    "message": _FLAG_ABOVE_BLOCK,
                }
            ]
        }
    )

    block: Score | None = Field(None, description="At or above: refused. Default: nothing is.")
    review: Score | None = Field(
        None, description="At or above: held for a person, not served. Default: nothing is."
    )
    blur: Score | None = Field(
        None, description="At or above: held, to be shown blurred only. Default: nothing is."
    )
    flag: Score | None = Field(
        None, description="At or above: served, and marked in the answer. Default: nothing is."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Rule:
        if self.flag is not None and self.block is not None and self.flag > self.block:
            raise ValueError(_FLAG_ABOVE_BLOCK)
        return self

    def verdict(self, score: float) -> tuple[Verdict, float] | None:
        """The most severe effect of a score, and the threshold that it reached."""
        for name in ("block", "review", "blur", "flag"):
            threshold: float | None = getattr(self, name)
            if threshold is not None and score >= threshold:
                return Verdict[name.upper()], threshold
        return None


class CategoryRules(PolicyModel):
    """One category: its thresholds for prompts, whole pictures and tiles of pictures."""

    text: Rule = Field(Rule(), description="Thresholds for prompts, scores from 0 to 1.")
    image: Rule = Field(Rule(), description="Thresholds for whole pictures, scores from 0 to 1.")
    tile: Rule = Field(Rule(), description="Thresholds for parts of pictures, scores from 0 to 1.")
    judge: Rule = Field(
        Rule(), description="Thresholds for prompts by the policy's judge, scores from 0 to 1."
    )


class Terms(PolicyModel):
    """Terms of the policy's owner: brand names, project names, local slang."""

    category: Category = Field(description="Category that a prompt with one of the terms gets.")
    action: Action = Field("block", description="What happens to such a prompt.")
    terms: tuple[Annotated[str, Field(min_length=2, max_length=200)], ...] = Field(
        min_length=1,
        max_length=1000,
        description="Words and phrases, in any spelling that reads alike; * stands for any ending.",
    )


class JudgeRules(PolicyModel):
    """A guard model that is asked as well, and when."""

    format: Literal["qwen3guard", "llama-guard", "gpt-oss-safeguard", "shieldgemma", "yes-no"] = (
        Field(description="How the model is asked; yes-no asks any chat model.")
    )
    model: str = Field(
        min_length=1, max_length=1000, description="Folder of the model where prompts are judged."
    )
    when: Literal["uncertain", "always"] = Field(
        "uncertain",
        description="For every prompt, or for those that another classifier finds suspicious or "
        "that read like no language. Default: uncertain.",
    )
    above: Score = Field(
        0.2, description="A score from here on is suspicious, if it does not block. Default: 0.2."
    )
    temperature: float = Field(
        1.0, gt=0.0, le=100.0, description="Calibration: above 1 makes the judge less sure."
    )
    bias: float = Field(
        0.0, ge=-20.0, le=20.0, description="Calibration: added to the log odds of a violation."
    )


class Privacy(PolicyModel):
    """What is kept of a prompt beside its decision."""

    prompts: Literal["none", "digest", "encrypted"] = Field(
        "digest",
        description="none, a keyed digest (the same prompt is found again), or the digest and an "
        "encrypted copy that reviewers can open. Default: digest.",
    )
    days: int = Field(
        30, ge=1, le=3650, description="Days that encrypted copies can be opened. Default: 30."
    )


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
        return own
    floor = Policy.packaged(own.extends)
    policy = _parsed(where, completed(dict(_without_nulls(document)), floor))
    looser = laxer_at(policy, floor)
    if looser is not None:
        raise PolicyError(
            f"{where}: {looser}: looser than the policy {floor.identity} that it extends. "
            "Make it at least as strict, or leave it out."
        )
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


def is_score(value: object) -> bool:
    """Whether a classifier's answer is a number from 0 to 1; NaN and infinity are not."""
    return isinstance(value, float | int) and math.isfinite(value) and -1e-6 <= value <= 1 + 1e-6
