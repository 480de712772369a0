"""The mathematics: noise schedules, objectives, loss weights, samplers; no files, no commands."""

import copy
import itertools
import math
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ddpm
import utils
from ddpm import NOISE_SCHEDULES, OBJECTIVES, SAMPLERS, Diffusion
from machinery import reading, sampling
from machinery.solvers import ADAMS_BASHFORTH, mean_weights
from machinery.steps import SPACINGS
from modules import UNet, update_ema

pytestmark = pytest.mark.quick

# ---- the noising process -------------------------------------------------------------------------


@pytest.mark.parametrize("noise_steps", [10, 100, 1000])
@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_noise_grows_strictly_and_replaces_the_signal(schedule, noise_steps):
    diffusion = Diffusion(noise_steps, schedule)
    assert diffusion.alpha_bar[0] == 1
    assert (diffusion.alpha_bar.diff() < 0).all()
    assert diffusion.alpha_bar[-1] > 0
    assert len(diffusion.signal) == len(diffusion.noise) == noise_steps + 1
    power = diffusion.signal.double() ** 2 + diffusion.noise.double() ** 2
    assert (power - 1).abs().max() < 2e-7  # both are rounded to float32, by 6e-8 of their size


def test_linear_schedule_has_the_betas_of_the_paper():
    alpha_bar = Diffusion(1000, "linear").alpha_bar
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    # float64 rounding
    assert (beta - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("noise_steps", [500, 2000, 10_000])
def test_linear_schedule_ends_at_the_same_noise_whatever_the_number_of_steps(noise_steps):
    ends = [Diffusion(steps, "linear").alpha_bar[-1].log() for steps in (1000, noise_steps)]
    # the sum of the betas is kept, 10.05; that of their squares, whose half is the next term of the
    # logarithm, is not
    assert abs(ends[0] - ends[1]) < 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_clean_undoes_target(schedule, objective):
    torch.manual_seed(0)
    diffusion = Diffusion(1000, schedule, objective)
    t = torch.arange(1, 1001)
    # where next to no signal is left, the noise alone does not tell the image
    if objective == "eps":
        t = t[diffusion.signal[1:] > 0.01]
    x_0, eps = torch.rand(len(t), 3, 4, 4) * 2 - 1, torch.randn(len(t), 3, 4, 4)
    restored = diffusion.clean(diffusion.add_noise(x_0, t, eps), t, diffusion.target(x_0, t, eps))
    # float32 rounds x_t and the target, up to 5 in size, by 3e-7; with eps, that is then divided by
    # the signal
    tolerance = 1e-6 / diffusion.at(t)[0] if objective == "eps" else 1e-6
    assert ((restored - x_0).abs() < tolerance).all()


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_min_snr_all_steps_weigh_one(objective):
    assert (Diffusion(1000, objective=objective).weight(torch.arange(1, 1001)) == 1).all()


def test_min_snr_weights_an_error_in_the_image_by_snr_up_to_its_ceiling():
    diffusion = Diffusion(1000, "cosine", "x0", min_snr=5)
    snr = diffusion.alpha_bar[1:] / (1 - diffusion.alpha_bar[1:])
    weight = diffusion.weight(torch.arange(1, 1001)).double()
    assert (weight / snr.clamp(max=5) - 1).abs().max() < 1e-6  # float32


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_min_snr_loss_is_one_function_of_the_error_in_the_image(objective):
    """A network that answers for a wrong image pays for that image's error.

    It does so in whatever terms it was asked.
    """
    torch.manual_seed(0)
    diffusion, t = Diffusion(1000, "linear", objective, min_snr=5), torch.arange(1, 1001, 27)
    x_0, guess, eps = torch.randn(3, len(t), 3, 4, 4)

    def network(x_t: Tensor, t: Tensor, labels: None = None) -> Tensor:
        signal, noise = diffusion.at(t)
        return diffusion.target(guess, t, (x_t - signal * guess) / noise)

    snr = (diffusion.alpha_bar / (1 - diffusion.alpha_bar))[t]
    expected = snr.clamp(max=5) * (guess - x_0).square().mean(dim=(1, 2, 3))
    # where little signal is left, the two noises differ by 1% of their size only: float32 leaves 5
    # digits of that
    assert (diffusion.loss(network, x_0, t, eps) / expected - 1).abs().max() < 1e-4


def test_loss_of_the_paper_is_the_mean_squared_error_of_the_noise():
    torch.manual_seed(0)
    x_0, eps, answer = torch.randn(3, 5, 3, 4, 4)
    t, seen = torch.tensor([1, 10, 500, 999, 1000]), {}

    def network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.update(x_t=x_t, t=t, labels=labels)
        return answer

    loss = Diffusion().loss(network, x_0, t, eps, t + 1)
    expected = ((answer - eps) ** 2).sum(dim=(1, 2, 3)) / (3 * 4 * 4)
    assert (loss - expected).abs().max() < 1e-6  # float32, values near 2
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)[t - 1].view(-1, 1, 1, 1)
    # float32 product
    assert (
        (seen["x_t"] - alpha_bar.sqrt() * x_0 - (1 - alpha_bar).sqrt() * eps).abs() < 1e-4
    ).all()
    assert torch.equal(seen["t"], t)
    assert torch.equal(seen["labels"], t + 1)


def test_loss_has_its_weights_applied():
    torch.manual_seed(0)
    x_0, eps, answer = torch.randn(3, 5, 3, 4, 4)
    t = torch.tensor([1, 10, 500, 999, 1000])
    plain, weighted = (
        Diffusion(min_snr=min_snr).loss(lambda *_: answer, x_0, t, eps) for min_snr in (0, 5)
    )
    weight = Diffusion(min_snr=5).weight(t)
    assert weight.min() < 0.01 < 0.9 < weight.max()
    assert (weighted - weight * plain).abs().max() < 1e-6  # float32, values near 2


def test_draw_gives_every_step_alike_and_standard_noise():
    torch.manual_seed(0)
    count, noise_steps = 50_000, 10
    t, eps = Diffusion(noise_steps).draw((count, 1, 1, 2))
    seen, times = t.unique(return_counts=True)
    assert seen.tolist() == list(range(1, noise_steps + 1))
    expected = count / noise_steps
    # chi-square with 9 degrees of freedom, 99.9%
    assert ((times - expected) ** 2 / expected).sum() < 27.9
    assert eps.shape == (count, 1, 1, 2)
    # five standard errors of 100,000 draws are 0.016 for the mean, 0.011 for the spread
    assert abs(eps.mean()) < 0.015
    assert abs(eps.std() - 1) < 0.01


# ---- the walk back -------------------------------------------------------------------------------


@given(st.integers(2, 5000), st.data())
@settings(deadline=None, max_examples=200, derandomize=True)
def test_path_falls_evenly_from_noise_to_image(noise_steps, data):
    diffusion = Diffusion(noise_steps)
    for steps in (data.draw(st.integers(1, noise_steps)), noise_steps - 1, noise_steps):
        path = diffusion.visited_steps(steps)
        gaps = [t - t_next for t, t_next in itertools.pairwise(path)]
        assert (path[0], path[-1], len(path)) == (noise_steps, 0, steps + 1)
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1


def test_fresh_noise_is_that_of_the_paper_over_all_steps_and_less_when_steps_are_skipped():
    """Ho et al. 2020, section 3.2: sigma_t^2 is beta_t, or the posterior variance.

    The latter is the smaller one.
    """
    diffusion = Diffusion(10, "cosine")
    x_T = torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def walk(path: list[int], pulse: int) -> Tensor:
        """x_t after every step; the fresh noise is 1 in step `pulse` (0, 1, ...), else 0."""
        draws = (torch.full_like(x_T, number == pulse) for number in itertools.count())
        walk = diffusion.denoise(lambda x_t, t: x_T, x_T, path, "ddpm", lambda: next(draws))
        return torch.stack([x_t.squeeze() for x_t, _ in walk])

    for steps, strength in itertools.product((10, 5), (1, 0.6)):
        path = diffusion.visited_steps(steps, strength)
        pulses = range(len(path) - 1)
        spreads = torch.stack(
            [walk(path, pulse)[pulse] - walk(path, -1)[pulse] for pulse in pulses]
        )
        alpha_bar, alpha_bar_next = diffusion.alpha_bar[path[:-1]], diffusion.alpha_bar[path[1:]]
        beta = 1 - alpha_bar / alpha_bar_next
        variance = beta if steps == 10 else beta * (1 - alpha_bar_next) / (1 - alpha_bar)
        variance[-1] = 0  # Algorithm 2, line 3: no noise on the finished image
        assert (spreads**2 - variance).abs().max() < 1e-12  # float64


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "ipndm", "unipc"])
def test_if_the_image_is_known_the_walk_takes_noise_away_and_nothing_else(sampler):
    torch.manual_seed(0)
    diffusion = Diffusion(1000, "cosine")
    x_0, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    path = diffusion.visited_steps(7)
    states = [
        alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps  # Ho et al. 2020, eq. 4
        for alpha_bar in diffusion.alpha_bar[path]
    ]
    walk = [x_t for x_t, _ in diffusion.denoise(lambda x_t, t: x_0, states[0], path, sampler)]
    assert len(walk) == 7
    assert (torch.stack(walk) - torch.stack(states[1:])).abs().max() < 1e-12  # float64


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_walk_ends_at_its_last_guess(sampler):
    torch.manual_seed(0)
    diffusion = Diffusion(1000)
    x_T, path = torch.randn(2, 3, 4, 4), diffusion.visited_steps(10)
    *_, (image, guess) = diffusion.denoise(lambda x_t, t: x_t.tanh(), x_T, path, sampler)
    assert torch.equal(image, guess)


# ---- data whose perfect denoiser is known --------------------------------------------------------


class Gaussian:
    """Images whose values are N(mean, std^2).

    Then x_t is N(signal * mean, (signal * std)^2 + noise^2).
    """

    def __init__(self, diffusion: Diffusion, mean: float, std: float):
        self.alpha_bar, self.mean, self.std = diffusion.alpha_bar, mean, std

    def moments(self, t: int) -> tuple[float, float]:
        """Mean and spread of x_t."""
        alpha_bar = self.alpha_bar[t].item()
        return math.sqrt(alpha_bar) * self.mean, math.sqrt(alpha_bar * self.std**2 + 1 - alpha_bar)

    def predict_clean(self, x_t: Tensor, t: int) -> Tensor:
        """E[x_0 | x_t], which a perfect network would answer."""
        mean, spread = self.moments(t)
        return self.mean + math.sqrt(self.alpha_bar[t].item()) * (self.std / spread) ** 2 * (
            x_t - mean
        )

    def place(self, z: Tensor, t: int) -> Tensor:
        """The probability flow's x_t.

        A value stays as many spreads from the mean as it was at the start.
        """
        mean, spread = self.moments(t)
        return mean + spread * z


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (-0.5, 0.2)])
@pytest.mark.parametrize(
    ("sampler", "order"), [("ddim", 1), ("dpm++", 2), ("ipndm", 2), ("unipc", 3)]
)
def test_sampler_converges_at_its_order(sampler, order, mean, std):
    """Twice the steps cut the error 2^order times.

    The error is taken at T / 4. Over the last stretch log-SNR rises without bound, and the error is
    a sum of two: that of the solver and that of the last step, which stand in no simple relation.
    """
    diffusion = Diffusion(8192, "linear")
    data = Gaussian(diffusion, mean, std)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    errors = []
    for steps in (128, 256, 512):
        path = diffusion.visited_steps(steps)[: steps * 3 // 4 + 1]
        assert path[-1] == 2048
        *_, (x_t, _) = diffusion.denoise(data.predict_clean, data.place(z, 8192), path, sampler)
        errors.append((x_t - data.place(z, 2048)).abs().max().item())
    orders = [math.log2(error / half) for error, half in itertools.pairwise(errors)]
    # the next term of the error is 1 / steps
    assert all(abs(measured - order) < 0.1 for measured in orders), orders


@pytest.mark.parametrize("order", ADAMS_BASHFORTH)
def test_adams_bashforth_integrates_polynomials_exactly(order):
    """From 0 to 1, by the values at 0, -1, -2, ...: of a degree below the order."""
    for degree in range(order):
        values = [(-place) ** degree for place in range(order)]
        weighted = zip(ADAMS_BASHFORTH[order], values, strict=True)
        assert abs(sum(weight * value for weight, value in weighted) - 1 / (degree + 1)) < 1e-12


@pytest.mark.parametrize("spacing", ["even", "rho-7"])
def test_ipndm_is_that_of_diffusers(spacing):
    """Up to the last step, which is DDIM's here and extrapolates there."""
    diffusion = Diffusion(1000, "cosine")
    data = Gaussian(diffusion, 0.3, 0.5)
    path = diffusion.visited_steps(9, spacing=spacing)
    signal, noise = diffusion.alpha_bar[path].sqrt(), (1 - diffusion.alpha_bar[path]).sqrt()
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(9)
    scheduler.alphas, scheduler.betas = signal, noise  # it has a process of its own
    x_t = theirs = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    walk = [x_t for x_t, _ in diffusion.denoise(data.predict_clean, x_t, path, "ipndm")]
    for number, t in enumerate(path[:-2]):
        x_0 = data.predict_clean(theirs, t)
        v = (signal[number] * theirs - x_0) / noise[number]  # what its network answers
        theirs = scheduler.step(v, scheduler.timesteps[number], theirs).prev_sample
        # float64, divided by the signal, which is 5e-5 at T
        assert (walk[number] - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("places", [[-0.999, -1.0], [2.0, -1.0], [2.0, -1.0, -1.8], [30, -1, -9]])
def test_mean_weights_are_exact_for_polynomials(places):
    """The mean over the step, weighted by signal / noise: by 200 Gauss-Legendre nodes."""
    end, start = places[:2]
    nodes, sizes = np.polynomial.legendre.leggauss(200)
    nodes = (nodes + 1) / 2 * (end - start) + start
    sizes = sizes * np.exp(nodes - end)
    weights = mean_weights(places)
    for power in range(len(places)):
        mean = (sizes * nodes**power).sum() / sizes.sum()
        found = sum(weight * at**power for weight, at in zip(weights, places, strict=True))
        assert abs(found - mean) < 1e-9 * max(1, abs(mean))


# diffusers' own affair
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_unipc_is_that_of_diffusers(schedule, monkeypatch):
    """Which walks its first step again with the middle of two guesses, not with their mean."""

    def middle_of_two(log_snrs: list[float]) -> list[float]:
        return [0.5, 0.5] if len(log_snrs) == 2 else mean_weights(log_snrs)

    monkeypatch.setattr(ddpm, "mean_weights", middle_of_two)
    diffusion = Diffusion(1000, schedule)
    data = Gaussian(diffusion, 0.3, 0.5)
    path = diffusion.visited_steps(9)
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=2, prediction_type="sample")
    scheduler.set_timesteps(9)
    scheduler.sigmas = ((1 - diffusion.alpha_bar) / diffusion.alpha_bar).sqrt()[path]  # float64
    x_t = theirs = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    walk = [x_t for x_t, _ in diffusion.denoise(data.predict_clean, x_t, path, "unipc")]
    for t, timestep, ours in zip(path, scheduler.timesteps, walk, strict=False):
        theirs = scheduler.step(data.predict_clean(theirs, t), timestep, theirs).prev_sample
        assert (ours - theirs).abs().max() < 1e-9


# ---- spacings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_falls_from_noise_to_image(schedule, spacing):
    for noise_steps in (2, 10, 1000):
        diffusion = Diffusion(noise_steps, schedule)
        for steps in {1, 2, min(8, noise_steps), noise_steps - 1, noise_steps}:
            path = diffusion.visited_steps(steps, spacing=spacing)
            assert (path[0], path[-1], len(path)) == (noise_steps, 0, steps + 1)
            assert all(t > t_next for t, t_next in itertools.pairwise(path))


@pytest.mark.parametrize(
    ("spacing", "scale", "most_noise", "last"),
    [
        ("log-snr", math.log, 20, 4000),
        ("rho-7", lambda noise: noise ** (1 / 7), 20, 4000),
        ("log-noise", lambda noise: math.log(noise + 1 / 8), 40, 5556),
    ],
)
def test_a_spacing_is_even_on_its_own_scale_and_leaps_at_the_end(spacing, scale, most_noise, last):
    """From where there is so much noise for the signal to a 25th of T, or half an even step."""
    diffusion = Diffusion(100_000, "cosine")  # so many that rounding to one is not felt
    path = diffusion.visited_steps(9, spacing=spacing)
    assert path[-2:] == [last, 0]
    ratios = ((1 - diffusion.alpha_bar) / diffusion.alpha_bar).sqrt()[path[1:-1]].tolist()
    places = [scale(most_noise), *map(scale, ratios)]
    gaps = [one - two for one, two in itertools.pairwise(places)]
    assert max(gaps) / min(gaps) - 1 < 0.01
    many = diffusion.visited_steps(20, spacing=spacing)
    assert many[-2:] == [4000, 0]


def test_steps_may_be_named_one_by_one():
    diffusion = Diffusion(1000)
    assert diffusion.visited_steps(3, spacing="1000,600,40,0") == [1000, 600, 40, 0]
    assert diffusion.visited_steps(3, 0.5, "1000,600,40,0") == [500, 40, 0]


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize(
    ("sampler", "bound"), [("ddim", 0.06), ("dpm++", 0.012), ("ipndm", 0.012), ("unipc", 0.011)]
)
def test_64_steps_end_near_the_exact_image(sampler, bound, schedule):
    """The data spreads by 0.5.

    The bounds are 4/3 of the error on the schedule that is hardest to follow.
    """
    diffusion = Diffusion(1024, schedule)
    data = Gaussian(diffusion, 0.3, 0.5)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    *_, (image, _) = diffusion.denoise(
        data.predict_clean, data.place(z, 1024), diffusion.visited_steps(64), sampler
    )
    assert (image - data.place(z, 0)).abs().max() < bound


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize(("steps", "least_spread"), [(1000, 0.97), (50, 0.85)])
def test_ddpm_keeps_mean_and_spread(schedule, steps, least_spread):
    """All steps keep both within 3%; 50 of 1,000 narrow the spread.

    That is 11% on the linear schedule; the bound is 15%.
    """
    torch.manual_seed(0)
    diffusion = Diffusion(1000, schedule)
    data = Gaussian(diffusion, 0.3, 0.5)
    x_T = data.place(torch.randn(20_000, 1, 1, 1, dtype=torch.float64), 1000)
    *_, (images, _) = diffusion.denoise(
        data.predict_clean, x_T, diffusion.visited_steps(steps), "ddpm"
    )
    assert abs(images.mean() - data.mean) < 0.03 * data.std  # four standard errors of 20,000 draws
    assert least_spread < images.std() / data.std < 1.03


# ---- the walk with a network ---------------------------------------------------------------------


def toy_network(x_t: Tensor, t: Tensor, labels: None = None) -> Tensor:
    """Stands in for a network: looks at every pixel, its neighbour and the step."""
    return torch.tanh(x_t + 0.5 * x_t.roll(1, dims=3)) * torch.cos(t / 300).view(-1, 1, 1, 1)


toy_network.channels = 3


@pytest.mark.parametrize(
    ("schedule", "their_schedule"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_schedule_agrees_with_diffusers(schedule, their_schedule):
    theirs = diffusers.DDPMScheduler(beta_schedule=their_schedule).alphas_cumprod
    # they add up in float32, which knows 1 - 0.999, the last of cosine's alphas, to 4 digits only
    assert (Diffusion(1000, schedule).alpha_bar[1:].sqrt() - theirs.sqrt()).abs().max() < 1e-5


# diffusers' own affair
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("sampler", "steps", "scheduler", "options"),
    [
        ("ddpm", 1000, diffusers.DDPMScheduler, {"variance_type": "fixed_large"}),
        ("ddpm", 50, diffusers.DDPMScheduler, {"variance_type": "fixed_small"}),
        ("ddim", 50, diffusers.DDIMScheduler, {}),
        (
            "dpm++",
            30,
            diffusers.DPMSolverMultistepScheduler,
            {"thresholding": True, "sample_max_value": 1.0},
        ),
        (
            "dpm++",
            7,
            diffusers.DPMSolverMultistepScheduler,
            {"thresholding": True, "sample_max_value": 1.0},
        ),
    ],
)
@pytest.mark.parametrize(
    ("schedule", "objective", "prediction_type"),
    [("linear", "eps", "epsilon"), ("cosine", "v", "v_prediction"), ("sigmoid", "x0", "sample")],
)
def test_every_step_agrees_with_diffusers(
    sampler, steps, scheduler, options, schedule, objective, prediction_type, monkeypatch
):
    """Their timestep is our t - 1.

    Their thresholding with a ceiling of 1 is the clip to [-1, 1].
    """
    diffusion, generator = Diffusion(1000, schedule, objective), np.random.default_rng(5)

    def draw_noise(*_, **__) -> Tensor:
        return torch.from_numpy(generator.standard_normal((1, 3, 8, 8), dtype=np.float32))

    theirs = scheduler(prediction_type=prediction_type, timestep_spacing="trailing", **options)
    theirs.alphas_cumprod = diffusion.alpha_bar[1:]
    theirs.set_timesteps(steps)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", draw_noise)
    extra = {"use_clipped_model_output": True} if sampler == "ddim" else {}
    visited_steps = diffusion.visited_steps(steps)
    x_t = draw_noise()
    ours = ddpm.generate(
        toy_network, diffusion, [5], (8, 8), visited_steps=visited_steps, sampler=sampler
    )
    for timestep, (our_x_t, _) in zip(theirs.timesteps, ours, strict=True):
        x_t = theirs.step(toy_network(x_t, timestep[None] + 1), timestep, x_t, **extra).prev_sample
        # float32 over up to 1,000 steps, in another order of operations
        assert (our_x_t - x_t).abs().max() < 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_hangs_on_its_seed_alone(sampler):
    """To the bit, with a network that only multiplies.

    Kernels that round by the batch are not the noise's doing.
    """
    seen = []

    def network(x_t: Tensor, t: Tensor, labels: None) -> Tensor:
        seen.append(x_t)
        return x_t * 0.5

    network.channels = 3

    def images(*seeds: int) -> Tensor:
        diffusion = Diffusion(1000, "cosine", "v")
        how = {"visited_steps": diffusion.visited_steps(10), "sampler": sampler}
        *_, (x_t, _) = ddpm.generate(network, diffusion, seeds, (8, 12), **how)
        return x_t

    alone, batch = images(7), images(5, 6, 7, 8)
    assert alone.shape == (1, 3, 8, 12)
    assert torch.equal(seen[0][0], seen[10][2])  # the first draw
    assert torch.equal(alone[0], batch[2])
    others = (batch[[0, 1, 3]] - alone).abs().mean(dim=(1, 2, 3))
    assert (others > 0.1).all(), "other seeds, other images"


def class_network(diffusion: Diffusion, means: Tensor) -> Callable:
    """The perfect answer, in x_0: class c is a Gaussian of variance 1 around means[c].

    Without class, it is around 0.

    E[x_0 | x_t] = mean + signal (x_t - signal mean), for the variance of x_t is 1, too.
    """

    def network(x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        labels = torch.full_like(t, len(means)) if labels is None else labels
        signal, _ = diffusion.at(t)
        mean = torch.cat([means, torch.zeros(1)])[labels].view(-1, 1, 1, 1)
        return mean + signal * (x_t - signal * mean)

    network.channels, network.null_class = 1, len(means)
    return network


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 2.0, 3.5])
def test_guidance_moves_gaussian_classes_as_far_as_it_says(guidance):
    """Between N(0, 1) and N(m, 1), guidance w is the answer of N(w m, 1).

    0 ignores the class, 1 is plain.
    """
    diffusion, means = Diffusion(1000, "cosine", "x0"), torch.tensor([-0.1, 0.04])
    network, labels = class_network(diffusion, means), torch.tensor([0, 1, 1])
    wanted = class_network(diffusion, guidance * means)
    x_t, t = torch.randn(3, 1, 4, 4), torch.tensor([10, 500, 990])
    answer = ddpm.guided(network, x_t, t, labels, guidance)
    assert (answer - wanted(x_t, t, labels)).abs().max() < 1e-6  # float32, values near 1


@pytest.mark.parametrize(("guidance", "size"), [(0, 3), (1, 3), (2, 6)])
def test_guidance_asks_the_network_once_a_step(guidance, size):
    """With class and without go through it as one batch.

    Where one of the two does not count, it is left out.
    """
    sizes, network = [], class_network(Diffusion(1000, "cosine", "x0"), torch.tensor([0.5]))

    def counting(x_t: Tensor, *others: Tensor) -> Tensor:
        sizes.append(len(x_t))
        return network(x_t, *others)

    counting.null_class = 1
    ddpm.guided(
        counting,
        torch.randn(3, 1, 4, 4),
        torch.full((3,), 5),
        torch.zeros(3, dtype=torch.long),
        guidance,
    )
    assert sizes == [size]


def test_classes_take_turns_by_the_number_of_the_image():
    assert sampling.labels_in_turn([2, 0, 5], range(1, 6)).tolist() == [0, 5, 2, 0, 5]
    assert sampling.labels_in_turn([], range(3)) is None


# ---- from a picture ------------------------------------------------------------------------------


@given(st.integers(2, 1000), st.data())
def test_less_strength_is_the_end_of_the_same_path(noise_steps, data):
    diffusion, steps = Diffusion(noise_steps), data.draw(st.integers(1, noise_steps))
    whole, strength = diffusion.visited_steps(steps), data.draw(st.floats(0, 1))
    path = diffusion.visited_steps(steps, strength)
    assert path[0] == round(strength * noise_steps)
    assert path[-1] == 0
    assert path[1:] == [t for t in whole if t < path[0]]
    assert diffusion.visited_steps(steps, 1.0) == whole


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.0, 0.02, 0.4, 1.0])
def test_what_must_not_change_comes_out_as_it_went_in(sampler, strength):
    """Black is kept to the bit, gray is mixed, and all else is new."""
    torch.manual_seed(0)
    pixels, mask = torch.randint(256, (3, 8, 8), dtype=torch.uint8), torch.zeros(1, 8, 8)
    picture = utils.from_bytes(pixels)
    mask[:, :, 4:], mask[:, :, 3] = 1.0, 0.5
    diffusion = Diffusion()
    how = {"visited_steps": diffusion.visited_steps(10, strength), "sampler": sampler}
    how["start"] = reading.Start(pixels, mask)
    *_, (images, guess) = ddpm.generate(toy_network, diffusion, range(2), (8, 8), **how)
    assert torch.equal(images[:, :, :, :3], picture[:, :, :3].expand(2, -1, -1, -1))
    is_new = (images - picture).abs().amax(dim=(0, 1, 2)) > 0.01
    assert is_new.tolist() == [False] * 3 + [strength > 0] * 5
    assert torch.equal(images, guess)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_goes_from_the_picture_itself_to_plain_sampling(sampler):
    pixels = torch.randint(256, (3, 8, 8), generator=torch.manual_seed(0), dtype=torch.uint8)
    picture, diffusion = utils.from_bytes(pixels), Diffusion()

    def images(strength: float, start: reading.Start | None) -> Tensor:
        how = {"visited_steps": diffusion.visited_steps(12, strength), "sampler": sampler}
        *_, (x_t, _) = ddpm.generate(toy_network, diffusion, [3, 4], (8, 8), start=start, **how)
        return x_t

    start = reading.Start(pixels, torch.ones(1, 8, 8))
    plain = images(1.0, None)
    assert torch.equal(images(1.0, start), plain)
    assert torch.equal(images(0.0, start), picture.expand(2, -1, -1, -1))
    # less than half a step
    assert torch.equal(images(0.0004, start), picture.expand(2, -1, -1, -1))
    assert not torch.equal(images(0.9, start), plain)


@pytest.fixture(scope="module")
def two_colors() -> tuple[nn.Module, Diffusion, Tensor]:
    """A network that has seen only red and blue, its noising process, and the two pictures."""
    torch.manual_seed(0)
    colors = torch.tensor([[1.0, -1, -1], [-1, -1, 1]]).view(2, 3, 1, 1).expand(2, 3, 8, 8)
    # of the three objectives the quickest to learn this
    diffusion = Diffusion(1000, "cosine", "x0")
    network = UNet(8, width=16, multipliers=(1, 2), blocks=1, attention_size=4)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(1, 201):
        x_0 = colors[torch.randint(2, (32,))]
        diffusion.loss(network, x_0, *diffusion.draw(x_0.shape)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(average, network, step, decay=0.99)
    return average, diffusion, colors


@pytest.mark.parametrize(
    ("sampler", "steps"), [("ddpm", 100), ("ddim", 20), ("dpm++", 20), ("ipndm", 20), ("unipc", 20)]
)
def test_what_was_learned_from_two_colors_is_two_colors(two_colors, sampler, steps):
    network, diffusion, colors = two_colors
    how = {"visited_steps": diffusion.visited_steps(steps), "sampler": sampler}
    *_, (images, _) = ddpm.generate(network, diffusion, range(64), (8, 8), **how)
    # (64, 2); the colors are 1.33 apart
    distances = (images[:, None] - colors).abs().mean(dim=(2, 3, 4))
    assert (distances.min(dim=1).values < 0.1).float().mean() >= 0.9
    shares = distances.argmin(dim=1).bincount(minlength=2) / 64
    assert shares.min() >= 0.15, shares
