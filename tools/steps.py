"""Which noising steps a run is best sampled at: found by dynamic programming, kept in the run.

    python -m tools.steps --run_name=my_run
    python -m tools.steps --help

After Chen et al. 2024 (GITS): where the way from noise to image is straight, a sampler may take
long steps, where it bends it needs short ones. A few dozen images are made in fine steps. From each
of their places, a longer step to any later place can then be computed without the network, and how
far it misses. The steps that miss least, in all, are the shortest path through these places.

Reading order: fine walks; misses; search; steps, the command.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ddpm
from machinery import basics, checkpoints, command_line, devices, runs, sampling
from machinery.basics import UserError
from machinery.steps import LEAP, kept

SEEDS = range(10**6, 10**6 + 32)  # of the walks; nobody looks at these images
PLACES = 50  # on a fine walk
VALUES = 12_288  # of an image that are compared: all of 64x64 in RGB, some of a larger one
COUNTS = range(4, 11)  # of steps that are looked for

# ---- fine walks ----------------------------------------------------------------------------------


class Walks(NamedTuple):
    """Images on their way out of the noise."""

    places: list[int]  # the values of t they pass through, from T on, falling; not 0
    x_t: Tensor  # at each place (P, N, D)
    x_0: Tensor  # the guess there (P, N, D)
    images: Tensor  # at the end (N, D)


def fine_places(noise_steps: int, last: int) -> list[int]:
    """About PLACES values of t, even from T to `last`."""
    count = min(PLACES, noise_steps - last + 1)
    return np.linspace(noise_steps, last, count).round().astype(int).tolist()


class Walker:
    """Makes the images of SEEDS with a run, on any path.

    Args:
        checkpoint: of the run.
        device: where to compute.
        bar: moved on after every step of all images.
    """

    def __init__(self, checkpoint: dict, device: torch.device, bar):
        self.network, self.diffusion = ddpm.build_trained(checkpoint, device)
        settings = checkpoint["settings"]
        self.size = settings["img_size"]
        self.labels = sampling.labels_in_turn(range(len(settings["classes"])), SEEDS)
        self.bar = bar

    def walk(self, visited_steps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x_t after every step, and the guess of x_0 before it: (steps, N, D) each."""
        walk = ddpm.generate(
            self.network,
            self.diffusion,
            SEEDS,
            self.size,
            visited_steps=visited_steps,
            sampler=ddpm.USUAL.sampler,
            labels=self.labels,
        )
        found = []
        for pair in walk:
            stride = math.ceil(pair[0][0].numel() / VALUES)
            found.append([each.flatten(1)[:, ::stride].float().cpu() for each in pair])
            self.bar.update()
        x_t, x_0 = map(torch.stack, zip(*found, strict=True))
        return x_t, x_0

    def fine(self, last: int) -> Walks:
        """The walks through all places, and from the last of these straight to the image."""
        places = fine_places(self.diffusion.noise_steps, last)
        x_t, x_0 = self.walk([*places, 0])
        noise = [next(basics.noise_of(seed, (self.network.channels, *self.size))) for seed in SEEDS]
        start = torch.from_numpy(np.stack(noise)).flatten(1)
        start = start[:, :: math.ceil(start.shape[1] / VALUES)]
        return Walks(places, torch.cat([start[None], x_t[:-1]]), x_0, x_t[-1])


# ---- misses --------------------------------------------------------------------------------------


def misses(walks: Walks, alpha_bar: Tensor) -> np.ndarray:
    """How far a step from one place to another misses: the mean square (P, P, P).

    [before, here, there] is for a step of DPM-Solver++(2M) from `here` to `there`, which knows the
    guess at `before`, too; [0, 0, there] is the first one, which knows none. Infinite where these
    do not follow each other.

    The step is linear in what the walks have, as is its miss:

        x_there - (noise' / noise) x_here - (signal' - signal noise' / noise) x_0,
        x_0 = guess_here + ratio (guess_here - guess_before)

    So its square is a sum of products of pairs of these, which are computed once.
    """
    count = len(walks.places)
    signal = alpha_bar[walks.places].sqrt().numpy()
    noise = (1 - alpha_bar[walks.places]).sqrt().numpy()
    log_snr = np.log(signal / noise)
    both = torch.cat([walks.x_t, walks.x_0]).flatten(1).double()  # (2 P, N D)
    products = (both @ both.T / both.shape[1]).numpy()
    found = np.full((count, count, count), np.inf)
    for before, here in itertools.combinations_with_replacement(range(count), 2):
        if before == here > 0:
            continue
        there = np.arange(here + 1, count)
        ratio = np.zeros(len(there))
        if before < here:
            gaps = log_snr[there] - log_snr[here], log_snr[here] - log_snr[before]
            ratio = gaps[0] / (2 * gaps[1])
        kept_noise = noise[there] / noise[here]
        share = signal[there] - signal[here] * kept_noise  # of x_0
        factors = np.stack([np.ones(len(there)), -kept_noise, -share * (1 + ratio), share * ratio])
        fixed = [here, count + here, count + before]
        places = np.stack([there, *(np.full(len(there), place) for place in fixed)])  # (4, K)
        pairs = products[places[:, None], places[None]]  # (4, 4, K)
        found[before, here, there] = np.einsum("ak,abk,bk->k", factors, pairs, factors)
    return found.clip(min=0)


# ---- search --------------------------------------------------------------------------------------


def search(missed: np.ndarray, steps: int) -> list[int]:
    """The path of `steps` steps from the first place to the last that misses least in all.

    Args:
        missed: what `misses` returns.
        steps: one for each pair of neighbours on the path.

    Returns:
        the places, as indices: steps + 1.
    """
    count = len(missed)
    total = np.full((count, count), np.inf)  # of the best path whose last two places are these
    total[0] = missed[0, 0]
    befores = []
    for _ in range(steps - 1):
        longer = total[:, :, None] + missed  # (before, here, there)
        longer[0, 0] = np.inf  # the first step is done
        befores.append(longer.argmin(axis=0))
        total = longer.min(axis=0)
    path = [total[:, -1].argmin(), count - 1]
    for before in reversed(befores):
        path.insert(0, before[path[0], path[1]])
    return [int(place) for place in path]


# ---- the command ---------------------------------------------------------------------------------

LIMITS = ddpm.LIMITS | {"last": (1, 99_999)}


def steps(run_name: str = "", last: int | str = "auto", device: str = "auto") -> None:
    """Find the steps at which a run is best sampled: 4 to 10 of them.

        python -m tools.steps --run_name=my_run

    Makes 32 images in 50 fine steps, and looks for the paths of fewer steps that miss these least.
    They are kept in models/RUN/checkpoint.pt, and `ddpm.py sample` takes them. Without --steps it
    takes the fewest that come as near to the fine images as it would come without them. If the run
    is trained on, they are dropped: its network changes.

    Args:
        run_name: a folder in models/.
        last: the value of t from which the last step leads to the image; auto is a 25th of all
            (40 of 1000); a smaller one may suit a run that has learned the finest detail well.
        device: auto, cpu, cuda, cuda:N, mps or xpu.

    Raises:
        UserError: a flag that does not fit, no such run, or a distilled one.
    """
    command_line.check_limits(locals(), LIMITS)
    run_name = runs.choose(run_name)
    place = devices.pick_device(device)
    with runs.lock_run(checkpoints.paths_of(run_name)[0].parent):
        stored = ddpm.load_run(run_name)
        noise_steps = stored["settings"]["noise_steps"]
        if teacher := stored.get("paths", {}).get("teacher"):
            made = f"models/{run_name} was distilled from {basics.printable(teacher)}"
            raise UserError(f"{made}, for its own steps; no others suit it")
        if last == "auto":
            last = max(1, round(LEAP * noise_steps))
        if noise_steps - last < PLACES:
            few = f"{noise_steps} noising steps of which the last comes from {last}"
            raise UserError(f"{few} are too few to choose from; {PLACES} must lie between them")
        sampler, usual_steps, spacing = ddpm.USUAL
        total = PLACES + 2 * sum(COUNTS)
        with basics.progress_bar(total, unit="step") as bar:
            walker = Walker(stored, place, bar)
            walks = walker.fine(last)
            missed = misses(walks, walker.diffusion.alpha_bar)
            found, distances = {}, {}
            for count in COUNTS:
                path = [walks.places[each] for each in search(missed, count - 1)] + [0]
                usual = walker.diffusion.visited_steps(count, spacing=spacing)
                ends = [walker.walk(visited)[0][-1] for visited in (path, usual)]
                distances[count] = [127.5 * rms(end - walks.images) for end in ends]
                found[count] = path
        usual_distance = distances[usual_steps][1]
        enough = [count for count in COUNTS if distances[count][0] <= usual_distance]
        default = enough[0] if enough else usual_steps
        raw = checkpoints.load(run_name)  # as it is, without what newer versions add
        del raw["format"]
        raw["paths"] = kept(sampler, default, list(found.values()))
        checkpoints.save(run_name, **raw)
    print(told(found, distances, spacing))
    print(f"`python ddpm.py sample --run_name={run_name}` now takes {default} steps")


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def told(found: dict, distances: dict, spacing: str) -> str:
    """A table: how far from the fine images each number of steps ends, in levels of 255."""
    lines = [f"distance from the images of {PLACES} steps, in levels of 255"]
    lines.append(f"{'steps':>5}{'found':>8}{spacing:>9}  found are t =")
    for count, (ours, usual) in distances.items():
        path = ",".join(map(str, found[count]))
        lines.append(f"{count:5}{ours:8.2f}{usual:9.2f}  {path}")
    return "\n".join(lines)


def main() -> None:
    command_line.run_command_line("-m tools.steps", {"steps": steps}, LIMITS)


if __name__ == "__main__":
    main()
