"""Denoising diffusion: learn from a folder of images, then make new ones.

    python ddpm.py train  --dataset=datasets/landscapes --run_name=my_run
    python ddpm.py sample --run_name=my_run --n_img=16
    python ddpm.py --help

Reading order: noise schedules, Diffusion (all of the mathematics), train, sample. The network is in modules.py; files
and pictures are in utils.py, what a training tells in journal.py, the command line's manners in command_line.py.
"""

import copy
import inspect
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoints
import command_line
import reading
import utils
from journal import COLUMNS, SUMS, Course, Log, check_tensorboard, gflop_per_image, hint, runs_table
from modules import UNet, update_average
from utils import UserError


def linear_alpha_bar(steps: int) -> Tensor:
    """Ho et al. 2020, section 4: beta rises linearly from 1e-4 to 0.02; scaled to keep its sum at other step counts."""
    beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    return torch.cumprod(1 - beta.clamp(max=0.999), dim=0)


def cosine_alpha_bar(steps: int, offset: float = 0.008) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17, with beta capped at 0.999 as they advise."""
    time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    signal = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    beta = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, dim=0)


def sigmoid_alpha_bar(steps: int, start: float = -3.0, end: float = 3.0) -> Tensor:
    """The sigmoid schedule of Jabri et al. 2022 (temperature 1), ending just above 0, where log-SNR is finite."""
    time = torch.linspace(start, end, steps + 1, dtype=torch.float64).sigmoid()
    signal = (time[-1] - time) / (time[-1] - time[0])
    return signal[1:].clamp(min=1e-8)


NOISE_SCHEDULES = {"linear": linear_alpha_bar, "cosine": cosine_alpha_bar, "sigmoid": sigmoid_alpha_bar}
OBJECTIVES = {"eps": "the noise", "v": "a mix of both", "x0": "the clean image"}
SAMPLERS = {"ddpm": 1.0, "ddim": 0.0, "dpm++": 0.0}  # the share of fresh noise, eta in Song et al. 2021, eq. 16


class Diffusion:
    """The fixed noising process and the walk back; all of the mathematics, no learned weights.

    t counts noising steps, as in the paper: t = 0 is a clean image, t = T is (almost) pure noise. Two numbers per step,
    taken from the paper's alpha_bar, say everything else:

        signal[t] = sqrt(alpha_bar_t)        how much of the image is left
        noise[t]  = sqrt(1 - alpha_bar_t)    how much noise has been mixed in

    so that x_t = signal[t] * x_0 + noise[t] * eps          (Ho et al. 2020, eq. 4)

    Args:
        noise_steps: T.
        schedule: one of NOISE_SCHEDULES.
        objective: what the network is asked for, one of OBJECTIVES.
        min_snr: ceiling of the loss weight (gamma in Hang et al. 2023); 0 weighs all steps alike, as in the paper.
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
        self.steps, self.objective, self.min_snr = noise_steps, objective, min_snr
        self.alpha_bar = torch.cat([torch.ones(1), NOISE_SCHEDULES[schedule](noise_steps)])  # (T + 1,) float64
        self.signal = self.alpha_bar.sqrt().float().to(device)
        self.noise = (1 - self.alpha_bar).sqrt().float().to(device)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """signal[t] and noise[t] of t (B,), each (B, 1, 1, 1): factors for a batch of images (B, C, H, W)."""
        return self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t: jump from clean images straight to step t (Ho et al. 2020, eq. 4)."""
        signal, noise = self.at(t)
        return signal * x_0 + noise * eps

    def target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network is asked for: the noise, the clean image, or v (Salimans & Ho 2022, section 4)."""
        signal, noise = self.at(t)
        return {"eps": eps, "x0": x_0, "v": signal * eps - noise * x_0}[self.objective]

    def clean(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x_0: the clean images that a network's output implies; the inverse of `target`."""
        signal, noise = self.at(t)
        if self.objective == "eps":
            return (x_t - noise * output) / signal
        return output if self.objective == "x0" else signal * x_t - noise * output

    def weight(self, t: Tensor) -> Tensor:
        """Weight of each image's loss (B,): 1, or min-SNR (Hang et al. 2023).

        min(SNR, gamma) is their weight of an error in x_0. An error in eps is one of SNR times its square in x_0's
        terms, one in v of SNR + 1 times; dividing by that makes it a weight for our target.
        """
        if self.min_snr == 0:
            return torch.ones_like(self.signal[t])
        snr = (self.signal[t] / self.noise[t]) ** 2
        return snr.clamp(max=self.min_snr) / {"eps": snr, "x0": 1.0, "v": snr + 1}[self.objective]

    def draw(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """The two random numbers of Algorithm 1: a step t (B,), each of 1..T as likely, and noise eps like x_0."""
        t = torch.randint(1, self.steps + 1, (len(x_0),), device=x_0.device)
        return t, torch.randn_like(x_0)

    def loss(self, network: nn.Module, x_0: Tensor, t: Tensor, eps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Each image's weighted mean squared error (B,): Ho et al. 2020, Algorithm 1, line 5, before the gradient.

        Args:
            network: maps (x_t, t, labels) to an image-shaped answer.
            x_0: clean images (B, C, H, W) in [-1, 1].
            t, eps: noising steps (B,) in 1..T, and the noise (B, C, H, W); see `draw`.
            labels: classes (B,), or None.
        """
        output = network(self.add_noise(x_0, t, eps), t, labels).float()
        error = (output - self.target(x_0, t, eps)).square().mean(dim=(1, 2, 3))
        return self.weight(t) * error

    def path(self, steps: int) -> list[int]:
        """The noising steps to visit, T first and 0 last, evenly spaced ("trailing": Lin et al. 2024, table 2)."""
        return [round(self.steps * (1 - i / steps)) for i in range(steps + 1)]

    @torch.no_grad()
    def denoise(
        self,
        predict_clean: Callable[[Tensor, int], Tensor],
        x_t: Tensor,
        path: Sequence[int],
        sampler: str = "ddpm",
        draw_noise: Callable[[], Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Walk from noise to image, yielding (x_t, guess of x_0) after every step; after the last, both are the image.

        DDPM (Ho et al. 2020, Algorithm 2), DDIM and DPM-Solver++(2M) are one rule (Song et al. 2021, eq. 12):

            x_next = signal_next * x_0 + sqrt(noise_next^2 - variance) * eps + spread * z

        They differ in two places only. DDPM adds fresh noise z, the others none (variance = spread = 0). DPM-Solver++
        (2M) sharpens x_0 with the guess of the step before (Lu et al. 2022, Algorithm 2); the others take it as it is.

        The variance is that of q(x_next | x_t, x_0). DDPM over all T steps spreads by beta_t instead, the choice behind
        the paper's FID of 3.17; when steps are skipped that is far too much (Song et al. 2021, table 1).

        Args:
            predict_clean: maps (x_t, t) to x_0, both (B, C, H, W); t is a plain int.
            x_t: the starting noise (B, C, H, W).
            path: the steps to visit, falling, to 0.
            sampler: one of SAMPLERS.
            draw_noise: gives fresh noise (B, C, H, W); PyTorch's generator if left out.
        """
        draw_noise = draw_noise or (lambda: torch.randn_like(x_t))
        eta, is_whole = SAMPLERS[sampler], len(path) == self.steps + 1
        alpha_bars = self.alpha_bar.tolist()  # float64, and no tensor for a scalar
        last_x_0, last_gap = None, None
        for t, t_next in itertools.pairwise(path):
            alpha_bar, alpha_bar_next = alpha_bars[t], alpha_bars[t_next]
            signal, signal_next = math.sqrt(alpha_bar), math.sqrt(alpha_bar_next)
            noise, noise_next = math.sqrt(1 - alpha_bar), math.sqrt(1 - alpha_bar_next)
            beta = 1 - alpha_bar / alpha_bar_next
            variance = eta * beta * (noise_next / noise) ** 2
            spread = math.sqrt(eta * beta) if is_whole else math.sqrt(variance)

            x_0 = guess = predict_clean(x_t, t)
            if sampler == "dpm++" and t_next > 0:  # the last step is one of DDIM: log-SNR has no end at t = 0
                gap = math.log(signal_next / noise_next) - math.log(signal / noise)
                if last_gap is not None:
                    x_0 = guess + (guess - last_x_0) * (gap / (2 * last_gap))
                last_x_0, last_gap = guess, gap
            eps = (x_t - signal * x_0) / noise
            x_t = signal_next * x_0 + math.sqrt(max(0.0, noise_next**2 - variance)) * eps
            if eta and t_next > 0:
                x_t = x_t + spread * draw_noise()
            yield x_t, guess


LR_DECAYS = {"cosine": lambda done: (1 + math.cos(math.pi * done)) / 2, "none": lambda done: 1.0}  # done in [0, 1]
# What a flag may be: its choices, or its smallest and largest value. Checks and help read it here.
LIMITS = {"schedule": NOISE_SCHEDULES, "objective": OBJECTIVES, "sampler": SAMPLERS, "lr_decay": LR_DECAYS}
LIMITS |= dict.fromkeys(("epochs", "batch_size", "n_img", "steps"), (1, 10**9))
LIMITS |= dict.fromkeys(
    ("seed", "warmup", "attention_size", "min_snr", "sample_every", "save_every", "max_minutes"), (0, math.inf)
)
LIMITS |= {"width": (4, 4096), "blocks": (1, 16), "dropout": (0, 0.99), "noise_steps": (2, 100_000)}
LIMITS |= {"lr": (1e-9, 1), "ema_decay": (0, 0.999999)}
MAY_CHANGE = ("dataset", "epochs", "max_minutes", "resume", "device", "sample_every", "save_every")  # as a run goes on
MAY_CHANGE += ("tensorboard", "dry_run")
NETWORK = ("img_size", "width", "multipliers", "blocks", "attention_size", "dropout")
IMPORTED = {"attention_levels": tuple, "head_width": int, "norm_groups": int, "downsample_padding": int}
IMPORTED |= {"norm_eps": float, "frequency_shift": float}  # what the settings of a network from elsewhere may add
LIMITS |= {"head_width": (0, 10**9), "norm_groups": (0, 10**9), "norm_eps": (0, 1), "frequency_shift": (0, 1)}
LIMITS |= {"downsample_padding": (0, 1)}
NOISING = ("noise_steps", "schedule", "objective", "min_snr")
GRID_IMAGES = 256  # nobody looks at a larger grid
FILM_IMAGES, FILM_FRAMES = 16, 50


def train(
    # what and where
    dataset: str = "datasets/landscapes",
    run_name: str = "untitled",
    init_from: str = "",
    flip: bool = True,
    # length
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
    # noise
    noise_steps: int = 1000,
    schedule: str = "linear",
    objective: str = "eps",
    min_snr: float = 0.0,
    # optimization
    batch_size: int = 64,
    lr: float = 2e-4,
    warmup: int = 500,
    lr_decay: str = "cosine",
    ema_decay: float = 0.9999,
    # running
    device: str = "auto",
    sample_every: int = 10,
    save_every: float = 10.0,
    tensorboard: bool = False,
    dry_run: bool = False,
) -> None:
    """Learn to make images like those in a folder.

        python ddpm.py train --dataset=datasets/landscapes --run_name=my_run

    The same command continues where a run was stopped (Ctrl-C saves first). Everything needed to go on or to sample is
    in models/RUN/checkpoint.pt; previews, the log and the loss curve are in results/RUN/.

    Args:
        dataset: a folder of images, flat or nested (jpg, png, webp, bmp, gif, tif).
        run_name: names models/RUN and results/RUN.
        init_from: another run, from whose averaged weights this one begins: fine-tuning.
        flip: also learn from mirror images; turn it off where left and right matter, as in writing.
        epochs: how many times every image is shown, in all.
        max_minutes: a budget of time for the whole run, the reading of the images and the last preview included; the
            learning rate reaches 0 at its end; 0 for none.
        resume: continue the run if it exists; --resume=no refuses to touch it.
        seed: fixes the network's start, the order of the images and the noise.
        img_size: size of the images, one number or height x width (48x96); a multiple of 2 to the power of levels - 1.
        width: channels of the network's first level; a multiple of 4 up to 128, of 32 above.
        multipliers: channels of each level, as multiples of the width; every level halves the resolution.
        blocks: residual blocks in every level.
        attention_size: levels whose shorter side has at most so many pixels get attention; the middle always has it.
        dropout: share of activations dropped in training; try 0.1 if a small data set is learnt by heart.
        noise_steps: steps from an image to pure noise, T in the paper.
        schedule: how the noise grows over the steps.
        objective: what the network predicts: the noise, v, or the clean image.
        min_snr: ceiling of the loss weight (5 in the min-SNR paper); 0 weighs all steps alike, as DDPM does.
        batch_size: images per training step.
        lr: learning rate after the warm-up.
        warmup: steps over which the learning rate rises from 0.
        lr_decay: how the learning rate falls over the whole run.
        ema_decay: how slowly the averaged weights follow; they are the ones that make the images.
        device: auto, cpu, cuda, cuda:N or mps.
        sample_every: epochs between two previews; 0 for none but the last.
        save_every: minutes between two saves within an epoch; the end of an epoch saves too, once a minute at most.
        tensorboard: also write curves and previews for TensorBoard, to runs/RUN.
        dry_run: learn nothing; only show the data (data.png), time a step, and say what would be done.

    Raises:
        UserError: a flag, folder or checkpoint that does not fit.
    """
    settings, began = dict(locals()), time.monotonic()
    command_line.check_limits(settings, LIMITS)
    command_line.check_name("run_name", run_name)
    if not dataset:
        raise UserError("--dataset= is empty; it takes any folder of images")
    size = settings["img_size"] = command_line.check_network(settings)
    device = utils.pick_device(device)
    if init_from:
        command_line.check_name("init_from", init_from)
    if tensorboard:
        check_tensorboard()
    listing = reading.list_images(Path(dataset))
    is_new = not checkpoints.exists(run_name)
    if not resume and not is_new:
        raise UserError(f"--resume=no, but models/{run_name} holds a run; delete it, or choose another --run_name")
    source = load_run(init_from) if init_from and is_new else {}
    if source:
        command_line.check_same_network(init_from, source["settings"], settings)
    path, results = checkpoints.paths_of(run_name)[0], Path("results", run_name)
    lock = command_line.lock_run(path.parent)  # held until this function ends
    if is_new and checkpoints.exists(run_name):
        raise UserError(f"another process has trained models/{run_name} just now; the same command goes on with it")
    stored = {"step": 0, "minutes": 0.0, "log": [], "sums": None}
    if not is_new:
        stored = load_run(run_name)
        if "network" not in stored:
            ways_on = f"--init_from={run_name} with another --run_name begins a new run from them"
            raise UserError(f"models/{run_name} holds weights only, made to sample from; {ways_on}")
        command_line.check_same_run(stored, settings, listing.fingerprint, MAY_CHANGE)
    data = reading.read_dataset(listing, size)

    was = (source or stored).get("settings", {})
    settings = {name: was[name] for name in IMPORTED if name in was} | settings  # of these no flag tells
    utils.keep_memory()
    torch.manual_seed(utils.seed_of(seed))
    network, diffusion = build(settings, device)
    network.to(memory_format=torch.channels_last)
    if source:
        network.load_state_dict(source["average"])
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0, fused=True)
    if not is_new:
        checkpoints.restore(stored, network, average, optimizer)
    step, images = stored["step"], reading.on_device(data.images, device)
    count, batch_size = len(images), min(batch_size, len(images))
    course = Course(count, batch_size, epochs, max_minutes, save_every, sample_every, step, stored["minutes"], began)
    board = Path("runs", run_name) if tensorboard else None
    log = Log(results, course, noise_steps, device, stored["log"], stored["sums"], board)
    del stored, source  # as large as the training itself

    def load(indices: Tensor) -> Tensor:
        """The images of a batch, (B, C, H, W) in [-1, 1], each mirrored or not, as the generator has it."""
        x_0 = utils.from_bytes(images[indices.to(images.device)].to(device))
        return reading.mirror_half(x_0) if flip else x_0

    def learn(step: int, done: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """Algorithm 1, lines 2 to 5: each image's loss and t (B,), the gradient's norm, the learning rate.

        All that is random in a step hangs on (seed, step) alone: a run that was stopped and goes on is, to the bit, the
        run that was not, and no generator's state has to be kept.
        """
        torch.manual_seed(utils.seed_of(seed, step))
        x_0 = load(reading.batch_indices(count, batch_size, step, seed))  # (B, C, H, W)
        t, eps = diffusion.draw(x_0)
        with utils.autocast(device):
            losses = diffusion.loss(network, x_0, t, eps)  # (B,)
        losses.mean().backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), max_norm=1.0)
        rate = lr * min(1.0, (step + 1) / max(1, warmup)) * LR_DECAYS[lr_decay](done)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, network, step + 1, ema_decay)
        return losses.detach(), t, norm, rate

    def save() -> None:
        course.saved_at = time.monotonic()  # also of a save that fails: not every step may try again
        learnt = {"network": network.state_dict(), "average": average.state_dict()}
        progress = {"optimizer": optimizer.state_dict(), "step": step, **log.state()}
        checkpoints.save(run_name, settings=settings, data=data.fingerprint, **learnt, **progress)

    def preview_path() -> Path:
        return results / "training_progress" / f"epoch_{course.epoch(step):04d}.png"

    def preview() -> None:
        *_, (previews, _) = walk(average, diffusion, range(16), size, "dpm++", min(25, noise_steps))
        previews = utils.to_bytes(previews).cpu()
        utils.save_png(previews, preview_path(), run=run_name, step=step)
        log.illustrate(previews)

    torch.manual_seed(utils.seed_of(seed, 0))
    first_images = torch.from_numpy(reading.shuffled(count, seed, epoch=0)[:64])
    utils.save_png(utils.to_bytes(load(first_images)).cpu(), results / "data.png")
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    gflop, precision = gflop_per_image(network, size), "bfloat16" if utils.has_bfloat16(device) else "float32"
    look = f"a look at them: {results / 'data.png'}"
    print(f"data     {count:,} images of {size[0]}x{size[1]} from {dataset}", *data.remarks, look, sep="\n         ")
    print(f"network  {millions:.1f} million weights, {gflop:.1f} GFLOP an image, on {device} in {precision}")
    print(f"length   {course.summary(step)}")
    print(f"files    {path}, {results}{os.sep}", flush=True)
    stopping, done = 0, course.done(step)
    if dry_run:
        for number in (0, 1):  # the first step takes longer than those that follow
            step_began = time.monotonic()
            learn(step + number, done)[0].tolist()  # waits for a GPU
        lock.release()
        return print(course.forecast(step, batch_size / (time.monotonic() - step_began)))
    log.write()
    if done >= 1:
        if step > 0 and not preview_path().exists():  # a death may have come before it
            preview()
        lock.release()
        return print(course.farewell(step))
    with command_line.StopSignals() as stop, log:
        while done < 1 and not stopping:
            seen = learn(step, done)
            step += 1
            log.add(step, *seen)
            stopping, done = stop.status, course.done(step)
            is_last, is_saved = stopping or done >= 1, False
            try:
                if is_last or course.is_save_due(step):
                    save()
                    is_saved = True
                if done >= 1 or course.is_preview_due(step):
                    preview()
                log.write()
            except OSError as error:  # a full disk must not end a training, nor hide that its end was saved
                if is_last and not is_saved:
                    raise
                goes_on = "" if is_last else "; training goes on"
                log.bar.write(f"not written: {error.filename or path}: {error.strerror or error}{goes_on}")
    lock.release()
    if stopping and done < 1:
        print(f"stopped and saved at step {step:,} of {course.last_step:,}; the same command goes on from there")
        raise SystemExit(stopping)
    print(log.report(run_name))


def build(settings: dict, device: torch.device) -> tuple[UNet, Diffusion]:
    """The network, untrained, and the noising process that a run's settings describe."""
    network = UNet(**{name: settings[name] for name in (*NETWORK, *IMPORTED) if name in settings}).to(device)
    return network, Diffusion(**{name: settings[name] for name in NOISING}, device=device)


def build_trained(stored: dict, device: torch.device) -> tuple[UNet, Diffusion]:
    """What makes a run's images: the network with its averaged weights, and the noising process."""
    network, diffusion = build(stored["settings"], device)
    network.load_state_dict(stored["average"])
    return network.eval().to(memory_format=torch.channels_last), diffusion


def load_run(run_name: str) -> dict:
    """A run's checkpoint, whose weights are those of the network its settings describe: checked in no memory.

    Raises:
        UserError: there is no such run, it cannot be read, or it is another program's.
    """
    stored = checkpoints.load(run_name)
    try:
        defaults = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
        settings = stored["settings"] = defaults | stored["settings"]  # an option newer than the run
        command_line.check_limits(settings, LIMITS)
        command_line.check_network(settings)
        with torch.device("meta"):
            network = build(settings, "meta")[0]
        fits = checkpoints.fits(stored, network, len(COLUMNS), SUMS)
        fits = fits and all(isinstance(settings.get(name, kind()), kind) for name, kind in IMPORTED.items())
    except (*utils.BROKEN_FILE, UserError):
        fits = False
    if not fits:
        raise UserError(f"models/{run_name} holds weights that do not fit its settings: another program's, or damaged")
    return stored


def walk(
    network: UNet, diffusion: Diffusion, seeds: Sequence[int], size: tuple[int, int], sampler: str, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`Diffusion.denoise` with a network, from the noise of one seed per image: (x_t, guess of x_0) after every step.

    All noise of an image is drawn on the CPU from its own seed, so it does not depend on the batch or the device.
    """
    device = diffusion.signal.device
    generators = [np.random.default_rng(seed) for seed in seeds]

    def draw_noise() -> Tensor:
        noise = [generator.standard_normal((3, *size), dtype=np.float32) for generator in generators]
        return torch.from_numpy(np.stack(noise)).to(device)  # (B, 3, H, W)

    def predict_clean(x_t: Tensor, t: int) -> Tensor:
        steps = torch.full((len(x_t),), t, device=device)
        with utils.autocast(device):
            output = network(x_t, steps)
        return diffusion.clean(x_t, steps, output.float()).clamp(-1, 1)

    return diffusion.denoise(predict_clean, draw_noise(), diffusion.path(steps), sampler, draw_noise)


def sample(
    # what and where
    run_name: str = "",
    n_img: int = 16,
    name: str = "samples",
    save_grid: bool = True,
    gif: bool = False,
    seed: int = 0,
    img_size: tuple = (),
    # how
    sampler: str = "dpm++",
    steps: int = 25,
    batch_size: int | str = "auto",
    device: str = "auto",
) -> None:
    """Make new images with a trained network.

        python ddpm.py sample --run_name=my_run --n_img=16

    Writes results/RUN/NAME/sample_0001.png and so on, and all of them in one grid. Nothing is overwritten: a second
    call writes to NAME_2.

    Args:
        run_name: the run to sample from, a folder in models/; left out, those there are get listed.
        n_img: how many images.
        name: the folder to write to, below results/RUN/.
        save_grid: also save samples.png, the first 256 images side by side.
        gif: also film how the first batch, or 16 of it, comes out of the noise: left the images, right what the network
            takes them for.
        seed: image number i is made from seed + i alone, whatever the other options.
        img_size: another size than the run was trained at, such as 48x96; it may not look as good.
        sampler: ddpm is the paper's, for many steps; ddim and dpm++ need far fewer and add no noise on the way.
        steps: how many of the noising steps are visited; 1000 with ddpm is the paper's Algorithm 2.
        batch_size: images made at the same time.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UserError: a flag or checkpoint that does not fit.
    """
    command_line.check_limits(locals(), LIMITS)
    command_line.check_name("name", name)
    if not run_name and not checkpoints.run_names():
        raise UserError("--run_name is missing, and there is no run yet; train one first")
    if not run_name:
        print(runs_table())
        raise UserError("--run_name is missing; it takes one of the runs above")
    command_line.check_name("run_name", run_name)
    device = utils.pick_device(device)
    stored = load_run(run_name)
    settings = stored["settings"]
    if steps > settings["noise_steps"]:
        raise UserError(f"--steps={steps} is more than the {settings['noise_steps']} noising steps of this run")
    size = command_line.check_size(img_size or settings["img_size"], stride=2 ** (len(settings["multipliers"]) - 1))
    if size != settings["img_size"]:
        print(f"{run_name} was trained at {settings['img_size'][0]}x{settings['img_size'][1]}; this may look worse")
    network, diffusion = build_trained(stored, device)
    if batch_size == "auto":
        at_64_pixels = 16 if device.type == "cpu" else 256
        batch_size = max(1, min(at_64_pixels, at_64_pixels * 64 * 64 // (size[0] * size[1])))

    def command(first: int, number: int) -> str:
        """What makes `number` images from the seed `first` on again, the same to the bit: in batches as here."""
        what = f"--run_name={run_name} --n_img={number} --seed={first} --img_size={size[0]}x{size[1]}"
        how = f"--sampler={sampler} --steps={steps} --batch_size={min(number, batch_size)}"
        return f"python ddpm.py sample {what} {how}"

    facts = {"run": run_name, "step": stored["step"], "weights": checkpoints.fingerprint_of(stored["average"])}
    facts |= {"sampler": sampler, "steps": steps, "device": device.type}
    folder = utils.claim_folder(Path("results", run_name, name))
    digits, grid, film = max(4, len(str(n_img))), [], []
    with utils.progress_bar(steps * math.ceil(n_img / batch_size), unit="step") as bar:
        for start in range(0, n_img, batch_size):
            seeds = range(seed + start, seed + min(n_img, start + batch_size))
            for count, (x_t, guess) in enumerate(walk(network, diffusion, seeds, size, sampler, steps), 1):
                bar.update()
                if gif and start == 0 and count * FILM_FRAMES // steps > (count - 1) * FILM_FRAMES // steps:
                    sides = [utils.tile(utils.to_bytes(side[:FILM_IMAGES]).cpu()) for side in (x_t, guess)]
                    film.append(torch.cat(sides, dim=2))  # (3, H, 2 W): what there is, and what it is taken for
            images = utils.to_bytes(x_t).cpu()  # (B, 3, H, W)
            for number, (image, image_seed) in enumerate(zip(images, seeds, strict=True), 1):
                again = f"{command(seeds[0], len(seeds))}  # this is sample_{number:04d}.png there"
                path = folder / f"sample_{start + number:0{digits}d}.png"
                utils.save_png(image[None], path, **facts, seed=image_seed, command=again)
            grid += images[: max(0, GRID_IMAGES - start)]
    learnt_from = stored["log"][-1][COLUMNS.index("images")] if stored["log"] else math.inf  # imported runs have no log
    print(f"{n_img:,} images: {folder / 'sample_*.png'}{hint(learnt_from)}")
    if save_grid:
        utils.save_png(torch.stack(grid), folder / "samples.png", **facts, seed=seed, command=command(seed, n_img))
        print(f"{len(grid)} of them in one: {folder / 'samples.png'}")
    if gif:
        utils.save_gif(film, folder / "samples.gif", comment=f"{command(seed, n_img)} --gif")
        print(f"how they came to be: {folder / 'samples.gif'}")


def main() -> None:
    command_line.run_command_line("ddpm.py", {"train": train, "sample": sample}, LIMITS)


if __name__ == "__main__":
    main()
