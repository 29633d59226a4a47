"""One image on several devices: sequence-parallel denoising, known as Ulysses.

Every device holds the whole denoiser and a share of the tokens. Linear layers work on the share;
for attention the devices exchange, so that each sees all tokens for a share of the heads (arXiv
2309.14509). It buys latency with devices: a 1024x1024 image of FLUX.2 [dev] on eight A100s is
estimated at 6.8 s for 28 steps, against 41 s on one. A replica per device gives more images.

Rank 0 is the engine; the others `follow` it, each in a process that `device_group` starts. All
ranks must hold the same model, and see the files of adapters under the same paths. A fault in the
middle of a step leaves the ranks at different places, so it ends the group (`errors.GroupLost`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional

from calotype.serving.core.errors import CalotypeError, EngineError, GroupLost, ModelLoadFailed
from calotype.serving.engine.control.hints import Controls
from calotype.serving.engine.execution.forward import Forward, rotary_tables
from calotype.serving.engine.lora.adapter_store import AdapterStore
from calotype.serving.engine.lora.lora_layers import Adapter, LoraLayers, Stack
from calotype.serving.engine.model.components import Components
from calotype.serving.engine.sampling.step_cache import StepCache
from calotype.serving.engine.scheduling.scheduler import Bucket

logger = logging.getLogger(__name__)

_ADAPTER_SECONDS = 300.0
"""How long a follower may take to read an adapter."""


@dataclass(frozen=True, slots=True)
class Order:
    """What rank 0 tells the others before a step.

    Attributes:
        stacks: for each pass its adapters: name, file, digest and scale.
        shapes: of latents, timesteps, guidance (empty if there is none) and embeddings.
    """

    bucket: Bucket
    stacks: tuple[tuple[tuple[str, str, str, float], ...], ...]
    shapes: tuple[tuple[int, ...], ...]


class SequenceGroup:
    """The ranks of torch's default process group, which must be initialised.

    Args:
        tell: on rank 0, hands an order to each of the others.
        lost: on rank 0, told why the group cannot go on.
    """

    def __init__(
        self,
        tell: Callable[[Order], None] = lambda order: None,
        lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.tell, self.lost = tell, lost

    def shares(self, length: int) -> list[int]:
        """Tokens of each rank; they differ by one at most."""
        whole, rest = divmod(length, self.size)
        return [whole + (rank < rest) for rank in range(self.size)]

    def mine(self, tokens: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's share of a dimension."""
        shares = self.shares(tokens.shape[dim])
        return tokens.narrow(dim, sum(shares[: self.rank]), shares[self.rank])

    def whole(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """All ranks' shares put together: [n, share, c] to [n, length, c]."""
        n, _, channels = tokens.shape
        found = [tokens.new_empty(n, share, channels) for share in self.shares(length)]
        # A broadcast each, because gathering wants equal shares.
        for rank, part in enumerate(found):
            if rank == self.rank:
                part.copy_(tokens)
            dist.broadcast(part, rank)
        return torch.cat(found, dim=1)

    def swap(self, mine: torch.Tensor, lengths: Sequence[int], *, to_heads: bool) -> torch.Tensor:
        """Shares of tokens with all heads to all tokens with a share of the heads, or back.

        Args:
            mine: [k, n, tokens, heads, width].
            lengths: tokens of each rank.
        """
        if to_heads:
            sent = list(mine.chunk(self.size, dim=3))
            k, n, _, heads, width = sent[0].shape
            taken = [(k, n, length, heads, width) for length in lengths]
            joined = 2
        else:
            sent = [
                mine.narrow(2, sum(lengths[:rank]), length) for rank, length in enumerate(lengths)
            ]
            k, n, _, heads, width = mine.shape
            taken = [(k, n, lengths[self.rank], heads, width)] * self.size
            joined = 3
        flat = torch.cat([part.reshape(-1) for part in sent])
        sizes = [torch.Size(shape).numel() for shape in taken]
        out = flat.new_empty(sum(sizes))
        dist.all_to_all_single(out, flat, sizes, [part.numel() for part in sent])
        starts = [sum(sizes[:rank]) for rank in range(self.size)]
        parts = [
            out.narrow(0, start, size).view(shape)
            for start, size, shape in zip(starts, sizes, taken, strict=True)
        ]
        return torch.cat(parts, dim=joined)


@dataclass(slots=True)
class _Exchange:
    """What the attention layers of a step share: tokens of each rank, text and image together."""

    group: SequenceGroup
    lengths: list[int]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention over all ranks' tokens; each [n, tokens of this rank, heads, width].

        In which order the tokens lie makes no difference: they were turned by their places before.
        """
        mine = torch.stack([query, key, value])
        every = self.group.swap(mine, self.lengths, to_heads=True).transpose(2, 3)
        out = functional.scaled_dot_product_attention(every[0], every[1], every[2])
        back = out.transpose(1, 2).unsqueeze(0)
        return self.group.swap(back, self.lengths, to_heads=False)[0]


class ParallelForward:
    """`forward.Forward` on all ranks of a group; called on rank 0.

    Raises:
        ModelLoadFailed: the heads of the model cannot be shared out.
    """

    def __init__(self, components: Components, lora: LoraLayers, group: SequenceGroup) -> None:
        model = components.denoiser
        if model.config.num_attention_heads % group.size:
            raise ModelLoadFailed(
                f"{group.size} devices cannot share {model.config.num_attention_heads} attention "
                "heads evenly; set devicesPerPicture to a number that divides them.",
                param="devices_per_picture",
            )
        self._model, self._group = model, group
        self._device, self._dtype = components.device, components.dtype
        self._forward = Forward(model, lora)
        self._exchange = _Exchange(group, [])
        model.replace_attention(self._exchange.attend)

    def __call__(
        self,
        hidden: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        embeds: torch.Tensor,
        bucket: Bucket,
        caches: Sequence[StepCache | None] = (),
        stacks: Sequence[Stack] = (),
        controls: Sequence[Controls] = (),
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocities as `forward.Forward` gives them.

        Requests with controls, or with references of another strength than 1, are refused before
        (`admission`): their followers would need the branches, too.

        Raises:
            EngineError: a follower cannot load an adapter.
            GroupLost: a follower is gone, or something failed in the middle of the step.
        """
        names = tuple(
            tuple((adapter.name, adapter.source, adapter.digest, scale) for adapter, scale in stack)
            for stack in stacks
        )
        given = (hidden, timestep, guidance, embeds)
        shapes = tuple(() if tensor is None else tuple(tensor.shape) for tensor in given)
        try:
            self._group.tell(Order(bucket, names, shapes))
            if any(names):
                self._all_ready(True)
            for tensor in given:
                if tensor is not None:
                    dist.broadcast(tensor.contiguous(), 0)
            return self._together(hidden, timestep, guidance, embeds, bucket, stacks)
        except CalotypeError:
            raise
        except Exception as error:  # whatever one rank dies of, the others wait for it in vain
            reason = f"a step on {self._group.size} devices failed: {type(error).__name__}: {error}"
            self._group.lost(reason)
            raise GroupLost(f"The devices cannot draw together any more: {reason}.") from error

    def receive(self, order: Order, store: AdapterStore) -> None:
        """A follower's part of a call.

        Raises:
            EngineError: an adapter cannot be loaded, here or elsewhere.
        """
        pinned: list[Adapter] = []
        try:
            stacks = self._stacks(order, store, pinned)
            if any(order.stacks):
                self._all_ready(stacks is not None)
            given = [self._received(place, shape) for place, shape in enumerate(order.shapes)]
            hidden, timestep, guidance, embeds = given
            if hidden is None or timestep is None or embeds is None:
                raise RuntimeError("rank 0 sent an order without tensors")
            self._together(hidden, timestep, guidance, embeds, order.bucket, stacks or [])
        finally:
            for adapter in pinned:
                store.release(adapter)

    def _together(
        self,
        hidden: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        embeds: torch.Tensor,
        bucket: Bucket,
        stacks: Sequence[Stack],
    ) -> torch.Tensor:
        """One forward pass, on every rank at once; all get all velocities."""
        group = self._group
        texts, images = group.shares(embeds.shape[1]), group.shares(hidden.shape[1])
        self._exchange.lengths = [text + image for text, image in zip(texts, images, strict=True)]
        cosine, sine = (
            torch.cat([group.mine(part, 0) for part in table.tensor_split([bucket.text_tokens])])
            for table in rotary_tables(self._model, bucket, hidden.device)
        )
        mine, words = group.mine(hidden, 1), group.mine(embeds, 1)
        shown = mine.shape[1]
        out = self._forward.run(
            mine, timestep, guidance, words, (cosine, sine), shown, stacks=stacks
        )
        return group.whole(out, hidden.shape[1])[:, : bucket.rows * bucket.columns]

    def _stacks(
        self, order: Order, store: AdapterStore, pinned: list[Adapter]
    ) -> list[Stack] | None:
        """The passes' adapters as this rank has them; None if one cannot be had."""
        stacks: list[Stack] = []
        try:
            for names in order.stacks:
                stack = []
                for name, source, digest, scale in names:
                    pinned.append(_fetched(store, name, source, digest))
                    stack.append((pinned[-1], scale))
                stacks.append(tuple(stack))
        except CalotypeError as fault:
            logger.error("rank %d cannot draw along: %s", self._group.rank, fault.message)
            return None
        return stacks

    def _received(self, place: int, shape: tuple[int, ...]) -> torch.Tensor | None:
        if not shape:
            return None
        # The guidance, in its place, is float32 whatever the model's dtype.
        dtype = torch.float32 if place == 2 else self._dtype
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        dist.broadcast(tensor, 0)
        return tensor

    def _all_ready(self, ready: bool) -> None:
        """Before the tensors go out, so that a rank that cannot take part keeps nobody waiting."""
        flag = torch.tensor([int(ready)], device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        if not int(flag):
            raise EngineError("A device of the group could not load an adapter of this request.")


def build_forward(
    components: Components, lora: LoraLayers, compiler: str | None, group: SequenceGroup | None
) -> Forward | ParallelForward:
    """What runs passes through the denoiser: on one device, or on those of a group.

    Raises:
        ModelLoadFailed: the model, the compiler and the group do not go together.
    """
    if group is None:
        return Forward(components.denoiser, lora, compiler)
    if compiler is not None:
        raise ModelLoadFailed(
            "Steps on several devices are not compiled: set devicesPerPicture to 1 or compile to "
            "false.",
            param="compile",
        )
    return ParallelForward(components, lora, group)


def follow(
    components: Components, group: SequenceGroup, orders: Iterable[Order], store: AdapterStore
) -> None:
    """Draws along with rank 0 for as long as there are orders. Blocks.

    Args:
        orders: what rank 0 tells, in its order.
        store: of this rank's own adapters.
    """
    forward = ParallelForward(components, store.layers, group)
    with torch.inference_mode():
        for order in orders:
            try:
                forward.receive(order, store)
            except EngineError:
                continue  # rank 0 knows it, too, and fails the request


def _fetched(store: AdapterStore, name: str, source: str, digest: str) -> Adapter:
    """The same revision of an adapter as on rank 0."""
    store.load(name, source, wait=_ADAPTER_SECONDS)
    adapter = store.acquire(name)
    while adapter is None:
        store.wait_for_change(0.1)
        adapter = store.acquire(name)
    if adapter.digest != digest:
        store.release(adapter)
        raise EngineError(f"{source} is another file here than on rank 0")
    return adapter
