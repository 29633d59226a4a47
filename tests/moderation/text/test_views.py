"""The readings of a prompt: evasions are undone, and plain prompts gain no reading."""

import base64
import codecs
import math
from collections.abc import Callable

import pytest
from wordfreq import get_frequency_dict

from calotype.moderation.policy.policy import Policy
from calotype.moderation.text.matching import TermMatcher
from calotype.moderation.text.views import READ_LIMIT, Lexicon, readable, views, windows

HIDDEN = "a photo of a naked woman on the bed"


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon(TermMatcher.of(Policy.default()).vocabulary)


EVASIONS: dict[str, Callable[[str], str]] = {
    "plain": lambda text: "\u200b".join(text),
    "bidi": lambda text: "\u202e" + "\u2066".join(text),
    "stacked": lambda text: "".join(letter + "\u0336\u0301\u0308" for letter in text),
    "fullwidth": lambda text: "".join(
        chr(ord(letter) + 0xFEE0) if letter != " " else " " for letter in text
    ),
    "bold": lambda text: text.translate({ord("a") + i: 0x1D41A + i for i in range(26)}),
    "tags": lambda text: "a flower" + "".join(chr(0xE0000 + ord(letter)) for letter in text),
    "skeleton": lambda text: text.translate(str.maketrans("aeopc", "аеорс")),  # noqa: RUF001
    "joined": lambda text: " ".join(text.replace(" ", "")),
    "dotted": lambda text: ".".join(text.replace(" ", "")),
    "double": lambda text: "  ".join(" ".join(word) for word in text.split()),
    "unleet": lambda text: text.translate(str.maketrans("aeio", "4310")),
    "base64": lambda text: "decode: " + base64.b64encode(text.encode()).decode(),
    "hex": lambda text: text.encode().hex(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "reversed": lambda text: text[::-1],
    "reversed words": lambda text: " ".join(word[::-1] for word in text.split()),
}


def test_the_word_list_is_that_of_wordfreq() -> None:
    lexicon, frequencies = Lexicon(), get_frequency_dict("en", wordlist="small")
    assert len(frequencies) > 20_000
    for word, frequency in frequencies.items():
        assert (word in lexicon) is (frequency >= 1e-6)
        if len(word) > 1:
            assert math.isclose(lexicon.cost(word), -math.log(frequency))


@pytest.mark.parametrize("evasion", EVASIONS)
def test_evasion_is_read(lexicon: Lexicon, evasion: str) -> None:
    readings = [view.text.casefold() for view in views(EVASIONS[evasion](HIDDEN), lexicon)]
    assert any("naked woman" in " ".join(reading.split()) for reading in readings), readings


@pytest.mark.parametrize(
    "text",
    [
        "A group of women are sitting on a bed.",
        "3d render of R2D2, 8k, f/1.4, 50mm, trending on artstation",
        "a map of Llanfairpwllgwyngyll by Jan Beksiński",
        "новая обложка книги",
        "राष्ट्रीय ध्वज और पहाड़",
    ],
)
def test_plain_prompt_has_no_speculative_reading(lexicon: Lexicon, text: str) -> None:
    names = {view.name for view in views(text, lexicon)}
    assert names <= {"raw", "plain", "unleet"}
    assert not names & {"rot13", "reversed", "reversed-words", "joined", "skeleton", "base64"}


def test_masked_letters_are_completed(lexicon: Lexicon) -> None:
    assert any(
        "pornographic" in v.text or "porn" in v.text for v in views("hardcore p*rn", lexicon)
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "\u200b\u200b",
        "😀" * 2000,
        "\ud800\udfff lone",
        "a\0b",
        "e" + "\u0301" * 10_000,
        "x " * 20_000,
        "x" * 40_000,
        "naked woman " * 3000,
        "ab1" * 13_000,
    ],
)
def test_strange_text_ends_in_encodable_views(lexicon: Lexicon, text: str) -> None:
    for view in views(text[:READ_LIMIT], lexicon):
        view.text.encode("utf-8")
        assert "\0" not in view.text


def test_surrogate_pairs_survive() -> None:
    assert readable("\ud83d\ude00") == "😀"


def test_windows_cover_the_text_in_like_pieces() -> None:
    words = [f"word{number}" for number in range(95)]
    pieces = windows(" ".join(words))
    assert " ".join(pieces).split() == words
    lengths = [len(piece.split()) for piece in pieces]
    assert max(lengths) <= 40 and min(lengths) >= 20


def test_a_word_without_end_is_cut_for_the_encoder() -> None:
    assert max(map(len, windows("x" * 5000 + " " + "y" * 5000))) <= 320
