"""Which layers are trained, and that an untrained adapter changes nothing."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import torch
from samples.training_run import RECIPE, make_trainer

from calotype.serving.core.errors import InvalidRequest, TrainingFailed
from calotype.serving.engine.lora.lora_file import linear_shapes, read_lora
from calotype.serving.engine.model.components import Components
from calotype.serving.engine.model.transformer import Transformer
from calotype.serving.engine.model.weight_files import unfilled
from calotype.serving.engine.sizing.adapter_origins import Origins, read_origins
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.model_sizes import measure_model
from calotype.serving.engine.sizing.training_plan import lora_parameters
from calotype.serving.engine.sizing.weight_header import read_header
from calotype.serving.training.lora.adapter_file import write_adapter
from calotype.serving.training.lora.factors import LoraFactors
from calotype.serving.training.lora.objective import Batch, Objective
from calotype.serving.training.lora.targets import find_targets
from calotype.serving.training.lora.workers import Workers


def batch(seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return Batch(
        4,
        4,
        torch.randn((2, 16, 48), generator=draw),
        torch.randn((2, 32, 192), generator=draw),
        torch.randn((2, 32, 192), generator=draw),
    )


def test_flux_2_dev_has_192_layers_to_train() -> None:
    config = TransformerConfig()
    with unfilled():
        model = Transformer(config)
    targets = find_targets(model, config)
    assert len(targets) == 192
    values = sum(16 * (m.in_features + m.out_features) for m in targets.values())
    assert values == lora_parameters(measure_model("flux-2-dev"), 16) == 100_663_296


def test_layers_of_another_configuration_are_refused_by_name() -> None:
    config = TransformerConfig(num_layers=1, num_single_layers=1)
    with unfilled():
        model = Transformer(config)
    wanted = dataclasses.replace(config, num_layers=2)
    with pytest.raises(
        TrainingFailed, match=r"26 linear.*14 were.*transformer_blocks\.1"
    ) as caught:
        find_targets(model, wanted)
    assert caught.value.code == "target_modules_unmatched"


@pytest.fixture
def factors(components: Components) -> LoraFactors:
    model = components.denoiser
    made = LoraFactors(find_targets(model, model.config), rank=4, scale=0.5, seed=0)
    yield made
    made.remove()


def test_an_untrained_adapter_changes_nothing(components: Components, factors: LoraFactors) -> None:
    objective = Objective(components.denoiser, factors, guidance=3.0)
    change = objective.preservation(batch(), torch.Generator().manual_seed(0)).item()
    assert change < 1e-10, "no more than the rounding of norms in training"
    objective.close()


def test_gradients_are_those_of_plain_products_norms_and_rotations(
    components: Components, factors: LoraFactors, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        factors.vector.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    objective = Objective(components.denoiser, factors, guidance=3.0)
    found = []
    for plain in (False, True):
        if plain:
            objective.close()
            monkeypatch.setattr(
                "calotype.serving.training.lora.factors._Joined.apply",
                lambda x, w, a, b, s: x @ w.t() + (x @ a.t() @ b.t()) * s,
            )
            monkeypatch.setattr(
                "calotype.serving.engine.model.transformer._Rotation.apply", plainly_rotated
            )
        factors.vector.grad.zero_()
        loss = objective.loss(batch(), torch.Generator().manual_seed(0))
        loss.backward()
        found.append((loss.detach(), factors.vector.grad.clone()))
    assert found[0][1].abs().max() > 0
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


def plainly_rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cosine + torch.stack([-imaginary, real], dim=-1).flatten(3) * sine


def test_two_workers_of_one_picture_have_the_gradient_of_one_worker_of_two(
    components: Components, factors: LoraFactors
) -> None:
    with torch.no_grad():
        factors.vector.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    objective = Objective(components.denoiser, factors, guidance=3.0)
    found = []
    for parts in ([Workers().part(2)], [Workers(rank, 2).part(2) for rank in range(2)]):
        factors.vector.grad.zero_()
        for part in parts:
            loss = objective.loss(batch(), torch.Generator().manual_seed(0), part) / len(parts)
            loss.backward()
        found.append(factors.vector.grad.clone())
    objective.close()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-7)
    with pytest.raises(InvalidRequest, match="batch of 3 cannot be shared by 2"):
        Workers(0, 2).part(3)


def test_recomputed_blocks_give_the_same_gradients(
    components: Components, factors: LoraFactors
) -> None:
    with torch.no_grad():
        factors.vector.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    found = []
    for recompute in (False, True):
        objective = Objective(components.denoiser, factors, guidance=3.0, recompute=recompute)
        factors.vector.grad.zero_()
        objective.loss(batch(), torch.Generator().manual_seed(0)).backward()
        objective.preservation(batch(), torch.Generator().manual_seed(1)).backward()
        found.append(factors.vector.grad.clone())
    assert torch.equal(found[0], found[1])


def test_an_adapter_file_is_read_as_it_was_trained(
    components: Components, tmp_path: pathlib.Path
) -> None:
    recipe = dataclasses.replace(RECIPE, alpha=8.0)
    factors = make_trainer(components, tmp_path, recipe).run()
    assert factors is not None
    path = tmp_path / "adapter.safetensors"
    origins = Origins("d" * 64, (("a" * 64, {"basis": "own", "holder": "Ada"}),))
    described = {"triggerWord": "zorbl"}
    write_adapter(path, factors, rank=4, alpha=8.0, described=described, origins=origins)
    assert read_origins(path) == origins
    read = read_lora(
        path, linear_shapes(components.denoiser), max_rank=4, dtype=torch.float32
    ).layers
    assert set(read) == set(factors)
    for name, (down, up) in factors.items():
        torch.testing.assert_close(
            read[name].up @ read[name].down, 2 * up @ down, rtol=2e-2, atol=2e-4
        )
    assert '"triggerWord": "zorbl"' in read_header(path, TrainingFailed).metadata["calotype"]
