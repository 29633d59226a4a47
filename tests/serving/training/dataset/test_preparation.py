"""A folder becomes a report and samples; what is wrong is named by code, file and field."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image
from samples.training_pictures import RED, RIGHTS, encoded, mostly, photo

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedTextClassifier
from calotype.serving.config.rights import Rights
from calotype.serving.core.errors import DatasetRefused, ModerationUnavailable
from calotype.serving.training.dataset.captions import CaptionSource, Wording
from calotype.serving.training.dataset.opening import open_source
from calotype.serving.training.dataset.preparation import Options, PreparedSet, prepare
from calotype.serving.training.dataset.report import report_from_payload

SMALL = Options(resolution=96, wording=Wording(trigger="zorbl"))


def prepared(folder: pathlib.Path, screen: Moderator, options: Options = SMALL) -> PreparedSet:
    return prepare(open_source(folder), options, screen=screen)


def codes(found: PreparedSet) -> list[tuple[str, str | None, str | None]]:
    return [(one.code, one.file, one.field) for one in found.report.problems]


def test_a_good_folder_is_used_whole(folder: pathlib.Path, screen: Moderator) -> None:
    found = prepared(folder, screen)
    report = found.report
    report.raise_for_errors()
    assert (report.pictures, len(report.used), report.refused, report.duplicates) == (
        20,
        20,
        (),
        (),
    )
    assert report.buckets == {(96, 96): 20}
    assert report.captions == {CaptionSource.PROVIDED: 20}
    assert report.held_out == 2
    train, kept = list(found.samples("train")), list(found.samples("held out"))
    assert (len(train), len(kept)) == (18, 2)
    first = found[0]
    assert first.caption == "a zorbl number 0"
    assert first.image.dtype == np.uint8
    assert np.array_equal(first.image.transpose(1, 2, 0), np.asarray(photo(0)))
    assert first.rights == Rights.model_validate(RIGHTS)


def test_the_digest_says_what_is_learnt(
    folder: pathlib.Path, screen: Moderator, tmp_path: pathlib.Path
) -> None:
    first = prepared(folder, screen).report
    shutil.copytree(folder, tmp_path / "again")
    assert prepared(tmp_path / "again", screen).report.digest == first.digest
    assert report_from_payload(json.loads(json.dumps(first.to_payload()))) == first
    (folder / "03.txt").write_text("another caption")
    assert prepared(folder, screen).report.digest != first.digest


def test_the_same_pictures_are_held_out_under_other_names(
    folder: pathlib.Path, screen: Moderator
) -> None:
    before = {one.sha256 for one in prepared(folder, screen).report.used if one.held_out}
    for number, file in enumerate(sorted(folder.glob("*.png"), reverse=True)):
        file.rename(folder / f"renamed-{number:02}.png")
    after = {one.sha256 for one in prepared(folder, screen).report.used if one.held_out}
    assert before == after


def test_one_check_serves_several_resolutions(folder: pathlib.Path, screen: Moderator) -> None:
    found = prepared(folder, screen)
    halved = dataclasses.replace(SMALL, resolution=64)
    sample = PreparedSet(open_source(folder), found.report, halved)[0]
    assert (sample.bucket, sample.image.shape) == ((64, 64), (3, 64, 64))


def test_an_adapter_says_what_it_learnt_from(folder: pathlib.Path, screen: Moderator) -> None:
    report = prepared(folder, screen).report
    origins = report.origins("calotype train lora pictures")
    assert {sha256 for sha256, _ in origins.pictures} == {
        one.sha256 for one in report.used if not one.held_out
    }
    assert all(rights == RIGHTS for _, rights in origins.pictures)
    assert origins.dataset_digest == report.digest


def test_exif_turns_a_picture(folder: pathlib.Path, screen: Moderator) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    wide = photo(50, 192, 96)
    (folder / "turned.jpg").write_bytes(encoded(wide, "JPEG", exif=exif, quality=95))
    (used,) = [one for one in prepared(folder, screen).report.used if one.file == "turned.jpg"]
    assert (used.width, used.height) == (96, 192)
    assert used.bucket[1] > used.bucket[0]


@pytest.mark.parametrize(
    ("caption", "wording", "want"),
    [
        ("a [trigger] toy", Wording("zorbl"), "a zorbl toy"),
        ("a toy", Wording("zorbl"), "zorbl, a toy"),
        ("a ZORBL toy", Wording("zorbl"), "a ZORBL toy"),
        ("a toy", Wording(prefix="photo of", suffix="on white"), "photo of a toy on white"),
        (None, Wording("zorbl", class_word="toy"), "zorbl toy"),
        (None, Wording("zorbl", fallback="a thing"), "zorbl, a thing"),
    ],
)
def test_the_trigger_is_in_every_caption(caption: str | None, wording: Wording, want: str) -> None:
    found = wording.caption(caption, lambda: None)
    assert found is not None
    assert found[0] == want


def test_a_model_that_sees_writes_missing_captions(folder: pathlib.Path, screen: Moderator) -> None:
    (folder / "05.txt").unlink()
    seeing = dataclasses.replace(SMALL, captioner=lambda pixels: f"a picture of {pixels.shape}")
    found = prepared(folder, screen, seeing)
    assert found[5].caption == "zorbl, a picture of (96, 96, 3)"
    assert found.report.captions == {CaptionSource.AUTOMATIC: 1, CaptionSource.PROVIDED: 19}


def test_without_one_the_trigger_alone_is_used_and_said(
    folder: pathlib.Path, screen: Moderator
) -> None:
    (folder / "05.txt").unlink()
    found = prepared(folder, screen)
    assert found[5].caption == "zorbl"
    assert any("trigger word alone" in line for line in found.report.warnings)
    nothing = prepared(folder, screen, dataclasses.replace(SMALL, wording=Wording()))
    assert codes(nothing) == [("caption_missing", "05.png", "text")]


def test_metadata_says_captions_and_rights(folder: pathlib.Path, screen: Moderator) -> None:
    own = {"basis": "consent", "holder": "Grace", "evidence": "s3://papers/grace.pdf"}
    rows = [
        {"file_name": "00.png", "text": "from metadata", "rights": own},
        {"file_name": "gone.png", "text": "nothing"},
        {"file_name": "01.png", "rights": {"basis": "consent", "holder": "Grace"}},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepared(folder, screen)
    assert found[0].caption == "zorbl, from metadata"
    assert found[0].rights is not None
    assert found[0].rights.holder == "Grace"
    assert set(codes(found)) == {
        ("caption_unreadable", "metadata.jsonl, line 2", "file_name"),
        ("rights_missing", "metadata.jsonl, line 3", "rights"),
    }


def test_three_pictures_are_too_few(folder: pathlib.Path, screen: Moderator) -> None:
    for file in sorted(folder.glob("*.png"))[3:]:
        file.unlink()
    with pytest.raises(DatasetRefused, match="3 usable pictures") as refused:
        prepared(folder, screen).report.raise_for_errors()
    assert refused.value.code == "dataset_too_small"
    assert refused.value.param == str(folder)


def test_copies_are_left_out_and_many_stop_the_set(folder: pathlib.Path, screen: Moderator) -> None:
    photo(3).resize((200, 200)).save(folder / "zz-larger.jpg", quality=60)
    (folder / "zz-same.png").write_bytes((folder / "04.png").read_bytes())
    report = prepared(folder, screen).report
    assert [(one.file, one.of) for one in report.duplicates] == [
        ("zz-larger.jpg", "03.png"),
        ("zz-same.png", "04.png"),
    ]
    assert report.problems == ()
    for number in range(14):
        (folder / f"zz-{number}.png").write_bytes((folder / "04.png").read_bytes())
    (problem,) = prepared(folder, screen).report.problems
    assert problem.code == "duplicates_excessive"
    assert problem.file is not None


def test_colours_tell_pictures_of_one_shape_apart(folder: pathlib.Path, screen: Moderator) -> None:
    grey = np.asarray(photo(0).convert("L"))
    for channel in range(3):
        tinted = np.full((96, 96, 3), 40, np.uint8)
        tinted[:, :, channel] = grey
        (folder / f"tint-{channel}.png").write_bytes(encoded(Image.fromarray(tinted)))
    assert prepared(folder, screen).report.duplicates == ()


def test_a_refused_picture_stops_the_set_unless_it_may_be_left_out(
    folder: pathlib.Path, screen: Moderator
) -> None:
    (folder / "red.png").write_bytes(encoded(mostly(RED)))
    (folder / "07.txt").write_text("forbidden")
    found = prepared(folder, screen)
    assert codes(found) == [
        ("content_refused", "07.png", "text"),
        ("content_refused", "red.png", None),
    ]
    refused = {one.file: one.categories for one in found.report.refused}
    assert refused == {"07.png": ("sexual",), "red.png": ("sexual",)}
    lenient = dataclasses.replace(SMALL, leave_out_refused=True)
    report = prepared(folder, screen, lenient).report
    report.raise_for_errors()
    assert {one.file for one in report.used} == {f"{n:02}.png" for n in range(20) if n != 7}


def test_nothing_is_learnt_unchecked(folder: pathlib.Path) -> None:
    class Broken:
        name = "broken"

        def score(self, images: object) -> list[dict[str, float]]:
            raise RuntimeError("no model")

    broken = Moderator(
        Policy.default(),
        text_classifiers=[FixedTextClassifier({"sexual": 0.0})],
        image_classifiers=[Broken()],
    )
    with pytest.raises(ModerationUnavailable, match=r"00\.png could not be checked"):
        prepared(folder, broken)


def test_rights_are_needed_and_end(folder: pathlib.Path, screen: Moderator) -> None:
    (folder / "rights.json").unlink()
    without = prepared(folder, screen)
    assert codes(without) == [("rights_missing", "00.png", "rights")]
    assert len(without) == 20, "everything else is said all the same"
    with pytest.raises(DatasetRefused, match="20 of 20 pictures have no rights record"):
        without.report.raise_for_errors()
    bare = prepared(folder, screen, dataclasses.replace(SMALL, rights_required=False))
    bare.report.raise_for_errors()
    assert any("no rights record" in line for line in bare.report.warnings)
    ended = Rights.model_validate(RIGHTS | {"expires": "2026-01-31"})
    options = dataclasses.replace(SMALL, rights=ended)
    last_day = dataclasses.replace(options, today=lambda: datetime.date(2026, 1, 31))
    assert codes(prepared(folder, screen, last_day)) == []
    after = dataclasses.replace(options, today=lambda: datetime.date(2026, 2, 1))
    assert ("rights_expired", "00.png", "rights.expires") in codes(prepared(folder, screen, after))


def test_a_revoked_picture_is_not_learnt_again(folder: pathlib.Path, screen: Moderator) -> None:
    gone = prepared(folder, screen)[4].sha256
    found = prepared(folder, screen, dataclasses.replace(SMALL, without=frozenset({gone})))
    assert [(one.file, one.code) for one in found.report.refused] == [("04.png", "rights_revoked")]
    assert len(found) == 19


def test_a_set_that_changes_is_noticed(folder: pathlib.Path, screen: Moderator) -> None:
    found = prepared(folder, screen)
    (folder / "06.png").write_bytes(encoded(photo(99)))
    assert found[5].caption
    for index in (6,):
        with pytest.raises(DatasetRefused, match=r"06\.png has changed") as refused:
            found[index]
        assert (refused.value.code, refused.value.param) == ("dataset_changed", "06.png")
    (folder / "07.png").unlink()
    with pytest.raises(DatasetRefused, match=r"07\.png has changed"):
        found[7]


def test_a_set_that_grows_while_it_is_read_is_refused(
    folder: pathlib.Path, screen: Moderator
) -> None:
    def grow(done: int, total: int) -> None:
        if done == 3:
            (folder / "new.png").write_bytes(encoded(photo(77)))

    with pytest.raises(DatasetRefused, match="has changed"):
        prepare(open_source(folder), SMALL, screen=screen, progress=grow)


def test_a_caption_of_ten_megabytes_is_no_caption(folder: pathlib.Path, screen: Moderator) -> None:
    (folder / "02.txt").write_text("word " * 2_000_000)
    (folder / "03.txt").write_text("word " * 2_000)
    (folder / "04.txt").write_bytes(b"\xff\xfe\x00")
    assert codes(prepared(folder, screen)) == [
        ("caption_unreadable", "02.txt", "text"),
        ("caption_unreadable", "03.txt", "text"),
        ("caption_unreadable", "04.txt", "text"),
    ]


def test_links_are_not_followed(
    folder: pathlib.Path, screen: Moderator, tmp_path: pathlib.Path
) -> None:
    outside = tmp_path / "secret"
    outside.mkdir()
    (outside / "inside.png").write_bytes(encoded(photo(60)))
    (folder / "link.png").symlink_to(outside / "inside.png")
    (folder / "elsewhere").symlink_to(outside)
    report = prepared(folder, screen).report
    assert {(one.file, one.code) for one in report.refused} == {
        ("elsewhere", "file_refused"),
        ("link.png", "file_refused"),
    }
    assert len(report.used) == 20
