"""Is a GPU right? Answers, gradients, steps, memory, images, against those of the CPU.

python -m benchmarks.h100.correct
python -m benchmarks.h100.correct --device=cpu --quick
"""

import contextlib
import copy
import csv
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm
from benchmarks import measuring, peers
from benchmarks.h100.report import LIMITS, Report
from machinery import command_line, devices
from modules import UNet


class Subject:
    """A network with random weights, images to learn from, and where to compute."""

    def __init__(self, device: torch.device, quick: bool):
        self.device = device
        self.quick = quick
        self.shape = peers.SMALL if quick else peers.REFERENCE
        self.network = peers.our_network(self.shape)
        self.count = 8 if quick else 32  # images in a batch
        side = self.shape["img_size"]
        torch.manual_seed(1)
        self.images = (torch.rand(self.count, 3, side, side) * 2 - 1).to(device)
        self.best = measuring.precisions_of(device)[-1]

    def training(self, precision: str = "", images: Tensor | None = None, **settings):
        images = self.images if images is None else images
        return peers.our_training(self.network, precision or self.best, images, **settings)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Within this block float32 is float32 on tensor cores, too."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def apart(one: Tensor, two: Tensor) -> float:
    """The norm of the difference, as a share of the second's norm; in float64, on the CPU."""
    one, two = one.detach().cpu().double(), two.detach().cpu().double()
    return ((one - two).norm() / two.norm()).item()


def flat_gradient(training: ddpm.Training) -> Tensor:
    training.compute_gradient()
    found = torch.cat([each.grad.flatten() for each in training.network.parameters()])
    training.optimizer.zero_grad()
    return found.cpu().double()


def check_answers(subject: Subject, report: Report) -> None:
    """The network's output against the CPU's in float64."""
    x = torch.randn(4, *subject.images.shape[1:])
    t = torch.tensor([1, 30, 500, 999])
    exact = copy.deepcopy(subject.network).double()
    exact.time_embedding.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    network = copy.deepcopy(subject.network).to(
        subject.device, memory_format=devices.layout(subject.device)
    )
    with torch.no_grad(), without_tf32():
        expected = exact(x.double(), t)
        for precision, limit in (("fp32", 1e-5), ("bf16", 2e-2)):
            with peers.autocast(subject.device, precision):
                found = network(x.to(subject.device), t.to(subject.device))
            error = apart(found, expected)
            name = f"output in {precision}, against float64 on the CPU"
            report.line(name, error, "", error < limit)


def check_gradients(subject: Subject, report: Report) -> None:
    """A whole batch's gradient against micro-batches, recomputing, and the best precision's."""
    with without_tf32():
        whole = flat_gradient(subject.training("fp32"))
        for name, settings in (
            ("micro-batches of 7", {"micro_batch": 7}),
            ("gradient checkpointing", {"grad_checkpointing": True}),
        ):
            error = apart(flat_gradient(subject.training("fp32", **settings)), whole)
            report.line(f"gradient with {name}, against the whole batch", error, "", error < 1e-4)
    cosine = F.cosine_similarity(flat_gradient(subject.training()), whole, dim=0).item()
    report.line(f"cosine of the gradients in {subject.best} and fp32", cosine, "", cosine > 0.99)


def check_waits(subject: Subject, report: Report) -> None:
    """PyTorch itself raises where a step waits for the GPU."""
    if subject.device.type != "cuda":
        return report.leave_out("five steps that wait for nothing", "for NVIDIA GPUs")
    training = subject.training()
    training.advance(0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            training.advance(0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    report.line("steps that wait for nothing", 5)


def check_memory(subject: Subject, report: Report) -> None:
    """With 2 GB left, a batch of 512 must be halved, learn the same, and leave nothing behind."""
    if subject.device.type != "cuda":
        return report.leave_out("too little memory", "for NVIDIA GPUs")
    training = subject.training(images=subject.images.repeat(16, 1, 1, 1))
    free = devices.free_memory(subject.device)
    filling = torch.empty(max(0, free - 2 * 2**30), dtype=torch.uint8, device=subject.device)
    before = torch.cuda.memory_allocated(subject.device)
    small = flat_gradient(training)
    training.optimizer.zero_grad()
    left = torch.cuda.memory_allocated(subject.device) - before
    del filling
    size = training.micro_batches.size
    report.line("size of micro-batches with 2 GB, of 512 images", size, "", size < 512)
    report.line("memory that running out of it has left behind", left / 2**20, "MB", left < 2**24)
    error = apart(small, flat_gradient(subject.training(images=training_images(training))))
    report.line("gradient with 2 GB, against the whole batch", error, "", error < 2e-2)


def training_images(training: ddpm.Training) -> Tensor:
    """All images of a training, not mirrored, in [-1, 1]."""
    pixels = training.loader.images.to(training.device)
    return pixels.float() / 127.5 - 1


def check_resume(subject: Subject, report: Report) -> None:
    """Half the steps, stored, resumed: on a CPU the same bits, on a GPU nearly."""
    steps = 4 if subject.quick else 40
    whole = subject.training()
    losses = [whole.advance(0.5)[0].mean().item() for _ in range(steps)]
    half = subject.training()
    for _ in range(steps // 2):
        half.advance(0.5)
    resumed = subject.training()
    resumed.restore(copy.deepcopy(half.state()))
    later = [resumed.advance(0.5)[0].mean().item() for _ in range(steps // 2)]
    error = max(abs(a / b - 1) for a, b in zip(later, losses[steps // 2 :], strict=True))
    limit = 1e-9 if subject.device.type == "cpu" else 2e-2
    report.line("loss of a resumed run, against one that was not stopped", error, "", error < limit)


def check_compile(subject: Subject, report: Report) -> None:
    """The loss of twenty steps, compiled and not."""
    if subject.device.type == "cpu":
        return report.leave_out("loss of 20 compiled steps, against eager ones", "for GPUs")
    eager, compiled = subject.training(), subject.training()
    began = time.monotonic()
    compiled.compile()
    report.line("compiling a training step", time.monotonic() - began, "s")
    pairs = [(eager.advance(0.5)[0].mean(), compiled.advance(0.5)[0].mean()) for _ in range(20)]
    error = max(abs(a / b - 1).item() for a, b in pairs)
    report.line("loss of 20 compiled steps, against eager ones", error, "", error < 1e-2)


def images_of(subject: Subject, network: UNet, device: torch.device, sampler: str) -> Tensor:
    network = copy.deepcopy(network).to(device, memory_format=devices.layout(device))
    diffusion = ddpm.Diffusion(schedule="cosine", objective="v", device=device)
    size = (subject.shape["img_size"],) * 2
    how = {"visited_steps": diffusion.visited_steps(5), "sampler": sampler, "precision": "float32"}
    for x_t, _ in ddpm.generate(network, diffusion, range(4), size, **how):
        pass
    return x_t.cpu()


def check_images(subject: Subject, report: Report) -> None:
    """Every sampler's images against the CPU's, in levels of 255."""
    with without_tf32():
        for sampler in ddpm.SAMPLERS:
            one, two = (
                images_of(subject, subject.network, device, sampler)
                for device in (subject.device, torch.device("cpu"))
            )
            error = 127.5 * (one - two).abs().mean().item()
            report.line(f"images by {sampler}, against the CPU's", error, "levels", error < 0.5)


def check_commands(subject: Subject, report: Report) -> None:
    """`sample` and `evaluate` of the model that comes along, as users call them."""
    device = f"--device={subject.device}"
    count = 4 if subject.quick else 512
    lines = {
        "sample": ["ddpm.py", "sample", "--run_name=landscapes", f"--n_img={count}"],
        "evaluate": ["-m", "tools.evaluate", "--run_name=landscapes", f"--n_img={count}"],
    }
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None or subject.quick:
        report.leave_out("evaluate", "with --quick, or without its packages")
        del lines["evaluate"]
    for name, words in lines.items():
        began = time.monotonic()
        ended = subprocess.run([sys.executable, *words, device], capture_output=True, text=True)
        ok = ended.returncode == 0
        report.line(f"{name} of {count} images", time.monotonic() - began, "s", ok)
        print("\n".join((ended.stdout + ended.stderr).splitlines()[-12:]))


def check_suite(subject: Subject, report: Report) -> None:
    """This project's tests, on this machine's cores."""
    if subject.quick:
        return report.leave_out("the test suite", "with --quick")
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", "pytest", "-x"], capture_output=True, text=True)
    report.line("the test suite", time.monotonic() - began, "s", ended.returncode == 0)
    print(ended.stdout[-1500:])


def measure_ceilings(subject: Subject, report: Report) -> None:
    """What the hardware can do at best: a product, a copy, and the network's convolutions."""
    device = subject.device
    side = 512 if subject.quick else 8192
    dtype = peers.PRECISIONS[subject.best]
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds = measuring.seconds_per_call(lambda: a @ a, 3, device)
    rate = 2 * side**3 / seconds / 1e12
    report.line(f"product of {side}x{side} in {subject.best}", rate, "TFLOP/s")
    seconds = measuring.seconds_per_call(lambda: a.clone(), 3, device)
    report.line("copy, read and written", 2 * a.nbytes / seconds / 1e9, "GB/s")
    rows = []
    for is_on in (False, True):
        torch.backends.cudnn.benchmark = is_on
        for inputs, outputs, kernel, stride, size in convolutions_of(subject):
            work = convolution(subject, inputs, outputs, kernel, stride, size)
            work()
            ms = 1000 * measuring.seconds_per_call(work, 3, device)
            rows.append((is_on, inputs, outputs, kernel, stride, size, f"{ms:.4g}"))
    torch.backends.cudnn.benchmark = False
    measuring.RESULTS.mkdir(parents=True, exist_ok=True)
    with open(measuring.RESULTS / "convolutions.csv", "w", newline="") as file:
        names = ("benchmark", "inputs", "outputs", "kernel", "stride", "size", "ms")
        csv.writer(file).writerows([names, *rows])
    for is_on in (False, True):
        ms = sum(float(row[-1]) for row in rows if row[0] == is_on)
        report.line(f"all convolutions, both ways, cudnn.benchmark={is_on}", ms, "ms")


def convolutions_of(subject: Subject) -> list[tuple[int, ...]]:
    """Channels in and out, kernel, stride and side of all but those that double the resolution."""
    found = {}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, _: found.setdefault(
                (
                    module.in_channels,
                    module.out_channels,
                    module.kernel_size[0],
                    module.stride[0],
                    inputs[0].shape[-1],
                )
            )
        )
        for module in subject.network.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    with torch.no_grad():
        subject.network(subject.images[:1].cpu(), torch.ones(1, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return [*found]


def convolution(
    subject: Subject, inputs: int, outputs: int, kernel: int, stride: int, size: int
) -> Callable[[], None]:
    """Forward and backward of one."""
    how = {"device": subject.device, "dtype": peers.PRECISIONS[subject.best]}
    layout = devices.layout(subject.device)
    x = torch.randn(subject.count, inputs, size, size, **how).to(memory_format=layout)
    weight = torch.randn(outputs, inputs, kernel, kernel, **how).to(memory_format=layout)
    x.requires_grad_()
    weight.requires_grad_()
    y = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
    gradient = torch.randn_like(y)

    def both_ways() -> None:
        y = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
        torch.autograd.grad(y, (x, weight), gradient)

    return both_ways


CHECKS = (
    check_answers,
    check_gradients,
    check_waits,
    check_memory,
    check_resume,
    check_images,
    check_compile,
    measure_ceilings,
    check_commands,
    check_suite,
)


def correct(device: str = "auto", quick: bool = False, minutes: float = 9.0) -> None:
    """Whether a GPU computes what the CPU does; a line for every check.

        python -m benchmarks.h100.correct

    Args:
        device: auto, cpu, cuda, cuda:N, mps or xpu.
        quick: a small network, without the test suite, to see that all works.
        minutes: no check is begun later.
    """
    command_line.check_limits(locals(), LIMITS)
    place = devices.pick_device(device)
    report = Report(minutes)
    print(measuring.hardware(place), "torch", torch.__version__)
    subject = Subject(place, quick)
    for check in CHECKS:
        if not report.has_time():
            report.leave_out(check.__name__, "no time")
            continue
        with report.part(check.__name__):
            check(subject, report)
    report.close()


if __name__ == "__main__":
    command_line.run_command_line("-m benchmarks.h100.correct", {"correct": correct}, LIMITS)
