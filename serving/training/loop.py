"""The training loop of every stage: seeded, shown as a progress bar, resumable after any kill.

A step draws all its randomness from a generator seeded with (stage, step, process), and a
checkpoint holds weights, averages and optimizer state, so a run that was killed goes on as if
nothing had happened. Several processes (torchrun) average their gradients: on CPUs two processes
of one thread beat one process of two.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
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
        minutes: training time in all; the schedule is a warm-up and one cosine over it.
        clock: seconds by which training time is told; `time.process_time` on a shared machine.
        lr: peak rate of AdamW.
        muon_lr: peak rate of Muon for ``matrices``; no Muon when 0.
        matrices: which parameters, by name, are matrices of blocks.
        ema: decay of the averaged weights that the stage leaves behind.
    """

    name: str
    work: pathlib.Path
    modules: dict[str, nn.Module]
    minutes: float
    lr: float
    muon_lr: float = 0.0
    matrices: Callable[[str, Tensor], bool] = lambda name, parameter: False
    ema: float = 0.998
    warmup: int = 100
    seed: int = 0
    save_seconds: float = 60.0
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    seconds: float = 0.0
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
        return self.seconds >= 60 * self.minutes

    def generator(self, step: int) -> torch.Generator:
        """The CPU generator from which step ``step`` draws everything."""
        key = zlib.crc32(f"{self.seed}/{self.name}/{step}/{rank()}".encode())
        return torch.Generator().manual_seed(key)

    def run(
        self,
        loss_of: Callable[[torch.Generator], Tensor],
        evaluate: Callable[[], Mapping[str, object]] | None = None,
        evaluations: int = 4,
    ) -> None:
        """Trains until the time is used and leaves the averaged weights in the modules.

        Evaluations and checkpoints are not counted as training time.
        """
        saved = time.monotonic()
        running = 1.0
        bar = tqdm(total=round(60 * self.minutes), desc=self.name, unit="s", mininterval=10.0)
        bar.disable = bar.disable or rank() > 0
        bar.update(int(self.seconds))
        evaluated = int(evaluations * self._share)
        while not self.finished:
            started = self.clock()
            rate = self._rate()
            for optimizer, peak in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate
                optimizer.zero_grad(set_to_none=True)
            loss = loss_of(self.generator(self.done))
            loss.backward()  # type: ignore[no-untyped-call]
            loss_now = self._share_gradients(loss.item(), started)
            nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
            for optimizer, _ in self.optimizers:
                optimizer.step()
            self.done += 1
            self._average()
            running = loss_now if self.done == 1 else running + 0.02 * (loss_now - running)
            bar.update(int(self.seconds) - bar.n)
            if self.done % 100 == 0:
                bar.set_postfix(loss=f"{running:.4f}", steps=self.done)
                self._log({"loss": round(running, 5)})
            if rank() > 0:
                continue
            if evaluate and int(evaluations * self._share) > evaluated:
                evaluated = int(evaluations * self._share)
                with self.averaged(), torch.no_grad():
                    self._log(evaluate())
            if time.monotonic() - saved > self.save_seconds:
                self._save()
                saved = time.monotonic()
        bar.close()
        if rank() == 0:
            self._save()
        self._swap()

    def averaged(self) -> Averaged:
        """A context in which the modules hold the averaged weights."""
        return Averaged(self)

    @property
    def _share(self) -> float:
        return min(1.0, self.seconds / (60 * self.minutes))

    def _rate(self) -> float:
        warm = min(1.0, (self.done + 1) / self.warmup)
        return warm * (0.5 * (1 + math.cos(math.pi * self._share)) * 0.98 + 0.02)

    def _share_gradients(self, loss: float, started: float) -> float:
        """Averages gradients over the processes; all of them must also agree on the time."""
        if world_size() == 1:
            self.seconds += self.clock() - started
            return loss
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()
        ]
        clock = torch.tensor([self.seconds + self.clock() - started, loss])
        flat = torch.cat([g.flatten() for g in gradients] + [clock])
        dist.all_reduce(flat)
        flat /= world_size()
        start = 0
        for parameter in self.parameters.values():
            part = flat[start : start + parameter.numel()]
            parameter.grad = part.view_as(parameter).clone()
            start += parameter.numel()
        self.seconds = flat[-2].item()
        return flat[-1].item()

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

    def _log(self, entry: Mapping[str, object]) -> None:
        if rank() > 0:
            return
        line = json.dumps({"step": self.done, "minutes": round(self.seconds / 60, 2), **entry})
        tqdm.write(f"{self.name} {line}")
        with (self.work / f"{self.name}.jsonl").open("a") as log:
            log.write(line + "\n")

    def _save(self) -> None:
        state = {
            "done": self.done,
            "seconds": self.seconds,
            "parameters": {n: p.detach().cpu() for n, p in self.parameters.items()},
            "averages": {n: p.cpu() for n, p in self.averages.items()},
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }
        unfinished = self._checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, self._checkpoint)

    def _restore(self, state: dict[str, Any]) -> None:
        self.done, self.seconds = state["done"], state["seconds"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
                self.averages[name].copy_(state["averages"][name])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.finished:
            self._swap()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


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
