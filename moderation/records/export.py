"""An export of a period for a regulator: decisions, reviewers' actions, policies and proofs.

A folder with

* ``decisions.jsonl``: every decision of the period, as the audit log has it, with its hash and the
  hash of the one before, so that the chain can be recomputed; no prompt, unless it is unsealed;
* ``people.jsonl``: what reviewers did: images revealed, cases decided, takedowns;
* ``policies/``: the documents of the policies that were in force, as far as they are at hand;
* ``summary.json``: counts, the policies with when each was in force, each log's length, first and
  last hash, and the digests of all these files;
* ``summary.sig`` and ``signer.pem``: the summary, signed by the installation's signer.

`check` reads it all back.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from calotype.moderation.documents import JsonObject
from calotype.moderation.errors import AuditError
from calotype.moderation.policy.policy import Policy
from calotype.moderation.provenance.signer import Signer, signature_fits
from calotype.moderation.records.audit import GENESIS, line_hash, verify
from calotype.moderation.records.heads import Head

DECISIONS, PEOPLE, SUMMARY = "decisions.jsonl", "people.jsonl", "summary.json"
SIGNATURE, CHAIN, POLICIES = "summary.sig", "signer.pem", "policies"

Unseal = Callable[[str], str | None]
"""Decision -> its prompt, None where none is kept."""


@dataclass(frozen=True, slots=True)
class Period:
    """Seconds since the epoch, ``until`` not included."""

    since: float
    until: float

    def __contains__(self, moment: object) -> bool:
        return isinstance(moment, int | float) and self.since <= moment < self.until


class _Part(BaseModel):
    """Fields of newer versions are kept."""

    model_config = ConfigDict(extra="allow")


class LogProof(_Part):
    """The part of one audit log that lies in the period."""

    log: str
    decisions: int = 0
    lines: int = 0
    """Of the whole log."""
    after: str | None = None
    """Hash of the line before the first decision of the period."""
    first_line: int | None = None
    head: str | None = None
    """Hash of the last decision of the period."""
    log_head: str = GENESIS
    """Hash of the last line of the log."""


class PolicyInForce(_Part):
    """A policy that decisions of the period name."""

    policy: str
    sha256: str
    first: float
    last: float
    decisions: int = 0
    document: str | None = None
    """Path of the policy's document in the export."""


class Summary(_Part):
    """``summary.json``."""

    period: Period
    decisions: int
    verdict: dict[str, int]
    stage: dict[str, int]
    refused_for: dict[str, int]
    people: dict[str, int]
    """Action of reviewers -> how often."""
    policies: list[PolicyInForce]
    logs: list[LogProof]
    prompts: Literal["in clear", "none"]
    files: dict[str, str]
    """File -> its SHA-256."""


Forces = dict[tuple[str, str], PolicyInForce]
"""(policy, digest) -> when it was in force."""


def write(
    folder: pathlib.Path,
    logs: pathlib.Path,
    period: Period,
    *,
    heads: Sequence[Head] = (),
    reviewer_actions: Iterable[Mapping[str, object]] = (),
    policies: Iterable[Policy] = (),
    signer: Signer | None = None,
    unseal: Unseal | None = None,
) -> Summary:
    """Writes the account and returns its summary.

    Args:
        folder: made; must not be there yet, or be empty.
        logs: folder with the audit logs of the moderators.
        heads: signed ones, as `heads.trusted` gives them; the logs must fit them.
        reviewer_actions: the verified rows of the reviewer audit (`serving.database`).
        policies: whose documents are put in if decisions of the period name their digest.
        signer: of the installation; None leaves the account unsigned.
        unseal: opens prompts, which are then in it in clear.

    Raises:
        AuditError: a log is damaged, there is none, or the folder is not empty.
        OSError: a file cannot be read or written.
    """
    paths = sorted(logs.glob("audit-*.jsonl"))
    if not paths:
        raise AuditError(f"{logs}: holds no audit log (audit-*.jsonl); name DATA_DIR/audit.")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise AuditError(f"{folder}: is not empty; name a new folder for the account.")
    for path in paths:
        verify(path, heads)
    counts: dict[str, Counter[str]] = {
        name: Counter() for name in ("verdict", "stage", "refused_for")
    }
    forces: Forces = {}
    proofs = []
    with (folder / DECISIONS).open("w", encoding="utf-8") as file:
        for path in paths:
            proof = LogProof(log=path.name)
            for number, entry in enumerate(_entries(path), 1):
                proof.lines, proof.log_head = number, entry["hash"]
                if entry["time"] not in period:
                    continue
                if not proof.decisions:
                    proof.after, proof.first_line = entry["previous"], number
                proof.decisions += 1
                proof.head = entry["hash"]
                _count(counts, forces, entry)
                row = {"log": path.name, "line": number, "entry": entry}
                if unseal is not None:
                    row["prompt"] = unseal(str(entry["decision"].get("id")))
                file.write(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n")
            proofs.append(proof)
    acts: Counter[str] = Counter()
    with (folder / PEOPLE).open("w", encoding="utf-8") as file:
        for action in reviewer_actions:
            if action["time"] in period:
                acts[str(action["action"])] += 1
                file.write(json.dumps(dict(action), sort_keys=True) + "\n")
    kept = _keep_policies(folder, policies, forces)
    names = [DECISIONS, PEOPLE, *kept]
    summary = Summary(
        period=period,
        decisions=sum(proof.decisions for proof in proofs),
        verdict=dict(sorted(counts["verdict"].items())),
        stage=dict(sorted(counts["stage"].items())),
        refused_for=dict(sorted(counts["refused_for"].items())),
        people=dict(sorted(acts.items())),
        policies=sorted(forces.values(), key=lambda found: found.first),
        logs=proofs,
        prompts="in clear" if unseal is not None else "none",
        files={name: _digest(folder / name) for name in names},
    )
    text = json.dumps(summary.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    (folder / SUMMARY).write_text(text, encoding="utf-8")
    if signer is not None:
        (folder / SIGNATURE).write_bytes(signer.sign(text.encode()))
        (folder / CHAIN).write_text(signer.chain, encoding="ascii")
    return summary


def check(folder: pathlib.Path) -> Summary:
    """Reads an account back and returns its summary.

    Raises:
        AuditError: a file or a line was changed, removed or moved, or the signature does not fit.
        OSError: a file cannot be read.
    """
    data = (folder / SUMMARY).read_bytes()
    if (folder / SIGNATURE).exists() and not signature_fits(
        data, (folder / SIGNATURE).read_bytes(), (folder / CHAIN).read_text(encoding="ascii")
    ):
        raise AuditError(f"{folder / SUMMARY}: was changed after it was signed.")
    try:
        summary = Summary.model_validate_json(data)
    except ValidationError as error:
        raise AuditError(f"{folder / SUMMARY}: is not the summary of an export.") from error
    for name, digest in summary.files.items():
        if _digest(folder / name) != digest:
            raise AuditError(f"{folder / name}: was changed after the account was written.")
    chains = {proof.log: proof for proof in summary.logs}
    last = {name: proof.after for name, proof in chains.items()}
    for row in _entries(folder / DECISIONS):
        entry = dict(row["entry"])
        claimed = entry.pop("hash")
        if entry["previous"] != last[row["log"]] or line_hash(entry) != claimed:
            raise AuditError(
                f"{folder / DECISIONS}: the chain of {row['log']} is broken at line {row['line']}."
            )
        last[row["log"]] = claimed
    for name, proof in chains.items():
        if proof.decisions and last[name] != proof.head:
            raise AuditError(f"{folder / DECISIONS}: decisions of {name} are missing at the end.")
    return summary


def _count(
    counts: dict[str, Counter[str]],
    forces: Forces,
    entry: JsonObject,
) -> None:
    decision = entry["decision"]
    counts["verdict"][str(decision.get("verdict"))] += 1
    counts["stage"][str(decision.get("stage"))] += 1
    counts["refused_for"].update(decision.get("categories", ()))
    name, digest = str(decision.get("policy")), str(decision.get("policy_sha256"))
    moment = entry["time"]
    begun = PolicyInForce(policy=name, sha256=digest, first=moment, last=moment)
    force = forces.setdefault((name, digest), begun)
    force.first, force.last = min(force.first, moment), max(force.last, moment)
    force.decisions += 1


def _keep_policies(
    folder: pathlib.Path,
    policies: Iterable[Policy],
    forces: Forces,
) -> list[str]:
    """Writes the documents that decisions name; their paths in the account."""
    kept = []
    for policy in policies:
        for force in forces.values():
            if force.sha256 == policy.sha256 and force.document is None:
                (folder / POLICIES).mkdir(exist_ok=True)
                name = f"{POLICIES}/{policy.sha256}.json"
                document = policy.model_dump(mode="json")
                # The digest of the policy is that of these very bytes.
                text = json.dumps(document, sort_keys=True, ensure_ascii=False)
                (folder / name).write_text(text, encoding="utf-8")
                force.document = name
                kept.append(name)
    return kept


def _entries(path: pathlib.Path) -> Iterator[JsonObject]:
    with path.open(encoding="utf-8") as log:
        for line in log:
            yield json.loads(line)


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
