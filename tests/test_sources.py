"""Where images come from: archives and arrays hold what a folder holds, and do no harm."""

import io
import json
import os
import pickle
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, files_below, paint, refused
from PIL import Image

import utils
from machinery import checkpoints, reading
from machinery.basics import UserError
from machinery.listing import check_classes, list_images

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
    shutil.rmtree(reading.CACHE)
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
    assert "1 images of kinds that are not read, left out: .heic" in found.remarks


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


def test_no_more_is_unpacked_than_an_entry_says(place):
    with zipfile.ZipFile("x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**6))
    data = bytearray((place / "x.zip").read_bytes())
    directory = data.index(b"PK\1\2")
    data[directory + 24 : directory + 28] = (1000).to_bytes(4, "little")
    (place / "x.zip").write_bytes(data)
    [member] = list_images(Path("x.zip")).members
    with pytest.raises(zipfile.BadZipFile, match="check sum"):
        member.read_bytes()


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
    "text": (save(np.array([["a"]])), "shape 1x1"),
    "letters": (save(np.full((4, 8, 8), "a")), "numbers of the kind"),
    "records": (save(np.zeros((4, 8, 8), "u1,u1")), "numbers of the kind"),
    "complex": (save(LEVELS * 1j), "numbers of the kind complex128"),
    "64 bits": (save(LEVELS.astype(np.int64)), "numbers of the kind int64"),
    "two numbers": (save(LEVELS[0]), "shape 8x8"),
    "one image": (save(LEVELS[:, :, :3]), "shape 4x8x3"),
    "many channels": (save(np.zeros((4, 8, 8, 7), np.uint8)), "shape 4x8x8x7"),
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
    [unpacked] = reading.CACHE.glob("*.npy")
    data = bytearray(unpacked.read_bytes())
    data[-1] ^= 1
    unpacked.write_bytes(data)
    assert list_images(Path("x.npz")).fingerprint == expected
    assert unpacked.read_bytes() != data


def test_a_file_of_another_kind_is_told_what_reads_it(run, place):
    (place / "x.parquet").write_bytes(b"PAR1")
    line = refused(run("train", "--dataset=x.parquet", *TINY))
    assert "is a file" in line and "tools.unpack" in line
