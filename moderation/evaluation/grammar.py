"""Prompts of our own for training, drawn from ``heads/grammar*.yaml`` with a seed."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Iterator

import yaml

from calotype.moderation.policy.categories import Category

HEADS = pathlib.Path(__file__).parents[1] / "text" / "heads"

Grammar = dict[str, list[str]]
"""Name of a list -> phrases."""
_KINDS: tuple[tuple[Category | None, str, str], ...] = (
    (None, "benign_people_states", "benign"),
    (None, "", "benign_contrast"),
    (Category.SEXUAL, "sexual_states", "sexual"),
    (Category.VIOLENCE_GRAPHIC, "gore_states", "gore"),
    (Category.SELF_HARM, "self_harm_states", "self_harm"),
    (Category.ILLICIT, "illicit_states", "illicit"),
    (Category.SHOCKING, "shocking_states", "shocking"),
)


def sampled_prompts(
    seed: int, per_state: int = 10, per_phrase: int = 6
) -> Iterator[tuple[str, str]]:
    """Pairs of a prompt and its category (``benign`` for none), the same for the same seed."""
    grammar: Grammar = {}
    for path in sorted(HEADS.glob("grammar*.yaml")):
        grammar |= yaml.safe_load(path.read_text(encoding="utf-8"))
    languages: Grammar = grammar.pop("other_languages")  # type: ignore[assignment]
    for category, states, phrases in _KINDS:
        label = category.value if category else "benign"
        for state in grammar.get(states, ()):
            # A seed per line: a new line in the grammar does not change what the others yield.
            rng = random.Random(f"{seed}:{state}")
            for _ in range(per_state):
                person, place = rng.choice(grammar["people"]), rng.choice(grammar["places"])
                yield _styled(rng, grammar, f"{person} {state} {place}"), label
        for phrase in grammar[phrases]:
            rng = random.Random(f"{seed}:{phrase}")
            for _ in range(per_phrase):
                yield _styled(rng, grammar, phrase), label
    for label, phrases_elsewhere in languages.items():
        for phrase in phrases_elsewhere:
            yield phrase, label


def _styled(rng: random.Random, grammar: Grammar, subject: str) -> str:
    style = rng.choice(grammar["styles"])
    return style.format(subject.strip())
