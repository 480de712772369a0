"""From a folder of pictures to a batch: found, decoded once, shuffled.

Reading order: list_images; how one picture is read; read_dataset; the order of the batches.
"""

import functools
import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor

from utils import BROKEN_FILE, UserError, progress_bar, write_whole

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
