"""Many words and phrases looked up in a text at once, by its words.

A text is folded first: lower case, one space between words, no apostrophes, stretched letters and
punctuation. A phrase is found where its words stand; a plural ``s`` is implied, ``*`` stands for
the rest of the last word. Scripts without spaces (Chinese, Japanese, Korean, Thai) and with
prefixes (Arabic, Hebrew) are found inside of words too.

The cost follows the length of the text, hardly the number of phrases.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property

_SPACES = re.compile(r"[\W_]+")
_APOSTROPHES = re.compile(r"['’`´]")  # noqa: RUF001 - the typographic one is meant
_STRETCHED = re.compile(r"([a-hj-vyz])\1{2,}")
_UNBOUNDED = re.compile(r"[^\u0000-\u024f\u0370-\u052f]")


def fold(text: str) -> str:
    """Lower case, without apostrophes, stretched letters and punctuation: ``Nuuude-ART!``."""
    text = _APOSTROPHES.sub("", text.casefold())
    return " ".join(_SPACES.sub(" ", _STRETCHED.sub(r"\1", text)).split())


class Folded:
    """A folded text and its words."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    @classmethod
    def of(cls, text: str) -> Folded:
        return cls(fold(text).split())

    @cached_property
    def text(self) -> str:
        return " ".join(self.words)

    @cached_property
    def unbounded(self) -> bool:
        """Whether a script is in it whose phrases stand inside of words."""
        return _UNBOUNDED.search(self.text) is not None

    def word_at(self, position: int) -> int:
        """The number of the word that a character of the text is in."""
        return bisect_right(self._starts, position) - 1

    @cached_property
    def _starts(self) -> list[int]:
        starts, at = [], 0
        for word in self.words:
            starts.append(at)
            at += len(word) + 1
        return starts


class Phrases:
    """A set of terms.

    Args:
        terms: words and phrases; ``*`` at the end of one stands for the rest of its last word.
    """

    def __init__(self, terms: Iterable[str]) -> None:
        self._single: set[str] = set()
        self._stems: set[str] = set()
        """Single words with a star."""
        self._long: dict[str, list[tuple[list[str], bool]]] = {}
        """First word of a phrase -> its other words, and whether it ends with a star."""
        inside = []
        for term in set(terms):
            words = fold(term).split()
            if not words:
                continue
            if _UNBOUNDED.search(term):
                inside.append(" ".join(words))
            elif len(words) > 1:
                self._long.setdefault(words[0], []).append((words[1:], term.endswith("*")))
            elif term.endswith("*"):
                self._stems.add(words[0])
            else:
                self._single.update((words[0], f"{words[0]}s"))
        self._stem_lengths = sorted({len(stem) for stem in self._stems})
        self._inside = re.compile(
            "|".join(re.escape(term) for term in sorted(inside, key=len, reverse=True)) or r"(?!)"
        )

    def places(self, text: Folded) -> Iterator[int]:
        """The numbers of the words where a term begins."""
        for number in range(len(text.words)):
            if self._length_at(text.words, number):
                yield number
        if text.unbounded:
            for match in self._inside.finditer(text.text):
                yield text.word_at(match.start())

    def __contains__(self, text: Folded) -> bool:
        """Whether some term is in a text."""
        return next(self.places(text), None) is not None

    def without(self, text: Folded) -> Folded:
        """The text with every term taken out, the longest at each place."""
        kept: list[str] = []
        number = 0
        while number < len(text.words):
            length = self._length_at(text.words, number)
            if not length:
                kept.append(text.words[number])
            number += length or 1
        rest = text if len(kept) == len(text.words) else Folded(kept)
        if rest.unbounded and self._inside.search(rest.text):
            return Folded(self._inside.sub(" ", rest.text).split())
        return rest

    def _length_at(self, words: list[str], number: int) -> int:
        """Of how many words the longest term is that begins at one; 0 = none does."""
        word = words[number]
        longest = 1 if word in self._single or self._has_stem(word) else 0
        for others, starred in self._long.get(word, ()):
            end = number + 1 + len(others)
            if end - number <= longest or end > len(words):
                continue
            last = words[end - 1]
            if words[number + 1 : end - 1] == others[:-1] and (
                last.startswith(others[-1]) if starred else last in (others[-1], f"{others[-1]}s")
            ):
                longest = end - number
        return longest

    def _has_stem(self, word: str) -> bool:
        return any(
            word[:length] in self._stems for length in self._stem_lengths if length <= len(word)
        )
