"""Which noising steps a sampler visits: even, spaced by the noise, or found for a run.

Reading order: spacings; what a run keeps; what `sample` is asked for.
"""

from collections.abc import Sequence

import numpy as np

LEAP = 0.04  # the last step, of the spacings by the noise: from here, as a fraction of T, to 0
MOST_NOISE = 80.0  # noise / signal that counts as that of T, where it may be without bound
FOUND = "found"  # the spacing of a run that tools.steps has searched

# ---- spacings ------------------------------------------------------------------------------------


def rho_7(noise: np.ndarray) -> np.ndarray:
    """The seventh root of noise / signal (Karras et al. 2022, eq. 5)."""
    return noise ** (1 / 7)


# what lies in even distances between two steps, as a function of noise / signal; None is t itself
SPACINGS = {"even": None, "log-snr": np.log, "rho-7": rho_7}


def spaced(spacing: str, steps: int, alpha_bar: Sequence[float]) -> list[int]:
    """`steps` steps from T to 0: the steps + 1 values of t that are visited, falling.

    Args:
        spacing: one of SPACINGS, or the values themselves, with commas.
        steps: how many, T at most.
        alpha_bar: of t = 0..T, falling from 1 (T + 1,).
    """
    noise_steps = len(alpha_bar) - 1
    if spacing not in SPACINGS:
        return [int(t) for t in spacing.split(",")]
    if spacing == "even":
        return [round(noise_steps * (1 - i / steps)) for i in range(steps + 1)]
    alpha_bar = np.asarray(alpha_bar)[1:]
    noise = np.sqrt((1 - alpha_bar) / alpha_bar)  # of t = 1..T, rising
    measured = SPACINGS[spacing](noise)
    last = max(1, round(LEAP * noise_steps))
    ends = SPACINGS[spacing](np.minimum(noise[[-1, last - 1]], MOST_NOISE))
    wanted = np.linspace(*ends, steps)
    nearest = np.abs(measured[:, None] - wanted).argmin(axis=0) + 1
    nearest[0] = noise_steps
    # no value twice: each at least 1 below the one before it, and far enough from 0 for the rest
    order = np.arange(steps)
    falling = np.minimum.accumulate(nearest + order) - order
    return [*np.maximum(falling, steps - order).tolist(), 0]
