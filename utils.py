"""Images in and out: a folder's batches, tensors to files. No mathematics of diffusion.

Files are read and decoded by machinery/reading.py; PNG, GIF and grids are written by
machinery/writing.py.

Reading order: pixel values; a folder's batches.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from machinery import devices, processes, reading
from machinery.basics import UserError, seed_of
from machinery.inputs import draws_of, load_inputs
from machinery.listing import list_images
from machinery.reading import Dataset
from machinery.writing import in_rows, save_png

# ---- pixel values --------------------------------------------------------------------------------


def from_bytes(images: Tensor) -> Tensor:
    """0..255 to [-1, 1], float32; the inverse of `to_bytes`.

    Levels of 16 bits, 0..65535, come as int16 of the same bits, since PyTorch's uint16 can do
    little, and leave `to_bytes` as int32.
    """
    if images.dtype == torch.int16:
        return (images.int() & 0xFFFF).float() / 32767.5 - 1
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor, depth: int = 8) -> Tensor:
    """[-1, 1] to 0..255, uint8, rounded to the nearest level; with a depth of 16, 0..65535, int32.

    Raises:
        UserError: a value is infinite or NaN, which would become black or white.
    """
    if not images.isfinite().all():
        raise UserError("the network makes images that are infinite or NaN; none is written")
    if depth == 16:
        return ((images.float() + 1) * 32767.5).round().clamp(0, 65535).int()
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- a folder's batches --------------------------------------------------------------------------

# the axes of images (B, C, H, W) along which chance decides
FLIPS = {"horizontal": (3,), "both": (3, 2), "no": ()}


def load_dataset(folder: Path, size: tuple[int, int], mode: str = "auto") -> Dataset:
    """All images below a folder at `size` (height, width), decoded once and cached."""
    return reading.read_dataset(list_images(folder), size, mode)


@functools.lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of 0..count - 1 that depends on (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The images of step `step` (0, 1, ...): indices (batch_size,) int64.

    The orders of all epochs are laid end to end and cut into batches: every image is visited
    exactly once per epoch, and every batch is full.
    """
    start = step * batch_size
    stop = start + batch_size
    parts = []  # slices of each epoch's order: a whole one may be of a million images
    for epoch in range(start // count, (stop - 1) // count + 1):
        first = epoch * count
        parts.append(shuffled(count, seed, epoch)[max(0, start - first) : stop - first])
    return torch.from_numpy(np.concatenate(parts))


def crop(images: Tensor, shape: tuple[int, int, int], chances: Tensor) -> Tensor:
    """Parts of `shape` (C, H, W) of larger images (B, C, h, w): (B, C, H, W).

    Where they begin, `chances` (B, 2) in [0, 1) say: all places are equally likely.
    """
    windows = images.unfold(2, shape[1], 1).unfold(3, shape[2], 1)  # (B, C, tops, lefts, H, W)
    top = (chances[:, 0] * windows.shape[2]).long()  # (B,)
    left = (chances[:, 1] * windows.shape[3]).long()
    return windows[torch.arange(len(images), device=images.device), :, top, left]


class Loader:
    """The batches of a training. The order of the images depends on (seed, step) alone.

    Flips and crops are drawn from PyTorch's generator, which `Training` seeds for every step.

    Args:
        data: the images; kept on the GPU where they take less than half of its free memory,
            else left on the disk and read as they are needed. `data.learned` are drawn.
        batch_size: images per step, of all processes together; at most all there are.
        seed: of the order.
        flip: one of FLIPS.
        device: where batches go.

    Raises:
        UserError: some process would have no image.
    """

    def __init__(self, data: Dataset, batch_size: int, seed: int, flip: str, device: torch.device):
        arrays = [array for array in (data.images, data.partners) if array is not None]
        self.images, *self.partners = devices.keep(arrays, device)  # (N, C, H, W), (N, C_in, H, W)
        self.inputs = data.inputs
        self.labels = torch.from_numpy(data.labels).to(self.images.device)  # (N,)
        learned = np.arange(len(self.images)) if data.learned is None else data.learned
        self.learned = torch.from_numpy(learned)  # (count,) indices
        self.count = len(learned)
        self.shape = (self.images.shape[1], *(data.size or self.images.shape[2:]))  # (C, H, W)
        self.batch_size = min(batch_size, self.count)
        if self.batch_size < processes.count():
            few = f"{self.batch_size} images a step, of {self.count:,}"
            raise UserError(f"{few}, are too few for {processes.count()} processes")
        self.seed = seed
        self.flip = flip
        self.is_cropped = self.images.shape[1:] != self.shape
        self.device = device

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Step `step` (0, 1, ...): which images it is given (B,), and chances; see `load`."""
        indices = self.learned[batch_indices(self.count, self.batch_size, step, self.seed)]
        return devices.send(indices, self.images.device), self.draw_chances(self.batch_size)

    def draw_chances(self, count: int) -> Tensor:
        """Numbers in [0, 1) for so many images: (count, n); what they decide, see `load`."""
        # the first is for the flip, also where nothing is flipped
        draws = max(1, len(FLIPS[self.flip])) + 2 * self.is_cropped + draws_of(self.inputs)
        return torch.rand(draws, count, device=self.device).T

    def load(self, indices: Tensor, chances: Tensor, partners: list | None = None) -> Tensor:
        """Images by index (B,): (B, C, H, W) in [-1, 1].

        Args:
            chances: (B, n). The first decides on the flip left to right, which comes below 0.5, the
                second on that top to bottom, the next two on the part that is cropped; so images
                with 0.5 throughout are not flipped, and cropped in the middle. The rest is for
                inputs, see `load_inputs`.
            partners: one array of inputs (N, C_in, h, w), to take instead of the images.
        """
        where = chances[:, max(1, len(FLIPS[self.flip])) :]
        images = devices.send((partners or [self.images])[0][indices], self.device)
        x_0 = from_bytes(crop(images, self.shape, where) if self.is_cropped else images)
        for draw, axis in enumerate(FLIPS[self.flip]):
            x_0 = torch.where(chances[:, draw].view(-1, 1, 1, 1) < 0.5, x_0.flip(axis), x_0)
        return x_0

    def save_examples(self, path: Path) -> None:
        """Write the first 64 images of the first epoch, flipped and cropped; inputs above them."""
        torch.manual_seed(seed_of(self.seed, 0))
        indices = self.learned[shuffled(self.count, self.seed, epoch=0)[:64]]
        chances = self.draw_chances(len(indices))
        examples = self.load(indices, chances)
        rows = [load_inputs(self, indices, chances, examples), examples]
        rows = [to_bytes(row).cpu() for row in rows if row is not None]
        save_png(in_rows(rows) if self.inputs else rows[0], path)
