"""What a training tells: the log, the curves, and what is said once.

Reading order: Log, what is said once about a run, plot_curves.
"""

import copy
import csv
import datetime
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from machinery import checkpoints, devices, processes
from machinery.basics import UserError, progress_bar, write_whole
from machinery.session import Course

FEW_IMAGES = 20_000  # after which even a small network makes more than blurs (README: the first training)
ROW_EVERY = 20  # steps between two rows of the log: reading the sums makes a GPU wait
QUARTERS = 4  # of the noising steps: the early ones (t small) make details, the late ones the composition
COLUMNS = ("step", "epoch", "images", "loss", "lr", "grad_norm", "clipped")
COLUMNS += (*(f"loss_q{quarter}" for quarter in range(1, QUARTERS + 1)), "img_per_s")
SUMS = 3 + 2 * QUARTERS  # loss, gradient norm, clipped gradients; loss and number of images in each quarter


class Log:
    """What a training tells while it runs: on the terminal, in log.csv, in loss.png, in TensorBoard.

    Steps are added up on the device. These sums and the rows so far go into the checkpoint, so that the log of a run
    that was stopped is, to the bit, that of the run that was not.

    Args:
        folder: results/RUN.
        course: the training this is the log of.
        noise_steps: T, whose quarters are told apart.
        rows, sums: what the checkpoint holds; nothing yet for a new run.
        board: where TensorBoard's files go, or None.
    """

    def __init__(
        self,
        folder: Path,
        course: Course,
        noise_steps: int,
        device: torch.device,
        rows: list[list] = (),
        sums: Tensor | None = None,
        board: Path | None = None,
    ):
        self.path, self.course, self.noise_steps, self.board_folder = folder / "log.csv", course, noise_steps, board
        self.rows, self.written, self.has_news = list(rows), 0, True
        self.sums = torch.zeros(SUMS) if sums is None else sums
        self.sums, self.quarters = self.sums.to(device), torch.arange(QUARTERS, device=device)[:, None]
        self.step, self.board = course.first_step, None

    def __enter__(self) -> "Log":
        course = self.course
        total, done = course.last_step * course.batch_size, course.first_step * course.batch_size
        self.bar = progress_bar(total, done, budget=60 * course.max_minutes or math.inf)
        self.timed_from, self.has_told_speed = (time.monotonic(), self.step), False
        if self.board_folder:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.board_folder, purge_step=self.step + 1)  # what came after is hidden
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        self.on_board("close")

    def add(self, step: int, losses: Tensor, t: Tensor, norm: Tensor, rate: float) -> None:
        """Note what step `step` (1, 2, ...) came to.

        Args:
            losses, t: of each image, its loss and its noising step (B,).
            norm: of the gradient, before it was clipped to 1.
            rate: the learning rate.

        Raises:
            UserError: a sum is no longer finite (noticed with a row, and before a save).
        """
        in_quarter = (t - 1) * QUARTERS // self.noise_steps == self.quarters  # (4, B)
        whole = torch.stack([losses.mean(), norm, norm > 1])
        self.sums += torch.cat([whole, (in_quarter * losses).sum(1), in_quarter.sum(1)])
        self.step, self.rate = step, rate
        self.bar.total = max(self.bar.total, step * self.course.batch_size)  # under a budget it is an estimate
        self.bar.update(self.course.batch_size)
        if step % ROW_EVERY == 0:
            self.add_row()

    def add_row(self) -> None:
        course, images = self.course, self.step * self.course.batch_size
        self.check()
        loss, norm, clipped, *quarters = self.sums.tolist()
        by_quarter = [sum_ / n if n else None for sum_, n in zip(quarters[:QUARTERS], quarters[QUARTERS:], strict=True)]
        (began, first), now = self.timed_from, time.monotonic()
        speed, self.timed_from = (self.step - first) * course.batch_size / max(now - began, 1e-9), (now, self.step)
        row = [self.step, images / course.count, images, loss / ROW_EVERY, self.rate, norm / ROW_EVERY, int(clipped)]
        self.rows.append([*row, *by_quarter, speed])
        self.sums.zero_()
        self.has_news, course.speed = True, max(course.speed, speed)
        for name, value in zip(COLUMNS[3:], self.rows[-1][3:], strict=True):
            if value is not None:
                self.on_board("add_scalar", name, value, self.step)
        self.tell(is_whole=self.step - first == ROW_EVERY)

    def tell(self, is_whole: bool) -> None:
        """Bring the bar up to date; once, after a row that is whole, say how long it will take."""
        course, row = self.course, dict(zip(COLUMNS, self.rows[-1], strict=True))
        speed = row["img_per_s"]
        self.bar.total = row["images"] + round(course.seconds_left(self.step, speed) * speed)
        if is_whole and not self.has_told_speed:
            self.has_told_speed = True
            self.bar.write(course.forecast(self.step, speed))
        wait = max(0, course.save_every - (time.monotonic() - course.saved_at) / 60)
        words = f"epoch {row['epoch']:.1f}, loss {row['loss']:.4f}, save in {wait:.0f} min"
        self.bar.set_postfix_str(words, refresh=False)

    def on_board(self, call: str, *what) -> None:
        """Hand something to TensorBoard; a disk it cannot write to ends that, not the training."""
        if self.board:
            try:
                getattr(self.board, call)(*what)
            except OSError as error:
                self.board = None
                self.bar.write(f"TensorBoard is not written to any more: {error.strerror or error}")

    def check(self) -> None:
        if not self.sums.isfinite().all():
            advice = "begin another run with a lower --lr or a longer --warmup"
            where = f"at step {self.step:,}, learning rate {self.rate:.1e}"
            raise UserError(f"the loss is infinite or NaN {where}; {advice}")

    def state(self) -> dict:
        """What the checkpoint keeps; refused where a good one would be replaced by one that has learnt NaN."""
        self.check()
        return {"log": self.rows, "sums": self.sums, "minutes": self.course.minutes()}

    def write(self) -> None:
        """Bring log.csv up to date: written anew when a session begins, then added to, whenever there is a new row."""
        if not self.has_news:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written, self.written, self.has_news = self.written, 0, False  # what fails is written anew with the next row
        try:
            with open(self.path, "a" if written else "w", newline="") as file:
                csv.writer(file).writerows([*([] if written else [COLUMNS]), *self.rows[max(0, written - 1) :]])
        except OSError as error:
            error.filename = error.filename or str(self.path)  # a write that fails does not tell it
            raise
        self.written = 1 + len(self.rows)

    def report(self, run_name: str, usual_steps: int) -> str:
        """What came out, and what to do with it; `usual_steps` are those of a sampler if none are asked for."""
        course, last = self.course, [row[COLUMNS.index("loss")] for row in self.rows[-50:]]
        mean = f"; loss {np.mean(last):.4f} over the last {len(last) * ROW_EVERY:,} steps" if last else ""
        time_taken = datetime.timedelta(seconds=round(60 * course.used()))
        images = self.step * course.batch_size
        steps = f" --steps={self.noise_steps}" if self.noise_steps < usual_steps else ""  # more cannot be asked for
        return f"""trained for {images / course.count:.1f} epochs in {time_taken}{mean}
the weights are in {checkpoints.paths_of(run_name)[0]},
previews, log.csv and loss.png in {self.path.parent}{hint(images)}
to make images:
  python ddpm.py sample --run_name={run_name} --n_img=16{steps}
to judge them, and see whether they are copies:
  python -m tools.evaluate --run_name={run_name}{steps}"""

    def illustrate(self, previews: Tensor) -> None:
        """Draw loss.png anew; hand images (B, C, H, W) in 0..255 to TensorBoard."""
        plot_curves(self.rows, self.path.with_name("loss.png"))
        self.on_board("add_images", "previews", previews, self.step)


def hint(images: int) -> str:
    """Why images may look like noise, on a line of its own, if so few have been learnt from."""
    if images >= FEW_IMAGES:
        return ""
    return f"\nonly {images:,} images have been shown so far: expect blurs and noise; a larger --epochs goes on"


def gflop_per_image(network: nn.Module, size: tuple[int, int]) -> float:
    """Billions of additions and multiplications of one forward pass; a training step takes three times as many."""
    from torch.utils.flop_counter import FlopCounterMode  # training alone needs it

    network = copy.deepcopy(network).to("meta")
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        network(torch.empty(1, network.channels, *size), torch.ones(1, dtype=torch.long))
    return counter.get_total_flops() / 1e9


def in_figures(network: nn.Module, size: tuple[int, int], device: torch.device) -> str:
    """How large a network is, and where it computes."""
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    precision = "bfloat16" if devices.has_bfloat16(device) else "float32"
    place = f"{device} in {precision}" + f", {processes.count()} processes" * (processes.count() > 1)
    return f"{millions:.1f} million weights, {gflop_per_image(network, size):.1f} GFLOP an image, on {place}"


def check_tensorboard() -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError("--tensorboard needs a package of that name: pip install tensorboard") from error


def plot_curves(rows: list[list], path: Path) -> None:
    """The loss, smoothed, the loss by quarter of the noising steps, and the learning rate, over the images seen."""
    from matplotlib.figure import Figure  # half a second to import: not before it is needed

    table = np.array(rows, dtype=float).reshape(-1, len(COLUMNS))  # a quarter that met no image is NaN
    column = dict(zip(COLUMNS, table.T, strict=True))
    window = 1 + len(rows) // 50

    def smooth(values: np.ndarray) -> np.ndarray:
        """Means of as many rows as there are in a fiftieth of the run; near the start, of those there are."""
        known = np.nan_to_num(values).cumsum(), np.isfinite(values).cumsum()
        total, number = (sums - np.concatenate([np.zeros(window), sums])[: len(sums)] for sums in known)
        return total / np.maximum(number, 1)

    figure = Figure(figsize=(13, 3.6))
    axes = figure.subplots(1, 3)
    # margins by hand: a layout that is measured out takes as long as the drawing
    figure.subplots_adjust(left=0.065, right=0.99, bottom=0.14, top=0.92, wspace=0.25)
    axes[0].loglog(column["images"], column["loss"], color="0.8", label="rows of the log")
    axes[0].loglog(column["images"], smooth(column["loss"]), label="smoothed")
    for quarter, label in enumerate(("first (details)", "second", "third", "last (composition)"), 1):
        axes[1].loglog(column["images"], smooth(column[f"loss_q{quarter}"]), label=label)
    axes[2].plot(column["images"], column["lr"])
    axes[2].locator_params(axis="x", nbins=4)  # large numbers would run into one another
    for plot, title in zip(axes, ("training loss", "loss by quarter of t", "learning rate"), strict=True):
        plot.set(title=title, xlabel="images seen")
    for plot in axes[:2]:
        plot.legend()
        plot.xaxis.set_minor_formatter("")  # within one decade they would be written over one another
    write_whole(path, lambda file: figure.savefig(file, format="png"))
