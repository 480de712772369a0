"""Which settings make the better images: variants learn from the same images, as many of them, and
are judged alike.

    python -m benchmarks.quality --experiment=noise
    python -m benchmarks.quality --help

A variant is an ordinary run, models/quality_..., and can be stopped and gone on with like any
other. What is judged is written down at once; the same command does what is still missing.

Reading order: EXPERIMENTS, then quality, the command.
"""

import csv
import itertools
import statistics
from pathlib import Path

import ddpm
import utils
from benchmarks import measuring
from machinery import command_line, devices, reading
from machinery.basics import UserError
from tools import evaluate

# A small network that learns something within minutes on a CPU; every variant changes a little of
# it.
BASE = {
    "img_size": (32,),
    "width": 32,
    "multipliers": (1, 2, 4),
    "attention_size": 8,
    "batch_size": 32,
    "lr": 1e-3,
}
BASE |= {
    "schedule": "cosine",
    "objective": "v",
    "min_snr": 5.0,
    "ema_decay": 0.9999,
    "dropout": 0.0,
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
UNCHANGED = (
    "base"  # the variant that every experiment has, and that is trained once for all of them
)
LIMITS = measuring.LIMITS | {
    "experiment": EXPERIMENTS,
    "images": (1, 10**12),
    "seeds": (1, 1000),
    "n_img": (16, 10**9),
}
FIGURES = (
    "distance",
    "distance_real",
    "precision",
    "recall",
    "copies",
    "contrast",
    "contrast_real",
)
COLUMNS = (
    "experiment",
    "variant",
    "seed",
    "images",
    "measure",
    "n",
    *FIGURES,
    "minutes",
    *measuring.WHERE,
)


def variants_of(experiment: str) -> dict[str, dict]:
    """What each variant of an experiment changes, by its name; one that changes nothing is called
    `UNCHANGED`.
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
    """Refuse a folder of held-out pictures that is not there, and say how they come to be."""
    if not Path(folder).is_dir():
        how = f"python datasets/paint_landscapes.py --first_seed=1000000 --count=2048 --folder={folder}"
        raise UserError(f"--held_out={folder} does not exist; paint it: {how}")


def quality(
    experiment: str = "noise",
    images: int = 40_000,
    seeds: int = 1,
    n_img: int = 2048,
    dataset: str = "datasets/landscapes",
    held_out: str = "datasets/held_out",
    device: str = "auto",
) -> None:
    """Train the variants of an experiment on as many images, and judge them by pictures none of
    them has seen.

        python -m benchmarks.quality --experiment=noise

    Adds a row for every variant and seed to results/benchmarks/quality.csv, and prints the means of
    the seeds. Held-out pictures come from: python datasets/paint_landscapes.py --first_seed=1000000
    --count=2048 --folder=datasets/held_out

    Args:
        experiment: which settings are varied.
        images: how many images every variant is shown, rounded to whole epochs.
        seeds: how many times every variant is trained.
        n_img: how many images are judged.
        dataset: what the variants learn from.
        held_out: what they are judged by.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UserError: a flag, package or data set that does not fit.
    """
    command_line.check_limits(locals(), LIMITS)
    place, path = devices.pick_device(device), measuring.RESULTS / "quality.csv"
    command_line.check_table(path, COLUMNS)
    features = evaluate.load_efficientnet(place)
    check_held_out(held_out)
    count, real = (len(reading.list_images(Path(folder)).paths) for folder in (dataset, held_out))
    epochs, n = max(1, round(images / count)), evaluate.comparable(n_img, real)
    variants = variants_of(experiment)
    for seed, (number, (variant, changed)) in itertools.product(
        range(seeds), enumerate(variants.items())
    ):
        key = {"variant": variant, "seed": seed, "images": epochs * count, "n": n}
        if any(
            all(row[name] == str(value) for name, value in key.items()) for row in done_before(path)
        ):
            continue
        print(f"\n{experiment}: {variant}, seed {seed}", flush=True)
        run_name = f"quality_{experiment}_{number}_{epochs}_{seed}"
        settings = (
            BASE | changed | {"seed": seed, "epochs": epochs, "device": device, "sample_every": 0}
        )
        ddpm.train(dataset=dataset, run_name=run_name, **settings)
        stored = ddpm.load_run(run_name)
        samples = evaluate.make_samples(stored, range(n), "dpm++", 25, 64, place)
        pictures = utils.load_dataset(
            Path(held_out), stored["settings"]["img_size"], stored["settings"]["mode"]
        ).images
        figures = evaluate.judge(samples, pictures, features, place)
        row = key | {
            "experiment": experiment,
            "measure": figures["measure"],
            "minutes": stored["minutes"],
        }
        row |= {name: figures[name] for name in FIGURES} | measuring.facts_of(place)
        measuring.add_rows(path, [{name: row[name] for name in COLUMNS}], COLUMNS)
    shared = {"images": str(epochs * count), "n": str(n)}
    rows = [
        row
        for row in done_before(path)
        if all(row[name] == value for name, value in shared.items())
    ]
    means = []
    for variant in variants:
        alike = [row for row in rows if row["variant"] == variant]
        means.append({"variant": variant, "seeds": len(alike)})
        means[-1] |= {name: statistics.mean(float(row[name]) for row in alike) for name in FIGURES}
    shown = {"variant": ("variant", ""), "seeds": ("seeds", "")} | {
        name: (name, ".3f") for name in FIGURES
    }
    facts = measuring.facts_of(place)
    print(
        f"\n{experiment}: {epochs * count:,} images, judged by {n:,}; {facts['hardware']}, torch {facts['torch']}"
    )
    print(measuring.table(sorted(means, key=lambda row: row["distance"]), shown))


if __name__ == "__main__":
    command_line.run_command_line("-m benchmarks.quality", {"quality": quality}, LIMITS)
