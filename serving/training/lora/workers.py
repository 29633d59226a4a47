"""Processes that train one adapter together: each takes its share of every step's pictures.

Only gradients travel, one vector a step. Noise is drawn for the whole step by everybody, so that
two workers of four pictures make the adapter that one of eight makes.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from calotype.serving.core.errors import InvalidRequest


class Workers:
    """This process among those that share a run; alone unless `join` was called."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls) -> Workers:
        """Joins the others where a launcher such as torchrun started several; else alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes the files and tells the events."""
        return self.rank == 0

    def part(self, batch: int) -> slice:
        """The pictures of a step that are this process's.

        Raises:
            InvalidRequest: the step cannot be shared out evenly.
        """
        if batch % self.size:
            raise InvalidRequest(
                f"A batch of {batch} cannot be shared by {self.size} workers evenly; take a "
                f"multiple of {self.size}.",
                param="batch",
            )
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def average(self, tensor: torch.Tensor) -> None:
        """Makes a tensor the mean of everybody's, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size

    def any(self, wanted: bool) -> bool:
        """Whether anybody says so."""
        if self.size == 1:
            return wanted
        flag = torch.tensor([float(wanted)])
        if torch.cuda.is_available():
            flag = flag.cuda()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def wait(self) -> None:
        """Until everybody is here."""
        if self.size > 1:
            dist.barrier()
