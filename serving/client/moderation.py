"""The safety stage's side of the client: appeals, reports, and the desk of those who answer them.

with Reviewer("https://img.example", key_with_the_scope_moderation) as desk:
    case = desk.take()
    if case is not None and case.kind == "report":
        blurred = desk.picture(case.id)
        desk.decide(case.id, "taken_down", "The person did not agree.")
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote

from calotype.serving.client.calls import Call
from calotype.serving.client.models import JsonObject
from calotype.serving.client.synchronous import Client

Verdict = Literal["upheld", "overturned", "dismissed", "taken_down"]


@dataclass(frozen=True, slots=True)
class Case:
    """An appeal against a refusal, a report of a picture, or a picture that is held."""

    id: str
    kind: str
    """``appeal``, ``report`` or ``review``; a newer service may have others."""
    subject: str
    """The decision that is appealed against, or the picture that is reported."""
    reason: str
    status: str
    """``open``; then ``upheld overturned``, ``dismissed taken_down``, ``approved rejected``."""
    note: str | None
    created_at: int
    decided_at: int | None
    raw: JsonObject = field(repr=False)

    @classmethod
    def of(cls, raw: JsonObject) -> Case:
        return cls(
            id=raw["id"],
            kind=str(raw["object"]).rpartition(".")[2],
            subject=str(raw.get("decision_id") or raw.get("asset_id") or ""),
            reason=raw["reason"],
            status=raw["status"],
            note=raw["note"],
            created_at=raw["created_at"],
            decided_at=raw["decided_at"],
            raw=dict(raw),
        )


@dataclass(frozen=True, slots=True)
class Takedown:
    """A picture that was searched for, and what became of it."""

    id: str | None
    """None after a dry run."""
    deleted: int
    """Files."""
    pending: int
    """Files that nobody is served any more and the service deletes later."""
    also: JsonObject
    """What goes with the matches: how many ``assets files held previews``."""
    watermark: str | None
    """Payload of the mark that the picture carries."""
    pdq: str | None
    """None where there is too little in the picture to know it by."""
    matches: list[JsonObject]
    """``asset_id job_id team_id by distance created_at`` of the first hundred."""
    match_count: int

    @classmethod
    def of(cls, raw: JsonObject) -> Takedown:
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Revocation:
    """What a consent that was taken back quarantines."""

    id: str
    """sha256 of the picture's file."""
    dry_run: bool
    adapters: list[JsonObject]
    """``digest name dataset_digest rights pictures retrain``."""
    asset_ids: list[str]
    """Pictures that were drawn with them; at most a thousand."""
    asset_count: int
    job_count: int
    ended_jobs: int
    """That were still being drawn."""

    @classmethod
    def of(cls, raw: JsonObject) -> Revocation:
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


class Reviewer(Client):
    """A `Client` that also appeals, reports and reviews.

    Everything but `appeal`, `report` and `case` needs a key with the scope ``moderation``.
    """

    def appeal(self, decision_id: str, reason: str) -> Case:
        """Asks people to look at a refusal again; asked twice it is the same case."""
        body = {"decision_id": decision_id, "reason": reason}
        return Case.of(self._json(Call("POST", "/v1/moderation/appeals", body)))

    def report(self, asset_id: str, reason: str) -> Case:
        """Says that a picture should not exist."""
        body = {"asset_id": asset_id, "reason": reason}
        return Case.of(self._json(Call("POST", "/v1/moderation/reports", body)))

    def case(self, case_id: str) -> Case:
        return Case.of(self._json(Call("GET", _case(case_id))))

    def cases(self, status: str = "open", limit: int = 100) -> list[Case]:
        """The queue, the oldest first."""
        query = {"status": status, "limit": str(limit)}
        found = self._json(Call("GET", "/v1/moderation/cases", query=query))
        return [Case.of(raw) for raw in found["data"]]

    def take(self) -> Case | None:
        """The oldest open case, for half an hour this key's alone; None when none waits."""
        answer = self._send(Call("POST", "/v1/moderation/cases/take"))
        return None if answer.status_code == 204 else Case.of(answer.json())

    def decide(self, case_id: str, verdict: Verdict, note: str = "") -> Case:
        """Ends a case that this key took."""
        body = {"verdict": verdict, "note": note}
        return Case.of(self._json(Call("POST", f"{_case(case_id)}/decide", body)))

    def take_down(
        self,
        *,
        reason: str,
        category: str,
        image: bytes | None = None,
        asset_id: str | None = None,
        dry_run: bool = False,
    ) -> Takedown:
        """Deletes every stored copy of a picture and refuses it from now on.

        Args:
            image: the picture as somebody found it; or ``asset_id``, a stored one.
            dry_run: only find the copies.
        """
        body: JsonObject = {"reason": reason, "category": category}
        if image is not None:
            body["image"] = base64.b64encode(image).decode("ascii")
        if asset_id is not None:
            body["asset_id"] = asset_id
        # Stored pictures that nobody has looked at yet are looked at first, a while with each call.
        while True:
            answer = self._json(
                Call("POST", "/v1/moderation/takedowns", body | {"dry_run": dry_run})
            )
            if not answer["unsearched"]:
                return Takedown.of(answer)

    def takedowns(self) -> list[JsonObject]:
        """What is refused, the oldest first."""
        found: list[JsonObject] = self._json(Call("GET", "/v1/moderation/takedowns"))["data"]
        return found

    def lift_takedown(self, takedown_id: str) -> None:
        """Lets a picture come again; what was deleted stays so."""
        self._json(Call("DELETE", f"/v1/moderation/takedowns/{quote(takedown_id, safe='')}"))

    def revoke_rights(
        self, picture_sha256: str, reason: str, *, dry_run: bool = False
    ) -> Revocation:
        """Takes back the consent to learn from a picture: quarantines what was learnt and drawn.

        Args:
            picture_sha256: of the picture's file.
            dry_run: only say what it would quarantine.
        """
        body = {"picture_sha256": picture_sha256, "reason": reason, "dry_run": dry_run}
        return Revocation.of(self._json(Call("POST", "/v1/rights/revocations", body)))

    def revocations(self) -> list[JsonObject]:
        """Pictures that may not be learnt from any more, the oldest first."""
        found: list[JsonObject] = self._json(Call("GET", "/v1/rights/revocations"))["data"]
        return found

    def restore_rights(self, picture_sha256: str) -> None:
        """Consent was given again: adapters and pictures are served as before."""
        path = f"/v1/rights/revocations/{quote(picture_sha256, safe='')}"
        self._json(Call("DELETE", path))

    def record_origins(self, adapter: JsonObject) -> JsonObject:
        """Notes what an adapter learnt from: ``digest name dataset_digest command pictures``."""
        found: JsonObject = self._json(Call("POST", "/v1/rights/adapters", adapter))
        return found

    def image(self, case_id: str, *, reveal: bool = False) -> bytes:
        """The picture of a case: a blurred PNG, or with ``reveal`` the stored file.

        Whoever reveals one must have taken the case, and is on record.
        """
        query = {"reveal": "true"} if reveal else {}
        return self._send(Call("GET", f"{_case(case_id)}/picture", query=query)).content


def _case(case_id: str) -> str:
    return f"/v1/moderation/cases/{quote(case_id, safe='')}"
