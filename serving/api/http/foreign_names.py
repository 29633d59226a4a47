"""What other systems call our parameters, for the hint behind an unknown one.

Names of the APIs and tools that clients come from: Replicate, fal, Together, BFL, Stability, the
web UIs of Stable Diffusion, diffusers. Spelling comes second (`hint`).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

_NAMES = {
    **dict.fromkeys(
        ("num_inference_steps", "num_steps", "inference_steps", "sampling_steps", "ddim_steps"),
        "steps",
    ),
    **dict.fromkeys(
        ("cfg_scale", "cfg", "guidance_value", "true_cfg_scale", "distilled_guidance"),
        "guidance_scale",
    ),
    **dict.fromkeys(("num_images", "num_outputs", "num_images_per_prompt", "samples"), "n"),
    **dict.fromkeys(("batch_size", "number_of_images", "n_images", "n_iter"), "n"),
    **dict.fromkeys(("image_size", "resolution", "dimensions"), "size"),
    **dict.fromkeys(("negative", "neg_prompt", "negativePrompt"), "negative_prompt"),
    **dict.fromkeys(("sampler_name", "sampler_index", "sample_method"), "sampler"),
    **dict.fromkeys(("lora", "lora_weights", "extra_lora", "adapters", "loraWeights"), "loras"),
    **dict.fromkeys(("format", "image_format", "output_type", "outputFormat"), "output_format"),
    **dict.fromkeys(("output_quality", "jpeg_quality"), "output_compression"),
    **dict.fromkeys(("timeout", "timeout_seconds", "max_wait", "ttl"), "deadline_seconds"),
    **dict.fromkeys(("random_seed", "noise_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("denoising_strength", "prompt_strength", "image_strength"), "strength"),
    **dict.fromkeys(
        ("input_image", "image_prompt", "image_urls", "init_image"), "reference_images"
    ),
    **dict.fromkeys(("model_id", "model_name", "checkpoint", "version"), "model"),
    **dict.fromkeys(("text", "caption", "description", "text_prompt"), "prompt"),
    **dict.fromkeys(("webhook_url", "notify_url", "callback_url"), "webhook"),
    **dict.fromkeys(("user_id", "end_user"), "user"),
}
_SENTENCES = {
    "aspect_ratio": "Give 'size' instead, such as '1536x1024'.",
    "extra_body": "'extra_body' is an argument of OpenAI's Python client, which puts what it holds "
    "beside the other parameters; in JSON, write them there yourself.",
    "enable_safety_checker": "The safety stage cannot be switched off; see 'moderation'.",
    "disable_safety_checker": "The safety stage cannot be switched off; see 'moderation'.",
    "prompt_upsampling": "The prompt is drawn as it is written; leave it out.",
    "sync_mode": "Leave it out; POST /v1/jobs answers without waiting.",
    "go_fast": "Leave it out; 'steps' and 'quality' make a picture faster.",
}
_VALUES = {"jpg": "jpeg", "JPG": "jpeg", "JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}


def hint(name: str, known: Collection[str]) -> str:
    """A sentence that says what to write instead of an unknown parameter, or nothing.

    Args:
        known: the parameters that are taken here; no other is ever advised.
    """
    if name in _SENTENCES:
        return f" {_SENTENCES[name]}"
    meant = _NAMES.get(name)
    if meant not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        meant = near[0] if near else None
    return f" Did you mean '{meant}'?" if meant else ""


def value_hint(value: object) -> str:
    """The same for a value: other spellings of formats."""
    meant = _VALUES.get(value) if isinstance(value, str) else None
    return f" Did you mean '{meant}'?" if meant else ""
