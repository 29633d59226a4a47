"""What the two judges see."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.samples import concepts

from calotype.serving.acceptance.copying import CopyDetector
from calotype.serving.acceptance.embedding_judge import EmbeddingJudge
from calotype.serving.acceptance.exact_judge import Asked, ExactJudge, read_prompt
from calotype.serving.core.errors import InvalidRequest

Pixels = NDArray[np.uint8]


def pictures(concept: str, count: int, seed: int) -> list[Pixels]:
    return [pixels for pixels, _ in concepts.data_set(concept, count, seed)]


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("a small red zorbl on a blue background, at the top",
         Asked(None, "red", "blue", "top")),
        ("a large black heart on a white background, in the top left corner",
         Asked("heart", "black", "white", "top left")),
        ("a yellow plus", Asked("cross", "yellow", None, None)),
    ],
)  # fmt: skip
def test_a_prompt_is_read_word_by_word(prompt: str, asked: Asked) -> None:
    assert read_prompt(prompt) == asked


@pytest.mark.parametrize("concept", ["arrow", "tee", "wedge"])
def test_the_exact_judge_tells_its_subject_from_every_other_shape(concept: str) -> None:
    judge = ExactJudge(tuple(pictures(concept, 20, 0)))
    shown = concepts.showings(8, 99)
    own = [concepts.draw(concept, s, random.Random(1)) for s in shown]
    assert np.mean(judge.subject(own)) > 0.9
    assert np.mean(judge.adherence([s.caption() for s in shown], own)) > 0.95
    for other in concepts.OUTLINES:
        if other != concept:
            assert sum(judge.subject(pictures(other, 3, 7))) <= 1, other


def test_training_pictures_without_a_shape_are_an_error() -> None:
    plain = np.full((128, 128, 3), 240, np.uint8)
    with pytest.raises(InvalidRequest, match="no image shows a flat shape"):
        ExactJudge((plain, plain)).subject([plain])


class _Colours:
    """An embedding of mean colours, and of the words that name them."""

    def pictures(self, given: list[Pixels]) -> NDArray[np.float32]:
        return self._unit(np.stack([p.reshape(-1, 3).mean(0) + 1 for p in given]))

    def texts(self, texts: list[str]) -> NDArray[np.float32]:
        named = {"red": (255, 1, 1), "green": (1, 255, 1), "blue": (1, 1, 255)}
        return self._unit(
            np.array([named[next(c for c in named if c in text)] for text in texts], np.float32)
        )

    def _unit(self, found: NDArray[np.float32]) -> NDArray[np.float32]:
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def flat(red: int, green: int, blue: int) -> Pixels:
    return np.full((64, 64, 3), (red, green, blue), np.uint8)


def test_a_similarity_is_read_between_the_bare_model_and_the_training_pictures() -> None:
    training = [flat(250, i, 2 * i) for i in range(6)]
    judge = EmbeddingJudge(_Colours(), training, [flat(0, 0, 250), flat(0, 250, 0)])
    own, half, bare = judge.subject([flat(255, 4, 4), flat(200, 120, 120), flat(0, 0, 255)])
    assert own > 0.95
    assert bare < 0.05
    assert bare < half < own


def test_a_subject_in_a_corner_is_found_by_its_crop() -> None:
    training = [flat(250, i, i) for i in range(6)]
    corner = flat(0, 0, 250)
    corner[:40, :40] = (250, 3, 3)
    judge = EmbeddingJudge(_Colours(), training, [flat(0, 0, 250)])
    assert judge.subject([corner])[0] > 0.9


def test_a_picture_obeys_when_it_fits_its_own_prompt_better_than_the_others() -> None:
    judge = EmbeddingJudge(_Colours(), [], [])
    prompts = ["a red wall", "a green wall", "a blue wall"]
    right = [flat(250, 0, 0), flat(0, 250, 0), flat(0, 0, 250)]
    assert judge.adherence(prompts, right) == [1.0, 1.0, 1.0]
    assert judge.adherence(prompts, right[::-1])[0] == 0.0


def _small(given: list[Pixels]) -> NDArray[np.float32]:
    """8 x 8 means instead of an autoencoder's latents."""
    return np.stack(
        [p.reshape(8, 16, 8, 16, 3).mean((1, 3)).astype(np.float32).ravel() / 255 for p in given]
    )


def test_copies_are_named_and_new_pictures_are_not() -> None:
    training = pictures("crown", 20, 0)
    detector = CopyDetector(training, (128, 128), _small)
    noisy = np.clip(training[3].astype(int) + 6, 0, 255).astype(np.uint8)
    assert detector.copies([training[7], noisy]) == [7, 3]
    fresh = detector.copies(pictures("crown", 20, 50))
    assert sum(found is not None for found in fresh) <= 4


def test_near_duplicates_in_the_set_do_not_open_the_gate() -> None:
    training = pictures("crown", 20, 0)
    twins = [np.clip(p.astype(int) + 1, 0, 255).astype(np.uint8) for p in training[:4]]
    detector = CopyDetector([*training, *twins], (128, 128), _small)
    blurred = np.clip(training[10].astype(int) + 4, 0, 255).astype(np.uint8)
    assert detector.copies([blurred]) == [10]


def test_a_single_training_picture_is_too_few() -> None:
    with pytest.raises(InvalidRequest, match="2 are needed") as refused:
        CopyDetector(pictures("tee", 1, 0), (128, 128), _small)
    assert refused.value.code == "dataset_too_small"
