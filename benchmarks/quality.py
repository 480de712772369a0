"""Which settings make the better images: all learn from as many images and are judged alike.

    python -m benchmarks.quality --experiment=noise
    python -m benchmarks.quality --help

A variant is an ordinary run, models/quality_..., and can be stopped and resumed like any other.
What is judged is written down at once; the same command does what is still missing.

Reading order: EXPERIMENTS, then quality, the command.
"""

import csv
import itertools
import statistics
from pathlib import Path

import ddpm
import utils
from benchmarks import measuring
from machinery import command_line, devices
from machinery.basics import UserError
from machinery.command_line import FilePath
from machinery.listing import list_images
from machinery.steps import Way
from tools import evaluate

# A small network that learns something within minutes on a CPU; every variant changes a bit of it.
BASE = {
    "img_size": (32,),
    "width": 32,
    "multipliers": (1, 2, 4),
    "attention_size": 8,
    "batch_size": 32,
    "lr": 1e-3,
    "schedule": "cosine",
    "objective": "v",
    "min_snr": 5.0,
    "ema_decay": 0.9999,
    "dropout": 0.0,
    "optimizer": "adamw",  # as most tables were made
}
EXPERIMENTS = {
    "noise": {
        f"{schedule}, {objective}, min-SNR {min_snr:g}": {
            "schedule": schedule,
            "objective": objective,
            "min_snr": min_snr,
        }
        for schedule, objective, min_snr in itertools.product(
            ddpm.NOISE_SCHEDULES, ddpm.OBJECTIVES, (0.0, 5.0)
        )
    },
    "rate": {
        f"lr {lr:g}, batch {size}": {"lr": lr, "batch_size": size}
        for lr, size in itertools.product((5e-4, 1e-3, 2e-3), (16, 32, 64))
    },
    "optimizer": {name: {"optimizer": name} for name in ("adamw", "muon")},
    # The average decays by (1 + s) / (10 + s) at most, 0.983 after 512 steps: more would change
    # nothing there.
    "average": {f"ema_decay {decay}": {"ema_decay": decay} for decay in (0.9, 0.97, 0.9999)},
    "dropout": {f"dropout {share}": {"dropout": share} for share in (0.0, 0.05, 0.1)},
    "shape": {  # to 6% the same number of operations
        "width 32, 1,2,4, 2 blocks": {},
        "width 28, 1,2,5, 2 blocks": {"width": 28, "multipliers": (1, 2, 5)},
        "width 28, 1,2,4, 3 blocks": {"width": 28, "blocks": 3},
        "width 36, 1,2,4, 1 block, attention at 16": {
            "width": 36,
            "blocks": 1,
            "attention_size": 16,
        },
    },
}
WAY = Way("dpm++", 25, "even")  # every variant is sampled so
UNCHANGED = "base"  # the variant that all experiments share: it is trained once
LIMITS = measuring.LIMITS | {
    "experiment": EXPERIMENTS,
    "images": (1, 10**12),
    "seeds": (1, 1000),
    "n_img": (16, 10**9),
}
FIGURES = ("distance", "distance_real", "precision", "recall", "copies")
FIGURES += ("contrast", "contrast_real")
COLUMNS = (
    "experiment",
    "dataset",
    "variant",
    "seed",
    "images",
    "measure",
    "n",
    *FIGURES,
    "minutes",
)
COLUMNS += measuring.WHERE


def variants_of(experiment: str) -> dict[str, dict]:
    """What each variant of an experiment changes, by its name.

    One that changes nothing is called `UNCHANGED`.
    """
    named = EXPERIMENTS[experiment].items()
    return {UNCHANGED if BASE | changed == BASE else name: changed for name, changed in named}


def done_before(path: Path) -> list[dict]:
    """The rows of earlier calls."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def check_held_out(folder: str) -> None:
    """Refuse a folder of held-out images that does not exist, and say how to make it."""
    if not Path(folder).is_dir():
        options = f"--first_seed=1000000 --count=2048 --folder={folder}"
        how = f"python datasets/paint_landscapes.py {options}"
        raise UserError(f"--held_out={folder} does not exist; paint it: {how}")


def matching(rows: list[dict], wanted: dict) -> list[dict]:
    """The rows of a CSV file whose cells are as wanted."""
    texts = {name: str(value) for name, value in wanted.items()}
    return [row for row in rows if texts.items() <= row.items()]


def means_of(variant: str, rows: list[dict]) -> dict:
    """A row of the printed table: the means over the seeds of a variant."""
    means = {name: statistics.mean(float(row[name]) for row in rows) for name in FIGURES}
    return {"variant": variant, "seeds": len(rows)} | means


def quality(
    experiment: str = "noise",
    images: int = 40_000,
    seeds: int = 1,
    n_img: int = 2048,
    dataset: FilePath = "datasets/landscapes",
    held_out: FilePath = "datasets/held_out",
    device: str = "auto",
) -> None:
    """Train the variants of an experiment on as many images, and judge them by held-out images.

        python -m benchmarks.quality --experiment=noise

    A change that helps with one data set may hurt with another: try two. Adds a row for every
    variant and seed to results/benchmarks/quality.csv, and prints the means of the seeds. Held-out
    images come from: python datasets/paint_landscapes.py --first_seed=1000000 --count=2048
    --folder=datasets/held_out

    Args:
        experiment: which settings are varied.
        images: how many images every variant is shown, rounded to whole epochs.
        seeds: how many times every variant is trained.
        n_img: how many images are judged.
        dataset: what the variants learn from.
        held_out: what they are judged by.
        device: auto, cpu, cuda, cuda:N, mps or xpu.

    Raises:
        UserError: a flag, package or data set that does not fit.
    """
    command_line.check_limits(locals(), LIMITS)
    place = devices.pick_device(device)
    path = measuring.RESULTS / "quality.csv"
    command_line.check_table(path, COLUMNS)
    features = evaluate.load_efficientnet(place)
    check_held_out(held_out)
    count, real = (len(list_images(Path(folder)).names) for folder in (dataset, held_out))
    epochs = max(1, round(images / count))
    n = evaluate.comparable(n_img, real)
    shared = {"dataset": dataset, "images": epochs * count, "n": n}
    variants = variants_of(experiment)
    for seed, (number, variant) in itertools.product(range(seeds), enumerate(variants)):
        key = shared | {"variant": variant, "seed": seed}
        if matching(done_before(path), key):
            continue
        print(f"\n{experiment}: {variant}, seed {seed}", flush=True)
        run_name = f"quality_{Path(dataset).name}_{experiment}_{number}_{epochs}_{seed}"
        settings = BASE | variants[variant] | {"seed": seed, "epochs": epochs}
        settings |= {"device": device, "sample_every": 0}
        ddpm.train(dataset=dataset, run_name=run_name, **settings)
        stored = ddpm.load_run(run_name)
        samples = evaluate.make_samples(stored, range(n), WAY, 64, place)
        size, mode = (stored["settings"][name] for name in ("img_size", "mode"))
        unseen = utils.load_dataset(Path(held_out), size, mode).images
        row = key | {"experiment": experiment, "minutes": stored["minutes"]}
        row |= evaluate.judge(samples, unseen, features, place) | measuring.facts_of(place)
        measuring.add_rows(path, [{name: row[name] for name in COLUMNS}], COLUMNS)
    rows = matching(done_before(path), shared)
    means = [means_of(variant, matching(rows, {"variant": variant})) for variant in variants]
    shown = {"variant": ("variant", ""), "seeds": ("seeds", "")}
    shown |= {name: (name, ".3f") for name in FIGURES}
    facts = measuring.facts_of(place)
    judged = f"{epochs * count:,} images, judged by {n:,}"
    print(f"\n{experiment}: {judged}; {facts['hardware']}, torch {facts['torch']}")
    print(measuring.table(sorted(means, key=lambda row: row["distance"]), shown))


if __name__ == "__main__":
    command_line.run_command_line("-m benchmarks.quality", {"quality": quality}, LIMITS)
