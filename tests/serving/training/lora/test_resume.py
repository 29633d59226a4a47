"""A run that was killed, stopped or damaged goes on to the very adapter of an undisturbed one."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest
from samples import training_run
from samples.training_run import RECIPE, digest_of, make_trainer

from calotype.serving.core.errors import Conflict, StorageFailed, TrainingFailed
from calotype.serving.engine.model.components import Components
from calotype.serving.wire.training_progress import read_events


@pytest.fixture(scope="module")
def undisturbed(components: Components, tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest_of(make_trainer(components, tmp_path_factory.mktemp("whole")).run())


def types(folder: pathlib.Path) -> list[str]:
    return [event.type for event in read_events(folder)]


def test_a_run_killed_before_every_step_makes_the_same_adapter(
    components: Components, tmp_path: pathlib.Path, undisturbed: str
) -> None:
    # Between two checkpoints a killed run loses a step, so it is killed there with one more.
    kills = ["0", "1", "2", "3", "4", "5", "6"]
    subprocess.run(
        [sys.executable, training_run.__file__, str(tmp_path), *kills], check=True, timeout=280
    )
    assert digest_of(make_trainer(components, tmp_path).run()) == undisturbed
    assert types(tmp_path).count("resumed") == 5, "of the runs killed at step 3 and later"


def test_a_stopped_run_says_where_it_goes_on(
    components: Components, tmp_path: pathlib.Path, undisturbed: str
) -> None:
    trainer = make_trainer(components, tmp_path, stopping=lambda: trainer.step == 3)
    assert trainer.run() is None
    last = list(read_events(tmp_path))[-1]
    assert (last.type, last.step, last.total_steps) == ("suspended", 3, RECIPE.steps)
    assert digest_of(make_trainer(components, tmp_path).run()) == undisturbed


def test_a_full_disk_keeps_the_last_checkpoint(
    components: Components,
    tmp_path: pathlib.Path,
    undisturbed: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace = os.replace

    def full(source: pathlib.Path, target: pathlib.Path) -> None:
        if "step-" in str(target) and "step-0000002" not in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(StorageFailed, match="No space left"):
            make_trainer(components, tmp_path).run()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000002.safetensors"]
    assert types(tmp_path).count("checkpoint_failed") == 3, "at steps 4, 6 and the last"
    assert digest_of(make_trainer(components, tmp_path).run()) == undisturbed


def test_a_damaged_checkpoint_is_told_and_passed_over(
    components: Components, tmp_path: pathlib.Path, undisturbed: str
) -> None:
    trainer = make_trainer(components, tmp_path, stopping=lambda: trainer.step == 4)
    trainer.run()
    newest = tmp_path / "checkpoints" / "step-0000004.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    assert digest_of(make_trainer(components, tmp_path).run()) == undisturbed
    told = [event for event in read_events(tmp_path) if event.type == "checkpoint_corrupt"]
    assert [event.file for event in told] == ["step-0000004.safetensors"]
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TrainingFailed, match="None of the") as caught:
        make_trainer(components, tmp_path).run()
    assert caught.value.code == "checkpoint_corrupt"


def test_a_checkpoint_of_another_recipe_is_refused(
    components: Components, tmp_path: pathlib.Path
) -> None:
    trainer = make_trainer(components, tmp_path, stopping=lambda: trainer.step == 2)
    trainer.run()
    other = dataclasses.replace(RECIPE, learning_rate=2e-3)
    with pytest.raises(Conflict, match="another recipe"):
        make_trainer(components, tmp_path, other).run()
    rarer = dataclasses.replace(RECIPE, checkpoint_every=5)
    assert make_trainer(components, tmp_path, rarer).run() is not None


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_its_checkpoint(
    components: Components, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calotype.serving.training.lora.objective import Objective

    loss = Objective.loss
    with monkeypatch.context() as patched:
        patched.setattr(
            Objective,
            "loss",
            lambda self, batch, generator, part: (
                loss(self, batch, generator, part) * (float("nan") if trainer.step == 3 else 1.0)
            ),
        )
        trainer = make_trainer(components, tmp_path)
        with pytest.raises(TrainingFailed, match="step 4; the checkpoint of step 2") as caught:
            trainer.run()
    assert caught.value.code == "loss_diverged"
    assert (tmp_path / "checkpoints" / "step-0000002.safetensors").exists()
