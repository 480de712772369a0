"""Files from pixels: PNG, GIF, grids, and all that `sample` writes.

Pixels are uint8, 0..255; those of 16 bits are int32, 0..65535.

Reading order: grids and files; Album.
"""

import contextlib
import itertools
import math
import re
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from machinery import processes
from machinery.basics import claimed_folder, counted, in_short, printable, write_whole
from machinery.command_line import as_typed

# ---- grids and files -----------------------------------------------------------------------------


def over_white(images: Tensor) -> Tensor:
    """Images (N, C, H, W) as RGB of 8 bits (N, 3, H, W), transparent ones over white.

    Four channels are premultiplied: color times alpha, and alpha. Of channels that are no colors
    the first three are shown, or of two the first one.
    """
    if images.dtype == torch.int32:
        images = (images / 257).round().to(torch.uint8)
    if images.shape[1] == 4:
        colors, alpha = images[:, :3], images[:, 3:]
        return torch.minimum(colors, alpha) + (255 - alpha)
    shown = images[:, : 1 if images.shape[1] == 2 else 3]
    return shown.expand(-1, 3, -1, -1)


def natural_order(names: Sequence[str]) -> list[int]:
    """Indices of names as people sort them, 2 before 10, where they come by their characters.

    Names in any other order stay in that one: somebody chose it.
    """

    def key(index: int) -> list:
        parts = re.split("0*([0-9]+)", names[index])  # every second one is a number
        return [(len(part) if place % 2 else 0, part) for place, part in enumerate(parts)]

    places = range(len(names))
    return sorted(places, key=key) if list(names) == sorted(names) else list(places)


def in_order(classes: Sequence[str], count: int) -> tuple[str, list[str]]:
    """What in a grid of `count` images goes by class, its rows or its images, and these classes.

    Image i is of class i % len(classes). A row for each takes two classes, and an image of each.
    """
    if 1 < len(classes) <= count:
        return "rows", [classes[number] for number in natural_order(classes)]
    return "images", [classes[number % len(classes)] for number in range(count)]


def describe_grid(classes: Sequence[str], count: int) -> str:
    """Which class stands where in a grid of `count` images, in words."""
    what, names = in_order(classes, count)
    return f"{what} from the top: {in_short(tuple(names))}"


def tile(images: Tensor, classes: Sequence[str] = ()) -> Tensor:
    """Images (N, C, H, W) in 0..255 side by side in a square: (3, rows * H, columns * W).

    With `classes`, image i is of class i % len(classes), and each has a row, in `natural_order`.
    """
    classed = len(classes)
    has_rows = 1 < classed <= len(images)
    columns = math.ceil(len(images) / classed if has_rows else math.sqrt(len(images)))
    images = over_white(images)
    if has_rows:
        blank = images.new_full((classed * columns - len(images), *images.shape[1:]), 255)
        by_column = torch.cat([images, blank]).unflatten(0, (columns, classed))
        images = by_column.transpose(0, 1)[natural_order(classes)].flatten(0, 1)
    blank = images.new_zeros((-len(images) % columns, *images.shape[1:]))
    grid = torch.cat([images, blank]).unflatten(0, (-1, columns))  # (rows, columns, 3, H, W)
    return grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def in_rows(kinds: Sequence[Tensor], columns: int = 8) -> Tensor:
    """Several kinds of images (N, C, H, W) in 0..255 below one another: (1, 3, height, width).

    A row of each kind, then rows of the next images.
    """
    kinds = [over_white(images) for images in kinds]
    missing = -len(kinds[0]) % columns if len(kinds[0]) > columns else 0
    blank = kinds[0].new_full((missing, *kinds[0].shape[1:]), 255)
    parts = zip(*(torch.cat([images, blank]).split(columns) for images in kinds), strict=True)
    rows = [torch.cat(list(row), dim=2) for part in parts for row in part]
    return torch.cat(rows, dim=1)[None]


def to_pillow(image: Tensor) -> Image.Image:
    """An image (C, H, W) as Pillow's L, RGB or (from premultiplied) RGBA; of 16 bits as I;16."""
    if image.dtype == torch.int32 and len(image) == 1:
        return Image.fromarray(image[0].numpy().astype(np.uint16))
    if image.dtype == torch.int32 or len(image) not in (1, 3, 4):
        [image] = over_white(image[None])
    mode = {1: "L", 3: "RGB", 4: "RGBa"}[len(image)]
    pixels = image.permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
    picture = Image.frombytes(mode, (image.shape[2], image.shape[1]), pixels.tobytes())
    return picture.convert("RGBA") if mode == "RGBa" else picture


def save_png(images: Tensor, path: Path, classes: Sequence[str] = (), **facts) -> None:
    """Write images (N, C, H, W) in 0..255 as one PNG, with `facts` as its text chunks.

    Several are tiled over white, see `tile`; a single one keeps its mode.
    """
    chunks = PngImagePlugin.PngInfo()
    if classes and len(images) > 1:
        what, names = in_order(classes, len(images))
        facts[f"classes of the {what}"] = ",".join(names)
    for name, value in facts.items():
        chunks.add_text(name, str(value))
    picture = to_pillow(tile(images, classes) if len(images) > 1 else images[0])
    write_whole(path, lambda file: picture.save(file, "png", pnginfo=chunks))


def suffix_of(images: Tensor) -> str:
    """What keeps all there is in images (N, C, H, W): .png, or .npy where PNG cannot."""
    fits = images.shape[1] in ((1,) if images.dtype == torch.int32 else (1, 3, 4))
    return ".png" if fits else ".npy"


def save_npy(images: Tensor, path: Path, **_) -> None:
    """Write the only one of images (1, C, H, W) as an array (H, W, C), uint8 or uint16.

    A .npy file has no place for facts.
    """
    levels = images[0].permute(1, 2, 0).numpy()  # (H, W, C)
    levels = levels.astype(np.uint8 if images.dtype == torch.uint8 else np.uint16)
    write_whole(path, lambda file: np.save(file, levels))


def save_gif(frames: list[Tensor], path: Path, comment: str) -> None:
    """Write frames (3, H, W) in 0..255 as a loop that rests on its last frame.

    It takes about two seconds to come there, or longer, with 12 frames a second.
    """
    first, *others = map(to_pillow, frames)
    options = {"save_all": True, "append_images": others, "loop": 0, "comment": comment.encode()}
    each = max(80, 2000 // max(1, len(others)))  # milliseconds
    durations = [each] * len(others) + [3000]
    write_whole(path, lambda file: first.save(file, "gif", duration=durations, **options))


# ---- what sample writes --------------------------------------------------------------------------

GRID_IMAGES = 256  # nobody looks at a larger grid
GIF_IMAGES = 16
GIF_FRAMES = 50


@dataclass
class Album:
    """What `sample` writes to a folder: every image, a grid, and a GIF of the denoising.

    Each file carries the command that makes it again. Of several processes each writes the images
    it made; the first one adds the grid and the GIF.

        with album:
            album.add(numbers, images)
        print(album.close())
    """

    folder: Path  # with _2, _3, ... where there is one of that name
    flags: dict  # those of `sample` that decide what the images look like, in their order
    labels: list[str]  # the classes that take turns; none for an unconditional run
    facts: dict  # what else every file tells
    save_grid: bool
    gif: bool
    moves: int  # steps from noise to image
    names: list[str] = field(default_factory=list)  # of the images, if they have their own
    suffix: str = ".png"  # of the single images
    grid: list[Tensor] = field(default_factory=list)
    # by the first number of a batch, its frames (2, B, C, H, W): x_t and the guess of x_0
    film: dict[int, list[Tensor]] = field(default_factory=dict)

    def __enter__(self) -> "Album":
        """Make the folder; if no image comes to lie in it, it goes again."""
        self.exits = contextlib.ExitStack()
        if processes.is_first():
            self.folder = self.exits.enter_context(claimed_folder(self.folder))
        self.folder = processes.from_first(self.folder)
        return self

    def __exit__(self, *error) -> None:
        self.exits.close()

    def __post_init__(self):
        # then an image has no seed of its own: it depends on its number
        self.goes_by_number = not {"interpolate", "variation"}.isdisjoint(self.flags)
        self.count = len(self.names) or self.flags["n_img"]

    def command(self, numbers: range) -> str:
        """What makes these images again, to the bit: as the batch they were made in."""
        first = numbers.start
        flags = self.flags
        if not self.names:
            batch_size = min(len(numbers), self.flags["batch_size"])
            flags = flags | {"n_img": len(numbers), "batch_size": batch_size}
        if first:
            flags["seed"] += first
        if self.labels:
            count = len(self.labels)
            turns = (self.labels[(first + turn) % count] for turn in range(count))
            flags["label"] = ",".join(turns)
        words = (f"--{flag}={as_typed(flag, value)}" for flag, value in flags.items())
        return shlex.join(["python", "ddpm.py", "sample", *words])

    def is_frame_due(self, numbers: range, move: int) -> bool:
        """Whether move 1, 2, ... of a batch is one of the GIF's frames, evenly spread over all."""
        is_next = move * GIF_FRAMES // self.moves > (move - 1) * GIF_FRAMES // self.moves
        return self.gif and numbers.start < GIF_IMAGES and is_next

    def add_frame(self, numbers: range, x_t: Tensor, x_0: Tensor) -> None:
        """Keep a frame of a batch (B, C, H, W), of its images that are among the first 16."""
        wanted = GIF_IMAGES - numbers.start
        both = torch.stack([x_t[:wanted], x_0[:wanted]])
        self.film.setdefault(numbers.start, []).append(both)

    def frames(self, film: dict[int, list[Tensor]]) -> list[Tensor]:
        """Frames (3, H, 2 W) of all batches: x_t on the left, the guess of x_0 on the right."""
        batches = [film[start] for start in sorted(film)]
        joined = [torch.cat(parts, dim=1) for parts in zip(*batches, strict=True)]
        return [torch.cat([tile(half, self.labels) for half in both], dim=2) for both in joined]

    def name(self, number: int) -> str:
        """The file of an image, without suffix."""
        digits = max(4, len(str(self.count)))
        return self.names[number] if self.names else f"sample_{number + 1:0{digits}d}"

    def add(self, numbers: range, images: Tensor, beside: Tensor | None = None) -> None:
        """Write a batch (B, C, H, W), eight files at a time: they wait for the disk.

        In the grid, each has an image of `beside` (B, C_in, H, W) on its left.
        """
        is_whole = self.goes_by_number or bool(self.names)
        again = range(self.count) if is_whole else numbers
        command = self.command(again)
        self.suffix = suffix_of(images)
        save = save_png if self.suffix == ".png" else save_npy
        with ThreadPoolExecutor(8) as writers:
            pending = []
            for image, number in zip(images, numbers, strict=True):
                path = self.folder / f"{self.name(number)}{self.suffix}"
                facts = {} if self.goes_by_number else {"seed": self.flags["seed"] + number}
                place = again.index(number)
                there = printable(self.names[number]) if self.names else f"sample_{place + 1:04d}"
                facts["command"] = f"{command}  # this is {there}.png there"
                if self.labels:
                    facts["label"] = self.labels[number % len(self.labels)]
                pending.append(writers.submit(save, image[None], path, **self.facts, **facts))
            for each in pending:
                each.result()  # raises what the thread met with
        wanted = max(0, GRID_IMAGES - numbers.start)
        if beside is not None:
            images = torch.cat([over_white(beside), over_white(images)], dim=3)
        self.grid += [image.clone() for image in images[:wanted]]  # views would keep the batch

    def close(self) -> str:
        """Write the grid and the GIF, once all processes are done; what there is, in words."""
        grid = list(itertools.chain(*processes.gather(self.grid)))
        films = processes.gather(self.film)
        if not processes.is_first():
            return ""
        n_img = self.count
        command = self.command(range(n_img))
        there = self.folder / f"{'' if self.names else 'sample_'}*{self.suffix}"
        sentences = [f"{counted(n_img, 'image')}: {there}"]
        are_alike = len({image.shape for image in grid}) == 1
        if not are_alike:
            sentences.append("they have several sizes, so that no grid shows them")
        if self.save_grid and are_alike:
            path = self.folder / "samples.png"
            seed = {} if self.goes_by_number else {"seed": self.flags["seed"]}
            facts = self.facts | seed | {"command": command}
            save_png(torch.stack(grid), path, self.labels, **facts)
            where = f"; its {describe_grid(self.labels, len(grid))}" if self.labels else ""
            sentences.append(f"{len(grid)} of them in one: {path}{where}")
        if self.gif:
            path = self.folder / "samples.gif"
            frames = self.frames({start: film for each in films for start, film in each.items()})
            save_gif(frames, path, comment=f"{command} --gif")
            sentences.append(f"the denoising of {min(n_img, GIF_IMAGES)} as a GIF: {path}")
        if "interpolate" in self.flags:
            path = self.folder / "interpolation.gif"
            save_gif(list(over_white(torch.stack(grid))), path, comment=command)
            sentences.append(f"they lead from seed to seed in a film: {path}")
        return "\n".join(sentences)
