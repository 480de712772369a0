"""A run: its settings, its folders, its lock, and whether what is asked for is the same run.

Reading order: checks of settings; Run, while it is trained; reading a run; the table of all runs.
"""

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

from machinery import checkpoints, held_out, inputs, processes, reading
from machinery.basics import (
    BROKEN_FILE,
    UserError,
    acquire,
    folder_while_used,
    in_short,
    printable,
)
from machinery.command_line import (
    as_typed,
    check_limits,
    check_name,
    flip_of_switch,
    in_flags,
)
from machinery.inputs import are_alike
from machinery.journal import COLUMNS, SUMS, cells_of, hint, is_log, longer
from machinery.listing import Listing, tell_classes
from machinery.steps import are_paths, teacher_of
from machinery.trackers import check_trackers

UNTITLED = "untitled"  # the run of those who name none
COUNT = (1, 10**9)
NOT_NEGATIVE = (0, math.inf)
WHOLE = (0, 10**9)
# The smallest and the largest value of a flag, and of a setting that has no flag.
RANGES = {
    "held_out": WHOLE,
    "crop_margin": (1, 32),
    "epochs": COUNT,
    "max_minutes": NOT_NEGATIVE,
    "seed": (0, 2**63 - 1),
    "width": (4, 4096),
    "blocks": (1, 16),
    "attention_size": WHOLE,
    "dropout": (0, 0.99),
    "noise_steps": (2, 100_000),
    "min_snr": (0, 10**6),
    "batch_size": COUNT,
    "micro_batch": COUNT,
    "lr": (1e-9, 1),
    "warmup": WHOLE,
    "ema_decay": (0, 0.999999),
    "sample_every": WHOLE,
    "sample_minutes": NOT_NEGATIVE,
    "save_every": NOT_NEGATIVE,
    "n_img": COUNT,
    "guidance": (0, 1000),
    "strength": (0, 1),
    "variation": (0, 1),
    "steps": COUNT,
    "head_width": WHOLE,
    "norm_groups": WHOLE,
    "norm_eps": (0, 1),
    "frequency_shift": (0, 1),
    "downsample_padding": (0, 1),
}
# sets of flags for those who have no GPU; one that is given beside a preset wins
SMALL = {"width": 32, "attention_size": 8, "batch_size": 16}
PRESETS = {
    "none": {},
    "laptop": SMALL
    | {"img_size": (64,), "multipliers": (1, 2, 4, 6), "lr": 1e-3, "max_minutes": 60},
    "tiny": SMALL | {"img_size": (32,), "multipliers": (1, 2, 4), "lr": 2e-3, "max_minutes": 8},
}
# The flags that may have other values when a run is resumed.
MAY_CHANGE = {"dataset", "epochs", "max_minutes", "resume", "device", "sample_every", "save_every"}
MAY_CHANGE |= {"tensorboard", "dry_run", "micro_batch", "compile", "grad_checkpointing"}
MAY_CHANGE |= {"precision"}  # a run may move to a machine that has another
MAY_CHANGE |= {"keep_best", "track", "raw_previews", "sample_minutes"}
# where a run and its cache lie, and where it began, change nothing
MAY_CHANGE |= {"run_name", "init_from", "cache"}
# What versions did that had no such flag, or kept no such setting, where it is not the default.
BEFORE = {"mode": "RGB", "classes": (), "held_out": 0, "input_mode": "", "optimizer": "adamw"}
# what the settings of a network that was trained elsewhere may add; there are no flags for these
IMPORTED = {
    "attention_levels": tuple,
    "head_width": int,
    "norm_groups": int,
    "downsample_padding": int,
    "norm_eps": float,
    "frequency_shift": float,
}

# ---- checks of settings --------------------------------------------------------------------------


def check_training(settings: dict, limits: dict) -> None:
    """Refuse what `train` cannot do, before anything is made."""
    check_limits(settings, limits)
    check_name("run_name", settings["run_name"])
    if settings["init_from"]:
        check_name("init_from", settings["init_from"])
    if not settings["dataset"]:
        raise UserError("--dataset= is empty; it takes any folder of images")
    cache = Path(settings["cache"])
    if not settings["cache"] or (cache.exists() and not cache.is_dir()):
        raise UserError(f"--cache={settings['cache']} is no folder; it takes one, which is made")
    if settings["crop"] != "random" and settings["crop_margin"] != reading.CROP_MARGIN:
        margin = f"--crop_margin={settings['crop_margin']:g}"
        raise UserError(f"{margin} is for --crop=random; other images are decoded in their size")
    if settings["preset"] != "none":
        values = {name: settings[name] for name in limits["preset"][settings["preset"]]}
        print(f"preset   {settings['preset']}: {in_flags(values)}")
    del settings["preset"]  # a run is described by its numbers
    check_trackers(settings)
    check_network(settings)
    inputs.check_inputs(settings)


def check_network(settings: dict) -> None:
    """Refuse a network that cannot be built."""
    multipliers = settings["multipliers"]
    width = settings["width"]
    are_sensible = all(1 <= multiplier <= 64 for multiplier in multipliers)
    if not 1 <= len(multipliers) <= 8 or not are_sensible:
        flag = f"--multipliers={as_typed('multipliers', multipliers)}"
        raise UserError(f"{flag} is not 1 to 8 numbers from 1 to 64")
    if width % (4 if width <= 128 else 32):
        raise UserError(f"--width={width} is not a multiple of 4 up to 128, or of 32 above")
    check_size(settings["img_size"], multipliers)


def check_size(img_size: tuple[int, ...], multipliers: tuple[int, ...]) -> None:
    """Refuse an `--img_size` that a network of these levels cannot take."""
    flag = f"--img_size={as_typed('img_size', img_size)}"
    stride = 2 ** (len(multipliers) - 1)
    for side in full_size(img_size):
        if side % stride or not stride <= side <= 2048:
            near = stride * min(2048 // stride, max(1, round(side / stride)))
            rule = f"a multiple of {stride} (2 to the power of levels - 1), at most 2048"
            raise UserError(f"{flag}: {side} is not {rule}; the nearest is {near}")


def full_size(img_size: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of `--img_size=64` or `--img_size=48x96`.

    Raises:
        UserError: it has no number or more than two.
    """
    if not 1 <= len(img_size) <= 2:
        flag = f"--img_size={as_typed('img_size', img_size)}"
        raise UserError(f"{flag} is not a size; write 64, or height x width such as 48x96")
    return img_size[0], img_size[-1]


def check_same_run(stored: dict, settings: dict, listing: Listing) -> None:
    """Refuse to resume a run of other settings or images; say when its learning rate is stretched.

    Only what is in MAY_CHANGE may be another.
    """
    before = stored["settings"]
    differences = []
    for name, value in settings.items():
        if name == "classes":  # these depend on --conditional and on the images
            continue
        is_free = name in MAY_CHANGE or value in (before.get(name), "auto")
        if name == "inputs":  # where a folder lies changes nothing
            is_free = are_alike(value, before[name])
        if name not in before or not is_free:
            then, now = (as_typed(name, each) or "empty" for each in (before.get(name), value))
            differences.append(f"--{name} was {then}, is now {now}")
    if not listing.is_known_as(stored["data"]):
        there = f"the images in {settings['dataset']} ({len(listing.names):,})"
        count = learned(stored).count
        held = before["held_out"] or 0
        number = f"{count:,} of "
        if held and count < math.inf:
            number = f"{count:,} and the held-out ones of "
        number = "" if count == math.inf else number
        trained_on = f"those it was trained on ({number}{before['dataset']})"
        differences.append(f"{there} are not {trained_on}")
    if differences:
        run = f"--run_name={settings['run_name']} is another run: {'; '.join(differences)}"
        ways_out = "repeat its settings to resume it, or start a new run with another --run_name"
        raise UserError(f"{run}; {ways_out}")
    if settings["lr_decay"] == "none":
        return
    if settings["epochs"] > before["epochs"]:
        stretched = f"stretched from {before['epochs']} epochs to {settings['epochs']}"
        print(f"the learning rate's decay is {stretched}")
    if settings["max_minutes"] != before["max_minutes"]:
        minutes = f"{before['max_minutes']:g} to {settings['max_minutes']:g} minutes"
        print(
            f"--max_minutes changes from {minutes} (0 is no budget), and the learning rate with it"
        )


def check_same_network(name: str, source: dict, settings: dict) -> None:
    """Refuse to start from the run `name`, of settings `source`, if its network is another one.

    Raises:
        UserError: naming the flags that fit.
    """
    flags = ("width", "multipliers", "blocks", "noise_steps", "schedule", "objective", "mode")
    needed = {flag: source[flag] for flag in (*flags, "conditional")}
    if "attention_levels" not in source:  # at another image size, attention on the same levels
        shorter = min(settings["img_size"]), min(source["img_size"])
        needed["attention_size"] = source["attention_size"] * shorter[0] // shorter[1]
    if source["inputs"] and not are_alike(source["inputs"], settings["inputs"]):
        needed["inputs"] = source["inputs"]  # a run without any may go on with some
    wrong = [
        f"--{flag}={as_typed(flag, value)}"
        for flag, value in needed.items()
        if settings[flag] not in (value, "auto")
    ]
    if wrong:
        raise UserError(f"--init_from={name} has another network; to fit it, add {' '.join(wrong)}")
    if settings["classes"] != source["classes"]:
        known = in_short(source["classes"])
        rule = f"it takes folders of these names: {known}"
        raise UserError(f"--init_from={name} was trained on other classes; {rule}")


# ---- a run while it is trained -------------------------------------------------------------------


class Run:
    """A run while it is trained. The first process alone reads and writes it.

    Args:
        settings: the flags of `train`.
        listing: the data set.

    Attributes:
        settings: these flags, and what only the run itself knows: its colors, the shape of a
            network that was trained elsewhere.
        checkpoint: what to resume from; of a new run, one in which nothing is done.
        init_checkpoint: that of `--init_from`; empty unless the run is new.
        split: which images are held out, once they are read.
    """

    def __init__(self, settings: dict, listing: Listing):
        self.settings = settings
        self.listing = listing
        self.name = settings["run_name"]
        self.best_name = f"{self.name}_best"
        self.best_loss = math.inf  # on held-out images, of the weights that are kept there
        self.path = checkpoints.paths_of(self.name)[0]
        self.results = Path("results", self.name)
        self.checkpoint = {"step": 0, "minutes": 0.0, "log": [], "sums": None}
        self.init_checkpoint = {}
        self.is_small = False  # too few images to hold some out without being told to

    @contextlib.contextmanager
    def found(self, load: Callable[[str], dict]) -> Iterator[None]:
        """What there is of the run and of `--init_from`, read; within this block it is locked.

        Raises:
            UserError: somebody else trains this run, or it is another one than the settings say.
        """
        init_from = self.settings["init_from"]
        is_new = not checkpoints.exists(self.name)
        if not self.settings["resume"] and not is_new:
            ways_out = "delete it, or choose another --run_name"
            raise UserError(f"--resume=no, but models/{self.name} holds a run; {ways_out}")
        if init_from and is_new:
            self.init_checkpoint = load(init_from)
            check_same_network(init_from, self.init_checkpoint["settings"], self.settings)
            if teacher := teacher_of(self.init_checkpoint):
                made = f"{init_from} was distilled from {printable(teacher)}"
                print(f"{made}, and knows noise at a few steps only: better begin from that run")
        with lock_run(self.path.parent):
            if is_new and checkpoints.exists(self.name):
                way_on = "the same command resumes it"
                raise UserError(f"another process has just trained models/{self.name}; {way_on}")
            if not is_new:
                for path in checkpoints.paths_of(self.name):  # saves must be able to replace both
                    checkpoints.check_place(path)
                self.resume_from(load(self.name))
            yield

    def resume_from(self, checkpoint: dict) -> None:
        """Take up the run where its checkpoint is."""
        if "network" not in checkpoint:
            way_on = f"--init_from={self.name} with another --run_name starts a new run from it"
            raise UserError(f"models/{self.name} holds EMA weights only, to sample; {way_on}")
        if teacher := teacher_of(checkpoint):
            way_on = "the same `python -m tools.distill` command continues it"
            raise UserError(f"models/{self.name} was distilled from {printable(teacher)}; {way_on}")
        check_same_run(checkpoint, self.settings, self.listing)
        began_from = checkpoint["settings"]["init_from"]
        if self.settings["init_from"] not in ("", began_from):
            print(f"--init_from={self.settings['init_from']} is passed over: the run has begun")
        self.settings["init_from"] = began_from
        if checkpoint.pop("paths", None):
            print("the steps that were found for this run are dropped as soon as it learns more")
        self.checkpoint = checkpoint

    def share(self) -> None:
        """Give all processes what the first one has read; settings without a flag are adopted."""
        self.checkpoint, self.init_checkpoint = processes.from_first(
            (self.checkpoint, self.init_checkpoint)
        )
        old, before = self.old_settings(), self.checkpoint.get("settings", {})
        self.settings = {name: old[name] for name in IMPORTED if name in old} | self.settings
        if self.settings["optimizer"] == "auto":
            self.settings["optimizer"] = before.get("optimizer", "muon")
        if self.settings["held_out"] == "auto":
            share = held_out.automatic(len(self.listing.names))
            self.is_small = not self.checkpoint["step"] and not share
            self.settings["held_out"] = before.get("held_out", share)
        # or refuse it, before the images are read
        held_out.number_of(self.settings["held_out"], len(self.listing.names))
        if self.settings["keep_best"]:
            self.check_best()

    def check_best(self) -> None:
        """Refuse `--keep_best` where nothing says what is best, or another run has its place."""
        if not self.settings["held_out"]:
            way_out = "--held_out=16 holds out so many"
            raise UserError(f"--keep_best needs held-out images, and there are none; {way_out}")
        check_name("run_name", self.best_name)
        if checkpoints.exists(self.best_name):
            kept = checkpoints.load(self.best_name, peek=True)
            is_ours = kept["settings"].get("best_of") == self.name
            if not is_ours or not is_log(kept["log"], kept["step"]):
                ways_out = "move it away, or choose another --run_name"
                raise UserError(f"--keep_best: models/{self.best_name} holds a run; {ways_out}")
            losses = [cells_of(row).get("held_out") for row in kept["log"]]
            if self.checkpoint["step"]:  # else they are of a run of this name that is gone
                *_, self.best_loss = [math.inf, *(loss for loss in losses if loss is not None)]

    def old_settings(self) -> dict:
        """Those of the run that is resumed or started from; empty for a run from nothing."""
        return (self.init_checkpoint or self.checkpoint).get("settings", {})

    def read_images(self) -> reading.Dataset:
        """The images, the same in all processes.

        With `--mode=auto`, they are in the colors of the run that is resumed or started from.

        Raises:
            UserError: they are not the same, not as many as when the run was saved, or a class
                has none.
        """
        mode = self.settings["mode"]
        size = self.settings["img_size"]
        names = ("crop", "crop_margin", "resize", "depth", "inputs")
        how = {name: self.settings[name] for name in names}
        old_mode = self.old_settings().get("mode")
        how["input_mode"] = self.old_settings().get("input_mode") or "auto"
        remarks = []
        with processes.first_alone():
            data = reading.read_pairs(self.listing, size, mode, **how)
            if old_mode and mode == "auto" and data.mode != old_mode:
                own = reading.MODES[data.mode]
                data = reading.read_pairs(self.listing, size, old_mode, **how)
                if self.init_checkpoint:
                    whose = f"the network of --init_from={self.settings['init_from']}"
                    remarks = [f"in {reading.MODES[old_mode]}, not in {own}, as {whose} makes them"]
        folder = self.listing.folder
        labels = data.labels if self.settings["classes"] else None
        self.split = held_out.split(data.names, self.settings["held_out"], labels)
        count = len(self.split.learned)
        if len(set(processes.gather((data.fingerprint, count)))) > 1:
            raise UserError(f"--dataset={folder} is not the same for all processes")
        known = learned(self.checkpoint).count if self.checkpoint["step"] else count
        if known not in (count, math.inf):
            fault = f"{count:,} images of --dataset={folder} can be read, {known:,} when it began"
            raise UserError(f"--run_name={self.name} cannot be resumed: {fault}")
        classes = self.settings["classes"]
        if missing := set(range(len(classes))) - set(np.unique(data.labels).tolist()):
            name = classes[min(missing)]
            raise UserError(f"--conditional: no image of the class {name} can be read")
        self.settings |= {"mode": data.mode, "input_mode": data.input_mode}
        about = tell_classes(self.listing, self.settings["conditional"])
        about += held_out.remarks(self.split, self.is_small)
        return data._replace(remarks=remarks + about + data.remarks, learned=self.split.learned)

    def save(self, **state) -> None:
        """Write a checkpoint that keeps `state`; see `checkpoints.save`."""
        checkpoints.save(self.name, settings=self.settings, data=self.listing.fingerprint, **state)

    def save_best(self, **state) -> None:
        """Write a run of its own that keeps `state`, to sample from."""
        settings = self.settings | {"run_name": self.best_name, "best_of": self.name}
        facts = {"settings": settings, "data": self.listing.fingerprint}
        checkpoints.save(self.best_name, **facts, **state)

    def free_checkpoints(self) -> None:
        """Let go of the checkpoints that were read: they are as large as the training itself."""
        self.checkpoint = self.init_checkpoint = None


@contextlib.contextmanager
def open_run(settings: dict, listing: Listing, load: Callable[[str], dict]) -> Iterator[Run]:
    """The run that `settings` name, new or as it was saved; in this block nobody else trains it.

    Args:
        settings, listing: see `Run`.
        load: reads a run by its name, and checks it.

    Raises:
        UserError: see `Run.found`.
    """
    run = Run(settings, listing)
    with run.found(load) if processes.is_first() else contextlib.nullcontext():
        run.share()
        yield run


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Keep other writers out of a run's folder within this block, or as long as its process lives.

    If nothing was saved, neither the lock's file nor the folder stays, unless it was there before.
    """
    with folder_while_used(folder):
        before = set(os.listdir(folder))
        lock = FileLock(folder / ".lock")
        try:
            follows = "nothing keeps a second process from writing this run: start none"
            acquire(lock, follows, wait=False)
        except Timeout as error:
            way_out = "choose another name for yours"
            raise UserError(f"{folder}: another process is training this run; {way_out}") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes it with the release
                if ".lock" not in before and set(os.listdir(folder)) <= before | {".lock"}:
                    os.unlink(folder / ".lock")
            lock.release()


@contextlib.contextmanager
def new_run(flag: str, run_name: str) -> Iterator[None]:
    """Within this block, `--flag=RUN_NAME` is no run yet, and nobody else can make it one.

    Raises:
        UserError: there is such a run, or somebody else is making it.
    """
    with lock_run(checkpoints.paths_of(run_name)[0].parent):
        check_free(flag, run_name)
        yield


def check_free(flag: str, run_name: str) -> None:
    """Refuse the name of a run that there is."""
    if checkpoints.exists(run_name):
        ways_out = "delete it, or choose another name"
        raise UserError(f"--{flag}={run_name}: models/{run_name} holds a run; {ways_out}")


# ---- reading a run -------------------------------------------------------------------------------


def choose(run_name: str) -> str:
    """`--run_name` of `sample`; left out, it is `untitled`, as for `train`, if there is such a run.

    Raises:
        UserError: no run is named (all runs are printed), or the name is not usable.
    """
    if not run_name and checkpoints.exists(UNTITLED):
        return UNTITLED
    if not run_name:
        print(runs_table())
        raise UserError("--run_name is missing; it takes one of the runs above")
    check_name("run_name", run_name)
    return run_name


# what a checkpoint tells beside its settings, its log and its tensors: a type, and a range
FACTS = {
    "step": (int, (1, 10**15)),
    "count": (int, (1, 10**15)),
    "minutes": (float, (0, 10**9)),  # 1,900 years
    "data": (str, None),
    "loss_scale": (float, (2.0**-149, 2.0**127)),  # these two of float16 alone
    "loss_scale_steps": (int, (0, 10**9)),
}


def is_of(kind: type, value) -> bool:
    """Whether a stored value is of a flag's type; True is no number, 16.0 no whole one."""
    if kind is float:
        return type(value) in (int, float)
    if kind in (int | str, float | str):
        kinds = (int,) if kind == int | str else (int, float)
        return type(value) in kinds or value == "auto"
    if kind is tuple:
        return type(value) is tuple and all(type(part) is int for part in value)
    return type(value) is (kind if kind in (bool, int) else str)


def what_is_wrong(stored: dict, kinds: dict, limits: dict) -> str:
    """The entry of a checkpoint, beside its tensors, that is of another type or out of range."""
    settings = stored["settings"]
    for name, value in settings.items():
        is_right = isinstance(value, int | float | str | tuple)  # a newer version may have more
        if name == "classes":
            is_right = type(value) is tuple and all(type(part) is str for part in value)
        elif name in kinds:
            is_right = is_of(kinds[name], value)
        if type(name) is not str or not is_right:
            return f"--{name}" if name in kinds else f"{name!r}"
    for name, (kind, limit) in FACTS.items():
        value = stored.get(name)
        if name in stored and not (
            is_of(kind, value) and (limit is None or limit[0] <= value <= limit[1])
        ):
            return name
    allowed = settings["noise_steps"], limits["sampler"]
    if "paths" in stored and not are_paths(stored["paths"], *allowed):
        return "paths"
    if not is_log(stored["log"], stored["step"]):
        return "the log"
    check_limits(settings, limits)
    check_network(settings)
    return "" if inputs.is_sound(settings) else "the inputs"


def load(
    run_name: str, flags: Mapping[str, Parameter], limits: dict, build_network: Callable
) -> dict:
    """A run's checkpoint. Its weights fit its settings: checked without allocating any.

    Args:
        run_name: a folder in models/.
        flags: of `train`; settings that are newer than the run get their default.
        limits: see `check_limits`.
        build_network: makes a network of settings.

    Raises:
        UserError: there is no such run, it cannot be read, another program made it, or its weights
            are infinite or NaN.
    """
    stored = checkpoints.load(run_name)
    kinds = {name: flag.annotation for name, flag in flags.items()} | IMPORTED
    wrong = "weights that do not fit its settings"
    try:
        defaults = {name: flag.default for name, flag in flags.items()}
        stored["settings"] = defaults | BEFORE | stored["settings"]
        if isinstance(stored["settings"]["flip"], bool):  # as of earlier versions
            stored["settings"]["flip"] = flip_of_switch(stored["settings"]["flip"])
        if entry := what_is_wrong(stored, kinds, limits):
            wrong = f"entries that do not fit its settings ({entry})"
        else:
            with torch.device("meta"):
                network = build_network(stored["settings"])
            if checkpoints.fits(stored, network, SUMS):
                wrong = ""
    except (*BROKEN_FILE, UserError):
        pass
    if wrong:
        reason = "another program made it, or it is damaged"
        raise UserError(f"models/{run_name} holds {wrong}: {reason}")
    check_finite(run_name, stored)
    return stored


def check_finite(run_name: str, stored: dict) -> None:
    """Refuse a checkpoint whose numbers are infinite or NaN: nothing can be made of these."""
    tensors = {f"{name} (EMA)": weight for name, weight in stored["average"].items()}
    early = stored.get("early") or {}
    tensors |= {f"{name} (early)": weight for name, weight in early.items()}
    if "network" in stored:
        tensors |= stored["network"] | {"sums": stored["sums"]}
        for number, moments in stored["optimizer"]["state"].items():
            tensors |= {f"{name} of weight {number}": each for name, each in moments.items()}
    if names := checkpoints.not_finite(tensors):
        fault = f"{names[0]} has values that are infinite or NaN"
        advice = "its training has failed, or the file was altered"
        raise UserError(f"models/{run_name} cannot be used: {fault}; {advice}")


class Learned(NamedTuple):
    """What a run has learned from, known from its step; infinite where nobody knows."""

    count: float  # images in the data set
    images: float  # seen in training, with repetitions
    epochs: float


def learned(checkpoint: dict) -> Learned:
    """Older checkpoints do not have the count: their log tells it; imported ones have no log."""
    log = checkpoint["log"]
    if "count" not in checkpoint and not log:
        return Learned(math.inf, math.inf, math.inf)
    count = checkpoint.get("count")
    if count is None:
        row = cells_of(log[-1])
        count = round(row["images"] / row["epoch"])
    images = checkpoint["step"] * min(checkpoint["settings"]["batch_size"], count)
    return Learned(count, images, images / count)


def advice(run_name: str, checkpoint: dict) -> str:
    """Why the images of a run may look like noise: a line to append, or nothing."""
    count, images, _ = learned(checkpoint)
    is_taught = bool(checkpoint["settings"].get("init_from"))  # by another run's images
    if count == math.inf or is_taught:
        return ""
    way_on = f"a new run with --init_from={run_name}"  # of a run without what training needs
    if "network" in checkpoint:
        settings = checkpoint["settings"]
        way_on = longer(settings, count, checkpoint["step"], checkpoint["minutes"])
    return hint(images, way_on)


# ---- the table of all runs -----------------------------------------------------------------------


def runs_table() -> str:
    """All runs there are, a line each: how far they are, and when they were saved.

    Raises:
        UserError: there is none.
    """
    names = checkpoints.run_names()
    if not names:
        where = f"there is no run yet in {Path('models').resolve()}"
        raise UserError(f"{where}; `python ddpm.py train` makes one")
    lines = [("run", "images", "size", "epochs", "loss", "saved"), *map(table_row, names)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def table_row(name: str) -> tuple[str, ...]:
    """The cells of one run in `runs_table`."""
    try:
        stored = checkpoints.load(name, peek=True)
        settings = stored["settings"]
        images = printable(str(settings["dataset"]), limit=60)
        facts = [images, "x".join(map(str, settings["img_size"])), "", ""]
        count, _, epochs = learned(stored)
        if count < math.inf:
            facts[0] = f"{count:,} from {images}"
            facts[2] = f"{epochs:.1f}"
        if stored["log"]:  # a run that was stopped before its first row has none
            facts[3] = f"{stored['log'][-1][COLUMNS.index('loss')]:.4f}"
    except (UserError, *BROKEN_FILE):
        facts = ["cannot be read", "", "", ""]
    saved = max(path.stat().st_mtime for path in checkpoints.paths_of(name) if path.exists())
    date = f"{datetime.datetime.fromtimestamp(saved):%Y-%m-%d %H:%M}"
    return *map(printable, (name, *facts)), date
