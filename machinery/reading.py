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
MODES = {"auto": "L or RGB", "L": "gray", "RGB": "colour", "RGBA": "colour and alpha"}
CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
CACHE = Path("datasets", ".cache")
NOTE_EVERY = 5  # seconds; so much is decoded again after a kill -9
PROCESSES_FROM = 10_000  # pictures; threads have read fewer before the processes have imported PyTorch
PORTION, PORTION_BYTES = 64, 2**22  # what a process reads before it hands it over: pictures and bytes, at most


class Listing(NamedTuple):
    """The pictures below a folder, not opened yet."""

    folder: Path
    paths: list[str]  # in one order on every system
    times: list[int]  # of their last change, nanoseconds
    fingerprint: str  # of their names and sizes: the same on every machine
    classes: tuple[str, ...]  # the first-level folders that hold pictures, sorted
    labels: np.ndarray  # (N,) int64, each picture's index in `classes`; -1 where it lies in the folder itself


class Dataset(NamedTuple):
    """A folder of pictures, decoded."""

    images: np.ndarray  # (N, C, H, W) uint8, mapped into memory from the cache; RGBA is premultiplied
    fingerprint: str  # of the files' names and sizes: the same on every machine
    remarks: list[str]  # what was skipped or changed, a sentence each
    mode: str  # one of CHANNELS
    labels: np.ndarray  # (N,) int64, as in Listing


# ---- finding pictures ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Python looks for dead circles of objects as more are made: a fifth of the time that a million names take."""
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
        others = ", ".join(sorted(path.name for path in Path("datasets").glob("[!.]*") if path.is_dir())) or "none"
        wrong = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"--dataset={folder} {wrong}; it takes any folder of images (in datasets/ there are: {others})")
    found, visited = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # of two ways, the same one
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
    return Listing(folder, [f"{folder}/{name}" for name in names], list(times), fingerprint, classes, labels)


def tell_classes(listing: Listing, conditional: bool) -> list[str]:
    """A sentence on the classes there are, whether they are to be learnt or not."""
    if len(listing.classes) < 2:
        return []
    known = f"{len(listing.classes):,} classes, such as {', '.join(listing.classes[:3])}"
    return [known if conditional else f"{known}; --conditional would tell them apart"]


def check_classes(listing: Listing) -> None:
    """Refuse a folder whose first-level folders cannot be the classes of `--conditional`.

    Raises:
        UserError: they are fewer than two, cannot be written in `--label=a,b`, or pictures lie outside of them.
    """
    folder, classes = listing.folder, listing.classes
    outside = np.flatnonzero(listing.labels == -1)
    if len(classes) < 2:
        found = f"only {classes[0]} holds" if classes else "none holds"
        raise UserError(f"--conditional takes the folders in {folder} for classes, but {found} images; it needs two")
    if len(outside):
        example = listing.paths[outside[0]]
        raise UserError(
            f"--conditional: {len(outside):,} images are in no class, for instance {example}; "
            f"move them into one of the folders in {folder}"
        )
    for name in classes:
        if "," in name or name == "all" or not name.isprintable():
            raise UserError(f"--conditional: the folder {folder / name} cannot be written as --label={name}; rename it")


# ---- reading one picture ---------------------------------------------------------------------------------------------


def to_mode(picture: Image.Image, mode: str) -> Image.Image:
    """A picture of any kind in 8 bits: "L" or "RGB", white where it is transparent, or for "RGBA" Pillow's "RGBa".

    There, colours are premultiplied by alpha, so that resizing mixes in no colour that cannot be seen. Pillow alone
    turns 16-bit pictures white and floating-point ones black, and shows what transparency hides.
    """
    if picture.mode[0] in "IF":
        levels = np.nan_to_num(np.asarray(picture, dtype=np.float64), posinf=0, neginf=0).clip(min=0)
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
    path: Path | str, size: tuple[int, int], mode: str = "RGB", resample: Image.Resampling = Image.Resampling.LANCZOS
) -> tuple[np.ndarray | None, str]:
    """A picture's shorter side resized with antialiasing, its centre cut out: pixels (C, H, W) uint8, and a remark.

    A file that cannot be read gives None, and the reason.
    """
    height, width = size
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels")
            remark = "animated: the first frame is used" if getattr(picture, "is_animated", False) else ""
            picture.draft("RGB", (2 * max(size), 2 * max(size)))  # a large JPEG is decoded at a half, fourth or eighth
            picture = to_mode(ImageOps.exif_transpose(picture), mode)
    except BROKEN_FILE as error:
        return None, f"{Path(path).name} ({str(error) or type(error).__name__})"
    if picture.width < width or picture.height < height:
        remark = f"{remark}; enlarged" if remark else "smaller than --img_size: enlarged"
    pixels = np.asarray(ImageOps.fit(picture, (width, height), resample)).reshape(height, width, -1)  # (H, W, C)
    if mode == "RGBA":
        pixels = np.minimum(pixels, pixels[:, :, 3:])  # Lanczos overshoots; no colour shines brighter than its alpha
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), remark


def read_start(init_image: str, mask: str, size: tuple[int, int], mode: str) -> tuple[Tensor, Tensor]:
    """What sampling begins from: a picture (C, H, W) in 0..255, and each pixel's share to be painted anew (1, H, W).

    Args:
        init_image, mask: paths; the mask is white where to paint, black where to keep. Without one, all is painted.
        size: height and width, to which both are brought like the pictures of a data set.
        mode: one of CHANNELS.

    Raises:
        UserError: a file is missing or unreadable, or the two are not of one size, so that they would be cut apart.
    """

    def read(flag: str, path: str, *how) -> Tensor:
        if not os.path.isfile(path):
            raise UserError(f"--{flag}={path} is not a file; it takes a picture")
        pixels, reason = read_image(path, size, *how)
        if pixels is None:
            raise UserError(f"--{flag}={path} is not a picture that can be read ({reason}); it takes any other")
        return torch.from_numpy(pixels)

    def measure(path: str) -> str:
        with Image.open(path) as picture:
            width, height = ImageOps.exif_transpose(picture).size
        return f"{width} pixels wide and {height} high"

    if mask and not init_image:
        raise UserError(f"--mask={mask} says where to change a picture; name that with --init_image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of Pillow's is an error here
        picture = read("init_image", init_image, mode)
        if not mask:
            return picture, torch.ones(1, *size)
        share = read("mask", mask, "L", Image.Resampling.BOX) / 255  # areas: no ringing reaches into what is black
        sizes = measure(mask), measure(init_image)
    if sizes[0] != sizes[1]:
        raise UserError(f"--mask={mask} is {sizes[0]}, --init_image={init_image} {sizes[1]}; they must be alike")
    return picture, share


# ---- reading them all ------------------------------------------------------------------------------------------------

stopping = threading.Event()  # in a reading process, that of its parent


def begin_worker(stop) -> None:
    """Tie a reading process to its parent: it stops when told to, and ends when that has died, be it of kill -9."""

    global stopping
    stopping = stop

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows; elsewhere it has been deaf from its start
    warnings.simplefilter("ignore")  # what matters of Pillow's stands in the remarks
    threading.Thread(target=follow, daemon=True).start()


def read_portion(paths: list[str], size: tuple[int, int], mode: str) -> list[tuple[np.ndarray | None, str]]:
    return [read_image(path, size, mode) for path in paths if not stopping.is_set()]


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes started within this block never see Ctrl-C, not even as they start; this one sees it afterwards."""
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
    """Threads, or for many pictures `number` processes; on leaving, what they have not begun is dropped."""
    if pictures < PROCESSES_FROM:
        pool, stop = ThreadPoolExecutor(), threading.Event()
    else:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that PyTorch's threads may hold
        stop = context.Event()
        pool = ProcessPoolExecutor(number, context, begin_worker, (stop,))
    try:
        yield pool
    finally:
        stop.set()  # terminated, a process could leave half a message behind, whose other half would be waited for
        pool.shutdown(cancel_futures=True)


def read_all(paths: list[str], size: tuple[int, int], mode: str) -> Iterator[list[tuple[np.ndarray | None, str]]]:
    """`read_image` of all of them, in their order, portion by portion; few portions are in memory at a time.

    Raises:
        UserError: a process has died.
    """
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    number = min(61, number)  # Windows cannot wait for more
    by_bytes = max(1, PORTION_BYTES // (CHANNELS[mode] * math.prod(size)))
    length = 1 if len(paths) < PROCESSES_FROM else min(PORTION, by_bytes)
    done, pending = 0, deque()
    try:
        with readers(number, len(paths)) as pool:
            for start in range(0, len(paths), length):
                with deaf_to_interrupts():
                    pending.append(pool.submit(read_portion, paths[start : start + length], size, mode))
                if len(pending) > 2 * number:
                    yield pending.popleft().result()
                    done += length
            while pending:
                yield pending.popleft().result()
                done += length
    except BrokenProcessPool as error:
        reason = f"a process that reads images died at {paths[done]} or soon after, perhaps for want of memory"
        raise UserError(f"{reason}; the same command goes on from there") from error


# ---- the data set ----------------------------------------------------------------------------------------------------


def read_dataset(listing: Listing, size: tuple[int, int], mode: str = "auto") -> Dataset:
    """Every readable picture at `size` (height, width), in one of MODES: decoded once, then kept in the cache.

    Raises:
        UserError: more than half of the pictures are unreadable.
    """
    stored = "RGB" if mode == "auto" else mode
    key = repr((stored, size, listing.fingerprint, listing.times))
    cache = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.bytes"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_suffix(".lock")):  # a second process waits, and finds the work done
        facts = decode(listing.paths, size, stored, cache)
        skipped, count, examples = facts["skipped"], len(listing.paths), facts["examples"]
        if 2 * len(skipped) > count:
            for path in (cache, cache.with_suffix(".json")):
                path.unlink(missing_ok=True)
            raise UserError(f"{len(skipped)} of {count} images cannot be read, for instance {examples[0]}")
    images = np.memmap(cache, np.uint8, mode="c", shape=(facts["count"], CHANNELS[stored], *size))
    if mode == "auto" and facts["is_gray"]:
        stored, images = "L", images[:, :1]
    remarks = [f"{len(skipped):,} unreadable, left out: {', '.join(examples)}"] if skipped else []
    remarks += [f"{number:,} {remark}" for remark, number in facts["noticed"].items()]
    return Dataset(images, listing.fingerprint, remarks, stored, np.delete(listing.labels, skipped))


def known_facts(cache: Path, bytes_each: int) -> dict:
    """What was noted of the pictures that stand in a cache, all or the first ones; of none, if it holds too few."""
    facts = {"seen": 0, "count": 0, "skipped": [], "examples": [], "noticed": {}, "is_gray": True}
    with contextlib.suppress(*BROKEN_FILE):
        noted = json.loads(cache.with_suffix(".json").read_text())
        if noted.keys() == facts.keys() and cache.stat().st_size >= noted["count"] * bytes_each:
            return noted
    return facts


def decode(paths: list[str], size: tuple[int, int], mode: str, cache: Path) -> dict:
    """Write the readable pictures behind one another into `cache`, and what was noticed into a note beside it.

    The note follows the pictures: it is true at any moment. So an interrupted decoding goes on where it was, and is
    whole only when the note has `seen` all of the pictures.
    """
    bytes_each = CHANNELS[mode] * math.prod(size)
    note, facts = cache.with_suffix(".json"), known_facts(cache, bytes_each)
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
