"""python -m calotype.serving.training.shapes: makes and scores the embedded model "shapes".

``train`` runs four stages, each resumable: the autoencoder, its decoder alone, the denoiser with
its text encoder, and guidance distillation. ``evaluate`` draws held-out captions through
diffusers' own Flux2Pipeline and prints what the exact classifier finds in the images.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import sys
from typing import Any

import torch

from calotype.serving.training import flow as flows
from calotype.serving.training import miniature
from calotype.serving.training.autoencoder import Images, train_autoencoder
from calotype.serving.training.captions import sample_scene
from calotype.serving.training.loop import Stage, rank
from calotype.serving.training.scene_classifier import ATTRIBUTES, matches, score
from calotype.serving.training.scenes import to_uint8

MODELS = pathlib.Path(__file__).parents[1] / "weights" / "embedded"
PACKAGED = MODELS / "shapes"
STAGES = ("autoencoder", "decoder", "denoiser", "distillation")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="calotype.serving.training.shapes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the model; run again to resume")
    train.add_argument("--work", type=pathlib.Path, default=pathlib.Path("out/training"))
    train.add_argument("--out", type=pathlib.Path, default=PACKAGED)
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--minutes", type=float, nargs=4, default=(14, 6, 60, 12), metavar="M")
    train.add_argument("--batch", type=int, nargs=2, default=(16, 32), metavar="N")
    train.add_argument("--pictures", type=int, default=3000, help="pool of the autoencoder")
    train.add_argument("--scenes", type=int, default=24000, help="pool of the denoiser")
    train.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    check = commands.add_parser("evaluate", help="score held-out captions")
    check.add_argument("--model", type=pathlib.Path, default=PACKAGED)
    check.add_argument("--captions", type=int, default=300)
    check.add_argument("--two", action="store_true", help="captions of two things")
    check.add_argument("--guidance", type=float, default=flows.BEST_GUIDANCE)
    check.add_argument("--steps", type=int, default=20)
    check.add_argument("--size", default="128x128")
    check.add_argument("--seed", type=int, default=991)
    check.add_argument("--json", action="store_true", help="print the scores as JSON")
    check.add_argument("--sheet", type=pathlib.Path, help="save the first 32 pictures as one PNG")
    arguments = parser.parse_args(argv)
    if arguments.command == "train":
        train_model(arguments)
    else:
        evaluate(arguments)
    return 0


def train_model(arguments: argparse.Namespace) -> None:
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    device, work = arguments.device, arguments.work
    last = STAGES.index(arguments.until)
    minutes = dict(zip(STAGES, arguments.minutes, strict=True))
    processor = miniature.build_processor()
    vae = miniature.build_autoencoder().to(device, memory_format=torch.channels_last)
    denoiser = miniature.build_denoiser().to(device)
    text_encoder = miniature.build_text_encoder(len(processor.tokenizer)).to(device)
    first = Stage("autoencoder", work, {"vae": vae}, minutes["autoencoder"], lr=3e-3)

    def decoder_stage() -> Stage:
        spent = minutes["decoder"] if last else 0.0
        return Stage("decoder", work, {"vae": vae}, spent, lr=1e-3, ema=0.99)

    images = Images(arguments.images, device)
    train_autoencoder(vae, first, decoder_stage, images, arguments.batch[0], device)
    del images
    if last < 2:
        return
    vae.requires_grad_(False)
    latents = flows.encode_buckets(vae, processor, arguments.scenes, device)
    flow = flows.Flow(denoiser, text_encoder, processor, latents, arguments.batch[1], device)
    probe_rng = random.Random(77)
    probe = [sample_scene(probe_rng, True) for _ in range(48)]
    pairs = [sample_scene(probe_rng, True, two=True) for _ in range(24)]

    def accuracy(guidance: float) -> dict[str, dict[str, float]]:
        found = {}
        for name, scenes in (("one", probe), ("two", pairs)):
            captions = [scene.caption for scene in scenes]
            drawn = flows.draw_images(flow, vae, processor, captions, guidance)
            found[name] = {
                k: round(v, 3) for k, v in score(scenes, to_uint8(drawn).numpy()).items()
            }
        return found

    trained: dict[str, torch.nn.Module] = {
        "denoiser": denoiser,
        "text_encoder": text_encoder.model.language_model,
    }
    flows.train_denoiser(
        flow,
        Stage(
            "denoiser", work, trained, minutes["denoiser"], lr=1.5e-3, muon_lr=2e-3,
            matrices=flows.block_matrix, ema=0.9985, warmup=200,
        ),
        lambda: accuracy(flows.TEACHER_GUIDANCE),
    )  # fmt: skip
    if last == 3:
        flows.distil_guidance(
            flow,
            lambda: Stage(
                "distillation", work, {"denoiser": denoiser}, minutes["distillation"], lr=7.5e-4,
                muon_lr=1e-3, matrices=flows.block_matrix, ema=0.99, warmup=50,
            ),
            lambda: accuracy(flows.TEACHER_GUIDANCE),
        )  # fmt: skip
    if rank() > 0:
        return
    parts = {"vae": vae.cpu(), "denoiser": denoiser.cpu(), "text_encoder": text_encoder.cpu()}
    parts["vae"] = vae.to(memory_format=torch.contiguous_format)
    miniature.save_model(arguments.out, parts, torch.bfloat16)


@torch.no_grad()
def evaluate(arguments: argparse.Namespace) -> None:
    from diffusers import Flux2Pipeline

    pipeline = Flux2Pipeline.from_pretrained(arguments.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    settings = json.loads((arguments.model / "calotype.json").read_text())
    width, height = (int(side) for side in arguments.size.split("x"))
    rng = random.Random(arguments.seed)
    scenes = [sample_scene(rng, True, two=arguments.two) for _ in range(arguments.captions)]
    pictures: list[Any] = []
    for start in range(0, len(scenes), 25):
        part = scenes[start : start + 25]
        seeds = range(arguments.seed + start, arguments.seed + start + len(part))
        drawn = pipeline(
            prompt=[scene.caption for scene in part],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            guidance_scale=arguments.guidance,
            num_inference_steps=arguments.steps,
            width=width,
            height=height,
            max_sequence_length=settings["max_sequence_length"],
            text_encoder_out_layers=tuple(settings["text_encoder_out_layers"]),
            output_type="np",
        ).images
        pictures += list((drawn * 255).round().astype("uint8"))
        print(f"\r{len(pictures)} of {len(scenes)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    scores = score(scenes, pictures)
    by: dict[str, list[bool]] = collections.defaultdict(list)
    for scene, image in zip(scenes, pictures, strict=True):
        for thing in scene.things:
            by[thing.shape].append(matches(scene, image)["full"])
    shapes = {name: sum(right) / len(right) for name, right in sorted(by.items())}
    if arguments.sheet:
        save_sheet(pictures[:32], arguments.sheet)
    if arguments.json:
        print(json.dumps({"captions": len(scenes), "scores": scores, "by_shape": shapes}))
        return
    things = "two things" if arguments.two else "one thing"
    print(
        f"{len(scenes)} held-out captions of {things}, {arguments.size}, {arguments.steps} steps:"
    )
    for name in ATTRIBUTES:
        print(f"  {'all of these' if name == 'full' else name:<14}{100 * scores[name]:6.1f} %")
    print("  fully right by shape: " + ", ".join(f"{k} {100 * v:.0f} %" for k, v in shapes.items()))


def save_sheet(images: list[Any], path: pathlib.Path) -> None:
    """Eight images a row."""
    import numpy as np
    from PIL import Image

    rows = [np.concatenate(images[i : i + 8], 1) for i in range(0, len(images) // 8 * 8, 8)]
    Image.fromarray(np.concatenate(rows, 0)).save(path)


if __name__ == "__main__":
    sys.exit(main())
