"""Term lists: prompts that are refused for their words, whatever the classifiers score.

A list is a YAML file in ``lists/``. Terms are folded like the prompt (lower case, one space between
words), so they need no variants; ``*`` stands for the rest of a word, a trailing plural ``s`` is
implied. A rule fires on one of its ``terms``, or on one term of every group in ``near`` that stand
within ``within`` words of each other. ``benign`` phrases are taken out of the text first ("nude
lipstick" has no nude in it).

Lists of names do nothing by themselves: with the action ``thresholds`` a hit scores 1, and the
policy's thresholds for prompts of the category say what follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from calotype.moderation.documents import packaged_yaml
from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.categories import Category, Modality
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.rules import Action, PolicyModel
from calotype.moderation.policy.spec import LISTS, available_lists
from calotype.moderation.text.phrases import Folded, Phrases, fold

FIGURE = "figure"
"""Group of the names of another category."""
MATCH_LIMIT = 64
"""Occurrences of one group that are looked at: more would only repeat themselves."""


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
    action: Action | Literal["thresholds"] = "block"
    figures: Category | None = Field(
        None, description="The group figure has all terms of this category, the owner's too."
    )
    benign: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    rules: tuple[ListRule, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _groups_exist(self) -> TermList:
        for rule in self.rules:
            for group in (*rule.near, *rule.unless):
                if group not in self.groups and not (self.figures and group == FIGURE):
                    raise ValueError(f"rule {rule.id} names the unknown group {group!r}")
        return self


@dataclass(frozen=True, slots=True)
class Match:
    """A rule of a list that fired."""

    category: Category
    action: Action
    rule: str


class _CompiledRule:
    def __init__(self, rule: ListRule, owner: TermList, name: str) -> None:
        action = rule.action or owner.action
        assert action != "thresholds", "settled by _under"
        self.match = Match(rule.category or owner.category, action, f"lists.{name}.{rule.id}")
        self.within = rule.within
        self.groups = (
            [Phrases(owner.groups[group]) for group in rule.near]
            if rule.near
            else [Phrases(rule.terms)]
        )
        self.unless = [Phrases(owner.groups[group]) for group in rule.unless]

    def fires(self, text: Folded) -> bool:
        places: list[list[int]] = []
        for phrases in self.groups:
            found = list(islice(phrases.places(text), MATCH_LIMIT))
            if not found:
                return False
            places.append(found)
        if any(text in phrases for phrases in self.unless):
            return False
        # Some term of the first group has one of every other group close to it.
        return any(
            all(any(abs(first - other) <= self.within for other in group) for group in places[1:])
            for first in places[0]
        )


class TermMatcher:
    """All lists of one policy."""

    def __init__(self, lists: Mapping[str, TermList]) -> None:
        self._rules: list[tuple[Phrases, list[_CompiledRule]]] = [
            (
                Phrases(owner.benign),
                [_CompiledRule(rule, owner, name) for rule in owner.rules],
            )
            for name, owner in lists.items()
        ]
        minors = lists.get("minors")
        self._minor = Phrases(minors.groups.get("minor", ()) if minors else ())
        real = lists.get("real-people")
        self._benign = Phrases(real.benign if real else ())
        self._undressing = Phrases(real.groups.get("undressing", ()) if real else ())
        self.vocabulary: frozenset[str] = frozenset(
            fold(term)
            for owner in lists.values()
            for term in (
                *(term for rule in owner.rules for term in rule.terms),
                *(term for group in owner.groups.values() for term in group),
            )
            if " " not in term and len(term) > 2 and not term.endswith("*")
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
        settled = {name: _under(policy, owner) for name, owner in lists.items()}
        return cls({name: owner for name, owner in settled.items() if owner is not None})

    def names_minor(self, text: str) -> bool:
        """Whether a text speaks of a minor; never if the policy does without the list minors."""
        return Folded.of(text) in self._minor

    def asks_to_undress(self, text: str) -> bool:
        """Whether a text asks for somebody's body; never without the list real-people."""
        return self._benign.without(Folded.of(text)) in self._undressing

    def matches(self, text: str) -> list[Match]:
        """Every rule that fires on a text, in the order of the lists."""
        folded = Folded.of(text)
        found: list[Match] = []
        for benign, rules in self._rules:
            remaining = benign.without(folded)
            found.extend(rule.match for rule in rules if rule.fires(remaining))
        return found


def _under(policy: Policy, owner: TermList) -> TermList | None:
    """A list with what it does under a policy; None if that is nothing."""
    if owner.action == "thresholds":
        effect = policy.rule(owner.category, Modality.TEXT).verdict(1.0)
        if effect is None:
            return None
        owner = owner.model_copy(update={"action": effect[0].value.lower()})
    if owner.figures is not None:
        names, benign = _names(policy, owner.figures)
        groups = {**owner.groups, FIGURE: names}
        owner = owner.model_copy(update={"groups": groups, "benign": (*owner.benign, *benign)})
    return owner


def _names(policy: Policy, category: Category) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The terms of a category, of all lists and of the policy's owner, and what only looks so."""
    packaged = [load_list(name) for name in available_lists()]
    named = [owner for owner in packaged if owner.category is category]
    listed = [term for owner in named for rule in owner.rules for term in rule.terms]
    own = [term for terms in policy.terms if terms.category is category for term in terms.terms]
    benign = tuple(phrase for owner in named for phrase in owner.benign)
    return tuple(dict.fromkeys((*listed, *own))), benign


@lru_cache(maxsize=64)
def load_list(name: str) -> TermList:
    """Reads and checks one file of ``lists/``."""
    path = LISTS / f"{name}.yaml"
    try:
        return TermList.model_validate(packaged_yaml(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except yaml.YAMLError as error:
        raise PolicyError(f"{path}: is not YAML ({' '.join(str(error).split())}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "document"
        raise PolicyError(f"{path}: {field}: {first['msg']}.") from error
