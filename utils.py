"""What touches the world: devices, pictures, files. No mathematics of diffusion.

Sections, in reading order: errors; the machine; reading images; writing files.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

# ---- errors ----------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the person at the keyboard can put right; shown as one line, without a traceback, status 2."""


# What decoders of pictures and archives raise when a file is damaged or hostile.
BROKEN_FILE = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, SyntaxError, ArithmeticError)
BROKEN_FILE += (RuntimeError, MemoryError, AssertionError, struct.error, zlib.error, zipfile.BadZipFile)
BROKEN_FILE += (pickle.UnpicklingError, Image.DecompressionBombError, Image.DecompressionBombWarning)


# ---- the machine -----------------------------------------------------------------------------------------------------


def pick_device(text: str) -> torch.device:
    """The device that `--device` names; `auto` is the first there is of: NVIDIA GPU, Apple GPU, CPU."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?", text):  # PyTorch wraps 200 round to -56
        raise UserError(f"--device={text} is not one of: auto, cpu, cuda, cuda:N, mps")
    gpus, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    text = ("cuda" if gpus else "mps" if has_mps else "cpu") if text == "auto" else text
    device = torch.device(text)
    if (device.type == "cuda" and (device.index or 0) >= gpus) or (device.type == "mps" and not has_mps):
        raise UserError(f"--device={text} is not on this machine ({gpus} CUDA devices); --device=cpu works everywhere")
    return device


def keep_memory() -> None:
    """Have the C library keep large blocks for the next step, instead of handing them back page by page.

    On a CPU this saves 8% of a training step (benchmarks/README.md). Other systems than Linux with glibc do as always.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest there may be
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


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


def seed_of(*numbers: int) -> int:
    """One seed mixed of several numbers; PyTorch's CPU generator looks at 32 bits only: mere sums would collide."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def progress_bar(
    total: int, done: int = 0, unit: str = "img", title: str | None = None, budget: float = math.inf
) -> tqdm:
    """A bar with the time left; without a terminal, a plain line at most every 15 seconds and every hundredth.

    The hundredth is of `total`, or of `budget` in seconds if that is given: then nobody knows yet what total comes out.
    """
    title = f"{title}: " if title else None
    bar = functools.partial(tqdm, total=total, initial=done, unit=unit, unit_scale=True, desc=title)
    times = "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    if sys.stderr.isatty():
        return bar(dynamic_ncols=True, bar_format="{desc}{percentage:3.0f}%|{bar}| " + times)
    pace = {"mininterval": 15, "miniters": total / 100}
    if budget < math.inf:
        pace = {"mininterval": max(15, budget / 100), "miniters": 1}
    line = "{desc}{percentage:.0f}% {n_fmt}/{total_fmt} " + times + "\n"
    return bar(delay=15, maxinterval=math.inf, bar_format=line, **pace)


# ---- reading images --------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CACHE = Path("datasets", ".cache")


class Dataset(NamedTuple):
    """A folder of pictures, decoded."""

    images: np.ndarray  # (N, 3, H, W) uint8, mapped into memory from the cache
    fingerprint: str  # of the files' names and sizes: the same on every machine
    remarks: list[str]  # what was skipped or changed, a sentence each


class Listing(NamedTuple):
    """The pictures below a folder, not opened yet."""

    folder: Path
    paths: list[Path]  # in one order on every system
    times: list[int]  # of their last change, nanoseconds
    fingerprint: str  # of their names and sizes: the same on every machine


def list_images(folder: Path) -> Listing:
    """All pictures below a folder; no hidden files, no pipes, no circles of links.

    Raises:
        UserError: there is no such folder, or it holds no images.
    """
    if not folder.is_dir():
        others = ", ".join(sorted(path.name for path in Path("datasets").glob("[!.]*") if path.is_dir())) or "none"
        wrong = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"--dataset={folder} {wrong}; it takes any folder of images (in datasets/ there are: {others})")
    found, visited = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # of two ways, the same one
        found += [Path(place, name) for name in files if not name.startswith(".")]
    images = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not images:
        raise UserError(f"--dataset={folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    images.sort(key=lambda path: path.relative_to(folder).as_posix())
    stats = [path.stat() for path in images]
    files = [(path.relative_to(folder).as_posix(), info.st_size) for path, info in zip(images, stats, strict=True)]
    fingerprint = hashlib.sha256(repr(files).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return Listing(folder, images, [info.st_mtime_ns for info in stats], fingerprint)


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, white where it is transparent.

    Pillow alone turns 16-bit pictures white and floating-point ones black, and shows what transparency hides.
    """
    if picture.mode[0] in "IF":
        levels = np.nan_to_num(np.asarray(picture, dtype=np.float64), posinf=0, neginf=0).clip(min=0)
        whites = (65535,) if ";16" in picture.mode else (1, 255, 65535)
        white = next((white for white in whites if levels.max() <= white), levels.max())
        return Image.fromarray((levels / white * 255).round().astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def read_image(path: Path, size: tuple[int, int]) -> tuple[np.ndarray | None, str]:
    """A picture's shorter side resized with antialiasing, its centre cut out: pixels (3, H, W) uint8, and a remark.

    A file that cannot be read gives None, and the reason.
    """
    height, width = size
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels")
            remark = "animated: the first frame is used" if getattr(picture, "is_animated", False) else ""
            picture.draft("RGB", (2 * max(size), 2 * max(size)))  # a large JPEG is decoded at a half, fourth or eighth
            picture = to_rgb(ImageOps.exif_transpose(picture))
    except BROKEN_FILE as error:
        return None, f"{path.name} ({str(error) or type(error).__name__})"
    if picture.width < width or picture.height < height:
        remark = f"{remark}; enlarged" if remark else "smaller than --img_size: enlarged"
    pixels = np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))  # (H, W, 3)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), remark


def load_dataset(folder: Path, size: tuple[int, int]) -> Dataset:
    """`read_dataset` of all pictures below a folder."""
    return read_dataset(list_images(folder), size)


def read_dataset(listing: Listing, size: tuple[int, int]) -> Dataset:
    """Every readable picture at `size` (height, width): decoded once, then kept as bytes in the cache.

    Raises:
        UserError: more than half of the pictures are unreadable.
    """
    key = repr((listing.fingerprint, listing.times, size, "RGB"))
    cache = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.bytes"
    cache.parent.mkdir(parents=True, exist_ok=True)
    facts_path = cache.with_suffix(".json")  # written last: where it stands, the bytes are complete
    with FileLock(cache.with_suffix(".lock")):  # a second process waits, and finds the work done
        if not facts_path.exists() or not cache.exists():
            facts = decode(listing.paths, size, cache)
            write_whole(facts_path, lambda file: file.write(json.dumps(facts).encode()))
    facts = json.loads(facts_path.read_text())
    images = np.memmap(cache, np.uint8, mode="c", shape=(facts["count"], 3, *size))
    return Dataset(images, listing.fingerprint, facts["remarks"])


def decode(paths: list[Path], size: tuple[int, int], cache: Path) -> dict:
    """Write the readable pictures behind one another into `cache`; tell their number and what was noticed."""
    skipped, noticed = [], {}

    def write(file) -> None:
        with ThreadPoolExecutor() as pool, progress_bar(len(paths), title="reading images") as bar:
            for start in range(0, len(paths), 1024):  # in portions, so that memory stays flat
                for pixels, remark in pool.map(lambda path: read_image(path, size), paths[start : start + 1024]):
                    bar.update()
                    if pixels is None:
                        skipped.append(remark)
                    else:
                        file.write(pixels.tobytes())
                        noticed[remark] = noticed.get(remark, 0) + 1
        if 2 * len(skipped) > len(paths):
            raise UserError(f"{len(skipped)} of {len(paths)} images cannot be read, for instance {skipped[0]}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of Pillow's stands in the remarks
        write_whole(cache, write)
    remarks = [f"{len(skipped):,} unreadable, left out: {', '.join(skipped[:3])}"] if skipped else []
    remarks += [f"{number:,} {remark}" for remark, number in noticed.items() if remark]
    return {"count": len(paths) - len(skipped), "remarks": remarks}


def on_device(images: np.ndarray, device: torch.device) -> Tensor:
    """A data set as one tensor: on the GPU where it takes less than half of the free memory, else left on the disk."""
    fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return torch.from_numpy(images).to(device if fits else "cpu")


@functools.lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of 0..count - 1 that hangs on (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which images step `step` (0, 1, ...) is shown, (batch_size,) int64.

    The orders of all epochs are laid end to end and cut into batches: every image is visited exactly once per epoch,
    and every batch is full.
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    first, last = start // count, (stop - 1) // count
    orders = np.concatenate([shuffled(count, seed, epoch) for epoch in range(first, last + 1)])
    return torch.from_numpy(orders[start - first * count : stop - first * count])


def mirror_half(images: Tensor) -> Tensor:
    """Images (B, C, H, W), each mirrored left to right or not, as a coin decides."""
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(3), images)


# ---- writing files ---------------------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable, keep: Path | None = None) -> None:
    """Have `write(file)` fill a file that appears at `path` whole or not at all, and survives a loss of power.

    The file that was there before is kept at `keep`, if given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(unfinished, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not tell it
        raise
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name != "nt":  # the new name is on disk only once its folder is; Windows sees to that by itself
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def from_bytes(images: Tensor) -> Tensor:
    """0..255 to [-1, 1], float32; the inverse of `to_bytes`."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to 0..255, uint8, rounded to the nearest level."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def tile(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) side by side in a square: (3, rows * H, columns * W)."""
    from torchvision.utils import make_grid  # two seconds to import: not before it is needed

    return make_grid(images, nrow=math.ceil(math.sqrt(len(images))), padding=0)


def save_png(images: Tensor, path: Path, **facts) -> None:
    """Write images (N, 3, H, W) in 0..255 as one PNG, side by side in a square, with `facts` as its text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for name, value in facts.items():
        chunks.add_text(name, str(value))
    picture = Image.fromarray(tile(images).permute(1, 2, 0).numpy())
    write_whole(path, lambda file: picture.save(file, "png", pnginfo=chunks))


def save_gif(frames: list[Tensor], path: Path, comment: str) -> None:
    """Write frames (3, H, W) in 0..255 as a film of 12 frames a second, which rests on its last one and begins anew."""
    first, *others = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    film = {"save_all": True, "append_images": others, "duration": [80] * len(others) + [3000], "loop": 0}
    write_whole(path, lambda file: first.save(file, "gif", comment=comment.encode(), **film))


def claim_folder(folder: Path) -> Path:
    """Make `folder`, or the first of folder_2, folder_3, ... that does not exist: nothing is overwritten."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        free = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        with contextlib.suppress(FileExistsError):
            free.mkdir()
            return free
