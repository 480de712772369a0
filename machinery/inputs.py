"""Image to image: what a network is shown beside the noise, from another folder or made.

Made inputs are computed from the images themselves, as batches are loaded: `--inputs=@gray`. Others
are images of the same names in another folder.

Images here are as networks have them: (B, C, H, W) in [-1, 1], RGBA premultiplied.

Reading order: the kinds; a training's; the shape of a run; pairs of files.
"""

import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from machinery.basics import UserError
from machinery.listing import Listing, composed, list_images
from machinery.pixels import CHANNELS

HOLES = 4  # boxes and strokes of a mask, at most
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in "L" of Pillow
FACTORS = (2, 32)  # how many times @small reduces an image

# ---- the kinds -----------------------------------------------------------------------------------


def over_white(images: Tensor) -> Tensor:
    """Gray, RGB or RGBA images as gray or RGB, transparent ones over white."""
    if images.shape[1] != 4:
        return images
    return (images[:, :3] + 1 - images[:, 3:]).clamp(-1, 1)


def gray(images: Tensor) -> Tensor:
    """Luma (B, 1, H, W)."""
    colors = over_white(images)
    if colors.shape[1] == 1:
        return colors
    weights = colors.new_tensor(LUMA).view(1, 3, 1, 1)
    return (colors * weights).sum(dim=1, keepdim=True)


def edges(images: Tensor) -> Tensor:
    """Dark lines on white where an image changes (B, 1, H, W): Sobel's gradient, over all colors.

    A weak gradient, as of a sky, is none; a strong one is black.
    """
    colors = over_white(images)
    across = colors.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]).div(8).view(1, 1, 3, 3)
    planes = F.pad(colors, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    sides = [F.conv2d(planes, kernel) for kernel in (across, across.transpose(2, 3))]
    steps = torch.hypot(*sides).view_as(colors).amax(dim=1, keepdim=True)  # 1 is black to white
    return 1 - 2 * ((steps - 0.05) / 0.2).clamp(0, 1)


def reduce(images: Tensor, factor: int) -> Tensor:
    """Images so many times smaller, in 256 levels (B, C, H / factor, W / factor)."""
    scale = {"scale_factor": 1 / factor, "mode": "bicubic", "antialias": True}
    levels = ((F.interpolate(images, **scale).clamp(-1, 1) + 1) * 127.5).round()
    return levels / 127.5 - 1


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Small images as a network is shown them (B, C, factor * h, factor * w)."""
    scale = {"scale_factor": float(factor), "mode": "bicubic", "align_corners": False}
    return F.interpolate(images, **scale).clamp(-1, 1)


def holes(chances: Tensor, height: int, width: int) -> Tensor:
    """Masks (B, 1, H, W), True where an image is hidden: one to four boxes and strokes.

    Args:
        chances: (B, 5 HOLES) in [0, 1).
    """
    y = torch.linspace(0, 1, height, device=chances.device).view(-1, 1)
    x = torch.linspace(0, 1, width, device=chances.device)
    hidden = torch.zeros(len(chances), height, width, dtype=torch.bool, device=chances.device)
    for number in range(HOLES):
        drawn = chances[:, 5 * number : 5 * number + 5, None, None]
        kind, top, left, tall, wide = drawn.unbind(1)  # (B, 1, 1) each
        box = ((y - top).abs() < 0.05 + 0.2 * tall) & ((x - left).abs() < 0.05 + 0.2 * wide)
        # a stroke leads from (top, left) to (tall, wide)
        down, right = tall - top, wide - left
        along = ((y - top) * down + (x - left) * right) / (down**2 + right**2 + 1e-6)
        along = along.clamp(0, 1)
        away = torch.hypot(y - top - along * down, x - left - along * right)
        stroke = away < 0.03 + 0.05 * kind
        # the first one is always there, each other one in half of the images
        share = 0.5 if number == 0 else 0.25
        hidden |= (box & (kind <= share)) | (stroke & (kind > 1 - share))
    return hidden[:, None]


def masked(images: Tensor, hidden: Tensor) -> Tensor:
    """Images with holes, as premultiplied RGBA (B, 4, H, W): what is hidden is transparent."""
    colors = torch.where(hidden, -1.0, images).expand(-1, 3, -1, -1)
    return torch.cat([colors, torch.where(hidden, -1.0, 1.0).to(images.dtype)], dim=1)


class Kind(NamedTuple):
    """What a made input is."""

    about: str
    mode: str  # one of CHANNELS; "" for that of the images
    draws: int  # chances that an image takes
    make: Callable[[Tensor, Tensor, int], Tensor]  # of images, chances, factor


KINDS = {
    "@gray": Kind("gray images, to color", "L", 0, lambda images, *_: gray(images)),
    "@small": Kind(
        "@small:4: reduced four times, to enlarge",
        "",
        0,
        lambda images, _, factor: enlarge(reduce(images, factor), factor),
    ),
    "@edges": Kind("drawings of their edges", "L", 0, lambda images, *_: edges(images)),
    "@masked": Kind(
        "images with holes, for inpainting that was learned",
        "RGBA",
        5 * HOLES,
        lambda images, chances, _: masked(images, holes(chances, *images.shape[2:])),
    ),
}


def kind_of(inputs: str) -> tuple[str, int]:
    """The name in KINDS and the factor (1 if it has none) of made `--inputs`.

    Raises:
        UserError: there is no such kind.
    """
    name, colon, factor = inputs.partition(":")
    if name not in KINDS or bool(colon) != (name == "@small"):
        known = ", ".join("@small:4" if name == "@small" else name for name in KINDS)
        raise UserError(f"--inputs={inputs} is not one of: {known}, or a folder of images")
    if not colon:
        return name, 1
    if not factor.isdecimal() or not FACTORS[0] <= int(factor) <= FACTORS[1]:
        raise UserError(f"--inputs={inputs}: {factor} is not a number from 2 to {FACTORS[1]}")
    return name, int(factor)


def is_made(inputs: str) -> bool:
    return inputs.startswith("@")


def are_alike(one: str, other: str) -> bool:
    """Whether the `--inputs` of two runs are of one kind; a folder may lie elsewhere."""
    are_folders = one and other and not is_made(one) and not is_made(other)
    return one == other or bool(are_folders)


def draws_of(inputs: str) -> int:
    """How many chances an image's input takes."""
    return KINDS[kind_of(inputs)[0]].draws if is_made(inputs) else 0


def make(inputs: str, images: Tensor, chances: Tensor) -> Tensor:
    """The input of each image (B, C_in, H, W).

    Args:
        inputs: of a made kind.
        images: (B, C, H, W).
        chances: (B, draws_of(inputs)) in [0, 1).
    """
    name, factor = kind_of(inputs)
    return KINDS[name].make(images, chances, factor)


# ---- a training's --------------------------------------------------------------------------------


def load_inputs(
    loader, indices: Tensor, chances: Tensor, x_0: Tensor, is_shown: Tensor | None = None
) -> Tensor | None:
    """What is shown beside images (B, C_in, H, W); None in a run without inputs.

    Args:
        loader: has `load`, `inputs` and `partners`.
        indices, chances: of which `x_0` was loaded.
        x_0: the images (B, C, H, W).
        is_shown: which images keep their input (B,); 0 stands for none.
    """
    if not loader.inputs:
        return None
    if loader.partners:
        shown = loader.load(indices, chances, loader.partners)
    else:
        draws = draws_of(loader.inputs)
        shown = make(loader.inputs, x_0, chances[:, chances.shape[1] - draws :])
    return shown if is_shown is None else shown * is_shown.view(-1, 1, 1, 1)


def fixed_chances(loader, count: int) -> Tensor:
    """Chances (count, n) by which images are as they are, and what is made of them always alike."""
    chances = torch.full((count, 4 + draws_of(loader.inputs)), 0.5)
    generator = torch.Generator().manual_seed(0)
    chances[:, 4:] = torch.rand(chances[:, 4:].shape, generator=generator)
    return chances.to(loader.device)


def examples(loader, count: int, classes: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What previews show, held-out images first: images, their inputs, and classes if there are."""
    places = np.arange(len(loader.images))
    held_out = places[~np.isin(places, loader.learned.numpy())]
    order = np.resize(np.concatenate([held_out, loader.learned.numpy()]), count)
    indices = torch.from_numpy(order).to(loader.images.device)
    chances = fixed_chances(loader, count)
    x_0 = loader.load(indices, chances)
    labels = loader.labels[indices] if classes else None
    return x_0, load_inputs(loader, indices, chances, x_0), labels


# ---- the shape of a run --------------------------------------------------------------------------


def check_inputs(settings: dict) -> None:
    """Refuse `--inputs` that no network can be shown, before anything is read."""
    inputs = settings["inputs"]
    if not is_made(inputs):
        return
    _, factor = kind_of(inputs)
    for side in settings["img_size"]:
        if side % factor:
            raise UserError(f"--inputs={inputs}: --img_size has {side}, no multiple of {factor}")
    mode_of(inputs, settings["mode"])


def mode_of(inputs: str, mode: str, partners: str = "") -> str:
    """The mode of inputs, one of CHANNELS; "" where there are none.

    Args:
        inputs: the flag.
        mode: of the images; "auto" if nobody knows yet.
        partners: the mode of the images in another folder.

    Raises:
        UserError: such inputs cannot be made of such images.
    """
    if not is_made(inputs):
        return partners if inputs else ""
    name, _ = kind_of(inputs)
    colors = {"@gray": ("RGB", "RGBA"), "@edges": ("L", "RGB", "RGBA"), "@masked": ("L", "RGB")}
    if mode not in ("auto", *colors.get(name, (mode,))):
        rule = f"images of the mode {' or '.join(colors[name])}"
        raise UserError(f"--inputs={inputs} is made of {rule}; these have --mode={mode}")
    return KINDS[name].mode or mode


def input_channels(settings: dict) -> int:
    """How many channels a run's network is shown beside the noise."""
    return CHANNELS[settings["input_mode"]] if settings.get("inputs") else 0


def asked(settings: dict) -> str:
    """What `sample` of a run is asked for, in its flags; "" where nothing is shown."""
    flag = settings["inputs"]
    if not flag:
        return ""
    words = [f"--inputs={'@' + settings['dataset'] if is_made(flag) else flag}"]
    if settings["classes"]:
        words.append(f"--label={settings['classes'][0]}")
    return shlex.join(words)


def is_sound(settings: dict) -> bool:
    """Whether a checkpoint's settings describe inputs that there can be."""
    inputs, mode = settings["inputs"], settings["input_mode"]
    if is_made(inputs):
        return mode == mode_of(inputs, settings["mode"])
    return mode in CHANNELS if inputs else mode == ""


def widen(weights: dict[str, Tensor], shape: Sequence[int]) -> dict[str, Tensor]:
    """Weights of a network without inputs, for one whose `conv_in.weight` has this shape.

    The new channels begin at 0: at first, inputs change nothing.
    """
    old = weights["conv_in.weight"]
    if old.shape == shape:
        return weights
    new = old.new_zeros(shape)
    new[:, : old.shape[1]] = old
    return weights | {"conv_in.weight": new}


# ---- pairs of files ------------------------------------------------------------------------------


def stem(name: str) -> str:
    """What the two files of a pair share: the name below their folders, without its suffix."""
    return composed(os.path.splitext(name)[0])


def subset(listing: Listing, places: Sequence[int]) -> Listing:
    """Some images of a listing, in this order."""
    places = np.array(places, np.int64)
    return listing._replace(
        names=[listing.names[place] for place in places],
        labels=listing.labels[places],
        facts=listing.facts[places],
        digests=listing.digests[places],
        members=[listing.members[place] for place in places] if listing.members else [],
    )


def as_pairs(listing: Listing, partners: Listing) -> Listing:
    """A listing and its `partners`, known by the names and contents of both."""
    digest = hashlib.sha256()
    for each in (listing, partners):
        digest.update("\0".join(map(composed, each.names)).encode("utf-8", "surrogateescape"))
        digest.update(each.digests.tobytes())
    known_as = f"3-{digest.hexdigest()[:16]}"
    both = {"fingerprint": known_as, "old_fingerprint": known_as}
    partners = partners._replace(fingerprint=f"{known_as}-inputs")
    return listing._replace(partners=partners, **both)


def list_pairs(folder: Path, inputs: str, cache: Path, frames: str = "first") -> Listing:
    """`list_images` of a data set and, if `--inputs` names a folder, of the inputs of its images.

    Args:
        folder, cache, frames: see `list_images`.
        inputs: the flag: "", a made kind, a folder or another source.

    Raises:
        UserError: also if no two names fit.
    """
    listing = list_images(folder, cache, frames)
    if not inputs or is_made(inputs):
        return listing
    try:
        partners = list_images(Path(inputs), cache, frames)
    except UserError as error:
        raise UserError(str(error).replace("--dataset=", "--inputs=", 1)) from error
    return pair(listing, partners)


def by_stem(listing: Listing) -> tuple[dict[str, int], list[str]]:
    """Where each image is, by its stem; and the names of those that share theirs."""
    stems = [stem(name) for name in listing.names]
    counts = Counter(stems)
    places = {stem: place for place, stem in enumerate(stems) if counts[stem] == 1}
    twice = [name for name, stem in zip(listing.names, stems, strict=True) if counts[stem] > 1]
    return places, twice


def pair(listing: Listing, partners: Listing) -> Listing:
    """The images that have an input, with these as `partners`; what is left out is told.

    Raises:
        UserError: no image has one.
    """
    images, images_twice = by_stem(listing)
    inputs, inputs_twice = by_stem(partners)
    both = [name for name in images if name in inputs]
    if not both:
        example = f"for instance {listing.names[0]} and {partners.names[0]}"
        fault = f"no image of {listing.folder} has one of its name in {partners.folder}"
        raise UserError(f"--inputs: {fault} ({example})")
    alone = [listing.names[images[name]] for name in images if name not in inputs]
    inputs_alone = [partners.names[inputs[name]] for name in inputs if name not in images]
    left_out = {
        "left out, without an input": alone,
        "left out, which share a name but for its suffix": images_twice,
        "inputs left out, without an image": inputs_alone,
        "inputs left out, which share a name but for its suffix": inputs_twice,
    }
    told = [f"{len(found):,} {what}: {found[0]}" for what, found in left_out.items() if found]
    told = listing.remarks + [f"inputs: {remark}" for remark in partners.remarks] + told
    return as_pairs(
        subset(listing, [images[name] for name in both])._replace(remarks=told),
        subset(partners, [inputs[name] for name in both])._replace(remarks=[]),
    )


def both_read(listing: Listing, names: Sequence[str], inputs: Sequence[str]) -> Listing:
    """The pairs of which both files could be read: those with these `names` and `inputs`."""
    read = {stem(name) for name in names} & {stem(name) for name in inputs}
    places = [place for place, name in enumerate(listing.names) if stem(name) in read]
    return as_pairs(subset(listing, places), subset(listing.partners, places))
