"""How speed is measured: variants take turns, and the machine's own limit is measured beside them.

Reading order: turns, floating-point operations, the machine, tables and files.
"""

import copy
import datetime
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from machinery.basics import append_rows
from machinery.devices import has_bfloat16

# calls that are not measured: kernels are chosen, moments allocated, networks compiled in them
WARM_UP = 3
TURN_SECONDS = 0.5  # a turn is as many calls as fill this time, at least one
LIMITS = {"rounds": (1, 1000), "batch_size": (1, 10**9)}
RESULTS = Path("results", "benchmarks")

# ---- turns ---------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """What one variant took."""

    seconds: list[float]  # of one call, in every round
    # bytes on the GPU: weights, gradients, moments, activations at their peak; None elsewhere
    memory: int | None


def seconds_per_call(call: Callable[[], None], times: int, device: torch.device) -> float:
    """Seconds of one call; the clock stops when the device has finished.

    A GPU only queues what it is given, so it is waited for.
    """

    def synchronize() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronize()
    return (time.perf_counter() - start) / times


def take_turns(
    builders: dict[str, Callable[[], Callable[[], None]]], rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Measure variants in turn, within one process.

    So other load on the machine affects all of them alike.

    Every second round goes backwards: no variant always follows the same neighbour.

    Args:
        builders: of each variant, a function that sets it up and gives the call to be measured.
        rounds: turns of each variant.
        device: where the calls do their work.
    """

    def allocated() -> int:
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    calls = {}
    times = {}  # calls in a turn
    held = {}  # bytes, kept between calls
    peaks = dict.fromkeys(builders, 0)  # bytes, more than that, within calls
    for name, build in builders.items():
        print(f"warming up: {name}", file=sys.stderr, flush=True)
        before = allocated()
        calls[name] = build()
        for _ in range(WARM_UP):
            seconds = seconds_per_call(calls[name], 1, device)
        times[name] = max(1, math.ceil(TURN_SECONDS / seconds))
        held[name] = allocated() - before
    taken = {name: [] for name in builders}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name in list(builders) if number % 2 == 0 else reversed(builders):
            before = allocated()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken[name].append(seconds_per_call(calls[name], times[name], device))
            if device.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) - before)
    memory = {
        name: held[name] + peaks[name] if device.type == "cuda" else None for name in builders
    }
    return {name: Timing(taken[name], memory[name]) for name in builders}


class Spread(NamedTuple):
    """A figure over the rounds."""

    median: float
    minimum: float
    maximum: float


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def rates(timing: Timing, images: int) -> Spread:
    """Images per second, of calls that work on so many images."""
    return spread([images / seconds for seconds in timing.seconds])


def milliseconds(timing: Timing, pieces: int) -> Spread:
    """Milliseconds per piece, of calls that do so many pieces of work."""
    return spread([1000 * seconds / pieces for seconds in timing.seconds])


def share_of_peak(flop: float, per_second: float, peak: float) -> float:
    """How near pieces of so many operations, so many per second, come to the machine's peak."""
    return flop * per_second / peak


def gains(without: Timing, with_it: Timing) -> Spread:
    """How many times faster `with_it` is, from the two turns of each round."""
    return spread([a / b for a, b in zip(without.seconds, with_it.seconds, strict=True)])


# ---- floating-point operations -------------------------------------------------------------------


def count_flop(network: nn.Module, img_size: int, training: bool) -> float:
    """Operations that one RGB image takes, forward, or (in training) forward and backward.

    An addition and a multiplication are two.

    Convolutions and matrix products alone are counted, on the meta device, where nothing is
    computed.
    """
    shadow = copy.deepcopy(network).to("meta")
    x = torch.zeros(1, 3, img_size, img_size, device="meta")
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        answer = shadow(x, torch.ones(1, dtype=torch.long, device="meta"))
        if training:
            getattr(answer, "sample", answer).sum().backward()  # diffusers wraps its answer
    return counter.get_total_flops()


FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def convolutions(device: torch.device, precisions: list[str], small: bool) -> dict[str, Callable]:
    """Builders of large 3x3 convolutions: the best that a convolutional network can hope for here.

    They are named `fp32 NCHW`, `fp32 NHWC` and so on, and take part in the rounds like any variant.
    """
    batch, channels, side = peak_shape(device, small)

    def builder(precision: str, memory_format: torch.memory_format) -> Callable:
        def build() -> Callable[[], None]:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            images = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
            weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
            images = images.to(memory_format=memory_format)
            weight = weight.to(memory_format=memory_format)
            return lambda: F.conv2d(images, weight, padding=1)

        return build

    return {
        f"{precision} {name}": builder(precision, FORMATS[name])
        for precision in precisions
        for name in FORMATS
    }


def peak_shape(device: torch.device, small: bool) -> tuple[int, int, int]:
    """Batch, channels and side of the convolution.

    77 GFLOP on a CPU, 1.2 TFLOP on a GPU, 1.2 GFLOP for a trial.
    """
    if small:
        return 4, 64, 64
    return (16, 256, 64) if device.type == "cpu" else (64, 512, 64)


def peaks_of(timings: dict[str, Timing], device: torch.device, small: bool) -> dict[str, float]:
    """Operations per second by precision, from the convolutions.

    The better memory format counts, in its best round.
    """
    batch, channels, side = peak_shape(device, small)
    flop = 2 * batch * side * side * channels * channels * 9
    best = {}
    for name, timing in timings.items():
        precision = name.split()[0]
        best[precision] = max(best.get(precision, 0), flop / min(timing.seconds))
    return best


# ---- the machine ---------------------------------------------------------------------------------


def precisions_of(device: torch.device) -> list[str]:
    """fp32, and bf16 where the hardware has it; says so where it has not."""
    if has_bfloat16(device):
        return ["fp32", "bf16"]
    print(f"left out: bf16, which {hardware(device)} does not compute in")
    return ["fp32"]


def hardware(device: torch.device) -> str:
    """The name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", facts.read_text()) if facts.exists() else None
    return named.group(1) if named else platform.processor() or platform.machine()


def facts_of(device: torch.device) -> dict[str, str]:
    """What a figure means nothing without, the same in every row of a file."""
    variables = sorted(os.environ.items())
    tuned = [f"{name}={value}" for name, value in variables if name.startswith("MALLOC_")]
    return {
        "device": str(device),
        "hardware": hardware(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "malloc": " ".join(tuned),
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
    }


# ---- tables and files ----------------------------------------------------------------------------

# Columns of files: what was measured, `cells_of`, and what a figure means nothing without.
WHAT = ("benchmark", "variant", "precision", "img_size", "batch_size", "rounds")
SIZE = ("weights_m", "gflop_per_img", "peak_tflop_per_s", "share_of_peak", "memory_gb")
WHERE = ("device", "hardware", "threads", "torch", "malloc", "date")


def cells_of(
    network: nn.Module, flop: float, per_second: float, peak: float, timing: Timing | None
) -> dict:
    """The cells of a network's row that depend on its size.

    Args:
        network: whose weights are counted.
        flop: operations that an image (and step) takes.
        per_second: images (and steps) per second.
        peak: operations per second of the machine.
        timing: whose memory is told, if there is one.
    """
    return {
        "weights_m": sum(parameter.numel() for parameter in network.parameters()) / 1e6,
        "gflop_per_img": flop / 1e9,
        "peak_tflop_per_s": peak / 1e12,
        "share_of_peak": share_of_peak(flop, per_second, peak),
        "memory_gb": timing.memory / 1e9 if timing and timing.memory is not None else None,
    }


def table(rows: list[dict], columns: dict[str, tuple[str, str]]) -> str:
    """Rows as plain text, the first column to the left, a dash for None.

    Args:
        rows: cells by column.
        columns: the title and the format of every column that is shown, such as ("min", ".1f").
    """

    def text_of(cell, form: str) -> str:
        return "-" if cell is None else format(cell, form)

    lines = [[title for title, _ in columns.values()]]
    for row in rows:
        lines.append([text_of(row[name], form) for name, (_, form) in columns.items()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "-" * (sum(widths) + 2 * len(widths) - 2), *texts[1:]])


def add_rows(path: Path, rows: list[dict], columns: tuple[str, ...]) -> None:
    """Add rows to a CSV file, which keeps what was measured before; None becomes an empty cell."""

    def rounded(cell):
        return f"{cell:.6g}" if isinstance(cell, float) else cell

    cells = [[rounded(row.get(name)) for name in columns] for row in rows]
    append_rows(path, columns, cells)


def publish(
    title: str,
    rows: list[dict],
    shown: dict[str, tuple[str, str]],
    path: Path,
    columns: tuple[str, ...],
    device: torch.device,
    peaks: dict[str, float],
) -> None:
    """Print a table of `shown` columns, and add all rows to the file.

    Above the table: what was measured, where and when, and the machine's peaks.
    """
    facts = facts_of(device)
    machine = f"{facts['hardware']}, {facts['threads']} CPU threads"
    print(f"\n{title}\n{machine}, torch {facts['torch']}, {facts['date']}")
    if facts["malloc"]:
        print(facts["malloc"])
    if peaks:
        best = [f"{flop / 1e12:.3g} TFLOP/s in {precision}" for precision, flop in peaks.items()]
        print(f"a 3x3 convolution at its best: {', '.join(best)}")
    print(f"\n{table(rows, shown)}\n")
    add_rows(path, [row | facts for row in rows], columns)
    print(f"{len(rows)} rows added to {path}")
