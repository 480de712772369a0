"""What a training tells while it runs: log.csv, loss.png, trackers, the progress bar.

Reading order: Log, what is said once, plot_curves.
"""

import copy
import csv
import datetime
import io
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from machinery import checkpoints, processes, trackers
from machinery.basics import UserError, append_rows, progress_bar, write_whole

FEW_IMAGES = 20_000  # after which even a small network makes more than blurs
SENSELESS = 1.5  # a loss of so many times what an output of zeros costs is no training at all
ROW_EVERY = 20  # steps between two rows of the log: reading the sums makes a GPU wait
DENSE_ROWS = 2000  # of a log; from then on the steps between two double when their number has
QUARTERS = 4  # of the noising steps: the early ones (t small) are details, the late composition
COLUMNS = ("step", "epoch", "images", "loss", "lr", "grad_norm", "clipped")
COLUMNS += (*(f"loss_q{quarter}" for quarter in range(1, QUARTERS + 1)), "img_per_s")
# of the EMA weights: their loss on held-out images and on as many they have learned from, and by
# how many standard errors the first is larger; a run without held-out images has none of these
KINDS = ("held_out", "learned")
HELD_OUT_COLUMNS = ()
for kind in KINDS:
    HELD_OUT_COLUMNS += (kind, *(f"{kind}_q{quarter}" for quarter in range(1, QUARTERS + 1)))
HELD_OUT_COLUMNS += ("gap",)
ALL_COLUMNS = COLUMNS + HELD_OUT_COLUMNS
OPEN_ERRORS = 3.0  # standard errors: chance alone exceeds that in one run of 700
OPEN_RATIO = 1.1  # of the two losses: a smaller gap may be sure, but harms nobody
MEMORIZES = "the model begins to memorize: more images, --dropout, or stop here"
SUMS = 3 + 2 * QUARTERS  # loss, norm, clipped gradients; loss and number of images per quarter


def row_every(step: int) -> int:
    """Steps between two rows at `step` (1, 2, ...): a million steps have 6,500 rows, not 50,000."""
    return ROW_EVERY << ((step - 1) // (DENSE_ROWS * ROW_EVERY)).bit_length()


def cells_of(row: list) -> dict:
    """A row of the log by its columns; without held-out images, those of these are missing."""
    return dict(zip(ALL_COLUMNS, row, strict=False))


def is_log(rows, last_step: int) -> bool:
    """Whether a stranger's rows are such as `Log` keeps: finite numbers, one step after another.

    All have the same columns. Only a quarter that met no image, and what was not measured of the
    held-out images, has None.
    """
    if type(rows) is not list:
        return False
    lengths = (len(COLUMNS), len(ALL_COLUMNS))
    before = 0
    for row in rows:
        if type(row) is not list or len(row) not in lengths or len(row) != len(rows[0]):
            return False
        cells = cells_of(row)
        for name, cell in cells.items():
            kinds = (int,) if name in ("step", "images", "clipped") else (int, float)
            least = -math.inf if name == "gap" else 0
            is_number = type(cell) in kinds and least <= cell < math.inf and cell > -math.inf
            may_be_none = name.startswith("loss_q") or name in HELD_OUT_COLUMNS
            if not is_number and not (cell is None and may_be_none):
                return False
        if not before < cells["step"] <= last_step or not cells["images"] * cells["epoch"]:
            return False
        before = cells["step"]
    return True


def is_open(row: list) -> bool:
    """Whether a row shows a gap: the model learns images by heart."""
    cells = cells_of(row)
    if cells.get("gap") is None:
        return False
    return cells["gap"] >= OPEN_ERRORS and cells["held_out"] >= OPEN_RATIO * cells["learned"]


class Log:
    """What a training tells while it runs.

    Steps are added up on the device. The sums and the rows so far are part of the checkpoint:
    the log of a resumed run equals, to the bit, that of a run that was never stopped.

    Args:
        folder: results/RUN.
        progress: of the training; see session.Progress.
        noise_steps: T, whose quarters have a loss each.
        device: where the sums are.
        rows, sums: what `state` returned when the run was saved; nothing yet for a new run.
        has_held_out: whether there are held-out images.
        track: what goes to trackers, and the names of these.
    """

    def __init__(
        self,
        folder: Path,
        progress,
        noise_steps: int,
        device: torch.device,
        rows: list[list] = (),
        sums: Tensor | None = None,
        has_held_out: bool = False,
        track: tuple[trackers.Subject | None, list[str]] = (None, []),
    ):
        self.path = folder / "log.csv"
        self.progress = progress
        self.noise_steps = noise_steps
        self.subject, self.tracker_names = track
        self.trackers = []
        self.columns = ALL_COLUMNS if has_held_out else COLUMNS
        self.unmeasured = [None] * (len(self.columns) - len(COLUMNS))
        self.held_out = self.unmeasured  # HELD_OUT_COLUMNS of the next row
        self.rows = list(rows)
        self.sums = (torch.zeros(SUMS) if sums is None else sums).to(device)
        self.quarters = torch.arange(QUARTERS, device=device)[:, None]
        self.step = progress.first_step
        ends = [0, *(row[0] for row in self.rows)]
        is_partial = ends[-1] == self.step and self.sums.any()
        self.row_step = ends[-2 if is_partial else -1]  # of the last whole row: the sums are since
        self.lr = None  # of the last step; unknown before the first
        self.rows_written = None  # log.csv is to be written anew
        self.has_news = True

    def state(self) -> dict:
        """What a checkpoint keeps; refused where NaN would take the place of a good one."""
        self.check()
        return {"log": self.rows, "sums": self.sums}

    def __enter__(self) -> "Log":
        if self.rows and self.rows[-1][0] > self.row_step:
            self.rows.pop()  # its steps are part of the next row, and still in the sums
            self.rows_written = None
        progress = self.progress
        total = progress.last_step * progress.batch_size
        budget = 60 * progress.max_minutes or math.inf
        self.bar = progress_bar(total, progress.first_step * progress.batch_size, budget=budget)
        self.timed_at = time.monotonic()
        self.timed_step = self.step
        self.has_forecast = False
        self.trackers = [trackers.Tracker(name, self.subject) for name in self.tracker_names]
        return self

    def __exit__(self, *_) -> None:
        for tracker in self.trackers:
            tracker.close()
        self.track()
        self.bar.close()

    def add(
        self,
        step: int,
        losses: Tensor,
        t: Tensor,
        grad_norm: Tensor,
        lr: float,
        held_out: list | None = None,
    ) -> None:
        """Note step `step` (1, 2, ...).

        Args:
            losses, t: of each image, its loss and its noising step (B,).
            grad_norm: before the gradient was clipped to 1.
            lr: the learning rate.
            held_out: HELD_OUT_COLUMNS after this step, where these were measured.

        Raises:
            UserError: a sum is no longer finite (noticed with a row, and before a save).
        """
        in_quarter = (t - 1) * QUARTERS // self.noise_steps == self.quarters  # (4, B)
        whole = torch.stack([losses.mean(), grad_norm, grad_norm > 1])
        self.sums += torch.cat([whole, (in_quarter * losses).sum(1), in_quarter.sum(1)])
        self.step = step
        self.lr = lr
        self.held_out = held_out or self.unmeasured
        batch_size = self.progress.batch_size
        self.bar.total = max(self.bar.total, step * batch_size)  # under a budget, an estimate
        if self.progress.max_minutes and not self.progress.speed:  # no row has told it yet
            self.foresee(self.speed())
        self.bar.update(batch_size)
        if step % row_every(step) == 0:
            self.add_row()

    def add_row(self) -> None:
        """Make a row of the sums, and start new ones."""
        self.check()
        self.rows.append(self.row())
        self.sums.zero_()
        is_full = self.timed_step == self.row_step
        self.row_step = self.step
        self.timed_at = time.monotonic()
        self.timed_step = self.step
        self.progress.measured(cells_of(self.rows[-1])["img_per_s"])
        self.tell(is_full)

    def finish(self) -> None:
        """Make a row of the last steps, fewer than usual. A longer training takes it back."""
        if self.step > self.row_step:
            self.check()
            self.rows.append(self.row())
            self.tell(is_full=False)

    def speed(self) -> float:
        """Images per second since the last row."""
        seconds = max(time.monotonic() - self.timed_at, 1e-9)
        return (self.step - self.timed_step) * self.progress.batch_size / seconds

    def foresee(self, speed: float) -> None:
        """Have the bar end where the training will, at this many images per second."""
        self.bar.total = round(self.progress.images_in_all(self.step, speed))

    def row(self) -> list:
        """`columns` of the steps since the last row, of which the sums are."""
        images = self.step * self.progress.batch_size
        epoch = images / self.progress.count
        steps = self.step - self.row_step
        loss, norm, clipped, *quarters = self.sums.tolist()
        sums, counts = quarters[:QUARTERS], quarters[QUARTERS:]
        by_quarter = [sum_ / n if n else None for sum_, n in zip(sums, counts, strict=True)]
        means = [loss / steps, self.lr, norm / steps, int(clipped)]
        return [self.step, epoch, images, *means, *by_quarter, self.speed(), *self.held_out]

    def table(self) -> list[list]:
        """All rows, and one of the steps since the last of them."""
        is_told = self.lr is None or (self.rows and self.rows[-1][0] == self.step)
        return self.rows if is_told else [*self.rows, self.row()]

    def tell(self, is_full: bool) -> None:
        """Show the last row; once, after a full one, print how long the training takes."""
        self.has_news = True
        row = cells_of(self.rows[-1])
        values = {name: row[name] for name in self.columns[1:] if row[name] is not None}
        self.track("scalars", self.step, values)
        progress = self.progress
        speed = row["img_per_s"]
        self.foresee(speed)
        if is_full and not self.has_forecast:
            self.has_forecast = True
            self.bar.write(progress.forecast(self.step, speed))
        wait = max(0, progress.save_every - (time.monotonic() - progress.saved_at) / 60)
        if is_open(self.rows[-1]) and not any(map(is_open, self.rows[:-1])):
            losses = f"loss {row['held_out']:.4f} on held-out images"
            self.bar.write(f"{losses}, {row['learned']:.4f} on images of the training: {MEMORIZES}")
        held_out = next((cells_of(row)["held_out"] for row in self.measured()[-1:]), None)
        others = f", held out {held_out:.4f}" if held_out else ""
        words = f"epoch {row['epoch']:.1f}, loss {row['loss']:.4f}{others}, save in {wait:.0f} min"
        self.bar.set_postfix_str(words, refresh=False)

    def measured(self) -> list[list]:
        """The rows in which the loss on held-out images stands."""
        return [row for row in self.rows if cells_of(row).get("held_out") is not None]

    def track(self, *message) -> None:
        """Tell all trackers; print once for each that it is told no more, and why."""
        for tracker in list(self.trackers):
            if message:
                tracker.tell(*message)
            if tracker.fault:
                self.trackers.remove(tracker)
                self.bar.write(f"{tracker.name} is no longer told: {tracker.fault}")

    def check(self) -> None:
        numbers = [cell for cell in self.held_out if cell is not None]
        if not self.sums.isfinite().all() or not all(map(math.isfinite, numbers)):
            where = f"at step {self.step:,}, learning rate {self.lr:.1e}"
            advice = "start another run with a lower --lr or a longer --warmup"
            raise UserError(f"the loss is infinite or NaN {where}; {advice}")

    def write(self) -> None:
        """Bring log.csv up to date: written anew when a sitting starts, then appended to."""
        if not self.has_news:
            return
        written = self.rows_written
        self.rows_written = None  # what fails is written anew with the next row
        self.has_news = False
        if written is None:
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
            write_whole(self.path, lambda file: file.write(text.getvalue().encode()))
        else:
            append_rows(self.path, self.columns, self.rows[written:])
        self.rows_written = len(self.rows)

    def report(self, run_name: str, asked: str, blank_loss: float) -> str:
        """What came out, and what to do with it.

        Args:
            run_name: of the run.
            asked: what `sample` is asked for, in its flags.
            blank_loss: what an output of nothing but zeros costs.
        """
        mean = ""
        if self.rows:
            loss, steps = last_loss(self.rows)
            which = f"the last {steps:,}" if steps < self.step else f"all {steps:,}"
            mean = f"; loss {loss:.4f} over {which} steps"
            # of fewer steps, the draws of t alone may do it
            if steps >= ROW_EVERY and loss > SENSELESS * blank_loss:
                nothing = f"far above {blank_loss:.4f}, which an output of nothing but zeros costs"
                mean += f"\nthis loss is {nothing}: start another run with a lower --lr"
        time_taken = datetime.timedelta(seconds=round(60 * self.progress.minutes_used()))
        epochs = self.step * self.progress.batch_size / self.progress.count
        return f"""trained for {epochs:.1f} epochs in {time_taken}{mean}
the weights are in {checkpoints.paths_of(run_name)[0]},
previews, log.csv and loss.png in {self.path.parent},
all of it for a browser in {self.path.with_name("index.html")}{self.progress.hint(self.step)}
to make images:
  python ddpm.py sample --run_name={run_name} {asked}
to judge them, and see whether they are copies:
  python -m tools.evaluate --run_name={run_name}"""

    def illustrate(self, previews: dict[str, Tensor]) -> None:
        """Draw loss.png anew; hand images (B, C, H, W) in 0..255 to trackers, by their names."""
        plot_curves(self.table(), self.path.with_name("loss.png"))
        for name, images in previews.items():
            self.track("images", self.step, name, images.numpy())


def last_loss(rows: list[list]) -> tuple[float, int]:
    """The mean loss of the last rows, and how many steps these are.

    They are a tenth of all steps at most, and 50 rows; but as many as a full row has in any case,
    if there are so many: the loss of fewer is mostly chance.
    """
    ends = np.array([row[0] for row in rows])
    lengths = np.diff(ends, prepend=ends[0] - ((ends[0] - 1) % ROW_EVERY + 1))
    covered = lengths[::-1].cumsum()  # by the last row, by the last two, ...
    is_taken = (covered[:-1] < ROW_EVERY) | (covered[1:] <= ends[-1] / 10)
    number = min(50, 1 + is_taken.sum())
    losses = [row[COLUMNS.index("loss")] for row in rows[-number:]]
    return float(np.average(losses, weights=lengths[-number:])), int(covered[number - 1])


def longer(settings: dict, count: int, step: int, minutes: float) -> str:
    """What continues a training of `count` images that has come to `step`, in `minutes`."""
    batch_size = min(settings["batch_size"], count)
    budget = settings["max_minutes"]
    is_over = {
        "--epochs": step * batch_size >= settings["epochs"] * count,
        "--max_minutes": 0 < budget <= minutes,
    }
    flags = [flag for flag, is_reached in is_over.items() if is_reached]
    return f"a larger {' and '.join(flags)}" if flags else "the same `train` command"


def hint(images: float, way_on: str) -> str:
    """Why images may look like noise after few training images: a line to append, or nothing.

    Args:
        images: seen in training.
        way_on: what continues it.
    """
    if images >= FEW_IMAGES:
        return ""
    seen = f"only {images:,} images have been seen in training so far"
    return f"\n{seen}: expect blurs and noise; {way_on} continues it"


def warning(images: float, flag: str) -> str:
    """The same before a training that is to see so many images; `flag` is what limits it."""
    if images >= FEW_IMAGES:
        return ""
    seen = f"only {round(images):,} images will be seen in training"
    return f"\n         {seen}: expect blurs and noise; a larger {flag} shows it more"


def in_units(value: float, units: tuple[str, ...]) -> str:
    """A number and the unit, each a thousand times the one before, in which it is 1 to 1,000."""
    step = 0
    while step < len(units) - 1 and round(value, 1) >= 1000:
        value /= 1000
        step += 1
    return f"{value:.{1 if step else 0}f}{units[step]}"


class Products(TorchFunctionMode):
    """Counts the products within convolutions, linear layers and attention, an image's each."""

    count = 0

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        if function in (F.conv2d, F.linear):
            self.count += output.shape[1:].numel() * args[1][0].numel()
        elif function is F.conv_transpose2d:
            self.count += args[0].shape[1:].numel() * args[1][0].numel()
        elif function is F.scaled_dot_product_attention:
            self.count += 2 * args[0].shape[1:].numel() * args[1].shape[-2]
        return output


def gflop_per_image(network: nn.Module, size: tuple[int, int]) -> float:
    """Billions of multiplications and additions of a forward pass; a training step takes three.

    A batch of no images goes through, in no time. (PyTorch's own counter imports its compiler,
    which takes more than a second.)
    """
    network = copy.deepcopy(network).cpu()  # not every device takes no images
    with torch.no_grad(), Products() as products:
        network(torch.empty(0, network.channels, *size), torch.ones(0, dtype=torch.long))
    return 2 * products.count / 1e9


def describe_network(
    network: nn.Module, size: tuple[int, int], device: torch.device, precision: torch.dtype
) -> str:
    """How large a network is, and where it computes."""
    count = sum(parameter.numel() for parameter in network.parameters())
    weights = in_units(count, ("", " thousand", " million", " billion"))
    flop = 1e9 * gflop_per_image(network, size)
    operations = in_units(flop, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP"))
    several = f", {processes.count()} processes" if processes.count() > 1 else ""
    where = f"{device} in {str(precision).removeprefix('torch.')}{several}"
    return f"{weights} weights, {operations} an image, on {where}"


def smooth(values: np.ndarray) -> np.ndarray:
    """Means over a fiftieth of the rows, without NaN; near the start, over those there are."""
    window = 1 + len(values) // 50
    known = np.nan_to_num(values).cumsum(), np.isfinite(values).cumsum()
    total, number = (sums - np.concatenate([np.zeros(window), sums])[: len(sums)] for sums in known)
    return total / np.maximum(number, 1)


def plot_curves(rows: list[list], path: Path) -> None:
    """The loss, the loss by quarter of the noising steps, and the learning rate, over images."""
    from matplotlib.figure import Figure  # half a second to import: not before it is needed

    # a quarter that met no image is NaN
    width = len(rows[0]) if rows else len(COLUMNS)
    table = np.array(rows, dtype=float).reshape(-1, width)
    column = dict(zip(ALL_COLUMNS, table.T, strict=False))
    marker = "o" if len(rows) == 1 else None  # a line of one point is none

    figure = Figure(figsize=(13, 3.6))
    axes = figure.subplots(1, 3)
    # margins by hand: a layout that is measured out takes as long as the drawing
    figure.subplots_adjust(left=0.065, right=0.99, bottom=0.14, top=0.92, wspace=0.25)
    images = column["images"]
    axes[0].loglog(images, column["loss"], marker=marker, color="0.8", label="rows of the log")
    axes[0].loglog(images, smooth(column["loss"]), marker=marker, label="smoothed")
    if "gap" in column:
        is_measured = np.isfinite(column["held_out"])
        dot = "." if is_measured.sum() < 50 else None
        for kind, label in zip(KINDS, ("held out (EMA)", "learned from (EMA)"), strict=True):
            values = column[kind][is_measured]
            axes[0].loglog(images[is_measured], values, marker=dot, label=label)
    quarters = ("first (details)", "second", "third", "last (composition)")
    for quarter, label in enumerate(quarters, 1):
        axes[1].loglog(images, smooth(column[f"loss_q{quarter}"]), marker=marker, label=label)
    axes[2].plot(images, column["lr"], marker=marker)
    axes[2].locator_params(axis="x", nbins=4)  # large numbers would run into one another
    titles = ("training loss", "loss by quarter of t", "learning rate")
    for plot, title in zip(axes, titles, strict=True):
        plot.set(title=title, xlabel="images seen")
    for plot in axes[:2]:
        plot.legend()
        plot.xaxis.set_minor_formatter("")  # within one decade, labels would overlap
    write_whole(path, lambda file: figure.savefig(file, format="png"))
