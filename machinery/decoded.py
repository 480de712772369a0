"""The cache of decoded images: kept under check sums, taken over by larger data sets, pruned.

A cache is a file of images behind one another, and a note of what was noticed of them. Where a data
set has changed, what did not is copied from the cache of before; only the rest is decoded.

Reading order: check sums; Cache; Known, what an earlier cache holds; prune.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from machinery.basics import BROKEN_FILE, waiting_lock, write_whole
from machinery.listing import DIGEST, Listing
from machinery.pixels import Scale

BLOCK = 2**22  # bytes of a cache under one check sum
LIMIT = 20 * 2**30  # bytes of all caches together

# ---- check sums ----------------------------------------------------------------------------------


class BlockSums:
    """The check sums of a growing file, of BLOCK bytes each, the last one of what there is."""

    def __init__(self):
        self.full = []
        self.last = 0
        self.length = 0  # bytes under the last sum
        self.total = 0

    def update(self, data: np.ndarray) -> None:
        view = memoryview(data).cast("B")
        self.total += len(view)
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


# ---- one cache -----------------------------------------------------------------------------------


class Cache:
    """Decoded images behind one another in a file, and a note of what was noticed beside it.

    An unfinished file has another name; a finished one is never written to again, so whoever has
    mapped it keeps it whole. The note says what is true of the file: up to where it goes, and its
    check sums. Any damage means decoded again.

    Args:
        listing: the images.
        kind: how they are decoded: size, mode and more, in one text.
        shape: of one image, (C, H, W).
        dtype: of its levels.
    """

    def __init__(self, listing: Listing, kind: str, shape: tuple[int, ...], dtype: type):
        key = hashlib.sha256(repr((4, kind, listing.fingerprint)).encode()).hexdigest()[:16]
        self.listing = listing
        self.kind = kind
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.image_bytes = math.prod(shape) * self.dtype.itemsize
        self.path = listing.cache / f"{key}.bytes"
        self.unfinished = listing.cache / f"{key}.unfinished"
        self.note = listing.cache / f"{key}.json"
        self.digests = listing.cache / f"{key}.digests"

    def lock(self) -> contextlib.AbstractContextManager:
        """Within this block no other process makes the same cache, or prunes it."""
        return waiting_lock(self.path.with_suffix(".lock"))

    def map(self, path: Path, count: int) -> np.ndarray:
        """The images (count, C, H, W) in a file; what is written to these stays in memory."""
        return np.memmap(path, self.dtype, mode="c", shape=(count, *self.shape))

    def blank(self) -> dict:
        facts = {"seen": 0, "count": 0, "skipped": [], "examples": [], "noticed": {}}
        facts |= {"is_gray": True, "scale": None, "sums": [], "kind": self.kind}
        source = os.path.realpath(self.listing.folder)
        return facts | {"source": hashlib.sha256(os.fsencode(source)).hexdigest()[:16]}

    def load(self, count: int) -> tuple[dict, BlockSums]:
        """What is known of `count` images, all or the first ones; nothing where there is damage."""
        with contextlib.suppress(*BROKEN_FILE):
            facts = load_note(self.note)
            if facts["seen"] <= count and facts["kind"] == self.kind:
                path = self.path if facts["seen"] == count else self.unfinished
                sums = sums_of(path, facts["count"] * self.image_bytes)
                is_whole = path == self.unfinished or path.stat().st_size == sums.total
                if sums.values() == facts["sums"] and is_whole:
                    with contextlib.suppress(OSError):
                        os.utime(self.note)  # it was used now
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

    def finish(self, facts: dict, sums: BlockSums) -> None:
        """Give the file its name, with the digests by which later caches find its images."""
        os.replace(self.unfinished, self.path)
        self.save(facts, sums)
        content = self.listing.digests.tobytes()
        write_whole(self.digests, lambda file: file.write(content))

    def remove(self) -> None:
        for path in (self.note, self.path, self.unfinished, self.digests):
            path.unlink(missing_ok=True)


def load_note(path: Path) -> dict:
    """The facts in a note, of right types and ranges, under their sum.

    Raises:
        ValueError, and others of BROKEN_FILE: it is missing or damaged.
    """
    noted = json.loads(path.read_text())
    facts = noted["facts"]
    if noted["sum"] != sum_of(facts) or not are_facts(facts):
        raise ValueError("damaged")
    return facts


def are_facts(facts: dict) -> bool:
    """Whether all of a note's facts have their types and ranges."""
    numbers = [facts["seen"], facts["count"], *facts["skipped"], *facts["sums"]]
    return (
        len(facts) == 10
        and all(isinstance(facts[name], list) for name in ("skipped", "examples", "sums"))
        and len(facts["examples"]) == min(3, len(facts["skipped"]))
        and all(type(number) is int and number >= 0 for number in numbers)
        and facts["seen"] == facts["count"] + len(facts["skipped"])
        and facts["skipped"] == sorted({*facts["skipped"]})
        and all(place < facts["seen"] for place in facts["skipped"])
        and all(isinstance(facts[name], str) for name in ("kind", "source"))
        and all(isinstance(example, str) for example in facts["examples"])
        and all(are_runs(runs, facts["seen"]) for runs in facts["noticed"].values())
        and isinstance(facts["is_gray"], bool)
        and (facts["scale"] is None or all(map(math.isfinite, Scale(*facts["scale"]))))
    )


def are_runs(runs: list, count: int) -> bool:
    """Whether [[first, last], ...] are rising runs of places below `count`."""
    ends = [end for first, last in runs for end in (first, last)]
    rises = all(one <= other for one, other in itertools.pairwise(ends))
    return bool(ends) and rises and all(type(end) is int and 0 <= end < count for end in ends)


def notice(facts: dict, remark: str) -> None:
    """Note that a remark is true of the image in turn."""
    runs = facts["noticed"].setdefault(remark, [])
    place = facts["seen"]
    if runs and runs[-1][1] == place - 1:
        runs[-1][1] = place
    else:
        runs.append([place, place])


# ---- what an earlier cache holds -----------------------------------------------------------------


class Known:
    """Images of a data set that an earlier cache holds, found by the digests of their files.

    Args:
        cache: of the data set.
        scale: that its images of floats or of 32-bit numbers are to have.

    Attributes:
        places: (N,) int64, where each image was in the earlier data set; -1 for none.
        count: how many are known.
    """

    def __init__(self, cache: Cache, scale: Scale | None):
        wanted = cache.listing.digests
        self.places = np.full(len(wanted), -1, np.int64)
        self.count = 0
        self.note = None
        for note in sorted(cache.listing.cache.glob("*.json")):
            with contextlib.suppress(*BROKEN_FILE):
                facts = load_note(note)
                path = note.with_suffix(".bytes")
                fits = facts["kind"] == cache.kind and facts["scale"] in (None, scale and [*scale])
                if note == cache.note or not fits or not path.exists():
                    continue
                places = self.find(wanted, note, facts)
                if (places >= 0).sum() > self.count:
                    length = facts["count"] * cache.image_bytes
                    if sums_of(path, length).values() != facts["sums"]:
                        continue
                    self.take(note, facts, places, cache)

    def find(self, wanted: np.ndarray, note: Path, facts: dict) -> np.ndarray:
        """Where images of these digests (N, DIGEST) are in another data set: (N,) int64, or -1."""
        content = note.with_suffix(".digests").read_bytes()
        known = np.frombuffer(content, np.uint8).reshape(facts["seen"], DIGEST)
        keys = known[:, :8].copy().view(np.uint64).ravel()
        order = np.argsort(keys, kind="stable")
        spots = np.searchsorted(keys[order], wanted[:, :8].copy().view(np.uint64).ravel())
        places = order[spots.clip(max=len(order) - 1)]
        is_there = (known[places] == wanted).all(axis=1) & ~np.isin(places, facts["skipped"])
        return np.where(is_there, places, -1)

    def take(self, note: Path, facts: dict, places: np.ndarray, cache: Cache) -> None:
        """Have the images of an earlier cache at these places."""
        self.note, self.places = note, places
        self.source = facts["source"]
        self.count = int((places >= 0).sum())
        self.images = cache.map(note.with_suffix(".bytes"), facts["count"])
        is_row = np.ones(facts["seen"], np.int64)
        is_row[facts["skipped"]] = 0
        self.rows = is_row.cumsum() - 1
        self.noticed = {}
        for remark, runs in facts["noticed"].items():
            self.noticed[remark] = np.zeros(facts["seen"], bool)
            for first, last in runs:
                self.noticed[remark][first : last + 1] = True

    def image(self, number: int) -> tuple[np.ndarray, set[str]] | None:
        """Image `number` of the data set (C, H, W), with its remarks; None if it is not known."""
        place = self.places[number]
        if place < 0:
            return None
        remarks = {remark for remark, where in self.noticed.items() if where[place]}
        return self.images[self.rows[place]], remarks


# ---- all caches ----------------------------------------------------------------------------------


def remove_cache(note: Path) -> bool:
    """Remove a cache, unless another process is making it or about to read it."""
    lock = FileLock(note.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError, NotImplementedError):
        return False
    try:
        for suffix in (".json", ".bytes", ".unfinished", ".digests", ".npy"):
            note.with_suffix(suffix).unlink(missing_ok=True)
    except OSError:  # Windows removes no file that is mapped
        return False
    finally:
        lock.release()
    return True


def sizes_of(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each cache in a folder was last used, its bytes, and its note."""
    for path in folder.iterdir():
        if path.suffix in (".bytes", ".unfinished", ".npy"):
            with contextlib.suppress(OSError):  # another process has just removed it
                used = [path.stat().st_mtime]
                if path.with_suffix(".json").exists():
                    used.append(path.with_suffix(".json").stat().st_mtime)
                yield max(used), path.stat().st_size, path.with_suffix(".json")


def prune(folder: Path, keep: Path) -> None:
    """Remove the caches that were used longest ago, so that all take at most LIMIT bytes.

    The one whose note is `keep` stays, however large it is. What is removed is told.
    """
    found = sorted(sizes_of(folder))
    excess = sum(size for _, size, _ in found) - LIMIT
    removed = []
    for _, size, note in found:
        if excess <= 0:
            break
        if note != keep and remove_cache(note):
            removed.append(size)
            excess -= size
    if removed:
        number = f"{len(removed):,} old data sets ({sum(removed) / 1e9:.1f} GB)"
        print(f"{folder}: removed {number}: decoded images take {LIMIT / 1e9:.0f} GB at most there")
