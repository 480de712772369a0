"""The images of a source, most often a folder: told apart by their content, not decoded yet.

Reading order: Listing and list_images; classes; the identity of a data set.
"""

import contextlib
import gc
import hashlib
import io
import os
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from machinery.basics import BROKEN_FILE, UserError, counted, progress_bar, write_whole
from machinery.pixels import IMAGE_SUFFIXES, FileFault, MachineFault, read_bytes
from machinery.sources import Frame, Member, Row, look_into

CACHE = Path("datasets", ".cache")
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
WHOLE_FILE = 2**20  # bytes; larger files are told apart by three samples
SAMPLE = 2**18
DIGEST = 16  # bytes


class Listing(NamedTuple):
    """The images of a source (see sources.py), in one order on every system."""

    folder: Path  # or an archive, or a file with an array
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
    members: list  # what else than a folder's files there is: Member, Row, Frame; or empty
    cache: Path  # where decoded images are kept
    partners: "Listing | None" = None  # inputs from another folder, in the same order (inputs.py)

    @property
    def paths(self) -> list:
        """How to open each: the paths of files, or members."""
        return self.members or [f"{self.folder}/{name}" for name in self.names]

    def is_known_as(self, fingerprint: str) -> bool:
        """Whether a run with this fingerprint was trained on these files."""
        return fingerprint in (self.fingerprint, self.old_fingerprint)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Without Python's search for dead circles: a fifth of the time that a million names take."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@no_collections()
def list_images(folder: Path, cache: Path = CACHE, frames: str = "first") -> Listing:
    """All images of a folder or another source, not opened but for their fingerprint.

    Args:
        folder: or a .zip archive, or a .npy or .npz file.
        cache: where their digests are kept, and decoded images will be.
        frames: of animations, one of sources.FRAMES.

    Raises:
        UserError: there is no such source, it holds no images, or a file may not be read.
    """
    found = look_into(folder, cache, frames)
    if not found.files:
        more = "".join(f"; {sentence}" for sentence in found.remarks())
        raise UserError(f"--dataset={folder} holds no images ({', '.join(IMAGE_SUFFIXES)}){more}")
    names, sizes, *times, tops = zip(*found.files, strict=True)
    pairs = repr(list(zip(names, sizes, strict=True))).encode("utf-8", "surrogateescape")
    facts = np.array([sizes, *times], np.int64).T
    members = [found.members[name] for name in names] if found.members else []
    digests = digests_of(note_of(folder, cache), folder, names, facts, members)
    digest = hashlib.sha256(composed("\0".join(names)).encode("utf-8", "surrogateescape"))
    digest.update(digests.tobytes())
    tops = [composed(top) for top in tops]
    folders = (composed(name.partition("/")[0]) for name in names)
    # classes that names do not tell: an archive's or an array's labels
    if any(top not in ("", own) for top, own in zip(tops, folders, strict=True)):
        digest.update("\0".join(tops).encode("utf-8", "surrogateescape"))
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
        members,
        cache,
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
    if len(classes) < 2 and not folder.is_dir():
        rule = (
            "a .npz has `labels`, a whole number for each image; a .zip has folders or EDM's labels"
        )
        raise UserError(f"--conditional: {folder} holds no labels of two classes; {rule}")
    if len(classes) < 2:
        found = f"only {classes[0]} holds" if classes else "none holds"
        fault = f"--conditional takes the folders in {folder} for classes, but {found} images"
        raise UserError(f"{fault}; it needs two")
    if len(outside):
        example = listing.paths[outside[0]]
        fault = f"{counted(len(outside), 'image')} in no class, for instance {example}"
        way_out = f"move them into one of the folders in {folder}"
        if not folder.is_dir():
            way_out = "each image needs a label"
        raise UserError(f"--conditional: {fault}; {way_out}")
    for name in classes:
        if "," in name or name == "all" or not name.isprintable():
            fault = f"the folder {folder / name} cannot be written as --label={name}"
            raise UserError(f"--conditional: {fault}; rename it")
    return classes


# ---- the identity of a data set ------------------------------------------------------------------


def digest_of(path: str | Member | Row | Frame) -> bytes:
    """A digest of an image's content: all of it, or of a large one its head, middle and tail.

    Raises:
        MachineFault: it may not be read.
    """
    try:
        if not isinstance(path, str):
            with contextlib.suppress(FileFault):
                content = read_bytes(path)
                return digest_content(io.BytesIO(content), len(content))
            return hashlib.blake2b(repr(path[1:]).encode(), digest_size=DIGEST).digest()  # damaged
        with open(path, "rb") as file:
            return digest_content(file, os.fstat(file.fileno()).st_size)
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MachineFault(f"{path}: {reason}") from error


def digest_content(file: BinaryIO, size: int) -> bytes:
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=DIGEST)
    if size <= WHOLE_FILE:
        digest.update(file.read())
        return digest.digest()
    for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
        file.seek(start)
        digest.update(file.read(SAMPLE))
    return digest.digest()


def digests_of(
    note: Path, folder: Path, names: tuple[str, ...], facts: np.ndarray, members: list
) -> np.ndarray:
    """The digests of images, (N, DIGEST) uint8; most of them, a later start finds in the cache.

    A file is read again when its size, its times (that of its last change of name or rights, too)
    or its place on the disk is another.

    Args:
        note: where the digests are kept.
        folder: where the files are.
        names: of the files below it.
        facts: (N, 4) int64, of each file: size, times of change, inode.
        members: how to open each; empty for a folder.

    Raises:
        UserError: a file may not be read.
    """
    joined = join(names)
    digests = np.zeros((len(names), DIGEST), np.uint8)
    missing = np.ones(len(names), bool)
    with contextlib.suppress(*BROKEN_FILE):
        known = load_digests(note)
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
    paths = (members[place] if members else f"{folder}/{names[place]}" for place in places)
    with progress_bar(len(places), title="checking images") as bar, ThreadPoolExecutor() as pool:
        try:
            for place, digest in zip(places, pool.map(digest_of, paths), strict=True):
                digests[place] = np.frombuffer(digest, np.uint8)
                bar.update()
        except MachineFault as error:
            pool.shutdown(cancel_futures=True)
            raise UserError(f"{error}; every image must be readable, or be removed") from error
    return digests


def note_of(folder: Path, cache: Path) -> Path:
    """Where the digests of a source's images are kept."""
    key = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape"))
    return cache / f"{key.hexdigest()[:16]}.digests.npz"


def join(names: Sequence[str]) -> np.ndarray:
    """Names as bytes, (L,) uint8, with zeros in between."""
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)


def load_digests(note: Path) -> dict[str, np.ndarray]:
    """What `keep_digests` wrote.

    Raises:
        ValueError, and others of BROKEN_FILE: it is missing or damaged.
    """
    with np.load(note, allow_pickle=False) as file:
        known = {name: file[name] for name in ("names", "facts", "digests", "sum")}
    count = known["facts"].shape[0]
    shapes = known["facts"].shape == (count, 4) and known["digests"].shape == (count, DIGEST)
    if not shapes or known["sum"].tobytes() != sum_of(known):
        raise ValueError("damaged")
    return known


def keep_digests(listing: Listing) -> None:
    """Keep digests with the facts by which it is known that they still hold."""
    note = note_of(listing.folder, listing.cache)
    known = {"names": join(listing.names), "facts": listing.facts, "digests": listing.digests}
    with contextlib.suppress(*BROKEN_FILE):
        kept = load_digests(note)
        if all(np.array_equal(kept[name], known[name]) for name in known):
            return
    known["sum"] = np.frombuffer(sum_of(known), np.uint8)
    with contextlib.suppress(OSError):  # it only saves time
        write_whole(note, lambda file: np.savez(file, **known))


def sum_of(known: dict[str, np.ndarray]) -> bytes:
    """A check sum of what is kept."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    for name in ("names", "facts", "digests"):
        digest.update(np.ascontiguousarray(known[name]))
    return digest.digest()
