"""Trackers: what the log tells also goes to TensorBoard, wandb or trackio.

    python ddpm.py train --track=tensorboard,wandb

Each runs in a process of its own. A tracker may be slow, fail, hang, or be killed: the training
does not wait, says once that it goes on without, and is the same to the bit. The packages are
imported only in that process, and only when they are asked for.

Reading order: one class for each tracker; serve, its process; Tracker, our side; check_trackers.
"""

import contextlib
import importlib.util
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

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

    keeps_model = False

    def __init__(self, subject: Subject):
        from torch.utils.tensorboard import SummaryWriter

        # what a sitting that died wrote after this step is hidden
        self.writer = SummaryWriter(subject.folder, purge_step=subject.step + 1)
        rows = [f"| {name} | {value} |" for name, value in subject.settings.items()]
        self.writer.add_text("settings", "\n".join(["| flag | value |", "|---|---|", *rows]))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step, new_style=True, double_precision=True)

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        self.writer.add_images(name, images, step)

    def conclude(self, step: int, figures: dict[str, float], model: None) -> None:
        self.scalars(step, {f"final/{name}": value for name, value in figures.items()})

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Logs to wandb's server, or without an account to runs/wandb, for `wandb sync`."""

    keeps_model = True

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

    def images(self, step: int, name: str, images: np.ndarray) -> None:
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

    keeps_model = True

    def __init__(self, subject: Subject):
        import trackio

        self.trackio = trackio
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        self.run = trackio.init(
            PROJECT, subject.run_name, config=plain(subject.settings), resume="allow", **quiet
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        grid = np.concatenate([*as_arrays(images)], axis=1)
        self.run.log({name: self.trackio.Image(grid)}, step=step)

    def conclude(self, step: int, figures: dict[str, float], model: Path) -> None:
        self.run.log({f"final/{name}": value for name, value in figures.items()}, step=step)
        self.run.log_artifact(model, name=self.run.name, type="model")

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def plain(settings: dict) -> dict:
    """Settings as JSON has them."""
    return {name: list(x) if isinstance(x, tuple) else x for name, x in settings.items()}


def as_arrays(images: np.ndarray) -> np.ndarray:
    """Images (N, 3, H, W) uint8 as (N, H, W, 3)."""
    return images.transpose(0, 2, 3, 1)


# ---- its process ---------------------------------------------------------------------------------

START = """import sys
sys.path.insert(0, sys.argv[1])
from machinery import trackers
trackers.serve()"""


def serve() -> None:
    """Do what comes in by standard input: a tracker's class and its subject, then calls."""
    messages = sys.stdin.buffer
    try:
        kind, subject = pickle.load(messages)
        place = kind(subject)
        with contextlib.suppress(EOFError):  # the training has ended, in whatever way
            while True:
                call, *inputs = pickle.load(messages)
                getattr(place, call)(*inputs)
        place.close()
    except Exception as error:  # a tracker may raise anything; it is told to the training
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        print(reason.splitlines()[0], file=sys.stderr, flush=True)
        os._exit(1)  # what it would do on leaving may fail or hang, too


class Tracker:
    """A tracker in a process of its own; whoever tells it something never waits.

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
        self.messages.put((TRACKERS[name], subject))
        self.words = tempfile.TemporaryFile()  # a pipe could be full
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(Path(__file__).parent.parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.words,
            start_new_session=True,  # Ctrl-C is for the training, which then tells the rest
        )
        self.thread = threading.Thread(target=self.pass_on, daemon=True)
        self.thread.start()

    def pass_on(self) -> None:
        """Hand messages on until there is None, then wait for the process to end."""
        try:
            with self.process.stdin as pipe:
                while message := self.messages.get():
                    pipe.write(pickle.dumps(message))
                    pipe.flush()
        except OSError:  # it has ended
            pass
        if self.process.wait() and not self.fault:
            self.fault = self.last_words()

    def last_words(self) -> str:
        """Why the process has failed: the last line that it has written."""
        self.words.seek(0)
        lines = self.words.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return printable(last, limit=300) or f"its process ended ({self.process.returncode})"

    def tell(self, call: str, *inputs) -> None:
        """Have the tracker's method `call` called, soon."""
        try:
            self.messages.put_nowait((call, *inputs))
        except queue.Full:
            self.give_up("it does not answer")

    def close(self) -> None:
        """Wait, for PATIENCE at most, until all is told."""
        with contextlib.suppress(queue.Full):
            self.messages.put_nowait(None)
            self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self.give_up(f"it has not finished in {PATIENCE:g} seconds")

    def give_up(self, reason: str) -> None:
        """End the process, and those that it has started."""
        self.fault = self.fault or reason
        with contextlib.suppress(OSError, AttributeError):  # it has ended; Windows has no groups
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()


# ---- which ---------------------------------------------------------------------------------------


def chosen(settings: dict) -> list[str]:
    """The trackers that `--track` and `--tensorboard` name."""
    names = settings["track"].replace(",", " ").split()
    if settings["tensorboard"]:
        names.append("tensorboard")
    return list(dict.fromkeys(names))


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check_trackers(settings: dict) -> None:
    """Refuse a tracker that is not known or not installed.

    Raises:
        UserError: with the command that installs it.
    """
    for name in chosen(settings):
        if name not in TRACKERS:
            raise UserError(f"--track={name} is not one of: {', '.join(TRACKERS)}")
        if not is_installed(name):
            flag = f"--track={name}" if name in settings["track"] else f"--{name}"
            raise UserError(f"{flag} needs a package of that name: pip install {name}")
