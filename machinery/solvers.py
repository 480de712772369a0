"""How samplers weight the network's earlier answers: the numbers of multistep solvers."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

# of the newest answer and of those before it, for as many as there are
ADAMS_BASHFORTH = {
    1: (1,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def mean_weights(lambdas: Sequence[float]) -> list[float]:
    """The weights that make, of guesses of x_0, the mean of x_0 over a step.

    With lambda = log(signal / noise), half the log-SNR, the probability flow leads to

        x_end = noise_end / noise_start * x_start + noise_end * integral of e^lambda x_0 d lambda

    (Lu et al. 2022, DPM-Solver++, Proposition 4.1), so a step goes as if x_0 were a single image:
    its mean over lambda, weighted by e^lambda. x_0 is taken to follow, in lambda, the polynomial
    through the guesses: a line through two, a parabola through three. This is the corrector of
    UniPC (Zhao et al. 2023, of order 2, with their B_2), but for the first step, where they take
    the middle of two guesses.

    Args:
        lambdas: that of each guess: at the end of the step, at its start, before.
    """
    end, start = lambdas[:2]
    gap = end - start
    # the means of u^k, u from 0 to 1, weighted by e^(gap u); each by parts from the one before
    moments = [1.0]
    for power in range(1, len(lambdas)):
        moments.append(1 / -math.expm1(-gap) - power / gap * moments[-1])
    powers = np.vander((np.asarray(lambdas) - start) / gap, increasing=True)
    return np.linalg.solve(powers.T, moments).tolist()


def weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """The sum of values times weights, of which there are as many."""
    return sum(weight * value for weight, value in zip(weights, values, strict=True))
