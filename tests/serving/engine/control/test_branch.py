"""The branch beside a denoiser with several double-stream blocks, against the plain formula."""

from __future__ import annotations

import torch
from samples.controls import random_branch

from calotype.serving.engine.control.hints import Control
from calotype.serving.engine.execution.forward import Forward, rotary_tables
from calotype.serving.engine.model.transformer import Transformer
from calotype.serving.engine.scheduling.scheduler import Bucket
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.testing.models import TRANSFORMER

CONFIG = TransformerConfig.from_json({**TRANSFORMER, "num_layers": 4})
BUCKET = Bucket(2, 3, 5, ((2, 2),))


@torch.no_grad()
def plain(model, branch, hidden, time, guidance, words, context, scale):
    """VideoX-Fun's ``Flux2ControlTransformer2DModel.forward``, for one image."""
    rotary = rotary_tables(model, BUCKET, hidden.device)
    embedded = model.time_guidance_embed(time * 1000, guidance * 1000)
    image_mod = model.double_stream_modulation_img(embedded)
    text_mod = model.double_stream_modulation_txt(embedded)
    x, text = model.x_embedder(hidden), model.context_embedder(words)
    state, words_of_branch, hints = branch.control_img_in(context), text, {}
    for place, block in zip((0, 2), branch.control_transformer_blocks, strict=True):
        if place == 0:
            state = block.before_proj(state) + x
        state, words_of_branch = block(state, words_of_branch, image_mod, text_mod, rotary)
        hints[place] = block.after_proj(state)
    for place, block in enumerate(model.transformer_blocks):
        x, text = block(x, text, image_mod, text_mod, rotary)
        x = x + hints.get(place, 0.0) * scale
    joint = torch.cat([text, x], dim=1)
    for block in model.single_transformer_blocks:
        joint = block(joint, model.single_stream_modulation(embedded), rotary)
    out = model.proj_out(model.norm_out(joint[:, text.shape[1] :], embedded))
    return out[:, : BUCKET.rows * BUCKET.columns]


def test_hints_go_behind_every_second_block_and_skip_reference_tokens():
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval().requires_grad_(False)
    branch = random_branch(CONFIG)
    assert branch.layers == (0, 2)
    own, seen = BUCKET.rows * BUCKET.columns, 4
    hidden = torch.randn(3, own + seen, CONFIG.in_channels)
    words = torch.randn(3, 5, CONFIG.joint_attention_dim)
    time, guidance = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([3.0, 4.0, 1.0])
    context = torch.randn(2, own, branch.control_img_in.in_features)
    controls = [(), (Control(branch, context[0], 0.7),), (Control(branch, context[1], 1.5),)]
    with torch.no_grad():
        found = Forward(model)(hidden, time, guidance, words, BUCKET, controls=controls)
    for i, scale in ((1, 0.7), (2, 1.5)):
        at = slice(i, i + 1)
        padded = torch.nn.functional.pad(context[i - 1 : i], (0, 0, 0, seen))
        wanted = plain(model, branch, hidden[at], time[at], guidance[at], words[at], padded, scale)
        torch.testing.assert_close(found[at], wanted, atol=2e-5, rtol=0)
    with torch.no_grad():
        base = Forward(model)(hidden[:1], time[:1], guidance[:1], words[:1], BUCKET)
    assert torch.equal(found[:1], base)
