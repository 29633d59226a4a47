"""The safety stage as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ray import serve

from calotype.moderation.audit import AuditLog
from calotype.moderation.decision import Decision
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy import Policy
from calotype.serving.errors import ModerationUnavailable

if TYPE_CHECKING:
    from calotype.serving.request import Pixels


class ModeratorDeployment:
    """Judges in threads; a decision is `moderation.decision.Decision.to_payload`.

    Args:
        audit_folder: every decision is written to a hash-chained log there, one file a replica.
    """

    def __init__(self, audit_folder: str) -> None:
        self._moderator = Moderator.load()
        replica = serve.get_replica_context().replica_tag
        self._audit = AuditLog(pathlib.Path(audit_folder) / f"audit-{replica}.jsonl")

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """``{"policy": null | {"name", "spec"}}``; null is the policy of the package."""
        self._moderator.reconfigure(read_policy(config.get("policy")))

    async def judge_prompt(self, text: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._recorded, self._moderator.judge_prompt, text)

    async def judge_image(self, pixels: Pixels) -> dict[str, Any]:
        return await asyncio.to_thread(self._recorded, self._moderator.judge_image, pixels)

    def _recorded(self, judge: Callable[[Any], Decision], content: Any) -> dict[str, Any]:
        """A decision that cannot be recorded is not given: the audit has no gaps."""
        payload = judge(content).to_payload()
        try:
            self._audit.append(payload)
        except OSError as error:
            raise ModerationUnavailable(
                f"The audit log cannot be written ({error.strerror})."
            ) from error
        return payload

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
