"""Trackers: what the log tells also goes to TensorBoard, wandb or trackio.

    python ddpm.py train --track=tensorboard,wandb

Each is told in a thread of its own. A tracker may be slow, fail or hang: the training does not
wait, and says once that it goes on without. The packages are imported only when they are asked for.

Reading order: one class for each tracker; Tracker, its thread; check_trackers.
"""

import importlib
import os
import queue
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from machinery.basics import UserError, printable

PROJECT = "ddpm"  # what wandb and trackio file runs under, unless WANDB_PROJECT says otherwise
PENDING = 1000  # messages: a tracker that is so far behind hangs
PATIENCE = 60.0  # seconds in which a tracker must have finished at the end


class Subject(NamedTuple):
    """What is tracked."""

    run_name: str
    settings: dict
    folder: Path  # runs/RUN
    step: int  # done when the sitting starts


# ---- one class for each --------------------------------------------------------------------------


class TensorBoard:
    """Writes runs/RUN; numbers in double precision, as they are in log.csv."""

    def __init__(self, subject: Subject):
        from torch.utils.tensorboard import SummaryWriter

        # what a sitting that died wrote after this step is hidden
        self.writer = SummaryWriter(subject.folder, purge_step=subject.step + 1)
        rows = [f"| {name} | {value} |" for name, value in subject.settings.items()]
        self.writer.add_text("settings", "\n".join(["| flag | value |", "|---|---|", *rows]))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step, new_style=True, double_precision=True)

    def images(self, step: int, name: str, images: Tensor) -> None:
        self.writer.add_images(name, images, step)

    def conclude(self, step: int, figures: dict[str, float], model: Path) -> None:
        self.scalars(step, {f"final/{name}": value for name, value in figures.items()})

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Logs to wandb's server, or without an account to runs/wandb, for `wandb sync`."""

    def __init__(self, subject: Subject):
        import wandb

        self.wandb = wandb
        has_account = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
        folder = subject.folder.parent
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=subject.run_name,
            name=subject.run_name,
            config=subject.settings,
            dir=folder,
            resume="allow",
            mode=None if has_account else "offline",
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def images(self, step: int, name: str, images: Tensor) -> None:
        pictures = [self.wandb.Image(pixels) for pixels in as_arrays(images)]
        self.run.log({name: pictures}, step=step)

    def conclude(self, step: int, figures: dict[str, float], model: Path) -> None:
        self.run.summary.update({f"final/{name}": value for name, value in figures.items()})
        artifact = self.wandb.Artifact(self.run.id, type="model")
        artifact.add_file(str(model))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Writes trackio's own files on this machine; `trackio show` opens its dashboard."""

    def __init__(self, subject: Subject):
        import trackio

        self.trackio = trackio
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        self.run = trackio.init(
            PROJECT, subject.run_name, config=plain(subject.settings), resume="allow", **quiet
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def images(self, step: int, name: str, images: Tensor) -> None:
        grid = np.concatenate([*as_arrays(images)], axis=1)
        self.run.log({name: self.trackio.Image(grid)}, step=step)

    def conclude(self, step: int, figures: dict[str, float], model: Path) -> None:
        self.run.log({f"final/{name}": value for name, value in figures.items()}, step=step)
        self.run.log_artifact(model, name=self.run.name, type="model")

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
# what has to be there, whose pip name is the tracker's own
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def plain(settings: dict) -> dict:
    """Settings as JSON has them."""
    return {name: list(x) if isinstance(x, tuple) else x for name, x in settings.items()}


def as_arrays(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) uint8 as (N, H, W, 3)."""
    return images.permute(0, 2, 3, 1).numpy()


# ---- its thread ----------------------------------------------------------------------------------


class Tracker:
    """Tells a tracker, in a thread of its own, what it is told itself, which never waits.

    Args:
        name: one of TRACKERS.
        subject: what is tracked.

    Attributes:
        fault: why the tracker is told no more; "" while it works.
    """

    def __init__(self, name: str, subject: Subject):
        self.name = name
        self.fault = ""
        self.messages = queue.Queue(PENDING)
        self.thread = threading.Thread(target=self.work, args=[subject], daemon=True)
        self.thread.start()

    def work(self, subject: Subject) -> None:
        try:
            place = TRACKERS[self.name](subject)
            while message := self.messages.get():
                call, *inputs = message
                getattr(place, call)(*inputs)
            place.close()
        except Exception as error:  # whatever another program raises, the training goes on
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self.fault = printable(reason.splitlines()[0], limit=300)

    def tell(self, call: str, *inputs) -> None:
        """Have the tracker's method `call` called, soon."""
        if self.fault:
            return
        try:
            self.messages.put_nowait((call, *inputs))
        except queue.Full:
            self.fault = "it does not answer"

    def close(self) -> None:
        """Wait, for PATIENCE at most, until all is told."""
        try:
            self.messages.put_nowait(None)
        except queue.Full:
            return
        self.thread.join(PATIENCE)
        if self.thread.is_alive() and not self.fault:
            self.fault = f"it has not finished in {PATIENCE:.0f} seconds"


# ---- which ---------------------------------------------------------------------------------------


def chosen(settings: dict) -> list[str]:
    """The trackers that `--track` and `--tensorboard` name."""
    names = settings["track"].replace(",", " ").split()
    if settings["tensorboard"]:
        names.append("tensorboard")
    return list(dict.fromkeys(names))


def check_trackers(settings: dict) -> None:
    """Refuse a tracker that is not known or not installed.

    Raises:
        UserError: with the command that installs it.
    """
    for name in chosen(settings):
        if name not in TRACKERS:
            raise UserError(f"--track={name} is not one of: {', '.join(TRACKERS)}")
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            flag = f"--track={name}" if name in settings["track"] else f"--{name}"
            raise UserError(f"{flag} needs a package of that name: pip install {name}") from error
