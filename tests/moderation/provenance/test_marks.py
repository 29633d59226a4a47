"""Marks of images: written into every format and read back; the pixels follow from the image."""

from __future__ import annotations

import io
import json
import pathlib
import stat
import threading
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image
from samples.images import drawing, pixels_of, resized, same_pixels, saved, texture

from calotype.moderation.errors import ImageError, ProvenanceError
from calotype.moderation.moderator import Moderator
from calotype.moderation.provenance import content_credentials
from calotype.moderation.provenance.installation_keys import InstallationKeys
from calotype.moderation.provenance.marks import LAYERS, Marks, check
from calotype.moderation.provenance.signer import Signer
from calotype.serving.commands.cli import cli
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.images.encode import encode_image
from calotype.serving.images.provenance import chosen_layers, installation_keys
from calotype.serving.images.recipe_metadata import extract_recipe

KEYS = InstallationKeys.derived(b"a secret of the tests")
MARKS = Marks(KEYS, required=True)
KINDS = ("png", "jpeg", "webp")
IMAGE = drawing(3)


def encoded(kind: str, marks: Marks = MARKS, **options: Any) -> bytes:
    return encode_image(IMAGE, kind, None, marks=marks, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_carries_three_marks_and_they_are_read_back(kind: str) -> None:
    found = check(encoded(kind, recipe={"version": 1, "seed": 7}), KEYS)
    assert (found.kind, found.width, found.height) == (kind, 128, 128)
    assert found.source_type == "trainedAlgorithmicMedia"
    known = found.credentials
    assert known is not None and known.valid and known.trusted and known.problems == ()
    assert known.source_type is not None
    assert known.source_type.endswith("/trainedAlgorithmicMedia")
    assert known.generator is not None and known.generator.startswith("calotype ")
    assert known.signer is not None and known.signer.startswith("picture signer ")
    assert found.watermark is not None and found.watermark.payload == known.watermark
    assert found.ours and not found.former_key


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_image_gets_the_same_pixels_and_marks(kind: str) -> None:
    recipe = {"version": 1, "seed": 7}
    fresh = Marks(InstallationKeys.derived(b"a secret of the tests"), required=True)
    first, again = encoded(kind, recipe=recipe), encoded(kind, fresh, recipe=recipe)
    assert same_pixels(first, again)
    assert check(first, KEYS) == check(again, KEYS)
    assert extract_recipe(first) == recipe


@pytest.mark.parametrize("kind", KINDS)
def test_without_content_credentials_the_same_image_gets_the_same_bytes(kind: str) -> None:
    def plain(secret: bytes) -> Marks:
        return Marks(InstallationKeys.derived(secret), ("xmp", "watermark"))

    first = encoded(kind, plain(b"a secret"), recipe={"seed": 7})
    assert first == encoded(kind, plain(b"a secret"), recipe={"seed": 7})
    assert first != encoded(kind, plain(b"a secret"), recipe={"seed": 8})
    assert first != encoded(kind, plain(b"another"), recipe={"seed": 7})


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_noticed(kind: str) -> None:
    data = bytearray(encoded(kind))
    # In the pixels: those of webp come before the manifest, the others after it.
    data[data.index(b"VP8L") + 20 if kind == "webp" else -60] ^= 1
    known = content_credentials.read(bytes(data), kind, KEYS.signer().anchor)
    assert known is not None and not known.valid
    assert "assertion.dataHash.mismatch" in known.problems


def test_strangers_see_a_valid_signature_of_somebody_unknown() -> None:
    other = InstallationKeys.derived(b"another secret")
    found = check(encoded("png"), other)
    assert found.credentials is not None
    assert found.credentials.valid and not found.credentials.trusted
    assert found.credentials.problems == ("signingCredential.untrusted",)
    assert found.watermark is None and not found.ours


@pytest.mark.parametrize("side", [128, 256])
def test_without_its_metadata_the_watermark_remains(side: int) -> None:
    data = encode_image(drawing(4, side), "png", None, marks=MARKS)
    pixels = pixels_of(data)
    file = io.BytesIO()
    Image.fromarray(resized(pixels, 0.5)).save(file, "BMP")
    found = check(file.getvalue(), KEYS)
    assert (found.kind, found.source_type, found.credentials) == ("bmp", None, None)
    assert not found.credentials_read
    assert found.watermark is not None and found.watermark.scale == 0.5 and found.ours


def test_images_without_marks_are_said_to_have_none() -> None:
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "PNG")
    found = check(file.getvalue(), KEYS)
    assert found.source_type is None and found.credentials is None and found.credentials_read
    assert found.watermark is None and not found.ours
    assert not check(file.getvalue(), None).watermark_read


def test_layers_can_be_left_out() -> None:
    for layers in ((), ("xmp",), ("watermark",), ("xmp", "c2pa"), LAYERS):
        found = check(encoded("jpeg", Marks(KEYS, layers, required=True)), KEYS)
        seen = (
            *(["xmp"] if found.source_type else []),
            *(["watermark"] if found.watermark else []),
            *(["c2pa"] if found.credentials else []),
        )
        assert seen == layers


def test_a_missing_library_leaves_two_marks_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(content_credentials, "available", lambda: False)
    marks = Marks(KEYS)
    assert marks.layers == ("xmp", "watermark")
    assert "calotype[provenance]" in caplog.text
    assert Marks(KEYS, required=True).layers == LAYERS


def own_signer(folder: pathlib.Path) -> ec.EllipticCurvePrivateKey:
    """Writes a P-256 signer under a root, as an authority would give one out."""
    derived = Signer.derived(b"somebody else")
    certificates = x509.load_pem_x509_certificates(derived.chain.encode())
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    chain = []
    for template, own in zip(certificates, (key, root_key), strict=True):
        builder = x509.CertificateBuilder(
            template.issuer, template.subject, own.public_key(), template.serial_number,
            template.not_valid_before_utc, template.not_valid_after_utc,
        )  # fmt: skip
        for extension in template.extensions:
            if not isinstance(
                extension.value, x509.SubjectKeyIdentifier | x509.AuthorityKeyIdentifier
            ):
                builder = builder.add_extension(extension.value, extension.critical)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), False
        ).add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), False)
        from cryptography.hazmat.primitives import hashes

        chain.append(builder.sign(root_key, hashes.SHA256()))
    folder.mkdir(parents=True, exist_ok=True)
    pem = serialization.Encoding.PEM
    (folder / "signer.pem").write_bytes(b"".join(item.public_bytes(pem) for item in chain))
    (folder / "signer.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return key


def test_an_own_signer_is_taken_from_the_folder(tmp_path: pathlib.Path) -> None:
    own_signer(tmp_path)
    keys = InstallationKeys.in_folder(tmp_path)
    assert keys is not None
    marks = Marks(keys, required=True)
    data = encoded("png", marks)
    known = content_credentials.read(data, "png", keys.signer().anchor)
    assert known is not None and known.trusted and known.algorithm == "Es256"


def test_a_wrong_signer_is_named(tmp_path: pathlib.Path) -> None:
    own_signer(tmp_path / "a")
    own_signer(tmp_path / "b")
    chain, key = tmp_path / "a" / "signer.pem", tmp_path / "b" / "signer.key"
    with pytest.raises(ProvenanceError, match="is not the key of the first certificate"):
        Signer.load(chain, key)
    with pytest.raises(ProvenanceError, match="holds no private key"):
        Signer.load(chain, chain)
    with pytest.raises(ProvenanceError, match="holds no certificates"):
        Signer.load(key, key)
    with pytest.raises(ProvenanceError, match=r"absent\.pem: cannot be read"):
        Signer.load(tmp_path / "absent.pem", key)
    (tmp_path / "a" / "signer.key").unlink()
    with pytest.raises(ProvenanceError, match=r"signer\.key: is missing beside signer\.pem"):
        InstallationKeys.in_folder(tmp_path / "a")


def test_keys_are_made_once_also_by_many_at_a_time(tmp_path: pathlib.Path) -> None:
    folder, found = tmp_path / "new" / "provenance", []
    assert InstallationKeys.in_folder(folder, make=False) is None and not folder.exists()

    def make() -> None:
        keys = InstallationKeys.in_folder(folder)
        assert keys is not None
        found.append(keys.watermark)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert [path.name for path in folder.iterdir()] == ["watermark.key"]
    assert stat.S_IMODE((folder / "watermark.key").stat().st_mode) == 0o600


def test_wrong_keys_and_folders_are_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "watermark.key").write_text("not hexadecimal")
    with pytest.raises(ProvenanceError, match=r"watermark\.key: must hold 32 bytes"):
        InstallationKeys.in_folder(tmp_path)
    with pytest.raises(ProvenanceError, match="CALOTYPE_PROVENANCE_DIR"):
        InstallationKeys.in_folder(tmp_path / "watermark.key" / "below")


def test_former_keys_are_still_found(tmp_path: pathlib.Path) -> None:
    before = InstallationKeys.in_folder(tmp_path)
    assert before is not None
    data = encoded("png", Marks(before, ("watermark",)))
    (tmp_path / "watermark.key").rename(tmp_path / "watermark-2026.key")
    after = InstallationKeys.in_folder(tmp_path)
    found = check(data, after)
    assert found.watermark is not None and found.former_key


def test_pods_that_share_a_secret_mark_alike(tmp_path: pathlib.Path) -> None:
    def keys(folder: str, token: str = "a shared token") -> InstallationKeys:
        variables = {"CALOTYPE_INTERNAL_TOKEN": token, "CALOTYPE_DATA_DIR": str(tmp_path / folder)}
        found = installation_keys(variables)
        assert found is not None
        return found

    assert keys("a") == keys("b") and not (tmp_path / "a").exists()
    assert keys("a").name != keys("a", "another token").name
    ours, theirs = (encoded("png", Marks(keys(pod), required=True)) for pod in "ab")
    assert same_pixels(ours, theirs)
    assert check(ours, keys("b")) == check(theirs, keys("a")) and check(ours, keys("b")).ours


def test_layers_come_from_the_environment() -> None:
    assert chosen_layers({}) == LAYERS
    assert chosen_layers({"CALOTYPE_MARKS": "c2pa, xmp"}) == ("xmp", "c2pa")
    assert chosen_layers({"CALOTYPE_MARKS": "none"}) == ()
    with pytest.raises(InvalidRequest, match="CALOTYPE_MARKS names 'exif'"):
        chosen_layers({"CALOTYPE_MARKS": "xmp,exif"})


@pytest.mark.slow
def test_the_safety_stage_checks_alike_with_the_watermark(moderator: Moderator) -> None:
    for pixels in (*(drawing(number) for number in range(6)), texture(0), texture(1, 384)):
        before, after = (moderator.check_image(p) for p in (pixels, MARKS.in_pixels(pixels)[0]))
        jpeg = moderator.check_image(saved(pixels, "JPEG", quality=90))
        assert after.verdict is before.verdict
        for category, score in before.scores.items():
            change = abs(after.scores[category] - score)
            assert change <= max(0.05, 2 * abs(jpeg.scores[category] - score)), category


def test_the_command_tells_people_and_programs(tmp_path: pathlib.Path) -> None:
    keys = InstallationKeys.in_folder(tmp_path / "data" / "provenance")
    file = tmp_path / "picture.webp"
    file.write_bytes(encoded("webp", Marks(keys, required=True)))
    arguments = ["provenance", "check", str(file), "--data-dir", str(tmp_path / "data")]
    told = CliRunner().invoke(cli, arguments)
    assert told.exit_code == 0, told.output
    for expected in ("webp, 128x128", "trainedAlgorithmicMedia", "valid, signed here", "payload"):
        assert expected in told.output
    report = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert report["ours"] is True and report["credentials"]["trusted"] is True
    assert report["watermark"]["payload"] == report["credentials"]["watermark"]
    arguments[-1] = str(tmp_path / "elsewhere")
    told = CliRunner().invoke(cli, arguments)
    assert "not looked for" in told.output and "signingCredential.untrusted" in told.output
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is no picture"), (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "is no picture"), (None, "read")],
)
def test_what_cannot_be_checked_is_refused_in_one_sentence(
    tmp_path: pathlib.Path, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "file.png"
    if content is not None:
        file.write_bytes(content)
    told = CliRunner().invoke(cli, ["provenance", "check", str(file)])
    assert isinstance(told.exception, ImageError | InvalidRequest)
    assert reason in str(told.exception) and str(file) in str(told.exception)


def test_damaged_credentials_are_no_fault_of_the_reader() -> None:
    data = encoded("png")
    at = data.index(b"caBX")
    for cut in range(at, at + 1200, 37):
        broken = data[:cut] + bytes(8) + data[cut + 8 :]
        known = content_credentials.read(broken, "png")
        assert known is None or not known.trusted
