"""Held-out images: chosen by name, never learned from; their loss shows what is learned by heart.

Reading order: how many and which; HeldOut, what they cost; the gap.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from machinery import devices, journal, processes
from machinery.basics import UserError
from machinery.inputs import fixed_chances, load_inputs
from machinery.listing import composed

AUTOMATIC = 0.02  # share of a data set that is large enough
FEWEST = 16  # images; the loss of fewer is mostly chance
MEASURED = 128  # images whose loss is taken, at most: more would take more than COST
COST = 0.01  # of the time of a training, at most

# ---- how many and which --------------------------------------------------------------------------


class Split(NamedTuple):
    """The images of a data set (N of them), by their indices; both kinds together are all."""

    held_out: np.ndarray  # (H,) int64, in the order of the hashes of their names
    learned: np.ndarray  # (N - H,) int64, rising
    beside: np.ndarray  # (H,) int64: those of `learned` whose hashes come first


def automatic(count: int) -> float:
    """The share that `--held_out=auto` means for so many images: 0 where it would be too few."""
    return AUTOMATIC if round(AUTOMATIC * count) >= FEWEST else 0.0


def number_of(held_out: float, count: int) -> int:
    """How many of `count` images a share (below 1) or a number of them is.

    Raises:
        UserError: it is no whole number, none of the images, or more than half of them.
    """
    if not held_out:
        return 0
    number = round(held_out * count) if held_out < 1 else round(held_out)
    if held_out > 1 and number != held_out:
        raise UserError(f"--held_out={held_out:g} is neither a share below 1 nor a whole number")
    if not 1 <= number <= count / 2:
        rule = f"it takes 1 to {count // 2:,} of them, as a number or a share; 0 for none"
        raise UserError(f"--held_out={held_out:g} holds out {number:,} of {count:,} images; {rule}")
    return number


def hash_of(name: str) -> bytes:
    """Decides who is held out; frames of one file (film.gif/00017) are alike, and stay together."""
    name = re.sub(r"(?i)(\.(gif|webp|tiff?|png|avif|heic|heif))/\d{5}$", r"\1", composed(name))
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def split(names: Sequence[str], held_out: float, labels: np.ndarray | None = None) -> Split:
    """Hold out the images whose names have the smallest hashes.

    So an image stays held out when others are added to the data set or removed, up to a few where
    the number changes; and no two runs of the same images differ in it.

    Args:
        names: of the images, below the data set's folder.
        held_out: see `number_of`.
        labels: classes (N,), none of which may lose its last image; None without classes.
    """
    number = number_of(held_out, len(names))
    everything = np.arange(len(names))
    if not number:
        return Split(everything[:0], everything, everything[:0])
    hashes = [hash_of(name) for name in names]
    order = np.array(sorted(everything, key=hashes.__getitem__))
    if labels is not None:  # the first image of each class, from the end, is not to be had
        _, last = np.unique(labels[order[::-1]], return_index=True)
        kept = len(order) - 1 - last
        order = np.concatenate([np.delete(order, kept), order[np.sort(kept)]])
        number = min(number, len(order) - len(kept))
    rest = order[number:]
    return Split(order[:number], np.sort(rest), rest[:number])


def remarks(chosen: Split, is_small: bool) -> list[str]:
    """A sentence on what is held out, or why nothing is; none where nothing is by request."""
    number = len(chosen.held_out)
    if is_small:
        few = f"{AUTOMATIC:.0%} of them are fewer than {FEWEST}"
        return [f"none are held out, since {few}; --held_out={FEWEST} shows memorization"]
    if not number:
        return []
    few = f"; the loss of fewer than {FEWEST} is mostly chance" if number < FEWEST else ""
    return [f"{number:,} more are held out, to see what is learned by heart{few}"]


# ---- what they cost ------------------------------------------------------------------------------


class HeldOut:
    """The loss of the EMA weights on held-out images, and on as many that are learned from.

    Noise and noising steps of image i are the same every time, for both kinds: so the curves are
    smooth, and the two losses differ by the images alone. Nothing here changes what is learned.

    Args:
        chosen: the split of the data set.
        training: has `ema`, `diffusion`, `loader`, `settings`, `device`, `precision` and
            `micro_batches`.
    """

    def __init__(self, chosen: Split, training):
        number = min(MEASURED, len(chosen.held_out), len(chosen.beside))
        both = np.concatenate([chosen.held_out[:number], chosen.beside[:number]])
        loader = training.loader
        self.training = training
        self.number = number
        self.indices = torch.from_numpy(both).to(loader.images.device)  # (2 n,)
        noise_steps = training.settings["noise_steps"]
        self.t = fixed_steps(number, noise_steps).repeat(2).to(training.device)  # (2 n,)
        quarters = (self.t[:number].cpu() - 1) * journal.QUARTERS // noise_steps
        self.quarters = [quarters == quarter for quarter in range(journal.QUARTERS)]
        self.every = steps_between(number, loader.batch_size)

    def is_due(self, step: int) -> bool:
        """By the step alone: a resumed run measures where one that was never stopped does."""
        return step % self.every == 0

    @torch.no_grad()
    def measure(self) -> list[float | None]:
        """journal.HELD_OUT_COLUMNS now; each process takes its share of the images.

        A quarter of the noising steps without an image has None.
        """
        training = self.training
        loader = training.loader
        device = training.device
        size = training.settings["img_size"]
        at_once = devices.images_at_once(device, size, training.settings["width"])
        parts = training.micro_batches
        if parts.size < len(parts.share):  # memory is known to be short
            at_once = min(at_once, parts.size)
        losses = torch.zeros(2 * self.number, device=device)
        chances = fixed_chances(loader, self.number).repeat(2, 1)
        mine = processes.share(2 * self.number)
        for start in mine[::at_once]:
            part = slice(start, min(start + at_once, mine.stop))
            indices = self.indices[part]
            x_0 = loader.load(indices, chances[part])  # (b, C, H, W)
            inputs = load_inputs(loader, indices, chances[part], x_0)
            noise = [self.noise_of(place) for place in range(part.start, part.stop)]
            eps = torch.from_numpy(np.stack(noise)).to(device, x_0.dtype)
            labels = None
            if training.settings["classes"]:
                labels = devices.send(loader.labels[indices], device)
            with devices.autocast(device, training.precision):
                inputs = (x_0, self.t[part], eps, labels, inputs)
                found = training.diffusion.loss(training.ema, *inputs)
            losses[part] = found.to(losses.dtype)
        processes.add_up([losses])
        return self.in_columns(losses.cpu().double())

    def noise_of(self, place: int) -> np.ndarray:
        """Fixed noise (C, H, W), the same for a held-out image and the one beside it."""
        generator = np.random.default_rng(place % self.number)
        return generator.standard_normal(tuple(self.training.loader.shape), np.float32)

    def in_columns(self, losses: torch.Tensor) -> list[float | None]:
        """The cells of a row of the log, of losses (2 n,) float64."""
        cells = []
        for kind in losses.split(self.number):
            by_quarter = [kind[members].mean().item() for members in self.quarters]
            cells += [kind.mean().item(), *(None if math.isnan(x) else x for x in by_quarter)]
        return [*cells, errors_apart(*losses.split(self.number))]


def fixed_steps(number: int, noise_steps: int) -> torch.Tensor:
    """Noising steps (n,) in 1..T, evenly spread; neighbors are in different quarters."""
    quarter = torch.arange(number) % journal.QUARTERS
    place = torch.arange(number) // journal.QUARTERS
    within = (place + 0.5) / math.ceil(number / journal.QUARTERS)
    return 1 + ((quarter + within) / journal.QUARTERS * noise_steps).long()


def steps_between(number: int, batch_size: int) -> int:
    """Steps of a training between two measurements: full rows of the log, and COST at most.

    An image of a training step takes a forward pass, and a backward pass of twice the time.
    """
    as_trained = 2 * number / 3
    rows = math.ceil(as_trained / COST / (batch_size * journal.ROW_EVERY))
    return journal.ROW_EVERY * max(1, rows)


# ---- the gap  --------------------------------------------------------------------------


def errors_apart(held_out: torch.Tensor, beside: torch.Tensor) -> float:
    """How many standard errors the log losses (n,) of held-out images are above the others'.

    In pairs of the same noise and step; by logarithms, so that details, where losses are small,
    count as much as composition.
    """
    apart = (held_out.clamp(min=1e-12) / beside.clamp(min=1e-12)).log()
    error = apart.std(correction=0).item() / math.sqrt(max(1, len(apart) - 1))
    return apart.mean().item() / error if error > 0 else 0.0
