"""The account for a regulator: whole, signed, without prompts, and a change in it is noticed."""

from __future__ import annotations

import json
import pathlib
import time

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from calotype.moderation.errors import AuditError
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.provenance.installation_keys import InstallationKeys
from calotype.moderation.provenance.signer import Signer, signature_fits
from calotype.moderation.records.audit import AuditLog, verify
from calotype.moderation.records.export import DECISIONS, SIGNATURE, SUMMARY, Period, check, write
from calotype.moderation.records.vault import PromptVault
from calotype.moderation.testing import FixedTextClassifier
from calotype.serving.commands.cli import cli
from calotype.serving.database.database import Database

PROMPTS = ("a cat", "a nude woman in a studio", "a dog", "darth vader")
ALWAYS = Period(0.0, 1e11)


@pytest.fixture
def data_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    """What a service leaves behind: two replicas' logs, sealed prompts, reviewers' deeds, keys."""
    logs = tmp_path / "data" / "audit"
    moderator = Moderator(
        Policy.default(), text_classifiers=[FixedTextClassifier({"sexual": 0.01})]
    )
    for replica in ("one", "two"):
        log, vault = (
            AuditLog(logs / f"audit-{replica}.jsonl"),
            PromptVault(logs / "prompts", replica),
        )
        for prompt in PROMPTS:
            decision = moderator.check_prompt(prompt).to_payload()
            vault.keep(decision["id"], prompt, 30)
            log.append(decision, vault.digest(prompt))
        log.close()
    database = Database.open(f"sqlite:///{logs.parent / 'calotype.db'}")
    database.reviewer_audit.record_action("key_1", "picture.revealed", "case_1")
    database.close()
    InstallationKeys.in_folder(logs.parent / "provenance")
    return logs.parent


def run(*words: object) -> Result:
    environment = {"CALOTYPE_DATABASE_URL": "", "CALOTYPE_PROVENANCE_DIR": ""}
    return CliRunner().invoke(cli, ["moderation", *map(str, words)], env=environment)


def exported(data_dir: pathlib.Path, name: str, *more: object) -> pathlib.Path:
    folder = data_dir.parent / name
    done = run(
        "export", data_dir / "audit", "--from", "2020-01-01", "--to", "2100-01-01", "-o", folder,
        *more,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


def test_the_account_holds_everything_but_prompts(data_dir: pathlib.Path) -> None:
    folder = exported(data_dir, "account")
    summary = json.loads((folder / SUMMARY).read_text())
    assert summary["decisions"] == 8
    assert summary["verdict"] == {"ALLOW": 4, "BLOCK": 2, "FLAG": 2}
    assert summary["refused_for"] == {"sexual": 2}
    assert summary["people"] == {"picture.revealed": 1}
    (force,) = summary["policies"]
    assert (force["policy"], force["decisions"]) == (Policy.default().identity, 8)
    document = folder / force["document"]
    assert document.stem == force["sha256"] == Policy.default().sha256
    text = "".join(path.read_text() for path in folder.rglob("*") if path.suffix == ".jsonl")
    assert not any(prompt in text for prompt in PROMPTS)
    checked = run("audit", "check-export", folder)
    assert checked.exit_code == 0 and "the signature fits" in checked.stdout
    assert "8 decisions, 2 not served" in checked.stdout


def test_prompts_are_unsealed_on_record(data_dir: pathlib.Path) -> None:
    folder = exported(data_dir, "open", "--unseal")
    rows = [json.loads(line) for line in (folder / DECISIONS).read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == sorted(PROMPTS * 2)
    assert verify(data_dir / "audit" / "opened" / "audit.jsonl") == 8


def test_only_the_period_is_in_it(data_dir: pathlib.Path) -> None:
    entries = (data_dir / "audit" / "audit-one.jsonl").read_text().splitlines()
    third = json.loads(entries[2])
    begin = Period(third["time"], time.time() + 60)
    summary = write(data_dir.parent / "some", data_dir / "audit", begin)
    (one, _) = summary.logs
    assert one.after == third["previous"] and one.lines == 4
    assert check(data_dir.parent / "some").decisions == summary.decisions
    nothing = write(data_dir.parent / "none", data_dir / "audit", Period(0.0, 1.0))
    assert nothing.decisions == 0 and check(data_dir.parent / "none") == nothing


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        (DECISIONS, '"verdict": "BLOCK"', '"verdict": "ALLOW"', "was changed"),
        ("people.jsonl", "key_1", "key_2", "was changed"),
        (SUMMARY, '"BLOCK": 2', '"BLOCK": 1', "after it was signed"),
    ],
)
def test_a_change_is_noticed(
    data_dir: pathlib.Path, name: str, old: str, new: str, told: str
) -> None:
    folder = exported(data_dir, "changed")
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))
    done = run("audit", "check-export", folder)
    assert done.exit_code != 0 and told in str(done.exception)


def test_a_line_that_is_missing_is_noticed_without_signature_and_digests(
    data_dir: pathlib.Path,
) -> None:
    """Who forges digests and drops the signature still cannot forge the chain of the log."""
    folder = exported(data_dir, "cut")
    (folder / SIGNATURE).unlink()
    lines = (folder / DECISIONS).read_text().splitlines(keepends=True)
    for kept in (lines[1:], lines[:1] + lines[2:], lines[:-1]):
        (folder / DECISIONS).write_text("".join(kept))
        summary = json.loads((folder / SUMMARY).read_text())
        summary["files"].pop(DECISIONS, None)
        (folder / SUMMARY).write_text(json.dumps(summary))
        with pytest.raises(AuditError, match=r"chain|missing"):
            check(folder)


def test_what_cannot_be_exported_is_said(data_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    log = data_dir / "audit" / "audit-two.jsonl"
    log.write_text(log.read_text().replace("FLAG", "ALLOW", 1))
    with pytest.raises(AuditError, match="line"):
        write(tmp_path / "a", data_dir / "audit", ALWAYS)
    with pytest.raises(AuditError, match="holds no audit log"):
        write(tmp_path / "b", tmp_path, ALWAYS)
    with pytest.raises(AuditError, match="not empty"):
        write(data_dir, data_dir / "audit", ALWAYS)
    late = run(
        "export", data_dir / "audit", "--from", "2026-02-01", "--to", "2026-01-01", "-o", "x"
    )
    assert "--to must not be before" in str(late.exception)


@pytest.mark.parametrize("kind", ["ed25519", "p256", "p521", "rsa"])
def test_signatures_of_every_kind_of_signer_are_checked(kind: str, tmp_path: pathlib.Path) -> None:
    signer = signer_of(kind, tmp_path)
    signature = signer.sign(b"an account")
    assert signature_fits(b"an account", signature, signer.chain)
    assert not signature_fits(b"an Account", signature, signer.chain)
    assert not signature_fits(b"an account", signature[:-1], signer.chain)
    assert not signature_fits(b"an account", signature, "no chain")


def signer_of(kind: str, folder: pathlib.Path) -> Signer:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    if kind == "ed25519":
        return Signer.derived(b"a secret of the tests")
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    if kind == "rsa":
        key = rsa.generate_private_key(65537, 2048)
    else:
        key = ec.generate_private_key(ec.SECP256R1() if kind == "p256" else ec.SECP521R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    day = datetime.datetime(2026, 1, 1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, day, day.replace(year=2056))
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    chain, secret = folder / "signer.pem", folder / "signer.key"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return Signer.load(chain, secret)
