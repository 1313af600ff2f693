"""Pinned host memory, which a GPU copies from and to by itself, counted among the host's own."""

from __future__ import annotations

import functools

import comfy.model_management
import torch

from .skip_connections import HostBuffers


def buffers_for(device: torch.device) -> HostBuffers:
    """Buffers that a device copies from and to."""
    return HostBuffers(pin, functools.partial(unpin, device))


def pin(buffer: torch.Tensor) -> bool:
    """Pin a tensor's memory as it is. False where there is no GPU or no more memory to pin."""
    if not torch.cuda.is_available() or buffer.nbytes == 0:
        return False
    by_host = getattr(comfy.model_management, "pin_memory", None)  # 0.3.64 has none
    if by_host is not None:
        return bool(by_host(buffer))
    return torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1) == 0


def unpin(device: torch.device, buffer: torch.Tensor) -> None:
    """Take that back, once a device's copies that still run are done."""
    torch.cuda.synchronize(device)
    by_host = getattr(comfy.model_management, "unpin_memory", None)
    if by_host is not None:
        by_host(buffer)
    else:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
