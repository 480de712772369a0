"""Which noising steps a sampler visits: even, spaced by the noise, or found for a run.

Reading order: spacings; what a run keeps; what `sample` is asked for.
"""

import itertools
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

import numpy as np

from machinery.basics import UserError, printable

LEAP = 0.04  # the last step, of spacings by the noise: from here, as a fraction of T, if it can be

# ---- spacings ------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """What lies in even distances between two steps."""

    of: Callable[[np.ndarray], np.ndarray]  # sigma = noise / signal, rising
    most_noise: float  # what counts as noise / signal of T, where it may be without bound
    least: float = 0.0  # how long the last step is at least, in t; 1 is start / steps


# why these: benchmarks/README.md, "Samplers and steps"
SPACINGS = {
    "even": None,  # in t itself
    "log-snr": Scale(np.log, 20.0),
    "rho-7": Scale(lambda sigma: sigma ** (1 / 7), 20.0),  # Karras et al. 2022, eq. 5
    "log-noise": Scale(lambda sigma: np.log(sigma + 1 / 8), 40.0, least=0.5),
}


def spaced(spacing: str, steps: int, alpha_bar: Sequence[float], start: int) -> list[int]:
    """The values of t that are visited, falling, from `start` to 0.

    With less than T as the start, spacings by the noise still take all `steps` below it; even and
    named values are those below it. A first named value that is all but the start is left out: two
    guesses of x_0 so near to each other do not tell where it moves.

    Args:
        spacing: one of SPACINGS, or the values themselves, with commas.
        steps: how many from T to 0, T at most.
        alpha_bar: of t = 0..T, falling from 1 (T + 1,).
        start: 0..T.
    """
    noise_steps = len(alpha_bar) - 1
    if spacing not in SPACINGS:
        named = [t for t in map(int, spacing.split(",")) if t < start]
        if start < noise_steps and len(named) > 1 and 10 * (start - named[0]) < named[0] - named[1]:
            del named[0]
        return [start, *named]
    if spacing == "even":
        even = [round(noise_steps * (1 - i / steps)) for i in range(steps + 1)]
        return [start] + [t for t in even if t < start]
    if start == 0:
        return [0]
    steps = min(steps, start)
    alpha_bar = np.asarray(alpha_bar)[1 : start + 1]
    sigma = np.sqrt((1 - alpha_bar) / alpha_bar)  # of t = 1..start, rising
    scale = SPACINGS[spacing]
    measured = scale.of(sigma)
    last = max(LEAP * noise_steps, scale.least * start / steps)
    last = min(start, max(1, round(last)))
    ends = scale.of(np.minimum(sigma[[-1, last - 1]], scale.most_noise))
    wanted = np.linspace(*ends, steps)
    nearest = np.abs(measured[:, None] - wanted).argmin(axis=0) + 1
    nearest[0] = start
    # no value twice: each at least 1 below the one before it, and far enough from 0 for the rest
    order = np.arange(steps)
    falling = np.minimum.accumulate(nearest + order) - order
    return [*np.maximum(falling, steps - order).tolist(), 0]


# ---- what a run keeps ----------------------------------------------------------------------------

# both draw a line through the last two guesses of x_0, and steps are found for such a line
FOUND_FOR = ("unipc", "dpm++")


def kept(sampler: str, default: int, visited: Sequence[Sequence[int]], teacher: str = "") -> dict:
    """The entry "paths" of a checkpoint: which steps suit a run.

    Args:
        sampler: with which they do.
        default: how many `sample` takes if it is not told.
        visited: the values of t, from T to 0, for each number of steps.
        teacher: of a distilled run, the run it was distilled from.
    """
    visited = tuple(tuple(each) for each in visited)
    return {"sampler": sampler, "default": default, "visited": visited, "teacher": teacher}


def are_paths(stored, noise_steps: int, samplers: Container[str]) -> bool:
    """Whether a checkpoint's entry "paths" is what `kept` makes, for a run of so many steps."""
    kinds = {"sampler": str, "default": int, "visited": tuple, "teacher": str}
    return (
        type(stored) is dict
        and {name: type(value) for name, value in stored.items()} == kinds
        and all(type(each) is tuple and is_path(each, noise_steps) for each in stored["visited"])
        and stored["sampler"] in samplers
        and stored["sampler"] != "auto"
        and stored["default"] in by_number(stored)
    )


def is_path(visited: Sequence[int], noise_steps: int) -> bool:
    """Whether values of t fall from T to 0."""
    return (
        len(visited) > 1
        and all(type(t) is int for t in visited)
        and (visited[0], visited[-1]) == (noise_steps, 0)
        and all(t > t_next for t, t_next in itertools.pairwise(visited))
    )


def teacher_of(checkpoint: dict) -> str:
    """From whom, and how, a run was distilled; "" if it was not."""
    return checkpoint["paths"]["teacher"] if "paths" in checkpoint else ""


def suited(paths: dict) -> tuple[str, ...]:
    """The samplers that the kept steps are for: of a distilled run, the one it has learned."""
    is_found = not paths["teacher"] and paths["sampler"] in FOUND_FOR
    return FOUND_FOR if is_found else (paths["sampler"],)


def by_number(paths: dict) -> dict[int, tuple[int, ...]]:
    """The kept steps, by how many they are."""
    return {len(visited) - 1: visited for visited in paths["visited"]}


# ---- what is asked for ---------------------------------------------------------------------------


class Way(NamedTuple):
    """How images are made: the flags of `sample` of these names."""

    sampler: str
    steps: int | str
    spacing: str  # one of SPACINGS, or the values of t, with commas


AUTO = Way("auto", "auto", "auto")


def choose(asked: Way, checkpoint: dict, usual: Way) -> Way:
    """What "auto" means for a run: what it keeps itself, or else `usual`.

    Raises:
        UserError: the steps do not fit the run, or each other.
    """
    noise_steps = checkpoint["settings"]["noise_steps"]
    paths = checkpoint.get("paths") or kept(usual.sampler, usual.steps, ())
    sampler, steps, spacing = asked
    if sampler == "auto":
        sampler = suited(paths)[0]
    if spacing not in ("auto", *SPACINGS):
        return Way(sampler, number_of(spacing, steps, noise_steps), spacing)
    own = by_number(paths) if sampler in suited(paths) and spacing == "auto" else {}
    if steps == "auto":
        steps = paths["default"] if own else min(usual.steps, noise_steps)
    if steps > noise_steps:
        raise UserError(f"--steps={steps} is more than the {noise_steps} noising steps of this run")
    if steps in own:
        spacing = ",".join(map(str, own[steps]))
    return Way(sampler, steps, usual.spacing if spacing == "auto" else spacing)


def remark_on(way: Way, checkpoint: dict, visited_steps: Sequence[int] = ()) -> str:
    """That a run's own steps are taken, or that a distilled run is asked for others; or nothing.

    Args:
        way: what is asked for.
        visited_steps: the values of t that come of it, where an image is not all noise.
    """
    paths = checkpoint.get("paths")
    if not paths:
        return ""
    sampler, steps, spacing = way
    own = ",".join(map(str, by_number(paths).get(steps, ())))
    if sampler in suited(paths) and spacing == own:
        teacher = printable(paths["teacher"])
        source = f"distilled from {teacher} for these" if teacher else "found for this run"
        visited = visited_steps or by_number(paths)[steps]
        return f"steps    {len(visited) - 1}, {source}: t = {','.join(map(str, visited))}"
    if paths["teacher"]:
        made_for = f"{paths['default']} steps of {paths['sampler']}"
        return f"steps    {steps} of {sampler}; this run was distilled for {made_for}"
    return ""


def number_of(spacing: str, steps: int | str, noise_steps: int) -> int:
    """How many steps are named one by one in `--spacing=1000,600,40,0`.

    Raises:
        UserError: they do not fall from T to 0, or are not as many as `--steps`.
    """
    try:
        visited = [int(t) for t in spacing.split(",")]
    except ValueError:
        visited = []
    if not is_path(visited, noise_steps):
        rule = f"is not one of: auto, {', '.join(SPACINGS)}, nor values of t that fall"
        raise UserError(f"--spacing={spacing} {rule} from {noise_steps} to 0, with commas")
    if steps not in ("auto", len(visited) - 1):
        number = f"names {len(visited) - 1} steps"
        raise UserError(f"--spacing={spacing} {number}; leave out --steps={steps}")
    return len(visited) - 1
