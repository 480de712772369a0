"""How near the images of an image-to-image run are to the true ones, beside a plain baseline.

Reading order: what a run is shown; baselines; figures; in words.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import utils
from machinery import inputs, writing
from machinery.inputs import is_made, kind_of
from machinery.reading import Dataset, Start

FEWEST = 16  # held-out images; of fewer, all images are compared
# psnr and ssim by pixels, `apart` by the features that describe an image
COLUMNS = ("compared", "psnr", "ssim", "apart", "distance_baseline")
COLUMNS += ("psnr_baseline", "ssim_baseline", "apart_baseline")
MEANINGS = {
    "psnr": "decibels by pixels; higher is better",
    "ssim": "structural similarity, at most 1; higher is better",
    "apart": "distance of the features of each pair; lower is better",
    "distance": "Frechet distance to real images; lower is better",
}

# ---- what a run is shown -------------------------------------------------------------------------


class Shown(NamedTuple):
    """What the network is given to make images that are judged."""

    inputs: Tensor  # (n, C_in, H, W) in [-1, 1]
    truth: Tensor  # (n, C, H, W) uint8
    hidden: Tensor | None  # (n, 1, H, W): 1 where a hole is to be filled

    def start(self, part: slice) -> Start | None:
        """What some of the images start from: pixels that stay."""
        return None if self.hidden is None else Start(self.truth[part], self.hidden[part])


def in_the_middle(data: Dataset, size: tuple[int, int]) -> Dataset:
    """A data set of images that are cropped to `size`, as views."""

    def middle(images: np.ndarray | None) -> np.ndarray | None:
        if images is None:
            return None
        top, left = ((have - want) // 2 for have, want in zip(images.shape[2:], size, strict=True))
        return images[:, :, top : top + size[0], left : left + size[1]]

    return data._replace(images=middle(data.images), partners=middle(data.partners))


def shown(data: Dataset, settings: dict, places: np.ndarray) -> Shown:
    """The inputs of the images at `places`, as in training; holes are always the same ones."""
    truth = torch.from_numpy(data.images[places])
    flag = settings["inputs"]
    if not is_made(flag):
        given = utils.from_bytes(torch.from_numpy(data.partners[places]))
        return Shown(given, truth, None)
    draws = inputs.draws_of(flag)
    chances = torch.rand(len(places), draws, generator=torch.Generator().manual_seed(0))
    made = inputs.make(flag, utils.from_bytes(truth), chances)
    hidden = (made[:, 3:] < 1).float() if kind_of(flag)[0] == "@masked" else None
    return Shown(made, truth, hidden)


# ---- baselines -----------------------------------------------------------------------------------


def lanczos(images: Tensor, factor: int) -> Tensor:
    """Images (N, C, H, W) uint8, reduced as inputs are, and enlarged by Lanczos."""
    small = utils.to_bytes(inputs.reduce(utils.from_bytes(images), factor))
    size = images.shape[3], images.shape[2]
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize(size, Image.Resampling.LANCZOS))
        for plane in small.flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).view_as(images)


def filled(given: Shown) -> Tensor:
    """Images whose holes have the mean color of what is there (N, C, H, W) uint8."""
    known = 1 - given.hidden
    sums = (given.truth * known).sum(dim=(2, 3), keepdim=True)
    means = sums / known.sum(dim=(2, 3), keepdim=True)
    return torch.where(given.hidden > 0, means.round(), given.truth).to(torch.uint8)


def baseline(settings: dict, given: Shown) -> tuple[str, Tensor]:
    """What takes no learning: its name, and images (N, C, H, W) uint8."""
    name, factor = kind_of(settings["inputs"]) if is_made(settings["inputs"]) else ("", 1)
    if name == "@small":
        return "Lanczos", lanczos(given.truth, factor)
    if name == "@masked":
        return "the mean color", filled(given)
    return "the input itself", utils.to_bytes(given.inputs)


# ---- figures -------------------------------------------------------------------------------------


def psnr(images: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels, the mean over images (N, C, H, W) uint8."""
    errors = (images.float() - truth.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-2)
    return (10 * (255**2 / errors).log10()).mean().item()


def ssim(images: Tensor, truth: Tensor) -> float | str:
    """Structural similarity by scikit-image, the mean; "" where that is not installed."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return ""
    pairs = zip(images.numpy(), truth.numpy(), strict=True)
    return float(np.mean([structural_similarity(*pair, channel_axis=0) for pair in pairs]))


def compare(samples: Tensor, plain: Tensor, truth: Tensor, extract: Callable) -> dict:
    """The figures of images and of their baseline, all (N, C, H, W) uint8.

    Args:
        extract: images (N, 3, H, W) to features (N, D).
    """
    kinds = [writing.over_white(images) for images in (truth, samples, plain)]
    real, *others = (extract(images) for images in kinds)
    figures = {"compared": len(truth)}
    for end, images, features in zip(("", "_baseline"), kinds[1:], others, strict=True):
        figures[f"psnr{end}"] = psnr(images, kinds[0])
        figures[f"ssim{end}"] = ssim(images, kinds[0])
        figures[f"apart{end}"] = (features - real).norm(dim=1).mean().item()
    return figures


# ---- in words ------------------------------------------------------------------------------------


def report(figures: dict, name: str, kind: str) -> str:
    """The figures of `compare` as text, and in what the baseline is better.

    Args:
        name: of the baseline.
        kind: of images that were compared.
    """
    lines = [f"beside the true ones, {figures['compared']:,} {kind}; baseline: {name}"]
    lines.append(f"{'':10}{'images':>10}{'baseline':>10}")
    worse = []
    for figure, meaning in MEANINGS.items():
        ours, plain = figures[figure], figures[f"{figure}_baseline"]
        if ours == "":
            lines.append(f"{figure:30}  needs scikit-image: pip install scikit-image")
            continue
        lines.append(f"{figure:10}{ours:10.3f}{plain:10.3f}  {meaning}")
        if (ours < plain) == (figure in ("psnr", "ssim")) and ours != plain:
            worse.append(figure)
    if worse:
        lines.append(f"worse than the baseline ({name}) in: {', '.join(worse)}")
    return "\n".join(lines)
