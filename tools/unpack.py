"""Make a folder of images of what data sets come as: parquet, tar, MNIST, CIFAR, sprite sheets.

    python -m tools.unpack --source=train.parquet --to=datasets/flowers
    python -m tools.unpack --source=cifar-10-batches-py --to=datasets/cifar
    python -m tools.unpack --source=sheet.png --tile=16x16 --to=datasets/sprites

Nothing in these files is executed. Classes become folders. (A .zip, .npy or .npz needs none of
this: `--dataset` takes it.)

Reading order: Found images; the kinds of sources, one by one; the folder they go to; unpack.
"""

import contextlib
import gzip
import itertools
import json
import pickle
import re
import struct
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from machinery import basics, command_line
from machinery.basics import BROKEN_FILE, UserError, counted
from machinery.command_line import FilePath, as_typed
from machinery.pixels import IMAGE_SUFFIXES, open_image
from machinery.sources import BEST_PACKING, LARGEST_ENTRY, SUSPICIOUS_ENTRY

LIMITS = {}
# the suffixes that the content of an image file gets
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2", "TIFF": ".tif", "DIB": ".bmp"}


class Found(NamedTuple):
    """An image in a source, as a file's content or as pixels."""

    name: str  # without a suffix
    label: str  # "" for none
    image: bytes | Image.Image


def is_number(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ---- parquet -------------------------------------------------------------------------------------


def read_parquet(source: Path, tell: Callable[[str], None]) -> Iterator[Found]:
    """The images of a Hub data set: a column of files' contents, and one of labels if there is."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("parquet files need one more package: pip install pyarrow") from error
    paths = [source]
    if source.is_dir():
        paths = sorted(source.rglob("*.parquet"))
        if train := [path for path in paths if path.name.startswith("train")]:
            if left_out := [path.name for path in paths if path not in train]:
                tell(f"{len(left_out)} files that are not for training, left out: {left_out[0]}")
            paths = train
    number = 0
    for path in paths:
        with parquet.ParquetFile(path) as file:
            image, label, names = columns_of(file, path)
            wanted = [column for column in (image, label) if column]
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                for row in batch.to_pylist():
                    yield Found(f"{number:08d}", label_of(row, label, names), bytes_of(row[image]))
                    number += 1


def columns_of(file, path: Path) -> tuple[str, str, list[str]]:
    """The columns of images and of labels ("" for none), and the names that numbers stand for."""
    import pyarrow

    schema = file.schema_arrow

    def is_image(kind) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(field.name == "bytes" and is_image(field.type) for field in kind)
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    images = [field.name for field in schema if is_image(field.type)]
    if not images:
        raise UserError(f"{path} has no column of images (columns: {', '.join(schema.names)})")
    label = next((name for name in ("label", "labels", "fine_label") if name in schema.names), "")
    names = []
    with contextlib.suppress(*BROKEN_FILE):
        about = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
        names = [str(name) for name in about["names"]]
    return images[0], label, names


def label_of(row: dict, label: str, names: list[str]) -> str:
    value = row.get(label) if label else None
    if is_number(value) and 0 <= value < len(names):
        return names[value]
    return "" if value is None else str(value)


def bytes_of(value) -> bytes:
    """The content of a file: alone, or beside its path; nothing where there is none."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else b""


# ---- what is packed by gzip ----------------------------------------------------------------------


class Unzipped:
    """The content of a .gz file, read from its start; a bomb is refused.

    Args:
        path: of the file; any other kind is read as it is.
    """

    def __init__(self, path: Path):
        self.path = path
        self.raw = open(path, "rb")
        self.file = gzip.GzipFile(fileobj=self.raw) if path.suffix in (".gz", ".tgz") else self.raw
        self.count = 0  # bytes so far

    def __enter__(self) -> "Unzipped":
        return self

    def __exit__(self, *_) -> None:
        self.raw.close()

    def read(self, size: int) -> bytes:
        """The next bytes, `size` of them unless it ends."""
        data = self.file.read(size)
        self.count += len(data)
        if self.count > max(SUSPICIOUS_ENTRY, BEST_PACKING * self.raw.tell()):
            packed = f"{self.count:,} bytes of {self.raw.tell():,}"
            raise UserError(f"{self.path} is refused: it unpacks as no images do ({packed})")
        return data


# ---- tar -----------------------------------------------------------------------------------------


def check_path(source: Path, name: str) -> Path:
    """Refuse an archive for an entry that leads out of it."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name) or "\\" in name:
        raise UserError(f"{source} is refused: the path of its entry {name} leads out of it")
    return path


def check_entry(source: Path, member: tarfile.TarInfo) -> Path:
    """The path of an entry of a .tar that leads nowhere else, and is no bomb."""
    path = check_path(source, member.name)
    if member.isfile() and member.size > LARGEST_ENTRY:
        raise UserError(f"{source} is refused: {member.name} has {member.size:,} bytes")
    return path


def shared_folders(source: Path) -> int:
    """How many folders hold all images of a .tar: the next ones may be classes."""
    shared = None
    with Unzipped(source) as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            path = check_entry(source, member)
            if member.isfile() and path.name.lower().endswith(IMAGE_SUFFIXES):
                folders = path.parent.parts
                pairs = zip(folders if shared is None else shared, folders, strict=False)
                alike = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
                shared = [folder for folder, _ in alike]
    return len(shared or ())


def read_tar(source: Path, tell: Callable[[str], None]) -> Iterator[Found]:
    """The images of an archive; those of a webdataset have their class beside them, in X.cls.

    Nothing is unpacked by its own path. Links, devices and pipes are passed over.
    """
    passed_over = Counter()
    waiting = []  # images whose key is the last one; their class may follow
    last_key, label = "", ""
    shared = shared_folders(source)
    with Unzipped(source) as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            path = check_entry(source, member)
            stem, dot, suffix = path.name.partition(".")
            key = f"{path.parent}/{stem}"
            if key != last_key:
                yield from labelled(waiting, label)
                waiting, last_key, label = [], key, ""
            if not member.isfile() or stem == "":
                passed_over["links or special files"] += not (member.isdir() or member.isfile())
                continue
            if dot and f".{suffix}".lower().endswith(IMAGE_SUFFIXES):
                folder, *others = path.parts[shared:-1] or [""]
                place = "_".join((*others, path.name.rpartition(".")[0]))
                waiting.append(Found(place, folder, archive.extractfile(member).read()))
            elif suffix == "cls":
                label = archive.extractfile(member).read(1000).decode(errors="replace").strip()
            else:
                passed_over["files that are no images"] += 1
        yield from labelled(waiting, label)
    for what, number in passed_over.items():
        if number:
            tell(f"{number:,} {what}, left out")


def labelled(images: list[Found], label: str) -> Iterator[Found]:
    for found in images:
        yield found._replace(label=label) if label else found


# ---- MNIST ---------------------------------------------------------------------------------------


def read_mnist(source: Path, tell: Callable[[str], None]) -> Iterator[Found]:
    """The images of an "idx3-ubyte" file; labels are in the "idx1-ubyte" file beside it."""
    other = source.name.replace("images", "labels").replace("idx3", "idx1")
    labels = None
    if other != source.name and (source.parent / other).is_file():
        with Unzipped(source.parent / other) as file:
            magic, count = struct.unpack(">II", file.read(8))
            labels = file.read(count)
        if magic != 0x801 or len(labels) != count:
            raise UserError(f"{source.parent / other} is no file of labels, or is cut off")
    else:
        tell(f"there are no labels: {other} is not beside it")
    with Unzipped(source) as file:
        magic, count, height, width = struct.unpack(">IIII", file.read(16))
        size = height * width
        if magic != 0x803 or not 0 < size <= 2048**2:
            raise UserError(f"{source} is no file of images of the kind idx3-ubyte")
        if labels is not None and len(labels) != count:
            raise UserError(f"{source} has {count:,} images, and {other} {len(labels):,} labels")
        for number in range(count):
            data = file.read(size)
            if len(data) != size:
                raise UserError(f"{source} is cut off: it has {number:,} of {count:,} images")
            image = Image.frombytes("L", (width, height), data)
            yield Found(f"{number:08d}", "" if labels is None else str(labels[number]), image)


# ---- CIFAR ---------------------------------------------------------------------------------------

CIFAR_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")


class Array:
    """What stands for a NumPy array while its pickle is read: no code of NumPy is called."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state) -> None:
        self.state = state  # (version, shape, kind, is_fortran, content)

    def rows(self) -> np.ndarray:
        """The array, (N, 3072) uint8."""
        _, shape, kind, is_fortran, content = self.state
        if kind.name not in (b"u1", "u1") or is_fortran or not isinstance(content, bytes):
            raise ValueError("an array of another kind")
        return np.frombuffer(content, np.uint8).reshape(shape[0], 3072)


class Kind:
    """What stands for a NumPy dtype."""

    def __init__(self, name="", *_):
        self.name = name

    def __setstate__(self, state) -> None:
        """Byte orders and the like, which a byte has not."""


def latin(text: str, _encoding: str) -> bytes:
    """What stands for _codecs.encode, by which Python 3 writes bytes for Python 2."""
    return text.encode("latin-1")


STAND_INS = {("_codecs", "encode"): latin}
for core in ("numpy.core", "numpy._core"):
    STAND_INS[f"{core}.multiarray", "_reconstruct"] = Array
STAND_INS |= {("numpy", "ndarray"): Array, ("numpy", "dtype"): Kind}


class Unpickler(pickle._Unpickler):  # in Python: that in C takes memory for what a file only claims
    """Reads numbers, text, lists, dicts and arrays; whatever else a pickle asks for is refused."""

    def find_class(self, module: str, name: str):
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is never loaded")
        return STAND_INS[module, name]


def unpickle(path: Path) -> dict:
    """The dict that a CIFAR file holds.

    Raises:
        UserError: it holds something else, or asks for code.
    """
    try:
        with open(path, "rb") as file:
            found = Unpickler(file, encoding="bytes").load()
        if not isinstance(found, dict):
            raise ValueError("no dict")
        return found
    except (*BROKEN_FILE, RecursionError) as error:
        raise UserError(f"{path} is no CIFAR file that can be read ({error})") from error


def read_cifar(source: Path, tell: Callable[[str], None]) -> Iterator[Found]:
    """The training images of CIFAR-10 or CIFAR-100, in the folder it is unpacked to, or one file.

    Images are 32x32, stored as their red, green and blue planes.
    """
    folder = source if source.is_dir() else source.parent
    names = [source.name]
    if source.is_dir():
        names = [name for name in (*CIFAR_BATCHES, "train") if (folder / name).is_file()]
        for other in ("test_batch", "test"):
            if (folder / other).is_file():
                tell(f"the test images are left out; --source={folder / other} reads them")
    known = {}
    for meta in ("batches.meta", "meta"):
        if (folder / meta).is_file():
            known = unpickle(folder / meta)
    classes = known.get(b"label_names") or known.get(b"fine_label_names") or []
    for name in names:
        batch = unpickle(folder / name)
        try:
            rows = batch[b"data"].rows()
            labels = batch.get(b"labels") or batch[b"fine_labels"]
            texts = [classes[label].decode() if classes else str(int(label)) for label in labels]
            pairs = list(zip(rows, texts, strict=True))
        except BROKEN_FILE as error:
            fault = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{folder / name} is no CIFAR file that can be read ({fault})"
            ) from error
        for number, (row, text) in enumerate(pairs):
            image = Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0).copy())
            yield Found(f"{name}_{number:05d}", text, image)


# ---- sprite sheets -------------------------------------------------------------------------------


def read_sheets(
    source: Path, tile: tuple[int, ...], tell: Callable[[str], None]
) -> Iterator[Found]:
    """The tiles of a sheet, or of all sheets in a folder: by rows, but for those of one color."""
    height, width = tile[0], tile[-1]
    sheets = [source]
    if source.is_dir():
        sheets = sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    blank = 0
    for path in sheets:
        with sheet_faults(path), open_image(path.read_bytes()) as sheet:
            picture = sheet.convert("RGBA" if sheet.has_transparency_data else "RGB")
        if picture.height < height or picture.width < width:
            size = f"{picture.height}x{picture.width}"
            raise UserError(f"{path} is {size}: smaller than --tile={as_typed('img_size', tile)}")
        rest = (picture.height % height, picture.width % width)
        if rest != (0, 0):
            size = f"{picture.height}x{picture.width} is no multiple of the tile"
            tell(f"{path}: {size}; {rest[0]} rows and {rest[1]} columns of pixels are left out")
        for top in range(0, picture.height - height + 1, height):
            for left in range(0, picture.width - width + 1, width):
                part = picture.crop((left, top, left + width, top + height))
                if all(low == high for low, high in part_extremes(part)):
                    blank += 1
                    continue
                place = f"{path.stem}_{top // height:03d}_{left // width:03d}"
                yield Found(place, "", part)
    if blank:
        tell(f"{blank:,} tiles of one color only, left out")


def part_extremes(part: Image.Image) -> list[tuple[int, int]]:
    """The lowest and highest level of each channel; of what is transparent throughout, of alpha."""
    found = list(part.getextrema())
    return found[3:] if len(found) == 4 and found[3] == (0, 0) else found


@contextlib.contextmanager
def sheet_faults(path: Path) -> Iterator[None]:
    """What is wrong with an image that a flag names, in one line."""
    try:
        yield
    except BROKEN_FILE as error:
        raise UserError(f"{path} is no image that can be read ({error})") from error


# ---- the folder they go to -----------------------------------------------------------------------


def plain_name(text: str) -> str:
    """Text as the name of a file or folder on any system: no path, not hidden, not endless."""
    text = unicodedata.normalize("NFC", text)
    plain = "".join(letter if letter.isalnum() or letter in "-_+() ." else "_" for letter in text)
    return plain.strip(" .")[:100] or "_"


class Folder:
    """A folder that images are written to, in a folder for each class.

    Args:
        place: where they go.
    """

    def __init__(self, place: Path):
        self.place = place
        self.folders = {"": place}  # of each label
        self.taken = set()  # names in lower case: some systems do not tell them apart
        self.count = 0
        self.unusable = []

    def free_name(self, name: str) -> str:
        """This name, or with a number behind it the first one that is not taken yet."""
        free, number = name, 1
        while free.lower() in self.taken:
            number += 1
            free = f"{name}_{number}"
        self.taken.add(free.lower())
        return free

    def add(self, found: Found) -> None:
        if found.label not in self.folders:
            self.folders[found.label] = self.place / self.free_name(plain_name(found.label))
            self.folders[found.label].mkdir()
        suffix = ".png"
        if isinstance(found.image, bytes):
            try:
                with open_image(found.image) as picture:
                    kind = picture.format
            except BROKEN_FILE:
                self.unusable.append(found.name)
                return
            suffix = SUFFIXES.get(kind, f".{kind.lower()}")
        folder = self.folders[found.label]
        key = str(folder.relative_to(self.place) / plain_name(found.name))
        path = self.place / f"{self.free_name(key)}{suffix}"
        if isinstance(found.image, bytes):
            path.write_bytes(found.image)
        else:
            found.image.save(path)
        self.count += 1


def reader_of(source: Path, tile: tuple[int, ...]) -> tuple[Callable, str]:
    """What reads a source, by its name and what lies in it; and what it is called.

    Raises:
        UserError: it is of none of these kinds.
    """
    name = source.name.lower()
    if tile:
        return (lambda *how: read_sheets(how[0], tile, how[1])), "sprite sheets"
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return read_tar, "a tar archive"
    if "idx3" in name:
        return read_mnist, "images of the kind idx3-ubyte"
    if name in (*CIFAR_BATCHES, "test_batch", "train", "test") and source.is_file():
        return read_cifar, "CIFAR"
    if source.is_dir() and any((source / name).is_file() for name in ("batches.meta", "meta")):
        return read_cifar, "CIFAR"
    if name.endswith(".parquet") or (source.is_dir() and any(source.rglob("*.parquet"))):
        return read_parquet, "parquet"
    if name.endswith((".zip", ".npy", ".npz")):
        raise UserError(f"--source={source} need not be unpacked: --dataset={source} trains on it")
    kinds = "parquet, tar, MNIST (idx3-ubyte), a CIFAR folder, or a sprite sheet with --tile=32x32"
    raise UserError(f"--source={source} is of no kind that is known here: {kinds}")


def check_flags(source: str, to: str, tile: tuple[int, ...]) -> None:
    """Refuse what cannot be done before anything is made."""
    for flag, value in (("source", source), ("to", to)):
        if not value:
            raise UserError(f"--{flag} is missing; see python -m tools.unpack --help")
    if not Path(source).exists():
        raise UserError(f"--source={source} does not exist")
    if Path(to).exists() or Path(to).is_symlink():
        raise UserError(f"--to={to} exists; it takes a folder that does not")
    if tile and (len(tile) > 2 or not all(1 <= side <= 2048 for side in tile)):
        rule = "is not a size from 1 to 2048; write 32, or height x width such as 32x16"
        raise UserError(f"--tile={as_typed('img_size', tile)} {rule}")


# ---- the command ---------------------------------------------------------------------------------


def unpack(source: FilePath = "", to: FilePath = "", tile: tuple = ()) -> None:
    """Make a folder of images of another data set, for train --dataset=FOLDER.

        python -m tools.unpack --source=train.parquet --to=datasets/flowers

    Reads parquet files of the Hub, tar archives (webdataset), MNIST (idx3-ubyte, also .gz), CIFAR
    (its folder) and sprite sheets. Nothing in these is executed; classes become folders.

    Args:
        source: what to read, a file or a folder.
        to: the folder to make.
        tile: of sprite sheets, the size of a sprite in pixels, such as 32 or 32x16 (height x
            width).

    Raises:
        UserError: the source is of another kind, damaged, or holds no image.
    """
    check_flags(source, to, tile)
    read, kind = reader_of(Path(source), tile)
    told = []
    target = Path(to)
    print(f"reading {kind}: {basics.printable(source)}", flush=True)
    with (
        basics.folder_while_used(target.parent),
        basics.unfinished_folder(target.parent) as place,
    ):
        folder = Folder(place / "images")
        folder.place.mkdir()
        try:
            for found in read(Path(source), told.append):
                folder.add(found)
        except (tarfile.TarError, gzip.BadGzipFile, *BROKEN_FILE) as error:
            if isinstance(error, OSError) and error.errno:  # of the disk
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--source={source} cannot be read as {kind}: {reason}") from error
        if not folder.count:
            raise UserError(f"--source={source} holds no images ({kind})")
        folder.place.rename(target)
    if folder.unusable:
        told.append(f"{len(folder.unusable):,} are no images, left out: {folder.unusable[0]}")
    for sentence in told:
        print(basics.printable(sentence, limit=500))
    classes = [label for label in folder.folders if label]
    known = f" in {counted(len(classes), 'class')}" if classes else ""
    print(f"{folder.count:,} images{known}: {target}")


def main() -> None:
    command_line.run_command_line("-m tools.unpack", {"unpack": unpack}, LIMITS)


if __name__ == "__main__":
    main()
