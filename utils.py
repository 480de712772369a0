"""Pictures in and out: batches from a folder, files from tensors. No mathematics of diffusion.

Reading order: numbers; a folder's batches; files.
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from machinery import reading
from machinery.basics import write_whole
from machinery.reading import Dataset

# ---- numbers ---------------------------------------------------------------------------------------------------------


def from_bytes(images: Tensor) -> Tensor:
    """0..255 to [-1, 1], float32; the inverse of `to_bytes`."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to 0..255, uint8, rounded to the nearest level."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- a folder's batches ----------------------------------------------------------------------------------------------


def load_dataset(folder: Path, size: tuple[int, int], mode: str = "auto") -> Dataset:
    """`read_dataset` of all pictures below a folder."""
    return reading.read_dataset(reading.list_images(folder), size, mode)


def on_device(images: np.ndarray, device: torch.device) -> Tensor:
    """A data set as one tensor: on the GPU where it takes less than half of the free memory, else left on the disk."""
    fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return torch.from_numpy(images).to(device if fits else "cpu")


@functools.lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of 0..count - 1 that depends on (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which images step `step` (0, 1, ...) is shown, (batch_size,) int64.

    The orders of all epochs are laid end to end and cut into batches: every image is visited exactly once per epoch,
    and every batch is full.
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []  # sliced first: a whole order may be of a million images
    for epoch in range(start // count, (stop - 1) // count + 1):
        begin = epoch * count
        parts.append(shuffled(count, seed, epoch)[max(0, start - begin) : stop - begin])
    return torch.from_numpy(np.concatenate(parts))


def draw_mirrored(count: int, device: torch.device) -> Tensor:
    """Which of so many images are mirrored, (B,) bool: a coin decides."""
    return torch.rand(count, device=device) < 0.5


def mirror_half(images: Tensor, mirrored: Tensor) -> Tensor:
    """Images (B, C, H, W), turned left to right where `mirrored` (B,) says so."""
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


# ---- files -----------------------------------------------------------------------------------------------------------


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
