"""One sitting of a training: how far it is, and what is due.

Nothing here is about diffusion, and nothing changes what is learnt - but for a time budget, by which the learning rate
falls as the clock moves.
"""

import contextlib
import datetime
import math
import time
from collections.abc import Iterator


class Course:
    """How far a training is, in steps and by the clock, and what is due after a step.

    Args:
        count: images in the data set; an epoch is so many images.
        batch_size: images per step.
        epochs: when the training ends, at the latest.
        max_minutes: when it ends by the clock, earlier sessions included; 0 for never.
        save_every: minutes between saves; the end of an epoch is a good moment, once a minute at most.
        sample_every: epochs between previews, 0 for none but the last.
        step, minutes: where the run stood when it was saved.
        began: when this session did (time.monotonic()): reading the images counts as well.
        previews: images of the last preview, which is part of the budget; one with guidance counts as two.
    """

    PREVIEW_COST = 20  # images that could be trained on while one is sampled: 5 in 15 steps, and a start and an end
    speed = 0.0  # images per second, the best row of this session; 0 while there is none
    save_took = 0.0  # seconds, the last one
    is_over = False  # the budget of time

    def __init__(
        self,
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
    ):
        self.count, self.batch_size, self.epochs, self.max_minutes = count, batch_size, epochs, max_minutes
        self.save_every, self.sample_every = save_every, sample_every
        self.last_step, self.first_step = math.ceil(epochs * count / batch_size), step
        self.minutes_before, self.began, self.saved_at = minutes, began, time.monotonic()
        self.preview_cost = self.PREVIEW_COST * previews

    def summary(self, step: int) -> str:
        """How long the training is, and what of it is done."""
        budget = f", or {self.max_minutes:g} minutes" if self.max_minutes else ""
        length = f"{self.epochs:,} epochs, {self.last_step:,} steps of {self.batch_size} images{budget}"
        return f"{length}; {step:,} steps are done"

    def used(self) -> float:
        """Minutes of training, earlier sessions included."""
        return self.minutes_before + (time.monotonic() - self.began) / 60

    def by_clock(self) -> float:
        """The share of the budget that is used up, with what the last preview will take; 0 without a budget."""
        if not self.max_minutes:
            return 0.0
        preview = min(self.preview_cost / self.speed / 60, self.max_minutes / 4) if self.speed else 0.0
        share = (self.used() + preview) / self.max_minutes
        self.is_over = self.is_over or share >= 1  # even if the preview looks shorter a moment later
        return max(1.0, share) if self.is_over else share

    def done(self, step: int) -> float:
        """The share of the training that is done, in [0, 1]: of its steps or of its minutes, the larger one."""
        return min(1.0, max(step / self.last_step, self.by_clock()))

    def minutes(self) -> float:
        """What the checkpoint keeps: the minutes used, or all of a budget that is used up."""
        return max(self.used(), self.max_minutes) if self.by_clock() >= 1 else self.used()

    def seconds_left(self, step: int, speed: float) -> float:
        """How long the rest takes at so many images per second."""
        by_clock = 60 * self.max_minutes * (1 - self.by_clock()) if self.max_minutes else math.inf
        return max(0.0, min(by_clock, (self.last_step - step) * self.batch_size / speed))

    def forecast(self, step: int, speed: float) -> str:
        """What so many images per second mean for the rest of the training."""
        left = datetime.timedelta(seconds=round(self.seconds_left(step, speed)))
        return f"time     {speed:.1f} images per second: about {left} to go"

    def farewell(self, step: int) -> str:
        """Why nothing is left to do."""
        if step == 0:
            return "nothing was learnt: reading the images took all of --max_minutes; they are read now, start again"
        return "nothing to do: this run has come to its end; a larger --epochs or --max_minutes takes it further"

    def epoch(self, step: int) -> int:
        """How many epochs are finished."""
        return step * self.batch_size // self.count

    def ends_epoch(self, step: int) -> bool:
        return step * self.batch_size % self.count < self.batch_size

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Takes the time of a save; also of one that fails: not every step may try again."""
        self.saved_at = time.monotonic()
        try:
            yield
        finally:
            self.save_took = time.monotonic() - self.saved_at

    def is_save_due(self, step: int) -> bool:
        wait = 60 * self.save_every
        if self.ends_epoch(step):  # a hundredth of the time may go into these saves: training waits for them
            wait = min(wait, max(60, 100 * self.save_took))
        return time.monotonic() - self.saved_at >= wait

    def is_preview_due(self, step: int) -> bool:
        return self.ends_epoch(step) and self.sample_every > 0 and self.epoch(step) % self.sample_every == 0
