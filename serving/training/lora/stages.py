"""A run from pictures to an adapter file: validate, cache, train, and what follows.

Everything lies in one folder, so that the same call goes on where a killed one was: the cache, the
checkpoints, the samples, the events. The command line and the worker of a cluster both call this.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calotype.serving.config import ImageModel
from calotype.serving.core.errors import CalotypeError, InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.sizing.adapter_origins import Origins
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.settings import read_json
from calotype.serving.training.dataset.opening import open_source
from calotype.serving.training.dataset.preparation import Options, PreparedSet, prepare
from calotype.serving.training.lora.recipe import Recipe
from calotype.serving.training.lora.reporting import EventLog
from calotype.serving.weights.sources import model_folder
from calotype.serving.worker.model_loader import pick_device

if TYPE_CHECKING:
    from calotype.serving.engine.model.components import Components, Part
    from calotype.serving.training.dataset.screening import Screen
    from calotype.serving.training.dataset.sources import Source
    from calotype.serving.training.lora.samples import SampleSettings
    from calotype.serving.training.lora.trainer import Factors, Price
    from calotype.serving.training.lora.workers import Workers

CHECKPOINTS, SAMPLES, CACHE = "checkpoints", "samples", "cache"


@dataclass(frozen=True, slots=True)
class Run:
    """What is trained, on what, and where it is kept.

    Attributes:
        source: a folder, an archive or an object-store prefix.
        trigger: the word that evokes the adapter.
        class_words: what the trigger is one of; captions with these keep what they drew.
        work: folder of the run.
        output: the adapter file.
        prompts: that samples are drawn of; empty draws none.
        described: more entries of the result's metadata.
        command: that began the run, for the result's metadata.
        on_adapter: what follows a finished run: acceptance and promotion.
    """

    model: ImageModel
    source: str
    options: Options
    recipe: Recipe
    trigger: str | None
    class_words: tuple[str, ...]
    work: pathlib.Path
    output: pathlib.Path
    prompts: tuple[str, ...] = ()
    described: JsonObject = field(default_factory=dict)
    command: str | None = None
    on_adapter: Callable[[pathlib.Path], None] | None = None


def read_config(model: ImageModel) -> TransformerConfig:
    """The sizes of a model's denoiser."""
    return TransformerConfig.from_json(
        read_json(model_folder(model) / "transformer" / "config.json")
    )


def train_lora(
    run: Run,
    events: EventLog,
    *,
    screen: Screen,
    price: Price,
    stopping: Callable[[], bool] = lambda: False,
    workers: Workers | None = None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> pathlib.Path | None:
    """Runs all stages; the adapter file, or None where `stopping` ended the run.

    Args:
        on_progress: told the stage ("check" or "cache"), what is done of it, and of how much.

    Raises:
        DatasetRefused: the data set cannot be learnt from.
        TrainingFailed: the loss diverged, or a checkpoint or the model is not what it should be.
        Conflict: the folder is of another run.
        StorageFailed: the disk is full; the last checkpoint is kept.
    """
    try:
        with open_source(run.source) as source:
            prepared = _validate(run, source, events, screen, on_progress)
            if workers is not None and not workers.first:
                workers.wait()  # until the first one has written the cache
            cache = _cache(run, source, prepared, events, on_progress)
            if workers is not None and workers.first:
                workers.wait()
        report = prepared.report
        described: JsonObject = {
            **run.described,
            "model": run.model.name,
            "triggerWord": run.trigger,
            "datasetDigest": report.digest,
            "recipe": run.recipe.to_json(),
        }
        origins = report.origins(run.command)
        return _train(run, cache, described, origins, events, price, stopping, workers)
    except CalotypeError as fault:
        events.tell(
            "failed",
            message=str(fault),
            error={"code": fault.code, "message": str(fault), "param": fault.param},
        )
        raise


def _validate(
    run: Run,
    source: Source,
    events: EventLog,
    screen: Screen,
    on_progress: Callable[[str, int, int], None],
) -> PreparedSet:
    options = dataclasses.replace(run.options, resolution=max(run.recipe.resolutions))
    prepared = prepare(
        source, options, screen=screen, progress=lambda n, of: on_progress("check", n, of)
    )
    report = prepared.report
    report.raise_for_errors()
    words = [word for word in run.class_words if run.trigger and run.trigger in word]
    if words:
        raise InvalidRequest(
            f"The class word {words[0]!r} has the trigger {run.trigger!r} in it; give a plain word "
            "for what it is one of.",
            param="class_word",
        )
    events.tell(
        "dataset_checked",
        total_steps=run.recipe.steps,
        message=f"{len(report.used)} pictures used, {report.held_out} held out, "
        f"{len(report.refused)} refused, {len(report.duplicates)} duplicates",
    )
    return prepared


def _cache(
    run: Run,
    source: Source,
    prepared: PreparedSet,
    events: EventLog,
    on_progress: Callable[[str, int, int], None],
) -> pathlib.Path:
    from calotype.serving.training.lora.cache import cache_key, write_cache

    recipe, trigger = run.recipe, run.trigger
    words = run.class_words if recipe.preserve_every and trigger else ()
    key = cache_key(
        prepared.report.digest, _encoders(run.model), recipe.resolutions, run.prompts, words,
        recipe.precision,
    )  # fmt: skip
    path = run.work / CACHE / f"{key}.safetensors"
    if path.exists():
        return path
    components = _load(run, ("text_encoder", "vae"))
    sets = {
        resolution: PreparedSet(
            source, prepared.report, dataclasses.replace(run.options, resolution=resolution)
        ).samples("train")
        for resolution in recipe.resolutions
    }
    done, of = 0, sum(not one.held_out for one in prepared.report.used) * len(sets)

    def count() -> None:
        nonlocal done
        done += 1
        on_progress("cache", done, of)

    rewords = [lambda caption, w=word: caption.replace(trigger or "", w) for word in words]
    write_cache(path, components, sets, rewords, run.prompts, count)
    for old in path.parent.iterdir():
        if old != path:
            old.unlink(missing_ok=True)
    events.tell("cache_written", total_steps=recipe.steps, file=f"{CACHE}/{path.name}")
    return path


def _train(
    run: Run,
    cache: pathlib.Path,
    described: JsonObject,
    origins: Origins,
    events: EventLog,
    price: Price,
    stopping: Callable[[], bool],
    workers: Workers | None,
) -> pathlib.Path | None:
    from calotype.serving.training.lora.adapter_file import write_adapter
    from calotype.serving.training.lora.cache import CachedSet
    from calotype.serving.training.lora.checkpoint import Checkpoints
    from calotype.serving.training.lora.trainer import Trainer

    recipe = run.recipe
    components = _load(run, ("denoiser", "vae"))
    described = {**described, "baseDigest": components.fingerprint}
    cached = CachedSet(cache, components.device)

    def write(path: pathlib.Path, factors: Factors, step: int) -> None:
        write_adapter(
            path,
            factors,
            rank=recipe.rank,
            alpha=recipe.alpha,
            described={**described, "steps": step},
            origins=origins,
        )

    checkpoints = Checkpoints(
        run.work / CHECKPOINTS,
        {
            "recipe": recipe.digest,
            "dataset": str(described["datasetDigest"]),
            "base": components.fingerprint,
        },
        recipe.keep_checkpoints,
    )
    trainer = Trainer(
        components,
        cached,
        recipe,
        events,
        checkpoints,
        price=price,
        on_sample=_sampling(run, components, cached, write, events),
        stopping=stopping,
        workers=workers,
    )
    factors = trainer.run()
    if factors is None or (workers is not None and not workers.first):
        return None
    write(run.output, factors, recipe.steps)
    if run.on_adapter is not None:
        run.on_adapter(run.output)
    events.tell(
        "succeeded", step=recipe.steps, total_steps=recipe.steps, file=str(run.output.resolve())
    )
    return run.output


def _sampling(
    run: Run,
    components: Components,
    cached: object,
    write: Callable[[pathlib.Path, Factors, int], None],
    events: EventLog,
) -> Callable[[int, Factors], None] | None:
    from PIL import Image

    from calotype.serving.training.lora.cache import CachedSet
    from calotype.serving.training.lora.samples import Sampler

    assert isinstance(cached, CachedSet)
    embeds = cached.sample_prompts
    if embeds is None:
        return None
    sampler = Sampler(
        components, sample_settings(run.model, run.prompts), embeds, max_rank=run.recipe.rank
    )
    folder = run.work / SAMPLES
    folder.mkdir(parents=True, exist_ok=True)

    def draw(step: int, factors: Factors) -> None:
        """A sample that cannot be drawn is told, and the training goes on."""
        path = folder / f"step-{step:07d}.safetensors"
        try:
            write(path, factors, step)
            pictures = sampler.draw(path)
            for place, (prompt, pixels) in enumerate(zip(run.prompts, pictures, strict=True)):
                name = f"step{step:07d}-{place}.png"
                Image.fromarray(pixels).save(folder / name)
                events.tell(
                    "sample_drawn", step=step, total_steps=run.recipe.steps, prompt=prompt,
                    file=f"{SAMPLES}/{name}",
                )  # fmt: skip
        except (CalotypeError, OSError) as fault:
            events.tell(
                "sample_failed", step=step, total_steps=run.recipe.steps, message=str(fault)
            )
        finally:
            path.unlink(missing_ok=True)

    return draw


def sample_settings(model: ImageModel, prompts: Iterable[str]) -> SampleSettings:
    """The model's own serving defaults."""
    from calotype.serving.core.request import ImageSize
    from calotype.serving.training.lora.samples import SampleSettings

    defaults = model.spec.defaults
    return SampleSettings(
        tuple(prompts), ImageSize.parse(defaults.size), defaults.steps, defaults.guidance_scale
    )


def _load(run: Run, parts: tuple[Part, ...]) -> Components:
    """Parts of the model; an int8 base is made of bfloat16 weights on the CPU."""
    import torch

    from calotype.serving.engine.model.components import load_components
    from calotype.serving.engine.model.quantization import is_quantised

    device = pick_device(run.model.spec.device)
    int8 = run.recipe.precision == "int8"
    found = load_components(
        model_folder(run.model),
        parts=parts,
        device="cpu" if int8 and "denoiser" in parts else device,
        precision="float32" if run.recipe.precision == "float32" else "bfloat16",
    )
    if int8 and "denoiser" in parts:
        quantization = importlib.import_module("torchao.quantization")
        # Weights alone: what serves, int8 activations too, has no gradient.
        quantization.quantize_(
            found.denoiser, quantization.Int8WeightOnlyConfig(), filter_fn=is_quantised
        )
        found.denoiser.to(device)
        if found.loaded_vae is not None:
            found.loaded_vae.to(device)
        found.device = torch.device(device)
    return found


def _encoders(model: ImageModel) -> str:
    """Tells the encoders of a model from others, of their sizes and some of their bytes."""
    from calotype.serving.core.errors import ModelLoadFailed
    from calotype.serving.engine.sizing.weight_header import find_weight_headers, fingerprint

    folder = model_folder(model)
    found = []
    for part, stem in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        headers = find_weight_headers(folder / part, stem, ModelLoadFailed)
        found.append(fingerprint(read_json(folder / part / "config.json"), headers))
    return "/".join(found)
