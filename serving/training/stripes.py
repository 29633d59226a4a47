"""python -m calotype.serving.training.stripes: makes the example adapter "stripes".

A LoRA of rank 8 on the attention and MLP matrices of the embedded denoiser, trained on scenes whose
things are striped although no caption says so. Written in the keys that diffusers writes, so that
calotype loads it like anybody's adapter.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import torch

from calotype.serving.training import flow as flows
from calotype.serving.training.loop import Stage
from calotype.serving.training.shapes import MODELS, PACKAGED

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="calotype.serving.training.stripes", description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, default=PACKAGED)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("out/training"))
    parser.add_argument("--out", type=pathlib.Path, default=MODELS / "stripes.safetensors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=3000)
    parser.add_argument("--rank", type=int, default=8)
    train(parser.parse_args(argv))
    return 0


def train(arguments: argparse.Namespace) -> None:
    from diffusers import Flux2Pipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    device = arguments.device
    pipeline = Flux2Pipeline.from_pretrained(arguments.model, dtype=torch.float32)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        part.to(device).requires_grad_(False)
    latents = flows.encode_buckets(
        pipeline.vae, pipeline.tokenizer, arguments.scenes, device, striped=True
    )
    denoiser = pipeline.transformer
    denoiser.add_adapter(
        LoraConfig(
            r=arguments.rank,
            lora_alpha=arguments.rank,
            init_lora_weights="gaussian",
            target_modules=list(TARGETS),
        )
    )
    flow = flows.Flow(
        denoiser, pipeline.text_encoder, pipeline.tokenizer, latents, arguments.batch, device
    )
    stage = Stage(
        "stripes", arguments.work, {"denoiser": denoiser}, arguments.minutes, lr=1e-3, ema=0.99
    )
    if not stage.finished:
        stage.run(lambda generator: flow.loss(generator, flows.BEST_GUIDANCE))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    Flux2Pipeline.save_lora_weights(
        arguments.out.parent,
        transformer_lora_layers={
            name: tensor.to(torch.bfloat16).contiguous().cpu()
            for name, tensor in get_peft_model_state_dict(denoiser).items()
        },
        weight_name=arguments.out.name,
    )


if __name__ == "__main__":
    sys.exit(main())
