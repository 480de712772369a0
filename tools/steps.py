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
from ddpm import Diffusion
from machinery import basics, checkpoints, command_line, devices, runs, sampling
from machinery.basics import UserError
from machinery.steps import LEAP, kept, teacher_of

SAMPLER = "dpm++"  # whose misses are computed; machinery.steps.FOUND_FOR has whom they serve
SEEDS = range(10**6, 10**6 + 32)  # of the walks; nobody looks at these images
PLACES = 50  # on a fine walk
VALUES = 12_288  # of an image that are compared: all of 64x64 in RGB, some of a larger one
COUNTS = range(4, 11)  # of steps that are looked for

# ---- fine walks ----------------------------------------------------------------------------------


class Walks(NamedTuple):
    """Images on their way out of the noise."""

    places: list[int]  # the values of t they pass through, falling from T; not 0
    x_t: Tensor  # at each place (P, N, D)
    x_0: Tensor  # the guess there (P, N, D)


def walk_finely(checkpoint: dict, last: int, device: torch.device) -> tuple[Walks, Diffusion]:
    """The images of SEEDS in PLACES even steps from T to `last`, and the noising process."""
    network, diffusion = ddpm.build_trained(checkpoint, device)
    settings = checkpoint["settings"]
    places = np.linspace(diffusion.noise_steps, last, PLACES).round().astype(int).tolist()
    walk = ddpm.generate(
        network,
        diffusion,
        SEEDS,
        settings["img_size"],
        visited_steps=[*places, 0],
        sampler=SAMPLER,
        labels=sampling.labels_in_turn(range(len(settings["classes"])), SEEDS),
    )
    shape = (network.channels, *settings["img_size"])
    noise = np.stack([next(basics.noise_of(seed, shape)) for seed in SEEDS])
    stride = math.ceil(math.prod(shape) / VALUES)
    thin = lambda images: images.flatten(1)[:, ::stride].float().cpu()  # noqa: E731
    x_t, x_0 = [thin(torch.from_numpy(noise))], []
    with basics.progress_bar(PLACES, unit="step", title="fine walks") as bar:
        for after, guess in walk:
            x_t.append(thin(after))
            x_0.append(thin(guess))
            bar.update()
    return Walks(places, torch.stack(x_t[:-1]), torch.stack(x_0)), diffusion


# ---- misses --------------------------------------------------------------------------------------


def misses(walks: Walks, alpha_bar: Tensor) -> np.ndarray:
    """How far a step from one place to another misses: a weighted mean square (P, P, P).

    [before, here, there] is for a step of DPM-Solver++(2M) from `here` to `there`, which knows the
    guess at `before`, too; [0, 0, there] is the first one, which knows none. Infinite where these
    do not follow each other.

    The step is linear in what the walks have, as is its miss:

        x_there - (noise' / noise) x_here - (signal' - signal noise' / noise) x_0,
        x_0 = guess_here + ratio (guess_here - guess_before)

    So its square is a sum of products of pairs of these, which are computed once. On the way to the
    image a miss grows by up to 1 / signal (in what varies far more than 1, as the brightness of a
    whole picture) or not at all (in what varies less); the weight is the middle, 1 / signal of the
    squares.
    """
    count = len(walks.places)
    signal = alpha_bar[walks.places].sqrt().numpy()
    noise = (1 - alpha_bar[walks.places]).sqrt().numpy()
    lambda_ = np.log(signal / noise)
    both = torch.cat([walks.x_t, walks.x_0]).flatten(1).double()  # (2 P, N D)
    products = (both @ both.T / both.shape[1]).numpy()
    found = np.full((count, count, count), np.inf)
    for before, here in itertools.combinations_with_replacement(range(count), 2):
        if before == here > 0:
            continue
        there = np.arange(here + 1, count)
        ratio = np.zeros(len(there))
        if before < here:
            gaps = lambda_[there] - lambda_[here], lambda_[here] - lambda_[before]
            ratio = gaps[0] / (2 * gaps[1])
        kept_noise = noise[there] / noise[here]
        share = signal[there] - signal[here] * kept_noise  # of x_0
        factors = np.stack([np.ones(len(there)), -kept_noise, -share * (1 + ratio), share * ratio])
        fixed = [here, count + here, count + before]
        places = np.stack([there, *(np.full(len(there), place) for place in fixed)])  # (4, K)
        pairs = products[places[:, None], places[None]]  # (4, 4, K)
        squares = np.einsum("ak,abk,bk->k", factors, pairs, factors)
        found[before, here, there] = squares / signal[there]
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


def missed_by(missed: np.ndarray, path: Sequence[int]) -> float:
    """The sum over a path's steps."""
    return sum(missed[triple] for triple in zip([0, *path], path, path[1:], strict=False))


def nearest(walks: Walks, visited_steps: Sequence[int]) -> list[int]:
    """The places next to values of t, but for the last, 0, each once."""
    distances = abs(np.subtract.outer(visited_steps[:-1], walks.places))
    return sorted({int(place) for place in distances.argmin(axis=1)})


def usual_steps(diffusion: Diffusion, last: int) -> list[int]:
    """The steps that the found ones are measured by: the usual ones, with the same last step."""
    usual = diffusion.visited_steps(ddpm.USUAL.steps, spacing=ddpm.USUAL.spacing)
    return [*(t for t in usual[:-2] if t > last), last, 0]


# ---- the command ---------------------------------------------------------------------------------

LIMITS = ddpm.LIMITS | {"last": (1, 99_999)}


def steps(run_name: str = "", last: int | str = "auto", device: str = "auto") -> None:
    """Find the steps at which a run is best sampled: 4 to 10 of them.

        python -m tools.steps --run_name=my_run

    Makes 32 images in 50 fine steps, and finds the paths of fewer steps that miss these least. They
    are kept in models/RUN/checkpoint.pt, and `ddpm.py sample` takes them, without --steps as many
    as miss no more than the usual steps. If the run is trained on, they are dropped: its network
    changes.

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
        if teacher := teacher_of(stored):
            made = f"models/{run_name} was distilled from {basics.printable(teacher)}"
            raise UserError(f"{made}, for its own steps; no others suit it")
        if stored["settings"]["inputs"]:
            rule = "steps are found for runs that start from noise alone"
            raise UserError(f"--run_name={run_name} was trained with --inputs; {rule}")
        noise_steps = stored["settings"]["noise_steps"]
        if last == "auto":
            last = round(LEAP * noise_steps)
        if noise_steps - last < PLACES:
            few = f"the {noise_steps} noising steps of this run, without the last {last},"
            raise UserError(f"{few} are too few to choose from; it takes at least {PLACES}")
        walks, diffusion = walk_finely(stored, last, place)
        missed = misses(walks, diffusion.alpha_bar)
        paths = {count: search(missed, count - 1) for count in COUNTS}
        limit = missed_by(missed, nearest(walks, usual_steps(diffusion, last)))
        are_enough = [count for count in COUNTS if missed_by(missed, paths[count]) <= limit]
        default = min(are_enough, default=ddpm.USUAL.steps)
        visited = [[*(walks.places[each] for each in path), 0] for path in paths.values()]
        raw = checkpoints.load(run_name)  # as it is, without what newer versions add
        del raw["format"]
        checkpoints.save(run_name, **raw | {"paths": kept(SAMPLER, default, visited)})
    for count, values in zip(COUNTS, visited, strict=True):
        miss = in_levels(missed_by(missed, paths[count]))
        path = ",".join(map(str, values))
        print(f"{count:2} steps miss by {miss:5.2f} levels of 255: t = {path}")
    usual = f"the usual {ddpm.USUAL.steps} ({ddpm.USUAL.spacing}) to t = {last}"
    print(f"{usual} miss by {in_levels(limit):.2f}")
    print(f"`python ddpm.py sample --run_name={run_name}` now takes {default} steps")


def in_levels(square: float) -> float:
    """A mean square of values in [-1, 1] as its root, in levels of 255."""
    return 127.5 * math.sqrt(square)


def main() -> None:
    command_line.run_command_line("-m tools.steps", {"steps": steps}, LIMITS)


if __name__ == "__main__":
    main()
