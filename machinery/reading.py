"""A folder of pictures, found, and decoded once.

Reading order: list_images; how one picture is read; who reads them all; read_dataset.
"""

import contextlib
import gc
import hashlib
import json
import math
import multiprocessing
import os
import signal
import stat
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor

from machinery.basics import BROKEN_FILE, UserError, progress_bar, write_whole

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MODES = {"auto": "L or RGB", "L": "gray", "RGB": "color", "RGBA": "color and alpha"}
CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
CACHE = Path("datasets", ".cache")
NOTE_EVERY = 5  # seconds; so much is decoded again after a kill -9
# pictures; threads have read fewer before processes have imported PyTorch
PROCESSES_FROM = 10_000
# what a process reads before it hands it over, at most
PORTION = 64  # pictures
PORTION_BYTES = 2**22


class Listing(NamedTuple):
    """The pictures below a folder, not opened yet."""

    folder: Path
    paths: list[str]  # in one order on every system
    times: list[int]  # of their last change, nanoseconds
    fingerprint: str  # of their names and sizes: the same on every machine
    classes: tuple[str, ...]  # the first-level folders that hold pictures, sorted
    # (N,) int64, each picture's index in `classes`; -1 where it lies in the folder itself
    labels: np.ndarray


class Dataset(NamedTuple):
    """A folder of pictures, decoded."""

    images: (
        np.ndarray
    )  # (N, C, H, W) uint8, mapped into memory from the cache; RGBA is premultiplied
    fingerprint: str  # of the files' names and sizes: the same on every machine
    remarks: list[str]  # what was skipped or changed, a sentence each
    mode: str  # one of CHANNELS
    labels: np.ndarray  # (N,) int64, as in Listing


# ---- finding pictures ----------------------------------------------------------------------------


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Python looks for dead circles of objects as more are made: a fifth of the time that a million
    names take.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@no_collections()
def list_images(folder: Path) -> Listing:
    """All pictures below a folder; no hidden files, no pipes, no circles of links.

    Raises:
        UserError: there is no such folder, or it holds no images.
    """
    if not folder.is_dir():
        others = (
            ", ".join(sorted(path.name for path in Path("datasets").glob("[!.]*") if path.is_dir()))
            or "none"
        )
        wrong = "is a file" if folder.exists() else "does not exist"
        rule = f"it takes any folder of images (in datasets/ there are: {others})"
        raise UserError(f"--dataset={folder} {wrong}; {rule}")
    found = []
    visited = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        # of two ways, the same one
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = "" if place == str(folder) else f"{Path(place).relative_to(folder).as_posix()}/"
        top = below.partition("/")[0]
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".":
                try:
                    info = os.stat(f"{place}/{name}")
                except OSError:  # a link to nothing
                    continue
                if stat.S_ISREG(info.st_mode):
                    found.append((below + name, info.st_size, info.st_mtime_ns, top))
    if not found:
        raise UserError(f"--dataset={folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    found.sort()
    names, sizes, times, tops = zip(*found, strict=True)
    files = list(zip(names, sizes, strict=True))
    fingerprint = hashlib.sha256(repr(files).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    classes = tuple(sorted({*tops} - {""}))
    numbers = {"": -1} | {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[top] for top in tops], np.int64)
    return Listing(
        folder, [f"{folder}/{name}" for name in names], list(times), fingerprint, classes, labels
    )


def tell_classes(listing: Listing, conditional: bool) -> list[str]:
    """A sentence on the classes there are, whether they are to be learned or not."""
    if len(listing.classes) < 2:
        return []
    known = f"{len(listing.classes):,} classes, such as {', '.join(listing.classes[:3])}"
    return [known if conditional else f"{known}; --conditional would tell them apart"]


def check_classes(listing: Listing) -> tuple[str, ...]:
    """The classes of `--conditional`: the first-level folders, if they can be.

    Raises:
        UserError: they are fewer than two, cannot be written in `--label=a,b`, or pictures lie
            outside of them.
    """
    folder = listing.folder
    classes = listing.classes
    outside = np.flatnonzero(listing.labels == -1)
    if len(classes) < 2:
        found = f"only {classes[0]} holds" if classes else "none holds"
        fault = f"--conditional takes the folders in {folder} for classes, but {found} images"
        raise UserError(f"{fault}; it needs two")
    if len(outside):
        example = listing.paths[outside[0]]
        fault = f"{len(outside):,} images are in no class, for instance {example}"
        way_out = f"move them into one of the folders in {folder}"
        raise UserError(f"--conditional: {fault}; {way_out}")
    for name in classes:
        if "," in name or name == "all" or not name.isprintable():
            fault = f"the folder {folder / name} cannot be written as --label={name}"
            raise UserError(f"--conditional: {fault}; rename it")
    return classes


# ---- reading one picture -------------------------------------------------------------------------


def to_mode(picture: Image.Image, mode: str) -> Image.Image:
    """A picture of any kind in 8 bits: "L" or "RGB", white where it is transparent, or for "RGBA"
    Pillow's "RGBa".

    There, colors are premultiplied by alpha, so that resizing mixes in no color that cannot be
    seen. Pillow alone turns 16-bit pictures white and floating-point ones black, and shows what
    transparency hides.
    """
    if picture.mode[0] in "IF":
        levels = np.nan_to_num(np.asarray(picture, dtype=np.float64), posinf=0, neginf=0).clip(
            min=0
        )
        whites = (65535,) if ";16" in picture.mode else (1, 255, 65535)
        white = next((white for white in whites if levels.max() <= white), levels.max())
        picture = Image.fromarray((levels / white * 255).round().astype(np.uint8))
    if mode == "RGBA":
        return picture.convert("RGBA").convert("RGBa")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)


def read_image(
    path: Path | str,
    size: tuple[int, int],
    mode: str = "RGB",
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> tuple[np.ndarray | None, str]:
    """A picture's shorter side resized with antialiasing, its centre cut out: pixels (C, H, W)
    uint8, and a remark.

    A file that cannot be read gives None, and the reason.
    """
    height, width = size
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels")
            remark = (
                "animated: the first frame is used"
                if getattr(picture, "is_animated", False)
                else ""
            )
            # a large JPEG is decoded at a half, fourth or eighth
            picture.draft("RGB", (2 * max(size), 2 * max(size)))
            picture = to_mode(ImageOps.exif_transpose(picture), mode)
    except BROKEN_FILE as error:
        return None, f"{Path(path).name} ({str(error) or type(error).__name__})"
    if picture.width < width or picture.height < height:
        remark = f"{remark}; enlarged" if remark else "smaller than --img_size: enlarged"
    pixels = np.asarray(ImageOps.fit(picture, (width, height), resample)).reshape(
        height, width, -1
    )  # (H, W, C)
    if mode == "RGBA":
        # Lanczos overshoots; no color shines brighter than its alpha
        pixels = np.minimum(pixels, pixels[:, :, 3:])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), remark


class Start(NamedTuple):
    """What image-to-image and inpainting start from, instead of noise."""

    image: Tensor  # (C, H, W) uint8
    mask: Tensor  # (1, H, W) in [0, 1]: 1 = repaint; 0 = keep, so that it comes out as it went in


def read_start(init_image: str, mask: str, size: tuple[int, int], mode: str) -> Start | None:
    """The image and the mask that sampling starts from; None if no image is named.

    Args:
        init_image, mask: paths; without a mask, everything is repainted.
        size: height and width; both are resized and cropped to it, as a data set is.
        mode: one of CHANNELS.

    Raises:
        UserError: a file is missing or unreadable, or the two differ in size, so that they would
            be cropped differently.
    """
    if mask and not init_image:
        raise UserError(f"--mask={mask} needs an image to inpaint: --init_image=...")
    if not init_image:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of Pillow's is an error here
        image = read_flag("init_image", init_image, size, mode)
        if not mask:
            return Start(image, torch.ones(1, *size))
        # BOX averages areas: no ringing reaches into what is black
        share = read_flag("mask", mask, size, "L", Image.Resampling.BOX) / 255
        sizes = [measure(path) for path in (mask, init_image)]
    if sizes[0] != sizes[1]:
        differ = f"--mask={mask} is {sizes[0]}, --init_image={init_image} {sizes[1]}"
        raise UserError(f"{differ}; they must have the same size")
    return Start(image, share)


def read_flag(flag: str, path: str, *how) -> Tensor:
    """The image that a flag names: pixels (C, H, W) uint8; see `read_image`."""
    if not os.path.isfile(path):
        raise UserError(f"--{flag}={path} is not a file; it takes an image")
    pixels, reason = read_image(path, *how)
    if pixels is None:
        fault = f"--{flag}={path} is not an image that can be read ({reason})"
        raise UserError(f"{fault}; it takes any other")
    return torch.from_numpy(pixels)


def measure(path: str) -> str:
    """An image's size, upright, in words."""
    with Image.open(path) as picture:
        width, height = ImageOps.exif_transpose(picture).size
    return f"{width} pixels wide and {height} high"


# ---- reading them all ----------------------------------------------------------------------------

stopping = threading.Event()  # in a reading process, that of its parent


def begin_worker(stop) -> None:
    """Tie a reading process to its parent: it stops when told to, and ends when that has died, be
    it of kill -9.
    """

    global stopping
    stopping = stop

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    # for Windows; elsewhere it has been deaf from its start
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # what matters of Pillow's stands in the remarks
    threading.Thread(target=follow, daemon=True).start()


def read_portion(
    paths: list[str], size: tuple[int, int], mode: str
) -> list[tuple[np.ndarray | None, str]]:
    return [read_image(path, size, mode) for path in paths if not stopping.is_set()]


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes started within this block never see Ctrl-C, not even as they start; this one sees
    it afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def readers(number: int, pictures: int) -> Iterator[Executor]:
    """Threads, or for many pictures `number` processes; on leaving, what they have not begun is
    dropped.
    """
    if pictures < PROCESSES_FROM:
        pool = ThreadPoolExecutor()
        stop = threading.Event()
    else:
        # a fork would copy locks that PyTorch's threads may hold
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        pool = ProcessPoolExecutor(number, context, begin_worker, (stop,))
    try:
        yield pool
    finally:
        # terminated, a process could leave half a message behind, whose other half would be waited
        # for
        stop.set()
        pool.shutdown(cancel_futures=True)


def read_all(
    paths: list[str], size: tuple[int, int], mode: str
) -> Iterator[list[tuple[np.ndarray | None, str]]]:
    """`read_image` of all of them, in their order, portion by portion; few portions are in memory
    at a time.

    Raises:
        UserError: a process has died.
    """
    number = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    number = min(61, number)  # Windows cannot wait for more
    by_bytes = max(1, PORTION_BYTES // (CHANNELS[mode] * math.prod(size)))
    length = 1 if len(paths) < PROCESSES_FROM else min(PORTION, by_bytes)
    done = 0
    pending = deque()
    try:
        with readers(number, len(paths)) as pool:
            for start in range(0, len(paths), length):
                with deaf_to_interrupts():
                    pending.append(
                        pool.submit(read_portion, paths[start : start + length], size, mode)
                    )
                if len(pending) > 2 * number:
                    yield pending.popleft().result()
                    done += length
            while pending:
                yield pending.popleft().result()
                done += length
    except BrokenProcessPool as error:
        where = f"at {paths[done]} or soon after, perhaps for lack of memory"
        way_on = "the same command goes on from there"
        raise UserError(f"a process that reads images died {where}; {way_on}") from error


# ---- the data set --------------------------------------------------------------------------------


def read_dataset(listing: Listing, size: tuple[int, int], mode: str = "auto") -> Dataset:
    """Every readable picture at `size` (height, width), in one of MODES: decoded once, then kept in
    the cache.

    Raises:
        UserError: more than half of the pictures are unreadable.
    """
    stored = "RGB" if mode == "auto" else mode
    key = repr((stored, size, listing.fingerprint, listing.times))
    cache = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.bytes"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_suffix(".lock")):  # a second process waits, and finds the work done
        facts = decode(listing.paths, size, stored, cache)
        skipped = facts["skipped"]
        examples = facts["examples"]
        count = len(listing.paths)
        if 2 * len(skipped) > count:
            for path in (cache, cache.with_suffix(".json")):
                path.unlink(missing_ok=True)
            raise UserError(
                f"{len(skipped)} of {count} images cannot be read, for instance {examples[0]}"
            )
    images = np.memmap(cache, np.uint8, mode="c", shape=(facts["count"], CHANNELS[stored], *size))
    if mode == "auto" and facts["is_gray"]:
        stored, images = "L", images[:, :1]
    remarks = [f"{len(skipped):,} unreadable, left out: {', '.join(examples)}"] if skipped else []
    remarks += [f"{number:,} {remark}" for remark, number in facts["noticed"].items()]
    return Dataset(images, listing.fingerprint, remarks, stored, np.delete(listing.labels, skipped))


def known_facts(cache: Path, bytes_each: int) -> dict:
    """What was noted of the pictures that stand in a cache, all or the first ones; of none, if it
    holds too few.
    """
    facts = {"seen": 0, "count": 0, "skipped": [], "examples": [], "noticed": {}, "is_gray": True}
    with contextlib.suppress(*BROKEN_FILE):
        noted = json.loads(cache.with_suffix(".json").read_text())
        if noted.keys() == facts.keys() and cache.stat().st_size >= noted["count"] * bytes_each:
            return noted
    return facts


def decode(paths: list[str], size: tuple[int, int], mode: str, cache: Path) -> dict:
    """Write the readable pictures behind one another into `cache`, and what was noticed into a note
    beside it.

    The note follows the pictures: it is true at any moment. So an interrupted decoding goes on
    where it was, and is whole only when the note has `seen` all of the pictures.
    """
    bytes_each = CHANNELS[mode] * math.prod(size)
    note = cache.with_suffix(".json")
    facts = known_facts(cache, bytes_each)
    if facts["seen"] == len(paths):
        return facts
    if not facts["seen"]:
        cache.unlink(missing_ok=True)  # a process that has this one in its memory keeps it
    with (
        warnings.catch_warnings(),
        open(cache, "ab") as file,
        progress_bar(len(paths), facts["seen"], title="reading images") as bar,
        contextlib.closing(read_all(paths[facts["seen"] :], size, mode)) as portions,
    ):
        warnings.simplefilter("ignore")  # what matters of Pillow's stands in the remarks
        file.truncate(facts["count"] * bytes_each)
        noted_at = time.monotonic()
        for portion in portions:
            for pixels, remark in portion:
                if pixels is None:
                    facts["skipped"].append(facts["seen"])
                    facts["examples"] = [*facts["examples"], remark][:3]
                else:
                    file.write(pixels)
                    facts["count"] += 1
                    if facts["is_gray"]:
                        facts["is_gray"] = bool((pixels == pixels[0]).all())
                    if remark:
                        facts["noticed"][remark] = facts["noticed"].get(remark, 0) + 1
                facts["seen"] += 1
            bar.update(len(portion))
            if facts["seen"] == len(paths) or time.monotonic() - noted_at >= NOTE_EVERY:
                file.flush()
                os.fsync(file.fileno())  # before the note that tells of it
                write_whole(note, lambda file: file.write(json.dumps(facts).encode()))
                noted_at = time.monotonic()
    return facts
