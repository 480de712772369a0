"""Many images: decoded once into one array of bytes, which is kept in a cache (decoded.py).

Files are found by machinery/listing.py; one of them is read by machinery/pixels.py.

Reading order: what sampling starts from; who reads many images; decoding; read_dataset.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from machinery import pixels
from machinery.basics import UserError, counted, make_folder, progress_bar
from machinery.command_line import SteadyStream
from machinery.decoded import BlockSums, Cache, Known, notice, prune, remove_cache
from machinery.inputs import both_read, mode_of
from machinery.listing import Listing, keep_digests
from machinery.pixels import (
    CHANNELS,
    DEPTHS,
    NUMBERS,
    FileFault,
    MachineFault,
    Modes,
    NeedsScale,
    Scale,
    common_scale,
    read_image,
)
from machinery.sources import Row

MODES = Modes(
    {"auto": "L or RGB", "L": "gray", "RGB": "color", "RGBA": "color and alpha"},
    lambda number: f"{number} channels",
)
NOTE_EVERY = 5  # seconds; so much is decoded again after a kill -9
# images; threads have read fewer before processes have imported PyTorch
PROCESSES_FROM = 10_000
# what a process reads before it hands it over, at most
PORTION = 64  # images
PORTION_BYTES = 2**22
CROP_MARGIN = 1.25  # images are decoded so much larger than the parts that are learned
CROPS = {
    "center": "the middle",
    "random": "another part each time",
}


class Dataset(NamedTuple):
    """The images of a folder, decoded."""

    images: np.ndarray  # (N, C, H, W) uint8 or uint16, mapped from the cache; RGBA is premultiplied
    fingerprint: str  # of the files' names and contents: the same on every machine
    remarks: list[str]  # what was left out or changed, a sentence each
    mode: str  # one of CHANNELS
    labels: np.ndarray  # (N,) int64, as in Listing
    names: Sequence[str] = ()  # of the N files, below the folder
    learned: np.ndarray | None = None  # indices of the images to learn from; None for all
    size: tuple[int, ...] = ()  # to which larger images are cropped at random; () for whole ones
    inputs: str = ""  # the flag; see inputs.py
    partners: np.ndarray | None = None  # (N, C_in, H, W), inputs that come from files
    input_mode: str = ""  # one of CHANNELS; "" without inputs


# ---- what sampling starts from -------------------------------------------------------------------


class Start(NamedTuple):
    """What image-to-image and inpainting start from, instead of noise."""

    image: Tensor  # (C, H, W) uint8, or int16 of 16 bits
    mask: Tensor  # (1, H, W) in [0, 1]: 1 = repaint; 0 = keep, so that it comes out as it went in


def read_start(
    init_image: str,
    mask: str,
    size: tuple[int, int],
    mode: str,
    resize: str = "lanczos",
    depth: int = 8,
) -> Start | None:
    """The image and the mask that sampling starts from; None if no image is named.

    Args:
        init_image, mask: paths; without a mask, everything is repainted.
        size: height and width; both are resized and cropped to it, as a data set is.
        mode, resize, depth: those of the run.

    Raises:
        UserError: a file is missing or unreadable, the two differ in size, so that they would be
            cropped differently, or the mask says nothing.
    """
    if mask and not init_image:
        raise UserError(f"--mask={mask} needs an image to inpaint: --init_image=...")
    if not init_image:
        return None
    if mode in NUMBERS:
        raise UserError(f"--init_image={init_image}: this run makes {mode} channels, no colors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of Pillow's is an error here
        image = read_flag("init_image", init_image, size, mode, resize, depth)
        if not mask:
            return Start(image, torch.ones(1, *size))
        read_flag("mask", mask, size, "L")  # or refuse it in its own words
        sizes = [measure(path) for path in (mask, init_image)]
        if sizes[0] != sizes[1]:
            differ = f"--mask={mask} is {sizes[0]}, --init_image={init_image} {sizes[1]}"
            raise UserError(f"{differ}; they must have the same size")
        return Start(image, read_mask(mask, size))


def read_flag(flag: str, path: str, *how) -> Tensor:
    """The image that a flag names (C, H, W): uint8, or int16 of 16 bits; see `read_image`."""
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
    return torch.from_numpy(found.view(np.int16) if found.dtype == np.uint16 else found)


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


# ---- decoding ------------------------------------------------------------------------------------


def decode(paths: list, how: tuple, cache: Cache) -> dict:
    """Have all readable images in the cache, and what was noticed of them.

    What an earlier start has done is not done again; what it could not read is tried again.

    Raises:
        UserError: the machine could not read a file; what was read until then is kept.
    """
    facts, sums = cache.load(len(paths))
    scale = facts["scale"] and Scale(*facts["scale"])
    again = [attempt(read_one, paths[place], *how) for place in facts["skipped"]]
    if not all(isinstance(result, FileFault) for result in again):
        cache.remove()
        facts, sums = cache.blank(), BlockSums()
    if facts["seen"] == len(paths):
        return facts
    with warnings.catch_warnings(), quiet_libraries() as terminal:
        warnings.simplefilter("ignore")  # what matters of Pillow's stands in the remarks
        try:
            decode_rest(paths, how, cache, facts, sums, scale, terminal)
        except NeedsScale:  # begin again, with one scale for all
            cache.remove()
            facts, sums = cache.blank(), BlockSums()
            scale = survey(paths, terminal)
            facts["scale"] = list(scale)
            decode_rest(paths, how, cache, facts, sums, scale, terminal)
    return facts


def results(paths: list, first: int, known: Known, image_bytes: int, *how) -> Iterator[list]:
    """What `read_one` makes of the images from `first` on, portion by portion.

    What is known already is not read again.
    """
    if not known.count:
        yield from read_all(read_one, paths[first:], image_bytes, *how)
        return
    missing = [
        path for path, place in zip(paths[first:], known.places[first:], strict=True) if place < 0
    ]
    with contextlib.closing(read_all(read_one, missing, image_bytes, *how)) as portions:
        fresh = itertools.chain.from_iterable(portions)
        for start in range(first, len(paths), PORTION):
            numbers = range(start, min(len(paths), start + PORTION))
            yield [known.image(number) or next(fresh) for number in numbers]


def decode_rest(
    paths: list,
    how: tuple,
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
    how = (*how, scale)
    known = Known(cache, scale)
    if known.count:
        print(f"{known.count:,} of {len(paths):,} images were decoded before and are taken over")
    portions = results(paths, first, known, cache.image_bytes, *how)
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
                take(result, file, facts, sums)
            bar.update(len(portion))
            if facts["seen"] < len(paths) and time.monotonic() - noted_at >= NOTE_EVERY:
                note()
                noted_at = time.monotonic()
        file.flush()
        os.fsync(file.fileno())
    cache.finish(facts, sums)
    if known.count and known.source == facts["source"]:  # what the same folder was before
        remove_cache(known.note)


def take(result, file, facts: dict, sums: BlockSums) -> None:
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
            notice(facts, remark)
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


def read_dataset(
    listing: Listing,
    size: tuple[int, int],
    mode: str = "auto",
    *,
    crop: str = "center",
    crop_margin: float = CROP_MARGIN,
    resize: str = "lanczos",
    depth: int = 8,
) -> Dataset:
    """Every readable image, decoded once, then cached.

    Args:
        listing: the images.
        size: height and width.
        mode: one of MODES.
        crop: one of CROPS.
        crop_margin: how much larger than `size` images are decoded of which a part is learned.
        resize: one of pixels.RESIZES.
        depth: bits of a level, one of pixels.DEPTHS.

    Raises:
        UserError: more than half of the images are unreadable, or the machine cannot read one.
    """
    stored = default_mode(listing) if mode == "auto" else mode
    is_larger = crop == "random"
    full = tuple(math.ceil(crop_margin * side) for side in size) if is_larger else size
    shape = (CHANNELS[stored], *full)
    how = (full, stored, resize, depth)
    cache = Cache(listing, repr(how), shape, DEPTHS[depth])
    make_folder(listing.cache)
    keep_digests(listing)
    with cache.lock():  # a second process finds the work done
        facts = decode(listing.paths, how, cache)
        skipped = facts["skipped"]
        count = len(listing.names)
        if 2 * len(skipped) > count:
            cache.remove()
            unread = f"{len(skipped):,} of {counted(count, 'image')}"
            raise UserError(f"{unread} cannot be read, for instance {facts['examples'][0]}")
        images = cache.map(cache.path, facts["count"])
    prune(listing.cache, keep=cache.note)
    if mode == "auto" and stored == "RGB" and facts["is_gray"]:
        stored = "L"
        images = images[:, :1]
    labels = np.delete(listing.labels, skipped)
    names = np.delete(np.array(listing.names, object), skipped)
    remarks = listing.remarks + remarks_on(facts, listing.paths) + remarks_on_mode(stored, depth)
    facts = {"names": names, "size": size if is_larger else ()}
    return Dataset(images, listing.fingerprint, remarks, stored, labels, **facts)


def read_pairs(
    listing: Listing,
    size: tuple[int, int],
    mode: str = "auto",
    *,
    inputs: str = "",
    input_mode: str = "auto",
    **how,
) -> Dataset:
    """`read_dataset`, with the inputs of an image-to-image run.

    Args:
        listing, size, mode, how: as there; see `list_pairs`.
        inputs: the flag.
        input_mode: of inputs that come from files, one of MODES.

    Raises:
        UserError: also if such inputs cannot be made of such images.
    """
    data = read_dataset(listing, size, mode, **how)
    if listing.partners is None:
        return data._replace(inputs=inputs, input_mode=mode_of(inputs, data.mode))
    partners = read_dataset(listing.partners, size, input_mode, **how)
    remarks = data.remarks + [f"inputs: {remark}" for remark in partners.remarks]
    names = [data.names, partners.names]
    if len(data.names) < len(listing.names) or len(partners.names) < len(listing.names):
        readable = both_read(listing, *names)  # the caches take over what is decoded
        data = read_dataset(readable, size, data.mode, **how)
        partners = read_dataset(readable.partners, size, partners.mode, **how)
        left_out = len(listing.names) - len(readable.names)
        remarks.append(f"{left_out:,} pairs of which a file is unreadable are left out")
    facts = {"fingerprint": listing.fingerprint, "remarks": remarks, "inputs": inputs}
    return data._replace(partners=partners.images, input_mode=partners.mode, **facts)


def default_mode(listing: Listing) -> str:
    """What `--mode=auto` decodes to: RGB, of which gray is one plane; or channels of an array."""
    first = listing.paths[0]
    is_color = not isinstance(first, Row) or str(first.array.channels) not in NUMBERS
    return "RGB" if is_color else str(first.array.channels)


def remarks_on_mode(mode: str, depth: int) -> list[str]:
    """What pictures of the images do not show."""
    remarks = []
    if mode in NUMBERS:
        which = "the first one" if mode == "2" else "the first three"
        remarks.append(f"of {mode} channels, pictures show {which}; sample writes all of them")
    if depth == 16:
        remarks.append("of 16 bits, pictures show the upper 8; sample writes all of them")
    return remarks


def remarks_on(facts: dict, paths: list) -> list[str]:
    """What was left out or changed, with its number and an example."""
    remarks = []
    if facts["skipped"]:
        examples = ", ".join(facts["examples"])
        remarks.append(f"{len(facts['skipped']):,} unreadable, left out: {examples}")
    if facts["scale"]:
        black, white = facts["scale"]
        kinds = "images of floats or 32-bit numbers"
        remarks.append(f"{kinds}: {black:g} is black, {white:g} is white")
    for remark, runs in sorted(facts["noticed"].items()):
        number = sum(last - first + 1 for first, last in runs)
        remarks.append(f"{number:,} {remark} ({Path(paths[runs[0][0]]).name})")
    return remarks
