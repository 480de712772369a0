"""Images per second in training: ours, diffusers' and lucidrains' step, and the whole command.

    python -m benchmarks.train_speed --quick
    python -m benchmarks.train_speed

What is measured, and how it is kept fair, stands in README.md in this folder.
"""

import contextlib
import csv
import io
import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ddpm
from benchmarks import measuring, peers
from benchmarks.measuring import Spread, Timing
from machinery import command_line, devices, journal

COLUMNS = (*measuring.WHAT, "img_per_s", "img_per_s_min", "img_per_s_max", "ratio")
COLUMNS += (*measuring.SIZE, *measuring.WHERE)
SHOWN = {
    "variant": ("variant", ""),
    "weights_m": ("weights M", ".1f"),
    "gflop_per_img": ("GFLOP/img", ".1f"),
    "img_per_s": ("img/s", ".2f"),
    "img_per_s_min": ("min", ".2f"),
    "img_per_s_max": ("max", ".2f"),
    "share_of_peak": ("of peak", ".1%"),
    "memory_gb": ("GB", ".2f"),
    "ratio": ("ratio", ".2f"),
}


def end_to_end(shape: dict, batch_size: int, rows: int, device: torch.device) -> Spread:
    """Images per second that `ddpm.train` itself logs.

    It reads a folder of images, writes its log and saves, as in any training.

    Args:
        shape: the network's settings.
        batch_size: images per step.
        rows: how many rows of its log are looked at; one more is made before, whose steps warm up.
        device: where it trains.
    """
    batches = 8
    side = shape["img_size"]
    epochs = math.ceil((rows + 1) * journal.ROW_EVERY / batches)
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("pictures").mkdir()
            for number in range(batches * batch_size):
                generator = np.random.default_rng(number)
                pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(Path("pictures", f"{number:06d}.png"))
            settings = shape | {
                "img_size": (side,),
                "batch_size": batch_size,
                "epochs": epochs,
                "device": str(device),
            }
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                ddpm.train(dataset="pictures", run_name="speed", sample_every=0, **settings)
            with open(Path("results", "speed", "log.csv"), newline="") as file:
                speeds = [float(row["img_per_s"]) for row in csv.DictReader(file)]
        finally:
            os.chdir(here)
    assert len(speeds) > rows, f"{len(speeds)} rows in log.csv, {rows + 1} were expected"
    return measuring.spread(speeds[1 : rows + 1])


def measure(
    shape: dict, batch_size: int, rounds: int, device: torch.device, compiled: bool, small: bool
) -> tuple[list[dict], dict[str, float]]:
    """One row per variant, and the machine's peaks.

    The last two rows are the bare step again, and `ddpm.train`.
    """
    precisions = measuring.precisions_of(device)
    side = shape["img_size"]
    images = torch.rand(batch_size, 3, side, side, device=device) * 2 - 1
    networks = peers.all_networks(shape)
    found = peers.variants(networks, peers.TRAINING, (images,), precisions, compiled)
    convolutions = measuring.convolutions(device, precisions, small)
    builders = {name: variant.build for name, variant in found.items()}
    timings = measuring.take_turns(builders | convolutions, rounds, device)
    peaks = measuring.peaks_of({name: timings[name] for name in convolutions}, device, small)
    rows = []

    def add(name: str, variant: str, speed: Spread, timing: Timing | None) -> None:
        precision, network, _ = found[variant]
        flop = measuring.count_flop(network, side, training=True)
        row = {
            "benchmark": "train_speed",
            "variant": name,
            "precision": precision,
            "img_size": side,
            "batch_size": batch_size,
            "rounds": rounds,
            "img_per_s": speed.median,
            "img_per_s_min": speed.minimum,
            "img_per_s_max": speed.maximum,
        }
        row |= measuring.cells_of(network, flop, speed.median, peaks[precision], timing)
        rows.append(row)

    for name in found:
        add(name, name, measuring.rates(timings[name], batch_size), timings[name])
    bare = f"ours, {precisions[-1]}"
    print("ddpm.train itself", file=sys.stderr, flush=True)
    whole = end_to_end(shape, batch_size, rounds, device)
    again = f"{bare}, again"
    timing = measuring.take_turns({again: found[bare].build}, rounds, device)[again]
    add(again, bare, measuring.rates(timing, batch_size), timing)
    add(f"{bare}, ddpm.train", bare, whole, None)
    baseline = next((row["img_per_s"] for row in rows if row["variant"] == peers.BASELINE), None)
    for row in rows:
        row["ratio"] = baseline and row["img_per_s"] / baseline
    return rows, peaks


def overhead(rows: list[dict]) -> str:
    """What reading, logging and saving cost, in words.

    `ddpm.train` is compared with the bare step before and after it.
    """
    speeds = {row["variant"]: row["img_per_s"] for row in rows}
    *_, again, whole = speeds
    before = speeds[again.removesuffix(", again")]
    after = speeds[again]
    cost = 1 - speeds[whole] / ((before + after) / 2)
    drift = f"whose own speed moved by {after / before - 1:+.1%} meanwhile"
    return f"ddpm.train is {cost:.1%} slower than the bare step, {drift}"


def train_speed(
    quick: bool = False,
    rounds: int | str = "auto",
    batch_size: int | str = "auto",
    compile: bool = False,
    device: str = "auto",
) -> None:
    """Images per second in training, ours and others'.

        python -m benchmarks.train_speed --quick

    Prints a table and adds its rows to results/benchmarks/train_speed.csv.

    Args:
        quick: a small network and few rounds, to see that all works; the figures mean little.
        rounds: how often every variant is measured, in turn; auto is 5, or 3 if quick.
        batch_size: images per step; auto is 16 on a CPU, 64 on a GPU, 8 if quick.
        compile: also the compiled networks on a CPU, which takes minutes; on a GPU they are always
            there.
        device: auto, cpu, cuda, cuda:N, mps or xpu.

    Raises:
        UserError: a flag that does not fit, or a file of other columns in the way.
    """
    command_line.check_limits(locals(), measuring.LIMITS)
    place = devices.pick_device(device)
    path = measuring.RESULTS / "train_speed.csv"
    command_line.check_table(path, COLUMNS)
    rounds = (3 if quick else 5) if rounds == "auto" else rounds
    if batch_size == "auto":
        batch_size = 8 if quick else 16 if place.type == "cpu" else 64
    shape = peers.SMALL if quick else peers.REFERENCE
    compiled = compile or place.type == "cuda"
    rows, peaks = measure(shape, batch_size, rounds, place, compiled, quick)
    side = shape["img_size"]
    title = f"training at {side}x{side}, batches of {batch_size}, {rounds} rounds"
    measuring.publish(title, rows, SHOWN, path, COLUMNS, place, peaks)
    print(overhead(rows))


if __name__ == "__main__":
    command_line.run_command_line(
        "-m benchmarks.train_speed", {"train_speed": train_speed}, measuring.LIMITS
    )
