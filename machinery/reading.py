"""Many images: decoded once into one array of bytes, which is kept in a cache under check sums.

Files are found by machinery/listing.py; one of them is read by machinery/pixels.py.

Reading order: what sampling starts from; who reads many images; the cache; read_dataset.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from machinery import pixels
from machinery.basics import BROKEN_FILE, UserError, progress_bar, waiting_lock, write_whole
from machinery.command_line import SteadyStream
from machinery.listing import CACHE, Listing, keep_digests
from machinery.pixels import (
    CHANNELS,
    FileFault,
    MachineFault,
    NeedsScale,
    Scale,
    common_scale,
    read_image,
)

MODES = {"auto": "L or RGB", "L": "gray", "RGB": "color", "RGBA": "color and alpha"}
NOTE_EVERY = 5  # seconds; so much is decoded again after a kill -9
# images; threads have read fewer before processes have imported PyTorch
PROCESSES_FROM = 10_000
# what a process reads before it hands it over, at most
PORTION = 64  # images
PORTION_BYTES = 2**22
BLOCK = 2**22  # bytes of the cache under one check sum


class Dataset(NamedTuple):
    """The images of a folder, decoded."""

    images: np.ndarray  # (N, C, H, W) uint8, mapped from the cache; RGBA is premultiplied
    fingerprint: str  # of the files' names and contents: the same on every machine
    remarks: list[str]  # what was left out or changed, a sentence each
    mode: str  # one of CHANNELS
    labels: np.ndarray  # (N,) int64, as in Listing


# ---- what sampling starts from -------------------------------------------------------------------


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
        UserError: a file is missing or unreadable, the two differ in size, so that they would be
            cropped differently, or the mask says nothing.
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
        read_flag("mask", mask, size, "L")  # or refuse it in its own words
        sizes = [measure(path) for path in (mask, init_image)]
        if sizes[0] != sizes[1]:
            differ = f"--mask={mask} is {sizes[0]}, --init_image={init_image} {sizes[1]}"
            raise UserError(f"{differ}; they must have the same size")
        return Start(image, read_mask(mask, size))


def read_flag(flag: str, path: str, *how) -> Tensor:
    """The image that a flag names: pixels (C, H, W) uint8; see `read_image`."""
    if not os.path.isfile(path):
        raise UserError(f"--{flag}={path} is not a file; it takes an image")
    try:
        try:
            found, remarks = read_image(path, *how)
        except NeedsScale as error:
            found, remarks = read_image(path, *how, scale=common_scale([error.scale]))
    except MachineFault as error:
        raise UserError(f"--{flag}: {error}") from error
    except FileFault as error:
        reason = str(error).removeprefix(Path(path).name)
        raise UserError(f"--{flag}={path} is not an image that can be read{reason}") from error
    if flag == "init_image" and pixels.CONVERTED in remarks:
        print(f"{path} is converted to sRGB from another color profile")
    return torch.from_numpy(found)


def read_mask(path: str, size: tuple[int, int]) -> Tensor:
    """How much of each pixel is repainted (1, H, W): white is 1; black and transparent are 0.

    A mask of the numbers 0 and 1 alone is one of labels: 1 is white.

    Raises:
        UserError: it repaints nothing, or everything.
    """
    picture, _ = pixels.decode(path, "RGBA", Scale(0, 1), 2 * max(size))
    levels = np.asarray(picture)[:, :, :3].mean(axis=2).round().astype(np.uint8)  # premultiplied
    if levels.max() == 1:
        levels = levels * 255
        print(f"--mask={path} has the numbers 0 and 1: 1 is taken for white")
    if levels.max() == 0 or levels.min() == 255:
        fault = "keep everything: nothing in it is white"
        if levels.max() > 0:
            fault = "repaint everything: nothing in it is black or transparent"
        rule = "paint white where to repaint, black where to keep"
        raise UserError(f"--mask={path} would {fault}; {rule}")
    # BOX averages areas: no ringing reaches into what is black
    share = ImageOps.fit(Image.fromarray(levels), (size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy(np.array(share))[None] / 255


def measure(path: str) -> str:
    """An image's size, upright, in words."""
    with pixels.open_image(pixels.read_bytes(path)) as picture:
        width, height = ImageOps.exif_transpose(picture).size
    return f"{width} pixels wide and {height} high"


# ---- who reads many images -----------------------------------------------------------------------

stopping = threading.Event()  # in a reading process, that of its parent


def begin_worker(stop, memory: pixels.Memory) -> None:
    """Tie a reading process to its parent: it stops when told to, and ends when that has died."""
    global stopping
    stopping = stop
    pixels.memory = memory

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    # for Windows; elsewhere it has been deaf from its start
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C libraries have no say
    warnings.simplefilter("ignore")  # what matters of Pillow's stands in the remarks
    threading.Thread(target=follow, daemon=True).start()


def attempt(work: Callable, path: str, *how):
    """What `work` returns, or the fault that it raises: one of pixels.py."""
    try:
        return work(path, *how)
    except (FileFault, MachineFault, NeedsScale) as fault:
        return fault


def read_one(path: str, *how) -> tuple[np.ndarray, set[str]]:
    """`read_image`, as processes find it by its name."""
    return read_image(path, *how)


def read_portion(work: Callable, paths: list[str], *how) -> list:
    return [attempt(work, path, *how) for path in paths if not stopping.is_set()]


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes started in this block never see Ctrl-C; this one sees it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[TextIO]:
    """What C libraries write to the terminal is dropped; yields where the program itself writes."""
    sys.stderr.flush()
    terminal = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield SteadyStream(open(terminal, "w", closefd=False))
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


@contextlib.contextmanager
def readers(number: int, count: int) -> Iterator[Executor]:
    """Threads, or for many images `number` processes; what has not begun on leaving is dropped."""
    if count < PROCESSES_FROM:
        pool = ThreadPoolExecutor()
        stop = threading.Event()
    else:
        # a fork would copy locks that PyTorch's threads may hold
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        pool = ProcessPoolExecutor(number, context, begin_worker, (stop, pixels.Memory(context)))
    try:
        yield pool
    finally:
        # terminated, a process could leave half a message, for whose other half one would wait
        stop.set()
        pool.shutdown(cancel_futures=True)


def read_all(work: Callable, paths: list[str], image_bytes: int, *how) -> Iterator[list]:
    """`work(path, *how)` of all paths in their order, portion by portion; few are in memory.

    Args:
        work: at the top of a module, so that processes find it.
        image_bytes: of one result.

    Raises:
        UserError: a process has died.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    number = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    number = min(61, number)  # Windows cannot wait for more
    length = 1
    if len(paths) >= PROCESSES_FROM:
        length = min(PORTION, max(1, PORTION_BYTES // image_bytes))
    done = 0
    pending = deque()
    try:
        with readers(number, len(paths)) as pool:
            for start in range(0, len(paths), length):
                portion = paths[start : start + length]
                with deaf_to_interrupts():
                    pending.append(pool.submit(read_portion, work, portion, *how))
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


# ---- the cache -----------------------------------------------------------------------------------


class BlockSums:
    """The check sums of a growing file, of BLOCK bytes each, the last one of what there is."""

    def __init__(self):
        self.full = []
        self.last = 0
        self.length = 0  # bytes under the last sum

    def update(self, data: np.ndarray) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: BLOCK - self.length]
            self.last = zlib.crc32(part, self.last)
            self.length += len(part)
            view = view[len(part) :]
            if self.length == BLOCK:
                self.full.append(self.last)
                self.last = 0
                self.length = 0

    def values(self) -> list[int]:
        return [*self.full, self.last] if self.length else list(self.full)


class Cache:
    """Decoded images behind one another in a file, and a note of what was noticed beside it.

    An unfinished file has another name; a finished one is never written to again, so whoever has
    mapped it keeps it whole. The note says what is true of the file: up to where it goes, and its
    check sums. Any damage means decoded again.

    Args:
        key: of the images, their size and mode.
        image_bytes: of one image.
    """

    def __init__(self, key: str, image_bytes: int):
        self.path = CACHE / f"{key}.bytes"
        self.unfinished = CACHE / f"{key}.unfinished"
        self.note = CACHE / f"{key}.json"
        self.image_bytes = image_bytes

    def blank(self) -> dict:
        facts = {"seen": 0, "count": 0, "skipped": [], "examples": [], "noticed": {}}
        return facts | {"is_gray": True, "scale": None, "sums": []}

    def load(self, count: int) -> tuple[dict, BlockSums]:
        """What is known of `count` images, all or the first ones; nothing where there is damage."""
        with contextlib.suppress(*BROKEN_FILE):
            noted = json.loads(self.note.read_text())
            facts = noted["facts"]
            if noted["sum"] == sum_of(facts) and are_facts(facts, count):
                path = self.path if facts["seen"] == count else self.unfinished
                length = facts["count"] * self.image_bytes
                sums = sums_of(path, length)
                is_whole = path == self.unfinished or path.stat().st_size == length
                if sums.values() == facts["sums"] and is_whole:
                    return facts, sums
        if self.path.exists():
            print("the cache of decoded images is damaged; they are decoded again", flush=True)
        self.remove()
        return self.blank(), BlockSums()

    def save(self, facts: dict, sums: BlockSums) -> None:
        """Write the note of what the file holds by now."""
        facts["sums"] = sums.values()
        text = json.dumps({"facts": facts, "sum": sum_of(facts)})
        write_whole(self.note, lambda file: file.write(text.encode()))

    def remove(self) -> None:
        for path in (self.note, self.path, self.unfinished):
            path.unlink(missing_ok=True)


def are_facts(facts: dict, count: int) -> bool:
    """Whether all of a note's facts on `count` images have their types and ranges."""
    numbers = [facts["seen"], facts["count"], *facts["skipped"], *facts["sums"]]
    noticed = facts["noticed"].items()
    return (
        len(facts) == 8
        and all(isinstance(facts[name], list) for name in ("skipped", "examples", "sums"))
        and len(facts["examples"]) == min(3, len(facts["skipped"]))
        and all(type(number) is int and number >= 0 for number in numbers)
        and facts["seen"] == facts["count"] + len(facts["skipped"]) <= count
        and facts["skipped"] == sorted({*facts["skipped"]})
        and all(place < facts["seen"] for place in facts["skipped"])
        and all(isinstance(example, str) for example in facts["examples"])
        and all(type(number) is int and isinstance(name, str) for _, (number, name) in noticed)
        and isinstance(facts["is_gray"], bool)
        and (facts["scale"] is None or all(map(math.isfinite, Scale(*facts["scale"]))))
    )


def sum_of(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def sums_of(path: Path, length: int) -> BlockSums:
    """The check sums of a file's first `length` bytes.

    Raises:
        OSError, ValueError: there are not as many.
    """
    sums = BlockSums()
    with open(path, "rb") as file:
        while length > 0:
            data = file.read(min(BLOCK, length))
            if not data:
                raise ValueError("shorter than noted")
            sums.update(np.frombuffer(data, np.uint8))
            length -= len(data)
    return sums


def decode(paths: list[str], size: tuple[int, int], mode: str, cache: Cache) -> dict:
    """Have all readable images in the cache, and what was noticed of them.

    What an earlier start has done is not done again; what it could not read is tried again.

    Raises:
        UserError: the machine could not read a file; what was read until then is kept.
    """
    facts, sums = cache.load(len(paths))
    scale = facts["scale"] and Scale(*facts["scale"])
    again = [attempt(read_one, paths[place], size, mode) for place in facts["skipped"]]
    if not all(isinstance(result, FileFault) for result in again):
        cache.remove()
        facts, sums = cache.blank(), BlockSums()
    if facts["seen"] == len(paths):
        return facts
    with warnings.catch_warnings(), quiet_libraries() as terminal:
        warnings.simplefilter("ignore")  # what matters of Pillow's stands in the remarks
        try:
            decode_rest(paths, size, mode, cache, facts, sums, scale, terminal)
        except NeedsScale:  # begin again, with one scale for all
            cache.remove()
            facts, sums = cache.blank(), BlockSums()
            scale = survey(paths, terminal)
            facts["scale"] = list(scale)
            decode_rest(paths, size, mode, cache, facts, sums, scale, terminal)
    return facts


def decode_rest(
    paths: list[str],
    size: tuple[int, int],
    mode: str,
    cache: Cache,
    facts: dict,
    sums: BlockSums,
    scale: Scale | None,
    terminal: TextIO,
) -> None:
    """`decode` the images that are not in the cache yet; `facts` and `sums` are brought along.

    The note follows the images: it is true at any moment.
    """
    first = facts["seen"]
    how = (size, mode, "lanczos", scale)
    portions = read_all(read_one, paths[first:], cache.image_bytes, *how)
    bar = progress_bar(len(paths), first, title="reading images", file=terminal)
    with open(cache.unfinished, "ab") as file, bar, contextlib.closing(portions):
        file.truncate(facts["count"] * cache.image_bytes)
        noted_at = time.monotonic()

        def note() -> None:
            file.flush()
            os.fsync(file.fileno())  # before the note that tells of it
            cache.save(facts, sums)

        for portion in portions:
            for result in portion:
                if isinstance(result, MachineFault):  # perhaps one at a time, it can be read
                    result = attempt(read_one, paths[facts["seen"]], *how)
                if isinstance(result, MachineFault):
                    note()
                    raise UserError(f"{result}; the same command goes on from there")
                take(result, paths[facts["seen"]], file, facts, sums)
            bar.update(len(portion))
            if facts["seen"] < len(paths) and time.monotonic() - noted_at >= NOTE_EVERY:
                note()
                noted_at = time.monotonic()
        file.flush()
        os.fsync(file.fileno())
    os.replace(cache.unfinished, cache.path)
    cache.save(facts, sums)


def take(result, path: str, file, facts: dict, sums: BlockSums) -> None:
    """Add one image to the cache, or the reason why it is none.

    Raises:
        NeedsScale: it is of floats or of 32-bit numbers, and no scale was given.
    """
    if isinstance(result, NeedsScale):
        raise result
    if isinstance(result, FileFault):
        facts["skipped"].append(facts["seen"])
        facts["examples"] = [*facts["examples"], str(result)][:3]
    else:
        image, remarks = result
        file.write(image)
        sums.update(image)
        facts["count"] += 1
        facts["is_gray"] = facts["is_gray"] and bool((image == image[0]).all())
        for remark in remarks:
            number, example = facts["noticed"].get(remark, (0, Path(path).name))
            facts["noticed"][remark] = [number + 1, example]
    facts["seen"] += 1


def find_extremes(path: str) -> Scale | None:
    """The smallest and the largest number of an image whose format fixes no scale."""
    with pixels.faults_of(Path(path).name), pixels.open_source(path) as picture:
        if picture.mode[0] not in "IF" or pixels.scale_of(picture):
            return None
        with pixels.memory.hold(picture.width * picture.height):
            return pixels.extremes(np.asarray(picture))


def survey(paths: list[str], terminal: TextIO) -> Scale:
    """One scale for all images of floats or of 32-bit numbers."""
    scales = []
    with progress_bar(len(paths), title="looking for the scale", file=terminal) as bar:
        for portion in read_all(find_extremes, paths, 16):
            scales += [found for found in portion if isinstance(found, Scale)]
            bar.update(len(portion))
    return common_scale(scales)


# ---- the data set --------------------------------------------------------------------------------


def read_dataset(listing: Listing, size: tuple[int, int], mode: str = "auto") -> Dataset:
    """Every readable image at `size` (height, width), in one of MODES: decoded once, then cached.

    Raises:
        UserError: more than half of the images are unreadable, or the machine cannot read one.
    """
    stored = "RGB" if mode == "auto" else mode
    key = hashlib.sha256(repr((3, stored, size, listing.fingerprint)).encode()).hexdigest()[:16]
    cache = Cache(key, CHANNELS[stored] * math.prod(size))
    CACHE.mkdir(parents=True, exist_ok=True)
    keep_digests(listing)
    with waiting_lock(cache.path.with_suffix(".lock")):  # a second process finds the work done
        facts = decode(listing.paths, size, stored, cache)
    skipped = facts["skipped"]
    count = len(listing.names)
    if 2 * len(skipped) > count:
        cache.remove()
        example = facts["examples"][0]
        raise UserError(f"{len(skipped)} of {count} images cannot be read, for instance {example}")
    shape = (facts["count"], CHANNELS[stored], *size)
    images = np.memmap(cache.path, np.uint8, mode="c", shape=shape)
    if mode == "auto" and facts["is_gray"]:
        stored = "L"
        images = images[:, :1]
    labels = np.delete(listing.labels, skipped)
    remarks = listing.remarks + remarks_on(facts)
    return Dataset(images, listing.fingerprint, remarks, stored, labels)


def remarks_on(facts: dict) -> list[str]:
    """What was left out or changed, with its number and an example."""
    remarks = []
    if facts["skipped"]:
        examples = ", ".join(facts["examples"])
        remarks.append(f"{len(facts['skipped']):,} unreadable, left out: {examples}")
    if facts["scale"]:
        black, white = facts["scale"]
        kinds = "images of floats or 32-bit numbers"
        remarks.append(f"{kinds}: {black:g} is black, {white:g} is white")
    for remark, (number, example) in sorted(facts["noticed"].items()):
        remarks.append(f"{number:,} {remark} ({example})")
    return remarks
