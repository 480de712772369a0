"""Where images are: a folder of files, a .zip archive, or an array in a .npy or .npz file.

A source is looked through without decoding an image. What it finds, pixels.py opens: the path of a
file, a `Member` of an archive, a `Row` of an array, or a `Frame` of an animation; all of them are
paths to `os.fspath`.

Reading order: Found; a folder; an archive; an array; an animation; look_into.
"""

import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from machinery.basics import (
    BROKEN_FILE,
    UserError,
    check_file,
    counted,
    make_folder,
    progress_bar,
    write_whole,
)
from machinery.pixels import (
    DEPTHS,
    HEIF_SUFFIXES,
    IMAGE_SUFFIXES,
    NUMBERS,
    OTHER_SUFFIXES,
    MachineFault,
    Scale,
    common_scale,
    extremes,
    frames_of,
    has_heif,
    levels_of,
    open_image,
    read_bytes,
)

OWN_FOLDERS = ("models", "results", "runs")  # what training writes is no data set to learn from
ARCHIVES = (".zip", ".npy", ".npz")
UNPACKED = "python -m tools.unpack makes a folder of parquet, tar, MNIST, CIFAR and sprite sheets"
# An archive's entry of more bytes than this, or packed so well from so many, is no image.
LARGEST_ENTRY = 2**29
SUSPICIOUS_ENTRY = 2**24
BEST_PACKING = 200
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Found:
    """What there is in a source, and what is passed over."""

    def __init__(self):
        self.files = []  # (name, size, mtime, ctime, inode or what stands for it, class or "")
        self.members = {}  # by name, how to open it; empty for a folder
        self.unreadable = []  # folders
        self.dead_links = []
        self.own_folders = []
        self.others = Counter()  # suffixes of images that are not read
        self.about = []  # what else is to be told, a sentence each

    def is_image(self, name: str) -> bool:
        """Whether a file of this name is looked at; images of other kinds are counted."""
        lower = name.lower()
        if lower.endswith(HEIF_SUFFIXES) and name[0] != "." and has_heif():
            return True
        if name[:1] == "." or not lower.endswith(IMAGE_SUFFIXES):
            if lower.endswith(OTHER_SUFFIXES) and name[0] != ".":
                self.others[os.path.splitext(lower)[1]] += 1
            return False
        return True

    def remarks(self) -> list[str]:
        """What was passed over, with its number and an example."""
        sentences = list(self.about)
        if self.unreadable:
            number = counted(len(self.unreadable), "folder")
            sentences.append(f"{number} may not be opened, left out: {self.unreadable[0]}")
        if self.dead_links:
            number = counted(len(self.dead_links), "dead link")
            sentences.append(f"{number}, such as {self.dead_links[0]}")
        if self.others:
            kinds = ", ".join(suffix for suffix, _ in self.others.most_common(5))
            number = counted(self.others.total(), "image")
            way_out = ""
            if any(suffix in HEIF_SUFFIXES for suffix in self.others):
                way_out = " (pip install pillow-heif has HEIC read)"
            left_out = f"{number} of kinds that are not read, left out: {kinds}"
            sentences.append(left_out + way_out)
        if self.own_folders:
            sentences.append(f"left out, since training writes there: {self.own_folders[0]}")
        return sentences


def refusal(source: str, fault: str, error: Exception) -> UserError:
    """Why a source cannot be read, in one line: for a fault of its own, or of the machine."""
    if isinstance(error, MemoryError):
        return UserError(f"{source}: not enough memory")
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return UserError(f"{source}: {error.strerror}")
    reason = " ".join(str(error).split()) or type(error).__name__
    if "allow_pickle" in reason or "Python objects" in reason:
        reason = "it holds Python objects, which are never loaded"
    return UserError(f"{source} {fault} ({reason})")


# ---- a folder ------------------------------------------------------------------------------------


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
            if not found.is_image(name):
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


# ---- an archive ----------------------------------------------------------------------------------


class Member(NamedTuple):
    """An image in a .zip archive, read in place: nothing is unpacked to the disk."""

    archive: str
    name: str  # as it is listed
    start: int  # of its local header, in bytes
    packed: int  # bytes
    size: int  # bytes, unpacked
    crc: int
    method: int  # one of METHODS

    def __fspath__(self) -> str:
        return f"{self.archive}/{self.name}"

    __str__ = __fspath__

    def read_bytes(self) -> bytes:
        """Its content, of `size` bytes: no more are ever unpacked.

        Raises:
            OSError: the archive may not be read.
            zipfile.BadZipFile, zlib.error: the member is damaged.
        """
        with open(self.archive, "rb") as file:
            file.seek(self.start)
            header = file.read(30)  # APPNOTE.TXT of PKWARE, 4.3.7
            if len(header) < 30 or header[:4] != b"PK\3\4":
                raise zipfile.BadZipFile("no member begins where the archive says")
            name_length, extra_length = struct.unpack("<HH", header[26:])
            file.seek(name_length + extra_length, os.SEEK_CUR)
            data = file.read(self.packed)
        if self.method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1)
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise zipfile.BadZipFile("damaged in the archive: its check sum is another")
        return data


def check_entry(archive: str, entry: zipfile.ZipInfo) -> None:
    """Refuse an archive for an entry that leads out of it."""
    name = entry.filename
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or re.match("[A-Za-z]:", name):
        raise UserError(f"{archive} is refused: the path of its entry {name} leads out of it")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise UserError(f"{archive} is refused: its entry {name} is a symbolic link")


def check_image_entry(archive: str, entry: zipfile.ZipInfo) -> None:
    """Refuse an archive for an image that is packed as none is, or cannot be read in place."""
    name = entry.filename
    packed_as = f"{entry.file_size:,} bytes packed into {entry.compress_size:,}"
    is_bomb = entry.file_size > max(SUSPICIOUS_ENTRY, BEST_PACKING * entry.compress_size)
    if is_bomb or entry.file_size > LARGEST_ENTRY:
        raise UserError(f"{archive} is refused: its entry {name} is no image ({packed_as})")
    way_out = "unpack it, and give --dataset the folder"
    if entry.flag_bits & 1:
        raise UserError(f"{archive}: {entry.filename} is encrypted; {way_out}")
    if entry.compress_type not in METHODS:
        kind = zipfile.compressor_names.get(entry.compress_type, entry.compress_type)
        raise UserError(f"{archive}: {entry.filename} is packed by {kind}; {way_out}")


def entries_of(archive: Path) -> list[zipfile.ZipInfo]:
    """What an archive lists, checked; nothing is read yet.

    Raises:
        UserError: it is none, or a hostile one.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            entries = [entry for entry in file.infolist() if not entry.is_dir()]
    except BROKEN_FILE as error:
        raise refusal(str(archive), "is no .zip archive that can be read", error) from error
    for entry in entries:
        check_entry(str(archive), entry)
    counts = Counter(entry.filename.replace("\\", "/") for entry in entries)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{archive} is refused: it has several entries of the name {twice[0]}")
    packed = sum(entry.compress_size for entry in entries)
    if packed > archive.stat().st_size:
        raise UserError(f"{archive} is refused: its entries overlap, or it was cut off")
    return entries


def labels_in(archive: Path, entries: list[zipfile.ZipInfo]) -> dict[str, str]:
    """The classes of entries by their names, from EDM's dataset.json; empty where there is none.

    It holds {"labels": [["00000/img00000000.png", 6], ...]}, or null for none.
    """
    entry = next((entry for entry in entries if entry.filename == "dataset.json"), None)
    if entry is None:
        return {}
    check_image_entry(str(archive), entry)
    try:
        labels = json.loads(member_of(archive, entry, entry.filename).read_bytes())["labels"]
        known = {name.replace("\\", "/"): label for name, label in labels or ()}
        is_right = all(type(label) is int and label >= 0 for label in known.values())
    except OSError as error:
        raise UserError(f"{archive}: {error.strerror or error}") from error
    except (*BROKEN_FILE, RecursionError):
        is_right = False
    if not is_right:
        rule = 'it takes {"labels": [["name.png", 6], ...]}'
        raise UserError(f"{archive}: its dataset.json has other labels than known; {rule}")
    return {name: str(label) for name, label in known.items()}


def member_of(archive: Path, entry: zipfile.ZipInfo, name: str) -> Member:
    return Member(
        str(archive),
        name,
        entry.header_offset,
        entry.compress_size,
        entry.file_size,
        entry.CRC,
        entry.compress_type,
    )


def open_zip(archive: Path) -> Found:
    """All images in an archive, but for hidden ones.

    Folders that hold everything are passed over, so that the next ones may be classes.
    """
    found = Found()
    entries = entries_of(archive)
    labels = labels_in(archive, entries)
    info = archive.stat()
    images = []
    for entry in entries:
        name = entry.filename.replace("\\", "/")
        *folders, last = name.split("/")
        is_hidden = any(folder.startswith(".") for folder in folders)
        if not is_hidden and found.is_image(last):
            check_image_entry(str(archive), entry)
            images.append((name, folders, entry))
    places = [folders for _, folders, _ in images] or [[]]
    ends = zip(min(places), max(places), strict=False)  # in order: what they share, all share
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], ends)))
    for name, folders, entry in images:
        short = "/".join(name.split("/")[shared:])
        top = labels.get(name, "") if labels else "".join(folders[shared:][:1])
        facts = (entry.file_size, info.st_mtime_ns, info.st_ctime_ns, entry.header_offset)
        found.files.append((short, *facts, top))
        found.members[short] = member_of(archive, entry, short)
    found.files.sort()
    if labels and (missing := [file[0] for file in found.files if not file[5]]):
        found.about.append(
            f"{len(missing):,} images have no label in dataset.json, such as {missing[0]}"
        )
    return found


# ---- an array ------------------------------------------------------------------------------------


class ArrayFile(NamedTuple):
    """Images in one array of a .npy file, mapped from the disk: no more than is used is read."""

    path: str
    stamp: tuple[int, int]  # when the file was changed, and where it lies on the disk
    shown_as: str  # the source that the user named
    channels: int
    is_channels_first: bool
    scale: Scale  # what is black and what is white, of the whole array


class Row(NamedTuple):
    """An image of an array."""

    array: ArrayFile
    index: int

    def __fspath__(self) -> str:
        return f"{self.array.shown_as}[{self.index}]"

    __str__ = __fspath__

    def numbers(self) -> np.ndarray:
        """As they are in the array, but (H, W, C)."""
        try:
            numbers = mapped(self.array)[self.index]
        except (OSError, ValueError) as error:  # it could be read when it was looked through
            raise MachineFault(f"{self.array.path}: {error}") from error
        if numbers.ndim == 2:
            return numbers[:, :, None]
        return np.moveaxis(numbers, 0, 2) if self.array.is_channels_first else numbers

    def read_bytes(self) -> bytes:
        """What it is known by: numbers, their kind, shape and scale."""
        numbers = self.numbers()
        about = (numbers.dtype.str, numbers.shape, self.array.scale)
        return repr(about).encode() + numbers.tobytes()

    def levels(self, depth: int) -> np.ndarray:
        """Its numbers as levels of 8 or 16 bits, (H, W, C)."""
        numbers = self.numbers()
        if numbers.dtype == DEPTHS[depth]:
            return numbers
        return levels_of(numbers, self.array.scale, depth)

    def picture(self) -> Image.Image:
        """It with 8 bits, in gray, RGB or RGBA."""
        levels = self.levels(8)
        if levels.shape[2] not in (1, 3, 4):
            count = levels.shape[2]
            raise ValueError(f"{count} channels are no colors; --mode={count} learns them")
        return Image.fromarray(
            np.ascontiguousarray(levels.squeeze(2) if levels.shape[2] == 1 else levels)
        )


@functools.lru_cache(maxsize=4)
def mapped(array: ArrayFile) -> np.ndarray:
    """The array of a file, which is not read as a whole."""
    return np.load(array.path, mmap_mode="r", allow_pickle=False)


def load_array(path: Path, shown_as: str) -> np.ndarray:
    """The array of a .npy file, mapped from the disk.

    Raises:
        UserError: it is none, or holds Python objects, which could run code.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except BROKEN_FILE as error:
        raise refusal(shown_as, "is no array that can be read", error) from error


def layout_of(array: np.ndarray, shown_as: str) -> tuple[int, bool]:
    """How many channels an array of images has, and whether they come first.

    One, three or four are taken for channels before any other number, the last axis before the
    second; then the shorter of these.

    Raises:
        UserError: it holds no images, or numbers of another kind.
    """
    shape = "x".join(map(str, array.shape))
    if array.dtype.kind != "f" and array.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        kinds = "uint8, uint16 or floats; astype of NumPy makes these"
        raise UserError(f"{shown_as} has numbers of the kind {array.dtype}; it takes {kinds}")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and 0 not in array.shape:
        return 1, False
    if array.ndim == 4 and 0 not in array.shape:
        _, second, _, last = array.shape
        is_first = last not in (1, 3, 4) and (second in (1, 3, 4) or second < last)
        channels = second if is_first else last
        if channels in (1, 3, 4) or str(channels) in NUMBERS:
            return channels, is_first
    rule = "(N, H, W), (N, H, W, C) or (N, C, H, W), with 1 to 64 channels C"
    raise UserError(f"{shown_as} has the shape {shape}; it takes {rule}")


def scale_of_array(array: np.ndarray, shown_as: str) -> Scale:
    """One scale for the whole array; that of whole numbers is what their kind can hold.

    Raises:
        UserError: some numbers are NaN or infinite.
    """
    if array.dtype.kind == "u":
        return Scale(0, np.iinfo(array.dtype).max)
    scales = []
    for index, image in enumerate(array):
        if not np.isfinite(image).all():
            fault = f"its image {index} has numbers that are NaN or infinite"
            raise UserError(f"{shown_as}: {fault}; replace them (numpy.nan_to_num)")
        scales.append(extremes(image))
    return common_scale(scales)


def open_array(
    path: Path, shown_as: str, info: os.stat_result, labels: np.ndarray | None = None
) -> Found:
    """All images of an array in a .npy file, in their order; with labels, these are the classes.

    Args:
        path: of the array.
        shown_as, info: of the file that the user named.
        labels: (N,) whole numbers.
    """
    array = load_array(path, shown_as)
    channels, is_first = layout_of(array, shown_as)
    scale = scale_of_array(array, shown_as)
    own = os.stat(path)
    file = ArrayFile(str(path), (own.st_mtime_ns, own.st_ino), shown_as, channels, is_first, scale)
    found = Found()
    if array.dtype != np.uint8:
        about = f"numbers of the kind {array.dtype}"
        found.about.append(f"{about}: {scale.black:g} is black, {scale.white:g} is white")
    size = array[0].nbytes
    for index in range(len(array)):
        name = f"{index:08d}"
        top = "" if labels is None else str(labels[index])
        found.files.append((name, size, info.st_mtime_ns, info.st_ctime_ns, index, top))
        found.members[name] = Row(file, index)
    return found


def pick(kind: str, names: list[str], shown_as: str) -> str | None:
    """The array that is meant, of several: the only one, or that for training.

    Raises:
        UserError: nobody knows.
    """
    chosen = names if len(names) < 2 else [name for name in names if "train" in name.lower()]
    if len(chosen) > 1 or (names and not chosen):
        rule = "save the one that is meant as a file of its own"
        raise UserError(f"{shown_as} has several arrays of {kind}: {', '.join(names)}; {rule}")
    return chosen[0] if chosen else None


def header_of(file) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, kind and length of the header of an array in a .npy file.

    Raises:
        ValueError: it is none.
    """
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0}
    shape, _, kind = read.get(version, np.lib.format.read_array_header_2_0)(file)
    return shape, kind, file.tell()


def headers_in(path: Path, entries: dict[str, zipfile.ZipInfo]) -> dict[str, tuple]:
    """Shape, kind and length of the header of each array of a .npz file.

    Raises:
        UserError: one is no array, holds Python objects, or is not as long as it says.
    """
    headers = {}
    for name, entry in entries.items():
        try:
            with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
                shape, kind, length = header_of(file)
        except BROKEN_FILE as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: its entry {name} is no array ({reason})") from error
        if kind.hasobject:
            fault = f"its array {name} holds Python objects, which are never loaded"
            raise UserError(f"{path} is refused: {fault}")
        if length + math.prod(shape) * kind.itemsize != entry.file_size:
            raise UserError(f"{path} is refused: its array {name} is not as long as it says")
        headers[name] = (shape, kind)
    return headers


def open_npz(path: Path, cache: Path) -> Found:
    """The images of a .npz file, and their labels if it has them.

    Its array is unpacked to `cache`, from where it can be mapped.
    """
    entries = {entry.filename.removesuffix(".npy"): entry for entry in entries_of_npz(path)}
    headers = headers_in(path, entries)
    images = [name for name, (shape, _) in headers.items() if len(shape) > 2]
    chosen = pick("images", images, str(path))
    if chosen is None:
        raise UserError(f"{path} has no array of images (arrays: {', '.join(headers) or 'none'})")
    count = headers[chosen][0][0]
    labels = [
        name
        for name, (shape, kind) in headers.items()
        if kind.kind in "iu" and shape in ((count,), (count, 1))
    ]
    name = pick("labels", labels, str(path))
    found = open_array(
        unpack_array(path, entries[chosen], cache),
        f"{path}:{chosen}",
        path.stat(),
        name and load_array(unpack_array(path, entries[name], cache), f"{path}:{name}").ravel(),
    )
    if others := [each for each in headers if each not in (chosen, name)]:
        found.about.append(f"arrays that are left out: {', '.join(others)}")
    return found


def entries_of_npz(path: Path) -> list[zipfile.ZipInfo]:
    """What a .npz file lists, checked.

    Raises:
        UserError: it is none, or a hostile one.
    """
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except BROKEN_FILE as error:
        raise refusal(str(path), "is no .npz file that can be read", error) from error
    for entry in entries:
        packed_as = f"{entry.file_size:,} bytes packed into {entry.compress_size:,}"
        if entry.file_size > max(2**30, BEST_PACKING * entry.compress_size):
            raise UserError(f"{path} is refused: its array {entry.filename} has {packed_as}")
        if entry.flag_bits & 1 or entry.compress_type not in METHODS:
            raise UserError(f"{path} is refused: {entry.filename} is encrypted or oddly packed")
    return entries


def unpack_array(path: Path, entry: zipfile.ZipInfo, cache: Path) -> Path:
    """An array of a .npz file, unpacked to `cache` unless it is there, whole and undamaged."""
    info = path.stat()
    about = (os.path.realpath(path), entry.filename, entry.CRC, entry.file_size, info.st_mtime_ns)
    key = hashlib.sha256(repr(about).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    unpacked = cache / f"{key}.npy"
    check_file(unpacked)
    if unpacked.exists() and crc_of(unpacked) == (entry.file_size, entry.CRC):
        os.utime(unpacked)  # it was used now
        return unpacked
    make_folder(cache)
    room = shutil.disk_usage(cache).free
    if entry.file_size > room:
        needed = f"{entry.file_size:,} bytes, of which {room:,} are free"
        raise UserError(f"{path}: unpacking its array to {cache} takes {needed}")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(entry) as source:
            write_whole(unpacked, lambda file: shutil.copyfileobj(source, file, 2**20))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} cannot be read: {entry.filename} is damaged ({error})") from error
    return unpacked


def crc_of(path: Path) -> tuple[int, int]:
    """A file's length and check sum."""
    length, crc = 0, 0
    with open(path, "rb") as file:
        while data := file.read(2**20):
            length += len(data)
            crc = zlib.crc32(data, crc)
    return length, crc


# ---- an animation --------------------------------------------------------------------------------

FRAMES = {"first": "of animations", "all": "as images of their own"}
MANY_FRAMES = 10_000  # of one file


class Frame(NamedTuple):
    """A frame of an animation, or a page of a TIFF."""

    source: str | Member  # its file
    index: int

    def __fspath__(self) -> str:
        return f"{os.fspath(self.source)}[{self.index}]"

    __str__ = __fspath__

    def read_bytes(self) -> bytes:
        """What it is known by: its file, and which it is there."""
        return self.index.to_bytes(4, "little") + read_bytes(self.source)

    def picture(self) -> Image.Image:
        """It alone."""
        with open_image(read_bytes(self.source)) as film:
            film.seek(self.index)
            return film.copy()


def take_apart(found: Found, folder: Path) -> Found:
    """Each frame of each animation as an image of its own: NAME/00000, NAME/00001, ...

    Raises:
        UserError: a file may not be read, or says that it has more frames than MANY_FRAMES.
    """
    files = found.files
    sources = [found.members.get(name, f"{folder}/{name}") for name, *_ in files]
    found.files, found.members = [], {}
    with progress_bar(len(files), title="counting frames") as bar, ThreadPoolExecutor() as pool:
        try:
            counts = pool.map(frames_of, sources)
            for (name, *facts), source, count in zip(files, sources, counts, strict=True):
                if count > MANY_FRAMES:
                    raise UserError(f"{source} says that it has {count:,} frames")
                for index in range(count) if count > 1 else ():
                    found.files.append((f"{name}/{index:05d}", *facts))
                    found.members[f"{name}/{index:05d}"] = Frame(source, index)
                if count == 1:
                    found.files.append((name, *facts))
                    found.members[name] = source
                bar.update()
        except MachineFault as error:
            pool.shutdown(cancel_futures=True)
            raise UserError(f"{error}; every image must be readable, or be removed") from error
    found.files.sort()
    return found


# ---- any of them ---------------------------------------------------------------------------------


def look_into(source: Path, cache: Path, frames: str) -> Found:
    """What there is in a folder, a .zip archive, or a .npy or .npz file.

    Args:
        cache: where an array is unpacked to that cannot be mapped where it is.
        frames: one of FRAMES.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    is_folder = source.is_dir()
    if not is_folder:
        check_source(source)
    suffix = source.suffix.lower()
    if is_folder or suffix == ".zip":
        found = walk(source) if is_folder else open_zip(source)
        return take_apart(found, source) if frames == "all" else found
    if suffix == ".npz":
        return open_npz(source, cache)
    return open_array(source, str(source), source.stat())


def check_source(source: Path) -> None:
    """Refuse what is no source of images."""
    if source.is_file() and source.suffix.lower() in ARCHIVES:
        return
    there = sorted(path.name for path in Path("datasets").glob("[!.]*") if path.is_dir())
    others = ", ".join(there) or "none"
    wrong = "is a file" if source.exists() else "does not exist"
    rule = f"it takes any folder of images (in datasets/ there are: {others}), a .zip, .npy or .npz"
    more = f"; {UNPACKED}" if source.exists() else ""
    raise UserError(f"--dataset={source} {wrong}; {rule}{more}")
