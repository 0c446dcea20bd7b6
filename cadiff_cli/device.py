"""The device, precision and memory that torch computes with."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cadiff_cli import machine
from cadiff_cli.errors import CadiffError, UsageError

log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """Choose a device by name; ``auto`` is the GPU if there is one.  Raises ``UsageError``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("no CUDA device is available", "use --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", "use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported", "use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        names = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
        raise UsageError(f"there is no {name}", f"use {', '.join(names)} or cpu")
    return device


def usable_device(name: str) -> tuple[torch.device, str]:
    """Choose a working device; return it and the reason if ``auto`` falls back to the CPU, or "".

    A GPU may be too old for torch's kernels, or another process may own it.  The check uses
    some of the GPU's memory: call this only before using it.  Raises ``UsageError`` if a named
    device does not work.
    """
    device = pick_device(name)
    if device.type == "cpu":
        return device, ""
    try:
        torch.ones(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:
        problem = f"{device} cannot be used: {str(error).strip().splitlines()[0]}"
        if name != "auto":
            raise UsageError(problem, "use --device cpu") from error
        log.warning("%s; the CPU is used instead", problem)
        return torch.device("cpu"), problem
    return device, ""


def precision(device: torch.device) -> torch.dtype:
    """bfloat16 if the processor supports it in hardware, else float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        features = torch.cpu.get_capabilities()
        fast = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Compute matrix products and convolutions in the device's ``precision``."""
    enabled = precision(device) == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def free_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or of the machine."""
    if device.type == "cuda":
        # Torch can reuse its cache, which the driver counts as used.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return machine.free_memory_bytes()


@contextmanager
def enough_memory(remedy: str = "use a smaller --tile, or --device cpu") -> Iterator[None]:
    """Raise a ``CadiffError`` with the remedy if torch cannot allocate memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_short_of_memory(error):
            raise
        raise CadiffError("out of memory", f"close other programs, {remedy}") from error


def is_short_of_memory(error: Exception) -> bool:
    """Whether memory ran out.

    On a CPU, and in some libraries of a GPU, only the text of torch's ``RuntimeError`` shows it.
    """
    texts = ("out of memory", "can't allocate memory")
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(text in str(error) for text in texts)
