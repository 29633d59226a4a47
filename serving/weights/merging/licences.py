"""Which licence the result of a merge has, and which merges no licence allows. Imports no torch.

Not legal advice: what is not known to be allowed is refused, and whoever has the owners' word says
so in the recipe.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

from calotype.serving.core.errors import InvalidRequest

PERMISSIVE = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0"}
)
_FLUX_DEV = "flux-dev-non-commercial-license"
_SAME = {
    "flux-2-dev-non-commercial-license": _FLUX_DEV,
    "flux-non-commercial-license": _FLUX_DEV,
    "flux-1-dev-non-commercial-license": _FLUX_DEV,
}
"""Names that Black Forest Labs gives one licence: derivatives stay under it, and none may be used
commercially without another agreement."""
_LINE = re.compile(r"^(license|license_name):\s*[\"']?([^\s\"']+)", re.MULTILINE)
_FRONT = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)


def licence_of_folder(folder: pathlib.Path) -> str | None:
    """What the README of a model says in its front matter; None if it says nothing."""
    try:
        front = _FRONT.match((folder / "README.md").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if front is None:
        return None
    found = dict(_LINE.findall(front[1]))
    # "other" points to the licence's name.
    return found.get("license_name") or found.get("license")


def merged_licence(found: Mapping[str, str | None], *, commercial: bool) -> str | None:
    """The licence of what is made of all of them; None where none of them has one.

    Args:
        found: name of an input -> its licence.

    Raises:
        InvalidRequest: (``licence_conflict``) they cannot be combined, or not for that use.
    """
    licences = {name: None if text is None else _plain(text) for name, text in found.items()}
    stated = {name: text for name, text in licences.items() if text is not None}
    if not stated:
        return None
    if len(stated) < len(licences):
        silent = next(name for name in licences if name not in stated)
        raise _conflict(
            f"{silent} says no licence, and {_first(stated)}: write it into the recipe "
            "(licence of the input)"
        )
    bound = {name: text for name, text in stated.items() if text not in PERMISSIVE}
    kinds = sorted(set(bound.values()))
    if len(kinds) > 1:
        raise _conflict(
            f"{' and '.join(f'{name} is under {text}' for name, text in bound.items())}, and "
            "neither lets what is made of it be under the other: leave one out, or state what "
            "the owners agreed to (licence of the recipe)"
        )
    result = kinds[0] if kinds else sorted(set(stated.values()))[0]
    if commercial and "non-commercial" in result.replace("noncommercial", "non-commercial"):
        raise _conflict(
            f"commercial use is asked for, but {_first(bound)}, and so is what is made of it: "
            "buy a licence and state it (licence of the recipe), or leave it out"
        )
    return result


def _plain(text: str) -> str:
    name = text.strip().lower().replace("_", "-").replace(".1-", "-1-")
    return _SAME.get(name, name)


def _first(stated: Mapping[str, str]) -> str:
    name, text = next(iter(stated.items()))
    return f"{name} is under {text}"


def _conflict(sentence: str) -> InvalidRequest:
    return InvalidRequest(
        f"These licences cannot be merged: {sentence}.", code="licence_conflict", param="inputs"
    )
