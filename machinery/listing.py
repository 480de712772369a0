"""The image files below a folder: found, told apart by their content, not opened yet.

Reading order: Listing and list_images; classes; the identity of a data set.
"""

import contextlib
import gc
import hashlib
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from machinery.basics import BROKEN_FILE, UserError, counted, progress_bar, write_whole
from machinery.pixels import IMAGE_SUFFIXES, OTHER_SUFFIXES, MachineFault

CACHE = Path("datasets", ".cache")
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
OWN_FOLDERS = ("models", "results", "runs")  # what training writes is no data set to learn from
WHOLE_FILE = 2**20  # bytes; larger files are told apart by three samples
SAMPLE = 2**18
DIGEST = 16  # bytes


class Listing(NamedTuple):
    """The image files below a folder, in one order on every system."""

    folder: Path
    names: list[str]  # below the folder, with "/"
    fingerprint: str  # of their names and contents
    old_fingerprint: str  # of their names and sizes: runs of earlier versions have it
    classes: tuple[str, ...]  # the first-level folders that hold images, sorted
    # (N,) int64, each image's index in `classes`; -1 where it lies in the folder itself
    labels: np.ndarray
    remarks: list[str]  # what was passed over, a sentence each
    unreadable: list[str]  # folders that may not be opened
    facts: np.ndarray  # (N, 4) int64, by which it is known that a digest still holds
    digests: np.ndarray  # (N, DIGEST) uint8, of the contents

    @property
    def paths(self) -> list[str]:
        return [f"{self.folder}/{name}" for name in self.names]

    def is_known_as(self, fingerprint: str) -> bool:
        """Whether a run with this fingerprint was trained on these files."""
        return fingerprint in (self.fingerprint, self.old_fingerprint)


class Found:
    """What a walk through a folder meets."""

    def __init__(self):
        self.files = []  # (name, size, mtime, ctime, inode, first-level folder)
        self.unreadable = []  # folders
        self.dead_links = []
        self.own_folders = []
        self.others = Counter()  # suffixes of images that are not read

    def remarks(self) -> list[str]:
        """What was passed over, with its number and an example."""
        sentences = []
        if self.unreadable:
            number = counted(len(self.unreadable), "folder")
            sentences.append(f"{number} may not be opened, left out: {self.unreadable[0]}")
        if self.dead_links:
            number = counted(len(self.dead_links), "dead link")
            sentences.append(f"{number}, such as {self.dead_links[0]}")
        if self.others:
            kinds = ", ".join(suffix for suffix, _ in self.others.most_common(5))
            number = counted(self.others.total(), "image")
            sentences.append(f"{number} of kinds that are not read, left out: {kinds}")
        if self.own_folders:
            sentences.append(f"left out, since training writes there: {self.own_folders[0]}")
        return sentences


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Without Python's search for dead circles: a fifth of the time that a million names take."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def walk(folder: Path) -> Found:
    """All files below a folder; no hidden ones, no pipes, no circles of links."""
    found = Found()
    visited = set()
    own = {os.path.realpath(name) for name in OWN_FOLDERS if os.path.isdir(name)}

    def note_unreadable(error: OSError) -> None:
        found.unreadable.append(f"{error.filename} ({error.strerror})")

    for place, folders, files in os.walk(folder, followlinks=True, onerror=note_unreadable):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        if real in own and place != str(folder):
            found.own_folders.append(place)
            folders.clear()
            continue
        # of two ways to a folder, the same one every time
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = "" if place == str(folder) else f"{Path(place).relative_to(folder).as_posix()}/"
        top = below.partition("/")[0]
        for name in files:
            lower = name.lower()
            if name[0] == "." or not lower.endswith(IMAGE_SUFFIXES):
                if lower.endswith(OTHER_SUFFIXES) and name[0] != ".":
                    found.others[os.path.splitext(lower)[1]] += 1
                continue
            try:
                info = os.stat(f"{place}/{name}")
            except FileNotFoundError:
                found.dead_links.append(f"{place}/{name}")
                continue
            except OSError as error:
                raise UserError(f"{place}/{name}: {error.strerror or error}") from error
            if stat.S_ISREG(info.st_mode):
                facts = (info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
                found.files.append((below + name, *facts, top))
    found.files.sort()
    return found


@no_collections()
def list_images(folder: Path) -> Listing:
    """All images below a folder, not opened but for their fingerprint.

    Raises:
        UserError: there is no such folder, it holds no images, or a file may not be read.
    """
    if not folder.is_dir():
        there = sorted(path.name for path in Path("datasets").glob("[!.]*") if path.is_dir())
        others = ", ".join(there) or "none"
        wrong = "is a file" if folder.exists() else "does not exist"
        rule = f"it takes any folder of images (in datasets/ there are: {others})"
        raise UserError(f"--dataset={folder} {wrong}; {rule}")
    found = walk(folder)
    if not found.files:
        more = "".join(f"; {sentence}" for sentence in found.remarks())
        raise UserError(f"--dataset={folder} holds no images ({', '.join(IMAGE_SUFFIXES)}){more}")
    names, sizes, *times, tops = zip(*found.files, strict=True)
    pairs = repr(list(zip(names, sizes, strict=True))).encode("utf-8", "surrogateescape")
    facts = np.array([sizes, *times], np.int64).T
    digests = digests_of(folder, names, facts)
    digest = hashlib.sha256(composed("\0".join(names)).encode("utf-8", "surrogateescape"))
    digest.update(digests.tobytes())
    tops = [composed(top) for top in tops]
    classes = tuple(sorted({*tops} - {""}))
    numbers = {"": -1} | {name: number for number, name in enumerate(classes)}
    return Listing(
        folder,
        list(names),
        f"2-{digest.hexdigest()[:16]}",
        hashlib.sha256(pairs).hexdigest()[:16],
        classes,
        np.array([numbers[top] for top in tops], np.int64),
        found.remarks(),
        found.unreadable,
        facts,
        digests,
    )


# ---- classes -------------------------------------------------------------------------------------


def composed(name: str) -> str:
    """A name with its accents in one letter: macOS keeps them as two, which look the same."""
    return unicodedata.normalize("NFC", name)


def tell_classes(listing: Listing, conditional: bool) -> list[str]:
    """A sentence on the classes there are, whether they are to be learned or not."""
    if len(listing.classes) < 2:
        return []
    known = f"{len(listing.classes):,} classes, such as {', '.join(listing.classes[:3])}"
    if {name.lower() for name in listing.classes} <= PARTS:
        looks = "these look like the parts of a data set, not like classes"
        return [f"{known}; {looks}"] if conditional else []
    return [known if conditional else f"{known}; --conditional would tell them apart"]


def check_classes(listing: Listing) -> tuple[str, ...]:
    """The classes of `--conditional`: the first-level folders, if they can be.

    Raises:
        UserError: they are fewer than two, cannot be written in `--label=a,b`, may not be opened,
            or images lie outside of them.
    """
    folder = listing.folder
    classes = listing.classes
    outside = np.flatnonzero(listing.labels == -1)
    if listing.unreadable:
        raise UserError(f"--conditional: a folder may not be opened: {listing.unreadable[0]}")
    if len(classes) < 2:
        found = f"only {classes[0]} holds" if classes else "none holds"
        fault = f"--conditional takes the folders in {folder} for classes, but {found} images"
        raise UserError(f"{fault}; it needs two")
    if len(outside):
        example = listing.paths[outside[0]]
        fault = f"{counted(len(outside), 'image')} in no class, for instance {example}"
        way_out = f"move them into one of the folders in {folder}"
        raise UserError(f"--conditional: {fault}; {way_out}")
    for name in classes:
        if "," in name or name == "all" or not name.isprintable():
            fault = f"the folder {folder / name} cannot be written as --label={name}"
            raise UserError(f"--conditional: {fault}; rename it")
    return classes


# ---- the identity of a data set ------------------------------------------------------------------


def digest_of(path: str) -> bytes:
    """A digest of a file's content: all of it, or of a large one its head, middle and tail.

    Raises:
        MachineFault: it may not be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=DIGEST)
            if size <= WHOLE_FILE:
                digest.update(file.read())
                return digest.digest()
            for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
                file.seek(start)
                digest.update(file.read(SAMPLE))
            return digest.digest()
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MachineFault(f"{path}: {reason}") from error


def digests_of(folder: Path, names: tuple[str, ...], facts: np.ndarray) -> np.ndarray:
    """The digests of files, (N, DIGEST) uint8; most of them, a later start finds in the cache.

    A file is read again when its size, its times (that of its last change of name or rights, too)
    or its place on the disk is another.

    Args:
        folder: where they are.
        names: of the files below it.
        facts: (N, 4) int64, of each file: size, times of change, inode.

    Raises:
        UserError: a file may not be read.
    """
    joined = join(names)
    digests = np.zeros((len(names), DIGEST), np.uint8)
    missing = np.ones(len(names), bool)
    with contextlib.suppress(*BROKEN_FILE):
        known = load_digests(folder)
        if np.array_equal(known["names"], joined):
            digests = known["digests"]
            missing = (known["facts"] != facts).any(axis=1)
        else:
            rows = {name: row for row, name in enumerate(known["names"].tobytes().split(b"\0"))}
            for place, name in enumerate(joined.tobytes().split(b"\0")):
                row = rows.get(name)
                if row is not None and (known["facts"][row] == facts[place]).all():
                    digests[place] = known["digests"][row]
                    missing[place] = False
    places = np.flatnonzero(missing)
    if not len(places):
        return digests
    with progress_bar(len(places), title="checking images") as bar, ThreadPoolExecutor() as pool:
        try:
            found = pool.map(digest_of, (f"{folder}/{names[place]}" for place in places))
            for place, digest in zip(places, found, strict=True):
                digests[place] = np.frombuffer(digest, np.uint8)
                bar.update()
        except MachineFault as error:
            pool.shutdown(cancel_futures=True)
            raise UserError(f"{error}; every image must be readable, or be removed") from error
    return digests


def note_of(folder: Path) -> Path:
    """Where the digests of a folder's files are kept."""
    key = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape"))
    return CACHE / f"{key.hexdigest()[:16]}.digests.npz"


def join(names: Sequence[str]) -> np.ndarray:
    """Names as bytes, (L,) uint8, with zeros in between."""
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)


def load_digests(folder: Path) -> dict[str, np.ndarray]:
    """What `keep_digests` wrote.

    Raises:
        ValueError, and others of BROKEN_FILE: it is missing or damaged.
    """
    with np.load(note_of(folder), allow_pickle=False) as file:
        known = {name: file[name] for name in ("names", "facts", "digests", "sum")}
    count = known["facts"].shape[0]
    shapes = known["facts"].shape == (count, 4) and known["digests"].shape == (count, DIGEST)
    if not shapes or known["sum"].tobytes() != sum_of(known):
        raise ValueError("damaged")
    return known


def keep_digests(listing: Listing) -> None:
    """Keep digests with the facts by which it is known that they still hold."""
    known = {"names": join(listing.names), "facts": listing.facts, "digests": listing.digests}
    with contextlib.suppress(*BROKEN_FILE):
        kept = load_digests(listing.folder)
        if all(np.array_equal(kept[name], known[name]) for name in known):
            return
    known["sum"] = np.frombuffer(sum_of(known), np.uint8)
    with contextlib.suppress(OSError):  # it only saves time
        write_whole(note_of(listing.folder), lambda file: np.savez(file, **known))


def sum_of(known: dict[str, np.ndarray]) -> bytes:
    """A check sum of what is kept."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    for name in ("names", "facts", "digests"):
        digest.update(np.ascontiguousarray(known[name]))
    return digest.digest()
