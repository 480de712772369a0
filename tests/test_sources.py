"""Where images come from: archives and arrays hold what a folder holds, and do no harm."""

import errno
import gzip
import io
import json
import os
import pickle
import re
import shutil
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, files_below, paint, refused
from filelock import FileLock
from PIL import Image

import tools.unpack
import utils
from machinery import checkpoints, decoded, reading, sources, writing
from machinery.basics import UserError
from machinery.listing import CACHE, check_classes, list_images

PNG = io.BytesIO()
Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(PNG, "png")
PNG = PNG.getvalue()


def zip_of(folder: Path, path: Path, below: str = "", **options) -> Path:
    """A .zip archive of a folder's files."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, below + file.relative_to(folder).as_posix())
    return path


def assert_same(one: reading.Dataset, other: reading.Dataset) -> None:
    assert np.array_equal(one.images, other.images)
    assert np.array_equal(one.labels, other.labels)
    assert one.mode == other.mode


def pixels_of(folder: Path) -> np.ndarray:
    """The pictures of a folder as one array (N, H, W, 3)."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))])


# ---- archives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "a data set/images/"])
@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_the_data_set_of_its_folder(below, packing, place):
    """To the fingerprint: a run that learns from one resumes with the other."""
    paint(place / "x/cats", count=3)
    paint(place / "x/dogs", count=2, first_seed=3)
    large = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    Image.fromarray(large).save(place / "x/dogs/large.bmp")  # told apart by three samples
    (place / "x/notes.txt").write_text("no image")
    zip_of(place / "x", place / "x.ZIP", below, compression=packing)
    one, other = list_images(Path("x")), list_images(Path("x.ZIP"))
    assert (one.names, one.classes, one.fingerprint) == (
        other.names,
        other.classes,
        other.fingerprint,
    )
    assert check_classes(other) == ("cats", "dogs")
    data = utils.load_dataset(Path("x"), (8, 8))
    shutil.rmtree(CACHE)
    assert_same(utils.load_dataset(Path("x.ZIP"), (8, 8)), data)
    assert files_below(place) - files_below(place / "datasets") >= {"x.ZIP"}


def test_a_run_moves_from_a_folder_to_its_archive(run, place):
    paint(place / "x", count=6)
    zip_of(place / "x", place / "x.zip")
    assert run("train", "--dataset=x", *TINY, "--epochs=1").status == 0
    assert run("train", "--dataset=x.zip", *TINY, "--epochs=2").status == 0
    assert checkpoints.load("untitled")["step"] == 3


def test_processes_read_archives_and_arrays(place, monkeypatch):
    paint(place / "x", count=6)
    zip_of(place / "x", place / "x.zip")
    np.save("x.npy", pixels_of(place / "x"))
    expected = utils.load_dataset(Path("x"), (8, 8)).images
    monkeypatch.setattr(reading, "PROCESSES_FROM", 0)
    paths = [path for name in ("x.zip", "x.npy") for path in list_images(Path(name)).paths]
    portions = reading.read_all(reading.read_one, paths, 192, (8, 8), "RGB")
    found = [image for portion in portions for image, _ in portion]
    assert np.array_equal(found, np.concatenate([expected, expected]))


def test_what_is_hidden_in_an_archive_is_passed_over_and_other_kinds_are_counted(place):
    with zipfile.ZipFile("x.zip", "w") as archive:
        for name in ("in/a.png", "in/.hidden/b.png", "__MACOSX/in/._a.png", "in/c.heic", "d.txt"):
            archive.writestr(name, PNG)
        archive.writestr("in\\b\\e.png", PNG)  # as older programs on Windows write it
    found = list_images(Path("x.zip"))
    assert found.names == ["a.png", "b/e.png"]
    assert "1 image of kinds that are not read, left out: .heic" in found.remarks[0]


def test_the_labels_of_edm_are_the_classes(place):
    with zipfile.ZipFile("x.zip", "w") as archive:
        for name in ("00000/img0.png", "00000/img1.png", "00001/img2.png"):
            archive.writestr(name, PNG)
        labels = [["00000/img0.png", 7], ["00000/img1.png", 10], ["00001/img2.png", 7]]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    found = list_images(Path("x.zip"))
    assert found.classes == ("10", "7")
    assert found.labels.tolist() == [1, 0, 1]


OTHER_LABELS = ('{"labels": 3}', "{", "[]", "[" * 10**5)
OTHER_LABELS += tuple(
    json.dumps({"labels": [label]})
    for label in (["a.png", "cat"], ["a.png"], ["a.png", True], ["a.png", -1])
)


@pytest.mark.parametrize("text", OTHER_LABELS)
def test_labels_of_another_kind_are_refused(text, place):
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.writestr("a.png", PNG)
        archive.writestr("dataset.json", text)
    with pytest.raises(UserError, match="has other labels than known"):
        list_images(Path("x.zip"))


def test_a_damaged_member_is_an_unreadable_image(place):
    paint(place / "x", count=6)
    zip_of(place / "x", place / "x.zip")
    whole = bytearray((place / "x.zip").read_bytes())
    with zipfile.ZipFile("x.zip") as archive:
        start = archive.infolist()[2].header_offset
    whole[start + 80] ^= 1
    (place / "x.zip").write_bytes(whole)
    data = utils.load_dataset(Path("x.zip"), (8, 8))
    assert len(data.images) == 5
    assert any("1 unreadable" in remark and "check sum" in remark for remark in data.remarks)


def entry(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def with_flag(path: Path) -> None:
    """Set the bit that says that the first entry is encrypted, in both of its headers."""
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)


def overlapping(path: Path) -> None:
    """Many entries that all lie in the same place."""
    data = path.read_bytes()
    directory = data.index(b"PK\1\2")
    first = data[directory : data.index(b"PK\5\6")]
    many = b"".join(first.replace(b"a.png", b"%d.png" % number) for number in range(10))
    path.write_bytes(data[:directory] + many + end_of(10, len(many), directory))


def end_of(count: int, size: int, start: int) -> bytes:
    number = (count).to_bytes(2, "little")
    where = size.to_bytes(4, "little") + start.to_bytes(4, "little")
    return b"PK\5\6" + bytes(4) + number + number + where + bytes(2)


HOSTILE = {
    "leads out": ([entry("../a.png")], None, "leads out of it"),
    "leads far out": ([entry("x/../../a.png")], None, "leads out of it"),
    "absolute": ([entry("/etc/a.png")], None, "leads out of it"),
    "a drive": ([entry("C:/a.png")], None, "leads out of it"),
    "backslashes": ([entry("..\\a.png")], None, "leads out of it"),
    "a link": ([entry("a.png", stat.S_IFLNK | 0o777)], None, "symbolic link"),
    "twice": ([entry("a.png"), entry("a.png")], None, "several entries of the name a.png"),
    "twice, by another slash": ([entry("b/a.png"), entry("b\\a.png")], None, "several entries"),
    "encrypted": ([entry("a.png")], with_flag, "encrypted"),
    "overlapping": ([entry("a.png")], overlapping, "overlap"),
    "cut off": (
        [entry("a.png")],
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        "no .zip archive that can be read",
    ),
    "its head is gone": (
        [entry("a.png")],
        lambda path: path.write_bytes(path.read_bytes()[100:]),
        "",
    ),
    "empty": ([], None, "holds no images"),
    "no archive": ([], lambda path: path.write_bytes(b"no archive"), "no .zip archive"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_in_one_line(case, run, place):
    entries, change, words = HOSTILE[case]
    with zipfile.ZipFile("x.zip", "w") as archive:
        for info in entries:
            archive.writestr(info, PNG)
    if change:
        change(place / "x.zip")
    assert words in refused(run("train", "--dataset=x.zip", *TINY))
    assert {name for name in files_below(place) if "datasets" not in name} == {"x.zip"}


def test_a_bomb_is_refused_before_it_is_unpacked(run, place):
    with zipfile.ZipFile("x.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("a.png", bytes(20_000_000))
    line = refused(run("train", "--dataset=x.zip", *TINY))
    assert "is no image (20,000,000 bytes packed into" in line


def test_a_large_file_beside_the_images_is_no_bomb(place):
    """It is never read."""
    with zipfile.ZipFile("x.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("weights.bin", bytes(20_000_000))
        archive.writestr("a.png", PNG)
    assert list_images(Path("x.zip")).names == ["a.png"]


@pytest.mark.parametrize("name", ["x.zip", "x.npy", "x.npz"])
def test_an_error_of_the_machine_is_told_in_its_own_words(name, place, monkeypatch):
    """Not as a fault of the file."""
    (place / name).write_bytes(b"any")

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(UserError, match=f"^{name}: {os.strerror(errno.EIO)}$"):
        list_images(Path(name))


def test_no_more_is_unpacked_than_an_entry_says(place, monkeypatch):
    with zipfile.ZipFile("x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**6))
    data = bytearray((place / "x.zip").read_bytes())
    directory = data.index(b"PK\1\2")
    data[directory + 24 : directory + 28] = (1000).to_bytes(4, "little")
    (place / "x.zip").write_bytes(data)
    [member] = list_images(Path("x.zip")).members
    unpacked = []
    monkeypatch.setattr(zlib, "decompressobj", lambda *how: Watched(how, unpacked))
    with pytest.raises(zipfile.BadZipFile, match="check sum"):
        member.read_bytes()
    assert unpacked == [1001]


class Watched:
    """A decompressor that tells how much it gave."""

    def __init__(self, how: tuple, unpacked: list[int]):
        self.whole = DECOMPRESSOR(*how)
        self.unpacked = unpacked

    def decompress(self, *inputs) -> bytes:
        data = self.whole.decompress(*inputs)
        self.unpacked.append(len(data))
        return data


DECOMPRESSOR = zlib.decompressobj


def test_zip64_is_read(place):
    """Its header has lengths of eight bytes, as of files whose length was not known."""
    paint(place / "x", count=3)
    with zipfile.ZipFile("x.zip", "w") as archive:
        for path in sorted((place / "x").iterdir()):
            with archive.open(path.name, "w", force_zip64=True) as file:
                file.write(path.read_bytes())
    assert_same(utils.load_dataset(Path("x.zip"), (8, 8)), utils.load_dataset(place / "x", (8, 8)))


# ---- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["channels last", "channels first", "npz", "packed npz"])
def test_an_array_is_the_data_set_of_the_folder_it_came_from(layout, place):
    paint(place / "x", count=5)
    array = pixels_of(place / "x")
    if layout == "npz":
        np.savez("x.npz", images=array, labels=np.array([[3], [10], [3], [3], [10]]))
    elif layout == "packed npz":
        np.savez_compressed("x.npz", x_train=array, x_test=array[:1], y_train=np.arange(5))
    else:
        np.save("x.npy", array.transpose(0, 3, 1, 2) if "first" in layout else array)
    source = Path("x.npz" if "npz" in layout else "x.npy")
    data = utils.load_dataset(source, (8, 8))
    assert np.array_equal(data.images, utils.load_dataset(place / "x", (8, 8)).images)
    classes = {"npz": ("10", "3"), "packed npz": ("0", "1", "2", "3", "4")}
    assert list_images(source).classes == classes.get(layout, ())
    if layout == "npz":
        assert data.labels.tolist() == [1, 0, 1, 1, 0]
    if layout == "packed npz":
        assert "arrays that are left out: x_test" in data.remarks


LEVELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8)).astype(np.uint8)


@pytest.mark.parametrize(
    "array, expected, remark",
    [
        (LEVELS, LEVELS, ""),
        (LEVELS.astype(np.uint16) * 257, LEVELS, "uint16: 0 is black, 65535 is white"),
        ((LEVELS / 255).astype(np.float32), LEVELS, "float32: 0 is black, 1 is white"),
        ((LEVELS / 255).astype(np.float16), LEVELS, "float16: 0 is black, 1 is white"),
        (LEVELS.astype(">f8"), LEVELS, "0 is black, 255 is white"),
        ((LEVELS.astype(np.uint16) * 257).astype(">u2"), LEVELS, "65535 is white"),
        (np.asfortranarray(LEVELS), LEVELS, ""),
        (
            np.stack([LEVELS[0] / 255 * 7 - 3, LEVELS[0] * 0 + 4]),
            np.stack([LEVELS[0], np.full((8, 8), 255)]),
            "-3 is black, 4 is white",
        ),
    ],
)
def test_numbers_have_one_scale_for_the_whole_array(array, expected, remark, place):
    np.save("x.npy", array)
    data = utils.load_dataset(Path("x.npy"), (8, 8))
    assert data.mode == "L"
    assert abs(data.images[:, 0].astype(int) - expected).max() <= (array.dtype == np.float16)
    assert remark in "; ".join(data.remarks)


def test_another_scale_is_other_data(place):
    """The largest number of another row makes all others darker."""
    np.save("x.npy", LEVELS / 255 * 10)
    one = utils.load_dataset(Path("x.npy"), (8, 8))
    np.save("x.npy", np.concatenate([LEVELS / 255 * 10, LEVELS[:1] / 255 * 20]))
    other = utils.load_dataset(Path("x.npy"), (8, 8))
    assert one.fingerprint != other.fingerprint
    assert abs(other.images[:4].astype(int) * 2 - one.images).max() <= 2


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def save(value, **options):
    return lambda path: np.save(path, value, **options)


def large_header(path: Path) -> None:
    with open(path, "wb") as file:
        shape = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64)}
        np.lib.format.write_array_header_1_0(file, shape)


HOSTILE_ARRAYS = {
    "pickled": (save(np.array([Bomb()] * 4, object), allow_pickle=True), "never loaded"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Bomb())), "no array"),
    "garbage": (lambda path: path.write_bytes(b"\x93NUMPY" + bytes(100)), "no array"),
    "larger than its file": (large_header, "no array"),
    "cut off": (
        lambda path: (np.save(path, LEVELS), path.write_bytes(path.read_bytes()[:-9])),
        "no array",
    ),
    "NaN": (save(np.where(LEVELS > 250, np.nan, LEVELS)), "NaN or infinite"),
    "inf": (save(np.where(LEVELS > 250, -np.inf, LEVELS).astype(np.float32)), "NaN or infinite"),
    "text": (save(np.array([["a"]])), "numbers of the kind <U1"),
    "letters": (save(np.full((4, 8, 8), "a")), "numbers of the kind"),
    "records": (save(np.zeros((4, 8, 8), "u1,u1")), "numbers of the kind"),
    "complex": (save(LEVELS * 1j), "numbers of the kind complex128"),
    "64 bits": (save(LEVELS.astype(np.int64)), "numbers of the kind int64"),
    "two numbers": (save(LEVELS[0]), "shape 8x8"),
    "one image": (save(LEVELS[:, :, :3]), "shape 4x8x3"),
    "many channels": (save(np.zeros((4, 80, 80, 70), np.uint8)), "shape 4x80x80x70"),
    "no images": (save(LEVELS[:0]), "shape 0x8x8"),
}


@pytest.mark.parametrize("case", HOSTILE_ARRAYS)
def test_a_hostile_array_is_refused_in_one_line(case, run, place):
    write, words = HOSTILE_ARRAYS[case]
    write(place / "x.npy")
    assert words in refused(run("train", "--dataset=x.npy", *TINY))
    assert files_below(place) == {"x.npy"}


def members(path: Path, **contents: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)


def as_npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


HOSTILE_NPZ = {
    "several": ({"a": as_npy(LEVELS), "b": as_npy(LEVELS)}, "several arrays of images: a, b"),
    "pickled": ({"a": as_npy(np.array([Bomb()], object), True)}, "never loaded"),
    "pickled labels": (
        {"x": as_npy(LEVELS), "y": as_npy(np.array([Bomb()] * 4, object), True)},
        "never loaded",
    ),
    "garbage": ({"a": b"no array"}, "no array"),
    "too short": ({"a": as_npy(LEVELS)[:-1]}, "not as long as it says"),
    "too long": ({"a": as_npy(LEVELS) + b"more"}, "not as long as it says"),
    "no images": ({"a": as_npy(LEVELS[0])}, "no array of images (arrays: a)"),
    "nothing": ({}, "no array of images"),
    "leads out": ({"../../a": as_npy(LEVELS)}, ""),  # no name of an entry is ever a path
}


@pytest.mark.parametrize("case", HOSTILE_NPZ)
def test_a_hostile_npz_is_refused_in_one_line(case, run, place):
    contents, words = HOSTILE_NPZ[case]
    members(place / "x.npz", **contents)
    result = run("train", "--dataset=x.npz", *TINY, "--epochs=1")
    if words:
        assert words in refused(result)
        assert files_below(place) == {"x.npz"}
    else:
        assert result.status == 0
        assert (
            not (place.parent / "a.npy").exists() and not (place.parent.parent / "a.npy").exists()
        )


def test_an_npz_that_would_fill_the_disk_is_refused(place, monkeypatch):
    np.savez_compressed("x.npz", images=LEVELS)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    with pytest.raises(UserError, match="of which 100 are free"):
        list_images(Path("x.npz"))


def test_an_array_in_the_cache_is_not_trusted(place):
    np.savez_compressed("x.npz", images=LEVELS)
    expected = list_images(Path("x.npz")).fingerprint
    [unpacked] = CACHE.glob("*.npy")
    data = bytearray(unpacked.read_bytes())
    data[-1] ^= 1
    unpacked.write_bytes(data)
    assert list_images(Path("x.npz")).fingerprint == expected
    assert unpacked.read_bytes() != data


def test_a_file_of_another_kind_is_told_what_reads_it(run, place):
    (place / "x.parquet").write_bytes(b"PAR1")
    line = refused(run("train", "--dataset=x.parquet", *TINY))
    assert "is a file" in line and "tools.unpack" in line


# ---- a data set that grows -----------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """The names of the images that are read from now on."""
    names, read_image = [], reading.read_image
    monkeypatch.setattr(
        reading,
        "read_image",
        lambda path, *how: names.append(Path(path).name) or read_image(path, *how),
    )
    return names


def odd_pictures(folder: Path) -> Path:
    """Twelve pictures, of some of which there is something to tell, and one that is broken."""
    paint(folder, count=6)
    paint(folder, count=6, size=(7, 9), first_seed=6)  # smaller than 8x8
    (folder / "picture_0003.png").write_text("no picture")
    Image.new("RGBA", (8, 8), (9, 9, 9, 9)).save(folder / "picture_0004.png")
    return folder


def add_some(folder: Path) -> set[str]:
    paint(folder, count=2, first_seed=100)
    paint(folder / "a", count=1, size=(7, 9), first_seed=99)  # the first of all
    return {"picture_0100.png", "picture_0101.png", "picture_0099.png"}


def change_one(folder: Path) -> set[str]:
    Image.new("RGB", (8, 8), "red").save(folder / "picture_0005.png")
    return {"picture_0005.png"}


def remove_some(folder: Path) -> set[str]:
    (folder / "picture_0000.png").unlink()
    (folder / "picture_0007.png").unlink()
    return set()


def rename_one(folder: Path) -> set[str]:
    (folder / "picture_0008.png").rename(folder / "first.png")
    return set()


def mend_one(folder: Path) -> set[str]:
    paint(folder, count=1, first_seed=3)
    return {"picture_0003.png"}


CHANGES = [add_some, change_one, remove_some, rename_one, mend_one]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["auto", "RGBA"])
def test_only_what_changed_is_decoded_and_all_is_as_if_decoded_anew(change, mode, place, seen):
    odd_pictures(place / "x")
    utils.load_dataset(place / "x", (8, 8), mode)
    changed = change(place / "x")
    seen.clear()
    data = utils.load_dataset(place / "x", (8, 8), mode)
    assert set(seen) == changed | ({"picture_0003.png"} if change != mend_one else set())
    shutil.rmtree(CACHE)
    anew = utils.load_dataset(place / "x", (8, 8), mode)
    assert_same(data, anew)
    assert data.remarks == anew.remarks


def test_what_the_folder_was_before_is_not_kept(place, capsys):
    paint(place / "x", count=6)
    utils.load_dataset(place / "x", (8, 8))
    add_some(place / "x")
    capsys.readouterr()
    utils.load_dataset(place / "x", (8, 8))
    assert "6 of 9 images were decoded before and are taken over" in capsys.readouterr().out
    assert len(list(CACHE.glob("*.bytes"))) == 1


def test_a_copy_of_a_folder_takes_over_what_it_shares_and_leaves_it_there(place, seen):
    paint(place / "x", count=6)
    utils.load_dataset(place / "x", (8, 8))
    shutil.copytree(place / "x", place / "y")
    added = add_some(place / "y")
    seen.clear()
    utils.load_dataset(place / "y", (8, 8))
    assert set(seen) == added
    seen.clear()
    utils.load_dataset(place / "x", (8, 8))
    assert seen == []


def test_an_array_that_grows_is_not_decoded_again(place, seen):
    array = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    np.save("x.npy", array[:6])
    utils.load_dataset(Path("x.npy"), (8, 8))
    np.save("x.npy", array)
    seen.clear()
    data = utils.load_dataset(Path("x.npy"), (8, 8))
    assert len(seen) == 3
    assert np.array_equal(data.images.transpose(0, 2, 3, 1), array)


def test_a_decoding_that_took_over_images_and_was_stopped_goes_on(place, seen, monkeypatch):
    odd_pictures(place / "x")
    utils.load_dataset(place / "x", (8, 8))
    add_some(place / "x")
    save = decoded.Cache.save

    def save_some(cache, facts, sums) -> None:
        save(cache, facts, sums)
        if facts["seen"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reading, "NOTE_EVERY", 0)
        patch.setattr(reading, "PORTION", 4)
        patch.setattr(decoded.Cache, "save", save_some)
        with pytest.raises(KeyboardInterrupt):
            utils.load_dataset(place / "x", (8, 8))
    data = utils.load_dataset(place / "x", (8, 8))
    shutil.rmtree(CACHE)
    anew = utils.load_dataset(place / "x", (8, 8))
    assert_same(data, anew)
    assert data.remarks == anew.remarks


def damage_bytes(cache: Path) -> None:
    data = bytearray(cache.read_bytes())
    data[100] ^= 1
    cache.write_bytes(data)


def damage_digests(cache: Path) -> None:
    path = cache.with_suffix(".digests")
    path.write_bytes(path.read_bytes()[:-1])


def damage_note(cache: Path) -> None:
    path = cache.with_suffix(".json")
    path.write_text(path.read_text().replace('"count": 6', '"count": 5'))


@pytest.mark.parametrize("damage", [damage_bytes, damage_digests, damage_note])
def test_nothing_is_taken_over_from_a_damaged_cache(damage, place, seen):
    paint(place / "x", count=6)
    utils.load_dataset(place / "x", (8, 8))
    [cache] = CACHE.glob("*.bytes")
    damage(cache)
    add_some(place / "x")
    seen.clear()
    data = utils.load_dataset(place / "x", (8, 8))
    assert len(seen) == 9
    shutil.rmtree(CACHE)
    assert_same(data, utils.load_dataset(place / "x", (8, 8)))


def save_float(path: Path, white: float, seed: int) -> None:
    levels = np.random.default_rng(seed).uniform(0, white, (8, 8)).astype(np.float32)
    levels[0, 0] = white
    Image.fromarray(levels).save(path)


@pytest.mark.parametrize("white, is_known", [(0.9, True), (200.0, False)])
def test_images_of_floats_are_taken_over_under_the_same_scale_only(white, is_known, place, seen):
    (place / "x").mkdir()
    for number in range(4):
        save_float(place / f"x/{number}.tif", 1.0, number)
    utils.load_dataset(place / "x", (8, 8))
    save_float(place / "x/5.tif", white, 5)
    seen.clear()
    data = utils.load_dataset(place / "x", (8, 8))
    # the first try, before it is known that there are floats, may have begun with any
    assert seen.count("2.tif") <= 1 if is_known else seen.count("2.tif") >= 1
    shutil.rmtree(CACHE)
    assert_same(data, utils.load_dataset(place / "x", (8, 8)))


def test_old_caches_are_removed_above_the_limit_and_it_is_told(place, monkeypatch, capsys):
    """What was used last stays: the first data set is looked at again after the second."""
    for seed, name in enumerate("abc"):
        paint(place / name, count=4, first_seed=10 * seed)
    for number, name in enumerate("aba"):
        utils.load_dataset(place / name, (8, 8))
        for note in CACHE.glob("*.json"):
            if note.stat().st_mtime > 10**9 + 10:
                os.utime(note, (10**9 + number, 10**9 + number))
                os.utime(note.with_suffix(".bytes"), (10**9, 10**9))
    before = {name: set(CACHE.glob("*.bytes")) for name in "a"}
    monkeypatch.setattr(decoded, "LIMIT", 2 * 4 * 192)
    capsys.readouterr()
    utils.load_dataset(place / "c", (8, 8))
    assert "removed 1 old data sets" in capsys.readouterr().out
    assert len(list(CACHE.glob("*.bytes"))) == len(before["a"]) == 2
    monkeypatch.setattr(decoded, "LIMIT", 10**9)
    names, read_image = [], reading.read_image
    monkeypatch.setattr(reading, "read_image", lambda *how: names.append(how) or read_image(*how))
    utils.load_dataset(place / "a", (8, 8))
    assert names == []
    utils.load_dataset(place / "b", (8, 8))
    assert len(names) == 4


def test_a_cache_that_is_being_made_is_not_removed(place, monkeypatch):
    paint(place / "x", count=4)
    paint(place / "y", count=4, first_seed=9)
    utils.load_dataset(place / "x", (8, 8))
    [cache] = CACHE.glob("*.bytes")
    monkeypatch.setattr(decoded, "LIMIT", 0)
    with FileLock(cache.with_suffix(".lock")):
        utils.load_dataset(place / "y", (8, 8))
        assert cache.exists()
    kept = utils.load_dataset(place / "y", (8, 8)).images
    assert not cache.exists()
    assert Path(kept.filename).exists()  # what is in use stays, however large it is


def test_the_cache_lies_where_it_is_asked_for(run, place):
    paint(place / "x", count=6)
    assert run("train", "--dataset=x", *TINY, "--epochs=1", "--cache=else/where").status == 0
    assert list(Path("else/where").glob("*.bytes")) and not CACHE.exists()
    # a run does not depend on it
    assert run("train", "--dataset=x", *TINY, "--epochs=1").status == 0
    (place / "file").touch()
    for cache in ("file", ""):
        assert "is no folder" in refused(run("train", "--dataset=x", *TINY, f"--cache={cache}"))


# ---- sizes, crops and flips ----------------------------------------------------------------------


def test_nearest_keeps_the_colors_of_pixel_art(place):
    """Enlarged by a whole number, sprites come out as they were drawn."""
    (place / "x").mkdir()
    for seed in range(3):
        sprite = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(sprite.repeat(4, axis=0).repeat(4, axis=1)).save(place / f"x/{seed}.png")
    found = list_images(place / "x")
    data = reading.read_dataset(found, (8, 8), resize="nearest")
    for seed, image in enumerate(data.images):
        sprite = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        assert np.array_equal(image, sprite.transpose(2, 0, 1))
    assert data.remarks == []
    doubled = reading.read_dataset(found, (64, 64), resize="nearest")
    assert np.array_equal(doubled.images[:, :, ::8, ::8], data.images)
    assert "nearest" not in "".join(doubled.remarks)
    uneven = reading.read_dataset(found, (12, 12), resize="nearest")
    assert any("3 not a whole number of times" in remark for remark in uneven.remarks)
    assert not np.array_equal(reading.read_dataset(found, (8, 8)).images, data.images)


def test_area_is_the_mean_of_what_a_pixel_covers(place):
    (place / "x").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 3), np.uint8)
    Image.fromarray(pixels).save(place / "x/a.png")
    data = reading.read_dataset(list_images(place / "x"), (8, 8), "RGB", resize="area")
    means = pixels[8:24].reshape(8, 2, 8, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert abs(data.images[0] - means).max() <= 1  # Pillow rounds rows, then columns


def test_random_crops_are_parts_of_images_a_quarter_larger(place):
    paint(place / "x", count=3, size=(20, 20))
    found = list_images(place / "x")
    data = reading.read_dataset(found, (8, 12), crop="random")
    assert (data.images.shape, data.size) == ((3, 3, 10, 15), (8, 12))
    assert np.array_equal(data.images, reading.read_dataset(found, (10, 15)).images)


@pytest.mark.parametrize(
    "flags", [("--crop=random", "--flip=both"), ("--resize=nearest", "--flip=no")]
)
def test_a_run_with_other_crops_flips_and_sizes_resumes_to_the_bit(flags, run, place):
    paint(place / "x", count=9, size=(20, 20))
    for name, epochs in (("one", 2), ("two", 1), ("two", 2)):
        words = (*TINY, *flags, "--lr_decay=none", f"--epochs={epochs}")
        assert run("train", "--dataset=x", f"--run_name={name}", *words).status == 0
    one, two = (checkpoints.load(name) for name in ("one", "two"))
    assert one["step"] == two["step"] == 5
    for name, weight in one["network"].items():
        assert torch.equal(weight, two["network"][name]), name
    line = refused(run("train", "--dataset=x", "--run_name=two", *TINY, "--lr_decay=none"))
    assert f"{flags[0]}, is now".replace("=", " was ") in line


@pytest.mark.parametrize("old, new", [(True, "horizontal"), (False, "no")])
def test_an_older_run_that_says_yes_or_no_to_flips_resumes(old, new, run, place):
    paint(place / "x", count=6)
    words = ("train", "--dataset=x", *TINY)
    assert run(*words, "--epochs=1", f"--flip={old}").status == 0
    stored = checkpoints.load("untitled")
    assert stored["settings"]["flip"] == new
    for name in ("crop", "resize", "cache", "depth", "frames"):
        del stored["settings"][name]
    stored["settings"]["flip"] = old
    checkpoints.save("untitled", **stored)
    assert run(*words, "--epochs=2", f"--flip={new}").status == 0
    assert checkpoints.load("untitled")["settings"]["flip"] == new
    other = "no" if old else "yes"
    assert f"--flip was {new}" in refused(run(*words, "--epochs=2", f"--flip={other}"))


# ---- animations ----------------------------------------------------------------------------------


def film_of(path: Path, count: int, **options) -> np.ndarray:
    """An animation of noise, to the bit in these formats: (count, 8, 8, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), np.uint8)
    first, *others = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=others, **options)
    return frames


@pytest.mark.parametrize("is_packed", [True, False])
def test_every_frame_is_an_image_if_asked_for(is_packed, place):
    films = {
        "a/film.webp": film_of(place / "x/a/film.webp", 3, lossless=True),
        "a/pages.tif": film_of(place / "x/a/pages.tif", 4),
        "b/film.png": film_of(place / "x/b/film.png", 5),
        "b/still.png": film_of(place / "x/b/still.png", 1),
    }
    zip_of(place / "x", place / "x.zip")
    source = place / ("x.zip" if is_packed else "x")
    found = list_images(source, frames="all")
    data = reading.read_dataset(found, (8, 8))
    expected = np.concatenate(list(films.values()))
    assert np.array_equal(data.images.transpose(0, 2, 3, 1), expected)
    assert data.labels.tolist() == [0] * 7 + [1] * 6
    assert not any("the first" in remark for remark in data.remarks)
    first = reading.read_dataset(list_images(source), (8, 8))
    assert len(first.images) == 4
    assert sum("the first" in remark for remark in first.remarks) == 2
    assert len({found.fingerprint, first.fingerprint, list_images(source).fingerprint}) == 2


def test_frames_of_a_file_that_is_broken_are_one_unreadable_image(place):
    paint(place / "x", count=3)
    (place / "x/film.gif").write_bytes(b"GIF89a no film")
    data = reading.read_dataset(list_images(place / "x", frames="all"), (8, 8))
    assert len(data.images) == 3
    assert any("1 unreadable" in remark for remark in data.remarks)


def test_a_file_of_endless_frames_is_refused(place, run):
    film_of(place / "x/film.png", 3)
    data = bytearray((place / "x/film.png").read_bytes())
    start = data.index(b"acTL")
    data[start + 4 : start + 8] = (2**31 - 1).to_bytes(4, "big")
    crc = zlib.crc32(data[start : start + 12]).to_bytes(4, "big")
    data[start + 12 : start + 16] = crc
    (place / "x/film.png").write_bytes(data)
    line = refused(run("train", "--dataset=x", "--frames=all", *TINY))
    assert "says that it has 2,147,483,647 frames" in line


def test_heic_photos_are_read_by_a_plugin_or_its_name_is_told(place, monkeypatch):
    """The plugin is played: it reads what PNG is."""
    paint(place / "x", count=2)
    (place / "x/picture_0001.png").rename(place / "x/photo.HEIC")
    monkeypatch.setattr(sources, "has_heif", lambda: False)
    found = list_images(place / "x")
    assert found.names == ["picture_0000.png"]
    assert ".heic (pip install pillow-heif has HEIC read)" in found.remarks[0]
    monkeypatch.setattr(sources, "has_heif", lambda: True)
    found = list_images(place / "x")
    assert (found.names, found.remarks) == (["photo.HEIC", "picture_0000.png"], [])


# ---- more bits, more channels --------------------------------------------------------------------

DEEP = np.random.default_rng(1).integers(0, 65536, (5, 8, 8)).astype(np.uint16)


def read_deep(source: Path, size: tuple[int, int] = (8, 8), mode: str = "auto") -> reading.Dataset:
    return reading.read_dataset(list_images(source), size, mode, depth=16)


def test_16_bits_reach_the_network_and_come_back(place):
    """From a file or an array, through the loader, to a PNG: every level."""
    (place / "x").mkdir()
    for number, image in enumerate(DEEP):
        Image.fromarray(image).save(place / f"x/{number}.png")
    np.save("x.npy", DEEP)
    for source in (place / "x", place / "x.npy"):
        data = read_deep(source)
        assert (data.mode, data.images.dtype) == ("L", np.uint16)
        assert np.array_equal(data.images[:, 0], DEEP)
    loader = utils.Loader(data, 5, seed=0, flip="no", device=torch.device("cpu"))
    images = loader.load(torch.arange(5), loader.draw_chances(5))
    assert (images.min() >= -1, images.max() <= 1, images.dtype) == (True, True, torch.float32)
    levels = utils.to_bytes(images, depth=16)
    assert np.array_equal(levels[:, 0], DEEP)
    writing.save_png(levels[:1], place / "y.png")
    with Image.open(place / "y.png") as picture:
        assert picture.mode == "I;16"
        assert np.array_equal(np.asarray(picture), DEEP[0])


def test_inpainting_keeps_every_bit_of_16(place, run):
    """And image-to-image with a strength of 0; 8 bits would round each level to one of 256."""
    (place / "x").mkdir()
    for number, image in enumerate(DEEP):
        Image.fromarray(image).save(place / f"x/{number}.png")
    flags = dict(word.split("=") for word in (*TINY, "--noise_steps=8", "--epochs=1"))
    flags |= {"--dataset": "x", "--run_name": "deep", "--depth": "16"}
    assert run("train", *(f"{flag}={value}" for flag, value in flags.items())).status == 0
    mask = np.zeros(DEEP[0].shape, np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save("mask.png")
    words = ["sample", "--run_name=deep", "--n_img=1", "--steps=4", "--init_image=x/0.png"]
    assert run(*words, "--name=kept", "--strength=0").status == 0
    assert run(*words, "--name=painted", "--strength=1", "--mask=mask.png").status == 0
    for name in ("kept", "painted"):
        with Image.open(f"results/deep/{name}/sample_0001.png") as picture:
            same = np.asarray(picture) == DEEP[0]
        assert same.reshape(-1)[1:].all()


def test_every_level_of_16_bits_is_its_own():
    levels = torch.arange(65536).to(torch.uint16).view(torch.int16)
    values = utils.from_bytes(levels)
    assert (values[0], values[-1]) == (-1, 1)
    assert torch.equal(utils.to_bytes(values, depth=16), torch.arange(65536, dtype=torch.int32))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_8_bits_at_a_depth_of_16_look_the_same(mode, place):
    """The upper 8 bits are what a depth of 8 has, up to rounding and the overshoot of Lanczos."""
    paint(place / "x", count=4, size=(8, 8))
    Image.fromarray(np.full((8, 8, 4), 90, np.uint8)).save(place / "x/a.png")
    deep = read_deep(place / "x", mode=mode).images
    flat = reading.read_dataset(list_images(place / "x"), (8, 8), mode).images
    assert np.array_equal(deep, flat.astype(np.uint16) * 257)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_change_their_mode_at_16_bits_as_at_8(mode, channels, place):
    array = np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels)).astype(np.uint8)
    np.save("x.npy", array)
    deep = read_deep(place / "x.npy", mode=mode).images
    flat = reading.read_dataset(list_images(place / "x.npy"), (8, 8), mode).images
    assert deep.shape == flat.shape
    assert abs(deep / 257 - flat).max() <= 1  # rounded once instead of twice


def test_floats_keep_16_bits_under_one_scale(place):
    (place / "x").mkdir()
    for number, image in enumerate(DEEP):
        Image.fromarray(image.astype(np.float32) / 65535).save(place / f"x/{number}.tif")
    np.save("x.npy", DEEP / 65535)
    assert np.array_equal(read_deep(place / "x").images[:, 0], DEEP)
    assert np.array_equal(read_deep(place / "x.npy").images[:, 0], DEEP)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_16_bit_image_is_turned_upright_once(suffix, place):
    """Pillow does so by itself as it loads a TIFF."""
    (place / "x").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(DEEP[0]).save(place / f"x/a.{suffix}", exif=exif)
    upright = np.rot90(DEEP[0], -1)
    assert np.array_equal(read_deep(place / "x").images[0, 0], upright)
    flat = reading.read_dataset(list_images(place / "x"), (8, 8)).images
    assert abs(flat[0, 0] - upright / 257).max() <= 0.5


def test_resizing_keeps_16_bits(place):
    """Means of four numbers of 16 bits have more levels than 8 bits could tell apart."""
    np.save("x.npy", DEEP)
    found = list_images(place / "x.npy")
    data = reading.read_dataset(found, (4, 4), resize="area", depth=16)
    means = DEEP.reshape(5, 4, 2, 4, 2).mean(axis=(2, 4))
    assert abs(data.images[:, 0] - means).max() <= 1


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("is_first", [True, False])
def test_channels_of_arrays_stay_apart(depth, channels, is_first, place):
    levels = DEEP if depth == 16 else LEVELS
    array = np.stack([np.roll(levels, number, axis=1) for number in range(channels)], axis=1)
    np.save("x.npy", array if is_first else array.transpose(0, 2, 3, 1))
    for mode in ("auto", str(channels)):
        data = reading.read_dataset(list_images(place / "x.npy"), (8, 8), mode, depth=depth)
        assert data.mode == str(channels)
        assert np.array_equal(data.images, array)
    assert any(f"of {channels} channels, pictures show" in remark for remark in data.remarks)
    with pytest.raises(UserError, match=f"{channels} channels"):
        reading.read_dataset(list_images(place / "x.npy"), (8, 8), "7", depth=depth)
    with pytest.raises(UserError, match=f"{channels} channels"):
        reading.read_dataset(list_images(place / "x.npy"), (8, 8), "RGB", depth=depth)


def test_a_number_of_channels_is_for_arrays(place, run):
    paint(place / "x", count=4)
    assert "is for arrays" in refused(run("train", "--dataset=x", *TINY, "--mode=5"))
    for mode in ("1", "3", "4", "65", "0", "05"):
        assert f"--mode={mode} is not one of" in refused(run("train", f"--mode={mode}", *TINY))


@pytest.mark.parametrize(
    "channels, depth, suffix", [(1, 16, "png"), (3, 16, "npy"), (5, 8, "npy"), (5, 16, "npy")]
)
def test_what_png_cannot_hold_is_sampled_as_arrays(channels, depth, suffix, run, place):
    np.save("x.npy", np.stack([DEEP] * (channels - 1) + [65535 - DEEP], axis=3))
    words = ("train", "--dataset=x.npy", *TINY, f"--depth={depth}", "--noise_steps=4")
    for epochs in (1, 2):
        assert run(*words, f"--epochs={epochs}").status == 0
    result = run("sample", "--run_name=untitled", "--n_img=2", "--steps=2", "--gif")
    assert result.status == 0, result.err
    assert f"sample_*.{suffix}" in result.out
    made = place / f"results/untitled/samples/sample_0002.{suffix}"
    image = np.load(made) if suffix == "npy" else np.asarray(Image.open(made))
    assert image.shape == ((8, 8, channels) if suffix == "npy" else (8, 8))
    assert image.dtype == (np.uint16 if depth == 16 else np.uint8)
    if depth == 16:
        assert len(np.unique(image % 257)) > 1  # more than 8 bits
    with Image.open(place / "results/untitled/samples/samples.png") as grid:
        assert (grid.mode, grid.size) == ("RGB", (16, 8))
        if suffix == "npy" and channels > 1:
            shown = image[:, :, :3] / (257 if depth == 16 else 1)
            assert abs(np.asarray(grid)[:, 8:] - shown).max() <= 0.5
    assert (place / "results/untitled/samples/samples.gif").exists()
    if channels == 5:
        line = refused(run("sample", "--steps=2", "--init_image=x.npy"))
        assert "makes 5 channels, no colors" in line


# ---- what is unpacked ----------------------------------------------------------------------------


@pytest.fixture
def unpack(run_main):
    """Run `python -m tools.unpack WORDS...` within this process."""
    return lambda *words: run_main(tools.unpack.main, *words)


def shown(folder: Path, **how) -> reading.Dataset:
    return reading.read_dataset(list_images(folder), (8, 8), "RGB", **how)


def two_classes(place: Path) -> Path:
    paint(place / "x/cats", count=3, size=(8, 8))
    paint(place / "x/dogs", count=2, size=(8, 8), first_seed=3)
    return place / "x"


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_of_the_hub_becomes_its_folder(as_struct, unpack, place):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = two_classes(place)
    contents = [path.read_bytes() for path in sorted(folder.rglob("*.png"))]
    images = [{"bytes": content, "path": None} if as_struct else content for content in contents]
    table = pyarrow.table({"image": images, "label": [0, 0, 0, 1, 1], "text": ["a"] * 5})
    features = {"label": {"names": ["cats", "dogs"], "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}})
    (place / "hub").mkdir()
    named = table.replace_schema_metadata({"huggingface": about})
    parquet.write_table(named, "hub/train-00000.parquet")
    parquet.write_table(named, "hub/test-00000.parquet")
    result = unpack("--source=hub", "--to=datasets/y")
    assert result.status == 0
    assert "5 images in 2 classes" in result.out
    assert "1 files that are not for training, left out: test-00000.parquet" in result.out
    assert_same(shown(place / "datasets/y"), shown(folder))
    kept = sorted((place / "datasets/y").rglob("*.png"))
    assert [path.read_bytes() for path in kept] == contents  # not decoded, nor packed again


def test_what_reads_parquet_is_named_when_it_is_missing(unpack, place, monkeypatch):
    (place / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    line = refused(unpack("--source=x.parquet", "--to=y"))
    assert "pip install pyarrow" in line
    assert files_below(place) == {"x.parquet"}


def tar_of(path: Path, entries: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("is_webdataset", [True, False])
def test_a_tar_becomes_its_folder(packed, is_webdataset, unpack, place):
    folder = two_classes(place)
    entries = []
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        name = path.relative_to(folder).as_posix()
        if is_webdataset:
            name = f"{number:03d}.png"
            entries += [(f"{number:03d}.cls", str(path.parent.name == "dogs").encode())]
            entries += [(f"{number:03d}.json", b"{}")]
        entries.append((name, path.read_bytes()))
    source = tar_of(place / ("x.tar.gz" if packed else "x.tar"), entries, "w:gz" if packed else "w")
    result = unpack(f"--source={source.name}", "--to=datasets/y")
    assert result.status == 0, result.err
    assert_same(shown(place / "datasets/y"), shown(folder))
    classes = ("False", "True") if is_webdataset else ("cats", "dogs")
    assert list_images(place / "datasets/y").classes == classes


def mnist(place: Path, images: np.ndarray, labels: np.ndarray, packed: bool = False) -> Path:
    opened, suffix = (gzip.open, ".gz") if packed else (open, "")
    with opened(place / f"train-labels-idx1-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes())
    with opened(place / f"train-images-idx3-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
    return place / f"train-images-idx3-ubyte{suffix}"


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_becomes_a_folder_of_its_digits(packed, unpack, place):
    labels = np.array([0, 3, 3, 9])
    source = mnist(place, LEVELS, labels, packed)
    assert unpack(f"--source={source.name}", "--to=y").status == 0
    np.save("x.npy", LEVELS)
    assert np.array_equal(shown(place / "y").images, shown(place / "x.npy").images)
    found = list_images(place / "y")
    assert [found.classes[label] for label in found.labels] == ["0", "3", "3", "9"]


def cifar(place: Path) -> np.ndarray:
    """CIFAR-10 as it is downloaded, two images to a file: all (4, 3072)."""
    rows = np.random.default_rng(0).integers(0, 256, (4, 3072)).astype(np.uint8)
    (place / "cifar").mkdir()
    for number in (1, 2):
        batch = {b"data": rows[2 * number - 2 : 2 * number], b"labels": [0, 1]}
        pickled = pickle.dumps(batch, protocol=2)
        (place / f"cifar/data_batch_{number}").write_bytes(pickled)
    (place / "cifar/test_batch").write_bytes(pickled)
    meta = pickle.dumps({b"label_names": [b"cat", b"dog"]}, protocol=2)
    (place / "cifar/batches.meta").write_bytes(meta)
    return rows


@pytest.mark.parametrize("core", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_cifar_becomes_a_folder(core, unpack, place):
    rows = cifar(place)
    for path in (place / "cifar").glob("data_batch_*"):  # by an older and a newer NumPy
        path.write_bytes(re.sub(rb"numpy\._?core\.multiarray", core, path.read_bytes()))
    result = unpack("--source=cifar", "--to=y")
    assert result.status == 0, result.err
    assert "the test images are left out" in result.out
    np.save("x.npy", rows.reshape(4, 3, 32, 32)[[0, 2, 1, 3]])  # by class
    assert np.array_equal(shown(place / "y").images, shown(place / "x.npy").images)
    assert list_images(place / "y").classes == ("cat", "dog")


def test_a_sheet_becomes_its_sprites(unpack, place):
    sprites = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6, 4), np.uint8)  # rows, columns
    sprites[1, 2] = 0  # an empty place
    sprites[0, 0, :, :, 3] = 255
    sheet = np.zeros((9, 19, 4), np.uint8)
    sheet[:8, :18] = sprites.transpose(0, 2, 1, 3, 4).reshape(8, 18, 4)
    Image.fromarray(sheet).save(place / "sheet.png")
    result = unpack("--source=sheet.png", "--to=y", "--tile=4x6")
    assert result.status == 0, result.err
    assert "1 rows and 1 columns of pixels are left out" in result.out
    assert "1 tiles of one color only, left out" in result.out
    found = sorted((place / "y").iterdir())
    assert len(found) == 5
    for path, sprite in zip(found, sprites.reshape(6, 4, 6, 4), strict=False):
        assert np.array_equal(np.asarray(Image.open(path)), sprite)


def explode(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({b"data": Bomb(), b"labels": [1]}))


def odd_array(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    batch = {b"data": np.zeros((2, 3072), object), b"labels": [0, 1]}
    path.write_bytes(pickle.dumps(batch))


def out_of_range(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [7]}
    path.write_bytes(pickle.dumps(batch, protocol=2))
    path.with_name("batches.meta").write_bytes(pickle.dumps({b"label_names": [b"a"]}))


def with_labels(change: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        mnist(path.parent, LEVELS, np.arange(4))
        change(path, path.parent / "train-labels-idx1-ubyte")

    return write


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def link_entry(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)


def large_entry(path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.size = 2**40
    path.write_bytes(info.tobuf())


def bomb(path: Path) -> None:
    with gzip.open(path, "wb") as file:
        info = tarfile.TarInfo("a.png")
        info.size = 2**26
        file.write(info.tobuf() + bytes(2**26))


MNIST = "train-images-idx3-ubyte"
HOSTILE_SOURCES = {
    "a pickle with code": ("cifar/data_batch_1", explode, "asks for posix.mkdir"),
    "an array of objects": ("cifar/data_batch_1", odd_array, "no CIFAR file"),
    "a class nobody named": ("cifar/data_batch_1", out_of_range, "no CIFAR file"),
    "no pickle": ("cifar/data_batch_1", lambda path: (explode(path), cut(path)), "no CIFAR file"),
    "MNIST cut off": (MNIST, with_labels(lambda images, _: cut(images)), "it has 3 of 4 images"),
    "labels cut off": (MNIST, with_labels(lambda _, labels: cut(labels)), "cut off"),
    "fewer labels": (
        MNIST,
        with_labels(lambda path, _: mnist(path.parent, LEVELS, np.arange(3))),
        "4 images, and",
    ),
    "no MNIST": (MNIST, lambda path: path.write_bytes(bytes(99)), "no file of images"),
    "empty MNIST": (MNIST, lambda path: path.touch(), "cannot be read"),
    "giant MNIST": (
        MNIST,
        lambda path: path.write_bytes(struct.pack(">IIII", 0x803, 1, 2**31, 2**31)),
        "no file of images",
    ),
    "a path that leads out": ("x.tar", lambda path: tar_of(path, [("../a.png", PNG)]), "leads out"),
    "an absolute path": ("x.tar", lambda path: tar_of(path, [("/a.png", PNG)]), "leads out"),
    "a link": ("x.tar", link_entry, "holds no images"),
    "a large entry": ("x.tar", large_entry, "has 1,099,511,627,776 bytes"),
    "a bomb": ("x.tar.gz", bomb, "unpacks as no images do"),
    "a tar cut off": (
        "x.tar",
        lambda path: path.write_bytes(tar_of(path, [("a.png", PNG)]).read_bytes()[:600]),
        "cannot be read",
    ),
    "no tar": ("x.tar.gz", lambda path: path.write_bytes(b"no archive"), "cannot be read"),
    "no images in it": ("x.tar", lambda path: tar_of(path, [("a.png", b"no")]), "no images"),
    "no parquet": ("x.parquet", lambda path: path.write_bytes(b"PAR1" * 9), "cannot be read"),
    "another kind": ("x.rar", lambda path: path.touch(), "no kind that is known here"),
    "a zip": ("x.zip", lambda path: path.touch(), "need not be unpacked"),
}


@pytest.mark.parametrize("case", HOSTILE_SOURCES)
def test_a_hostile_source_is_refused_in_one_line(case, unpack, place):
    name, write, words = HOSTILE_SOURCES[case]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    write(place / name)
    before = files_below(place.parent)
    assert words in refused(unpack(f"--source={name}", "--to=new/y"))
    assert files_below(place.parent) == before
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "words, fault",
    [
        (("--to=y",), "--source is missing"),
        (("--source=x",), "--to is missing"),
        (("--source=nowhere", "--to=y"), "--source=nowhere does not exist"),
        (("--source=x", "--to=x"), "--to=x exists"),
        (("--source=x", "--to=y", "--tile=0"), "--tile=0 is not a size"),
        (("--source=x", "--to=y", "--tile=4x4x4"), "--tile=4x4x4 is not a size"),
        (("--source=x", "--to=y", "--tile=99"), "smaller than --tile=99"),
    ],
)
def test_wrong_flags_of_unpack_are_refused(words, fault, unpack, place):
    paint(place / "x", count=1)
    assert fault in refused(unpack(*words))
    assert not Path("y").exists()


@pytest.mark.parametrize(
    "label", ["../../a", "a/b", ".hidden", "..", "C:\\x", "/", "\0", "a" * 999]
)
def test_a_class_is_never_a_path(label, tmp_path):
    out = tools.unpack.Folder(tmp_path / "images")
    out.place.mkdir()
    out.add(tools.unpack.Found("../x", label, PNG))
    [made] = out.place.iterdir()
    assert made.parent == out.place and "/" not in made.name and not made.name.startswith(".")
    assert len(list(made.iterdir())) == 1


def test_names_that_some_systems_take_for_the_same_are_told_apart(tmp_path):
    out = tools.unpack.Folder(tmp_path / "images")
    out.place.mkdir()
    for label in ("Cat", "cat", "a/b", "a:b"):
        out.add(tools.unpack.Found("x", label, PNG))
        out.add(tools.unpack.Found("x", label, PNG))
    assert {path.name for path in out.place.iterdir()} == {"Cat", "cat_2", "a_b", "a_b_2"}
    assert all(len(list(path.iterdir())) == 2 for path in out.place.iterdir())


@pytest.mark.parametrize("kind", ["npz", "zip"])
def test_other_labels_make_another_data_set(place, kind):
    """A class-conditional run must not resume with other classes; a folder's names tell them."""
    paint(place / "x", count=4)
    found = []
    for labels in ([0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1]):
        if kind == "npz":
            images = np.zeros((4, 8, 8), np.uint8)
            np.savez("x.npz", images=images, labels=np.array(labels))
        else:
            names = sorted(path.name for path in (place / "x").iterdir())
            with zipfile.ZipFile("x.zip", "w") as archive:
                for name in names:
                    archive.write(place / "x" / name, name)
                pairs = [list(pair) for pair in zip(names, labels, strict=True)]
                archive.writestr("dataset.json", json.dumps({"labels": pairs}))
        found.append(list_images(place / f"x.{kind}").fingerprint)
    assert found[0] == found[1] != found[2]


def test_labels_that_are_none_are_refused_by_what_they_must_be(place, run):
    np.savez("x.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.zeros(4, np.float32))
    line = refused(run("train", *TINY, "--dataset=x.npz", "--conditional"))
    assert "x.npz holds no labels of two classes; a .npz has `labels`, a whole number" in line


def test_a_wrong_mode_names_the_numbers_too(place, run):
    paint(place / "x", count=4)
    line = refused(run("train", *TINY, "--dataset=x", "--mode=65"))
    assert "--mode=65 is not one of: auto, L, RGB, RGBA, or of arrays" in line


def test_folders_that_hold_everything_in_a_tar_are_passed_over(place, unpack):
    """As in a .zip: the folders in them are the classes."""
    paint(place / "x", count=1)
    content = next((place / "x").iterdir()).read_bytes()
    names = ["all/cats/a.png", "all/dogs/a.png", "all/dogs/more/b.png"]
    tar_of(place / "x.tar", [(name, content) for name in names])
    assert unpack("--source=x.tar", "--to=y").status == 0
    found = list_images(place / "y")
    assert found.names == ["cats/a.png", "dogs/a.png", "dogs/more_b.png"]
