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


Score = Annotated[float, Field(ge=0.0, le=1.0)]
Action = Literal["block", "review", "blur", "flag"]


class PolicyModel(BaseModel):
    """camelCase in YAML, nothing unknown, nothing changeable."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True
    )


class Rule(PolicyModel):
    """Thresholds of one category in one modality; a score at or above one has its effect."""

    block: Score | None = Field(None, description="At or above: refused.")
    review: Score | None = Field(None, description="At or above: held for a person, not served.")
    blur: Score | None = Field(None, description="At or above: held, to be shown blurred only.")
    flag: Score | None = Field(None, description="At or above: served, and marked in the answer.")

    @model_validator(mode="after")
    def _ordered(self) -> Rule:
        if self.flag is not None and self.block is not None and self.flag > self.block:
            raise ValueError("flag must not be above block: it would never be seen")
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

    text: Rule = Rule()
    image: Rule = Rule()
    tile: Rule = Rule()


class Terms(PolicyModel):
    """Terms of the policy's owner: brand names, project names, local slang."""

    category: Category
    action: Action = "block"
    terms: tuple[Annotated[str, Field(min_length=2, max_length=200)], ...] = Field(min_length=1)


class Policy(PolicyModel):
    """One immutable version of the rules; the spec of a ModerationPolicy."""

    name: str = Field("default", pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")
    version: int = Field(ge=1, description="Raise it with every change.")
    description: str = ""
    categories: dict[Category, CategoryRules] = Field(min_length=1)
    lists: tuple[str, ...] = Field((), description="Names of the term lists to apply.")
    terms: tuple[Terms, ...] = Field((), description="Terms of this policy's owner.")
    on_error: Literal["block", "review"] = Field(
        "block", description="When a classifier fails. Nothing lets it pass."
    )
    timeout_seconds: float = Field(20.0, gt=0.0, le=600.0, description="For one judgement.")
    messages: dict[Category, str] = Field(default_factory=dict)

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
        return cls.load(POLICIES / "default.yaml")


def _validated(where: str, document: Mapping[str, Any]) -> Policy:
    try:
        policy = Policy.model_validate(document)
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


def available_lists() -> tuple[str, ...]:
    """The names that ``lists`` of a policy may hold."""
    folder = pathlib.Path(__file__).with_name("lists")
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def is_score(value: object) -> bool:
    """Whether a classifier's answer is a number from 0 to 1; NaN and infinity are not."""
    return isinstance(value, float | int) and math.isfinite(value) and -1e-6 <= value <= 1 + 1e-6
