"""Denoising diffusion: learn from a folder of images, then make new ones.

    python ddpm.py train  --dataset=datasets/landscapes --run_name=my_run
    python ddpm.py sample --run_name=my_run --n_img=16
    python ddpm.py --help

Reading order: the noise schedules; Diffusion, all of the mathematics; Training, Algorithm 1 of
Ho et al. 2020; generate, Algorithm 2 or a faster sampler with a network; make_images, all that is
asked of a run; the commands train and sample. The network is in modules.py, images come and go
through utils.py. What any training needs (reading files, checkpoints, the log, several processes,
the command line) is in machinery/.
"""

import copy
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import utils
from machinery import command_line, devices, pixels, processes, reading, runs, writing
from machinery.basics import Seed, noise_of, progress_bar, seed_of
from machinery.command_line import FilePath, Flip
from machinery.inputs import examples, input_channels, list_pairs, load_inputs, widen
from machinery.listing import CACHE, check_classes
from machinery.optimizers import OPTIMIZERS
from machinery.sampling import GUIDANCE, Request, guidance_of, labels_in_turn, preview_seeds
from machinery.session import Session
from machinery.solvers import ADAMS_BASHFORTH, mean_weights, weighted_sum
from machinery.sources import FRAMES
from machinery.steps import Way, choose, spaced
from modules import UNet, update_ema

# ---- noise schedules -----------------------------------------------------------------------------


def linear_alpha_bar(steps: int) -> Tensor:
    """Ho et al. 2020, section 4: beta rises from 1e-4 to 0.02; rescaled for other step counts."""
    beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    return torch.cumprod(1 - beta.clamp(max=0.999), dim=0)


def cosine_alpha_bar(steps: int, offset: float = 0.008) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17, with beta capped at 0.999 as they advise."""
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((times + offset) / (1 + offset) * math.pi / 2) ** 2
    beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, dim=0)


def sigmoid_alpha_bar(steps: int, start: float = -3.0, end: float = 3.0) -> Tensor:
    """Jabri et al. 2022 (temperature 1), ending just above 0, where log-SNR is finite."""
    rising = torch.linspace(start, end, steps + 1, dtype=torch.float64).sigmoid()
    alpha_bar = (rising[-1] - rising) / (rising[-1] - rising[0])
    return alpha_bar[1:].clamp(min=1e-8)


# alpha_bar of t = 1..T (T,), float64: falling, and strictly between 1 and 0
NOISE_SCHEDULES = {
    "linear": linear_alpha_bar,
    "cosine": cosine_alpha_bar,
    "sigmoid": sigmoid_alpha_bar,
}
OBJECTIVES = {"eps": "the noise", "x0": "the clean image", "v": "a mix of both"}
# eta, the share of fresh noise (Song et al. 2021, eq. 16); else they differ in `Diffusion.denoise`
SAMPLERS = {"ddpm": 1.0, "ddim": 0.0, "dpm++": 0.0, "ipndm": 0.0, "unipc": 0.0}

# ---- the mathematics -----------------------------------------------------------------------------


class Diffusion:
    """The fixed noising process and the way back; all of the mathematics, no learned weights.

    t counts noising steps, as in the paper: t = 0 is a clean image, t = T is (almost) pure noise.
    Two factors per step, taken from the paper's alpha_bar, say everything else:

        signal[t] = sqrt(alpha_bar_t)        how much of the image is left
        noise[t]  = sqrt(1 - alpha_bar_t)    how much noise has been mixed in

    so that x_t = signal[t] * x_0 + noise[t] * eps          (Ho et al. 2020, eq. 4)

    The defaults are the paper's; those of `train` are others.

    Args:
        noise_steps: T.
        schedule: one of NOISE_SCHEDULES.
        objective: what the network predicts, one of OBJECTIVES.
        min_snr: gamma of min-SNR weighting (Hang et al. 2023); 0 gives all steps one weight, as
            in the paper.
        device: where the tables for training are kept.
    """

    def __init__(
        self,
        noise_steps: int = 1000,
        schedule: str = "linear",
        objective: str = "eps",
        min_snr: float = 0.0,
        device: torch.device | str = "cpu",
    ):
        self.noise_steps = noise_steps
        self.objective = objective
        self.min_snr = min_snr
        alpha_bar = NOISE_SCHEDULES[schedule](noise_steps)
        self.alpha_bar = torch.cat([torch.ones(1), alpha_bar])  # (T + 1,) float64
        self.signal = self.alpha_bar.sqrt().float().to(device)
        self.noise = (1 - self.alpha_bar).sqrt().float().to(device)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """signal[t] and noise[t] of t (B,) as factors of images (B, C, H, W): (B, 1, 1, 1) each."""
        return self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t: jump from clean images straight to step t (Ho et al. 2020, eq. 4)."""
        signal, noise = self.at(t)
        return signal * x_0 + noise * eps

    def target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network predicts: noise, clean image, or v (Salimans & Ho 2022, section 4)."""
        signal, noise = self.at(t)
        return {"eps": eps, "x0": x_0, "v": signal * eps - noise * x_0}[self.objective]

    def clean(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x_0: the clean images that a network's output implies; the inverse of `target`."""
        signal, noise = self.at(t)
        if self.objective == "eps":
            return (x_t - noise * output) / signal
        if self.objective == "x0":
            return output
        return signal * x_t - noise * output

    def weight(self, t: Tensor) -> Tensor:
        """Weight of each image's loss (B,): 1, or min-SNR (Hang et al. 2023).

        min(SNR, gamma) is their weight of an error in x_0. In terms of x_0, a squared error in eps
        is SNR times as large, one in v SNR + 1 times; dividing by that makes it a weight for our
        target.
        """
        if self.min_snr == 0:
            return torch.ones_like(self.signal[t])
        snr = (self.signal[t] / self.noise[t]) ** 2
        per_objective = {"eps": snr, "x0": 1.0, "v": snr + 1}
        return snr.clamp(max=self.min_snr) / per_objective[self.objective]

    def draw(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What Algorithm 1 draws for images of `shape`: t (B,), uniform in 1..T, and the noise."""
        device = self.signal.device
        t = torch.randint(1, self.noise_steps + 1, (shape[0],), device=device)
        return t, torch.randn(*shape, device=device)

    def loss(
        self, network: nn.Module, x_0: Tensor, t: Tensor, eps: Tensor, *given: Tensor | None
    ) -> Tensor:
        """Each image's weighted mean squared error (B,): Ho et al. 2020, Algorithm 1, line 5.

        Args:
            network: maps (x_t, t, *given) to an output like the images.
            x_0: clean images (B, C, H, W) in [-1, 1].
            t, eps: noising steps (B,) in 1..T, and the noise (B, C, H, W); see `draw`.
            given: labels (B,) and inputs (B, C_in, H, W), as `UNet` takes them.
        """
        output = network(self.add_noise(x_0, t, eps), t, *given).float()
        error = (output - self.target(x_0, t, eps)).square().mean(dim=(1, 2, 3))
        return self.weight(t) * error

    def visited_steps(self, steps: int, strength: float = 1.0, spacing: str = "even") -> list[int]:
        """The values of t to visit, from T to 0; even ones are "trailing" (Lin et al. 2024).

        With less strength they start at that fraction of T (SDEdit: Meng et al. 2022).
        """
        start = round(self.noise_steps * strength)
        return spaced(spacing, steps, self.alpha_bar.tolist(), start)

    @torch.no_grad()
    def denoise(
        self,
        predict_clean: Callable[[Tensor, int], Tensor],
        x_t: Tensor,
        visited_steps: Sequence[int],
        sampler: str = "ddpm",
        draw_noise: Callable[[], Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go from noise to images, yielding (x_t, guess of x_0) after every step.

        After the last step both are the image. DDPM (Ho et al. 2020, Algorithm 2), DDIM,
        DPM-Solver++(2M), iPNDM and UniPC are one rule (Song et al. 2021, eq. 12):

            x_next = signal_next * x_0 + sqrt(noise_next^2 - variance) * eps + fresh_std * z

        They differ in few places only. DDPM adds fresh noise z, the others none (variance = 0,
        fresh_std = 0). DPM-Solver++(2M) extrapolates x_0 from this guess and the one before (Lu et
        al. 2022, DPM-Solver++, Algorithm 2), iPNDM extrapolates eps from the last four (Zhang &
        Chen 2023); the others take them as they are. UniPC extrapolates as DPM-Solver++(2M), but
        first, with the guess from x_t known, it takes the step that led there again, by the mean
        of x_0 along it (the corrector of Zhao et al. 2023); the network is not asked again, and
        what is yielded is x_t before that.

        The variance is that of q(x_next | x_t, x_0), and fresh_std its root. Only where every step
        is visited, DDPM adds noise of variance beta_t instead, the choice behind the paper's FID of
        3.17; when steps are skipped that is far too much (Song et al. 2021, table 1).

        Args:
            predict_clean: maps (x_t, t) to x_0, both (B, C, H, W); t is a plain int.
            x_t: the starting noise (B, C, H, W).
            visited_steps: values of t, falling, from that of x_t to 0.
            sampler: one of SAMPLERS.
            draw_noise: returns fresh noise (B, C, H, W); PyTorch's generator if left out.
        """
        draw_noise = draw_noise or (lambda: torch.randn_like(x_t))
        eta = SAMPLERS[sampler]
        has_no_gap = len(visited_steps) == visited_steps[0] + 1
        alpha_bars = self.alpha_bar.tolist()  # float64, and no tensor for a scalar
        guesses, lambdas, last_eps, last_start = [], [], [], None  # lists: the newest first
        for t, t_next in itertools.pairwise(visited_steps):
            alpha_bar, alpha_bar_next = alpha_bars[t], alpha_bars[t_next]
            signal, signal_next = math.sqrt(alpha_bar), math.sqrt(alpha_bar_next)
            noise, noise_next = math.sqrt(1 - alpha_bar), math.sqrt(1 - alpha_bar_next)
            beta = 1 - alpha_bar / alpha_bar_next
            variance = eta**2 * beta * (noise_next / noise) ** 2
            fresh_std = eta * math.sqrt(beta) if has_no_gap else math.sqrt(variance)

            x_0 = guess = predict_clean(x_t, t)
            if t_next > 0:  # the last step is DDIM's: lambda is infinite at t = 0
                lambda_next = math.log(signal_next / noise_next)
                lambdas = [math.log(signal / noise), *lambdas[:2]]
                guesses = [guess, *guesses[:2]]
                if sampler == "unipc" and last_start:  # correct where the last step led
                    x_last, signal_last, noise_last = last_start
                    mean = weighted_sum(mean_weights(lambdas), guesses)
                    x_t = signal * mean + noise * (x_last - signal_last * mean) / noise_last
                if sampler in ("dpm++", "unipc") and len(guesses) > 1:
                    gap, last_gap = lambda_next - lambdas[0], lambdas[0] - lambdas[1]
                    x_0 = guess + (guess - guesses[1]) * (gap / (2 * last_gap))
                if sampler == "ipndm":
                    last_eps = [(x_t - signal * guess) / noise, *last_eps[:3]]
                    eps = weighted_sum(ADAMS_BASHFORTH[len(last_eps)], last_eps)
                    # as a change of x_0: x_t - noise * eps, near T, would be lost in rounding
                    x_0 = guess - (eps - last_eps[0]) * (noise / signal)
            last_start = x_t, signal, noise
            eps = (x_t - signal * x_0) / noise
            x_t = signal_next * x_0 + math.sqrt(max(0.0, noise_next**2 - variance)) * eps
            if eta and t_next > 0:
                x_t = x_t + fresh_std * draw_noise()
            yield x_t, guess


# ---- settings ------------------------------------------------------------------------------------

# (1 + cos) / 2 falls from 1 to 0 as the fraction of the training that is done rises from 0 to 1
LR_DECAYS = {
    "cosine": lambda fraction_done: (1 + math.cos(math.pi * fraction_done)) / 2,
    "none": lambda fraction_done: 1.0,
}
# What a flag may be: its choices, or its smallest and largest value. Help and checks read it here.
LIMITS = runs.RANGES | {"mode": reading.MODES, "schedule": NOISE_SCHEDULES}
LIMITS |= {"objective": OBJECTIVES, "lr_decay": LR_DECAYS, "resize": pixels.RESIZES}
LIMITS |= {"sampler": {"auto": None} | SAMPLERS, "optimizer": {"auto": None} | OPTIMIZERS}
LIMITS |= {"crop": reading.CROPS, "flip": utils.FLIPS, "depth": pixels.DEPTHS, "frames": FRAMES}
LIMITS |= {"preset": runs.PRESETS, "precision": devices.PRECISIONS}
NETWORK = ("img_size", "width", "multipliers", "blocks", "attention_size", "dropout")
NOISING = ("noise_steps", "schedule", "objective", "min_snr")
CONDITION_DROPOUT = 0.1  # fraction of classes and inputs hidden in training, for guidance
EARLY = 0.25  # fraction of a training that its guide has seen: benchmarks/README.md, "Guidance"
# why these: benchmarks/README.md, "Samplers and steps"
USUAL = Way(sampler="unipc", steps=8, spacing="log-noise")
STRENGTH = 0.6


def build_network(settings: dict) -> UNet:
    """The network that a run's settings describe, untrained."""
    shape = {name: settings[name] for name in (*NETWORK, *runs.IMPORTED) if name in settings}
    shape["channels"] = reading.CHANNELS[settings["mode"]]
    shape["classes"] = len(settings["classes"]) or None
    shape["input_channels"] = input_channels(settings)
    return UNet(**shape)


def build(settings: dict, device: torch.device) -> tuple[UNet, Diffusion]:
    """The network, untrained, and the noising process that a run's settings describe."""
    noising = {name: settings[name] for name in NOISING}
    return build_network(settings).to(device), Diffusion(**noising, device=device)


def build_trained(checkpoint: dict, device: torch.device) -> tuple[UNet, Diffusion]:
    """What makes a run's images: the network with its EMA weights, and the noising process."""
    devices.keep_memory()
    network, diffusion = build(checkpoint["settings"], device)
    network.load_state_dict(checkpoint["average"])
    return network.eval().to(memory_format=devices.layout(device)), diffusion


def load_run(run_name: str) -> dict:
    """A run's checkpoint, checked; see `runs.load`.

    Flags that are missing from an older checkpoint get today's default: that of a new flag must
    mean what older versions did, or stand in runs.BEFORE.
    """
    return runs.load(run_name, inspect.signature(train).parameters, LIMITS, build_network)


# ---- training ------------------------------------------------------------------------------------


class Training:
    """Algorithm 1 of Ho et al. 2020: the network, its EMA, and the optimizer.

    Everything random in a step is drawn for the whole batch and depends on (seed, step) alone. So
    a resumed run equals, to the bit, one that was never stopped, without any stored generator
    (on the same machine with a CPU; under --max_minutes the learning rate depends on the clock);
    and however processes and micro-batches divide a batch, the step is the same, up to the order
    of additions (and, with dropout, what is dropped).

    Args:
        settings: of the run; see `train`.
        loader: the images.
        device: where to compute.

    Attributes:
        step: how many are done.
        ema: the network with EMA weights, which makes the images.
        early: the EMA weights after a fourth of the training, in half precision; empty before
            that, and None for a run of an older version, which had it behind it.
    """

    def __init__(self, settings: dict, loader: utils.Loader, device: torch.device):
        self.settings = settings
        self.loader = loader
        self.device = device
        self.precision = devices.precision_of(settings["precision"], device)
        self.step = 0
        self.early = {}
        torch.manual_seed(seed_of(settings["seed"]))
        self.network, self.diffusion = build(settings, device)
        self.network.to(memory_format=devices.layout(device))
        self.network.recompute = settings["grad_checkpointing"]
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = OPTIMIZERS[settings["optimizer"]](self.network, self.precision)
        self.scaler = devices.LossScaler(device, self.precision)
        share = processes.share(loader.batch_size)
        self.micro_batches = devices.MicroBatches(share, settings["micro_batch"])

    def state(self) -> dict:
        """What a checkpoint keeps; the inverse of `restore`."""
        return {
            "network": self.network.state_dict(),
            "average": self.ema.state_dict(),  # its name since the first version
            "optimizer": self.optimizer.state_dict(),
            "early": self.early,
            "step": self.step,
            **self.scaler.facts(),
        }

    def restore(self, state: dict) -> None:
        """Stand where `state` was saved."""
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.early = state.get("early")
        self.scaler.restore(state)
        self.step = state["step"]

    def start_from(self, ema_weights: dict[str, Tensor]) -> None:
        """Fine-tuning: start from another run's EMA weights."""
        ema_weights = widen(ema_weights, self.network.conv_in.weight.shape)
        self.network.load_state_dict(ema_weights)
        self.ema.load_state_dict(ema_weights)

    def compute_gradient(self) -> tuple[Tensor, Tensor]:
        """Algorithm 1, lines 2 to 5: loss and t of each image (B,); the gradient is in `.grad`.

        Each process computes its share of the losses and of the gradient, in micro-batches; the
        rest stays 0, and all are added up.
        """
        seed = self.settings["seed"]
        batch_size = self.loader.batch_size
        devices.seed(self.device, seed_of(seed, self.step))
        indices, chances = self.loader.draw(self.step)
        t, eps = self.diffusion.draw((batch_size, *self.loader.shape))
        is_shown = torch.rand(batch_size, device=self.device) >= CONDITION_DROPOUT
        labels, no_class = self.loader.labels[indices], self.network.null_class
        if no_class is not None:
            labels = devices.send(labels, self.device).where(is_shown, no_class)
        losses = torch.zeros(batch_size, device=self.device)

        def add_gradient(part: slice) -> None:
            # else all would drop the same; 1 +, since (seed, step, 0) is (seed, step)
            if self.settings["dropout"]:
                devices.seed(self.device, seed_of(seed, self.step, 1 + part.start))
            x_0 = self.loader.load(indices[part], chances[part])  # (b, C, H, W)
            inputs = load_inputs(self.loader, indices[part], chances[part], x_0, is_shown[part])
            drawn = (x_0, t[part], eps[part], None if no_class is None else labels[part])
            with devices.autocast(self.device, self.precision):
                part_losses = self.diffusion.loss(self.network, *drawn, inputs)  # (b,)
            self.scaler.scale(part_losses.sum() / batch_size).backward()
            losses[part] = part_losses.detach()

        self.micro_batches.run(add_gradient, reset=self.optimizer.zero_grad)
        gradients = (parameter.grad for parameter in self.network.parameters())
        processes.add_up([losses, *gradients])
        return losses, t

    def advance(self, fraction_done: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """Algorithm 1, line 5, a step down the gradient, and the EMA.

        Returns:
            loss and t of each image (B,), the gradient's norm before clipping, the learning rate.
        """
        losses, t = self.compute_gradient()
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), max_norm=1.0)
        self.optimizer.lr = self.learning_rate(fraction_done)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        update_ema(self.ema, self.network, self.step, self.settings["ema_decay"])
        if self.early == {} and fraction_done >= EARLY:
            weights = self.ema.state_dict().items()
            self.early = {name: weight.half() for name, weight in weights}
        return losses, t, self.scaler.norm_taken(grad_norm), self.optimizer.lr

    def learning_rate(self, fraction_done: float) -> float:
        """`--lr`, with a warm-up of at most a tenth of the training, and a decay."""
        by_steps = (self.step + 1) / max(1, self.settings["warmup"])
        warm_up = min(1.0, max(by_steps, 10 * fraction_done))
        decay = LR_DECAYS[self.settings["lr_decay"]]
        return self.settings["lr"] * warm_up * decay(fraction_done)

    def compile(self) -> None:
        """Compile the network in place: the weights keep their names."""
        self.network.compile(dynamic=False)
        self.rehearse()

    def rehearse(self) -> None:
        """Compute a gradient that is not used: to compile, or to see how long it takes."""
        self.compute_gradient()
        self.optimizer.zero_grad()

    def preview(self, path: Path, network: UNet) -> Tensor:
        """Images from the same noise every time, saved at `path`: (N, 3, H, W) in 0..255."""
        settings = self.settings
        classes = settings["classes"]
        steps = min(USUAL.steps, settings["noise_steps"])
        visited_steps = self.diffusion.visited_steps(steps, spacing=USUAL.spacing)
        seeds = preview_seeds(len(classes))
        labels = labels_in_turn(range(len(classes)), seeds)
        how = {"visited_steps": visited_steps, "labels": labels, "precision": settings["precision"]}
        how["guidance"] = guidance_of("auto", settings)
        if settings["inputs"]:
            truth, how["inputs"], how["labels"] = examples(self.loader, len(seeds), classes)
        size = settings["img_size"]
        for x_t, _ in generate(network, self.diffusion, seeds, size, **how):
            pass  # the last one is the image
        images = grid = utils.to_bytes(x_t).cpu()
        if settings["inputs"]:
            rows = (how["inputs"], x_t, truth)
            grid = writing.in_rows([utils.to_bytes(row).cpu() for row in rows])
        writing.save_png(grid, path, classes, run=settings["run_name"], step=self.step)
        return writing.over_white(images)


# ---- sampling ------------------------------------------------------------------------------------


def guided(
    network: UNet,
    x_t: Tensor,
    t: Tensor,
    labels: Tensor | None,
    guidance: float,
    guide: UNet | None = None,
    inputs: Tensor | None = None,
) -> Tensor:
    """A network's output, led away from a worse one.

        output = worse + guidance * (better - worse)

    Classifier-free guidance (Ho & Salimans 2022; their w is one less): worse is that of no class
    and no input. Autoguidance (Karras et al. 2024): it is that of `guide`, a weaker network.
    Whatever the objective, the guess of x_0 is led in the same way: it is affine in the output.
    """
    given = (labels,) if inputs is None else (labels, inputs)
    if guidance == 1 or (labels is None and inputs is None and guide is None):
        return network(x_t, t, *given)
    if guide:
        better, worse = network(x_t, t, *given), guide(x_t, t, *given)
    elif guidance == 0:
        return network(x_t, t)
    else:  # both in one call: the second half is given no class and no input
        if labels is not None:
            labels = torch.cat([labels, torch.full_like(labels, network.null_class)])
        if inputs is not None:
            inputs = torch.cat([inputs, torch.zeros_like(inputs)])
        given = (labels,) if inputs is None else (labels, inputs)
        better, worse = network(x_t.repeat(2, 1, 1, 1), t.repeat(2), *given).chunk(2)
    return worse.float() + guidance * (better.float() - worse.float())


def generate(
    network: UNet,
    diffusion: Diffusion,
    seeds: Sequence[Seed],
    size: tuple[int, int],
    *,
    visited_steps: Sequence[int],
    sampler: str = USUAL.sampler,
    labels: Tensor | None = None,
    inputs: Tensor | None = None,
    guidance: float = GUIDANCE,
    guide: UNet | None = None,
    start: reading.Start | None = None,
    precision: str = "auto",
) -> Iterator[tuple[Tensor, Tensor]]:
    """`Diffusion.denoise` with a network: (x_t, guess of x_0) after every step.

    All noise of an image is drawn on the CPU from its own seed, so it depends neither on the batch
    nor on the device.

    Args:
        seeds: one for each image; see `Seed`.
        size: height and width.
        visited_steps: of `diffusion`; with less than T as the first, `start` is noised to that.
        sampler: one of SAMPLERS.
        labels: classes (B,), or None.
        inputs: what is shown beside the noise (B, C_in, H, W), or None.
        guidance, guide: see `guided`.
        start: an image to start from, and a mask of what to repaint (1) and to keep (0).
        precision: one of devices.PRECISIONS.
    """
    device = diffusion.signal.device
    dtype = devices.precision_of(precision, device)
    shape = (network.channels, *size)
    sources = [noise_of(seed, shape) for seed in seeds]
    labels = None if labels is None else labels.to(device)
    inputs = None if inputs is None else inputs.to(device)
    if start:
        image = utils.from_bytes(start.image).to(device)
        mask = start.mask.to(device)

    def draw_noise() -> Tensor:  # (B, C, H, W)
        return devices.send(torch.from_numpy(np.stack([*map(next, sources)])), device)

    def predict_clean(x_t: Tensor, t: int) -> Tensor:
        times = torch.full((len(x_t),), t, device=device)
        with devices.autocast(device, dtype):
            output = guided(network, x_t, times, labels, guidance, guide, inputs)
        x_0 = diffusion.clean(x_t, times, output.float()).clamp(-1, 1)
        return torch.lerp(image, x_0, mask) if start else x_0

    x_t = draw_noise()
    first = visited_steps[0]
    assert start or first == diffusion.noise_steps, "only an image can be noised to less than T"
    if first < diffusion.noise_steps:  # at T the image is all but gone: plain sampling
        x_t = diffusion.add_noise(image, torch.tensor([first], device=device), x_t)
    if first == 0:
        return iter([(x_t, x_t)])
    return diffusion.denoise(predict_clean, x_t, visited_steps, sampler, draw_noise)


def plan_images(flags: dict, checkpoint: dict, device: torch.device) -> Request:
    """What the flags of `sample` ask of a run, checked: its batches, steps and files."""
    strength = flags["strength"] if flags["init_image"] else 1.0
    settings = checkpoint["settings"]
    asked = Way(flags["sampler"], flags["steps"], flags["spacing"])
    way = choose(asked, checkpoint, USUAL)
    diffusion = Diffusion(settings["noise_steps"], settings["schedule"])
    visited_steps = diffusion.visited_steps(way.steps, strength, way.spacing)
    defaults = inspect.signature(sample).parameters
    return Request(flags | way._asdict(), defaults, checkpoint, visited_steps, device, load_run)


def make_images(
    request: Request, network: UNet, diffusion: Diffusion
) -> Iterator[tuple[Tensor, Tensor]]:
    """Make and write what is asked for: (x_t, guess of x_0) after every step of every batch."""
    flags, album = request.flags, request.album
    device = diffusion.signal.device
    guide = request.fitted(build_trained(request.guide, device)[0]) if request.guide else None
    with album:
        for numbers, seeds, labels, size in request.batches():
            inputs, start = request.shown(numbers, utils.from_bytes)
            denoising = generate(
                request.fitted(network),
                diffusion,
                seeds,
                size,
                visited_steps=request.visited_steps,
                sampler=flags["sampler"],
                labels=labels,
                inputs=inputs,
                guidance=flags["guidance"],
                guide=guide,
                precision=flags["precision"],
                start=start,
            )
            for move, (x_t, x_0) in enumerate(denoising, 1):
                if album.is_frame_due(numbers, move):
                    album.add_frame(numbers, *(utils.to_bytes(side).cpu() for side in (x_t, x_0)))
                yield x_t, x_0
            depth = request.checkpoint["settings"]["depth"]
            both = (side for side in (x_t, inputs) if side is not None)
            album.add(numbers, *(utils.to_bytes(side, depth).cpu() for side in both))


# ---- the commands --------------------------------------------------------------------------------


def train(
    # data
    dataset: FilePath = "datasets/landscapes",
    inputs: FilePath = "",
    run_name: str = runs.UNTITLED,
    init_from: str = "",
    conditional: bool = False,
    frames: str = "first",
    mode: str = "auto",
    depth: int = 8,
    resize: str = "lanczos",
    crop: str = "center",
    crop_margin: float = reading.CROP_MARGIN,
    flip: Flip = "horizontal",
    held_out: float | str = "auto",
    cache: FilePath = str(CACHE),
    # size and length
    preset: str = "none",
    epochs: int = 500,
    max_minutes: float = 0.0,
    resume: bool = True,
    seed: int = 0,
    # network
    img_size: tuple = (64,),
    width: int = 64,
    multipliers: tuple = (1, 2, 4, 4),
    blocks: int = 2,
    attention_size: int = 16,
    dropout: float = 0.0,
    # noise; why these: benchmarks/README.md, "Schedule, objective, loss weight"
    noise_steps: int = 1000,
    schedule: str = "cosine",
    objective: str = "v",
    min_snr: float = 5.0,
    # optimization; why these: benchmarks/README.md, "Learning rate and batch"
    batch_size: int = 32,
    micro_batch: int | str = "auto",
    optimizer: str = "auto",
    lr: float = 5e-4,
    warmup: int = 500,
    lr_decay: str = "cosine",
    ema_decay: float = 0.9999,
    # running
    device: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    grad_checkpointing: bool = False,
    sample_every: int = 10,
    sample_minutes: float = 0.0,
    raw_previews: bool = False,
    save_every: float = 10.0,
    keep_best: bool = False,
    track: str = "",
    tensorboard: bool = False,
    dry_run: bool = False,
) -> None:
    """Learn to make images like those in a folder.

        python ddpm.py train --dataset=datasets/landscapes --run_name=my_run

    The same command resumes a run that was stopped (Ctrl-C saves first). The checkpoint,
    models/RUN/checkpoint.pt, has everything needed to resume or to sample; previews, the log and
    the loss curve are in results/RUN/.

    Args:
        dataset: a folder of images, flat or nested (jpg, png, webp, avif, bmp, gif, tif, jp2, ppm),
            a .zip of these, or an array in a .npy or .npz file.
        inputs: image to image: what an image is made from. A folder of images of the same names
            (a/b.png for a/b.jpg), or made of the images themselves: @gray to color, @small:4 to
            enlarge four times, @edges for drawings, @masked to fill holes.
        run_name: names models/RUN and results/RUN.
        init_from: fine-tuning: another run, whose EMA weights this one starts from.
        conditional: class-conditional: the folders directly in the data set are the classes.
        frames: which frames of animations, and pages of TIFF files, are learned.
        mode: colors of the images; auto is gray if every image is, else RGB. For arrays, also a
            number of channels: 2, or 5 to 64.
        depth: bits of a pixel's value; with 16, arrays and gray images of more than 8 keep them.
        resize: how images are brought to img_size; nearest is for pixel art.
        crop: which part of an image is learned.
        crop_margin: with --crop=random, images are decoded so many times larger than img_size, and
            a part of that size is learned; 4 learns 64 of 256 pixels, for upscaling.
        flip: also learn from mirror images; turn it off where left and right matter, as in text.
        held_out: share or number of images never learned from, whose loss shows memorization;
            auto is 0.02, or 0 where that is fewer than 16 images.
        cache: where decoded images are kept, for the next start.
        preset: a set of flags for a computer without a GPU; laptop: 64x64 pixels in an hour, tiny:
            32x32 in eight minutes.
        epochs: how often the network sees every image, in all.
        max_minutes: a time budget for the whole run, reading the images, compiling and the last
            preview included; the learning rate reaches 0 at its end; 0 for none.
        resume: continue the run if it exists; --resume=no refuses to touch it.
        seed: fixes the initial weights, the order of the images and the noise.
        img_size: one number or height x width (48x96); a multiple of 2 to the power of levels - 1.
        width: channels of the network's first level; a multiple of 4 up to 128, of 32 above.
        multipliers: channels of each level, as multiples of the width; levels halve the resolution.
        blocks: residual blocks in every level.
        attention_size: levels whose shorter side has at most this many pixels get attention; the
            middle always has it.
        dropout: fraction of activations dropped in training; try 0.1 if a small data set overfits.
        noise_steps: steps from an image to pure noise, T in the paper.
        schedule: how the noise grows over the steps; linear is DDPM's.
        objective: what the network predicts; eps is DDPM's.
        min_snr: gamma of min-SNR weighting (5 in its paper); 0 gives all steps one weight, as DDPM.
        batch_size: images per training step, on all GPUs together.
        micro_batch: gradient accumulation: images that go through the network at the same time;
            auto is as many as fit into memory. The result is the same (with dropout: as good).
        optimizer: auto is muon, which learns more from the same images, or what the run began with.
        lr: learning rate after the warm-up.
        warmup: steps in which the learning rate rises from 0; at most a tenth of the training.
        lr_decay: how the learning rate falls over the whole run.
        ema_decay: how slowly the EMA weights follow; they make the images.
        device: auto, cpu, cuda, cuda:N, mps or xpu.
        precision: mixed precision; auto is bfloat16 where the hardware has it, float16 on older
            tensor cores (T4, RTX 20), else float32. Losses and weights are float32 in any case.
        compile: compile the network with torch.compile first, which takes minutes; meant for long
            trainings on a GPU.
        grad_checkpointing: compute activations again instead of keeping them: a fourth of the
            memory, a quarter more time.
        sample_every: epochs between two previews; where a training has fewer than five of these,
            they also come at its tenths; 0 for none but the last.
        sample_minutes: minutes between two previews, besides; 0 for none by the clock.
        raw_previews: also preview the weights without EMA, to see how far these are apart.
        save_every: minutes between saves; the end of an epoch also saves, if that takes less than
            1% of the time.
        keep_best: also keep the EMA weights of the best held-out loss, as the run RUN_best.
        track: also tell trackers: tensorboard, wandb, trackio, or several with commas.
        tensorboard: the same as --track=tensorboard: curves and previews go to runs/RUN.
        dry_run: learn nothing; only show the data (data.png), time a step, and say what would be
            done.

    Raises:
        UserError: a flag, folder or checkpoint that does not fit.
    """
    settings = dict(locals())
    began = time.monotonic()
    runs.check_training(settings, LIMITS)
    settings["img_size"] = runs.full_size(img_size)
    device = devices.pick_device(device)
    listing = list_pairs(Path(dataset), inputs, Path(cache), frames)
    settings["classes"] = check_classes(listing) if conditional else ()
    device = processes.join(device)
    devices.keep_memory()
    with runs.open_run(settings, listing, load_run) as run:
        data = run.read_images()
        loader = utils.Loader(data, batch_size, seed, flip, device)
        training = Training(run.settings, loader, device)
        if run.checkpoint["step"]:
            training.restore(run.checkpoint)
        elif run.init_checkpoint:
            training.start_from(run.init_checkpoint["average"])
        session = Session(run, training, began)
        run.free_checkpoints()
        session.print_summary(data)
        if compile:
            session.compile()
        if dry_run:
            return session.dry_run()
        with session:
            while session.goes_on():
                # logs the step; saves, previews and stops when that is due
                session.note(*training.advance(session.done))
    session.conclude()


def sample(
    # what
    run_name: str = "",
    inputs: FilePath = "",
    n_img: int | str = "auto",
    name: str = "samples",
    save_grid: bool = True,
    gif: bool = False,
    seed: int = 0,
    variation: float = 0.0,
    interpolate: tuple = (),
    img_size: tuple = (),
    # classes and guidance
    label: str = "all",
    guidance: float | str = "auto",
    guide: str = "",
    # image-to-image and inpainting
    init_image: FilePath = "",
    strength: float = STRENGTH,
    mask: FilePath = "",
    # sampler
    sampler: str = "auto",
    steps: int | str = "auto",
    spacing: str = "auto",
    # running
    batch_size: int | str = "auto",
    device: str = "auto",
    precision: str = "auto",
) -> None:
    """Make new images with a trained network.

        python ddpm.py sample --run_name=my_run --n_img=16

    Writes results/RUN/NAME/sample_0001.png and so on, and all of them in one grid. Nothing is
    overwritten: a second call writes to NAME_2.

    Args:
        run_name: the run to sample from, a folder in models/; left out, it is untitled, or all
            runs are listed.
        inputs: for runs trained with --inputs: a folder of images, or one, from which images of
            the same names are made; with @ in front, images of which inputs are made as in
            training.
        n_img: how many images; auto is 16, or one for each of the inputs; a number is for each.
        name: the folder to write to, in results/RUN/.
        save_grid: also save samples.png, the first 256 images side by side.
        gif: also save samples.gif, the denoising of the first images (16 at most): x_t on the
            left, the guess of the image on the right.
        seed: image number i depends on seed + i and its class alone, not on n_img or batch_size.
        variation: the images are variations of the first one: their noise is that of seed, turned
            towards that of seed + i by this fraction of the way; 0 for images of their own.
        interpolate: two seeds (3,8): the images lead from the one's to the other's, and
            interpolation.gif shows them in turn; the noise is interpolated spherically.
        img_size: another size than the run was trained at, such as 48x96; it may not look as good.
            Inputs are enlarged in their own size, others brought to that of the training; what is
            larger is made in tiles that blend.
        label: the classes to make, in turn: a name, several (cats,dogs), or all; for runs trained
            with --conditional.
        guidance: classifier-free guidance (CFG), how strictly an image keeps to its class: 0 not
            at all, 1 as learned, more for clearer and less varied images; with a guide, how far it
            leads away from that (try 1.5). auto is 2, or 1 for runs of inputs without classes, and
            for distilled ones of classes, which have learned theirs.
        guide: autoguidance, for runs without classes too: early, or a weaker run of the same data,
            from which --guidance leads away; early is the run after a fourth of its training, as
            long as that was planned when it came to it.
        init_image: image-to-image (SDEdit): an image to start from, instead of noise.
        strength: how much of init_image changes: 0 nothing, 1 everything.
        mask: inpainting: an image of the same size, white where to repaint, black where every
            pixel is kept.
        sampler: ddpm is the paper's, for many steps; the others need far fewer, add no noise; auto
            is unipc, or what the run was distilled for.
        steps: how many of the noising steps are visited; all of them (1000) with ddpm is the
            paper's Algorithm 2, with the guess of the image clipped to its range; auto is 8, or
            what tools.steps or tools.distill found for the run.
        spacing: which ones; even, or even in the noise (log-noise, log-snr, rho-7), or the values
            of t (1000,600,40,0); auto are those found for the run, where it has some for so many
            steps, else log-noise.
        batch_size: images made at the same time.
        device: auto, cpu, cuda, cuda:N, mps or xpu.
        precision: mixed precision, as in training; the images differ by what is hardly seen.

    Raises:
        UserError: a flag or checkpoint that does not fit.
    """
    flags = dict(locals())
    command_line.check_limits(flags, LIMITS)
    command_line.check_name("name", name)
    flags["run_name"] = runs.choose(run_name)
    device = processes.join(devices.pick_device(device))
    checkpoint = processes.from_first(load_run(flags["run_name"]) if processes.is_first() else None)
    request = plan_images(flags, checkpoint, device)
    made = make_images(request, *build_trained(checkpoint, device))
    with progress_bar(request.moves, unit="step") as bar:
        for _ in made:
            bar.update()
    print(request.album.close() + runs.advice(flags["run_name"], checkpoint))


def main() -> None:
    command_line.run_command_line("ddpm.py", {"train": train, "sample": sample}, LIMITS)


if __name__ == "__main__":
    main()
