"""Whose images are better after the same time: ours, or those of two other projects.

    python -m benchmarks.quality_peers --minutes=12
    python -m benchmarks.quality_peers --help

All learn from the same images, decoded before and mirrored at random, on the same machine, for
the same minutes of the clock; each by its own settings, and each samples in its own way, with its
EMA weights.

- ours: the command line's defaults, and README's first training ("for a CPU"), the latter with
  AdamW as well. What `ddpm.train` does beside its steps, such as the last preview, comes out of
  its minutes. dpm++, 25 steps.
- diffusers: the network and settings of its example, train_unconditional.py in
  examples/unconditional_image_generation, as its README calls it; the step is written here. Its
  learning rate falls by the clock, to end with it. 500 warm-up steps would be most of a short
  training: here they are a tenth of the steps that fit, if that is less. It samples as the example
  does, with DDPMPipeline, but in 50 steps: for its 1,000 there is no time on a CPU. DDIMPipeline
  would do it an injustice: what is clipped and what is not do not fit together there, and a young
  network's images turn to gray noise.
- lucidrains: denoising-diffusion-pytorch's own Trainer, asked for a step at a time, with the
  defaults of its signature (the batches of its README are four times larger, so the steps were a
  fourth as many). Its own DDIM, 50 steps.
- diffusers, our layers: the same recipe for a network of the layers that ours for a CPU has;
  lucidrains, dim 32: its own network half as wide. Both are nearer to ours in size.

Theirs run in fp32, as they come, and in bf16, where the hardware has it: ours takes that by itself.
The time to get ready (to build, and to see how many steps fit) is reported, not counted.

Reading order: what all are given, the contenders, the command.
"""

import contextlib
import functools
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm
import utils
from benchmarks import measuring, peers, quality
from machinery import basics, command_line, devices, reading, writing
from machinery.basics import UserError
from machinery.command_line import FilePath
from machinery.listing import list_images
from machinery.steps import Way
from tools import evaluate

STRIDE = 32  # diffusers' network halves an image five times
FEWEST = 100  # images that lucidrains' Trainer asks for
PEER_STEPS = 50  # of the others' sampling
BATCH = 64  # of everybody's sampling
LIMITS = measuring.LIMITS | {"minutes": (0.01, 10**6), "img_size": (STRIDE, 1024)}
LIMITS |= {"seeds": (1, 1000), "n_img": (16, 10**9)}
COLUMNS = (
    "dataset",
    "contender",
    "seed",
    "minutes",
    "img_size",
    "measure",
    "n",
    "images",
    "weights_m",
)
COLUMNS += ("sampler", "steps", *quality.FIGURES, "prepared_s", "trained_s", "sampled_s")
COLUMNS += measuring.WHERE
SHOWN = {
    "contender": ("contender", ""),
    "seeds": ("seeds", ""),
    "images": ("images", ",.0f"),
    "weights_m": ("weights M", ".1f"),
    "how": ("sampler", ""),
    "distance": ("distance", ".1f"),
    "excess": ("excess", ".1f"),  # over the floor, `distance_real`
}
SHOWN |= {name: (name, ".3f") for name in quality.FIGURES if not name.startswith("distance")}

# ---- what all are given --------------------------------------------------------------------------


class Task(NamedTuple):
    """What to learn from, for how long, and where to do the work."""

    dataset: str  # a folder
    images: np.ndarray  # in it, (N, 3, H, W) uint8
    minutes: float
    seed: int
    device: torch.device

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Images (B, 3, H, W) in [-1, 1], epoch after epoch, each mirrored or not."""
        labels = np.zeros(len(self.images), np.int64)
        data = reading.Dataset(self.images, "", [], "RGB", labels)
        loader = utils.Loader(data, batch_size, self.seed, flip="horizontal", device=self.device)
        for step in itertools.count():
            yield loader.load(*loader.draw(step))


class Learned(NamedTuple):
    """What a contender has learned, and what it took."""

    images: int  # shown
    weights_m: float
    prepared_s: float
    trained_s: float
    sampler: str
    steps: int  # of the sampler
    sample: Callable[[int], Tensor]  # makes so many images, (N, 3, H, W) uint8, on the CPU


def train_by_clock(step: Callable[[float], None], minutes: float) -> tuple[int, float]:
    """Call `step` until the minutes are used up: how many steps, in how many seconds.

    The step is given the share of the minutes that is used up.
    """
    began = time.monotonic()
    count = 0
    while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
        step(done)
        count += 1
    return count, time.monotonic() - began


def steps_that_fit(step: Callable[[float], None], minutes: float) -> int:
    """An estimate from two steps, after one that warms up; none of them must count."""
    step(0.0)
    began = time.monotonic()
    for _ in range(2):
        step(0.0)
    return max(1, round(2 * 60 * minutes / (time.monotonic() - began)))


def in_batches(make: Callable[[int], Tensor], n: int) -> Tensor:
    """`n` images as bytes, of a function that makes some in [0, 1].

    Its own progress bar is hidden.
    """
    found = []
    with basics.progress_bar(n, title="samples") as bar, contextlib.redirect_stderr(io.StringIO()):
        for start in range(0, n, BATCH):
            found.append(utils.to_bytes(2 * make(min(BATCH, n - start)) - 1).cpu())
            bar.update(len(found[-1]))
    return torch.cat(found)


def millions(network: nn.Module) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


# ---- the contenders ------------------------------------------------------------------------------


def train_ours(name: str, settings: dict, task: Task) -> Learned:
    """`ddpm.train`, as an ordinary run, models/quality_peers_..., which resumes after a stop."""
    size = task.images.shape[2:]
    run_name = f"quality_peers_{name}_{size[0]}_{task.minutes:g}_{task.seed}"
    # the clock alone ends it
    settings = settings | {"max_minutes": task.minutes, "epochs": 10**6, "sample_every": 0}
    settings |= {"img_size": size, "seed": task.seed, "device": str(task.device)}
    settings |= {"mode": "RGB"}  # as all others: see `Task`
    ddpm.train(dataset=task.dataset, run_name=run_name, **settings)
    stored = ddpm.load_run(run_name)
    images = stored["step"] * min(stored["settings"]["batch_size"], len(task.images))
    network = ddpm.build_trained(stored, task.device)[0]

    def sample(n: int) -> Tensor:
        return evaluate.make_samples(stored, range(n), Way("dpm++", 25, "even"), BATCH, task.device)

    return Learned(images, millions(network), 0.0, 60 * stored["minutes"], "dpm++", 25, sample)


DIFFUSERS = {"layers_per_block": 2, "block_out_channels": (128, 128, 256, 256, 512, 512)}
DIFFUSERS |= {"down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D")}
DIFFUSERS |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4}
# of the network of `FOR_A_CPU`
OUR_LAYERS = {"layers_per_block": 2, "block_out_channels": (32, 64, 128), "norm_num_groups": 8}
OUR_LAYERS |= {"down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")}
OUR_LAYERS |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")}
OUR_LAYERS |= {"attention_head_dim": 64}


def start_diffusers(precision: str, task: Task, noising, total: int, layers: dict) -> tuple:
    """A network in training, its EMA weights, and the function that makes one of `total` steps."""
    from diffusers import UNet2DModel
    from diffusers.models.unets.unet_2d import UNet2DOutput
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(task.seed)
    network = UNet2DModel(sample_size=task.images.shape[-1], **layers).train().to(task.device)
    # autocast would answer in bf16
    network.register_forward_hook(
        lambda _network, _inputs, output: UNet2DOutput(output.sample.float())
    )
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    rate = get_scheduler(
        "cosine", optimizer, num_warmup_steps=min(500, total // 10), num_training_steps=total
    )
    average = EMAModel(
        network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4
    )
    batches = task.batches(16)

    def step(done: float) -> None:
        images = next(batches)
        noise = torch.randn_like(images)
        t = torch.randint(0, 1000, (len(images),), device=task.device)
        with peers.autocast(task.device, precision):
            answer = network(noising.add_noise(images, noise, t), t).sample
        loss = F.mse_loss(answer, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-4 * rate.lr_lambdas[0](done * total)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        loss.item()  # its log asks for the loss of every step

    return network, average, step


def train_diffusers(precision: str, task: Task, layers: dict) -> Learned:
    """See above; batches of 16."""
    from diffusers import DDPMPipeline, DDPMScheduler

    began = time.monotonic()
    noising = DDPMScheduler(num_train_timesteps=1000)
    start = functools.partial(start_diffusers, precision, task, noising, layers=layers)
    total = steps_that_fit(start(total=1000)[-1], task.minutes)
    network, average, step = start(total=total)
    prepared = time.monotonic() - began
    count, seconds = train_by_clock(step, task.minutes)
    average.copy_to(network.parameters())
    pipeline = DDPMPipeline(network.eval(), noising)

    def make(number: int) -> Tensor:
        with peers.autocast(task.device, precision):
            made = pipeline(number, num_inference_steps=PEER_STEPS, output_type="np")
        return torch.from_numpy(made.images).permute(0, 3, 1, 2)  # (B, 3, H, W) in [0, 1]

    sample = functools.partial(in_batches, make)
    return Learned(16 * count, millions(network), prepared, seconds, "ddpm", PEER_STEPS, sample)


LUCIDRAINS = {"dim": 64, "dim_mults": (1, 2, 4, 8)}
DIM_32 = LUCIDRAINS | {"dim": 32}


def train_lucidrains(precision: str, task: Task, layers: dict) -> Learned:
    """See above; batches of 16. Its averaged weights are in fp32, and so is its sampling."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    began = time.monotonic()
    torch.manual_seed(task.seed)
    # it would take any GPU there is
    os.environ["ACCELERATE_USE_CPU"] = str(task.device.type == "cpu")
    diffusion = GaussianDiffusion(
        Unet(**layers), image_size=task.images.shape[-1], sampling_timesteps=PEER_STEPS
    )
    never = {"calculate_fid": False, "save_and_sample_every": 10**12}
    trainer = Trainer(diffusion, task.dataset, results_folder=measuring.RESULTS, **never)
    # it takes [0, 1]
    trainer.dl = ((images + 1) / 2 for images in task.batches(trainer.batch_size))
    # its `amp`, which cannot be changed within a process
    trainer.accelerator.autocast = functools.partial(peers.autocast, task.device, precision)

    def step(_done: float) -> None:
        trainer.train_num_steps = trainer.step + 1
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train()

    prepared = time.monotonic() - began
    count, seconds = train_by_clock(step, task.minutes)
    images = count * trainer.gradient_accumulate_every * trainer.batch_size
    sample = functools.partial(in_batches, trainer.ema.ema_model.eval().sample)
    return Learned(images, millions(diffusion), prepared, seconds, "ddim", PEER_STEPS, sample)


FOR_A_CPU = quality.BASE | {"batch_size": 16, "lr": 2e-3, "optimizer": "auto"}
OURS = {"ours": ("defaults", {}), "ours, for a CPU": ("cpu", FOR_A_CPU)}
OURS |= {"ours, for a CPU, AdamW": ("cpu_adamw", FOR_A_CPU | {"optimizer": "adamw"})}
PEERS = {
    "diffusers": ("diffusers", train_diffusers, DIFFUSERS),
    "diffusers, our layers": ("diffusers", train_diffusers, OUR_LAYERS),
    "lucidrains": ("denoising_diffusion_pytorch", train_lucidrains, LUCIDRAINS),
    "lucidrains, dim 32": ("denoising_diffusion_pytorch", train_lucidrains, DIM_32),
}


def contenders_of(device: torch.device, names: str = "all") -> dict[str, Callable[[Task], Learned]]:
    """Those that can take part on this device, with what is installed; says who cannot.

    Raises:
        UserError: one of the names is none of theirs.
    """
    found = {name: functools.partial(train_ours, *how) for name, how in OURS.items()}
    precisions = measuring.precisions_of(device)
    for project, (module, train, layers) in PEERS.items():
        if peers.is_installed(module):
            for precision in precisions:
                how = functools.partial(train, precision, layers=layers)
                found[f"{project}, {precision}"] = how
    if names == "all":
        return found
    chosen = [name.strip() for name in names.split(";")]
    for name in chosen:
        command_line.check_limits({"contenders": name}, {"contenders": found})
    return {name: found[name] for name in chosen}


# ---- the command ---------------------------------------------------------------------------------


def measure(
    contender: str,
    train: Callable[[Task], Learned],
    task: Task,
    unseen: np.ndarray,
    features: evaluate.Features,
    n: int,
) -> dict:
    """Train, sample, judge: the figures of a row. Writes an image of samples to look at."""
    learned = train(task)
    began = time.monotonic()
    torch.manual_seed(task.seed)
    samples = learned.sample(n)
    sampled = time.monotonic() - began
    row = learned._asdict() | {"sampled_s": sampled}
    row |= evaluate.judge(samples, unseen, features, task.device)
    ready = f"after {learned.prepared_s:.0f} s to get ready"
    print(f"{learned.images:,} images in {learned.trained_s:.0f} s, {ready}")
    data = Path(task.dataset).name
    name = f"{data} {contender} {samples.shape[-1]} {task.minutes:g} {task.seed}"
    name = name.replace(",", "").replace(" ", "_")
    path = measuring.RESULTS / "quality_peers" / f"{name}.png"
    writing.save_png(samples[:64], path)
    print(f"{min(64, n)} of its images: {path}")
    return row


def means_of(contender: str, rows: list[dict]) -> dict:
    """A row of the printed table: the means over the seeds of a contender."""
    how = f"{rows[0]['sampler']} {rows[0]['steps']}"
    means = {"contender": contender, "seeds": len(rows), "how": how}
    for name in ("images", "weights_m", *quality.FIGURES):
        means[name] = statistics.mean(float(row[name]) for row in rows)
    return means | {"excess": means["distance"] - means["distance_real"]}


def quality_peers(
    minutes: float = 12.0,
    n_img: int = 512,
    img_size: int = 32,
    seeds: int = 1,
    contenders: str = "all",
    dataset: FilePath = "datasets/landscapes",
    held_out: FilePath = "datasets/held_out",
    device: str = "auto",
) -> None:
    """Train ours, diffusers' and lucidrains' for the same minutes, and judge their images.

        python -m benchmarks.quality_peers --minutes=12

    Adds a row for every contender and seed to results/benchmarks/quality_peers.csv, and prints the
    means of the seeds; what this machine has there already is not done again. Held-out images come
    from: python datasets/paint_landscapes.py --first_seed=1000000 --count=2048
    --folder=datasets/held_out

    Args:
        minutes: of training for each contender; reading the images, getting ready and sampling are
            not counted.
        n_img: how many images are judged.
        img_size: in pixels, a multiple of 32.
        seeds: how many times every contender is trained.
        contenders: all, or the names of some with semicolons, in quotes: "ours;diffusers, bf16".
        dataset: what they learn from.
        held_out: what they are judged by.
        device: auto, cpu, cuda, cuda:N, mps or xpu.

    Raises:
        UserError: a flag, package or data set that does not fit.
    """
    command_line.check_limits(locals(), LIMITS)
    if img_size % STRIDE:
        needed = f"a multiple of {STRIDE}, which diffusers' network needs"
        raise UserError(f"--img_size={img_size} is not {needed}")
    place = devices.pick_device(device)
    path = measuring.RESULTS / "quality_peers.csv"
    command_line.check_table(path, COLUMNS)
    features = evaluate.load_efficientnet(place)
    quality.check_held_out(held_out)
    listings = [list_images(Path(folder)) for folder in (dataset, held_out)]
    if len(listings[0].paths) < FEWEST:
        needed = f"{FEWEST} images, which lucidrains' Trainer asks for"
        raise UserError(f"--dataset={dataset} holds fewer than {needed}")
    n = evaluate.comparable(n_img, len(listings[1].paths))
    measuring.RESULTS.mkdir(parents=True, exist_ok=True)
    images, unseen = (
        reading.read_dataset(listing, (img_size, img_size), "RGB").images for listing in listings
    )
    devices.keep_memory()  # for all, as ours has it
    trainers = contenders_of(place, contenders)
    facts = measuring.facts_of(place)
    shared = {"dataset": dataset, "minutes": f"{minutes:g}", "img_size": img_size, "n": n}
    # the same minutes are more on a faster machine
    shared |= {name: facts[name] for name in ("device", "hardware", "threads")}
    for seed, (contender, train) in itertools.product(range(seeds), trainers.items()):
        key = shared | {"contender": contender, "seed": seed}
        if quality.matching(quality.done_before(path), key):
            continue
        print(f"\n{contender}, seed {seed}", flush=True)
        task = Task(dataset, images, minutes, seed, place)
        row = measure(contender, train, task, unseen, features, n)
        row |= key | measuring.facts_of(place)
        measuring.add_rows(path, [{name: row[name] for name in COLUMNS}], COLUMNS)
    rows = quality.matching(quality.done_before(path), shared)
    means = [means_of(name, quality.matching(rows, {"contender": name})) for name in trainers]
    floor = f"the floor {means[0]['distance_real']:.1f}"
    shape = f"{img_size}x{img_size}, judged by {n:,} held-out images"
    print(f"\n{minutes:g} minutes each, {shape}, {floor}")
    print(f"{facts['hardware']}, {facts['threads']} CPU threads, torch {facts['torch']}")
    print(measuring.table(sorted(means, key=lambda row: row["distance"]), SHOWN))


if __name__ == "__main__":
    command_line.run_command_line(
        "-m benchmarks.quality_peers", {"quality_peers": quality_peers}, LIMITS
    )
