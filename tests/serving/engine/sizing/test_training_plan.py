"""What a training needs, and what is said where it cannot be had."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from calotype.serving.commands.cli import cli
from calotype.serving.core.errors import InvalidRequest, OutOfMemory
from calotype.serving.engine.sizing.model_sizes import measure_model
from calotype.serving.engine.sizing.training_plan import forward_flops, plan_training


def test_arithmetic_of_a_forward_pass_is_counted() -> None:
    sizes = measure_model("flux-2-dev")
    # 27.5 B weights that a token passes, and attention over 56 blocks.
    assert forward_flops(sizes, 512) == pytest.approx(88e12, rel=0.01)
    assert forward_flops(sizes, 1024) == pytest.approx(283e12, rel=0.01)


def test_an_a100_holds_every_preset_in_bfloat16() -> None:
    fast, balanced, quality = plan_training("flux-2-dev", "a100-80gb")
    assert {plan.precision for plan in (fast, balanced, quality)} == {"bfloat16"}
    assert fast.memory < balanced.memory == quality.memory < 80e9
    assert fast.cost < balanced.cost < quality.cost
    assert balanced.cost == pytest.approx(2.0 * balanced.hours)


def test_a_smaller_gpu_takes_int8_or_a_cheaper_preset() -> None:
    (fast,) = plan_training("flux-2-dev", "a100-40gb", presets=("fast",))
    assert fast.precision == "int8"
    with pytest.raises(OutOfMemory, match=r"preset quality.*it fits with preset fast") as caught:
        plan_training("flux-2-dev", "a100-40gb", presets=("quality",))
    assert caught.value.code == "insufficient_memory"
    with pytest.raises(OutOfMemory, match=r"it fits on the a100-40gb"):
        plan_training("flux-2-dev", "rtx-4090-24gb")


def test_unknown_names_are_told() -> None:
    with pytest.raises(InvalidRequest, match="gpu must be one of"):
        plan_training("flux-2-dev", "a1")
    with pytest.raises(InvalidRequest, match="preset must be one of fast, balanced, quality"):
        plan_training("flux-2-dev", "a100-80gb", presets=("best",))  # type: ignore[arg-type]


def test_the_command_says_what_is_counted_and_what_is_not() -> None:
    words = ["plan", "--train", "lora", "--gpu", "a100-80gb", "--price-per-hour", "1.5"]
    shown = CliRunner().invoke(cli, words).output
    assert "balanced  600 at 512 + 200 at 1024" in shown
    assert "$1.50 an hour" in shown
    assert "roofline" in shown
