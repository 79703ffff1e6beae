"""Devices that torch computes on, tried before anything is loaded for them."""

from __future__ import annotations

import torch
from torch import nn

from petals_core.errors import DeviceError


def check_device(device: torch.device | str, dtype: torch.dtype) -> torch.device:
    """Make sure that the device exists and multiplies matrices and attends in ``dtype``, by doing it once.

    Raises:
        DeviceError: it does not.
    """
    try:
        device = torch.device(device)
        sample = torch.ones(1, 1, 8, 8, dtype=dtype, device=device)
    except (RuntimeError, AssertionError, ValueError):
        raise DeviceError(
            f"there is no device {device} here: use cpu, or check the driver and the torch build"
        ) from None
    try:
        nn.functional.scaled_dot_product_attention(sample, sample @ sample, sample)
        nn.functional.layer_norm(sample, (8,))
    except RuntimeError:
        name = str(dtype).removeprefix("torch.")
        raise DeviceError(f"{device} can't compute in {name} with this torch: use float32 or bfloat16") from None
    return device
