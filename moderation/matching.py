"""Term lists: what is refused by its words alone, whatever a classifier thinks.

A list is a YAML file in ``lists/``. Terms are folded like the prompt (lower case, one space between
words), so they need no variants; ``*`` stands for the rest of a word, a trailing plural ``s`` is
implied. A rule fires on one of its ``terms``, or on one term of every group in ``near`` that stand
within ``within`` words of each other. ``benign`` phrases are taken out of the text first ("nude
lipstick" has no nude in it).
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import yaml
from pydantic import Field, ValidationError, model_validator

from calotype.moderation.errors import PolicyError
from calotype.moderation.policy import Action, Category, Policy, PolicyModel

LISTS = pathlib.Path(__file__).with_name("lists")
MATCH_LIMIT = 64
"""Occurrences of one group that are looked at: more would only repeat themselves."""

_SPACES = re.compile(r"[\W_]+")
_APOSTROPHES = re.compile(r"['’`´]")  # noqa: RUF001 - the typographic one is meant
_STRETCHED = re.compile(r"([a-hj-vyz])\1{2,}")
_UNBOUNDED = re.compile(r"[^\u0000-\u024f\u0370-\u052f]")


def fold(text: str) -> str:
    """Lower case, without apostrophes, stretched letters and punctuation: ``Nuuude-ART!``."""
    text = _APOSTROPHES.sub("", text.casefold())
    return " ".join(_SPACES.sub(" ", _STRETCHED.sub(r"\1", text)).split())


class ListRule(PolicyModel):
    """One reason to refuse."""

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    category: Category | None = None
    action: Action | None = None
    terms: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    within: int = Field(8, ge=1, le=40, description="Words between the first and the last term.")
    unless: tuple[str, ...] = Field((), description="Groups that excuse the whole prompt.")

    @model_validator(mode="after")
    def _one_kind(self) -> ListRule:
        if bool(self.terms) == bool(self.near):
            raise ValueError("give either terms or near")
        return self


class TermList(PolicyModel):
    """One file of ``lists/``."""

    category: Category
    action: Action = "block"
    benign: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    rules: tuple[ListRule, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _groups_exist(self) -> TermList:
        for rule in self.rules:
            for group in (*rule.near, *rule.unless):
                if group not in self.groups:
                    raise ValueError(f"rule {rule.id} names the unknown group {group!r}")
        return self


@dataclass(frozen=True, slots=True)
class Match:
    """A rule of a list that fired."""

    category: Category
    action: Action
    rule: str


def compile_terms(terms: Iterable[str]) -> re.Pattern[str]:
    """One expression for many terms, longest first, on word boundaries.

    Scripts without spaces (Chinese, Japanese, Korean, Thai) and with prefixes (Arabic, Hebrew)
    are found inside of words too.
    """
    parts = []
    for term in sorted(set(terms), key=lambda term: (-len(term), term)):
        wildcard = term.endswith("*")
        body = re.escape(fold(term))
        if not body:
            continue
        if _UNBOUNDED.search(term):
            parts.append(body)
        else:
            parts.append(rf"\b{body}\w*" if wildcard else rf"\b{body}s?\b")
    return re.compile("|".join(parts) or r"(?!)")


class _CompiledRule:
    def __init__(self, rule: ListRule, owner: TermList, name: str) -> None:
        self.match = Match(
            rule.category or owner.category, rule.action or owner.action, f"lists.{name}.{rule.id}"
        )
        self.within = rule.within
        self.groups = (
            [compile_terms(owner.groups[group]) for group in rule.near]
            if rule.near
            else [compile_terms(rule.terms)]
        )
        self.unless = [compile_terms(owner.groups[group]) for group in rule.unless]

    def fires(self, text: str) -> bool:
        places: list[list[tuple[int, int]]] = []
        for expression in self.groups:
            found = [
                match.span()
                for match, _ in zip(expression.finditer(text), range(MATCH_LIMIT), strict=False)
            ]
            if not found:
                return False
            places.append(found)
        if any(expression.search(text) for expression in self.unless):
            return False
        return len(places) == 1 or _together(text, places, self.within)


def _together(text: str, places: Sequence[Sequence[tuple[int, int]]], within: int) -> bool:
    """Whether some match of the first group has one of every other group close to it."""
    starts = [0, *(match.end() for match in re.finditer(" ", text))]

    def word(position: int) -> int:
        low, high = 0, len(starts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if starts[middle] <= position else (low, middle)
        return low

    words = [[word(start) for start, _ in group] for group in places]
    return any(
        all(any(abs(first - other) <= within for other in group) for group in words[1:])
        for first in words[0]
    )


class TermMatcher:
    """All lists of one policy."""

    def __init__(self, lists: Mapping[str, TermList]) -> None:
        self._rules: list[tuple[re.Pattern[str], list[_CompiledRule]]] = [
            (
                compile_terms(owner.benign),
                [_CompiledRule(rule, owner, name) for rule in owner.rules],
            )
            for name, owner in lists.items()
        ]
        minors = lists.get("minors")
        self._minor = compile_terms(minors.groups.get("minor", ()) if minors else ())
        self.vocabulary: frozenset[str] = frozenset(
            fold(term)
            for owner in lists.values()
            for term in (
                *(term for rule in owner.rules for term in rule.terms),
                *(term for group in owner.groups.values() for term in group),
            )
            if " " not in term and not term.endswith("*")
        )

    @classmethod
    def of(cls, policy: Policy) -> TermMatcher:
        """The lists that a policy names, and its own terms."""
        lists = {name: load_list(name) for name in policy.lists}
        for number, own in enumerate(policy.terms):
            rule = ListRule(id=f"terms-{number}", terms=own.terms)
            lists[f"{policy.name}-{number}"] = TermList(
                category=own.category, action=own.action, rules=(rule,)
            )
        return cls(lists)

    def names_minor(self, text: str) -> bool:
        """Whether a text speaks of a minor; never if the policy does without the list minors."""
        return self._minor.search(fold(text)) is not None

    def matches(self, text: str) -> list[Match]:
        """Every rule that fires on a text, in the order of the lists."""
        folded = fold(text)
        found: list[Match] = []
        for benign, rules in self._rules:
            remaining = " ".join(benign.sub(" ", folded).split())
            found.extend(rule.match for rule in rules if rule.fires(remaining))
        return found


@lru_cache(maxsize=64)
def load_list(name: str) -> TermList:
    """Reads and checks one file of ``lists/``."""
    path = LISTS / f"{name}.yaml"
    try:
        return TermList.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except yaml.YAMLError as error:
        raise PolicyError(f"{path}: is not YAML ({' '.join(str(error).split())}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "document"
        raise PolicyError(f"{path}: {field}: {first['msg']}.") from error
