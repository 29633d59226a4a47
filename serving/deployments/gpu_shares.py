"""How the GPUs of one machine are shared out between a generator and its text encoder."""

from __future__ import annotations

from dataclasses import dataclass

from calotype.serving.core.errors import ModelLoadFailed


@dataclass(frozen=True, slots=True)
class GpuShares:
    """GPUs of one replica each, as Ray counts them: whole ones, or a fraction of one."""

    generator: float
    encoder: float


NO_GPUS = GpuShares(0, 0)


def local_shares(device: str, devices: int, present: int) -> GpuShares:
    """The shares on a machine with so many GPUs.

    Args:
        device: of the model: ``auto``, ``cpu`` or ``cuda``.
        devices: that draw each picture together.

    Raises:
        ModelLoadFailed: there are not enough.
    """
    if device == "cpu" or (device == "auto" and not present):
        return NO_GPUS
    if not present:
        raise ModelLoadFailed(
            "spec.device is cuda, but Ray sees no GPU on this machine: write auto or cpu, or look "
            "at what nvidia-smi says.",
            param="device",
        )
    if devices == present == 1:
        # A fraction makes Ray show both actors the same device.
        return GpuShares(0.75, 0.25)
    if devices >= present:
        raise ModelLoadFailed(
            f"acceleration.devicesPerPicture is {devices}, but this machine has {present} "
            f"GPU{'' if present == 1 else 's'}, and the text encoder takes one: write "
            f"{max(1, present - 1)} at most.",
            param="devices_per_picture",
        )
    return GpuShares(devices, 1)
