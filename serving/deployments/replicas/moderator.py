"""The safety stage as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ray import serve
from ray.util.metrics import Counter

from calotype.moderation.decision import Decision
from calotype.moderation.errors import ClassifierUnavailable, PolicyError
from calotype.moderation.evaluation.shadow import Shadows
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.rulebook import Scope
from calotype.moderation.records.audit import AuditLog
from calotype.moderation.records.vault import PromptVault
from calotype.serving.core.decision import NEWEST_TAKEDOWN
from calotype.serving.core.errors import ModerationUnavailable
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.review.takedowns import TakenDown
from calotype.serving.deployments.job_store import open_job_store
from calotype.serving.images.provenance import payload_fingerprint
from calotype.serving.observability.logs import set_up_logs
from calotype.serving.wire.application import ModeratorConfig, NamedPolicy

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


log = logging.getLogger(__name__)

HEAD_SECONDS = 60.0
"""The head of the audit log is handed over at least so often."""


class ModeratorDeployment:
    """Checks in threads; a decision is `moderation.decision.Decision.to_payload`.

    Args:
        audit_folder: every decision is written to a hash-chained log there, one file a replica.
            Its heads go to the database, where the gateway signs them.
        database_url: where the list of images is that were taken down.
    """

    def __init__(self, audit_folder: str, database_url: str) -> None:
        set_up_logs()
        database = open_job_store(database_url, upgrade=False)
        self._taken_down = TakenDown(database.takedowns)
        self._moderator = Moderator.load(known=[self._taken_down], fingerprint=payload_fingerprint)
        replica = serve.get_replica_context().replica_tag
        folder = pathlib.Path(audit_folder)
        self._audit = AuditLog(folder / f"audit-{replica}.jsonl", database.audit_heads.note)
        threading.Thread(target=self._hand_over_heads, daemon=True, name="audit heads").start()
        self._vault = PromptVault(folder / "prompts", replica)
        trials = Counter(
            "calotype_moderation_shadow",
            "What classifiers on trial made of decisions.",
            tag_keys=("classifier", "result"),
        )
        self._moderator.shadows = Shadows(
            folder / "shadow" / f"shadow-{replica}.jsonl",
            lambda name, result: trials.inc(tags={"classifier": name, "result": result}),
        )

    def _hand_over_heads(self) -> None:
        """A quiet log's last lines have a witness, too."""
        while True:
            time.sleep(HEAD_SECONDS)
            try:
                self._audit.hand_over()
            except Exception:  # the next one hands over what this one did not
                log.exception("the heads of the audit log were not handed over")

    def reconfigure(self, config: JsonObject) -> None:
        """Takes a `ModeratorConfig`."""
        wanted = ModeratorConfig.model_validate(config)
        self._moderator.reconfigure(read_policy(wanted.policy), read_named(wanted.policies))

    async def check_prompt(self, text: str, scope: JsonObject | None = None) -> JsonObject:
        return await asyncio.to_thread(self._check_prompt, text, scope)

    async def check_image(
        self,
        pixels: Pixels,
        prompt: str,
        references: Sequence[Pixels],
        scope: JsonObject | None,
    ) -> JsonObject:
        return await asyncio.to_thread(self._check_image, pixels, prompt, references, scope)

    def _check_prompt(self, text: str, scope: JsonObject | None) -> JsonObject:
        decision = self._moderator.check_prompt(text, Scope.from_payload(scope))
        return self._recorded(decision, text)

    def _check_image(
        self,
        pixels: Pixels,
        prompt: str,
        references: Sequence[Pixels],
        scope: JsonObject | None,
    ) -> JsonObject:
        try:
            # Asked before: what is taken down in between makes the image be checked again.
            newest, _ = self._taken_down.numbered()
        except ClassifierUnavailable as error:
            raise ModerationUnavailable(str(error), retry_after=5) from error
        decision = self._moderator.check_image(
            pixels, prompt=prompt, references=references, scope=Scope.from_payload(scope)
        )
        return self._recorded(decision) | {NEWEST_TAKEDOWN: newest}

    def _recorded(self, decision: Decision, prompt: str | None = None) -> JsonObject:
        """A decision that cannot be recorded is not given: the audit has no gaps."""
        payload, privacy = decision.to_payload(), decision.privacy
        try:
            digest = None
            if prompt is not None and privacy.prompts != "none":
                digest = self._vault.digest(prompt)
                if privacy.prompts == "encrypted":
                    self._vault.keep(decision.id, prompt, privacy.days)
            self._audit.append(payload, digest)
        except OSError as error:
            raise ModerationUnavailable(
                f"The audit log cannot be written ({error.strerror})."
            ) from error
        return payload

    async def warm_up(self) -> list[str]:
        """Loads the classifiers; a sentence for each that cannot be used."""
        return await asyncio.to_thread(self._moderator.warm_up)


def read_policy(config: NamedPolicy | None) -> Policy:
    """The policy that a model has; None = the package's.

    Raises:
        PolicyError: it says what no policy may say; names the field.
    """
    if config is None:
        return Policy.default()
    return Policy.from_spec(config.name, config.spec)


def read_named(config: Mapping[str, JsonObject]) -> dict[str, Policy]:
    """The policies that teams and adapters name; without those that cannot be read.

    What must be checked by one of these is refused, until it can be read.
    """
    found: dict[str, Policy] = {}
    for name, spec in config.items():
        try:
            found[name] = Policy.from_spec(name, spec)
        except PolicyError as error:
            log.error("nothing can be checked against ModerationPolicy %s: %s", name, error)
    return found
