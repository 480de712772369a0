"""One sitting of a training: how far it is, what is due after a step, when it ends.

Nothing here changes what is learned, except under a time budget: there the learning rate falls as
the clock moves.

Reading order: Progress, Session.
"""

import contextlib
import copy
import datetime
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from machinery import checkpoints, inputs, journal, page, processes, trackers
from machinery.basics import counted, printable
from machinery.command_line import StopSignals
from machinery.held_out import HeldOut
from machinery.journal import (
    Log,
    cells_of,
    describe_network,
    hint,
    last_loss,
    longer,
    warning,
)
from machinery.reading import MODES, Dataset
from machinery.runs import SMALL, Run
from machinery.sampling import preview_seeds
from machinery.writing import describe_grid

MANY_HOURS = 3  # of a CPU, which are told before a training begins
SLOWEST_CPU = 10  # GFLOP per second
PREVIEW_ROWS = "inputs, what is made of them, and the true images"
QUICKER = "--preset=laptop takes one hour, with a smaller network"
SHORTER = "--max_minutes=60 takes one hour"  # where the network is as small


class Progress:
    """How far a training is, in steps and by the clock, and what is due after a step.

    Args:
        count: images in the data set; an epoch is this many images.
        batch_size: images per step.
        epochs: when the training ends, at the latest.
        max_minutes: when it ends by the clock, earlier sittings included; 0 for never.
        save_every: minutes between saves; the end of an epoch saves too, at most once a minute.
        sample_every: epochs between previews, 0 for none but the last.
        sample_minutes: minutes between previews, besides; 0 for none by the clock.
        step, minutes: steps done and time used when this sitting starts.
        began: when this sitting started (time.monotonic()): reading the images counts too.
        previews: images of the last preview, which is part of the budget; with guidance, twice.
        is_taught: it begins with what another run has learned, so few images are no fault.
    """

    PREVIEW_COST = 20  # images trained in the time of one preview: 8 steps, a start, much to spare
    PREVIEWS = 10  # of a training whose epochs would give it fewer than half as many
    PREVIEW_WAIT = 5  # at least so many times what a preview costs lies between two of these
    speed = 0.0  # images per second, the best row of this sitting; 0 while there is none
    save_seconds = 0.0  # of the last one
    preview_seconds = 0.0  # of all in this sitting
    is_over = False  # the time budget is used up

    def __init__(
        self,
        *,
        count: int,
        batch_size: int,
        epochs: int,
        max_minutes: float,
        save_every: float,
        sample_every: int,
        step: int,
        minutes: float,
        began: float,
        previews: int,
        sample_minutes: float = 0.0,
        is_taught: bool = False,
    ):
        self.count = count
        self.is_taught = is_taught
        self.batch_size = batch_size
        self.epochs = epochs
        self.max_minutes = max_minutes
        self.save_every = save_every
        self.sample_every = sample_every
        self.first_step = step
        self.last_step = math.ceil(epochs * count / batch_size)
        self.minutes_before = minutes
        self.began = began
        self.sample_minutes = sample_minutes
        self.saved_at = self.shown_at = time.monotonic()
        self.preview_cost = self.PREVIEW_COST * previews
        # as if a preview had come with the last tenth
        self.previewed_at = int(self.PREVIEWS * self.fraction_done(step)) / self.PREVIEWS

    # ---- how far

    def minutes_used(self) -> float:
        """Minutes of training, earlier sittings included."""
        return self.minutes_before + (time.monotonic() - self.began) / 60

    def fraction_used(self) -> float:
        """Of the time budget, with the time of the last preview; 0 without a budget."""
        if not self.max_minutes:
            return 0.0
        preview = 0.0
        if self.speed:
            preview = min(self.preview_cost / self.speed / 60, self.max_minutes / 4)
        fraction = (self.minutes_used() + preview) / self.max_minutes
        return max(1.0, fraction) if self.is_over else fraction

    def fraction_done(self, step: int) -> float:
        """Of the training, in [0, 1]: of its steps or of its time budget, the larger one."""
        return min(1.0, max(step / self.last_step, self.fraction_used()))

    def measured(self, speed: float) -> None:
        """Note a speed in images per second: it tells how long the last preview will take."""
        self.speed = max(self.speed, speed)

    def check_clock(self) -> None:
        """Note if the budget is used up: it stays so, even if the preview looks shorter later."""
        self.is_over = self.is_over or self.fraction_used() >= 1

    def minutes_to_keep(self) -> float:
        """What a checkpoint keeps: the minutes used, or all of a budget that is used up."""
        used = self.minutes_used()
        return max(used, self.max_minutes) if self.fraction_used() >= 1 else used

    def seconds_left(self, step: int, speed: float) -> float:
        """How long the rest takes at this many images per second."""
        by_clock = math.inf
        if self.max_minutes:
            by_clock = 60 * self.max_minutes * (1 - self.fraction_used())
        by_steps = (self.last_step - step) * self.batch_size / speed
        return max(0.0, min(by_clock, by_steps))

    def images_in_all(self, step: int, speed: float) -> float:
        """How many images will have been seen at the end, at this many per second from now on."""
        return step * self.batch_size + self.seconds_left(step, speed) * speed

    # ---- in words

    def summary(self, step: int) -> str:
        """How long the training is, and how much of it is done."""
        length = f"{self.epochs:,} epochs, {self.last_step:,} steps of {self.batch_size} images"
        unit = "minute" if self.max_minutes == 1 else "minutes"
        budget = f", or {self.max_minutes:g} {unit}" if self.max_minutes else ""
        few = self.warning(self.last_step * self.batch_size, "--epochs")
        return f"{length}{budget}; {step:,} steps are done{few}"

    def forecast(self, step: int, speed: float) -> str:
        """What this many images per second mean for the rest of the training."""
        left = datetime.timedelta(seconds=round(self.seconds_left(step, speed)))
        time_left = f"time     {speed:.1f} images per second: about {left} to go"
        images = self.images_in_all(step, speed)
        if round(images) >= self.last_step * self.batch_size:
            return time_left  # all epochs fit, and their number is known
        fits = f"{time_left}, {images:,.0f} images or {images / self.count:.1f} epochs in all"
        return fits + self.warning(images, "--max_minutes")

    def warning(self, images: float, flag: str) -> str:
        """What so few images in all will lead to, if they do; `flag` is what limits them."""
        return "" if self.is_taught else warning(images, flag)

    def hint(self, step: int) -> str:
        """The same of those seen until now, and what continues the training."""
        return "" if self.is_taught else hint(step * self.batch_size, self.way_on(step))

    def way_on(self, step: int) -> str:
        """What continues the training."""
        settings = {"batch_size": self.batch_size, "epochs": self.epochs}
        settings |= {"max_minutes": self.max_minutes}
        return longer(settings, self.count, step, self.minutes_to_keep())

    # ---- what is due

    def epoch(self, step: int) -> int:
        """How many epochs are finished."""
        return step * self.batch_size // self.count

    def ends_epoch(self, step: int) -> bool:
        return step * self.batch_size % self.count < self.batch_size

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Times a save, also one that fails: not every step may try again."""
        self.saved_at = time.monotonic()
        try:
            yield
        finally:
            self.save_seconds = time.monotonic() - self.saved_at

    def is_save_due(self, step: int) -> bool:
        wait = 60 * self.save_every
        if self.ends_epoch(step):  # these saves may take 1% of the time: training waits for them
            wait = min(wait, max(60, 100 * self.save_seconds))
        return time.monotonic() - self.saved_at >= wait

    def is_preview_due(self, step: int) -> bool:
        """After so many minutes or epochs; where these are few, after a tenth of the training.

        All together may take two minutes, and then 5% of the time: training waits for them.
        """
        now = time.monotonic()
        if self.preview_seconds > max(120, (now - self.began) / 20):  # a GPU trains fast
            return False
        if 0 < self.sample_minutes <= (now - self.shown_at) / 60:
            return True
        if not self.sample_every:
            return False
        if self.ends_epoch(step) and self.epoch(step) % self.sample_every == 0:
            return True
        done = self.fraction_done(step)
        images = step * self.batch_size / done  # in all, as it looks now
        wait = max(images / self.PREVIEWS, self.PREVIEW_WAIT * self.preview_cost)
        are_few = images < self.PREVIEWS / 2 * self.sample_every * self.count
        # half an image, since fractions are rounded
        return are_few and (done - self.previewed_at) * images > wait - 0.5

    @contextlib.contextmanager
    def previewing(self, step: int) -> Iterator[None]:
        """Times a preview; from here the way to the next one is measured."""
        self.previewed_at = self.fraction_done(step)
        began = time.monotonic()
        try:
            yield
        finally:
            self.shown_at = time.monotonic()
            self.preview_seconds += self.shown_at - began


class Session:
    """What happens around the steps of a training: it is logged, saved, shown, and ends in time.

    All processes agree on how far the training is; the first one alone writes and prints.

        with session:
            while session.goes_on():
                session.note(*training.advance(session.done))
        session.conclude()

    Args:
        run: what is trained.
        training: has `step` (how many are done), `advance`, `compile`, `preview`, `state()`, the
            network, its `diffusion`, `loader`, `device`, `precision` and `scaler`.
        began: when this sitting started (time.monotonic()).

    Attributes:
        done: the fraction of the training that is done, in [0, 1].
        stop_status: the exit status of a training that is told to stop; 0 while it is not.
    """

    def __init__(self, run: Run, training, began: float):
        settings = run.settings
        self.run = run
        self.training = training
        self.previews = len(preview_seeds(len(settings["classes"])))
        self.progress = Progress(
            count=training.loader.count,
            batch_size=training.loader.batch_size,
            epochs=settings["epochs"],
            max_minutes=settings["max_minutes"],
            save_every=settings["save_every"],
            sample_every=settings["sample_every"],
            sample_minutes=settings["sample_minutes"],
            is_taught=bool(settings["init_from"]),
            step=training.step,
            minutes=run.checkpoint["minutes"],
            began=began,
            # guidance asks twice
            previews=self.previews
            * (1 + bool(settings["classes"]))
            * (1 + settings["raw_previews"]),
        )
        subject = trackers.Subject(run.name, settings, Path("runs", run.name), training.step)
        self.log = Log(
            run.results,
            self.progress,
            settings["noise_steps"],
            training.device,
            rows=run.checkpoint["log"],
            sums=run.checkpoint["sums"],
            has_held_out=settings["held_out"] > 0,
            track=(subject, trackers.chosen(settings)),
        )
        self.held_out = HeldOut(run.split, training) if settings["held_out"] else None
        self.best = None  # a checkpoint to be written, see `note_best`
        self.agree(0)
        self.was_done = self.done >= 1

    # ---- the loop

    def agree(self, stop_status: int) -> None:
        """Have all processes know how far the training is, and whether one is told to stop."""
        done = 0.0
        if processes.is_first():
            self.progress.check_clock()
            done = self.progress.fraction_done(self.training.step)
        stop_status, self.done = processes.largest(stop_status, done)
        self.stop_status = int(stop_status)

    def goes_on(self) -> bool:
        return self.done < 1 and not self.stop_status

    def __enter__(self) -> "Session":
        self.exits = contextlib.ExitStack()
        if processes.is_first():
            self.catch_up()
        if self.goes_on():
            self.warn_if_slow()
            if processes.is_first():
                page.note_command(self.run.results / "command.txt", str(self.training.device))
            self.signals = self.exits.enter_context(StopSignals())
            if processes.is_first():
                self.exits.enter_context(self.log)
        return self

    def __exit__(self, *error) -> None:
        self.exits.__exit__(*error)

    def note(self, losses: Tensor, t: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Log a step (see `Log.add`), then save and show what is due."""
        self.agree(self.signals.status)
        step = self.training.step
        held_out = None
        if self.held_out and (self.done >= 1 or self.held_out.is_due(step)):
            held_out = self.held_out.measure()
        if processes.is_first():
            self.log.add(step, losses, t, grad_norm, lr, held_out)
            if self.log.row_step == step and (remark := self.training.scaler.remark()):
                self.log.bar.write(remark)
            if held_out and self.run.settings["keep_best"]:
                self.note_best(held_out[0])
            self.write(is_last=not self.goes_on())

    # ---- what is written

    def catch_up(self) -> None:
        """Write what a sitting that died may have left out: the log, and the last preview."""
        self.log.write()
        is_finished = self.done >= 1 and self.training.step > 0
        if is_finished and not self.preview_path().exists():
            self.preview()

    def write(self, is_last: bool) -> None:
        """Save, preview and log what is due after a step."""
        step = self.training.step
        is_saved = False
        if self.done >= 1:
            self.log.finish()
        try:
            if is_last or self.progress.is_save_due(step):
                self.save()
                is_saved = True
            is_shown = self.done >= 1 or self.progress.is_preview_due(step)
            if is_shown:
                self.preview()
            self.log.write()
            if is_shown or is_last:
                self.write_page()
            if self.done >= 1:
                self.track_result()
        except OSError as error:  # a full disk must not end a training, nor hide that it was saved
            if is_last and not is_saved:
                raise
            goes_on = "" if is_last else "; training goes on"
            what = f"{error.filename or self.run.path}: {error.strerror or error}"
            self.log.bar.write(f"not written: {what}{goes_on}")

    def note_best(self, loss: float) -> None:
        """Keep the EMA weights, if none that are kept had a lower loss on held-out images.

        They are written with the next save.
        """
        if loss <= self.run.best_loss:
            self.run.best_loss = loss
            state = self.training.state()
            weights = {name: weight.cpu().clone() for name, weight in state["average"].items()}
            facts = {"log": list(self.log.table()), "count": self.progress.count}
            self.best = facts | {"average": weights, "step": state["step"]}

    def save(self) -> None:
        state = self.training.state() | self.log.state()
        with self.progress.saving():
            # first: a sitting that dies in between comes to the same step again
            if self.best:
                self.run.save_best(**self.best)
                self.best = None
            minutes = self.progress.minutes_to_keep()
            self.run.save(**state, minutes=minutes, count=self.progress.count)

    def preview_path(self) -> Path:
        step = self.training.step
        within = "" if self.progress.ends_epoch(step) else f"_step_{step:08d}"
        name = f"epoch_{self.progress.epoch(step):04d}{within}.png"
        return self.run.results / "training_progress" / name

    def preview(self) -> None:
        path = self.preview_path()
        with self.progress.previewing(self.training.step):
            previews = {"previews": self.training.preview(path, self.training.ema)}
            if self.run.settings["raw_previews"]:
                network = copy.deepcopy(self.training.ema)
                network.load_state_dict(self.training.network.state_dict())
                raw = path.with_stem(f"{path.stem}_raw")
                previews["previews_raw"] = self.training.preview(raw, network)
            self.log.illustrate(previews)

    def write_page(self) -> None:
        """Write results/RUN/index.html."""
        network = self.training.network
        stored = {"settings": self.run.settings, "step": self.training.step, "log": self.log.rows}
        stored |= {"minutes": self.progress.minutes_to_keep(), "count": self.progress.count}
        stored["weights"] = sum(weight.numel() for weight in network.parameters())
        page.write_page(self.run.name, stored)

    def track_result(self) -> None:
        """Tell trackers the final figures; those that keep models get one, as it is published."""
        if not self.log.trackers:
            return
        step = self.training.step
        facts = {"count": self.progress.count, "data": self.run.listing.fingerprint}
        stored = self.training.state() | self.log.state() | facts | {"settings": self.run.settings}
        loss, _ = last_loss(self.log.rows)
        figures = {"loss": loss, "images": step * self.progress.batch_size}
        figures |= {"minutes": self.progress.minutes_used()}
        if measured := self.log.measured():
            figures["best_held_out"] = min(cells_of(row)["held_out"] for row in measured)
        model = None
        if any(trackers.TRACKERS[tracker.name].keeps_model for tracker in self.log.trackers):
            model = self.log.subject.folder / "model.pt"
            checkpoints.write(model, **checkpoints.published(stored, self.run.name))
        self.log.track("conclude", step, figures, model)

    # ---- what is said

    def print_summary(self, data: Dataset) -> None:
        """Print what the training is; write its first images to data.png."""
        if not processes.is_first():
            return
        settings = self.run.settings
        loader = self.training.loader
        examples = self.run.results / "data.png"
        loader.save_examples(examples)
        height, width = settings["img_size"]
        kind = f"{height}x{width} from {settings['dataset']}, in {MODES[data.mode]}"
        remarks = [*data.remarks, f"a look at them: {examples}"]
        if settings["inputs"]:
            remarks.append(f"in the previews: rows of {PREVIEW_ROWS}")
        elif settings["classes"]:
            where = describe_grid(settings["classes"], self.previews)
            remarks.append(f"in the previews: {where}")
        kind, *remarks = (printable(text, limit=500) for text in (kind, *remarks))
        where = self.training.device, self.training.precision
        network = describe_network(self.training.network, (height, width), *where)
        print(f"data     {counted(loader.count, 'image')} of {kind}", *remarks, sep="\n         ")
        print(f"network  {network}")
        print(f"length   {self.progress.summary(self.training.step)}")
        print(f"files    {self.run.path}, {self.run.results}{os.sep}", flush=True)

    def compile(self) -> None:
        """Compile the network, unless nothing is left to do."""
        if self.done >= 1:
            return
        began = time.monotonic()
        self.training.compile()
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)

    def warn_if_slow(self) -> None:
        """On a CPU, tell before it begins that a training takes many hours, by two trial steps.

        There are none where it is short on any CPU, or nothing is to be advised.
        """
        progress, training = self.progress, self.training
        if not self.is_advised():
            return
        images = progress.last_step * progress.batch_size
        # forward and backward: three times the operations of an answer
        gflop = 3 * journal.gflop_per_image(training.network, self.run.settings["img_size"])
        if images * gflop / SLOWEST_CPU / 3600 < MANY_HOURS:
            return
        for _ in range(2):  # the first one is slow
            began = time.monotonic()
            training.rehearse()
            speed = progress.batch_size / (time.monotonic() - began)
        if way_out := self.way_out(speed):
            print(f"{progress.forecast(training.step, speed)}{way_out}", flush=True)

    def is_advised(self) -> bool:
        """Whether many hours would be told of: of one CPU, not of a budget or once it has begun."""
        is_chosen = self.progress.max_minutes > 0 or self.progress.first_step > 0
        return self.training.device.type == "cpu" and processes.count() == 1 and not is_chosen

    def way_out(self, speed: float) -> str:
        """What takes less than many hours of a CPU: words to append to a forecast, or nothing."""
        seconds = self.progress.seconds_left(self.progress.first_step, speed)
        if not self.is_advised() or seconds / 3600 < MANY_HOURS:
            return ""
        is_small = self.run.settings["width"] <= SMALL["width"]
        return f" on this CPU; {SHORTER if is_small else QUICKER}"

    def dry_run(self) -> None:
        """Print how long the training would take, by the second of two steps: the first is slow."""
        for _ in range(2):
            began = time.monotonic()
            losses, *_ = self.training.advance(self.done)
            losses.tolist()  # waits for a GPU
            speed = self.progress.batch_size / (time.monotonic() - began)
        print(self.progress.forecast(self.progress.first_step, speed) + self.way_out(speed))

    def conclude(self) -> None:
        """Print what came out. A training that was told to stop exits with its signal's status."""
        if self.was_done and self.training.step == 0:
            reason = "reading the images took all of --max_minutes"
            print(f"nothing was learned: {reason}; they are cached now, start again")
        elif self.was_done:
            way_on = self.progress.way_on(self.training.step)
            print(f"nothing to do: this run is finished; {way_on} continues it")
        else:
            processes.wait()  # if one leaves, torchrun stops the others, which may be saving
            if self.stop_status and self.done < 1:
                done = f"step {self.training.step:,} of {self.progress.last_step:,}"
                print(f"stopped and saved at {done}; the same command resumes it")
                raise SystemExit(self.stop_status)
            diffusion = self.training.diffusion
            every_step = torch.arange(1, diffusion.noise_steps + 1, device=self.training.device)
            # a target of images in [-1, 1] has a mean square of 1 at most
            blank_loss = diffusion.weight(every_step).mean().item()
            asked = inputs.asked(self.run.settings) or "--n_img=16"
            print(self.log.report(self.run.name, asked, blank_loss))
            if self.run.best_loss < math.inf:
                kept = f"are the run {self.run.best_name}"
                print(f"the weights of the lowest held-out loss, {self.run.best_loss:.4f}, {kept}")
