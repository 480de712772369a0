"""What computes: the device, its precision, its memory."""

import contextlib
import ctypes
import functools
import re

import torch

from utils import UserError


def pick_device(text: str) -> torch.device:
    """The device that `--device` names; `auto` is the first there is of: NVIDIA GPU, Apple GPU, CPU."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?", text):  # PyTorch wraps 200 round to -56
        raise UserError(f"--device={text} is not one of: auto, cpu, cuda, cuda:N, mps")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # a driver may be too old for its GPU
    has_mps = torch.backends.mps.is_available()
    text = ("cuda" if gpus else "mps" if has_mps else "cpu") if text == "auto" else text
    device = torch.device(text)
    if (device.type == "cuda" and (device.index or 0) >= gpus) or (device.type == "mps" and not has_mps):
        raise UserError(f"--device={text} is not on this machine ({gpus} CUDA devices); --device=cpu works everywhere")
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what went wrong: PyTorch has a type for it on CUDA, and words alone for the rest."""
    words_for_it = "out of memory|allocate memory|not enough memory|STATUS_ALLOC_FAILED|Failed to CUDA [a-z]*alloc"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(re.search(words_for_it, str(error)))


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; an NVIDIA GPU goes on working meanwhile, instead of finishing first what it was given."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def keep_memory() -> None:
    """Have the C library keep large blocks for the next step, instead of handing them back page by page.

    On a CPU this saves 8% of a training step (benchmarks/README.md). Other systems than Linux with glibc do as always.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest there may be
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def images_at_once(device: torch.device, size: tuple[int, int], width: int) -> int:
    """How many images of a size (height, width) to make together: as a CPU's caches like it; on a GPU, in some 5 GB."""
    at_64_pixels = 16 if device.type == "cpu" else 256  # and with a network of width 64
    return max(1, min(at_64_pixels, at_64_pixels * 64**3 // (size[0] * size[1] * width)))


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware itself computes in bfloat16; emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 for the layers that gain from it, where the hardware has it; it needs no loss scaling."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))
