"""The messages of refused prompts and images, in several languages.

The sentences stand in ``refusals.yaml``. The wording of an API's error stays English, since clients
recognise it; this is the sentence to show to a person.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from functools import lru_cache

from calotype.moderation.documents import packaged_yaml
from calotype.moderation.policy.categories import Category

DEFAULT = "en"
ANY = "any"
HELD = "held"
_MAX_CHARS = 500
_MAX_RANGES = 20


@lru_cache(maxsize=1)
def sentences() -> dict[str, dict[str, str]]:
    """Category (or ``any``, ``held``) -> language -> sentence."""
    path = pathlib.Path(__file__).with_name("refusals.yaml")
    found: dict[str, dict[str, str]] = packaged_yaml(path.read_text(encoding="utf-8"))
    return found


def languages() -> tuple[str, ...]:
    """What the service speaks."""
    return tuple(sentences()[ANY])


def preferred_language(header: str) -> str:
    """The best of `languages` for an ``Accept-Language`` header; English if it names none.

    RFC 9110, 12.5.4: ranges with weights; ``de-AT`` is answered in ``de``. What cannot be read is
    left out.
    """
    wanted: list[tuple[float, int, str]] = []
    for place, part in enumerate(header[:_MAX_CHARS].split(",")[:_MAX_RANGES]):
        name, _, weight = part.partition(";")
        try:
            quality = float(weight.strip().removeprefix("q=")) if weight.strip() else 1.0
        except ValueError:
            continue
        primary = name.strip().lower().partition("-")[0]
        language = DEFAULT if primary == "*" else primary
        if language in languages() and 0.0 < quality <= 1.0:
            wanted.append((-quality, place, language))
    return min(wanted)[2] if wanted else DEFAULT


def held_message(language: str = DEFAULT) -> str:
    """The sentence for images that a person looks at before anybody sees them."""
    return sentences()[HELD][language]


def refusal_message(
    categories: Sequence[str], own: str | None = None, language: str = DEFAULT
) -> str:
    """The sentence for a refusal.

    Args:
        categories: for which it is refused; the gravest of them that has a sentence is named.
        own: what the policy's owner says; it is not translated.
        language: one of `languages`.
    """
    if own is not None and own not in _packaged():
        return own
    known = [name for name in _GRAVEST_FIRST if name in categories]
    for name in known:
        for key in (name, name.partition("/")[0]):
            if key in sentences():
                return sentences()[key][language]
    return sentences()[ANY][language]


_GRAVEST_FIRST = (
    Category.SEXUAL_MINORS.value,
    Category.REAL_PERSON_INTIMATE.value,
    Category.SELF_HARM_INTENT.value,
    Category.SELF_HARM_INSTRUCTIONS.value,
    Category.SELF_HARM.value,
    *(
        category.value
        for category in Category
        if not category.value.startswith(("self-harm", "sexual/", "real_"))
    ),
)


@lru_cache(maxsize=1)
def _packaged() -> frozenset[str]:
    """The English sentences, which the package's policies have too."""
    return frozenset(by_language[DEFAULT] for by_language in sentences().values())
