"""The policies in force: the model's, and those that teams and adapters add."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from calotype.moderation.documents import ReadOnlyJson
from calotype.moderation.errors import PolicyError
from calotype.moderation.policy.combination import at, strictest
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.presets import granted, is_level

REMEMBERED = 256
"""Combinations that are kept ready; teams and adapters of one model rarely make more."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The additional policies and the level that apply to one check."""

    policies: tuple[str, ...] = ()
    """Names of the policies that apply beside the model's, the most specific one first."""
    requested_level: str | None = None
    """What the caller asked for (`presets.is_level`); None = nothing."""

    @classmethod
    def from_payload(cls, payload: ReadOnlyJson | None) -> Scope:
        """Raises PolicyError for a level that does not exist."""
        given = payload or {}
        level = given.get("wish")
        if level is not None and not is_level(str(level)):
            raise PolicyError(f"{level!r} is no level: low, or 0 to 6.")
        return cls(tuple(given.get("policies", ())), None if level is None else str(level))


@dataclass(frozen=True, slots=True)
class Applying:
    """What applies in a scope."""

    policy: Policy
    preset: str | None = None
    """The preset of the policies that was asked for and given; ``auto`` = none of them."""
    granted: bool = True
    """Whether it is what the caller asked for."""


class Rulebook:
    """The policies and a cache of their combinations. Thread-safe.

    Args:
        policy: the model's.
        named: name -> policy, for those that a scope may name.
    """

    def __init__(self, policy: Policy, named: Mapping[str, Policy] | None = None) -> None:
        self.policy = policy
        self._named = dict(named or {})
        self._lock = threading.Lock()
        self._ready: dict[Scope, Applying] = {}

    def applying(self, scope: Scope) -> Applying:
        """The strictest of all that apply in a scope.

        Raises:
            PolicyError: the scope names a policy that is not here.
        """
        with self._lock:
            found = self._ready.get(scope)
        if found is None:
            found = self._combined(scope)
            with self._lock:
                if len(self._ready) >= REMEMBERED:
                    self._ready.clear()
                # The first one stays: what was compiled for it is found by it.
                found = self._ready.setdefault(scope, found)
        return found

    def _combined(self, scope: Scope) -> Applying:
        policies: list[Policy] = []
        for name in scope.policies:
            if name not in self._named:
                raise PolicyError(
                    f"The ModerationPolicy {name}, against which this must be checked, is not "
                    "known where it is checked (yet)."
                )
            policies.append(self._named[name])
        policies.append(self.policy)
        if scope.requested_level is None:
            return Applying(strictest(policies))
        answers = [granted(policy, scope.requested_level) for policy in policies]
        levelled = [
            policy if preset is None else at(policy, preset)
            for policy, (preset, _) in zip(policies, answers, strict=True)
        ]
        presets = dict.fromkeys(preset or "auto" for preset, _ in answers)
        return Applying(strictest(levelled), "+".join(presets), all(whole for _, whole in answers))
