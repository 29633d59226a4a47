"""One candidate from its file to its report: opens what is needed, measures, decides."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from calotype.moderation.moderator import Moderator
from calotype.serving.acceptance.copying import CopyDetector, autoencoder_latents
from calotype.serving.acceptance.decision import decide
from calotype.serving.acceptance.embedding_judge import Embedding, EmbeddingJudge
from calotype.serving.acceptance.exact_judge import ExactJudge
from calotype.serving.acceptance.judges import Judge
from calotype.serving.acceptance.measurement import JudgeOf, Measurement, measure
from calotype.serving.acceptance.prompts import prompt_set
from calotype.serving.acceptance.report import Report, html_report, make_report
from calotype.serving.acceptance.studio import LocalStudio, Studio
from calotype.serving.config import ImageModel
from calotype.serving.config.model.acceptance import Acceptance
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import AdapterRef, ImageSize
from calotype.serving.deployments.local import LocalPipeline
from calotype.serving.training.dataset.opening import open_source
from calotype.serving.training.dataset.preparation import Options, prepare
from calotype.serving.worker.model_loader import load_parts

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

CANDIDATE = "candidate"
"""Its name in a pipeline of this process."""
_LEAST_PICTURES = 2


@dataclass(frozen=True, slots=True)
class TrainingPicture:
    """What the candidate has learnt from."""

    name: str
    pixels: Pixels
    held_out: bool = False
    """It was not learnt from: it shows the subject, and cannot have been copied."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter, and what is known of it."""

    name: str
    sha256: str
    trigger: str
    pictures: tuple[TrainingPicture, ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """A decision with what it was made of."""

    report: Report
    measurement: Measurement
    replaces: Report | None = None

    def html(self) -> str:
        return html_report(self.report, self.measurement, self.replaces)


def training_pictures(place: str, model: ImageModel, screen: Moderator) -> list[TrainingPicture]:
    """The pictures of a data set, at the size that the model draws by default.

    Raises:
        DatasetRefused: it cannot be read, or has fewer than two pictures that can be used.
    """
    size = ImageSize.parse(model.spec.defaults.size)
    options = Options(
        resolution=min(size.width, size.height), rights_required=False, leave_out_refused=True
    )
    with open_source(place) as source:
        prepared = prepare(source, options, screen=screen)
        if len(prepared) < _LEAST_PICTURES:
            prepared.report.raise_for_errors()
        return [
            TrainingPicture(sample.file, sample.image.transpose(1, 2, 0), sample.held_out)
            for sample in prepared.samples("all")
        ]


def accept_adapter(
    file: pathlib.Path,
    candidate: Candidate,
    model: ImageModel,
    acceptance: Acceptance,
    *,
    moderator: Moderator,
    embedding: Embedding | None = None,
    scale: float = 1.0,
    replaces: Report | None = None,
    threads: int | None = None,
    on_picture: Callable[[], None] = lambda: None,
) -> Accepted:
    """Measures an adapter with an engine of this process.

    Args:
        embedding: of pictures and texts; the embedded model needs none.
        replaces: the report of the revision that it would replace.

    Raises:
        AdapterLoadFailed: the file is no adapter of the model.
        CalotypeError: something cannot be drawn or judged.
    """
    pipeline = LocalPipeline(model, {CANDIDATE: file}, moderator, threads)
    studio = LocalStudio(model, pipeline, AdapterRef(CANDIDATE, scale))
    return accept(
        *(studio, candidate, model, acceptance),
        embedding=embedding,
        replaces=replaces,
        on_picture=on_picture,
    )


def accept(
    studio: Studio,
    candidate: Candidate,
    model: ImageModel,
    acceptance: Acceptance,
    *,
    embedding: Embedding | None = None,
    replaces: Report | None = None,
    on_picture: Callable[[], None] = lambda: None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Accepted:
    """Measures a candidate that the studio draws, and decides.

    Raises:
        CalotypeError: something cannot be drawn or judged.
    """
    size = ImageSize.parse(model.spec.defaults.size)
    learnt = [picture for picture in candidate.pictures if not picture.held_out]
    exact = flat_shapes(model)
    prompts = prompt_set(acceptance, candidate.trigger, flat_shapes=exact)
    vae = load_parts(model, ("vae",))
    copies = CopyDetector(
        [picture.pixels for picture in learnt], (size.width, size.height), autoencoder_latents(vae)
    )
    judge_of = _judges(model, [p.pixels for p in candidate.pictures], candidate.trigger, embedding)
    measurement = measure(studio, prompts, acceptance.seed, judge_of, copies, on_picture)
    report = make_report(
        measurement,
        decide(measurement.scores, acceptance),
        acceptance,
        name=candidate.name,
        sha256=candidate.sha256,
        model=model.name,
        judge="exact" if embedding is None else "embedding",
        created=now().strftime("%Y-%m-%dT%H:%M:%SZ"),
        training_names=[picture.name for picture in learnt],
        replaces=replaces,
    )
    return Accepted(report, measurement, replaces)


def flat_shapes(model: ImageModel) -> bool:
    """Whether it is the embedded model, whose pictures the exact classifier can read."""
    built_in = model.spec.source.built_in
    return built_in is not None and built_in.name == "shapes"


def _judges(
    model: ImageModel, training: Sequence[Pixels], trigger: str, embedding: Embedding | None
) -> JudgeOf:
    if embedding is not None:

        def judge_of(base: Sequence[Pixels]) -> Judge:
            return EmbeddingJudge(embedding, training, base, (trigger,))

        return judge_of
    if flat_shapes(model):
        return lambda base: ExactJudge(tuple(training))
    raise InvalidRequest(
        f"Pictures of {model.name} are judged by embeddings: give the folder of a CLIP or SigLIP "
        "model with --embedder.",
        param="embedder",
    )


def file_sha256(file: pathlib.Path) -> str:
    """Raises InvalidRequest when it cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}.", param="FILE") from None
