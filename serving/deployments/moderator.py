"""The safety stage as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy import Policy

if TYPE_CHECKING:
    from calotype.serving.request import Pixels


class ModeratorDeployment:
    """Judges in threads; a decision is `moderation.decision.Decision.to_payload`."""

    def __init__(self) -> None:
        self._moderator = Moderator.load()

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """``{"policy": null | {"name", "spec"}}``; null is the policy of the package."""
        self._moderator.reconfigure(read_policy(config.get("policy")))

    async def judge_prompt(self, text: str) -> dict[str, Any]:
        decision = await asyncio.to_thread(self._moderator.judge_prompt, text)
        return decision.to_payload()

    async def judge_image(self, pixels: Pixels) -> dict[str, Any]:
        decision = await asyncio.to_thread(self._moderator.judge_image, pixels)
        return decision.to_payload()

    async def warm_up(self) -> list[str]:
        """Loads the classifiers; a sentence for each that cannot judge."""
        return await asyncio.to_thread(self._moderator.warm_up)


def read_policy(config: Mapping[str, Any] | None) -> Policy:
    """The policy of a ``user_config``.

    Raises:
        PolicyError: it says what no policy may say; names the field.
    """
    if config is None:
        return Policy.default()
    return Policy.from_spec(config["name"], config["spec"])
