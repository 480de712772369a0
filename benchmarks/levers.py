"""Single levers of speed, each switched on against ours without it, the two measured in turn.

    python -m benchmarks.levers --quick
    python -m benchmarks.levers

What is measured, and how it is kept fair, stands in README.md in this folder.
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import modules
from benchmarks import measuring, peers
from benchmarks.measuring import FORMATS
from machinery import command_line, devices

COLUMNS = (*measuring.WHAT, "without", "with", "gain", "gain_min", "gain_max", *measuring.WHERE)
SHOWN = {
    "variant": ("lever", ""),
    "precision": ("precision", ""),
    "batch_size": ("batch", ""),
    "without": ("img/s without", ".2f"),
    "with": ("img/s with", ".2f"),
    "gain": ("gain", ".3f"),
    "gain_min": ("min", ".3f"),
    "gain_max": ("max", ".3f"),
}
GPU_BATCH_SIZES = (16, 32, 64, 128, 256)


class Lever(NamedTuple):
    """Two ways to do the same work."""

    name: str
    precision: str
    batch_sizes: tuple[int, int]  # without and with the lever
    without: Callable[[], Callable]
    with_it: Callable[[], Callable]


def with_tf32(build: Callable[[], Callable], on: bool) -> Callable[[], None]:
    """The call that `build` gives, with TF32 (float32 products on tensor cores) switched on or off.

    The settings of before are put back after each call.
    """

    def build_call() -> Callable[[], None]:
        call = build()

        def call_with_tf32() -> None:
            before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
            call()
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

        return call_with_tf32

    return build_call


def resample_plainly(resample: modules.Resample, x: Tensor) -> Tensor:
    """What `Resample` computes: every pixel four times, then 3x3; or half the resolution."""
    twice = F.interpolate(x, scale_factor=2.0, mode="nearest") if resample.up else resample.pad(x)
    return resample.conv(twice)


def upsampled_plainly(build: Callable[[], Callable]) -> Callable[[], Callable]:
    """The call that `build` gives, with `resample_plainly` while it runs."""

    def build_call() -> Callable[[], None]:
        call = build()

        def call_plainly() -> None:
            ours = modules.Resample.forward
            modules.Resample.forward = resample_plainly
            call()
            modules.Resample.forward = ours

        return call_plainly

    return build_call


def with_blocks(build: Callable[[], Callable], kept: bool) -> Callable[[], Callable]:
    """The call that `build` gives, with large blocks of memory kept for the next step, or not."""

    def build_call() -> Callable[[], None]:
        call = build()

        def call_with_blocks() -> None:
            devices.keep_memory()
            if not kept:  # where glibc's own rule ends up
                ctypes.CDLL("libc.so.6").mallopt(-1, 2**26)
            call()

        return call_with_blocks

    return build_call


def levers_of(shape: dict, device: torch.device, batch_size: int, compiled: bool) -> list[Lever]:
    """All levers that this machine has; says which it has not."""
    precisions = measuring.precisions_of(device)
    best = precisions[-1]
    side = shape["img_size"]
    network = peers.our_network(shape)
    found = []

    def train(
        precision: str = best, batch_size: int = batch_size, **options
    ) -> Callable[[], Callable]:
        images = torch.rand(batch_size, 3, side, side, device=device) * 2 - 1
        return functools.partial(peers.train_ours, network, precision, images, **options)

    def sample(
        precision: str = best, batch_size: int = batch_size, **options
    ) -> Callable[[], Callable]:
        noise = torch.randn(batch_size, 3, side, side, device=device)
        return functools.partial(peers.sample_ours, network, precision, noise, 1, **options)

    def add(
        name: str, without: Callable, with_it: Callable, precision: str = best, sizes: tuple = ()
    ) -> None:
        found.append(Lever(name, precision, sizes or (batch_size, batch_size), without, with_it))

    for name, work in (("training", train), ("sampling", sample)):
        nchw, nhwc = (work(memory_format=FORMATS[layout]) for layout in ("NCHW", "NHWC"))
        add(f"{name}: channels_last instead of contiguous", nchw, nhwc)
        if best == "bf16":
            add(f"{name}: bf16 instead of fp32", work("fp32"), work())
        for precision in precisions:
            ours = work(precision)
            add(f"{name}: upsampling in one convolution", upsampled_plainly(ours), ours, precision)
        if compiled:
            add(f"{name}: torch.compile", work(), work(compiled=True))
    if device.type == "cpu" and sys.platform == "linux":
        for precision in precisions:
            kept, given_back = (with_blocks(sample(precision), kept) for kept in (True, False))
            add("sampling: large blocks of memory kept", given_back, kept, precision)
    add("training: Muon instead of AdamW", train(optimizer="adamw"), train())
    if device.type != "cuda":
        print("left out: TF32, CUDA graphs and large batches, which are for NVIDIA GPUs")
        return found
    for name, work in (("training", train), ("sampling", sample)):
        without, with_it = (with_tf32(work("fp32"), on=on) for on in (False, True))
        add(f"{name}: TF32", without, with_it, "fp32")
    for size in (batch_size, 1):
        graphs = sample(batch_size=size), sample(batch_size=size, graph=True)
        add("sampling: CUDA graph", *graphs, sizes=(size, size))
    first, *larger = GPU_BATCH_SIZES
    for name, work in (("training", train), ("sampling", sample)):
        for size in larger:
            without, with_it = (work(batch_size=number) for number in (first, size))
            add(f"{name}: a batch instead of {first}", without, with_it, sizes=(first, size))
    return found


def measure(lever: Lever, rounds: int, device: torch.device) -> dict:
    """The cells of a lever: its speed without and with it, and their ratio over the rounds.

    Speeds are images (and steps) per second.
    """
    timings = measuring.take_turns(
        {"without": lever.without, "with": lever.with_it}, rounds, device
    )
    without, with_it = (
        measuring.Timing([seconds / size for seconds in timings[name].seconds], None)
        for name, size in zip(("without", "with"), lever.batch_sizes, strict=True)
    )
    gain = measuring.gains(without, with_it)
    return {
        "variant": lever.name,
        "precision": lever.precision,
        "batch_size": lever.batch_sizes[1],
        "without": measuring.rates(without, 1).median,
        "with": measuring.rates(with_it, 1).median,
        "gain": gain.median,
        "gain_min": gain.minimum,
        "gain_max": gain.maximum,
    }


def levers(
    quick: bool = False,
    rounds: int | str = "auto",
    batch_size: int | str = "auto",
    compile: bool = False,
    device: str = "auto",
) -> None:
    """What single levers of speed gain: layout, precision, optimizer, compiler, CUDA graphs.

        python -m benchmarks.levers --quick

    Prints a table and adds its rows to results/benchmarks/levers.csv.

    Args:
        quick: a small network and few rounds, to see that all works; the figures mean little.
        rounds: how often every pair is measured, in turn; auto is 7, or 3 if quick.
        batch_size: images per step; auto is 16, or 8 if quick.
        compile: also torch.compile on a CPU, which takes minutes; on a GPU it is always there.
        device: auto, cpu, cuda, cuda:N, mps or xpu.

    Raises:
        UserError: a flag that does not fit, or a file of other columns in the way.
    """
    command_line.check_limits(locals(), measuring.LIMITS)
    place = devices.pick_device(device)
    path = measuring.RESULTS / "levers.csv"
    command_line.check_table(path, COLUMNS)
    rounds = (3 if quick else 7) if rounds == "auto" else rounds
    batch_size = (8 if quick else 16) if batch_size == "auto" else batch_size
    shape = peers.SMALL if quick else peers.REFERENCE
    rows = []
    for lever in levers_of(shape, place, batch_size, compile or place.type == "cuda"):
        print(lever.name)
        what = {"benchmark": "levers", "img_size": shape["img_size"], "rounds": rounds}
        rows.append(what | measure(lever, rounds, place))
    title = f"single levers at {shape['img_size']}x{shape['img_size']}, {rounds} rounds"
    measuring.publish(title, rows, SHOWN, path, COLUMNS, place, {})


if __name__ == "__main__":
    command_line.run_command_line("-m benchmarks.levers", {"levers": levers}, measuring.LIMITS)
