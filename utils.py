"""What all parts share: errors, seeds, progress, and files that are written whole. No mathematics of diffusion.

Reading order: errors; seeds and progress; writing files, images above all.
"""

import contextlib
import functools
import itertools
import math
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

# ---- errors ----------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the person at the keyboard can put right; shown as one line, without a traceback, status 2."""


# What decoders of pictures and archives raise when a file is damaged or hostile.
BROKEN_FILE = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, SyntaxError, ArithmeticError)
BROKEN_FILE += (RuntimeError, MemoryError, AssertionError, struct.error, zlib.error, zipfile.BadZipFile)
BROKEN_FILE += (pickle.UnpicklingError, Image.DecompressionBombError, Image.DecompressionBombWarning)


# ---- seeds and progress ----------------------------------------------------------------------------------------------


def seed_of(*numbers: int) -> int:
    """One seed of several numbers; a last 0 changes nothing. PyTorch's CPU generator sees 32 bits: sums collide."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def progress_bar(
    total: int, done: int = 0, unit: str = "img", title: str | None = None, budget: float = math.inf
) -> tqdm:
    """A bar with the time left; without a terminal, a plain line at most every 15 seconds and every hundredth.

    The hundredth is of `total`, or of `budget` in seconds if that is given: then nobody knows yet what total comes out.
    """
    title, is_another = f"{title}: " if title else None, int(os.environ.get("LOCAL_RANK", 0)) > 0  # torchrun's
    bar = functools.partial(tqdm, total=total, initial=done, unit=unit, unit_scale=True, desc=title, disable=is_another)
    times = "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    if sys.stderr.isatty():
        return bar(dynamic_ncols=True, bar_format="{desc}{percentage:3.0f}%|{bar}| " + times)
    pace = {"mininterval": 15, "miniters": total / 100}
    if budget < math.inf:
        pace = {"mininterval": max(15, budget / 100), "miniters": 1}
    line = "{desc}{percentage:.0f}% {n_fmt}/{total_fmt} " + times + "\n"
    return bar(delay=15, maxinterval=math.inf, bar_format=line, **pace)


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


def over_white(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in 0..255 as RGB (N, 3, H, W): gray ones too, and white where they are transparent.

    Four channels are colours times alpha, and alpha.
    """
    if images.shape[1] == 4:
        colours, alpha = images[:, :3], images[:, 3:]
        return torch.minimum(colours, alpha) + (255 - alpha)
    return images.expand(-1, 3, -1, -1)


def tile(images: Tensor, rows: int = 0) -> Tensor:
    """Images (N, C, H, W) in 0..255 side by side in a square: (3, rows * H, columns * W).

    With `rows`, image i stands in row i % rows: classes that take turns have a row each, if all of them are there.
    """
    from torchvision.utils import make_grid  # two seconds to import: not before it is needed

    has_rows = 1 < rows <= len(images)
    images, columns = over_white(images), math.ceil(len(images) / rows if has_rows else math.sqrt(len(images)))
    if has_rows:
        blank = images.new_full((rows * columns - len(images), *images.shape[1:]), 255)
        images = torch.cat([images, blank]).unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)
    return make_grid(images, nrow=columns, padding=0)


def to_picture(image: Tensor) -> Image.Image:
    """An image (C, H, W) in 0..255 as Pillow's: gray, RGB, or, of colours times alpha and alpha, RGBA."""
    mode, pixels = {1: "L", 3: "RGB", 4: "RGBa"}[len(image)], image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.frombytes(mode, (image.shape[2], image.shape[1]), pixels.tobytes())
    return picture.convert("RGBA") if mode == "RGBa" else picture


def save_png(images: Tensor, path: Path, rows: int = 0, **facts) -> None:
    """Write images (N, C, H, W) in 0..255 as one PNG, side by side as in `tile`, with `facts` as its text chunks.

    A single one keeps its mode.
    """
    chunks = PngImagePlugin.PngInfo()
    for name, value in facts.items():
        chunks.add_text(name, str(value))
    picture = to_picture(tile(images, rows) if len(images) > 1 else images[0])
    write_whole(path, lambda file: picture.save(file, "png", pnginfo=chunks))


def save_gif(frames: list[Tensor], path: Path, comment: str) -> None:
    """Write frames (3, H, W) in 0..255 as a film of 12 frames a second, which rests on its last one and begins anew."""
    first, *others = map(to_picture, frames)
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
