"""No silent fault: what is learned is what the folder holds, and whatever is not is said."""

import errno
import io
import json
import os
import struct
import subprocess
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, paint
from filelock import FileLock
from PIL import Image, ImageCms, ImageDraw

import utils
from machinery import checkpoints, decoded, listing, pixels, reading, sampling
from machinery.basics import UserError
from machinery.listing import list_images
from machinery.pixels import FileFault, MachineFault, NeedsScale, Scale, common_scale, read_image

TRAIN = ("train", *TINY, "--run_name=run", "--noise_steps=8")
RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))
LEVELS = np.round(RAMP * 255)


def deep(path: Path, **how) -> np.ndarray:
    """The gray levels (H, W) of an image, scaled by itself where its format fixes no scale."""
    try:
        image, _ = read_image(path, (32, 32), "L", **how)
    except NeedsScale as need:
        image, _ = read_image(path, (32, 32), "L", scale=common_scale([need.scale]))
    return image[0].astype(int)


def remarks_of(folder: Path, mode: str = "auto") -> str:
    return "\n".join(utils.load_dataset(folder, (8, 8), mode).remarks)


# ---- identity ------------------------------------------------------------------------------------


def bitmaps(folder: Path, color: str, count: int = 5) -> Path:
    """Files of the same names, sizes and times, whatever the color."""
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), color).save(folder / f"{number}.bmp")
        os.utime(folder / f"{number}.bmp", ns=(10**18, 10**18))
    return folder


def test_folders_that_differ_in_content_alone_are_two_data_sets(place):
    cats, dogs = bitmaps(place / "cats", "red"), bitmaps(place / "dogs", "blue")
    first, second = (utils.load_dataset(folder, (8, 8)) for folder in (cats, dogs))
    assert first.images[0, :, 0, 0].tolist() == [255, 0, 0]
    assert second.images[0, :, 0, 0].tolist() == [0, 0, 255]
    assert first.fingerprint != second.fingerprint
    assert list_images(cats).old_fingerprint == list_images(dogs).old_fingerprint


def test_a_file_that_is_replaced_under_its_old_time_is_read_again(place):
    folder = bitmaps(place / "x", "red")
    before = utils.load_dataset(folder, (8, 8))
    Image.new("RGB", (8, 8), "blue").save(folder / "new.bmp")
    os.replace(folder / "new.bmp", folder / "3.bmp")
    os.utime(folder / "3.bmp", ns=(10**18, 10**18))
    after = utils.load_dataset(folder, (8, 8))
    assert after.fingerprint != before.fingerprint
    assert after.images[:, 2, 0, 0].tolist() == [0, 0, 0, 255, 0]


@pytest.mark.parametrize("place_of_change", [0, 2**20, 3 * 2**20 // 2, 3 * 2**20 - 1])
def test_a_large_file_is_told_by_its_head_middle_and_tail(place_of_change, place):
    (place / "x").mkdir()
    data = bytearray(3 * 2**20)
    (place / "x/a.bmp").write_bytes(data)
    before = listing.digest_of(str(place / "x/a.bmp"))
    data[place_of_change] = 1
    (place / "x/a.bmp").write_bytes(data)
    is_sampled = place_of_change != 2**20
    assert (listing.digest_of(str(place / "x/a.bmp")) != before) == is_sampled


def test_a_later_start_reads_no_file_again_that_is_unchanged(place, monkeypatch):
    paint(place / "x", count=4)
    utils.load_dataset(place / "x", (8, 8))
    seen, digest_of = [], listing.digest_of
    monkeypatch.setattr(listing, "digest_of", lambda path: seen.append(path) or digest_of(path))
    first = list_images(place / "x")
    assert seen == []
    paint(place / "x", count=1, first_seed=9)
    second = list_images(place / "x")
    assert [Path(path).name for path in seen] == ["picture_0009.png"]
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"x"])
def test_damaged_digests_are_made_again(damage, place):
    paint(place / "x", count=3)
    fingerprint = utils.load_dataset(place / "x", (8, 8)).fingerprint
    [note] = Path("datasets/.cache").glob("*.npz")
    note.write_bytes(damage(note.read_bytes()))
    assert list_images(place / "x").fingerprint == fingerprint


def test_a_run_of_an_earlier_version_resumes_and_takes_the_new_fingerprint(run, place):
    images = list_images(paint(place / "pictures"))
    assert run(*TRAIN, "--dataset=pictures", "--epochs=1").status == 0
    path = checkpoints.paths_of("run")[0]
    stored = torch.load(path, weights_only=True)
    assert stored["data"] == images.fingerprint
    torch.save(stored | {"data": images.old_fingerprint}, path)
    assert run(*TRAIN, "--dataset=pictures", "--epochs=2").status == 0
    assert checkpoints.load("run")["data"] == images.fingerprint


def test_a_run_does_not_resume_with_other_content_or_another_number(run, place):
    bitmaps(place / "pictures", "red")
    assert run(*TRAIN, "--dataset=pictures", "--epochs=1").status == 0
    bitmaps(place / "others", "blue")
    result = run(*TRAIN, "--dataset=others", "--epochs=2")
    assert (result.status, "not those it was trained on" in result.err) == (2, True)
    path = checkpoints.paths_of("run")[0]
    torch.save(torch.load(path, weights_only=True) | {"count": 4}, path)
    result = run(*TRAIN, "--dataset=pictures", "--epochs=2")
    words = "5 images of --dataset=pictures can be read, 4 when it began"
    assert (result.status, words in result.err) == (2, True)


# ---- the cache -----------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit": lambda cache, note: flip(cache, 100),
    "the last bit": lambda cache, note: flip(cache, -1),
    "zeros": lambda cache, note: cache.write_bytes(bytes(cache.stat().st_size)),
    "cut": lambda cache, note: os.truncate(cache, cache.stat().st_size - 192),
    "longer": lambda cache, note: cache.write_bytes(cache.read_bytes() + bytes(192)),
    "another count": lambda cache, note: note.write_text(
        note.read_text().replace('"count": 6', '"count": 5')
    ),
    "another mode": lambda cache, note: note.write_text(
        note.read_text().replace('"is_gray": false', '"is_gray": true')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_decoded_again_and_it_is_said_once(damage, place, capsys):
    paint(place / "x", count=6)
    expected = np.array(utils.load_dataset(place / "x", (8, 8)).images)
    [cache], [note] = (Path("datasets/.cache").glob(f"*.{kind}") for kind in ("bytes", "json"))
    DAMAGES[damage](cache, note)
    capsys.readouterr()
    assert np.array_equal(utils.load_dataset(place / "x", (8, 8)).images, expected)
    assert capsys.readouterr().out.count("damaged; they are decoded again") == 1
    utils.load_dataset(place / "x", (8, 8))
    assert "damaged" not in capsys.readouterr().out


FORGED = {"seen": 9, "count": True, "skipped": [7], "examples": [1], "noticed": {"x": "y"}}
FORGED |= {"is_gray": 0, "scale": [None, 1], "sums": None}


@pytest.mark.parametrize("name, value", [*FORGED.items(), ("examples", {"a": 1}), ("examples", "")])
def test_a_note_of_other_types_is_not_believed_even_under_its_sum(name, value, place):
    paint(place / "x", count=6)
    (place / "x/bad.png").write_text("no image")
    expected = utils.load_dataset(place / "x", (8, 8))
    [note] = Path("datasets/.cache").glob("*.json")
    facts = json.loads(note.read_text())["facts"] | {name: value}
    note.write_text(json.dumps({"facts": facts, "sum": decoded.sum_of(facts)}))
    data = utils.load_dataset(place / "x", (8, 8))
    assert np.array_equal(data.images, expected.images)
    assert (data.remarks, data.mode) == (expected.remarks, expected.mode)


def test_check_sums_are_of_blocks_however_the_data_arrives(monkeypatch):
    monkeypatch.setattr(decoded, "BLOCK", 10)
    data = np.random.default_rng(0).integers(0, 256, 35, np.uint8)
    expected = [zlib.crc32(data[start : start + 10]) for start in (0, 10, 20, 30)]
    for length in (1, 7, 10, 35):
        sums = decoded.BlockSums()
        for start in range(0, 35, length):
            sums.update(data[start : start + length])
        assert sums.values() == expected


def test_a_cache_is_made_where_files_cannot_be_locked(place, monkeypatch):
    def refuse(lock) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    paint(place / "x", count=3)
    monkeypatch.setattr(FileLock, "_acquire", refuse)
    assert len(utils.load_dataset(place / "x", (8, 8)).images) == 3


def test_a_mapped_cache_is_never_written_to_again(place):
    """A process that has it in memory would die of a bus error."""
    paint(place / "x", count=6)
    data = utils.load_dataset(place / "x", (8, 8))
    before = np.array(data.images)
    [note] = Path("datasets/.cache").glob("*.json")
    note.unlink()
    utils.load_dataset(place / "x", (8, 8))
    assert np.array_equal(data.images, before)


# ---- faults of the machine -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_fault_of_the_machine_ends_the_reading_with_its_own_words(number, place, monkeypatch):
    """And nothing of it is remembered: once it is mended, all images are there."""
    paint(place / "x", count=6)
    images = list_images(place / "x")
    read_bytes = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "picture_0003.png":
            raise OSError(number, os.strerror(number))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(UserError, match=rf"picture_0003\.png: {os.strerror(number)}; the same"):
            reading.read_dataset(images, (8, 8))
    data = reading.read_dataset(images, (8, 8))
    assert (len(data.images), data.remarks) == (6, [])


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_what_passes_is_tried_once_more_alone(error, place, monkeypatch):
    paint(place / "x", count=6)
    failures = [error]

    def fail_once(path, *how):
        if Path(path).name == "picture_0003.png" and failures:
            with pixels.faults_of("x"):
                try:
                    raise failures.pop()
                except OSError as passing:
                    raise MemoryError from passing
        return read_image(path, *how)

    monkeypatch.setattr(reading, "read_image", fail_once)
    assert len(utils.load_dataset(place / "x", (8, 8)).images) == 6


def test_a_file_that_could_not_be_read_is_tried_again_at_the_next_start(place, monkeypatch):
    paint(place / "x", count=6)

    def fail(path, *how):
        if Path(path).name == "picture_0003.png":
            raise FileFault("picture_0003.png (a decoder that is not installed)")
        return read_image(path, *how)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "read_image", fail)
        assert len(utils.load_dataset(place / "x", (8, 8)).images) == 5
    assert len(utils.load_dataset(place / "x", (8, 8)).images) == 6


def test_a_file_that_may_not_be_read_is_named_before_anything_is_made(place, monkeypatch):
    paint(place / "x", count=3)

    def fail(path: str) -> bytes:
        raise MachineFault(f"{path}: Permission denied")

    monkeypatch.setattr(listing, "digest_of", fail)
    with pytest.raises(UserError, match="Permission denied; every image must be readable"):
        list_images(place / "x")


# ---- what is left out ----------------------------------------------------------------------------


def test_kinds_are_read_by_content_and_those_that_are_not_are_counted(place):
    folder = paint(place / "x", count=2)
    photo = Image.open(folder / "picture_0000.png")
    kinds = {"jfif": "jpeg", "jpe": "jpeg", "jp2": "jpeg2000", "ppm": "ppm", "pgm": "ppm"}
    for suffix, kind in kinds.items():
        photo.convert("L" if suffix == "pgm" else "RGB").save(folder / f"x.{suffix}", kind)
    for name in ("a.heic", "b.HEIC", "c.svg", "d.txt"):
        (folder / name).write_bytes(b"x")
    data = utils.load_dataset(folder, (8, 8))
    assert len(data.images) == 7
    left_out = "3 images of kinds that are not read, left out: .heic, .svg"
    assert any(remark.startswith(left_out) for remark in data.remarks)


def test_no_other_program_is_started_whatever_a_file_says(place, monkeypatch):
    """An EPS by the name of a photograph would start Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program is started"))
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("a program is started"))
    (place / "photo.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n{} loop\n"
    )
    with pytest.raises(FileFault, match=r"photo\.jpg \(no image of a kind that is read\)"):
        read_image(place / "photo.jpg", (16, 16))


def test_dead_links_are_counted(place):
    folder = paint(place / "x", count=2)
    (folder / "dead.png").symlink_to(place / "nowhere.png")
    assert "1 dead link, such as" in remarks_of(folder)


def test_a_folder_that_may_not_be_opened_is_named_and_is_no_class(place, monkeypatch):
    paint(place / "x/cats", count=2)
    paint(place / "x/dogs", count=2)
    paint(place / "x/owls", count=2)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("owls"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "1 folder may not be opened, left out" in remarks_of(place / "x")
    with pytest.raises(UserError, match=r"--conditional: a folder may not be opened.*owls"):
        listing.check_classes(list_images(place / "x"))


def test_what_training_writes_is_no_part_of_a_data_set(run, place):
    """`--dataset=.` would learn its own previews, and could never be resumed."""
    paint(place, count=10)
    for _ in range(2):
        result = run(*TRAIN, "--dataset=.", "--epochs=1")
        assert result.status == 0, result.err
        assert "10 images" in result.out
    assert "left out, since training writes there" in result.out
    assert len(list_images(place / "results").names) > 0  # asked for, it is one


def test_a_class_without_a_readable_image_is_refused(run, place):
    paint(place / "pictures/cats", count=6)
    (place / "pictures/dogs").mkdir()
    (place / "pictures/dogs/x.png").write_text("no image")
    result = run(*TRAIN, "--dataset=pictures", "--conditional")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "no image of the class dogs can be read" in result.err


def test_an_accent_is_one_whatever_a_system_makes_of_it(place):
    """macOS keeps é as two characters: the same folders are the same classes everywhere."""
    for root, names in {"x": ("caf\u00e9", "bar"), "y": ("cafe\u0301", "bar")}.items():
        for number, name in enumerate(names):
            paint(place / root / name, count=2, first_seed=2 * number)
    one, other = list_images(place / "x"), list_images(place / "y")
    assert one.classes == other.classes == ("bar", "caf\u00e9")
    assert one.fingerprint == other.fingerprint
    assert sampling.check_labels("cafe\u0301", one.classes) == [1]


@pytest.mark.parametrize("names, are_parts", [(("train", "Test"), True), (("cats", "test"), False)])
def test_the_parts_of_a_data_set_are_not_taken_for_classes_in_silence(names, are_parts, place):
    for name in names:
        paint(place / "x" / name, count=1)
    words = "look like the parts of a data set"
    assert (words in "".join(listing.tell_classes(list_images(place / "x"), True))) == are_parts
    advice = "".join(listing.tell_classes(list_images(place / "x"), False))
    assert ("--conditional" in advice) != are_parts


# ---- depth ---------------------------------------------------------------------------------------


def tiff_of_12_bits(path: Path) -> None:
    """A little-endian gray TIFF, two samples in three bytes."""
    rows = b""
    for row in (RAMP * 4095).round().astype(int):
        for one, two in zip(row[::2].tolist(), row[1::2].tolist(), strict=True):
            rows += bytes([one >> 4, (one & 15) << 4 | two >> 8, two & 255])
    tags = [(256, 3, 1, 32), (257, 3, 1, 32), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 32), (279, 4, 1, len(rows))]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(rows))
    path.write_bytes(head + rows + ifd + struct.pack("<I", 0))


@pytest.mark.parametrize("end", [1, 1.0001, 1.004, 200, 255, 255.5, 256, 60_000, 1e6])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_a_ramp_is_a_ramp_whatever_its_numbers(kind, end, place):
    """Where numbers fill most of 0 to 1, 255 or 65535, that is the scale; else their own end."""
    if kind is np.int32 and end < 100:
        pytest.skip("whole numbers")
    Image.fromarray((RAMP * end).astype(kind)).save(place / "x.tif")
    white = next((scale for scale in (1, 255, 65535) if scale / 2 < end <= scale), end)
    assert np.abs(deep(place / "x.tif") - RAMP * end / white * 255).max() <= 1.5


def test_numbers_from_minus_one_are_black_there(place):
    Image.fromarray((2 * RAMP - 1).astype(np.float32)).save(place / "x.tif")
    assert np.abs(deep(place / "x.tif") - LEVELS).max() <= 1


def test_a_formats_own_depth_is_its_scale(place):
    tiff_of_12_bits(place / "x.tif")
    assert np.abs(deep(place / "x.tif") - LEVELS).max() <= 1
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(place / "x.png")
    assert np.abs(deep(place / "x.png") - LEVELS).max() <= 1


def test_images_of_floats_share_one_scale_and_it_is_said(place):
    """Image by image, a dim one would be as bright as the others."""
    (place / "x").mkdir()
    for name, end in {"bright": 1.004, "dim": 0.25}.items():
        Image.fromarray((RAMP * end).astype(np.float32)).save(place / "x" / f"{name}.tif")
    paint(place / "x", count=2)
    data = utils.load_dataset(place / "x", (32, 32))
    assert data.images[0].max() == 255
    assert abs(int(data.images[1].max()) - 0.25 / 1.004 * 255) <= 1
    assert "images of floats or 32-bit numbers: 0 is black, 1.004 is white" in data.remarks
    again = utils.load_dataset(place / "x", (32, 32))
    assert (again.remarks, np.array_equal(again.images, data.images)) == (data.remarks, True)


def test_few_levels_and_one_color_are_said_with_an_example(place):
    (place / "x").mkdir()
    Image.fromarray((RAMP * 4095).astype(np.uint16)).save(place / "x/dark.png")
    for number in range(3):
        Image.new("RGB", (8, 8), (200, 30, number)).save(place / "x" / f"plain_{number}.png")
    remarks = remarks_of(place / "x")
    assert f"1 {pixels.FEW_LEVELS} (dark.png)" in remarks
    assert f"3 {pixels.ONE_COLOR} (plain_0.png)" in remarks


def test_numbers_that_are_none_are_black(place):
    levels = RAMP.astype(np.float32)
    levels[:, :8] = np.nan
    levels[0, 0] = -np.inf
    Image.fromarray(levels).save(place / "x.tif")
    assert (deep(place / "x.tif")[:, :8] == 0).all()
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(place / "none.tif")
    assert (deep(place / "none.tif") == 0).all()
    assert common_scale([Scale(0, 0)]) == Scale(0, 0)


# ---- color and alpha -----------------------------------------------------------------------------


def matrix_profile(primaries: list[tuple], gamma: float, kind: bytes = b"RGB ") -> bytes:
    """An ICC profile (version 2) of primaries in XYZ (D50) and one gamma; or a gray one."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)}
    tags[b"cprt"] = b"text" + bytes(4) + b"none\0"
    tags[b"wtpt"] = b"XYZ " + bytes(4) + number(0.9642) + number(1) + number(0.8249)
    for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=False):
        tags[name] = b"XYZ " + bytes(4) + b"".join(map(number, xyz))
    for name in (b"kTRC",) if kind == b"GRAY" else (b"rTRC", b"gTRC", b"bTRC"):
        tags[name] = curve
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        padded = body + bytes(-len(body) % 4)
        table += name + struct.pack(">II", start + len(data), len(padded))
        data += padded
    head = struct.pack(
        ">I4sI4s4s4s", start + len(data), bytes(4), 0x02400000, b"mntr", kind, b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + number(0.9642) + number(1) + number(0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


ADOBE = matrix_profile(
    [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)], 2.2
)
PATCHES = np.kron(np.random.default_rng(0).integers(40, 216, (4, 4, 3)), np.ones((8, 8, 1)))
PHOTO = Image.fromarray(PATCHES.astype(np.uint8))


def in_profile(profile: bytes) -> Image.Image:
    """The same colors, in other numbers."""
    target = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.profileToProfile(PHOTO, ImageCms.createProfile("sRGB"), target)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
def test_colors_of_another_profile_come_out_in_srgb(suffix, place):
    how = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {"lossless": True}
    in_profile(ADOBE).save(place / f"x.{suffix}", icc_profile=ADOBE, **how)
    image, remarks = read_image(place / f"x.{suffix}", (32, 32))
    assert pixels.CONVERTED in remarks
    difference = np.abs(image.transpose(1, 2, 0).astype(int) - np.asarray(PHOTO))
    assert difference.mean() < 1
    taken = np.asarray(in_profile(ADOBE)).astype(int) - np.asarray(PHOTO)
    assert np.abs(taken).mean() > 4  # what came out before


def test_transparency_is_kept_beside_a_profile(place):
    picture = in_profile(ADOBE)
    picture.putalpha(128)
    picture.save(place / "x.png", icc_profile=ADOBE)
    image, _ = read_image(place / "x.png", (32, 32), "RGBA")
    assert (image[3] == 128).all()
    assert np.abs(image[:3].transpose(1, 2, 0) * (255 / 128) - np.asarray(PHOTO)).mean() < 2


def test_gray_of_a_profile_stays_gray(place):
    profile = matrix_profile([], 1.0, b"GRAY")
    Image.fromarray(LEVELS.astype(np.uint8)).save(place / "x.png", icc_profile=profile)
    image, remarks = read_image(place / "x.png", (32, 32))
    assert pixels.CONVERTED in remarks
    assert (image == image[0]).all()
    assert image[0, 0, 16] > LEVELS[0, 16] + 20  # linear light is brighter in sRGB


def test_srgb_and_broken_profiles_change_nothing(place):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, remark in ((srgb, None), (b"no profile" * 40, pixels.BAD_PROFILE)):
        PHOTO.save(place / "x.png", icc_profile=profile)
        image, remarks = read_image(place / "x.png", (32, 32))
        assert np.array_equal(image.transpose(1, 2, 0), np.asarray(PHOTO))
        assert remarks == ({remark} if remark else set())


def test_a_start_is_brought_to_srgb_as_a_data_set_is(place, capsys):
    in_profile(ADOBE).save(place / "x.png", icc_profile=ADOBE)
    start = reading.read_start("x.png", "", (32, 32), "RGB")
    difference = start.image.permute(1, 2, 0).int() - torch.from_numpy(np.array(PHOTO)).int()
    assert difference.abs().float().mean() < 1
    assert "converted to sRGB" in capsys.readouterr().out


def test_lab_is_read_in_every_mode(place):
    lab = ImageCms.profileToProfile(
        PHOTO, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab.save(place / "x.tif")
    for mode, channels in pixels.CHANNELS.items():
        image, _ = read_image(place / "x.tif", (32, 32), mode)
        assert image.shape == (channels, 32, 32)
    rgb = read_image(place / "x.tif", (32, 32))[0].transpose(1, 2, 0).astype(int)
    assert np.abs(rgb - np.asarray(PHOTO)).mean() < 3


def test_alpha_that_is_zero_throughout_is_none(place):
    picture = PHOTO.copy()
    picture.putalpha(0)
    picture.save(place / "x.png")
    for mode in ("RGB", "RGBA"):
        image, _ = read_image(place / "x.png", (32, 32), mode)
        assert np.array_equal(image[:3].transpose(1, 2, 0), np.asarray(PHOTO))


def test_transparency_of_16_bits_is_kept(place):
    def chunk(kind: bytes, data: bytes) -> bytes:
        length = struct.pack(">I", len(data))
        return length + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    levels = np.where(RAMP < 0.5, 0, RAMP * 65535).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in levels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 0, 0, 0, 0))
    body = chunk(b"tRNS", struct.pack(">H", 0)) + chunk(b"IDAT", zlib.compress(raw))
    (place / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b""))
    image, _ = read_image(place / "x.png", (32, 32), "RGBA")
    assert (image[3] == np.where(RAMP < 0.5, 0, 255)).all()
    shown, remarks = read_image(place / "x.png", (32, 32))
    assert pixels.TRANSPARENT in remarks
    assert (shown[:, :, 0] == 255).all()


def test_transparent_images_are_counted_and_the_way_to_keep_them_is_named(place):
    (place / "x").mkdir()
    for number in range(3):
        drawing = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
        ImageDraw.Draw(drawing).ellipse((8, 8, 24, 24), fill=(number, 0, 0, 255))
        drawing.save(place / "x" / f"{number}.png")
    words = "3 transparent: shown on white; --mode=RGBA keeps it (0.png)"
    assert words in remarks_of(place / "x")
    assert "transparent" not in remarks_of(place / "x", "RGBA")


def test_pages_films_and_photographs_have_their_own_words(place):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name in ("film.gif", "pages.tif", "photo.mpo"):
        frames[0].save(place / name, save_all=True, append_images=frames[1:])
    os.rename("photo.mpo", "photo.jpg")
    found = {name: read_image(name, (8, 8))[1] for name in ("film.gif", "pages.tif", "photo.jpg")}
    assert pixels.ANIMATED in found["film.gif"]
    assert pixels.PAGES in found["pages.tif"]
    assert not {pixels.ANIMATED, pixels.PAGES} & found["photo.jpg"]


# ---- limits --------------------------------------------------------------------------------------


def test_readers_together_hold_no_more_than_the_budget():
    """And an image larger than all of it is read alone."""
    memory = pixels.Memory(threading)
    held, peak, lock = [0], [0], threading.Lock()

    def read(count: int) -> None:
        with memory.hold(count):
            with lock:
                held[0] += count
                peak[0] = max(peak[0], held[0])
            threading.Event().wait(0.01)
            with lock:
                held[0] -= count

    whole = memory.UNIT * memory.UNITS
    sizes = [whole // 2, whole // 3, whole // 2, 5 * whole, whole // 4] * 4
    threads = [threading.Thread(target=read, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peak[0] <= max(5 * whole, whole)
    assert peak[0] == 5 * whole  # nothing beside it


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_photograph_is_read_small_before_the_limit_is_asked(place, monkeypatch):
    Image.new("RGB", (640, 480), "red").save(place / "x.jpg")
    Image.new("RGB", (640, 480), "red").save(place / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    image, _ = read_image(place / "x.jpg", (8, 8))
    assert image[0].min() > 250
    with pytest.raises(FileFault, match="more than 200,000 pixels"):
        read_image(place / "x.png", (8, 8))


def test_many_bits_are_brought_to_eight_block_by_block(place, monkeypatch):
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(place / "x.png")
    expected = deep(place / "x.png")
    monkeypatch.setattr(pixels, "BLOCK", 40)  # one row at a time
    assert np.array_equal(deep(place / "x.png"), expected)


# ---- masks ---------------------------------------------------------------------------------------


@pytest.fixture
def photo(place) -> Path:
    PHOTO.save(place / "photo.png")
    return place / "photo.png"


def square(value: int, mode: str = "L") -> Image.Image:
    """A sixteenth of a mask, in one corner of the middle."""
    mask = Image.new(mode, (32, 32))
    ImageDraw.Draw(mask).rectangle((8, 8, 15, 15), fill=value if mode == "L" else (value,) * 4)
    return mask


MASKS = {"gray": square(255), "strokes": square(255, "RGBA"), "labels": square(1)}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_repaints_what_is_white_and_nothing_else(kind, photo, capsys):
    """Strokes on a transparent layer, and the numbers 0 and 1, mean what they look like."""
    MASKS[kind].save("mask.png")
    start = reading.read_start("photo.png", "mask.png", (16, 16), "RGB")
    expected = torch.zeros(1, 16, 16)
    expected[:, 4:8, 4:8] = 1
    assert torch.equal(start.mask, expected)
    assert ("1 is taken for white" in capsys.readouterr().out) == (kind == "labels")


@pytest.mark.parametrize("value, words", [(0, "keep everything"), (255, "repaint everything")])
def test_a_mask_that_says_nothing_is_refused(value, words, photo):
    Image.new("L", (32, 32), value).save("mask.png")
    with pytest.raises(UserError, match=words):
        reading.read_start("photo.png", "mask.png", (16, 16), "RGB")


# ---- the terminal --------------------------------------------------------------------------------


def test_c_libraries_have_no_say_while_images_are_read(place, monkeypatch, capfd):
    """libtiff writes to file descriptor 2, between the lines of the progress bar."""
    paint(place / "x", count=3)

    def shout(path, *how):
        os.write(2, b"TIFFReadDirectory: Warning\n")
        return read_image(path, *how)

    monkeypatch.setattr(reading, "read_image", shout)
    utils.load_dataset(place / "x", (8, 8))
    assert "TIFFReadDirectory" not in capfd.readouterr().err
    os.write(2, b"heard again")
    assert "heard again" in capfd.readouterr().err


@pytest.mark.parametrize("mode", pixels.CHANNELS)
@pytest.mark.parametrize("kind", ["RGBA", "LA", "PA"])
def test_an_image_changed_in_bands_of_rows_is_the_same(tmp_path, monkeypatch, kind, mode):
    """Large images are changed some rows at a time, to hold two copies of them and not four."""
    levels = np.random.default_rng(0).integers(0, 256, (23, 17, 4), dtype=np.uint8)
    picture = Image.fromarray(levels)
    if kind == "PA":
        picture.convert("RGB").quantize(8).save(tmp_path / "a.png", transparency=3)
    else:
        picture.convert(kind).save(tmp_path / "a.png")
    whole = pixels.read_image(tmp_path / "a.png", (12, 12), mode)
    bands = []
    monkeypatch.setattr(pixels.Memory, "UNIT", 17 * 5)
    changed = pixels.in_bands
    count = lambda picture, change: changed(picture, lambda band: bands.append(1) or change(band))  # noqa: E731
    monkeypatch.setattr(pixels, "in_bands", count)
    again = pixels.read_image(tmp_path / "a.png", (12, 12), mode)
    assert np.array_equal(whole[0], again[0]) and whole[1] == again[1]
    assert len(bands) == 5
