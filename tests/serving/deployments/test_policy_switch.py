"""A policy that changes while a request runs: all of the request is checked by one version."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from samples.images import Pixels, drawing

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedImageClassifier, FixedTextClassifier
from calotype.serving.core.decision import Decision
from calotype.serving.core.errors import ContentBlocked, ModerationUnavailable
from calotype.serving.core.request import GenerationRequest, ImageSize, SamplingParams
from calotype.serving.deployments.local import InProcessSafety
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.options import JobOptions
from calotype.serving.storage.folder import FolderBlobStore
from calotype.serving.worker.output_check import Sources
from calotype.serving.worker.postprocess import Finalized, Postprocessor


def policy(version: int, block: float = 0.5) -> Policy:
    rules = {"sexual": {"text": {"block": block}, "image": {"block": 0.9}}}
    return Policy.from_spec("house", {"version": version, "categories": rules})


class Switching(InProcessSafety):
    """Switches to the next policy after so many checked images."""

    def __init__(self, moderator: Moderator, after: Mapping[int, Policy]) -> None:
        super().__init__(moderator)
        self._stage, self._after, self.images = moderator, after, 0
        self._one_by_one = asyncio.Lock()

    async def check_image(self, *given: Any, **more: Any) -> Decision:
        async with self._one_by_one:
            decision = await super().check_image(*given, **more)
            self.images += 1
            if self.images in self._after:
                self._stage.reconfigure(self._after[self.images])
        return decision


def finalized(
    folder: pathlib.Path, after: Mapping[int, Policy], score: float = 0.1, n: int = 3
) -> tuple[Decision, Finalized]:
    """The prompt's decision by version 1, and what became of images that are checked later."""
    stage = Moderator(
        policy(1),
        text_classifiers=[FixedTextClassifier({"sexual": score})],
        image_classifiers=[FixedImageClassifier({"sexual": 0.1})],
    )
    size = ImageSize(64, 64)
    request = GenerationRequest(
        id="r", prompt="a hat", size=size, rendered_size=size,
        sampling=SamplingParams(4, 4.0), seed=1, n=n,
    )  # fmt: skip
    drawn: list[Pixels] = [np.array(drawing(i, 64)) for i in range(n)]

    async def run() -> tuple[Decision, Finalized]:
        safety = Switching(stage, after)
        first = await safety.check_prompt("a hat")
        if 0 in after:
            stage.reconfigure(after[0])
        lease = Lease(
            *("j", 1, request, JobOptions("req_1"), "team", 0.0),
            prompt_policy=first.version,
        )
        postprocessor = Postprocessor(safety, FolderBlobStore(folder))
        return first, await postprocessor.finalize(lease, drawn, Sources({}, []))

    return asyncio.run(run())


def test_without_a_change_the_prompt_is_not_checked_again(tmp_path: pathlib.Path) -> None:
    first, found = finalized(tmp_path, {})
    assert found.prompt is None
    assert {d.policy for d in found.decisions} == {first.policy} == {"house@1"}


@pytest.mark.parametrize("moment", [0, 1, 2, 3])
def test_a_change_at_any_moment_leaves_one_version(tmp_path: pathlib.Path, moment: int) -> None:
    first, found = finalized(tmp_path, {moment: policy(2)})
    named = {d.policy for d in found.decisions} | {(found.prompt or first).policy}
    assert len(named) == 1
    assert named == ({"house@1"} if moment == 3 else {"house@2"})
    assert len(found.images) == 3


def test_what_the_new_policy_refuses_is_not_served(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ContentBlocked) as caught:
        finalized(tmp_path, {0: policy(2, block=0.05)})
    assert caught.value.details["moderation"]["policy"] == "house@2"
    assert caught.value.details["moderation_details"]["moderation_stage"] == "input"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_policy_that_never_rests_serves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calotype.serving.worker.postprocess.SWITCH_PAUSES", (0.0, 0.0, 0.0))
    restless = {count: policy(2 + count) for count in range(40)}
    with pytest.raises(ModerationUnavailable, match="changed again and again"):
        finalized(tmp_path, restless, n=2)
