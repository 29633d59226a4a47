"""How many images should share a step: measured on the machine, kept in a file.

Sharing pays where a step of one image leaves the device idle: small images, small models, CPUs.
FLUX.2 [dev] at 1024x1024 keeps a GPU busy alone, and sharing would only make everybody wait. So
`measure_profile` runs the model's own steps and writes what it found; `Engine` reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import ImageSize
from calotype.serving.engine.execution.forward import Forward
from calotype.serving.engine.execution.step_runner import is_out_of_memory
from calotype.serving.engine.model.components import Components
from calotype.serving.engine.model.decoder import pixels_per_token
from calotype.serving.engine.scheduling.scheduler import Bucket

WORTH = 1.05
"""More images share a step as long as images per second rise by this factor at least."""

_ROUNDS = range(3, 20)
"""How often a step is timed: more often the shorter it is."""

_ENOUGH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class StepTime:
    """Attributes:
    tokens: that one pass of an image puts through the denoiser.
    rows: passes that shared the step.
    seconds: of the step, the median of some.
    """

    tokens: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured, and where.

    Attributes:
        machine: what the figures hold for: model, precision, device, threads and torch's version.
    """

    machine: dict[str, str]
    times: tuple[StepTime, ...]

    def rows(self, tokens: int) -> int:
        """Passes that should share a step of images of so many tokens.

        The answer of the nearest measured size, in ratio.
        """
        if not self.times:
            return 1
        nearest = min(
            {t.tokens for t in self.times}, key=lambda n: max(n, tokens) / max(1, min(n, tokens))
        )
        measured = sorted((t for t in self.times if t.tokens == nearest), key=lambda t: t.rows)
        best = measured[0]
        for step in measured[1:]:
            if step.rows / step.seconds >= WORTH * best.rows / best.seconds:
                best = step
        return best.rows

    @property
    def most_rows(self) -> int:
        """Passes that should share a step of the size for which that is most worth it."""
        return max((self.rows(time.tokens) for time in self.times), default=1)

    def bucket_rows(self, bucket: Bucket) -> int:
        return self.rows(bucket.tokens)

    def save(self, path: pathlib.Path) -> None:
        """Writes the profile; whole or not at all."""
        content = {"machine": self.machine, "times": [asdict(t) for t in self.times]}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        whole.replace(path)

    @classmethod
    def load(cls, path: pathlib.Path) -> Profile:
        """Reads a profile.

        Raises:
            InvalidRequest: the file is missing or damaged; the sentence says how to make it.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            times = tuple(
                StepTime(int(t["tokens"]), int(t["rows"]), float(t["seconds"]))
                for t in content["times"]
            )
            if not times or any(min(t.tokens, t.rows, t.seconds) <= 0 for t in times):
                raise ValueError("it holds no times above 0")
            return cls({str(k): str(v) for k, v in content["machine"].items()}, times)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
            raise InvalidRequest(
                f"{path} is no profile of a machine ({fault}); make one with `calotype profile`.",
                param=str(path),
            ) from fault

    @classmethod
    def find(cls, data_folder: pathlib.Path, components: Components) -> Profile | None:
        """The profile of a model on this machine, if there is one in a data folder.

        One that was made with another device, precision or version of torch does not count.
        """
        path = profile_path(data_folder, components)
        with contextlib.suppress(InvalidRequest):
            found = cls.load(path)
            if found.machine == describe_machine(components):
                return found
        return None

    def lines(self) -> list[str]:
        """The profile as a table."""
        out = [f"{key}: {value}" for key, value in self.machine.items()]
        out += ["", f"{'tokens':>8}{'rows':>6}{'s a step':>12}{'pictures x steps / s':>22}"]
        for tokens in sorted({t.tokens for t in self.times}):
            for t in (t for t in self.times if t.tokens == tokens):
                chosen = " <- chosen" if t.rows == self.rows(tokens) else ""
                rate = t.rows / t.seconds
                out.append(f"{t.tokens:>8}{t.rows:>6}{t.seconds:>12.4f}{rate:>22.2f}{chosen}")
        return out


def profile_path(data_folder: pathlib.Path, components: Components) -> pathlib.Path:
    """Where a model's profile lies in a data folder."""
    model = f"{components.folder.name}-{components.fingerprint[:12]}"
    name = f"{model}-{components.precision}-{components.device.type}.json"
    return data_folder / "profiles" / name


def describe_machine(components: Components) -> dict[str, str]:
    """What a profile depends on."""
    device = components.device
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "model": f"{components.folder.name} {components.fingerprint[:12]}",
        "precision": components.precision,
        "device": chip,
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "-",
        "torch": torch.__version__,
    }


def measure_profile(
    components: Components,
    sizes: Iterable[ImageSize],
    *,
    rows: Sequence[int] = (1, 2, 4, 8),
    on_time: Callable[[StepTime], None] | None = None,
) -> Profile:
    """Times the denoiser at every size with every number of rows that fits into memory.

    Args:
        on_time: told each measurement as it comes.
    """
    side = pixels_per_token(components.vae)
    text = components.settings.max_sequence_length
    times: list[StepTime] = []
    for size in sizes:
        bucket = Bucket(max(1, size.height // side), max(1, size.width // side), text)
        for count in sorted(rows):
            try:
                seconds = _time_step(components, bucket, count)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                break
            times.append(StepTime(bucket.tokens, count, seconds))
            if on_time is not None:
                on_time(times[-1])
    return Profile(describe_machine(components), tuple(times))


def make_profile(
    components: Components,
    data_folder: pathlib.Path,
    sizes: Iterable[ImageSize],
    *,
    rows: Sequence[int] = (1, 2, 4, 8),
    on_time: Callable[[StepTime], None] | None = None,
) -> tuple[Profile, pathlib.Path]:
    """Measures a model and keeps the profile in a data folder; returns its path, too."""
    profile = measure_profile(components, sizes, rows=rows, on_time=on_time)
    path = profile_path(data_folder, components)
    profile.save(path)
    return profile, path


@torch.inference_mode()
def _time_step(components: Components, bucket: Bucket, rows: int) -> float:
    """Seconds of one denoiser step; zeros cost what images cost."""
    config = components.denoiser.config
    like = torch.zeros((), device=components.device, dtype=components.dtype)
    hidden = like.new_zeros(rows, bucket.rows * bucket.columns, config.in_channels)
    embeds = like.new_zeros(rows, bucket.text_tokens, config.joint_attention_dim)
    timestep = like.new_full((rows,), 0.5)
    guidance = (
        torch.full((rows,), 4.0, device=components.device) if config.guidance_embeds else None
    )
    forward = Forward(components.denoiser)
    times: list[float] = []
    for turn in range(_ROUNDS.stop):
        started = time.perf_counter()
        forward(hidden, timestep, guidance, embeds, bucket)
        if components.device.type == "cuda":
            torch.cuda.synchronize(components.device)
        if turn:  # the first one warms up
            times.append(time.perf_counter() - started)
        if len(times) >= _ROUNDS.start and sum(times) > _ENOUGH_SECONDS:
            break
    return statistics.median(times)


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
