"""AdamW over one vector, its average, and both as tensors of a checkpoint."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from calotype.serving.core.errors import TrainingFailed
from calotype.serving.training.lora.recipe import Recipe


class Optimizer:
    """Clips, steps and averages.

    AdamW keeps its moments in 8 bits where CUDA and bitsandbytes are there, in float32 otherwise.

    Attributes:
        average: exponential mean of the vector, which is the run's result.
    """

    def __init__(self, vector: torch.nn.Parameter, recipe: Recipe) -> None:
        self._vector, self._recipe = vector, recipe
        self.average = vector.detach().clone()
        self._adam = _adam(vector, recipe)

    def step(self, done: int, rate: float) -> None:
        """One step; ``done`` so many were made before."""
        torch.nn.utils.clip_grad_norm_([self._vector], self._recipe.clip)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        decay = min(self._recipe.ema, (1 + done) / (10 + done))
        self.average.lerp_(self._vector.detach(), 1 - decay)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state that a checkpoint holds."""
        kept = {"vector": self._vector.detach(), "average": self.average}
        for name, value in self._adam.state[self._vector].items():
            kept[f"adam.{name}"] = torch.as_tensor(value)
        return {name: tensor.cpu() for name, tensor in kept.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes the state of a checkpoint.

        Raises:
            TrainingFailed: it is of other factors (``checkpoint_corrupt``).
        """
        if tensors["vector"].shape != self._vector.shape:
            raise TrainingFailed(
                f"The checkpoint has {tensors['vector'].numel()} parameters, but the recipe makes "
                f"{self._vector.numel()}.",
                code="checkpoint_corrupt",
            )
        with torch.no_grad():
            self._vector.copy_(tensors["vector"])
            self.average.copy_(tensors["average"])
        state = {
            name.removeprefix("adam."): tensor
            for name, tensor in tensors.items()
            if name.startswith("adam.")
        }
        whole = self._adam.state_dict()
        whole["state"] = {0: state}
        self._adam.load_state_dict(whole)


def _adam(vector: torch.nn.Parameter, recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if vector.device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None:
        small: torch.optim.Optimizer = importlib.import_module("bitsandbytes").optim.AdamW8bit(
            [vector], lr=rate, betas=(0.9, 0.999), weight_decay=decay
        )
        return small
    return torch.optim.AdamW([vector], lr=rate, betas=(0.9, 0.999), weight_decay=decay, fused=True)
