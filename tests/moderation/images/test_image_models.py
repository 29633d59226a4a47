"""Larger image classifiers on tiny random models of the real architectures."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples.images import drawing, texture

from calotype.moderation.errors import ClassifierUnavailable, PolicyError
from calotype.moderation.images.image_models import IMAGE_MODELS, SHIELDGEMMA_POLICIES
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.categories import Category, Verdict
from calotype.moderation.policy.policy import Policy

# Imports torch and transformers.
pytestmark = pytest.mark.slow

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
IMAGES = [drawing(0), texture(1, 96), texture(2, 128)[:64]]


def save_falconsai(folder: pathlib.Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    labels = {0: "normal", 1: "nsfw"}
    ViTForImageClassification(ViTConfig(**VISION, id2label=labels)).save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=half, image_std=half
    ).save_pretrained(folder)


def save_checker(folder: pathlib.Path) -> None:
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import (
        StableDiffusionSafetyChecker,
    )
    from transformers import CLIPConfig, CLIPImageProcessor

    config = CLIPConfig(vision_config={**VISION, "projection_dim": 8}, projection_dim=8)
    model = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        for name in ("concept_embeds", "special_care_embeds"):
            getattr(model, name).normal_()
            getattr(model, f"{name}_weights").fill_(0.5)
    model.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)


def save_shieldgemma(folder: pathlib.Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        Gemma3ImageProcessor,
        PreTrainedTokenizerFast,
        ShieldGemma2Config,
        ShieldGemma2ForImageClassification,
        ShieldGemma2Processor,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    special = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", extra_special_tokens=special
    )
    config = ShieldGemma2Config(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "sliding_window": 4096, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        yes_token_index=5,
        no_token_index=6,
    )  # fmt: skip
    model = ShieldGemma2ForImageClassification(config)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):  # zero before training
                values.normal_()
    model.save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}"
        "<start_of_image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    ShieldGemma2Processor(
        Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        chat_template=template,
        image_seq_length=4,
    ).save_pretrained(folder)


SAVE = {
    "falconsai": save_falconsai,
    "sd-safety-checker": save_checker,
    "shieldgemma-2": save_shieldgemma,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    import torch

    found = {}
    for name, save in SAVE.items():
        torch.manual_seed(7)
        found[name] = tmp_path_factory.mktemp(name)
        save(found[name])
    return found


@pytest.mark.parametrize("name", SAVE)
def test_every_model_scores_images(name: str, folders: dict[str, pathlib.Path]) -> None:
    model = IMAGE_MODELS[name](folders[name])
    rows = model.score(IMAGES)
    expected = set(SHIELDGEMMA_POLICIES.values()) if "gemma" in name else {Category.SEXUAL}
    assert len(rows) == len(IMAGES)
    for row in rows:
        assert set(row) == expected and all(0 <= score <= 1 for score in row.values())
    assert rows[0] != rows[1], "the picture has a say"
    alone = model.score(IMAGES[1:2])[0]
    assert all(alone[key] == pytest.approx(rows[1][key], abs=1e-4) for key in alone)


def test_falconsai_reads_its_own_labels(folders: dict[str, pathlib.Path]) -> None:
    import torch
    from transformers import ViTForImageClassification

    folder = folders["falconsai"]
    model = ViTForImageClassification.from_pretrained(folder)
    image = np.asarray(Image.fromarray(IMAGES[0]).resize((32, 32), Image.Resampling.BILINEAR))
    values = torch.tensor(image.transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32)
    with torch.inference_mode():
        expected = float(model(values).logits.softmax(-1)[0, 1])
    found = IMAGE_MODELS["falconsai"](folder).score(IMAGES[:1])[0][Category.SEXUAL]
    assert found == pytest.approx(expected, abs=0.01)


def test_the_checker_is_at_a_half_where_stable_diffusion_draws_the_line(
    folders: dict[str, pathlib.Path],
) -> None:
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import (
        StableDiffusionSafetyChecker,
    )
    from transformers import CLIPImageProcessor

    folder = folders["sd-safety-checker"]
    own = StableDiffusionSafetyChecker.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    adapter = IMAGE_MODELS["sd-safety-checker"](folder)
    squares = [drawing(number) for number in range(6)] + [texture(9, 64)]
    verdicts = set()
    for limit in (-0.5, 0.2, 0.4, 0.6, 0.95):
        for model in (own, adapter._model):  # type: ignore[attr-defined]
            with torch.no_grad():
                model.concept_embeds_weights.fill_(limit)
        pixels = processor(images=[Image.fromarray(p) for p in squares], return_tensors="pt")
        blackened = [np.array(image) for image in squares]
        _, flagged = own(pixels["pixel_values"], blackened)
        scores = [row[Category.SEXUAL] for row in adapter.score(squares)]
        for verdict, score in zip(flagged, scores, strict=True):
            # The checker rounds to three digits.
            assert bool(verdict) is (score >= 0.5) or abs(score - 0.5) < 0.02
            verdicts.add(bool(verdict))
    assert verdicts == {True, False}


def test_shieldgemma_takes_the_chance_of_yes(folders: dict[str, pathlib.Path]) -> None:
    import torch

    adapter: Any = IMAGE_MODELS["shieldgemma-2"](folders["shieldgemma-2"])
    inputs = adapter._processor(
        images=[Image.fromarray(IMAGES[0])], policies=["sexual"], return_tensors="pt"
    )
    with torch.inference_mode():
        logits = adapter._model.model(**inputs).logits[0, -1]
    expected = 1 / (1 + math.exp(float(logits[6] - logits[5])))
    score = adapter.score(IMAGES[:1])[0][Category.SEXUAL]
    assert score == pytest.approx(expected, abs=1e-4) and abs(score - 0.5) > 1e-4


@pytest.mark.parametrize("name", SAVE)
def test_a_folder_without_the_model_lets_nothing_pass(name: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ClassifierUnavailable, match=f"Classifier {name} has no model in"):
        IMAGE_MODELS[name](tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ClassifierUnavailable, match=f"Classifier {name} cannot load"):
        IMAGE_MODELS[name](tmp_path)


def test_a_model_checks_in_the_safety_stage(folders: dict[str, pathlib.Path]) -> None:
    rules = {
        "version": 1,
        "categories": {"sexual": {"image": {"block": 0.01}}},
        "pictureModels": {"falconsai": str(folders["falconsai"])},
    }
    policy = Policy.from_spec("strict", rules)
    stage = Moderator(policy, text_classifiers=[], image_classifiers=[])
    decision = stage.check_image(IMAGES[1])
    assert decision.verdict is Verdict.BLOCK and decision.findings[0].classifier == "falconsai"
    with pytest.raises(PolicyError, match=r"pictureModels\.clip.*'falconsai', 'sd-safety-checker'"):
        Policy.from_spec("strict", rules | {"pictureModels": {"clip": "/models/clip"}})
