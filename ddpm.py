"""Denoising diffusion: learn from a folder of images, then make new ones.

    python ddpm.py train  --dataset=datasets/landscapes --run_name=my_run
    python ddpm.py sample --run_name=my_run --n_img=16
    python ddpm.py --help

Reading order: noise schedules, Diffusion (all of the mathematics), train, sample. The network is in modules.py; folders
of images are read by reading.py, checkpoints by checkpoints.py, and what a training tells is in journal.py.
"""

import contextlib
import copy
import inspect
import itertools
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

import utils
from machinery import basics, checkpoints, command_line, devices, processes, reading, runs
from machinery.basics import UserError
from machinery.journal import COLUMNS, SUMS, Log, check_tensorboard, hint, in_figures
from machinery.runs import runs_table
from machinery.session import Course
from modules import UNet, update_average


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

    def draw(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What Algorithm 1 draws for images of `shape` (B, C, H, W): steps t (B,), each of 1..T as likely; noise."""
        t = torch.randint(1, self.steps + 1, (shape[0],), device=self.signal.device)
        return t, torch.randn(*shape, device=self.signal.device)

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

    def path(self, steps: int, strength: float = 1.0) -> list[int]:
        """The noising steps to visit, from T to 0, evenly spaced ("trailing": Lin et al. 2024, table 2).

        With less strength, from that share of T on, where this path is joined (SDEdit: Meng et al. 2022).
        """
        start = round(self.steps * strength)
        return [start] + [t for t in (round(self.steps * (1 - i / steps)) for i in range(steps + 1)) if t < start]

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

        The variance is that of q(x_next | x_t, x_0). DDPM without a gap spreads by beta_t instead, the choice behind
        the paper's FID of 3.17; when steps are skipped that is far too much (Song et al. 2021, table 1).

        Args:
            predict_clean: maps (x_t, t) to x_0, both (B, C, H, W); t is a plain int.
            x_t: the starting noise (B, C, H, W).
            path: the steps to visit, falling, from that of x_t to 0.
            sampler: one of SAMPLERS.
            draw_noise: gives fresh noise (B, C, H, W); PyTorch's generator if left out.
        """
        draw_noise = draw_noise or (lambda: torch.randn_like(x_t))
        eta, is_whole = SAMPLERS[sampler], len(path) == path[0] + 1
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
LIMITS |= dict.fromkeys(("seed", "warmup", "attention_size", "min_snr"), (0, math.inf))
LIMITS |= dict.fromkeys(("sample_every", "save_every", "max_minutes"), (0, math.inf))
LIMITS |= {"width": (4, 4096), "blocks": (1, 16), "dropout": (0, 0.99), "noise_steps": (2, 100_000)}
LIMITS |= {"lr": (1e-9, 1), "ema_decay": (0, 0.999999), "mode": reading.MODES, "micro_batch": (1, 10**9)}
LIMITS |= {"guidance": (0, 1000), "strength": (0, 1), "head_width": (0, 10**9), "norm_groups": (0, 10**9)}
LIMITS |= {"norm_eps": (0, 1), "frequency_shift": (0, 1), "downsample_padding": (0, 1)}
MAY_CHANGE = ("dataset", "epochs", "max_minutes", "resume", "device", "sample_every", "save_every")  # as a run goes on
MAY_CHANGE += ("tensorboard", "dry_run", "micro_batch", "compile", "grad_checkpointing")
NETWORK = ("img_size", "width", "multipliers", "blocks", "attention_size", "dropout")
IMPORTED = {"attention_levels": tuple, "head_width": int, "norm_groups": int, "downsample_padding": int}
IMPORTED |= {"norm_eps": float, "frequency_shift": float}  # what the settings of a network from elsewhere may add
NOISING = ("noise_steps", "schedule", "objective", "min_snr")
PREVIEWS = 16  # images; more where there are more classes, 64 at most
FORGOTTEN = 0.1  # share of the labels that a network is not told, so that it learns to do without: for guidance
STEPS, GUIDANCE, STRENGTH = 15, 2.0, 0.6  # why so few steps: benchmarks/README.md, "Samplers and steps"
GRID_IMAGES, FILM_IMAGES, FILM_FRAMES = 256, 16, 50  # nobody looks at a larger grid


def train(
    # what and where
    dataset: str = "datasets/landscapes",
    run_name: str = "untitled",
    init_from: str = "",
    conditional: bool = False,
    mode: str = "auto",
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
    # noise; why these: benchmarks/README.md, "Schedule, objective, loss weight"; linear, eps and 0 are the paper's
    noise_steps: int = 1000,
    schedule: str = "cosine",
    objective: str = "v",
    min_snr: float = 5.0,
    # optimization; why these: benchmarks/README.md, "Learning rate and batch", "Average, dropout, shape"
    batch_size: int = 32,
    micro_batch: int | str = "auto",
    lr: float = 5e-4,
    warmup: int = 500,
    lr_decay: str = "cosine",
    ema_decay: float = 0.9999,
    # running
    device: str = "auto",
    compile: bool = False,
    grad_checkpointing: bool = False,
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
        conditional: learn what the folders directly in the data set hold, class by class, to make either on demand.
        mode: colours of the images; auto is gray if every picture is, else RGB.
        flip: also learn from mirror images; turn it off where left and right matter, as in writing.
        epochs: how many times every image is shown, in all.
        max_minutes: a budget of time for the whole run, the reading of the images, compiling and the last preview
            included; the learning rate reaches 0 at its end; 0 for none.
        resume: continue the run if it exists; --resume=no refuses to touch it.
        seed: fixes the network's start, the order of the images and the noise.
        img_size: size of the images, one number or height x width (48x96); a multiple of 2 to the power of levels - 1.
        width: channels of the network's first level; a multiple of 4 up to 128, of 32 above.
        multipliers: channels of each level, as multiples of the width; every level halves the resolution.
        blocks: residual blocks in every level.
        attention_size: levels whose shorter side has at most so many pixels get attention; the middle always has it.
        dropout: share of activations dropped in training; try 0.1 if a small data set is learnt by heart.
        noise_steps: steps from an image to pure noise, T in the paper.
        schedule: how the noise grows over the steps; linear is DDPM's.
        objective: what the network predicts: the noise as in DDPM, v, or the clean image.
        min_snr: ceiling of the loss weight (5 in the min-SNR paper); 0 weighs all steps alike, as DDPM does.
        batch_size: images per training step, on all GPUs together.
        micro_batch: images that go through the network at the same time; auto: as many as fit into memory. What is
            learnt is the same (with dropout: as good).
        lr: learning rate after the warm-up.
        warmup: steps over which the learning rate rises from 0; at most a tenth of the training.
        lr_decay: how the learning rate falls over the whole run.
        ema_decay: how slowly the averaged weights follow; they are the ones that make the images.
        device: auto, cpu, cuda, cuda:N or mps.
        compile: compile the network with torch.compile first, which takes minutes; meant for long trainings on a GPU.
        grad_checkpointing: compute things twice rather than keep them: a fourth of the memory, a quarter more time.
        sample_every: epochs between two previews; 0 for none but the last.
        save_every: minutes between saves; the end of an epoch saves too, where that takes less than 1% of the time.
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
    size = settings["img_size"] = runs.check_network(settings)
    device = devices.pick_device(device)
    if init_from:
        command_line.check_name("init_from", init_from)
    if tensorboard:
        check_tensorboard()
    listing = reading.list_images(Path(dataset))
    if conditional:
        reading.check_classes(listing)
    settings["classes"] = classes = listing.classes if conditional else ()
    path, results = checkpoints.paths_of(run_name)[0], Path("results", run_name)
    device, is_first = processes.join(device), processes.is_first()
    lock, stored, source = open_run(settings, listing.fingerprint) if is_first else (None, None, None)
    stored, source = processes.from_first((stored, source))
    was = (source or stored).get("settings", {})
    with processes.first_alone():
        data = reading.read_dataset(listing, size, mode)
        if was and mode == "auto" and data.mode != was["mode"]:  # the run, or the one it begins from, knows better
            data = reading.read_dataset(listing, size, was["mode"])
    if len(set(processes.gather((data.fingerprint, len(data.images))))) > 1:
        raise UserError(f"--dataset={dataset} is not the same for all processes")

    settings = {name: was[name] for name in IMPORTED if name in was} | settings  # of these no flag tells
    settings["mode"] = data.mode
    devices.keep_memory()
    torch.manual_seed(basics.seed_of(seed))
    network, diffusion = build(settings, device)
    network.to(memory_format=torch.channels_last)
    network.recompute = grad_checkpointing
    if source:
        network.load_state_dict(source["average"])
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0, fused=True)
    if stored["step"]:
        checkpoints.restore(stored, network, average, optimizer)
    step, images = stored["step"], utils.on_device(data.images, device)
    labels = torch.from_numpy(data.labels).to(device)
    count, batch_size = len(images), min(batch_size, len(images))
    if batch_size < processes.count():
        raise UserError(f"{batch_size} images a step, of {count:,}, are too few for {processes.count()} processes")
    shown = range(min(64, len(classes) * math.ceil(PREVIEWS / len(classes))) if classes else PREVIEWS)  # class by class
    lengths = (count, batch_size, epochs, max_minutes, save_every, sample_every, step, stored["minutes"], began)
    course = Course(*lengths, previews=len(shown) * (2 if classes else 1))  # guidance asks the network twice
    board = Path("runs", run_name) if tensorboard else None
    log = Log(results, course, noise_steps, device, stored["log"], stored["sums"], board)
    parts = devices.MicroBatches(processes.share(batch_size), micro_batch)
    del stored, source  # as large as the training itself

    def load(indices: Tensor, mirrored: Tensor) -> Tensor:
        """The images of a batch, (B, C, H, W) in [-1, 1], those that are `mirrored` (B,) left to right."""
        x_0 = utils.from_bytes(devices.send(images[indices], device))
        return utils.mirror_half(x_0, mirrored) if flip else x_0

    def add_gradients(step: int) -> tuple[Tensor, Tensor]:
        """Algorithm 1, lines 2 to 5: each image's loss and t (B,), and their mean's gradient at the weights.

        All that is random in a step is drawn for the whole batch and depends on (seed, step) alone. So a run that was
        stopped and goes on is, to the bit, the run that was not, and no generator's state has to be kept; and however
        the batch is cut up among processes and by memory, but for the order of additions (and with dropout, what is
        dropped) it is the same step.
        """
        torch.manual_seed(basics.seed_of(seed, step))
        indices = devices.send(utils.batch_indices(count, batch_size, step, seed), images.device)  # (B,)
        mirrored = utils.draw_mirrored(batch_size, device)
        t, eps = diffusion.draw((batch_size, *images.shape[1:]))
        told, losses = None, torch.zeros(batch_size, device=device)
        if classes:
            is_told = torch.rand(batch_size, device=device) >= FORGOTTEN
            told = labels[indices].where(is_told, network.null_class)

        def work(part: slice) -> None:
            if dropout:
                torch.manual_seed(basics.seed_of(seed, step, 1 + part.start))  # else all processes would drop the same
            x_0 = load(indices[part], mirrored[part])  # (b, C, H, W)
            with devices.autocast(device):
                of_part = diffusion.loss(network, x_0, t[part], eps[part], told[part] if classes else None)  # (b,)
            (of_part.sum() / batch_size).backward()
            losses[part] = of_part.detach()

        parts.go_through(work, undo=optimizer.zero_grad)
        processes.add_up([losses, *(parameter.grad for parameter in network.parameters())])
        return losses, t

    def learn(step: int, done: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """A step against the gradient: each image's loss and t (B,), the gradient's norm, the learning rate."""
        losses, t = add_gradients(step)
        norm = nn.utils.clip_grad_norm_(network.parameters(), max_norm=1.0)
        warmth = min(1.0, max((step + 1) / max(1, warmup), 10 * done))
        rate = lr * warmth * LR_DECAYS[lr_decay](done)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, network, step + 1, ema_decay)
        return losses, t, norm, rate

    def save() -> None:
        learnt = {"network": network.state_dict(), "average": average.state_dict()}
        progress = {"optimizer": optimizer.state_dict(), "step": step, **log.state()}
        with course.saving():
            checkpoints.save(run_name, settings=settings, data=data.fingerprint, **learnt, **progress)

    def preview_path() -> Path:
        return results / "training_progress" / f"epoch_{course.epoch(step):04d}.png"

    def preview() -> None:
        wanted = take_turns(range(len(classes)), shown)
        *_, (previews, _) = walk(average, diffusion, shown, size, "dpm++", min(STEPS, noise_steps), wanted)
        previews = utils.to_bytes(previews).cpu()
        utils.save_png(previews, preview_path(), rows=len(classes), run=run_name, step=step)
        log.illustrate(utils.over_white(previews))

    def describe() -> None:
        torch.manual_seed(basics.seed_of(seed, 0))
        first = torch.from_numpy(utils.shuffled(count, seed, epoch=0)[:64])
        first = load(first, utils.draw_mirrored(len(first), device))
        utils.save_png(utils.to_bytes(first).cpu(), results / "data.png")
        about = [*reading.tell_classes(listing, conditional), *data.remarks, f"a look at them: {results / 'data.png'}"]
        kind = f"{size[0]}x{size[1]} from {dataset}, in {reading.MODES[data.mode]}"
        print(f"data     {count:,} images of {kind}", *about, sep="\n         ")
        print(f"network  {in_figures(network, size, device)}")
        print(f"length   {course.summary(step)}")
        print(f"files    {path}, {results}{os.sep}", flush=True)

    def write_down(is_last: bool) -> None:
        """Save, preview and log what is due after a step."""
        is_saved = False
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

    try:
        if is_first:
            describe()
        stopping, done = processes.largest(0, course.done(step) if is_first else 0)
        if compile and done < 1:
            compiling = time.monotonic()
            network.compile(dynamic=False)  # in place: the weights keep their names
            add_gradients(step)  # compiles; the gradients are thrown away
            optimizer.zero_grad()
            print(f"compiled in {time.monotonic() - compiling:.0f} s", flush=True)
        if dry_run:
            for number in (0, 1):  # the first step takes longer than those that follow
                step_began = time.monotonic()
                learn(step + number, done)[0].tolist()  # waits for a GPU
            return print(course.forecast(step, batch_size / (time.monotonic() - step_began)))
        if is_first:
            log.write()
            if done >= 1 and step > 0 and not preview_path().exists():  # a death may have come before it
                preview()
        if done >= 1:
            return print(course.farewell(step))
        with command_line.StopSignals() as stop, log if is_first else contextlib.nullcontext():
            while done < 1 and not stopping:
                seen = learn(step, done)
                step += 1
                stopping, done = processes.largest(stop.status, course.done(step) if is_first else 0)
                if is_first:
                    log.add(step, *seen)
                    write_down(is_last=stopping or done >= 1)
    finally:
        if lock:
            lock.release()
    processes.wait()  # a process that leaves has torchrun stop the others, which may be saving
    if stopping and done < 1:
        print(f"stopped and saved at step {step:,} of {course.last_step:,}; the same command goes on from there")
        raise SystemExit(int(stopping))
    print(log.report(run_name, STEPS))


def open_run(settings: dict, fingerprint: str) -> tuple[FileLock, dict, dict]:
    """The run that `train` begins or goes on with: its lock, its checkpoint, and that of the run it begins from.

    The checkpoint of a new run says that nothing is done; the other is empty where nothing is begun from.

    Raises:
        UserError: somebody else trains this run, or it is another one than `settings` and the data's `fingerprint` say.
    """
    run_name, init_from = settings["run_name"], settings["init_from"]
    is_new = not checkpoints.exists(run_name)
    if not settings["resume"] and not is_new:
        raise UserError(f"--resume=no, but models/{run_name} holds a run; delete it, or choose another --run_name")
    source = load_run(init_from) if init_from and is_new else {}
    if source:
        runs.check_same_network(init_from, source["settings"], settings)
    lock = runs.lock_run(checkpoints.paths_of(run_name)[0].parent)  # held until `train` ends
    if is_new and checkpoints.exists(run_name):
        raise UserError(f"another process has trained models/{run_name} just now; the same command goes on with it")
    if is_new:
        return lock, {"step": 0, "minutes": 0.0, "log": [], "sums": None}, source
    stored = load_run(run_name)
    if "network" not in stored:
        ways_on = f"--init_from={run_name} with another --run_name begins a new run from them"
        raise UserError(f"models/{run_name} holds weights only, made to sample from; {ways_on}")
    runs.check_same_run(stored, settings, fingerprint, MAY_CHANGE)
    return lock, stored, {}


def build(settings: dict, device: torch.device) -> tuple[UNet, Diffusion]:
    """The network, untrained, and the noising process that a run's settings describe."""
    shape = {name: settings[name] for name in (*NETWORK, *IMPORTED) if name in settings}
    shape |= {"channels": reading.CHANNELS[settings["mode"]], "classes": len(settings["classes"]) or None}
    return UNet(**shape).to(device), Diffusion(**{name: settings[name] for name in NOISING}, device=device)


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
        defaults |= {"mode": "RGB", "classes": ()}
        settings = stored["settings"] = defaults | stored["settings"]  # an option newer than the run
        command_line.check_limits(settings, LIMITS)
        runs.check_network(settings)
        with torch.device("meta"):
            network = build(settings, "meta")[0]
        fits = checkpoints.fits(stored, network, len(COLUMNS), SUMS)
        fits = fits and all(isinstance(settings.get(name, kind()), kind) for name, kind in IMPORTED.items())
        fits = fits and all(isinstance(name, str) for name in settings["classes"])
    except (*basics.BROKEN_FILE, UserError):
        fits = False
    if not fits:
        raise UserError(f"models/{run_name} holds weights that do not fit its settings: another program's, or damaged")
    return stored


def take_turns(classes: Sequence[int], numbers: range) -> Tensor | None:
    """Whose turn it is: the class of each image (B,), by its number alone; None where there are no classes."""
    return torch.tensor([classes[number % len(classes)] for number in numbers]) if classes else None


def guided(network: UNet, x_t: Tensor, t: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """A network's answer, led towards the classes (B,) and away from what is there without (Ho & Salimans 2022).

        answer = without + guidance * (with_class - without)

    Whatever the objective, this does the same to the guess of x_0, of which an answer is a linear function.
    """
    if labels is None or guidance == 1:
        return network(x_t, t, labels)
    none = torch.full_like(labels, network.null_class)
    if guidance == 0:
        return network(x_t, t, none)
    with_class, without = network(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, none])).float().chunk(2)
    return without + guidance * (with_class - without)


def walk(
    network: UNet,
    diffusion: Diffusion,
    seeds: Sequence[int],
    size: tuple[int, int],
    sampler: str,
    steps: int,
    labels: Tensor | None = None,
    guidance: float = GUIDANCE,
    picture: Tensor | None = None,
    anew: Tensor | None = None,
    strength: float = 1.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`Diffusion.denoise` with a network, from the noise of one seed per image: (x_t, guess of x_0) after every step.

    All noise of an image is drawn on the CPU from its own seed, so it does not depend on the batch or the device.

    Args:
        seeds, size, sampler, steps: one seed per image, height and width, one of SAMPLERS, steps over the whole of T.
        labels: classes (B,), or None.
        guidance: see `guided`.
        picture, anew, strength: a picture (C, H, W) in [-1, 1] to begin with, noised to the share `strength` of T; what
            of each pixel may change (1, H, W), from 0 to 1. Where nothing may, the network's guess is replaced by the
            picture, which so comes out as it went in.
    """
    device = diffusion.signal.device
    generators = [np.random.default_rng(seed) for seed in seeds]
    shape, path = (network.channels, *size), diffusion.path(steps, strength)
    labels, picture, anew = (None if given is None else given.to(device) for given in (labels, picture, anew))

    def draw_noise() -> Tensor:
        noise = [generator.standard_normal(shape, dtype=np.float32) for generator in generators]
        return torch.from_numpy(np.stack(noise)).to(device)  # (B, C, H, W)

    def predict_clean(x_t: Tensor, t: int) -> Tensor:
        times = torch.full((len(x_t),), t, device=device)
        with devices.autocast(device):
            output = guided(network, x_t, times, labels, guidance)
        x_0 = diffusion.clean(x_t, times, output.float()).clamp(-1, 1)
        return x_0 if picture is None else torch.lerp(picture, x_0, anew)

    x_t = draw_noise()
    if path[0] < diffusion.steps:  # at T the picture is all but gone: plain sampling
        x_t = diffusion.add_noise(picture, torch.tensor([path[0]], device=device), x_t)
    if path == [0]:
        return iter([(x_t, x_t)])
    return diffusion.denoise(predict_clean, x_t, path, sampler, draw_noise)


def sample(
    # what and where
    run_name: str = "",
    n_img: int = 16,
    name: str = "samples",
    save_grid: bool = True,
    gif: bool = False,
    seed: int = 0,
    img_size: tuple = (),
    # classes
    label: str = "all",
    guidance: float = GUIDANCE,
    # from a picture
    init_image: str = "",
    strength: float = STRENGTH,
    mask: str = "",
    # how
    sampler: str = "dpm++",
    steps: int = STEPS,
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
        gif: also film the first images (16 at most): left as they come out of the noise, right what they are taken for.
        seed: image number i is made from seed + i, and its class, alone, whatever n_img and batch_size.
        img_size: another size than the run was trained at, such as 48x96; it may not look as good.
        label: the classes to make, in turn: a name, several (cats,dogs), or all; for runs trained with --conditional.
        guidance: how strictly an image keeps to its class: 0 not at all, 1 as learnt, more for clearer and less varied
            images.
        init_image: a picture to begin with, instead of noise.
        strength: how much of it changes: 0 nothing, 1 everything.
        mask: a picture of the same size: white is painted anew, black is kept to the pixel.
        sampler: ddpm is the paper's, for many steps; ddim and dpm++ need far fewer and add no noise on the way.
        steps: how many of the noising steps are visited; 1000 with ddpm is the paper's Algorithm 2.
        batch_size: images made at the same time.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UserError: a flag or checkpoint that does not fit.
    """
    command_line.check_limits(locals(), LIMITS)
    command_line.check_name("name", name)
    if not run_name:
        print(runs_table())
        raise UserError("--run_name is missing; it takes one of the runs above")
    command_line.check_name("run_name", run_name)
    device, is_first = processes.join(devices.pick_device(device)), processes.is_first()
    stored = processes.from_first(load_run(run_name) if is_first else None)
    settings, classes = stored["settings"], stored["settings"]["classes"]
    chosen = runs.check_labels(label, classes)
    runs.check_walk(settings, steps, guidance, GUIDANCE)
    if strength != STRENGTH and not init_image:
        raise UserError(f"--strength={strength:g} takes a picture to begin with: --init_image=...")
    size = runs.check_size(img_size or settings["img_size"], stride=2 ** (len(settings["multipliers"]) - 1))
    if size != settings["img_size"]:
        print(f"{run_name} was trained at {settings['img_size'][0]}x{settings['img_size'][1]}; this may look worse")
    picture, anew = None, None
    if init_image or mask:
        picture, anew = reading.read_start(init_image, mask, size, settings["mode"])
        picture = utils.from_bytes(picture)
    strength = strength if init_image else 1.0
    network, diffusion = build_trained(stored, device)
    batch_size = devices.images_at_once(device, size, settings["width"]) if batch_size == "auto" else batch_size

    def command(first: int, number: int) -> str:
        """What makes `number` images from the seed `first` on again, the same to the bit: in batches as here."""
        flags = {"run_name": run_name, "n_img": number, "seed": first, "img_size": f"{size[0]}x{size[1]}"}
        flags |= {"sampler": sampler, "steps": steps, "batch_size": min(number, batch_size)}
        if classes:
            turns = [chosen[(first - seed + turn) % len(chosen)] for turn in range(len(chosen))]
            flags |= {"label": ",".join(classes[turn] for turn in turns), "guidance": guidance}
        if init_image:
            flags |= {"init_image": init_image, "strength": strength} | ({"mask": mask} if mask else {})
        return shlex.join(["python", "ddpm.py", "sample", *(f"--{flag}={value}" for flag, value in flags.items())])

    facts = {"run": run_name, "step": stored["step"], "weights": checkpoints.fingerprint_of(stored["average"])}
    facts |= {"sampler": sampler, "steps": steps, "device": device.type}
    folder = processes.from_first(basics.claim_folder(Path("results", run_name, name)) if is_first else None)
    starts, visited = range(0, n_img, batch_size), max(1, len(diffusion.path(steps, strength)) - 1)
    mine, digits = processes.share(len(starts)), max(4, len(str(n_img)))
    grid, film, written = [], [], []
    with basics.progress_bar(visited * len(mine), unit="step") as bar, ThreadPoolExecutor(8) as writers:
        for start in starts[mine.start : mine.stop]:
            numbers = range(start, min(n_img, start + batch_size))
            seeds, labels = [seed + number for number in numbers], take_turns(chosen, numbers)
            how = (sampler, steps, labels, guidance, picture, anew, strength)
            for count, (x_t, guess) in enumerate(walk(network, diffusion, seeds, size, *how), 1):
                bar.update()
                if gif and start == 0 and count * FILM_FRAMES // visited > (count - 1) * FILM_FRAMES // visited:
                    sides = [utils.tile(utils.to_bytes(side[:FILM_IMAGES]).cpu(), len(chosen)) for side in (x_t, guess)]
                    film.append(torch.cat(sides, dim=2))  # (3, H, 2 W): what there is, and what it is taken for
            images = utils.to_bytes(x_t).cpu()  # (B, C, H, W)
            for place, (image, number) in enumerate(zip(images, numbers, strict=True)):
                again = f"{command(seeds[0], len(seeds))}  # this is sample_{place + 1:04d}.png there"
                own = {"seed": seeds[place], "command": again} | ({"label": classes[labels[place]]} if classes else {})
                file = folder / f"sample_{number + 1:0{digits}d}.png"  # eight at a time: they wait for the disk
                written.append(writers.submit(utils.save_png, image[None], file, **facts, **own))
            while written:
                written.pop().result()  # raises what the thread met with
            grid += [image.clone() for image in images[: max(0, GRID_IMAGES - start)]]  # not views of the whole batch
    grid = list(itertools.chain(*processes.gather(grid)))
    if not is_first:
        return
    learnt_from = stored["log"][-1][COLUMNS.index("images")] if stored["log"] else math.inf  # imported runs have no log
    print(f"{n_img:,} images: {folder / 'sample_*.png'}{hint(learnt_from)}")
    facts |= {"seed": seed, "command": command(seed, n_img)}
    if save_grid:
        utils.save_png(torch.stack(grid), folder / "samples.png", rows=len(chosen), **facts)
        print(f"{len(grid)} of them in one: {folder / 'samples.png'}")
    if gif:
        utils.save_gif(film, folder / "samples.gif", comment=f"{command(seed, n_img)} --gif")
        print(f"how they came to be: {folder / 'samples.gif'}")


def main() -> None:
    command_line.run_command_line("ddpm.py", {"train": train, "sample": sample}, LIMITS)


if __name__ == "__main__":
    main()
