"""The inputs of `sample --inputs`: read from files, as a run's network is shown them.

Reading order: what there is; sizes; InputFiles.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from machinery import inputs
from machinery.basics import UserError, seed_of
from machinery.inputs import is_made, kind_of, stem
from machinery.listing import list_images
from machinery.pixels import (
    FileFault,
    MachineFault,
    NeedsScale,
    common_scale,
    faults_of,
    open_source,
    read_image,
)
from machinery.reading import Start

OWN_FILES = ("samples.png", "samples.gif", "interpolation.gif")  # that `sample` adds to its images
LARGEST = 2048  # pixels of a side

# ---- what there is -------------------------------------------------------------------------------


def needed(settings: dict) -> str:
    """What `sample` of a run takes, in words."""
    what = {
        "@gray": "gray images, to color",
        "@edges": "drawings, dark lines on white",
        "@masked": "images that are transparent where to paint",
        "@small": "small images, to enlarge",
    }
    flag = settings["inputs"]
    kind = what[kind_of(flag)[0]] if is_made(flag) else f"images like those in {flag}"
    made = "; or @FOLDER makes them of images as in training" if is_made(flag) else ""
    return f"--inputs=FOLDER_OR_FILE takes {kind}{made}"


def check_inputs(flag: str, settings: dict) -> None:
    """Refuse inputs of a run without any, and a run of inputs without them."""
    if flag and not settings["inputs"]:
        raise UserError(f"--inputs={flag} is for runs trained with --inputs")
    if settings["inputs"] and not flag:
        trained = f"this run was trained with --inputs={settings['inputs']}"
        raise UserError(f"{trained}, and makes nothing without: {needed(settings)}")
    if is_made(flag) and not is_made(settings["inputs"]):
        rule = f"this run takes {needed(settings).partition('takes ')[2]}, without @"
        raise UserError(f"--inputs={flag}: {rule}")


def find(flag: str) -> tuple[list[str], list]:
    """The names of the images in a folder, an archive or a file, and how to open each.

    The grids that `sample` has written beside its images are left out.
    """
    source = Path(flag.removeprefix("@"))
    if flag == "@":
        raise UserError("--inputs=@ names no images; write the folder behind it")
    if source.is_file() and source.suffix.lower() not in (".zip", ".npy", ".npz"):
        return [source.name], [str(source)]
    try:
        listing = list_images(source)
    except UserError as error:
        raise UserError(str(error).replace(f"--dataset={source}", f"--inputs={flag}", 1)) from error
    pairs = zip(listing.names, listing.paths, strict=True)
    found = [(name, path) for name, path in pairs if Path(name).name not in OWN_FILES]
    own = len(listing.names) - len(found)
    for remark in listing.remarks:
        print(f"inputs: {remark}")
    if own and found:
        print(f"inputs: {own} that show many images are left out, such as {OWN_FILES[0]}")
    names, paths = zip(*(found or zip(listing.names, listing.paths, strict=True)), strict=True)
    return list(names), list(paths)


def names_of_outputs(names: Sequence[str]) -> list[str]:
    """A name for what is made of each input, without a suffix: its own; numbered if it is taken."""
    stems = [stem(name).replace("\\", "/") for name in names]
    # no file where a folder of others must be
    folders = {str(folder).lower() for name in stems for folder in PurePosixPath(name).parents}
    blocked = {"samples", "interpolation"} | {os.path.splitext(folder)[0] for folder in folders}
    taken, chosen = set(), []
    for plain in stems:
        own, number = plain, 1
        while plain.lower() in taken | blocked:
            number += 1
            plain = f"{own}_{number}"
        taken.add(plain.lower())
        chosen.append(plain)
    return chosen


@contextlib.contextmanager
def told_in_a_line():
    """What a file or the machine cannot do is a `UserError`."""
    try:
        yield
    except (MachineFault, FileFault) as error:
        raise UserError(f"--inputs: {error} cannot be used") from error


# ---- sizes ---------------------------------------------------------------------------------------


def size_of(source) -> tuple[int, int]:
    """Height and width of an image, upright."""
    if hasattr(source, "numbers"):
        return source.numbers().shape[:2]
    with open_source(source) as picture:
        width, height = ImageOps.exif_transpose(picture).size
    return height, width


def check_output(name: str, size: tuple[int, int], settings: dict) -> None:
    """Refuse an output that the network cannot make, in one piece or in tiles."""
    stride = 2 ** (len(settings["multipliers"]) - 1)
    for side, trained in zip(size, settings["img_size"], strict=True):
        made = f"--inputs: {name} would become {size[0]}x{size[1]} (height x width)"
        if side > LARGEST:
            raise UserError(f"{made}; at most {LARGEST} pixels can be made")
        if side < trained and (side % stride or not side):
            ways = f"at least {trained} or a multiple of {stride}"
            raise UserError(f"{made}; this run makes {ways}")


def luma(levels: Tensor) -> Tensor:
    """Gray (B, 1, H, W) of levels (B, 3, H, W), as Pillow's "L" has it; of 16 bits as int16."""
    colors = levels.long() & 0xFFFF if levels.dtype == torch.int16 else levels.long()
    weights = colors.new_tensor([19595, 38470, 7471]).view(1, 3, 1, 1)  # of 65,536
    return ((colors * weights).sum(dim=1, keepdim=True) + 0x8000 >> 16).to(levels.dtype)


class InputFiles:
    """The inputs that `sample` is given, each as it is read, in 0..255 or 16 bits.

    Args:
        flag: a folder, an archive, an array or a file; with @ in front, images of which inputs are
            made as in training.
        settings: of the run.
        img_size: height and width that are asked for; () for none.

    Attributes:
        names: of what is made of each, without suffix.
        images: (C, H, W) each.
        sizes: height and width of each output.

    Raises:
        UserError: one cannot be used.
    """

    def __init__(self, flag: str, settings: dict, img_size: tuple[int, ...]):
        self.kind, self.factor = settings["inputs"], 1
        self.are_images = is_made(flag)
        if is_made(self.kind):
            _, self.factor = kind_of(self.kind)
        names, paths = find(flag)
        self.names = names_of_outputs(names)
        self.sizes, self.images, resized = [], [], []
        for name, path in zip(names, paths, strict=True):
            with told_in_a_line(), faults_of(name), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                own = size_of(path)
                size = self.output_size(own, settings, img_size)
                check_output(name, size, settings)
                shape = size
                if not self.are_images:
                    shape = tuple(side // self.factor for side in size)
                self.images.append(self.read(path, shape, settings))
            self.sizes.append(size)
            if own != shape:
                resized.append(f"{name}, which is {own[0]}x{own[1]}")
        if resized:
            number = f"{len(resized):,} of {len(names):,}"
            told = f"{number} are resized and cropped in the middle, such as {resized[0]}"
            print(f"inputs: {told}; --img_size is the size of what is made")
        self.check_holes(names)

    def output_size(
        self, own: tuple[int, int], settings: dict, img_size: tuple[int, ...]
    ) -> tuple[int, int]:
        """Height and width of what is made of an input of the size `own`."""
        if img_size or self.factor == 1:
            size = img_size or settings["img_size"]
            if any(side % self.factor for side in size):
                rule = f"not a multiple of {self.factor}, as --inputs={self.kind} of this run needs"
                raise UserError(f"--img_size={size[0]}x{size[1]} is {rule}")
            return size
        if self.are_images:
            return tuple(side // self.factor * self.factor for side in own)
        return tuple(side * self.factor for side in own)

    def read(self, path, shape: tuple[int, int], settings: dict) -> Tensor:
        """The levels of an input, resized and cropped to `shape` (height, width)."""
        mode = settings["mode"] if self.are_images else settings["input_mode"]
        how = (shape, mode, settings["resize"], settings["depth"])
        try:
            found, _ = read_image(path, *how)
        except NeedsScale as error:
            found, _ = read_image(path, *how, scale=common_scale([error.scale]))
        return torch.from_numpy(found.view(np.int16) if found.dtype == np.uint16 else found)

    def check_holes(self, names: Sequence[str]) -> None:
        """Refuse images without a hole where holes are to be filled."""
        if self.kind != "@masked" or self.are_images:
            return
        for name, image in zip(names, self.images, strict=True):
            if (image[3] == image.new_tensor(255 if image.dtype == torch.uint8 else -1)).all():
                rule = "this run paints what is transparent; --inputs=@FOLDER makes holes by chance"
                raise UserError(f"--inputs: {name} is transparent nowhere, or everywhere; {rule}")

    def names_of_all(self, each: int) -> list[str]:
        """The names of all images, `each` of an input, without suffix."""
        if each == 1:
            return self.names
        return [f"{name}_{number}" for name in self.names for number in range(1, each + 1)]

    def end_of_a_size(self, first: int, stop: int, each: int) -> int:
        """Up to where the images from `first` on are of one size, `stop` at the latest."""
        sizes = [self.sizes[number // each] for number in range(first, stop)]
        return first + next((n for n, size in enumerate(sizes) if size != sizes[0]), len(sizes))

    def starts(self, each: int, batch_size: int) -> list[int]:
        """Where batches begin whose images are of one size, of `each` images of every input."""
        count = each * len(self.images)
        found = [0]
        while (
            end := self.end_of_a_size(found[-1], min(found[-1] + batch_size, count), each)
        ) < count:
            found.append(end)
        return found

    def show(
        self, places: Sequence[int], seed: int, channels: int, from_bytes: Callable
    ) -> tuple[Tensor, Start | None]:
        """What the network is shown (B, C_in, H, W), and which pixels stay as they are.

        Args:
            places: of the inputs.
            seed: of holes that are made by chance.
            channels: of the images that are made.
            from_bytes: levels to [-1, 1].
        """
        levels = torch.stack([self.images[place] for place in places])  # (B, C, h, w)
        shown = from_bytes(levels)
        if self.are_images:
            draws = inputs.draws_of(self.kind)
            seeds = [seed_of(seed, place) for place in places]
            chances = [np.random.default_rng(each).random(draws, np.float32) for each in seeds]
            shown = inputs.make(self.kind, shown, torch.from_numpy(np.stack(chances)))
        elif self.factor > 1:
            shown = inputs.enlarge(shown, self.factor)
        if self.kind != "@masked":
            return shown, None
        hidden = shown[:, 3:] < 1  # (B, 1, H, W): also what is hidden in part
        colors = luma(levels[:, :3]) if channels == 1 else levels[:, :3]
        return inputs.masked(from_bytes(colors), hidden), Start(colors, hidden.float())
