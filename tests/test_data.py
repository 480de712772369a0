"""Reading, keeping and writing pictures: the right pixels, each once per epoch, files whole."""

import collections
import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, files_below, paint
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import utils
from machinery import basics, checkpoints, decoded, pixels, reading, writing
from machinery.basics import UserError
from machinery.listing import CACHE, check_classes, list_images
from machinery.pixels import IMAGE_SUFFIXES, FileFault, MachineFault, NeedsScale, common_scale

GRAY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)  # 0, 4, ..., 252
COLORS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
LEFT = np.tile(np.arange(8) < 4, (8, 1))  # the left half
PALETTE = COLORS.reshape(-1, 3)  # 64 colors
NUMBERS = np.arange(64, dtype=np.uint8).reshape(8, 8)  # of the colors in PALETTE
ORANGE = (230, 120, 40)


def rgb(levels: np.ndarray) -> np.ndarray:
    """Gray levels (H, W) as RGB (H, W, 3)."""
    return np.stack([np.asarray(levels)] * 3, axis=2)


def with_palette(numbers: np.ndarray = NUMBERS) -> Image.Image:
    picture = Image.fromarray(numbers)  # as "L", which becomes "P" with a palette
    picture.putpalette(PALETTE.tobytes())
    return picture


def with_alpha(colors: np.ndarray, alpha: np.ndarray | int) -> Image.Image:
    """LA or RGBA: gray levels (H, W) or colors (H, W, 3) with an alpha channel."""
    picture = Image.fromarray(colors)
    picture.putalpha(Image.fromarray(np.broadcast_to(np.uint8(alpha), (8, 8)).copy()))
    return picture


def solid(mode: str, color) -> Image.Image:
    return Image.new(mode, (8, 8), color)


def white_where(mask: np.ndarray, colors: np.ndarray) -> np.ndarray:
    return np.where(mask[:, :, None], 255, colors)


def read(path, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> np.ndarray:
    """A picture as the data set would hold it, but (H, W, C) and in a type that does not wrap."""
    try:
        image, _ = reading.read_image(path, size, mode)
    except NeedsScale as need:
        image, _ = reading.read_image(path, size, mode, scale=common_scale([need.scale]))
    return image.transpose(1, 2, 0).astype(int)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch) -> None:
    """What a listing keeps in the cache is kept in no folder of ours."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def forbid(*_, **__):
    pytest.fail("this should not have been called")


# ---- finding images ------------------------------------------------------------------------------


def touch(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder) -> list[str]:
    return [path.removeprefix(f"{folder}/") for path in list_images(folder).paths]


def link(path, target) -> None:
    """A symbolic link to a folder; Windows gives them to few."""
    try:
        path.symlink_to(target, target_is_directory=True)
    except OSError:
        pytest.skip("no right to make symbolic links")


def test_every_picture_is_found_and_nothing_else(tmp_path):
    pictures = [
        "B.png",
        "a b/c.TIFF",
        "a/x.JPG",
        "a/y.jpeg",
        "deep/er/still/z.webp",
        "folder.png/inside.gif",
        "x.y.bmp",
    ]
    pictures += ["\u00e9t\u00e9/\u65e5\u672c.Png", "z.tif"]
    touch(tmp_path, *pictures)
    touch(
        tmp_path,
        ".hidden.png",
        ".git/x.png",
        "a/.cache/y.png",
        ".png",
        "notes.txt",
        "png",
        "x.png.part",
        "x.svg",
    )
    assert found(tmp_path) == sorted(pictures)


def test_a_circle_of_links_ends_and_a_link_elsewhere_is_followed(tmp_path):
    touch(tmp_path, "pictures/a/x.png", "elsewhere/y.png")
    link(tmp_path / "pictures" / "a" / "back", tmp_path / "pictures")
    link(tmp_path / "pictures" / "more", tmp_path / "elsewhere")
    assert found(tmp_path / "pictures") == ["a/x.png", "more/y.png"]


def test_a_link_to_nothing_is_passed_over(tmp_path):
    touch(tmp_path, "x.png")
    link(tmp_path / "y.png", tmp_path / "nothing")
    assert found(tmp_path) == ["x.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_with_the_name_of_a_picture_is_passed_over(tmp_path):
    """Opening it would wait for ever."""
    touch(tmp_path, "a.png")
    os.mkfifo(tmp_path / "x.png")
    assert found(tmp_path) == ["a.png"]


def test_the_order_is_the_same_on_every_file_system(tmp_path, monkeypatch):
    """Of two ways to the same folder, too, the same one is taken."""
    touch(tmp_path, *[f"{folder}/{number}.png" for folder in "cab" for number in (3, 10, 1)])
    link(tmp_path / "d", tmp_path / "b")
    forwards, walk = found(tmp_path), os.walk

    def walk_in(reverse: bool):
        def sorted_walk(top, **options):
            for place, folders, files in walk(top, **options):
                folders.sort(reverse=reverse)
                files.sort(reverse=reverse)
                yield place, folders, files

        return sorted_walk

    for reverse in (False, True):
        monkeypatch.setattr(os, "walk", walk_in(reverse))
        assert found(tmp_path) == forwards


# ---- classes -------------------------------------------------------------------------------------


def test_the_first_level_folders_that_hold_pictures_are_the_classes(tmp_path):
    """In their subfolders too; a folder's own name may come again further down."""
    touch(tmp_path, "dog/x.png", "cat/old/y.png", "cat/dog/z.png", "Ant/a.png", "zoo/deep/er/b.png")
    touch(tmp_path, "empty/notes.txt", ".hidden/c.png", "b.png")
    images = list_images(tmp_path)
    assert images.classes == ("Ant", "cat", "dog", "zoo")
    assert images.labels.dtype == np.int64
    assert dict(zip(images.names, images.labels.tolist(), strict=True)) == {
        "dog/x.png": 2,
        "cat/old/y.png": 1,
        "cat/dog/z.png": 1,
        "Ant/a.png": 0,
        "zoo/deep/er/b.png": 3,
        "b.png": -1,
    }


def test_an_image_keeps_its_label_when_others_cannot_be_read(place):
    """Found again by its color: red is in a, green in b, blue lies outside."""
    for number, (folder, color) in enumerate(
        [("a", "red"), ("b", "green"), (".", "blue"), ("b", "green")]
    ):
        for copy in range(3):
            (place / "x" / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), color).save(place / "x" / folder / f"{number}{copy}.png")
    for name in ("a/00.png", "b/11.png", "b/32.png", "21.png"):
        (place / "x" / name).write_text("no picture")
    data = utils.load_dataset(place / "x", (8, 8))
    shown = data.images.mean(axis=(2, 3)).argmax(axis=1)
    assert np.array_equal(data.labels, np.where(shown == 2, -1, shown))
    assert collections.Counter(data.labels.tolist()) == {0: 2, 1: 4, -1: 2}


@pytest.mark.parametrize(
    "names", [["a/x.png", "b/y.png"], ["a/x.png", "b/c/y.png", "al/z.png", "All/z.png"]]
)
def test_folders_of_pictures_are_good_classes(names, tmp_path):
    touch(tmp_path, *names)
    check_classes(list_images(tmp_path))


@pytest.mark.parametrize(
    "names, words",
    [
        (["x.png", "y.png"], ["none holds images", "it needs two"]),
        (["a/x.png", "a/b/y.png"], ["only a holds images", "it needs two"]),
        (
            ["a/x.png", "b/y.png", "c.png", "d.png"],
            ["2 images in no class", "c.png", "move them"],
        ),
        (["a,b/x.png", "c/y.png"], ["a,b", "--label=a,b", "rename it"]),
        (["all/x.png", "c/y.png"], ["--label=all", "rename it"]),
    ],
)
def test_folders_that_cannot_be_classes_are_refused(names, words, tmp_path):
    touch(tmp_path, *names)
    with pytest.raises(UserError, match="--conditional") as refusal:
        check_classes(list_images(tmp_path))
    assert all(word in str(refusal.value) for word in words)


# ---- reading one image ---------------------------------------------------------------------------

HALF = np.where(LEFT, 0, 255).astype(np.uint8)  # alpha: the left half is not to be seen
HIDDEN = white_where(LEFT, COLORS)
INKS = np.zeros((8, 8, 4), np.uint8)
INKS[:4, :4, 0] = INKS[:4, 4:, 1] = INKS[4:, :4, 2] = INKS[4:, 4:, 3] = 255
INKED = np.zeros((8, 8, 3), np.uint8)
INKED[:4, :4], INKED[:4, 4:], INKED[4:, :4] = (0, 255, 255), (255, 0, 255), (255, 255, 0)
FRAMES = {
    "save_all": True,
    "append_images": [with_palette(NUMBERS[::-1].copy()), with_palette(NUMBERS.T.copy())],
}
FILM = {"save_all": True, "append_images": [Image.fromarray(255 - COLORS)]}
TO_F32, TO_I32 = np.float32, np.int32
NAN = np.where(LEFT, np.nan, GRAY / np.float32(255)).astype(np.float32)
PNG_TRANSPARENT = bytes(0 if number < 32 else 255 for number in range(64))

ODD = [  # a file, its picture, how it is saved, what must be seen
    ("gray.png", Image.fromarray(GRAY), {}, rgb(GRAY)),
    ("color.png", Image.fromarray(COLORS), {}, COLORS),
    ("color.bmp", Image.fromarray(COLORS), {}, COLORS),
    ("color.tif", Image.fromarray(COLORS), {}, COLORS),
    ("packed.tiff", Image.fromarray(COLORS), {"compression": "tiff_lzw"}, COLORS),
    ("color.webp", Image.fromarray(COLORS), {"lossless": True}, COLORS),
    ("gray.bmp", Image.fromarray(GRAY), {}, rgb(GRAY)),
    ("black_or_white.png", Image.fromarray(LEFT), {}, rgb(LEFT * 255)),
    ("black_or_white.tif", Image.fromarray(LEFT), {}, rgb(LEFT * 255)),
    # palettes
    ("palette.png", with_palette(), {}, COLORS),
    ("palette.bmp", with_palette(), {}, COLORS),
    ("palette.gif", with_palette(), {}, COLORS),
    (
        "palette_one_transparent.png",
        with_palette(),
        {"transparency": 9},
        white_where(NUMBERS == 9, COLORS),
    ),
    (
        "palette_alphas.png",
        with_palette(),
        {"transparency": PNG_TRANSPARENT},
        white_where(NUMBERS < 32, COLORS),
    ),
    (
        "palette_one_transparent.gif",
        with_palette(),
        {"transparency": 9},
        white_where(NUMBERS == 9, COLORS),
    ),
    # transparency: white shows, the color beneath does not
    ("opaque.png", with_alpha(COLORS, 255), {}, COLORS),
    ("hidden.png", with_alpha(COLORS, HALF), {}, HIDDEN),
    ("hidden.webp", with_alpha(COLORS, HALF), {"lossless": True, "exact": True}, HIDDEN),
    ("hidden.tif", with_alpha(COLORS, HALF), {}, HIDDEN),
    ("gray_hidden.png", with_alpha(GRAY, HALF), {}, white_where(LEFT, rgb(GRAY))),
    ("gray_opaque.png", with_alpha(GRAY, 255), {}, rgb(GRAY)),
    # by a program that does not know alpha
    ("all_hidden.png", with_alpha(COLORS, 0), {}, COLORS),
    (
        "one_gray_transparent.png",
        Image.fromarray(GRAY),
        {"transparency": 40},
        rgb(np.where(GRAY == 40, 255, GRAY)),
    ),
    (
        "one_color_transparent.png",
        solid("RGB", ORANGE),
        {"transparency": ORANGE},
        np.full((8, 8, 3), 255),
    ),
    # more than 8 bits
    ("gray_16.png", Image.fromarray(GRAY.astype(np.uint16) * 257), {}, rgb(GRAY)),
    ("dark_16.png", Image.fromarray(GRAY.astype(np.uint16)), {}, rgb(np.round(GRAY / 257))),
    ("gray_16.tif", Image.fromarray(GRAY.astype(np.uint16) * 257), {}, rgb(GRAY)),
    ("gray_32.tif", Image.fromarray(GRAY.astype(TO_I32)), {}, rgb(GRAY)),
    ("gray_32_of_16.tif", Image.fromarray(GRAY.astype(TO_I32) * 257), {}, rgb(GRAY)),
    (
        "gray_32_large.tif",
        Image.fromarray(GRAY.astype(TO_I32) * 10**6),
        {},
        rgb(np.round(GRAY / 252 * 255)),
    ),
    (
        "gray_32_negative.tif",
        Image.fromarray(GRAY.astype(TO_I32) - 100),
        {},
        rgb(np.round(GRAY / 252 * 255)),
    ),
    ("float_to_1.tif", Image.fromarray((GRAY / 255).astype(TO_F32)), {}, rgb(GRAY)),
    ("float_to_255.tif", Image.fromarray(GRAY.astype(TO_F32)), {}, rgb(GRAY)),
    (
        "float_large.tif",
        Image.fromarray(GRAY.astype(TO_F32) * 1e6),
        {},
        rgb(np.round(GRAY / 252 * 255)),
    ),
    ("float_holes.tif", Image.fromarray(NAN), {}, rgb(np.where(LEFT, 0, GRAY))),
    ("float_black.tif", solid("F", 0.0), {}, np.zeros((8, 8, 3))),
    # print colors, films
    ("inks.tif", Image.fromarray(INKS, "CMYK"), {}, INKED),
    ("film.gif", with_palette(), FRAMES, COLORS),
    ("film.png", Image.fromarray(COLORS), FILM, COLORS),
    ("film.webp", Image.fromarray(COLORS), {**FILM, "lossless": True}, COLORS),
]


@pytest.mark.parametrize("name, picture, options, expected", ODD, ids=[case[0] for case in ODD])
def test_an_odd_file_gives_the_right_pixels(name, picture, options, expected, tmp_path):
    picture.save(tmp_path / name, **options)
    assert np.array_equal(read(tmp_path / name), expected)


@pytest.mark.parametrize("name, picture, options, expected", ODD, ids=[case[0] for case in ODD])
def test_an_odd_file_in_gray_is_the_brightness_of_its_colors(
    name, picture, options, expected, tmp_path
):
    picture.save(tmp_path / name, **options)
    brightness = expected @ np.array([[0.299], [0.587], [0.114]])  # ITU-R BT.601, as in JPEG
    assert abs(read(tmp_path / name, mode="L") - brightness).max() < 1  # rounding


@pytest.mark.parametrize("name, picture, options, expected", ODD, ids=[case[0] for case in ODD])
def test_an_odd_file_with_its_transparency_looks_the_same_on_white(
    name, picture, options, expected, tmp_path
):
    picture.save(tmp_path / name, **options)
    *_, alpha = colors = np.moveaxis(read(tmp_path / name, mode="RGBA"), 2, 0)
    assert np.array_equal(colors[:3] + 255 - alpha, np.moveaxis(np.asarray(expected), 2, 0))
    assert alpha.min() == 255 or "hidden" in name or "transparent" in name or "alphas" in name


def test_every_mode_has_its_number_of_channels(tmp_path):
    with_alpha(COLORS, HALF).save(tmp_path / "x.png")
    assert {"auto", *reading.CHANNELS} == {*reading.MODES}
    for mode, channels in reading.CHANNELS.items():
        assert reading.read_image(tmp_path / "x.png", (4, 6), mode)[0].shape == (channels, 4, 6)


@pytest.mark.parametrize("size", [(8, 8), (5, 5), (13, 13)])
def test_a_hidden_color_does_not_leak_into_its_neighbours(size, tmp_path):
    """Blue is seen on the right, beside it red is hidden."""
    colors = np.where(LEFT[:, :, None], (255, 0, 0), (0, 0, 255)).astype(np.uint8)
    with_alpha(colors, HALF).save(tmp_path / "x.png")
    red, green, blue, alpha = np.moveaxis(read(tmp_path / "x.png", size, "RGBA"), 2, 0)
    assert red.max() == green.max() == 0
    assert np.array_equal(blue, alpha)
    assert (alpha.min(), alpha.max()) == (0, 255)


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (20, 20)])
def test_no_color_is_brighter_than_its_alpha(size, tmp_path):
    """Where Lanczos overshoots it would be: no such color can be shown."""
    alpha = np.random.default_rng(4).integers(0, 256, (8, 8))
    with_alpha(COLORS, alpha).save(tmp_path / "x.png")
    pixels = read(tmp_path / "x.png", size, "RGBA")
    assert (pixels[:, :, :3] <= pixels[:, :, 3:]).all()


@pytest.mark.parametrize("alpha", [255, 128, 8])
def test_a_premultiplied_color_can_be_divided_again(alpha, tmp_path):
    with_alpha(COLORS, alpha).save(tmp_path / "x.png")
    pixels = read(tmp_path / "x.png", mode="RGBA")
    assert (pixels[:, :, 3] == alpha).all()
    divided = pixels[:, :, :3] * 255 / alpha
    # half a level, enlarged
    assert abs(divided - COLORS).max() <= 255 / alpha / 2 * (alpha < 255) + 1e-9


@pytest.mark.parametrize("alpha", [1, 64, 128, 254])
def test_half_transparency_mixes_with_white(alpha, tmp_path):
    with_alpha(COLORS, alpha).save(tmp_path / "x.png")
    mixed = COLORS * (alpha / 255) + 255 * (1 - alpha / 255)
    assert abs(read(tmp_path / "x.png") - mixed).max() <= 1  # Pillow mixes in whole levels


@pytest.mark.parametrize(
    "picture, options, color",
    [
        (solid("RGB", ORANGE), {}, ORANGE),
        (solid("RGB", ORANGE), {"progressive": True}, ORANGE),
        (solid("L", 77), {}, (77, 77, 77)),
        (solid("CMYK", (255, 0, 0, 0)), {}, (0, 255, 255)),
        (solid("CMYK", (0, 0, 0, 255)), {}, (0, 0, 0)),
    ],
    ids=["color", "progressive", "gray", "cyan ink", "black ink"],
)
def test_a_jpeg_of_any_mode_gives_its_color(picture, options, color, tmp_path):
    picture.save(tmp_path / "x.jpg", **options)
    # JPEG rounds brightness and two color channels
    assert abs(read(tmp_path / "x.jpg") - color).max() <= 3


UPRIGHT = np.random.default_rng(1).integers(0, 256, (6, 10, 3), dtype=np.uint8)
STORED = {  # how a camera stores the picture under each EXIF orientation
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_taken_sideways_is_turned_upright(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    picture.save(tmp_path / f"x.{suffix}", exif=exif, lossless=True)
    assert np.array_equal(read(tmp_path / f"x.{suffix}", size=(6, 10)), UPRIGHT)


def test_a_large_photograph_taken_sideways_is_turned_upright(tmp_path):
    """It is decoded small, and then turned: its stored left must be seen on top."""
    stored = np.zeros((400, 600, 3), np.uint8)
    stored[:, :300] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "x.jpg", exif=exif)
    seen = read(tmp_path / "x.jpg", size=(24, 16))
    assert seen[:11].min() > 245  # away from the edge, where JPEG and Lanczos both ring
    assert seen[13:].max() < 10


def test_the_centre_is_cut_out(tmp_path):
    """At the same height nothing is resized: the middle columns come out to the bit.

    Of a tall picture, the rows.
    """
    wide = np.random.default_rng(2).integers(0, 256, (8, 20, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2).copy()).save(tmp_path / "tall.png")
    assert np.array_equal(read(tmp_path / "wide.png"), wide[:, 6:14])
    assert np.array_equal(read(tmp_path / "tall.png"), wide[:, 6:14].transpose(1, 0, 2))
    assert np.array_equal(read(tmp_path / "wide.png", size=(8, 16)), wide[:, 2:18])


def test_the_proportions_are_kept(tmp_path):
    """A circle stays a circle, whichever side is longer."""
    y, x = np.mgrid[:48, :96]
    circle = np.where((x - 47.5) ** 2 + (y - 23.5) ** 2 < 12**2, 0, 255).astype(np.uint8)
    Image.fromarray(circle).save(tmp_path / "x.png")
    dark = 255 - read(tmp_path / "x.png", size=(16, 16))[:, :, 0]
    # of 255; where Lanczos overshoots, it is clipped between its two directions
    assert abs(dark - dark.T).max() <= 8
    assert abs(dark.sum() / 255 - math.pi * 4**2) < 1  # a third of the radius; the area to 2 %


def test_a_fine_pattern_shrinks_to_its_mean(tmp_path):
    """Without antialiasing it would turn black, white or striped."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "x.png")
    # one level of rounding in each direction
    assert abs(read(tmp_path / "x.png") - 127.5).max() <= 1.5


@pytest.mark.parametrize(
    "size, remark", [((8, 8), ""), ((20, 9), ""), ((7, 8), "enlarged"), ((8, 7), "enlarged")]
)
def test_a_small_picture_is_enlarged_and_it_is_said(size, remark, tmp_path):
    Image.new("RGB", size, ORANGE).save(tmp_path / "x.png")
    image, said = reading.read_image(tmp_path / "x.png", (8, 8))
    assert (pixels.ENLARGED in said) == bool(remark)
    assert (image.transpose(1, 2, 0) == ORANGE).all()


@pytest.mark.parametrize("size", [(8, 8), (32, 32)])
def test_only_the_first_frame_of_a_film_is_used_and_it_is_said(size, tmp_path):
    """Also when it has to be enlarged, of which there is a remark too."""
    with_palette().save(tmp_path / "film.gif", **FRAMES)
    assert pixels.ANIMATED in reading.read_image(tmp_path / "film.gif", size)[1]
    with_palette().save(tmp_path / "still.gif")
    assert pixels.ANIMATED not in reading.read_image(tmp_path / "still.gif", size)[1]


def test_a_large_photograph_is_decoded_small_and_looks_the_same(tmp_path, monkeypatch):
    y, x = np.mgrid[:768, :1024] / 100
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(3 * y)], axis=2)
    Image.fromarray((waves * 100 + 128).astype(np.uint8)).save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as picture:
        whole = np.asarray(ImageOps.fit(picture, (64, 64), Image.Resampling.LANCZOS), dtype=int)

    decoded, to_mode = [], pixels.to_mode
    monkeypatch.setattr(
        pixels,
        "to_mode",
        lambda picture, *mode: decoded.append(picture.size) or to_mode(picture, *mode),
    )
    difference = abs(read(tmp_path / "x.jpg", size=(64, 64)) - whole)
    assert decoded == [(256, 192)]  # a fourth: still more than twice the size wanted
    # of 200 levels from trough to crest; two ways to average smooth waves
    assert difference.max() <= 4
    assert difference.mean() < 1


# ---- what sampling begins from -------------------------------------------------------------------


@pytest.mark.parametrize("mode", reading.CHANNELS)
def test_a_start_is_read_as_the_data_set_reads_a_picture(mode, tmp_path):
    with_alpha(COLORS, HALF).resize((30, 20)).save(tmp_path / "x.png")
    picture, share = reading.read_start(str(tmp_path / "x.png"), "", (6, 10), mode)
    assert torch.equal(
        picture, torch.from_numpy(reading.read_image(tmp_path / "x.png", (6, 10), mode)[0])
    )
    assert torch.equal(share, torch.ones(1, 6, 10))  # all of it is painted anew


def test_without_an_image_sampling_starts_from_noise():
    assert reading.read_start("", "", (8, 8), "RGB") is None


def test_a_mask_is_the_share_of_every_pixel_that_is_white(tmp_path):
    """The white edge runs through the fifth column: a quarter of that is white.

    Not a trace reaches further.
    """
    white = np.zeros((32, 32), np.uint8)
    white[:, :17] = 255
    for name, picture in {
        "x.png": solid("RGB", ORANGE).resize((32, 32)),
        "mask.png": Image.fromarray(white),
    }.items():
        picture.save(tmp_path / name)
    _, share = reading.read_start(
        str(tmp_path / "x.png"), str(tmp_path / "mask.png"), (8, 8), "RGB"
    )
    assert share.dtype == torch.float32
    expected = torch.tensor([1, 1, 1, 1, 64 / 255, 0, 0, 0])  # a quarter in 255 steps
    assert torch.equal(share, expected.expand(1, 8, 8))


def test_picture_and_mask_are_turned_and_cut_alike(tmp_path):
    """The same file as both: stored sideways as the picture, upright as the mask."""
    exif = Image.Exif()
    exif[0x0112] = 6
    gray = np.ascontiguousarray(UPRIGHT[:, :, 0])
    Image.fromarray(np.rot90(gray).copy()).save(tmp_path / "x.png", exif=exif)
    Image.fromarray(gray).save(tmp_path / "mask.png")
    picture, share = reading.read_start(
        str(tmp_path / "x.png"), str(tmp_path / "mask.png"), (6, 4), "L"
    )
    assert torch.equal(share, picture / 255)
    assert np.array_equal(picture[0].numpy(), gray[:, 3:7])


@pytest.mark.parametrize(
    "init_image, mask, words",
    [
        ("nothing.png", "", ["--init_image=nothing.png is not a file"]),
        (".", "", ["--init_image=. is not a file"]),
        ("text.jpg", "", ["--init_image=text.jpg is not an image that can be read"]),
        ("wide.png", "nothing.png", ["--mask=nothing.png is not a file"]),
        ("wide.png", "text.jpg", ["--mask=text.jpg is not an image that can be read"]),
        (
            "wide.png",
            "tall.png",
            ["--mask=tall.png is 8 pixels wide and 12 high", "--init_image=wide.png 12"],
        ),
        (
            "sideways.jpg",
            "wide.png",
            ["--mask=wide.png is 12 pixels wide", "--init_image=sideways.jpg 8"],
        ),
        ("", "wide.png", ["--mask=wide.png", "--init_image"]),
    ],
)
def test_what_cannot_be_begun_from_is_refused(init_image, mask, words, place):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 8)).save("wide.png")
    Image.new("RGB", (8, 12)).save("tall.png")
    Image.new("RGB", (12, 8)).save("sideways.jpg", exif=exif)
    Path("text.jpg").write_text("no picture")
    with pytest.raises(UserError) as refusal:
        reading.read_start(init_image, mask, (8, 8), "RGB")
    assert all(word in str(refusal.value) for word in words)


# ---- damaged files -------------------------------------------------------------------------------


def saved(folder, suffix: str) -> bytes:
    """The bytes of a sound picture."""
    Image.fromarray(UPRIGHT).save(folder / f"sound.{suffix}")
    return (folder / f"sound.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [suffix[1:] for suffix in IMAGE_SUFFIXES])
@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on what it finds
def test_a_damaged_file_is_left_out_with_its_name_and_a_reason(suffix, tmp_path):
    whole = saved(tmp_path, suffix)
    damages = {
        "nothing": b"",
        "text": b"this is no picture\n",
        "garbage": bytes(range(1, 200)),
        "cut": whole[:30],
    }
    for name, data in damages.items():
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(data)
        with pytest.raises(FileFault, match=re.escape(f"{path.name} (")):
            reading.read_image(path, (6, 10))


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "gif"])
def test_a_picture_cut_in_half_is_left_out(suffix, tmp_path):
    """Its lower part would be gray or black."""
    Image.effect_noise((64, 64), 100).save(tmp_path / f"x.{suffix}")
    whole = (tmp_path / f"x.{suffix}").read_bytes()
    (tmp_path / f"x.{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFault):
        reading.read_image(tmp_path / f"x.{suffix}", (8, 8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp", "tif"])
@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on what it finds
def test_no_damage_ends_the_reading(suffix, tmp_path):
    """Decoders raise errors of many types; none may end a run."""
    whole, random = saved(tmp_path, suffix), np.random.default_rng(3)
    for _ in range(60):
        data = np.frombuffer(whole, np.uint8).copy()
        data[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
        (tmp_path / f"x.{suffix}").write_bytes(data.tobytes())
        with contextlib.suppress(FileFault, NeedsScale):
            image, _ = reading.read_image(tmp_path / f"x.{suffix}", (6, 10))
            assert image.shape == (3, 6, 10)


DECODER_ERRORS = [
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    SyntaxError,
]
DECODER_ERRORS += [
    RuntimeError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
]
DECODER_ERRORS += [Image.UnidentifiedImageError, Image.DecompressionBombError]


@pytest.mark.parametrize("error", DECODER_ERRORS)
def test_whatever_a_decoder_raises_is_the_reason(error, tmp_path, monkeypatch):
    def fail(*_) -> None:
        raise error("so it is")

    Image.fromarray(UPRIGHT).save(tmp_path / "x.png")
    monkeypatch.setattr(pixels, "to_mode", fail)
    with pytest.raises(FileFault, match=r"x\.png \(.*so it is"):
        reading.read_image(tmp_path / "x.png", (6, 10))


def test_too_little_memory_is_a_fault_of_the_machine(tmp_path, monkeypatch):
    def fail(*_) -> None:
        raise MemoryError

    Image.fromarray(UPRIGHT).save(tmp_path / "x.png")
    monkeypatch.setattr(pixels, "to_mode", fail)
    with pytest.raises(MachineFault, match=r"x\.png: not enough memory"):
        reading.read_image(tmp_path / "x.png", (6, 10))


@pytest.mark.parametrize("size", [(12, 10), (30, 20)], ids=["Pillow warns", "Pillow refuses"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_above_the_limit_is_not_decoded(size, tmp_path, monkeypatch):
    """Below twice the limit Pillow only warns, and takes gigabytes."""
    Image.new("RGB", size).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(Image.Image, "load", forbid)
    with pytest.raises(FileFault, match="pixels"):
        reading.read_image(tmp_path / "x.png", (8, 8))


def break_files(folder, *numbers: int) -> None:
    """Turn pictures that `paint` made into text."""
    for number in numbers:
        (folder / f"picture_{number:04d}.png").write_text("no picture")


def test_unreadable_pictures_are_left_out_counted_and_three_are_named(place):
    bad, good = (9, 1, 7, 4, 10), (0, 2, 3, 5, 6, 8)
    break_files(paint(place / "x", count=11), *bad)
    data = utils.load_dataset(place / "x", (8, 8))
    expected = [
        reading.read_image(place / "x" / f"picture_{number:04d}.png", (8, 8))[0] for number in good
    ]
    assert np.array_equal(data.images, expected)
    remark = data.remarks[0]
    assert remark.startswith("5 unreadable")
    names = [remark.find(f"picture_{number:04d}.png (") for number in (1, 4, 7)]
    assert -1 < names[0] < names[1] < names[2]
    assert "0009" not in remark


def test_remarks_count_what_they_tell_of(place):
    paint(place / "x", count=2, size=(20, 20))
    paint(place / "x", count=3, size=(20, 7), first_seed=2)
    for name in "ab":
        with_palette().save(place / "x" / f"{name}.gif", **FRAMES)
    remarks = utils.load_dataset(place / "x", (8, 8)).remarks
    assert len(remarks) == 2
    assert any(remark.startswith("3 ") and "enlarged" in remark for remark in remarks)
    assert any(remark.startswith("2 ") and "first frame" in remark for remark in remarks)


def test_half_of_the_pictures_may_be_bad_but_no_more(place):
    break_files(paint(place / "x", count=4), 0, 1)
    assert len(utils.load_dataset(place / "x", (8, 8)).images) == 2
    break_files(paint(place / "y", count=5), 1, 2, 3)
    before = set(place.rglob("*.bytes")) | set(place.rglob("*.json"))
    with pytest.raises(
        UserError, match=r"3 of 5 images cannot be read, for instance picture_0001\.png"
    ):
        utils.load_dataset(place / "y", (8, 8))
    assert set(place.rglob("*.bytes")) | set(place.rglob("*.json")) == before
    assert not list(place.rglob("*.unfinished*"))


# ---- gray or color ------------------------------------------------------------------------------


def save_gray(folder: Path) -> None:
    """Gray pictures as every kind of file has them, color files too."""
    folder.mkdir()
    Image.fromarray(GRAY).save(folder / "gray.png")
    Image.fromarray(GRAY).save(folder / "gray.jpg")
    Image.fromarray(rgb(GRAY)).save(folder / "as_color.jpg")
    Image.fromarray(rgb(GRAY)).resize((31, 17)).save(folder / "as_color.png")
    with_alpha(GRAY, HALF).save(folder / "hidden.png")


def test_gray_pictures_are_a_gray_data_set(place):
    save_gray(place / "x")
    data = utils.load_dataset(place / "x", (8, 8))
    assert (data.mode, data.images.shape) == ("L", (5, 1, 8, 8))
    asked = utils.load_dataset(place / "x", (8, 8), "L")
    assert asked.mode == "L"
    assert np.array_equal(data.images, asked.images)
    color = utils.load_dataset(place / "x", (8, 8), "RGB")
    assert (color.mode, color.images.shape) == ("RGB", (5, 3, 8, 8))


def test_one_colored_pixel_makes_a_color_data_set(place):
    save_gray(place / "x")
    spot = rgb(GRAY)
    spot[7, 7, 2] += 1
    Image.fromarray(spot).save(place / "x" / "a_spot.png")  # the first
    data = utils.load_dataset(place / "x", (8, 8))
    assert (data.mode, data.images.shape) == ("RGB", (6, 3, 8, 8))


def test_auto_and_color_are_decoded_once_and_other_modes_on_their_own(place, monkeypatch):
    paint(place / "x", count=3)
    modes, read_image = [], reading.read_image
    monkeypatch.setattr(
        reading, "read_image", lambda *inputs: modes.append(inputs[2]) or read_image(*inputs)
    )
    data = {
        mode: utils.load_dataset(place / "x", (8, 8), mode)
        for mode in ("auto", "RGB", "L", "RGBA", "auto")
    }
    assert collections.Counter(modes) == {"RGB": 3, "L": 3, "RGBA": 3}
    assert {mode: one.mode for mode, one in data.items()} == {
        "auto": "RGB",
        "RGB": "RGB",
        "L": "L",
        "RGBA": "RGBA",
    }
    for mode, one in data.items():
        assert one.images.shape == (3, reading.CHANNELS[one.mode], 8, 8), mode
        expected = [
            read_image(path, (8, 8), one.mode)[0] for path in list_images(place / "x").paths
        ]
        assert np.array_equal(one.images, expected), mode


# ---- the cache -----------------------------------------------------------------------------------


def assert_same(one: reading.Dataset, other: reading.Dataset) -> None:
    assert np.array_equal(one.images, other.images)
    assert np.array_equal(one.labels, other.labels)
    assert (one.fingerprint, one.remarks, one.mode) == (
        other.fingerprint,
        other.remarks,
        other.mode,
    )


def test_pictures_are_decoded_once(place, monkeypatch):
    break_files(paint(place / "x", count=5), 3)
    first = utils.load_dataset(place / "x", (8, 8))
    seen, read_image = [], reading.read_image
    monkeypatch.setattr(
        reading, "read_image", lambda path, *how: seen.append(path) or read_image(path, *how)
    )
    assert_same(first, utils.load_dataset(place / "x", (8, 8)))
    assert [Path(path).name for path in seen] == ["picture_0003.png"]  # it is tried again


def touch_one(folder) -> None:
    time = (folder / "picture_0001.png").stat().st_mtime_ns + 1_000_000_000
    os.utime(folder / "picture_0001.png", ns=(time, time))


def repaint_one(folder) -> None:
    paint(folder, count=1, size=(14, 14), first_seed=1)


def add_one(folder) -> None:
    paint(folder, count=1, first_seed=9)


def remove_one(folder) -> None:
    (folder / "picture_0001.png").unlink()


def rename_one(folder) -> None:
    (folder / "picture_0001.png").rename(folder / "other.png")


@pytest.mark.parametrize(
    "change, same_fingerprint",
    [
        (touch_one, True),
        (repaint_one, False),
        (add_one, False),
        (remove_one, False),
        (rename_one, False),
    ],
)
def test_a_changed_folder_is_decoded_again(change, same_fingerprint, place):
    """The fingerprint tells by names and contents whether a run resumes with its own images."""
    paint(place / "x", count=3)
    before = utils.load_dataset(place / "x", (8, 8))
    change(place / "x")
    after = utils.load_dataset(place / "x", (8, 8))
    expected = [reading.read_image(path, (8, 8))[0] for path in list_images(place / "x").paths]
    assert np.array_equal(after.images, expected)
    assert (after.fingerprint == before.fingerprint) == same_fingerprint


@pytest.mark.parametrize("size", [(8, 16), (16, 8), (4, 4)])
def test_another_size_is_decoded_again(size, place):
    paint(place / "x", count=3)
    before = utils.load_dataset(place / "x", (8, 8))
    after = utils.load_dataset(place / "x", size)
    assert after.images.shape == (3, 3, *size)
    assert after.fingerprint == before.fingerprint


def test_new_pixels_under_an_old_name_and_size_are_seen(place):
    """A bitmap is as large as its number of pixels says, whatever they show."""
    (place / "x").mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(place / "x" / "a.bmp")
        os.utime(place / "x" / "a.bmp", ns=(10**18, 10**18))
        images = utils.load_dataset(place / "x", (8, 8)).images
        assert (
            images[0].transpose(1, 2, 0) == np.asarray(Image.new("RGB", (1, 1), color))[0, 0]
        ).all()


def test_two_folders_of_the_same_times_are_two_data_sets(place):
    """Archives and version control give all files one time."""
    for seed, name in enumerate(("x", "y")):
        paint(place / name, count=2, size=(10 + seed, 10), first_seed=2 * seed)
        for path in (place / name).iterdir():
            os.utime(path, ns=(10**18, 10**18))
        expected = [reading.read_image(path, (8, 8))[0] for path in list_images(place / name).paths]
        assert np.array_equal(utils.load_dataset(place / name, (8, 8)).images, expected)


def test_a_copied_folder_is_the_same_data_set(place):
    """A run can move to another machine: neither the folder's own name nor the times count."""
    paint(place / "x", count=3)
    paint(place / "x" / "deeper", count=2)
    shutil.copytree(place / "x", place / "elsewhere" / "y", copy_function=shutil.copyfile)
    first, second = (utils.load_dataset(place / name, (8, 8)) for name in ("x", "elsewhere/y"))
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(first.images, second.images)


def test_half_a_cache_is_not_used(place):
    """Without its facts, which are written last, the bytes may be of anything."""
    paint(place / "x", count=3)
    whole = np.array(utils.load_dataset(place / "x", (8, 8)).images)
    [cache], [facts] = (list((place / CACHE).glob(f"*.{suffix}")) for suffix in ("bytes", "json"))
    facts.unlink()
    cache.write_bytes(b"half")
    assert np.array_equal(utils.load_dataset(place / "x", (8, 8)).images, whole)
    cache.unlink()
    assert np.array_equal(utils.load_dataset(place / "x", (8, 8)).images, whole)


def test_two_at_once_decode_once(place, monkeypatch):
    """The second one waits for the first."""
    paint(place / "x", count=4)
    seen, read_image = [], reading.read_image

    def read_slowly(path, *how):
        time.sleep(0.05)
        seen.append(path)
        return read_image(path, *how)

    monkeypatch.setattr(reading, "read_image", read_slowly)
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda _: utils.load_dataset(place / "x", (8, 8)), range(2))
    assert_same(one, other)
    assert len(seen) == 4


# ---- decoding that is interrupted ----------------------------------------------------------------


def cache_files(place: Path) -> tuple[Path, Path]:
    """The pictures' bytes, and the note beside them."""
    files = list((place / CACHE).iterdir())
    [cache] = [path for path in files if path.suffix in (".bytes", ".unfinished")]
    [note] = [path for path in files if path.suffix == ".json"]
    return cache, note


def noted(place: Path) -> int:
    """How many pictures a decoding has noted so far."""
    notes = list((place / CACHE).glob("*.json"))
    return json.loads(notes[0].read_text())["facts"]["seen"] if notes else 0


def paint_many(folder: Path) -> Path:
    """Twelve pictures in two classes, some of which there is something to tell of."""
    paint(folder / "a", count=6)
    break_files(folder / "a", 1, 4)
    paint(folder / "b", count=6, size=(9, 7), first_seed=6)
    break_files(folder / "b", 9)
    return folder


def decoded_at_once(place: Path, name: str) -> tuple[reading.Dataset, bytes]:
    """The data set as an uninterrupted decoding makes it, and its bytes.

    The cache is empty again.
    """
    data = utils.load_dataset(Path(name), (8, 8))
    whole = cache_files(place)[0].read_bytes()
    shutil.rmtree(place / CACHE)
    return data, whole


@pytest.mark.parametrize("stopped_at", range(0, 12, 2))
def test_an_interrupted_decoding_goes_on_where_it_was(stopped_at, place, monkeypatch):
    """And equals an uninterrupted one byte for byte."""
    expected, whole = decoded_at_once(place, paint_many(place / "x").name)
    monkeypatch.setattr(reading, "NOTE_EVERY", 0)
    paths, read_image, seen = list_images(Path("x")).paths, reading.read_image, []

    def read_until(end: int, path, *how):
        seen.append(path)
        if path == paths[end]:
            raise KeyboardInterrupt
        return read_image(path, *how)

    monkeypatch.setattr(reading, "read_image", functools.partial(read_until, stopped_at))
    with pytest.raises(KeyboardInterrupt):
        utils.load_dataset(Path("x"), (8, 8))
    seen.clear()
    monkeypatch.setattr(
        reading, "read_image", lambda path, *how: seen.append(path) or read_image(path, *how)
    )
    assert_same(utils.load_dataset(Path("x"), (8, 8)), expected)
    # and what could not be read is tried again
    assert set(seen) - set(paths[stopped_at:]) <= {paths[number] for number in (1, 4, 9)}
    assert set(seen) >= set(paths[stopped_at:])
    assert cache_files(place)[0].read_bytes() == whole


def interrupt(place: Path, monkeypatch, name: str = "x", seen: int = 6) -> None:
    """Have the decoding of a folder end when so many pictures have been noted."""
    write_whole = decoded.write_whole

    def write_some(path, write) -> None:
        write_whole(path, write)
        if json.loads(path.read_text())["facts"]["seen"] == seen:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reading, "NOTE_EVERY", 0)
        patch.setattr(decoded, "write_whole", write_some)
        with pytest.raises(KeyboardInterrupt):
            utils.load_dataset(Path(name), (8, 8))


def forget_some_bytes(cache: Path, note: Path) -> None:
    cache.write_bytes(cache.read_bytes()[:-1])


def forget_all_bytes(cache: Path, note: Path) -> None:
    cache.unlink()


def forget_the_note(cache: Path, note: Path) -> None:
    note.unlink()


def tear_the_note(cache: Path, note: Path) -> None:
    note.write_bytes(note.read_bytes()[:-9])


def write_other_facts(cache: Path, note: Path) -> None:
    note.write_text('{"count": 1, "remarks": []}')


def write_no_facts(cache: Path, note: Path) -> None:
    note.write_text("[1, 2]")


DAMAGES = [
    forget_some_bytes,
    forget_all_bytes,
    forget_the_note,
    tear_the_note,
    write_other_facts,
    write_no_facts,
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_note_that_does_not_match_is_not_believed(damage, is_whole, place, monkeypatch):
    expected, whole = decoded_at_once(place, paint_many(place / "x").name)
    if is_whole:
        utils.load_dataset(Path("x"), (8, 8))
    else:
        interrupt(place, monkeypatch)
    damage(*cache_files(place))
    assert_same(utils.load_dataset(Path("x"), (8, 8)), expected)
    assert cache_files(place)[0].read_bytes() == whole


def test_what_was_written_after_the_note_is_written_again(place, monkeypatch):
    """A death comes between the pictures and their note."""
    expected, whole = decoded_at_once(place, paint_many(place / "x").name)
    interrupt(place, monkeypatch)
    with open(cache_files(place)[0], "ab") as file:
        file.write(b"more" * 10_000)
    assert_same(utils.load_dataset(Path("x"), (8, 8)), expected)
    assert cache_files(place)[0].read_bytes() == whole


def test_a_decoding_that_begins_anew_leaves_the_pictures_of_another_process_alone(place):
    """That has the file in its memory: cut short under it, it would die of a bus error."""
    utils.load_dataset(paint_many(place / "x"), (8, 8))
    cache, note = cache_files(place)
    os.link(cache, place / "in_memory")  # as a map of it keeps it
    forget_the_note(cache, note)
    utils.load_dataset(place / "x", (8, 8))
    assert not os.path.samefile(cache, place / "in_memory")


def test_a_full_disk_ends_the_decoding_and_it_goes_on_when_there_is_room(place, monkeypatch):
    resource = pytest.importorskip("resource")
    expected, whole = decoded_at_once(place, paint_many(place / "x").name)
    monkeypatch.setattr(reading, "NOTE_EVERY", 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        with pytest.raises(OSError):
            utils.load_dataset(Path("x"), (8, 8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 0 < noted(place) < 12
    assert_same(utils.load_dataset(Path("x"), (8, 8)), expected)
    assert cache_files(place)[0].read_bytes() == whole


def test_pictures_are_on_the_disk_before_the_note_that_tells_of_them(place, monkeypatch):
    paint(place / "x", count=4)
    synced, fsync, write_whole = [], os.fsync, decoded.write_whole
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(os.fstat(number).st_size) or fsync(number)
    )

    def look(path, write) -> None:
        before = synced[-1]
        write_whole(path, write)
        if path.suffix != ".json":
            return
        assert before == json.loads(path.read_text())["facts"]["count"] * 3 * 8 * 8

    monkeypatch.setattr(reading, "NOTE_EVERY", 0)
    monkeypatch.setattr(decoded, "write_whole", look)
    utils.load_dataset(Path("x"), (8, 8))


def test_few_pictures_are_in_memory_at_a_time(place, monkeypatch):
    """However slowly they are taken."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    started = []
    monkeypatch.setattr(reading, "read_image", lambda path, *how: started.append(path))
    paths = [str(number) for number in range(1000)]
    portions = reading.read_all(reading.read_one, paths, 192, (8, 8), "RGB")
    for taken in range(1, 20):
        next(portions)
        assert len(started) <= taken + 2 * 2
    portions.close()
    assert len(started) < 30


# ---- decoding by processes -----------------------------------------------------------------------

# Loads the pictures in x by processes. They import this file as well: it slows them down, so that
# they can be hit.
LOADER = """
import os, sys, time
from pathlib import Path
import utils
from machinery import reading
from machinery.command_line import run_command_line

read_image, way = reading.read_image, os.environ["WAY"]

def read_slowly(path, *how):
    time.sleep(0.02)
    if way == "a process dies" and path.endswith("picture_0100.png"):
        os._exit(1)
    return read_image(path, *how)

def load() -> None:
    'Load.'
    utils.load_dataset(Path("x"), (8, 8))

reading.read_image = read_slowly
reading.NOTE_EVERY = 0
reading.PROCESSES_FROM = 0
reading.PORTION = 7
if __name__ == "__main__":
    run_command_line("loader.py", {"load": load}, {})
"""


@contextlib.contextmanager
def loader_in(place: Path, way: str = "") -> Iterator[subprocess.Popen]:
    """A process that decodes by others, in a group of its own: as from a terminal.

    None of them outlives the test.
    """
    (place / "loader.py").write_text(LOADER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WAY": way}
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    loader = subprocess.Popen(
        [sys.executable, "loader.py", "load"], cwd=place, env=environment, **options
    )
    try:
        yield loader
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(loader.pid, signal.SIGKILL)


def wait_until(is_so, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(group: int) -> bool:
    """Whether any process of a group lives."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


on_posix = pytest.mark.skipif(
    not hasattr(os, "killpg"), reason="this system has no groups of processes"
)


@pytest.mark.parametrize("mode", ["auto", "RGBA"])
def test_processes_decode_what_threads_do(mode, place, monkeypatch):
    paint_many(place / "x")
    expected = utils.load_dataset(place / "x", (8, 8), mode)
    shutil.rmtree(place / CACHE)
    monkeypatch.setattr(reading, "PROCESSES_FROM", 0)
    monkeypatch.setattr(reading, "PORTION", 5)  # of twelve pictures
    monkeypatch.setattr(reading, "read_image", forbid)  # in this process
    assert_same(utils.load_dataset(place / "x", (8, 8), mode), expected)


@on_posix
@pytest.mark.parametrize(
    "number, moment",
    [
        (signal.SIGKILL, "as it reads"),
        (signal.SIGTERM, "as it reads"),
        (signal.SIGINT, "as it reads"),
        (signal.SIGINT, "as its processes start"),
    ],
)
def test_processes_end_with_the_one_that_started_them(number, moment, place):
    """kill strikes that one alone, Ctrl-C in a terminal all of them.

    The next one goes on where it was.
    """
    paint(place / "x", count=300)
    break_files(place / "x", 3, 200)
    expected, whole = decoded_at_once(place, "x")
    with loader_in(place) as loader:
        if moment == "as it reads":
            wait_until(lambda: noted(place) > 20)
        else:
            wait_until(lambda: list((place / CACHE).glob("*.unfinished")))
            time.sleep(0.3)  # they import PyTorch
        (os.killpg if number == signal.SIGINT else os.kill)(loader.pid, number)
        _, err = loader.communicate(timeout=100)
        wait_until(lambda: not is_alive(loader.pid))
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert loader.returncode == 130
        assert err.splitlines()[-1] == "loader.py: stopped"
    before = noted(place)
    assert before < 300
    seen, read_image = [], reading.read_image
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reading, "read_image", lambda *inputs: seen.append(inputs) or read_image(*inputs)
        )
        assert_same(utils.load_dataset(Path("x"), (8, 8)), expected)
    assert len(seen) == 300 - before + (before > 3)  # what could not be read is tried again
    assert cache_files(place)[0].read_bytes() == whole


@on_posix
def test_a_process_that_dies_is_told_of_in_one_line(place):
    paint(place / "x", count=140)
    with loader_in(place, "a process dies") as loader:
        _, err = loader.communicate(timeout=100)
        wait_until(lambda: not is_alive(loader.pid))
    assert loader.returncode == 2
    [line] = [line for line in err.splitlines() if "loader.py:" in line]
    named = int(line.partition("picture_")[2][:4])
    assert noted(place) == named <= 100
    assert "died" in line and "goes on" in line
    assert "Traceback" not in err


# ---- the order of an epoch -----------------------------------------------------------------------


def orders(count: int, batch_size: int, seed: int = 0, epochs: int = 3) -> torch.Tensor:
    """What is shown in every epoch (epochs, count), laid together from batches."""
    steps = range(math.ceil(epochs * count / batch_size))
    batches = [utils.batch_indices(count, batch_size, step, seed) for step in steps]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in batches)
    return torch.cat(batches)[: epochs * count].view(epochs, count)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**64))
@settings(deadline=None)
def test_every_image_is_shown_exactly_once_per_epoch(count, batch_size, seed):
    shown = orders(count, batch_size, seed)
    assert torch.equal(shown.sort(dim=1).values, torch.arange(count).expand(3, -1))


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**64))
@settings(deadline=None)
def test_the_order_hangs_on_seed_and_epoch_alone(count, batch_size, seed):
    """Not on the batch size, nor on what was asked before.

    A run that goes on starts in the middle.
    """
    shown = orders(count, 1, seed)
    utils.shuffled.cache_clear()
    last = utils.batch_indices(count, batch_size, 2 * count // batch_size, seed)
    start = 2 * count // batch_size * batch_size
    known = shown.flatten()[start : start + batch_size]
    assert torch.equal(last[: len(known)], known)
    assert torch.equal(orders(count, batch_size, seed), shown)


def test_every_epoch_and_every_seed_has_its_own_order():
    shown = [tuple(order.tolist()) for seed in range(5) for order in orders(50, 7, seed)]
    assert len(set(shown)) == 15
    assert tuple(range(50)) not in shown


def loader_of(images: np.ndarray, flip: str = "horizontal", size: tuple = ()) -> utils.Loader:
    labels = np.zeros(len(images), np.int64)
    data = reading.Dataset(images, "", [], "RGB", labels, size=size)
    return utils.Loader(data, 4, seed=0, flip=flip, device=torch.device("cpu"))


def test_about_half_are_mirrored():
    torch.manual_seed(0)
    chances = loader_of(np.zeros((4, 3, 2, 5), np.uint8)).draw_chances(4000)
    torch.manual_seed(0)
    assert torch.equal(chances[:, 0], torch.rand(4000))  # as in earlier versions, to the bit
    # five standard deviations of 4,000 coins
    assert abs((chances[:, 0] < 0.5).sum() - 2000) < 5 * math.sqrt(4000) / 2


@pytest.mark.parametrize("flip", utils.FLIPS)
def test_those_drawn_are_mirrored_and_nothing_else_is_done(flip):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 2, 5), np.uint8)
    chances = torch.tensor([[0.4, 0.1], [0.5, 0.5], [0.9, 0.2], [0.0, 0.9], [0.49, 0.0]])
    order = torch.tensor([5, 0, 3, 1, 4])
    seen = loader_of(pixels, flip).load(order, chances)
    for image, source, (left_right, top_bottom) in zip(seen, order, chances, strict=True):
        expected = utils.from_bytes(torch.from_numpy(pixels[source]))
        if flip != "no" and left_right < 0.5:
            expected = expected.flip(2)
        if flip == "both" and top_bottom < 0.5:
            expected = expected.flip(1)
        assert torch.equal(image, expected)


def test_every_part_of_a_larger_image_is_as_likely():
    """And it is a part of that image: 3 x 4 places of 2x5 pixels in 4x8."""
    pixels = np.arange(4 * 8, dtype=np.uint8).reshape(1, 1, 4, 8).repeat(2, axis=0)
    loader = loader_of(pixels, "no", size=(2, 5))
    torch.manual_seed(0)
    chances = loader.draw_chances(6000)
    assert chances.shape == (6000, 3)
    parts = utils.to_bytes(loader.load(torch.zeros(6000, dtype=torch.int64), chances))
    assert parts.shape == (6000, 1, 2, 5)
    starts = collections.Counter(parts[:, 0, 0, 0].tolist())
    assert set(starts) == {8 * row + column for row in range(3) for column in range(4)}
    # five standard deviations of 6,000 throws of 12 sides
    assert all(abs(number - 500) < 5 * math.sqrt(6000 * 11) / 12 for number in starts.values())
    for part, start in zip(parts[:50], parts[:50, 0, 0, 0], strict=True):
        row, column = divmod(int(start), 8)
        expected = pixels[0, :, row : row + 2, column : column + 5]
        assert np.array_equal(part, expected)


def test_images_of_even_chances_are_cropped_in_the_middle():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 10, 10), np.uint8)
    loader = loader_of(pixels, "both", size=(8, 8))
    seen = loader.load(torch.tensor([1, 0]), torch.full((2, 4), 0.5))
    assert np.array_equal(utils.to_bytes(seen), pixels[[1, 0], :, 1:9, 1:9])


# ---- levels and files ----------------------------------------------------------------------------


def test_to_bytes_undoes_from_bytes_at_every_level():
    levels = torch.arange(256, dtype=torch.uint8)
    values = utils.from_bytes(levels)
    assert values.dtype == torch.float32
    assert (values[0], values[-1]) == (-1, 1)
    assert torch.equal(utils.to_bytes(values), levels)


@pytest.mark.parametrize("share", [-0.49, 0.49])
def test_to_bytes_takes_the_nearest_level(share):
    """Cutting the fraction off would make every picture half a level darker."""
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(utils.to_bytes(utils.from_bytes(levels) + share / 127.5), levels)


def test_to_bytes_clips_what_is_out_of_range():
    """A level of 256 would wrap round to black."""
    assert utils.to_bytes(torch.tensor([-9.0, -1.01, 1.01, 9.0])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    "count, columns, rows", [(1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2), (9, 3, 3)]
)
def test_images_stand_side_by_side_in_reading_order(count, columns, rows, tmp_path):
    images = torch.randint(0, 256, (count, 3, 4, 6), dtype=torch.uint8)
    writing.save_png(images, tmp_path / "new" / "x.png", run="a", step=7)
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert picture.mode == "RGB"
        assert picture.size == (6 * columns, 4 * rows)
        assert picture.text == {"run": "a", "step": "7"}
        sheet = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        assert torch.equal(sheet[:, row * 4 : row * 4 + 4, column * 6 : column * 6 + 6], image)
    assert files_below(tmp_path) == {"new", "new/x.png"}


def test_a_claimed_folder_is_none_that_existed(tmp_path):
    (tmp_path / "x_3").write_text("a file takes the name too")
    made = [basics.claim_folder(tmp_path / "x") for _ in range(4)]
    assert all(path.is_dir() for path in made)
    assert [path.name for path in made] == ["x", "x_2", "x_4", "x_5"]


def test_a_file_appears_whole_and_the_one_before_is_kept(tmp_path):
    path, keep = tmp_path / "deep" / "er" / "x", tmp_path / "deep" / "er" / "x.previous"
    for content in (b"one", b"two", b"three"):
        before = files_below(tmp_path)
        basics.write_whole(path, lambda file, content=content: file.write(content), keep=keep)
        assert path.read_bytes() == content
        assert before <= files_below(tmp_path)
    assert keep.read_bytes() == b"two"
    assert files_below(tmp_path) == {"deep", "deep/er", "deep/er/x", "deep/er/x.previous"}


@pytest.mark.parametrize("error", [OSError, UserError, KeyboardInterrupt])
def test_a_file_whose_writing_fails_is_as_it_was(error, tmp_path):
    path, keep = tmp_path / "x", tmp_path / "x.previous"

    def fail(file) -> None:
        file.write(b"half")
        assert path.read_bytes() == b"old"  # while the new one is written, too
        raise error

    path.write_bytes(b"old")
    keep.write_bytes(b"older")
    with pytest.raises(error):
        basics.write_whole(path, fail, keep=keep)
    assert (path.read_bytes(), keep.read_bytes()) == (b"old", b"older")
    assert files_below(tmp_path) == {"x", "x.previous"}


# ---- training on any folder ----------------------------------------------------------------------


def steps_done(result) -> int:
    assert result.status == 0
    return checkpoints.load("untitled")["step"]


@pytest.mark.parametrize("count, steps", [(1, 2), (2, 2), (10, 5)])
def test_it_trains_on_a_few_images(count, steps, run, place):
    """Where there are fewer than a batch (4 here), a batch is all there are."""
    paint(place / "x", count=count)
    assert steps_done(run("train", "--dataset=x", *TINY, "--epochs=2")) == steps


def test_it_trains_on_300_images_of_every_kind_in_nested_folders(run, place):
    modes = {
        "RGB": "png",
        "L": "jpg",
        "RGBA": "webp",
        "P": "gif",
        "1": "bmp",
        "CMYK": "jpg",
        "I;16": "png",
        "F": "tif",
    }
    for number in range(300):
        mode, suffix = list(modes.items())[number % len(modes)]
        folder = (
            place / "\u00fcber all" / f"\u65e5\u672c_{number % 3}" / f"\u00e9t\u00e9 {number % 7}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.effect_noise((5 + number % 20, 5 + number % 13), 80)
        picture.convert(mode).save(folder / f"\u00f1 {number}.{suffix}")
    (folder / "broken.jpg").write_text("no picture")
    result = run("train", "--dataset=\u00fcber all", *TINY, "--epochs=1")
    assert steps_done(result) == 300 // 4
    assert re.search("300 [a-z ]*images of 8x8", result.out)
    assert "1 unreadable, left out: broken.jpg" in result.out
