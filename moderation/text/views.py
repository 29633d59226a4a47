"""Views of a prompt: its text decoded, folded and freed of obfuscation.

A prompt that hides words from a filter is still understood by the model behind it. So besides the
raw text a few views are checked, and the highest score counts. Views that any text survives
(invisible characters removed, compatibility forms folded) always count. Speculative ones (digits
read as letters, rot13, reversed, look-alike letters, joined letters) exist only where they turn
tokens that are no English words into ones that are: always checked, they raised false blocks from
1 % to 31 % of benign prompts.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import gzip
import importlib.util
import math
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import msgpack

from calotype.moderation.errors import ClassifierUnavailable

READ_LIMIT = 60_000
"""Characters of a prompt that are checked; a longer one is refused before (`prompts`)."""
WINDOW_WORDS = 40
WINDOW_CHARACTERS = 320
"""A window also ends here: text without spaces must not exceed the encoder's 512 positions."""

_TAGS = re.compile("[\U000e0020-\U000e007e]")
_COMBINABLE = re.compile("[A-Za-z\u00c0-\u024f\u0370-\u052f\u1e00-\u1fff]")
_TOKEN = re.compile(r"\S+")
# Letters and separators have no character in common: with `_` in both, the time doubled with each
# letter of a text that does not match.
_SPELLED = re.compile(r"(?<![^\W_])[^\W_](?:[ .,\-_*|/·•~+]{1,2}[^\W_]){3,}(?![^\W_])")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{12,}={0,2}")
_HEX = re.compile(r"\b(?:[0-9a-fA-F]{2}){8,}\b")
_LETTERS = re.compile(r"[^\W\d_]{3,}")
_WORD = re.compile(r"[a-z]{2,}")
_LEET = str.maketrans("013456789@$!|+€£(", "oieasgtbgasiiteec")
_LEET_L = str.maketrans("013456789@$!|+€£(", "oleasgtbgaslltec" + "c")
_MASKED = re.compile(r"(?=.*[a-z].*[a-z])[a-z]+[*#_.@$!%]+[a-z*#_.@$!%]*", re.IGNORECASE)
_INVISIBLE = {"Cf", "Cc", "Co", "Cn"}


@dataclass(frozen=True, slots=True)
class View:
    """One reading of the prompt."""

    name: str
    text: str


class Lexicon:
    """English words: the measure by which a speculative view is admitted."""

    def __init__(self, extra: frozenset[str] = frozenset()) -> None:
        self._frequency = _english()
        self._extra = extra

    def __contains__(self, word: str) -> bool:
        return word in self._extra or self._frequency.get(word, 0.0) >= 1e-6

    def cost(self, word: str) -> float:
        """Surprise of a word, for cutting joined letters into words."""
        if word in self._extra:
            return 11.0
        frequency = self._frequency.get(word)
        if frequency is None or (len(word) == 1 and word not in "ai"):
            return 14.0 + 6.0 * len(word)
        return -math.log(frequency)

    def share(self, text: str) -> float:
        """The part of a text's words (three letters and more) that is English."""
        words = _LETTERS.findall(text.casefold())
        return sum(word in self for word in words) / len(words) if words else 0.0

    def completions(self, masked: str) -> str | None:
        """The listed term that ``n*de`` stands for, if there is exactly one."""
        pattern = re.compile("".join(c if c.isalpha() else r"\w" for c in masked.casefold()))
        found = [word for word in self._extra if pattern.fullmatch(word)]
        return found[0] if len(found) == 1 else None


@lru_cache(maxsize=1)
def _english() -> dict[str, float]:
    # The small list (29,000 words) takes 15 MB; the large one adds names and typing errors.
    # Read without importing wordfreq, whose tokenizers take 0.4 s of CPU: a list of words for each
    # hundredth of a power of ten, after a header.
    package = importlib.util.find_spec("wordfreq")
    assert package is not None and package.origin is not None, "a dependency of this package"
    path = pathlib.Path(package.origin).with_name("data") / "small_en.msgpack.gz"
    with gzip.open(path) as file:
        header, *buckets = msgpack.load(file)
    if header != {"format": "cB", "version": 1}:
        raise ClassifierUnavailable(f"Word list {path} has the unknown format {header}.")
    return {word: 10 ** (-place / 100) for place, words in enumerate(buckets) for word in words}


@lru_cache(maxsize=1)
def _confusables() -> dict[int, str]:
    table: dict[int, str] = {}
    path = pathlib.Path(__file__).parents[1] / "policy" / "lists" / "confusables.txt"
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            letter, alike = line.split()
            table.update({ord(character): letter for character in alike})
    table.update({0x1F1E6 + i: chr(ord("a") + i) for i in range(26)})
    return table


def readable(text: str) -> str:
    """What can be encoded at all: lone surrogates replaced, NUL (it ends a C string) removed."""
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.replace("\0", " ")


def views(text: str, lexicon: Lexicon) -> list[View]:
    """Every reading worth checking, the raw one first, no two alike."""
    raw = readable(text)[:READ_LIMIT]
    found: dict[str, str] = {}

    def add(name: str, reading: str) -> None:
        reading = " ".join(reading.split())
        if reading and reading not in found:
            found[reading] = name

    add("raw", raw)
    tags = "".join(chr(ord(character) - 0xE0000) for character in _TAGS.findall(raw))
    add("tags", tags)
    plain = simplified(raw)
    add("plain", plain)
    for decoded in _decoded(plain):
        add("base64", decoded)
    base = plain
    for name, rewrite in _TOKENWISE:
        rewritten = rewrite(base, lexicon)
        if rewritten is not None:
            add(name, rewritten)
            base = rewritten
    for name, reading in _whole(plain):
        if _better(reading, plain, lexicon):
            add(name, reading)
    return [View(name, reading) for reading, name in found.items()]


def simplified(text: str) -> str:
    """Without invisible characters and stacked accents, in compatibility form."""
    visible = "".join(
        " " if c.isspace() else c
        for c in text
        if c.isspace() or unicodedata.category(c) not in _INVISIBLE
    )
    kept: list[str] = []
    base, marks = "", 0
    for character in unicodedata.normalize("NFKD", visible):
        if unicodedata.category(character).startswith("M"):
            # Vowel signs of Hindi, Thai or Arabic are marks too, and no reading is without them:
            # only Latin, Greek and Cyrillic letters lose theirs, and nothing keeps a stack.
            marks += 1
            if not base.isalpha() or _COMBINABLE.match(base) or marks > 3:
                continue
        else:
            base, marks = character, 0
        kept.append(character)
    return unicodedata.normalize("NFC", "".join(kept))


def _decoded(text: str) -> Iterator[str]:
    for match in list(_BASE64.finditer(text))[:16]:
        token = match.group().rstrip("=").replace("-", "+").replace("_", "/")
        yield from _printable(partial(base64.b64decode, token + "=" * (-len(token) % 4)))
    for match in list(_HEX.finditer(text))[:16]:
        yield from _printable(partial(bytes.fromhex, match.group()))


def _printable(decode: Callable[[], bytes]) -> Iterator[str]:
    try:
        decoded = decode().decode("utf-8")
    except (binascii.Error, ValueError):
        return
    letters = sum(character.isalpha() or character.isspace() for character in decoded)
    if len(decoded) >= 6 and letters >= 0.8 * len(decoded):
        yield decoded


def _skeleton(text: str, lexicon: Lexicon) -> str | None:
    """Look-alike letters read as Latin, in words that become English by it."""
    table = _confusables()

    def replace(word: str) -> str:
        latin = word.translate(table)
        mixed = any("a" <= c <= "z" for c in word.casefold())
        return latin if mixed or _core(latin) in lexicon else word

    return _rewrite(text, replace)


def _joined(text: str, lexicon: Lexicon) -> str | None:
    """``n u d e`` and ``n.u.d.e`` as words."""

    def join(match: re.Match[str]) -> str:
        spelled = match.group()
        # Two separators between letters part words when single ones part letters.
        words = re.split(r"[ .,\-_*|/·•~+]{2}", spelled)
        letters = ["".join(c for c in word if c.isalnum()) for word in words]
        return " ".join(segmented(word, lexicon) for word in letters if word)

    rewritten = _SPELLED.sub(join, text)
    return rewritten if rewritten != text else None


def _unleet(text: str, lexicon: Lexicon) -> str | None:
    """``n4k3d`` and ``n*ked`` read as words."""

    def replace(word: str) -> str:
        core = _core(word)
        if core in lexicon or not any(c.isalpha() for c in word):
            return word
        for table in (_LEET, _LEET_L):
            letters = word.casefold().translate(table)
            if _core(letters) != core and _core(letters) in lexicon:
                return letters
        if _MASKED.fullmatch(word):
            return lexicon.completions(word) or word
        return word

    return _rewrite(text, replace)


_TOKENWISE: tuple[tuple[str, Callable[[str, Lexicon], str | None]], ...] = (
    ("skeleton", _skeleton),
    ("joined", _joined),
    ("unleet", _unleet),
)


def _whole(text: str) -> Iterator[tuple[str, str]]:
    yield "rot13", codecs.encode(text, "rot13")
    yield "reversed", text[::-1]
    yield "reversed-words", " ".join(word[::-1] for word in text.split())
    if len(text) >= 8 and " " not in text.strip():
        yield "reversed", text[::-1]


def _better(reading: str, text: str, lexicon: Lexicon) -> bool:
    share = lexicon.share(reading)
    return share >= 0.6 and share >= lexicon.share(text) + 0.3


def _core(word: str) -> str:
    return word.casefold().strip(".,;:!?\"'()[]{}<>*#-_")


def _rewrite(text: str, replace: Callable[[str], str]) -> str | None:
    rewritten = _TOKEN.sub(lambda match: replace(match.group()), text)
    return rewritten if rewritten != text else None


def segmented(letters: str, lexicon: Lexicon) -> str:
    """Joined letters cut into the likeliest words; at most 400 letters are looked at."""
    letters = letters.casefold()
    if letters in lexicon or len(letters) > 400:
        return letters
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(letters) + 1):
        best.append(
            min(
                (best[start][0] + lexicon.cost(letters[start:end]), start)
                for start in range(max(0, end - 16), end)
            )
        )
    words: list[str] = []
    end = len(letters)
    while end:
        start = best[end][1]
        words.append(letters[start:end])
        end = start
    return " ".join(reversed(words))


def windows(text: str) -> list[str]:
    """Pieces that fit the encoder, so that a long benign text cannot dilute a short other one.

    They are of about the same length: a last piece of two words would be checked out of context.
    """
    words = [
        word[start : start + WINDOW_CHARACTERS]
        for word in text.split()
        for start in range(0, len(word), WINDOW_CHARACTERS)
    ]
    pieces = _packed(words, WINDOW_WORDS)
    if len(pieces) > 1:
        pieces = _packed(words, -(-len(words) // len(pieces)))
    return list(dict.fromkeys(pieces))


def _packed(words: list[str], limit: int) -> list[str]:
    pieces: list[list[str]] = []
    size = 0
    for word in words:
        full = pieces and (len(pieces[-1]) >= limit or size + len(word) + 1 > WINDOW_CHARACTERS)
        if not pieces or full:
            pieces.append([])
            size = 0
        pieces[-1].append(word)
        size += len(word) + 1
    return [" ".join(piece) for piece in pieces]
