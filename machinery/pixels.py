"""One image file, as pixels: opened without trust, in sRGB, resized and cropped.

Reading order: the two kinds of faults; opening; depth; color and alpha; read_image.
"""

import contextlib
import functools
import io
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from machinery.basics import BROKEN_FILE

# The kinds that are read, on every machine; any other decoder that Pillow has is never asked.
FORMATS = ["AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif")
IMAGE_SUFFIXES += (".tiff", ".avif", ".jp2", ".ppm", ".pgm")
# Images that are not read; they are counted, so that nobody takes them for learned.
HEIF_SUFFIXES = (".heic", ".heif")  # read if there is `has_heif`
OTHER_SUFFIXES = (*HEIF_SUFFIXES, ".jxl", ".svg", ".psd", ".tga", ".ico", ".eps", ".exr", ".hdr")
OTHER_SUFFIXES += (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".raw", ".pdf")


class Modes(dict):
    """What there is to say of each mode: of colors by name, of arrays by their channels' number.

    "2" and "5" to "64" are modes, too: channels that are no colors. One, three and four channels
    are gray, RGB and RGBA.

    Args:
        colors: of the modes with a name.
        of_number: of a number of channels.
    """

    more = ", or of arrays a number of channels: 2, or 5 to 64"

    def __init__(self, colors: dict, of_number: Callable[[int], object]):
        super().__init__(colors)
        self.of_number = of_number

    def __contains__(self, mode) -> bool:
        return super().__contains__(mode) or mode in NUMBERS

    def __missing__(self, mode: str):
        if mode not in NUMBERS:
            raise KeyError(mode)
        return self.of_number(int(mode))


NUMBERS = {str(number) for number in range(2, 65)} - {"3", "4"}
CHANNELS = Modes({"L": 1, "RGB": 3, "RGBA": 4}, int)
DEPTHS = {8: np.uint8, 16: np.uint16}  # bits of a level, and what holds it
# how images are brought to their size: Pillow's filters
RESIZES = {
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}
ORIENTATION = 0x0112  # of EXIF
BLOCK = 2**22  # pixels of more than 8 bits that are brought to 8 at a time
SRGB = ImageCms.createProfile("sRGB")

# remarks: what was done to an image that the user may not expect
TRANSPARENT = "transparent: shown on white; --mode=RGBA keeps it"
ANIMATED = "animated: the first frame is used"
PAGES = "of several pages: the first one is used"
ENLARGED = "smaller than --img_size: enlarged"
UNEVEN = "not a whole number of times as large or small as --img_size: nearest leaves pixels out"
UNEVEN += " or doubles some"
CONVERTED = "converted to sRGB from another color profile"
BAD_PROFILE = "with a color profile that cannot be used: taken for sRGB"
ONE_COLOR = "of one color only"
FEW_LEVELS = "of more than 8 bits, of which fewer than 32 levels are left: very dark or flat"


class FileFault(Exception):
    """The file is not an image that can be read: it stays so until it is changed."""


class MachineFault(Exception):
    """The machine could not read a file (permissions, memory, a disk): it may be able to later."""


class Scale(NamedTuple):
    """What is black and what is white in images of floats or of 32-bit numbers."""

    black: float
    white: float


class NeedsScale(Exception):
    """An image of floats or of 32-bit numbers: its scale is that of the whole data set.

    Attributes:
        scale: from the image's own smallest to its largest number.
    """

    def __init__(self, scale: Scale):
        super().__init__(scale)
        self.scale = scale


# ---- opening -------------------------------------------------------------------------------------


def read_bytes(path) -> bytes:
    """The content of a file, or of what is read as one: a member of an archive.

    Raises:
        FileFault: a member of an archive is damaged.
        MachineFault: whatever else goes wrong here is no fault of the content.
    """
    try:
        return (Path(path) if isinstance(path, str) else path).read_bytes()
    except (zipfile.BadZipFile, zlib.error) as error:
        raise FileFault(f"{Path(path).name} ({error})") from error
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MachineFault(f"{path}: {reason}") from error


@contextlib.contextmanager
def faults_of(name: str):
    """What a decoder raises is a `FileFault` of the file `name`; memory is the machine's."""
    try:
        yield
    except MemoryError as error:
        raise MachineFault(f"{name}: not enough memory") from error
    except BROKEN_FILE as error:
        reason = str(error) or type(error).__name__
        if "cannot identify image file" in reason:  # Pillow goes on with an address in memory
            reason = "no image of a kind that is read"
        raise FileFault(f"{name} ({reason})") from error


@functools.cache
def has_heif() -> bool:
    """Whether HEIC photos can be read: by a package of its own, if that is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


@functools.cache
def known_formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN] + ["HEIF"] * has_heif()


def open_image(data: bytes) -> Image.Image:
    """An image that is not decoded yet; no other program is started, whatever the content says."""
    return Image.open(io.BytesIO(data), formats=known_formats())


def open_source(source) -> Image.Image:
    """An image that is not decoded yet: a path's, or a row's of an array."""
    if hasattr(source, "picture"):
        return source.picture()
    return open_image(read_bytes(source))


class Memory:
    """How much all readers together decode at a time, in units of UNIT pixels.

    Args:
        parts: has `Lock` and `Semaphore`: `threading`, or a context of multiprocessing.
    """

    UNIT = 2**21  # pixels; smaller images are not counted
    UNITS = 48  # a hundred million pixels

    def __init__(self, parts):
        self.lock = parts.Lock()
        self.free = parts.Semaphore(self.UNITS)

    @contextlib.contextmanager
    def hold(self, count: int):
        """Wait until so many pixels may be decoded."""
        units = min(self.UNITS, count // self.UNIT)
        if units:
            with self.lock:  # one gathers at a time: no two wait for one another
                for _ in range(units):
                    self.free.acquire()
        try:
            yield
        finally:
            for _ in range(units):
                self.free.release()


memory = Memory(threading)  # in a reading process, that of all of them


# ---- depth ---------------------------------------------------------------------------------------


def scale_of(picture: Image.Image) -> Scale | None:
    """The scale that an image's format fixes; None for floats and the 32-bit numbers of a TIFF."""
    if picture.mode.startswith("I;16"):
        bits = 16
        if picture.format == "TIFF":
            bits = picture.tag_v2.get(258, (16,))[0]  # BitsPerSample
        return Scale(0, 2**bits - 1)
    if picture.mode == "I" and picture.format != "TIFF":
        return Scale(0, 65535)
    return None


def extremes(levels: np.ndarray) -> Scale:
    """The smallest number there is, or 0 if all are above, and the largest; NaN counts for none."""
    finite = levels[np.isfinite(levels)] if levels.dtype.kind == "f" else levels
    if finite.size == 0:
        return Scale(0, 0)
    return Scale(min(0.0, float(finite.min())), float(finite.max()))


def common_scale(scales: list[Scale]) -> Scale:
    """One scale for images of these extremes: to 1, 255 or 65535 if that is what they fill.

    They fill a range of which they use more than half. Where numbers are negative, or fill none
    of these, the smallest of all is black and the largest is white.
    """
    black = min(scale.black for scale in scales)
    white = max(scale.white for scale in scales)
    usual = [end for end in (1, 255, 65535) if end / 2 < white <= end]
    return Scale(black, usual[0] if usual and black == 0 else white)


def levels_of(numbers: np.ndarray, scale: Scale, depth: int = 8) -> np.ndarray:
    """Numbers (H, W) or (H, W, C) as levels, 0..255 or 0..65535; what is out of it is clipped."""
    black, white = scale
    top = 2**depth - 1
    flat = np.empty(numbers.shape, DEPTHS[depth])
    rows = max(1, BLOCK // max(1, numbers[:1].size))
    for first in range(0, len(numbers), rows):  # in blocks: a float takes eight times as much
        block = numbers[first : first + rows].astype(np.float64)
        block = (np.nan_to_num(block, nan=black, posinf=white, neginf=black) - black).clip(min=0)
        block *= top / ((white - black) or 1)
        flat[first : first + rows] = block.round().clip(max=top)
    return flat


def to_8_bits(picture: Image.Image, scale: Scale | None) -> tuple[Image.Image, set[str]]:
    """An image of more than 8 bits as "L", or "LA" where it has a transparent level.

    Raises:
        NeedsScale: none is given, and its format does not fix one.
    """
    levels = np.asarray(picture)  # (H, W)
    scale = scale_of(picture) or scale
    if scale is None:
        raise NeedsScale(extremes(levels))
    flat = levels_of(levels, scale)
    used = np.flatnonzero(np.bincount(flat.ravel(), minlength=256))
    remarks = {FEW_LEVELS} if 1 < len(used) < 32 else set()
    gray = Image.fromarray(flat)
    hidden = picture.info.get("transparency")
    if isinstance(hidden, int):
        gray.putalpha(Image.fromarray(((levels != hidden) * 255).astype(np.uint8)))
    return gray, remarks


# ---- color and alpha -----------------------------------------------------------------------------

transforms = threading.local()  # of each thread: a transform keeps a cache of its own


def transform_to_srgb(profile: bytes, mode: str):
    """How colors of a profile become sRGB; kept, since the files of a folder often share one."""
    known = transforms.__dict__.setdefault("known", {})
    if (profile, mode) not in known:
        if len(known) > 32:
            known.clear()
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        known[profile, mode] = ImageCms.buildTransform(source, SRGB, mode, "RGB")
    return known[profile, mode]


def is_srgb(profile: bytes) -> bool:
    return b"sRGB" in profile[:4096] or b"s\0R\0G\0B" in profile[:4096]


def to_srgb(picture: Image.Image) -> tuple[Image.Image, set[str]]:
    """The image with its colors in sRGB, if a profile says that they are others."""
    profile = picture.info.get("icc_profile")
    alpha = picture.getchannel("A") if picture.mode in ("LA", "RGBA") else None
    if picture.mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("LAB"), SRGB, "LAB", "RGB")
        return ImageCms.applyTransform(picture, lab), {CONVERTED}
    if not profile or is_srgb(profile) or picture.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return picture, set()
    plain = picture.convert(picture.mode[:-1]) if alpha else picture
    try:
        colors = ImageCms.applyTransform(plain, transform_to_srgb(profile, plain.mode))
    except (ImageCms.PyCMSError, ValueError, OSError, TypeError):
        return picture, {BAD_PROFILE}
    if plain.mode == "L":
        colors = colors.getchannel("G")  # gray stays gray
    if alpha:
        colors.putalpha(alpha)
    return colors, {CONVERTED}


def to_mode(picture: Image.Image, mode: str) -> tuple[Image.Image, set[str]]:
    """ "L" or "RGB" over white, or for "RGBA" Pillow's "RGBa": colors times alpha.

    Premultiplied, resizing mixes in no color that cannot be seen. A channel of alpha that is 0
    throughout comes from programs that do not know alpha: such an image is opaque.
    """
    remarks = set()
    if picture.has_transparency_data:
        has_channel = picture.mode in ("LA", "RGBA")
        if picture.mode != "RGBA":
            picture = picture.convert("RGBA")
        lowest, highest = picture.getchannel("A").getextrema()
        if highest == 0 and has_channel:
            picture.putalpha(255)
        elif lowest < 255 and mode != "RGBA":
            return in_bands(picture, lambda band: over_white(band).convert(mode)), {TRANSPARENT}
    if mode == "RGBA":
        return in_bands(picture, lambda band: band.convert("RGBA").convert("RGBa")), remarks
    return picture if picture.mode == mode else picture.convert(mode), remarks


def over_white(picture: Image.Image) -> Image.Image:
    """An image of mode "RGBA" before white."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def in_bands(picture: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`change(picture)`, some rows at a time: a large image is in memory twice, not four times."""
    rows = max(1, Memory.UNIT // picture.width)
    changed = None
    for top in range(0, picture.height, rows):
        bottom = min(picture.height, top + rows)
        band = change(picture.crop((0, top, picture.width, bottom)))
        changed = changed or Image.new(band.mode, picture.size)
        changed.paste(band, (0, top))
    return changed


# ---- one image -----------------------------------------------------------------------------------


def frames_of(source) -> int:
    """How many frames an animation has, or pages a TIFF; 1 for what cannot be read."""
    with contextlib.suppress(FileFault), faults_of(""), open_source(source) as picture:
        return 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    return 1


def surprises(picture: Image.Image) -> set[str]:
    """Remarks on an image that is more than one; a phone's photograph (MPO) is not."""
    if getattr(picture, "n_frames", 1) == 1 or picture.format == "MPO":
        return set()
    return {PAGES if picture.format == "TIFF" else ANIMATED}


def decode(source, mode: str, scale: Scale | None, enough: int = 0) -> tuple[Image.Image, set[str]]:
    """An image, upright and in `mode`; and remarks.

    Args:
        source: see `open_source`.
        mode, scale: see `read_image`.
        enough: pixels on a side; a JPEG that is larger is decoded at a half, fourth or eighth.
    """
    with open_source(source) as picture:
        if enough:
            picture.draft("RGB", (enough, enough))
        if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels")
        with memory.hold(picture.width * picture.height):
            return to_plain(picture, mode, scale)


def to_plain(picture: Image.Image, mode: str, scale: Scale | None) -> tuple[Image.Image, set[str]]:
    """An opened image, decoded: upright, of 8 bits, in sRGB and in `mode`; and remarks."""
    remarks = surprises(picture)
    if picture.mode[0] in "IF":
        picture.load()  # of a TIFF, this turns it upright
        orientation = picture.getexif().get(ORIENTATION)
        picture, more = to_8_bits(picture, scale)
        remarks |= more
        if orientation:
            picture.getexif()[ORIENTATION] = orientation
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    picture, more = to_srgb(picture)
    remarks |= more
    picture, more = to_mode(picture, mode)
    return picture, remarks | more


def read_levels(
    path, mode: str, depth: int, scale: Scale | None, enough: int
) -> tuple[np.ndarray, set[str]]:
    """An image's levels before it is resized, for what Pillow has no mode; see `read_image`.

    Returns:
        levels (H, W, C), uint8 in 0..255, or float32 in 0..65535; and remarks.
    """
    if hasattr(path, "levels"):  # a row of an array
        levels = path.levels(depth)
        return recolored(levels, mode) if depth == 8 else recolored(
            levels.astype(np.float32), mode
        ), set()
    if mode in NUMBERS:
        raise ValueError(f"--mode={mode} is for arrays of so many channels")
    with open_source(path) as picture:
        if picture.mode[0] in "IF" and picture.width * picture.height <= Image.MAX_IMAGE_PIXELS:
            with memory.hold(picture.width * picture.height):
                picture.load()
                orientation = picture.getexif().get(ORIENTATION, 1)
                numbers = np.asarray(picture)
                scale = scale_of(picture) or scale
                if scale is None:
                    raise NeedsScale(extremes(numbers))
                plane = Image.fromarray(levels_of(numbers, scale, depth).astype(np.float32))
                plane.getexif()[ORIENTATION] = orientation
                ImageOps.exif_transpose(plane, in_place=True)
                return recolored(np.asarray(plane)[:, :, None], mode), set()
    picture, remarks = decode(path, mode, scale, enough)
    levels = np.asarray(picture).reshape(picture.height, picture.width, -1)
    return levels * np.float32(257), remarks


def recolored(levels: np.ndarray, mode: str) -> np.ndarray:
    """Levels (H, W, C) in another mode: those of arrays, and of images of more than 8 bits.

    Raises:
        ValueError: they have no colors, or as many channels as the mode.
    """
    count = levels.shape[2]
    if mode in NUMBERS or count not in (1, 3, 4):
        if count != CHANNELS[mode]:
            raise ValueError(f"{count} channels; --mode={mode} takes {CHANNELS[mode]}")
        return levels
    top = np.float32(65535)  # colors of 8 bits go by Pillow
    colors, alpha = levels[:, :, :3], levels[:, :, 3:] / top
    if count == 1 and mode != "L":
        colors = np.repeat(colors, 3, axis=2)
    if count == 4:
        colors = colors * alpha
    if mode == "RGBA":
        opaque = np.full((*levels.shape[:2], 1), top)
        return np.concatenate([colors, levels[:, :, 3:] if count == 4 else opaque], axis=2)
    if count == 4:
        colors = colors + (1 - alpha) * top
    if mode == "L" and count > 1:
        return colors @ np.array([[0.299], [0.587], [0.114]], np.float32)  # ITU-R BT.601
    return colors


def is_whole(picture: Image.Image, size: tuple[int, int]) -> bool:
    """Whether each pixel becomes a whole number of pixels, or a whole number become one."""
    factor = min(picture.height / size[0], picture.width / size[1])
    return factor.is_integer() or (1 / factor).is_integer()


def read_image(
    path,
    size: tuple[int, int],
    mode: str = "RGB",
    resize: str = "lanczos",
    depth: int = 8,
    scale: Scale | None = None,
) -> tuple[np.ndarray, set[str]]:
    """An image's shorter side resized, its center cropped.

    Args:
        path: a file of one of FORMATS, whatever its suffix; or a part of a source (sources.py).
        size: height and width.
        mode: one of CHANNELS.
        resize: one of RESIZES.
        depth: one of DEPTHS.
        scale: of images of floats or of 32-bit numbers.

    Returns:
        pixels (C, H, W), uint8 or uint16, and remarks.

    Raises:
        FileFault, MachineFault: see there.
        NeedsScale: `scale` is missing.
    """
    height, width = size
    enough = 0 if resize == "nearest" else 2 * max(size)
    with faults_of(Path(path).name):
        if depth == 8 and mode not in NUMBERS:
            picture, remarks = decode(path, mode, scale, enough)
            planes = [picture]
        else:
            levels, remarks = read_levels(path, mode, depth, scale, enough)
            planes = [Image.fromarray(plane) for plane in np.moveaxis(levels, 2, 0)]
        picture = planes[0]
        if picture.width < width or picture.height < height:
            remarks = remarks | {ENLARGED}
        if resize == "nearest" and not is_whole(picture, size):
            remarks = remarks | {UNEVEN}
        fitted = [ImageOps.fit(plane, (width, height), RESIZES[resize]) for plane in planes]
        pixels = np.stack([np.asarray(plane) for plane in fitted], axis=-1)
        pixels = pixels.reshape(height, width, -1)  # (H, W, C)
        if depth == 16:
            pixels = pixels.round().clip(0, 65535).astype(np.uint16)
    if mode == "RGBA":  # Lanczos overshoots; no color shines brighter than its alpha
        pixels = np.minimum(pixels, pixels[:, :, 3:])
    if (pixels == pixels[:1, :1]).all():
        remarks = remarks | {ONE_COLOR}
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), remarks
