"""Distillation: a run that makes its images in 2 to 4 steps, taught by a run that needs more.

    python -m tools.distill --run_name=my_run --to=my_fast_run --steps=4
    python -m tools.distill --help

After Zhou et al. 2024 (SFD): the student goes its own way from noise to image in a few long steps.
From each place where one of them begins, the teacher goes to where it ends, in several short ones,
and the student learns to arrive there at once. It begins with the teacher's weights, so that a
short training is enough, and needs no images.

If guidance leads the teacher, to a class or away from a guide, the student learns to arrive there
without, with one answer of the network where its teacher needs two (Meng et al. 2023, who teach
all strengths of guidance; here it is one).

Reading order: Distillation; the student's run; how long; distill, the command.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import ddpm
from ddpm import Diffusion
from machinery import basics, checkpoints, command_line, devices, optimizers, runs, sampling
from machinery.basics import UserError, printable
from machinery.command_line import StopSignals
from machinery.journal import SUMS
from machinery.steps import by_number, kept, teacher_of

SHORT_STEPS = 3  # of the teacher, for one of the student
TEACHER_SAMPLER, SPACING = "unipc", "rho-7"  # benchmarks/README.md, "Distillation"
SAVE_SECONDS = 300
SAMPLER = "ddim"  # of the student: it has learned where each single step leads
OPTIMIZER = "muon"  # benchmarks/README.md, "Distillation"


class Guided(NamedTuple):
    """A network as it is asked: how many classes it knows, and what leads it; see `ddpm.guided`."""

    network: nn.Module
    classes: int = 0
    guidance: float = 1.0
    guide: nn.Module | None = None


class Distillation:
    """A student that learns to go in one step where its teacher goes in several.

    Everything random in a round depends on (seed, round) alone, so a resumed distillation equals
    one that was never stopped (on the same machine with a CPU; under --max_minutes the learning
    rate depends on the clock).

    Args:
        teacher: what is followed.
        student: a network like the teacher's, of the same objective.
        diffusion: their noising process.
        path: of the teacher: values of t from T to 0, SHORT_STEPS for each step of the student.
        shape: of an image (C, H, W).
        batch_size: images of a round.
        lr: learning rate at the beginning; it falls to 0.
        seed: of the noise.
        optimizer: one of OPTIMIZERS.
        precision: one of devices.PRECISIONS.
    """

    def __init__(
        self,
        teacher: Guided,
        student: nn.Module,
        diffusion: Diffusion,
        path: Sequence[int],
        shape: Sequence[int],
        *,
        batch_size: int,
        lr: float,
        seed: int,
        optimizer: str = OPTIMIZER,
        precision: str = "auto",
    ):
        self.teacher, self.student, self.diffusion = teacher, student, diffusion
        self.path = path
        self.shape = shape
        self.batch_size = batch_size
        self.lr = lr
        self.seed = seed
        self.device = diffusion.signal.device
        self.precision = devices.precision_of(precision, self.device)
        if self.precision == torch.float16:  # small gradients would be lost without a loss scale
            self.precision = torch.float32
        self.optimizer = optimizers.OPTIMIZERS[optimizer](student, self.precision)
        self.round = 0

    def state(self) -> dict:
        """What a checkpoint keeps; the inverse of `restore`."""
        weights = self.student.state_dict()
        return {
            "network": weights,
            "average": weights,  # the falling learning rate does what an average would
            "optimizer": self.optimizer.state_dict(),
            "step": self.round,
        }

    def restore(self, state: dict) -> None:
        """Stand where `state` was saved."""
        self.student.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.round = state["step"]

    def guess(self, asked: Guided, x_t: Tensor, t: int, labels: Tensor | None = None) -> Tensor:
        """What a network takes x_t for: x_0 (B, C, H, W)."""
        times = torch.full((len(x_t),), t, device=self.device)
        with devices.autocast(self.device, self.precision):
            output = ddpm.guided(asked.network, x_t, times, labels, asked.guidance, asked.guide)
        return self.diffusion.clean(x_t, times, output.float())

    def follow_teacher(
        self, x_t: Tensor, short: Sequence[int], labels: Tensor | None = None
    ) -> Tensor:
        """Where the teacher comes to from x_t, in short steps."""

        def predict_clean(x_t: Tensor, t: int) -> Tensor:
            return self.guess(self.teacher, x_t, t, labels).clamp(-1, 1)

        *_, (x_next, _) = self.diffusion.denoise(predict_clean, x_t, short, TEACHER_SAMPLER)
        return x_next

    def step(self, x_t: Tensor, t: int, t_next: int, labels: Tensor | None = None) -> Tensor:
        """Where the student comes to from x_t, in one step of DDIM.

        Its guess is clipped, as in sampling; else it would learn to make up for what never comes,
        such as the thousands that eps stands for near T. Clipped values are learned from, too.
        """
        here, there = torch.tensor([[t], [t_next]], device=self.device)
        x_0 = self.guess(Guided(self.student), x_t, t, labels)
        x_0 = x_0.detach().clamp(-1, 1) + (x_0 - x_0.detach())  # the gradient as if unclipped
        signal, noise = self.diffusion.at(here)
        return self.diffusion.add_noise(x_0, there, (x_t - signal * x_0) / noise)

    def advance(self, fraction_done: float) -> Tensor:
        """A round: a batch of images goes the whole way, and the student learns at every step.

        Returns:
            The mean squared difference from the teacher, of each step (steps,).
        """
        rng = np.random.default_rng((self.seed, self.round))
        noise = rng.standard_normal((self.batch_size, *self.shape), np.float32)
        x_t = torch.from_numpy(noise).to(self.device)
        labels = None
        if self.teacher.classes:
            drawn = rng.integers(self.teacher.classes, size=self.batch_size)
            labels = torch.from_numpy(drawn).to(self.device)
        self.optimizer.lr = self.lr * (1 - fraction_done)
        losses = []
        for first in range(0, len(self.path) - 1, SHORT_STEPS):
            short = self.path[first : first + SHORT_STEPS + 1]
            target = self.follow_teacher(x_t, short, labels)
            arrived = self.step(x_t, short[0], short[-1], labels)
            loss = (arrived - target).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), max_norm=1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
            x_t = arrived.detach()  # on its own way, also where it errs
        self.round += 1
        return torch.stack(losses)


# ---- the student's run ---------------------------------------------------------------------------


def check_teacher(run_name: str, teacher: dict, steps: int) -> None:
    """Refuse a run that cannot teach `steps` steps."""
    settings = teacher["settings"]
    if settings["inputs"]:
        rule = "a distilled network is shown nothing but noise"
        raise UserError(f"--run_name={run_name} takes inputs ({settings['inputs']}): {rule}")
    if source := teacher_of(teacher):
        rule = "take that one as the teacher"
        raise UserError(f"--run_name={run_name} was itself distilled from {source}; {rule}")
    if steps * SHORT_STEPS > settings["noise_steps"]:
        few = f"the {settings['noise_steps']} noising steps of this run"
        rule = f"the teacher takes {SHORT_STEPS} for each"
        raise UserError(f"--steps={steps} is too many for {few}: {rule}")


def check_student(to: str, student: dict, source: str, visited: Sequence[int], flags: dict) -> None:
    """Refuse to continue a run that is not this distillation, of the same steps and flags."""
    steps = len(visited) - 1
    paths = student.get("paths") or {"teacher": "", "visited": ()}
    if paths["teacher"] != source:
        made = "holds another run"
        if paths["teacher"]:
            made = f"was distilled from {printable(paths['teacher'])}, not from {source}"
        raise UserError(f"--to={to}: models/{to} {made}; choose another name")
    if steps not in by_number(paths):
        raise UserError(f"--to={to} is distilled for {paths['default']} steps, not {steps}")
    if by_number(paths)[steps] != tuple(visited):
        fault = "is distilled for other values of t, by another version of this program"
        raise UserError(f"--to={to} {fault}; choose another name")
    for name, value in flags.items():
        if student["settings"][name] != value:
            began = f"it began with --{name}={student['settings'][name]}"
            raise UserError(f"--{name}={value}: --to={to} is another distillation; {began}")
    if "network" not in student:
        raise UserError(f"--to={to} holds weights to sample only; choose another name")


def save(
    to: str, teacher: dict, distillation: Distillation, minutes: float, paths: dict, flags: dict
) -> None:
    """Write the student as a run: what `sample` and a resumed distillation need."""
    state = distillation.state() | {"minutes": minutes, "sums": torch.zeros(SUMS), "paths": paths}
    settings = teacher["settings"] | flags
    settings |= {"run_name": to, "init_from": teacher["settings"]["run_name"]}
    checkpoints.save(to, settings=settings, data=teacher["data"], log=[], **state)


# ---- how long ------------------------------------------------------------------------------------


class Budget:
    """How far a distillation is, by its walks or by the clock.

    Args:
        walks: how many there shall be, at most.
        max_minutes: how long, earlier sittings included; 0 for no limit.
        batch_size: walks of a round.
        minutes: used by earlier sittings.
        began: when this one did (time.monotonic()).
    """

    def __init__(
        self, walks: int, max_minutes: float, batch_size: int, minutes: float, began: float
    ):
        self.rounds = max(1, walks // batch_size)
        self.max_minutes = max_minutes
        self.minutes_before = minutes
        self.began = began

    def minutes(self) -> float:
        """Minutes used, earlier sittings included."""
        return self.minutes_before + (time.monotonic() - self.began) / 60

    def done(self, rounds: int) -> float:
        """The fraction that is done, in [0, 1]: of the walks or of the minutes, the larger one."""
        by_clock = self.minutes() / self.max_minutes if self.max_minutes else 0.0
        return min(1.0, max(rounds / self.rounds, by_clock))


def work(distillation: Distillation, budget: Budget, keep: Callable[[], None]) -> None:
    """Go on until the budget is used up or somebody stops it; `keep` is called now and then.

    Raises:
        UserError: the budget was used up before the first round.
    """
    if budget.done(distillation.round) >= 1:
        if not distillation.round:
            fault = f"nothing was learned: getting ready took {budget.minutes():.2g} minutes"
            raise UserError(f"--max_minutes={budget.max_minutes:g} is too short; {fault}")
        longer = "a larger --max_minutes or --walks continues it"
        print(f"nothing to do: this distillation is finished; {longer}")
        return
    bar = basics.progress_bar(
        budget.rounds, distillation.round, "round", budget=60 * (budget.max_minutes or np.inf)
    )
    saved_at = time.monotonic()
    with StopSignals() as signals, bar:
        while (done := budget.done(distillation.round)) < 1 and not signals.status:
            losses = distillation.advance(done)
            bar.set_postfix_str(f"{done:.0%}, differs by {127.5 * losses.mean().sqrt():.2f} levels")
            bar.update()
            if time.monotonic() - saved_at > SAVE_SECONDS:
                keep()
                saved_at = time.monotonic()
    if distillation.round:
        keep()
    if signals.status:
        print("stopped and saved; the same command resumes it")
        raise SystemExit(signals.status)


# ---- the command ---------------------------------------------------------------------------------

LIMITS = ddpm.LIMITS | {"steps": (1, 16), "walks": runs.COUNT}


def distill(
    # what
    run_name: str = "",
    to: str = "",
    steps: int = 4,
    guidance: float | str = "auto",
    guide: str = "",
    # how long
    max_minutes: float = 30.0,
    walks: int = 100_000,
    seed: int = 0,
    # optimization
    batch_size: int = 8,
    lr: float = 2e-4,
    # running
    device: str = "auto",
    precision: str = "auto",
) -> None:
    """Distill a run into one that makes its images in 2 to 4 steps.

        python -m tools.distill --run_name=my_run --to=my_fast_run --steps=4

    Writes models/TO/checkpoint.pt, a run like any other, which `ddpm.py sample` samples in so many
    steps of ddim. The same command resumes a distillation that was stopped (Ctrl-C saves first).
    No images are needed. What guides the teacher goes into the student, which asks its network
    once a step where the teacher asks twice; one of classes has that one guidance for good.

    Args:
        run_name: the teacher, a folder in models/.
        to: the student, a new run.
        steps: how many the student takes.
        guidance: of the teacher, as `sample` takes it; auto is 2.
        guide: of the teacher: early, or a weaker run, as `sample` takes it.
        max_minutes: a time budget, earlier sittings included; 0 for none.
        walks: how many images the student learns from, if the time suffices.
        seed: of their noise.
        batch_size: images at the same time.
        lr: learning rate at the beginning; it falls to 0 at the end.
        device: auto, cpu, cuda, cuda:N, mps or xpu.
        precision: mixed precision, as in training; float16 is not used.

    Raises:
        UserError: a flag that does not fit, no such teacher, or another run in the student's place.
    """
    began = time.monotonic()
    command_line.check_limits(locals(), LIMITS)
    for flag, name in (("run_name", run_name), ("to", to)):
        if not name:
            raise UserError(f"--{flag} is missing")
        command_line.check_name(flag, name)
    place = devices.pick_device(device)
    teacher = ddpm.load_run(run_name)
    settings = teacher["settings"]
    check_teacher(run_name, teacher, steps)
    sampling.check_guidance(settings, guidance, guide)
    weaker = sampling.load_guide(guide, teacher, settings["img_size"], ddpm.load_run)
    flags = {"batch_size": batch_size, "lr": lr, "seed": seed}  # a resumed one has the same
    optimizer = OPTIMIZER
    source = f"{run_name} {checkpoints.fingerprint_of(teacher['average'])}"
    guidance = sampling.guidance_of(guidance, settings)
    if settings["classes"] or guide:
        source += f" with guidance {guidance:.9g}"
    if weaker:
        source += f" from {guide} {checkpoints.fingerprint_of(weaker['average'])}"
    with runs.lock_run(checkpoints.paths_of(to)[0].parent):
        student = ddpm.load_run(to) if checkpoints.exists(to) else None
        network, diffusion = ddpm.build_trained(teacher, place)
        path = diffusion.visited_steps(steps * SHORT_STEPS, spacing=SPACING)
        if student:
            check_student(to, student, source, path[::SHORT_STEPS], flags)
            optimizer = student["settings"]["optimizer"]  # of earlier versions: AdamW
        if weaker:
            weaker = ddpm.build_trained(weaker, place)[0].requires_grad_(False)
        distillation = Distillation(
            Guided(network.requires_grad_(False), len(settings["classes"]), guidance, weaker),
            ddpm.build_trained(teacher, place)[0],
            diffusion,
            path,
            (network.channels, *settings["img_size"]),
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            optimizer=optimizer,
            precision=precision,
        )
        flags["optimizer"] = optimizer
        minutes = 0.0
        if student:
            distillation.restore(student)
            minutes = student["minutes"]
        paths = kept(SAMPLER, steps, [path[::SHORT_STEPS]], source)
        budget = Budget(walks, max_minutes, batch_size, minutes, began)
        keep = lambda: save(to, teacher, distillation, budget.minutes(), paths, flags)  # noqa: E731
        work(distillation, budget, keep)
    number = distillation.round * batch_size
    print(f"models/{to}: {number:,} walks in {budget.minutes():.1f} minutes")
    print(f"to generate images:\n  python ddpm.py sample --run_name={to} --n_img=16")


def main() -> None:
    command_line.run_command_line("-m tools.distill", {"distill": distill}, LIMITS)


if __name__ == "__main__":
    main()
