"""`calotype moderation audit`: the record of every decision, and whether it is whole."""

from __future__ import annotations

import getpass
import pathlib
from typing import TYPE_CHECKING

import click

from calotype.serving.commands.safety.export import check_export
from calotype.serving.core.errors import NotFound

if TYPE_CHECKING:
    from calotype.moderation.records.heads import Head


@click.group()
def audit() -> None:
    """The record of every decision."""


audit.add_command(check_export)


@audit.command()
@click.argument("log", type=click.Path(path_type=pathlib.Path, exists=True))
@click.option(
    "--key", "keys", multiple=True,
    help="Public key that signs heads (calotype moderation audit key prints it); may be repeated. "
    "Default: the one of the data folder, or of CALOTYPE_AUDIT_KEY.",
)  # fmt: skip
def verify(log: pathlib.Path, keys: tuple[str, ...]) -> None:
    """Check that no line of LOG was changed, removed, moved or cut off.

    LOG is one audit log or the folder of all, DATA_DIR/audit; with the folder also the log of what
    reviewers did is checked. Signed heads are read from the database and the object store, which
    CALOTYPE_DATABASE_URL and CALOTYPE_BLOB_URL name, or those of the data folder.
    """
    from calotype.moderation.records.audit import verify as check
    from calotype.moderation.records.audit import verify_all
    from calotype.serving.commands.safety.open_records import open_records

    folder = log if log.is_dir() else log.parent
    with open_records(folder.parent) as records:
        heads = records.heads(keys)
        found = verify_all(log, heads) if log.is_dir() else {log.name: check(log, heads)}
        for name, count in found.items():
            seen = _seen(name, heads)
            click.echo(f"{folder / name}: {count} decisions, the chain is whole{seen}.")
        if log.is_dir():
            rows = sum(1 for _ in records.actions(heads))
            click.echo(f"people_log: {rows} deeds, the chain is whole{_seen('people_log', heads)}.")


def _seen(name: str, heads: list[Head]) -> str:
    signed = max((head.lines for head in heads if head.log == name), default=0)
    if not signed:
        return "; no head of it was signed yet, so a cut end would not be seen"
    return f", and the first {signed} are as they were signed"


@audit.command()
@click.argument(
    "data_dir", required=False, type=click.Path(path_type=pathlib.Path, file_okay=False)
)
def key(data_dir: pathlib.Path | None) -> None:
    """Print the public key that signs audit logs: of CALOTYPE_AUDIT_KEY, or of DATA_DIR."""
    from calotype.serving.api.background.head_signer import AUDIT_KEY, head_key

    found = head_key(data_dir)
    if found is None:
        raise NotFound(
            f"There is no key: set {AUDIT_KEY}, or name the data folder of a service that has run."
        )
    click.echo(found.public)


@audit.command()
@click.argument("decision")
@click.argument("folder", type=click.Path(path_type=pathlib.Path, file_okay=False, exists=True))
def prompt(decision: str, folder: pathlib.Path) -> None:
    """Open the prompt of DECISION, where the policy keeps encrypted copies.

    FOLDER is the audit folder of the service, DATA_DIR/audit. Whoever opens one is on record.
    """
    from calotype.moderation.records.audit import AuditLog
    from calotype.moderation.records.vault import PromptVault

    text = PromptVault(folder / "prompts", "reader").read(decision)
    opened = AuditLog(folder / "opened" / "audit.jsonl")
    opened.append({"id": decision, "stage": "opened", "verdict": getpass.getuser()})
    opened.close()
    click.echo(text)
