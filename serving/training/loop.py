"""The training loop of every stage: seeded, shown as a progress bar, resumable after any kill.

A step draws all its randomness from a generator seeded with (stage, step), and a checkpoint holds
weights, averages and optimizer state, so a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from calotype.serving.training.muon import Muon


@dataclass
class Stage:
    """One stage of training.

    Args:
        name: names the checkpoint and the log.
        work: folder of checkpoints (``NAME.pt``) and logs (``NAME.jsonl``).
        modules: what is trained; all parameters that require gradients.
        steps: optimizer steps in all; the schedule is a warm-up and one cosine over them.
        lr: peak rate of AdamW.
        muon_lr: peak rate of Muon for ``matrices``; no Muon when 0.
        matrices: which parameters, by name, are matrices of blocks.
        ema: decay of the averaged weights that the stage leaves behind.
    """

    name: str
    work: pathlib.Path
    modules: dict[str, nn.Module]
    steps: int
    lr: float
    muon_lr: float = 0.0
    matrices: Callable[[str, Tensor], bool] = lambda name, parameter: False
    ema: float = 0.998
    warmup: int = 100
    seed: int = 0
    save_seconds: float = 60.0
    done: int = 0
    averages: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        named = {
            f"{part}.{name}": parameter
            for part, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.parameters = named
        matrices = [p for n, p in named.items() if self.muon_lr and self.matrices(n, p)]
        chosen = {id(p) for p in matrices}
        others = [p for p in named.values() if id(p) not in chosen]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(others, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.0), self.lr)
        ]
        if matrices:
            self.optimizers.append((Muon(matrices, weight_decay=0.01), self.muon_lr))
        self.averages = {name: p.detach().clone() for name, p in named.items()}
        if self._checkpoint.exists():
            self._restore(torch.load(self._checkpoint, map_location="cpu", weights_only=True))

    @property
    def _checkpoint(self) -> pathlib.Path:
        return self.work / f"{self.name}.pt"

    @property
    def finished(self) -> bool:
        return self.done >= self.steps

    def generator(self, step: int) -> torch.Generator:
        """The CPU generator from which step ``step`` draws everything."""
        key = zlib.crc32(f"{self.seed}/{self.name}/{step}".encode())
        return torch.Generator().manual_seed(key)

    def run(
        self,
        loss_of: Callable[[torch.Generator], Tensor],
        evaluate: Callable[[], dict[str, Any]] | None = None,
        evaluate_every: int = 0,
    ) -> None:
        """Trains to the last step and leaves the averaged weights in the modules."""
        saved = time.monotonic()
        running: Tensor | None = None
        bar = tqdm(total=self.steps, initial=self.done, desc=self.name, mininterval=5.0)
        while self.done < self.steps:
            rate = self._rate()
            for optimizer, peak in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate
                optimizer.zero_grad(set_to_none=True)
            loss = loss_of(self.generator(self.done))
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
            for optimizer, _ in self.optimizers:
                optimizer.step()
            self.done += 1
            self._average()
            detached = loss.detach()
            running = detached if running is None else running.lerp(detached, 0.02)
            bar.update()
            if self.done % 250 == 0:
                bar.set_postfix(loss=f"{running.item():.4f}")
                self._log({"step": self.done, "loss": round(running.item(), 5)})
            if evaluate and evaluate_every and self.done % evaluate_every == 0:
                with self.averaged():
                    self._log({"step": self.done, **evaluate()})
            if time.monotonic() - saved > self.save_seconds:
                self._save()
                saved = time.monotonic()
        bar.close()
        self._save()
        self._swap()

    def averaged(self) -> Averaged:
        """A context in which the modules hold the averaged weights."""
        return Averaged(self)

    def _rate(self) -> float:
        warm = min(1.0, (self.done + 1) / self.warmup)
        return warm * (0.5 * (1 + math.cos(math.pi * self.done / self.steps)) * 0.98 + 0.02)

    def _average(self) -> None:
        decay = min(self.ema, self.done / (self.done + 20))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.averages.values()), list(self.parameters.values()), 1 - decay
            )

    def _swap(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                kept = parameter.detach().clone()
                parameter.copy_(self.averages[name])
                self.averages[name].copy_(kept)

    def _log(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry)
        tqdm.write(f"{self.name} {line}")
        with (self.work / f"{self.name}.jsonl").open("a") as log:
            log.write(line + "\n")

    def _save(self) -> None:
        state = {
            "done": self.done,
            "parameters": {n: p.detach().cpu() for n, p in self.parameters.items()},
            "averages": {n: p.cpu() for n, p in self.averages.items()},
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }
        unfinished = self._checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, self._checkpoint)

    def _restore(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
                self.averages[name].copy_(state["averages"][name])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.finished:
            self._swap()


def normal(shape: Sequence[int], generator: torch.Generator, device: str) -> Tensor:
    """Gaussian noise made on the device, from a seed that the CPU generator draws."""
    seed = int(torch.randint(2**62, (), generator=generator))
    local = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=local, device=device)


class Averaged:
    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __enter__(self) -> None:
        self._stage._swap()

    def __exit__(self, *reason: object) -> None:
        self._stage._swap()
