"""How fast is a GPU: training and sampling in every way that may become the default.

python -m benchmarks.h100.speed
python -m benchmarks.h100.speed --device=cpu --quick
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import levers, measuring, peers
from benchmarks.h100.norms import ChannelSumsNorm, LowPrecisionNorm, replace_norms
from benchmarks.h100.report import LIMITS, Report
from machinery import command_line, devices
from modules import Resample

TRAINING_GOAL = 3500  # images per second, the default network at 64x64, batch 128, on an H100
PEER_GOAL = 2  # times diffusers' step in the same precision, with the same network
SAMPLING_GOAL = 1.5  # milliseconds per step of 16 images


class Way(NamedTuple):
    """A way to train."""

    name: str
    batch_size: int
    norm: type[nn.GroupNorm] = nn.GroupNorm
    compiled: bool = False
    searches: bool = False  # cudnn.benchmark
    folded: bool = True  # upsampling in one convolution


def median_seconds(call: Callable[[], None], device: torch.device, seconds: float) -> float:
    """Of one call, over so many seconds of calls; the first three are not counted."""
    for _ in range(3):
        measuring.seconds_per_call(call, 1, device)
    taken, end = [], time.monotonic() + seconds
    while time.monotonic() < end or not taken:
        taken.append(measuring.seconds_per_call(call, 5, device))
    return statistics.median(taken)


class Bench:
    """What is measured, and where."""

    def __init__(self, device: torch.device, quick: bool, report: Report):
        self.device = device
        self.quick = quick
        self.report = report
        self.seconds = 0.1 if quick else 3.0
        self.shape = peers.SMALL if quick else peers.REFERENCE
        self.network = peers.our_network(self.shape)
        self.best = measuring.precisions_of(device)[-1]
        self.is_gpu = device.type != "cpu"

    def images(self, count: int) -> torch.Tensor:
        side = self.shape["img_size"]
        return torch.rand(count, 3, side, side, device=self.device) * 2 - 1

    def can_compile(self, name: str) -> bool:
        if not self.is_gpu:
            self.report.leave_out(name, "compiling is for GPUs")
        elif not self.report.has_time(100):
            self.report.leave_out(name, "no time")
        return self.is_gpu and self.report.has_time(100)

    # ---- training

    def train(self, way: Way) -> float | None:
        """Images per second; None where it is left out."""
        name = f"training, batch {way.batch_size}: {way.name}"
        if way.compiled and not self.can_compile(name):
            return None
        speed = None
        with self.report.part(name):
            training = peers.our_training(self.network, self.best, self.images(way.batch_size))
            replace_norms(training.network, way.norm)
            forward = Resample.forward
            torch.backends.cudnn.benchmark = way.searches
            Resample.forward = forward if way.folded else levers.resample_plainly
            try:
                if way.compiled:
                    training.compile()
                step = lambda: training.advance(0.5)  # noqa: E731
                speed = way.batch_size / median_seconds(step, self.device, self.seconds)
            finally:
                Resample.forward = forward
                torch.backends.cudnn.benchmark = False
            self.report.line(name, speed, "img/s")
        return speed

    def train_all(self) -> None:
        sizes = (4, 8) if self.quick else (32, 128, 256)
        usual = sizes[1]
        ways = [Way("eager", size) for size in sizes]
        ways += [
            Way("eager, upsampling apart", usual, folded=False),
            Way("eager, GroupNorm in low precision", usual, LowPrecisionNorm),
            Way("eager, the same, cudnn.benchmark", usual, LowPrecisionNorm, searches=True),
            Way("compiled", usual, compiled=True),
            Way("compiled, channel sums", usual, ChannelSumsNorm, True),
            Way("compiled, the same, cudnn.benchmark", usual, ChannelSumsNorm, True, True),
            Way("compiled", sizes[0], compiled=True),
        ]
        if not self.is_gpu:
            self.train(Way("eager, channel sums", usual, ChannelSumsNorm))
        speeds = [speed for way in ways if (speed := self.train(way)) is not None]
        best = max(speeds)
        self.report.line("the best of training", best, "img/s", self.quick or best >= TRAINING_GOAL)
        if peers.is_installed("diffusers"):
            twin = peers.diffusers_twin(self.network, self.shape)
            step = peers.train_diffusers(twin, self.best, self.images(usual))
            theirs = usual / median_seconds(step, self.device, self.seconds)
            self.report.line(f"training, batch {usual}: diffusers, {self.best}", theirs, "img/s")
            ratio = best / theirs
            name = "the best of training, against diffusers"
            self.report.line(name, ratio, "times", self.quick or ratio >= PEER_GOAL)

    def profile(self) -> None:
        """Where the time of a step goes, and a trace to look at."""
        training = peers.our_training(
            self.network, self.best, self.images(8 if self.quick else 128)
        )
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        training.advance(0.5)
        with torch.profiler.profile(activities=kinds) as profile:
            for _ in range(3):
                training.advance(0.5)
        key = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))
        measuring.RESULTS.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(measuring.RESULTS / "trace.json.gz"))

    # ---- sampling

    def sample(self, name: str, count: int, low: bool = False, **options) -> float | None:
        """Milliseconds of a step of so many images; None where it is left out.

        With `low`, the weights themselves are bfloat16, and nothing is cast on the way.
        """
        name = f"sampling, {count} images: {name}"
        if options.get("compiled") and not self.can_compile(name):
            return None
        if options.get("graph") and self.device.type != "cuda":
            self.report.leave_out(name, "CUDA graphs are for NVIDIA GPUs")
            return None
        ms = None
        with self.report.part(name):
            network = copy.deepcopy(self.network)
            if low:
                network.to(torch.bfloat16)
                network.time_embedding.register_forward_pre_hook(
                    lambda _, inputs: inputs[0].bfloat16()
                )
                network.conv_in.register_forward_pre_hook(lambda _, inputs: inputs[0].bfloat16())
            steps = 2 if self.quick else 15
            noise = torch.randn_like(self.images(count))
            precision = "fp32" if low else self.best
            call = peers.sample_ours(network, precision, noise, steps, **options)
            ms = 1000 * median_seconds(call, self.device, self.seconds) / steps
            self.report.line(name, ms, "ms/step")
        return ms

    def sample_all(self) -> None:
        few, many = (4, 8) if self.quick else (16, 256)
        found = [
            self.sample("eager", few),
            self.sample("eager, bfloat16 weights", few, low=True),
            self.sample("CUDA graph", few, graph=True),
            self.sample("CUDA graph, bfloat16 weights", few, low=True, graph=True),
            self.sample("compiled, CUDA graph", few, compiled=True, graph=True),
            self.sample(
                "compiled, CUDA graph, bfloat16 weights", few, True, compiled=True, graph=True
            ),
        ]
        best = min(ms for ms in found if ms is not None)
        is_ok = self.quick or best <= SAMPLING_GOAL
        self.report.line(f"the best of sampling {few} images", best, "ms/step", is_ok)
        self.sample("eager", many)
        self.sample("compiled", many, compiled=True)


def speed(device: str = "auto", quick: bool = False, minutes: float = 9.0) -> None:
    """Images per second in training and milliseconds per step of sampling, in many ways.

        python -m benchmarks.h100.speed

    Args:
        device: auto, cpu, cuda, cuda:N, mps or xpu.
        quick: a small network and short turns, to see that all works; the figures mean nothing.
        minutes: nothing is compiled that would not be done by then.
    """
    command_line.check_limits(locals(), LIMITS)
    place = devices.pick_device(device)
    report = Report(minutes)
    print(measuring.hardware(place), "torch", torch.__version__)
    bench = Bench(place, quick, report)
    # what must not be missed comes first
    for part in (bench.sample_all, bench.train_all, bench.profile):
        with report.part(part.__name__):
            part()
    report.close()


if __name__ == "__main__":
    command_line.run_command_line("-m benchmarks.h100.speed", {"speed": speed}, LIMITS)
