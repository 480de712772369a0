"""Milliseconds per image and step in sampling: ours, diffusers' and lucidrains' loop.

    python -m benchmarks.sample_speed --quick
    python -m benchmarks.sample_speed

What is measured, and how it is kept fair, stands in README.md in this folder.
"""

import torch

from benchmarks import measuring, peers
from machinery import command_line, devices

COLUMNS = (*measuring.WHAT, "steps", "ms", "ms_min", "ms_max", "ratio", *measuring.SIZE)
COLUMNS += measuring.WHERE
SHOWN = {
    "variant": ("variant", ""),
    "batch_size": ("batch", ""),
    "weights_m": ("weights M", ".1f"),
    "gflop_per_img": ("GFLOP/img", ".1f"),
    "ms": ("ms/img/step", ".3f"),
    "ms_min": ("min", ".3f"),
    "ms_max": ("max", ".3f"),
    "share_of_peak": ("of peak", ".1%"),
    "memory_gb": ("GB", ".2f"),
    "ratio": ("ratio", ".2f"),
}
BATCH_SIZES = (16, 1)
STEPS = 5  # of sampling; all steps take the same time


def measure(
    shape: dict, rounds: int, device: torch.device, compiled: bool, small: bool
) -> tuple[list[dict], dict[str, float]]:
    """One row per batch size and variant, and the machine's peaks."""
    precisions = measuring.precisions_of(device)
    side = shape["img_size"]
    networks = peers.all_networks(shape)
    found = {}
    for batch_size in BATCH_SIZES:
        noise = torch.randn(batch_size, 3, side, side, device=device)
        variants = peers.variants(networks, peers.SAMPLING, (noise, STEPS), precisions, compiled)
        found |= {(batch_size, name): variant for name, variant in variants.items()}
    convolutions = measuring.convolutions(device, precisions, small)
    builders = {
        f"{name}, batch {batch_size}": variant.build
        for (batch_size, name), variant in found.items()
    }
    timings = measuring.take_turns(builders | convolutions, rounds, device)
    peaks = measuring.peaks_of({name: timings[name] for name in convolutions}, device, small)

    rows = []
    for (batch_size, name), (precision, network, _) in found.items():
        timing = timings[f"{name}, batch {batch_size}"]
        ms = measuring.milliseconds(timing, batch_size * STEPS)
        flop = measuring.count_flop(network, side, training=False)
        row = {
            "benchmark": "sample_speed",
            "variant": name,
            "precision": precision,
            "img_size": side,
            "batch_size": batch_size,
            "rounds": rounds,
            "steps": STEPS,
            "ms": ms.median,
            "ms_min": ms.minimum,
            "ms_max": ms.maximum,
        }
        row |= measuring.cells_of(network, flop, 1000 / ms.median, peaks[precision], timing)
        rows.append(row)
    baselines = {row["batch_size"]: row["ms"] for row in rows if row["variant"] == peers.BASELINE}
    for row in rows:
        row["ratio"] = baselines[row["batch_size"]] / row["ms"] if baselines else None
    return rows, peaks


def sample_speed(
    quick: bool = False, rounds: int | str = "auto", compile: bool = False, device: str = "auto"
) -> None:
    """Milliseconds per image and step in sampling, ours and others', in batches of 16 and of 1.

        python -m benchmarks.sample_speed --quick

    Prints a table and adds its rows to results/benchmarks/sample_speed.csv.

    Args:
        quick: a small network and few rounds, to see that all works; the figures mean little.
        rounds: how often every variant is measured, in turn; auto is 5, or 3 if quick.
        compile: also the compiled networks on a CPU, which takes minutes; on a GPU they are always
            there.
        device: auto, cpu, cuda, cuda:N, mps or xpu.

    Raises:
        UserError: a flag that does not fit, or a file of other columns in the way.
    """
    command_line.check_limits(locals(), measuring.LIMITS)
    place = devices.pick_device(device)
    path = measuring.RESULTS / "sample_speed.csv"
    command_line.check_table(path, COLUMNS)
    rounds = (3 if quick else 5) if rounds == "auto" else rounds
    shape = peers.SMALL if quick else peers.REFERENCE
    compiled = compile or place.type == "cuda"
    rows, peaks = measure(shape, rounds, place, compiled, quick)
    title = f"sampling at {shape['img_size']}x{shape['img_size']}, {rounds} rounds"
    measuring.publish(title, rows, SHOWN, path, COLUMNS, place, peaks)


if __name__ == "__main__":
    command_line.run_command_line(
        "-m benchmarks.sample_speed", {"sample_speed": sample_speed}, measuring.LIMITS
    )
