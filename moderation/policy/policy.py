"""A policy: categories, thresholds and actions, as one versioned document.

A policy is the spec of a ModerationPolicy manifest and, word for word, a YAML file such as
``builtin/default.yaml``. It is immutable: a decision names the version it was made under, and a
changed document without a changed version still has another ``sha256``. Loading is strict, since a
misspelt threshold would silently let something through.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import yaml
from pydantic import Field, ValidationError

from calotype.moderation.documents import ReadOnlyJson
from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.categories import Category, Modality
from calotype.moderation.policy.presets import (
    LAX,
    OWN,
    STRICT,
    at_preset,
    preset_of,
)
from calotype.moderation.policy.rules import JudgeRules, Presets, Rule
from calotype.moderation.policy.spec import PolicySpec, available_lists
from calotype.moderation.policy.strictness import completed, laxer_at

POLICIES = pathlib.Path(__file__).with_name("builtin")


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
    def from_spec(cls, name: str, spec: ReadOnlyJson) -> Policy:
        """The policy of a ModerationPolicy manifest, already parsed."""
        return _validated(f"ModerationPolicy {name}", {**spec, "name": name})

    @classmethod
    def default(cls) -> Policy:
        """The policy that ships with calotype."""
        return cls.packaged("default")

    @classmethod
    def packaged(cls, name: str) -> Policy:
        """A policy of the package: ``default``, or the ``floor`` under it."""
        return cls.load(POLICIES / f"{name}.yaml")


def _validated(where: str, document: ReadOnlyJson) -> Policy:
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
        problem = _preset_problem(policy, base)
        if problem is not None:
            raise PolicyError(f"{where}: presets.{problem}")
    return policy


def _parsed(where: str, document: ReadOnlyJson) -> Policy:
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


def _preset_problem(policy: Policy, base: Policy | None) -> str | None:
    """What is wrong with the presets of a policy, beginning with the preset's name; None = nothing.

    Args:
        base: what it extends, and no preset may be laxer than.
    """
    owners: dict[int, str] = {}
    for name in (*STRICT, *LAX):
        preset = preset_of(policy, name)
        if preset is None:
            continue
        for level in preset.tolerances:
            if level == OWN or (level < OWN) != (name in STRICT):
                kind = "0 and 1" if name in STRICT else "3 to 6"
                return f"{name}.tolerances: {level} is not possible: {name} may have {kind}."
            if owners.setdefault(level, name) != name:
                return f"{name}.tolerances: {level} stands for {owners[level]} already."
        document = policy.model_copy(update={"categories": at_preset(policy, name)})
        if base is None and name in LAX:
            return f"{name}: needs extends: floor (or default), below which no caller can go."
        for bound in (policy,) if base is None or name in STRICT else (base,):
            place = laxer_at(document, bound)
            if place is not None:
                return f"{name}: {place}: looser than the policy {bound.identity}."
    return None
