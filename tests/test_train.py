"""What `train` promises: it may be stopped at any moment, options count, no checkpoint is lost."""

import contextlib
import csv
import gc
import inspect
import itertools
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from conftest import TINY, files_below, paint, start
from hypothesis import strategies
from PIL import Image
from torch import Tensor

import ddpm
import utils
from machinery import checkpoints, command_line, devices, journal, runs, session
from machinery.journal import plot_curves
from modules import ResidualBlock, UNet

LAST_STEP = 8  # of 3 epochs of 10 pictures, 4 a step: no epoch but the second ends with a batch
CHECKPOINT, PREVIOUS = Path("models/run/checkpoint.pt"), Path("models/run/checkpoint.previous.pt")
LOG, PREVIEWS = Path("results/run/log.csv"), Path("results/run/training_progress")
# Another value than the tiny run's for every option that makes it another run.
OTHER = {
    "seed": 1,
    "flip": "no",
    "crop": "random",
    "resize": "area",
    "depth": 16,
    "img_size": 16,
    "width": 32,
    "multipliers": "1,1",
    "blocks": 2,
    "attention_size": 0,
}
OTHER |= {
    "dropout": 0.5,
    "noise_steps": 16,
    "schedule": "linear",
    "objective": "eps",
    "min_snr": 0.1,
    "batch_size": 3,
}
OTHER |= {"held_out": 2, "inputs": "@gray"}
OTHER |= {"optimizer": "adamw"}
OTHER |= {"mode": "L", "lr": 0.002, "warmup": 0, "lr_decay": "none", "ema_decay": 0.1}


def words(**options) -> list[str]:
    """The command line of the tiny run, with other or more options."""
    flags = dict(word.removeprefix("--").split("=") for word in TINY)
    flags |= {"dataset": "pictures", "run_name": "run", "epochs": 3, "noise_steps": 8} | options
    return ["train", *(f"--{flag}={value}" for flag, value in flags.items())]


class Death(BaseException):
    """What nothing in the program catches: the nearest to a sudden death within this process."""


def die() -> None:
    raise Death


@pytest.fixture
def train(run, place):
    """Train the tiny run by the command line.

    A death is status -1, after which its lock is gone, as with a process.
    """
    paint(place / "pictures")

    def train_run(**options):
        try:
            result = run(*words(**options))
        except Death:
            result = SimpleNamespace(status=-1)
        if result.status in (-1, 2):
            gc.collect()  # the error, and the lock with it, are in a circle of references
        return result

    return train_run


def train_elsewhere(place: Path, **options) -> tuple[Path, dict]:
    """Train the tiny run in a place of its own: that place, and what it left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        paint(Path("pictures"))
        command_line.plan("ddpm.py", {"train": ddpm.train}, words(**options))()
        return place, outcome()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    """What the tiny run leaves behind, trained in one go."""
    return train_elsewhere(tmp_path_factory.mktemp("uninterrupted"))[1]


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory) -> tuple[Path, dict]:
    return train_elsewhere(tmp_path_factory.mktemp("one_epoch"), epochs=1)


@pytest.fixture
def finished(one_epoch, place) -> dict:
    """Has the tiny run of one epoch lie in the test's place: what it left behind."""
    shutil.copytree(one_epoch[0], place, dirs_exist_ok=True)
    return one_epoch[1]


@contextlib.contextmanager
def at_step(number: int, event: Callable[[], None]) -> Iterator[None]:
    """Within this block, `event()` happens at the beginning of step `number` (1, 2, ...)."""
    batch_indices = utils.batch_indices

    def with_event(count: int, batch_size: int, step: int, seed: int) -> Tensor:
        if step + 1 == number:
            event()
        return batch_indices(count, batch_size, step, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "batch_indices", with_event)
        yield


@contextlib.contextmanager
def at_save(number: int, moment: str, event: Callable[[], None]) -> Iterator[None]:
    """Within this block, `event()` happens in the save after step `number`.

    The moments of a save: begun, written, then a file's name: as that file is about to be replaced;
    at last, done.
    """
    save_whole, save, replace = checkpoints.save, torch.save, os.replace

    def reach(here: str) -> None:
        if here == moment:
            event()

    def save_with_events(run_name: str, **state) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if state["step"] == number:
                patch.setattr(torch, "save", lambda *whats: (save(*whats), reach("written")))
                patch.setattr(
                    os, "replace", lambda old, new: (reach(Path(new).name), replace(old, new))
                )
                reach("begun")
            save_whole(run_name, **state)
            if state["step"] == number:
                reach("done")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", save_with_events)
        yield


MOMENTS = ("begun", "written", PREVIOUS.name, CHECKPOINT.name, "done")
STOPS = {name: lambda step, moment=name: at_save(step, moment, die) for name in MOMENTS}
STOPS["death"] = lambda step: at_step(step, die)
STOPS["SIGTERM"] = lambda step: at_step(step, lambda: signal.raise_signal(signal.SIGTERM))
STOPS["SIGINT"] = lambda step: at_step(step, lambda: signal.raise_signal(signal.SIGINT))
STATUS = {"SIGTERM": 143, "SIGINT": 130}


def stored() -> dict:
    """The newest checkpoint without what the clock says.

    That is the minutes, and the last column of the log.
    """
    state = torch.load(CHECKPOINT, weights_only=True)
    del state["minutes"]
    return {**state, "log": [row[:-1] for row in state["log"]]}


def outcome() -> dict:
    """All that a run has left behind but for the clock.

    Its log on the disk must be the one in the checkpoint.
    """
    state = torch.load(CHECKPOINT, weights_only=True)
    rows = list(csv.reader(LOG.read_text().splitlines()))
    as_text = [["" if value is None else str(value) for value in row] for row in state["log"]]
    assert rows == [list(journal.COLUMNS), *as_text]
    return {
        **stored(),
        "pictures": {path.name: path.read_bytes() for path in Path("results/run").rglob("*.png")},
    }


def forget() -> None:
    """Let the next training begin anew."""
    shutil.rmtree("models")
    shutil.rmtree("results")


def leaves(state, name: str = "") -> dict:
    """A nested state as one flat dict."""
    if not isinstance(state, dict | list | tuple):
        return {name: state}
    parts = state.items() if isinstance(state, dict) else enumerate(state)
    return {
        path: leaf for key, part in parts for path, leaf in leaves(part, f"{name}/{key}").items()
    }


def differences(one: dict, two: dict, ignore: tuple[str, ...] = ()) -> list[str]:
    """Where two states are not equal to the bit."""
    one, two = (
        {key: part for key, part in state.items() if key not in ignore} for state in (one, two)
    )
    one, two = leaves(one), leaves(two)

    def equal(name: str) -> bool:
        if name not in one or name not in two:
            return False
        return (
            torch.equal(one[name], two[name])
            if isinstance(one[name], Tensor)
            else one[name] == two[name]
        )

    return sorted(name for name in one.keys() | two.keys() if not equal(name))


def files(*folders: str) -> dict[Path, tuple[bytes, int]]:
    """The files in some folders, but for the locks: what they hold, and when they were written."""
    paths = (path for folder in folders for path in Path(folder).rglob("*"))
    there = [path for path in paths if path.is_file() and path.name != ".lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in there}


# ---- stopping and going on -----------------------------------------------------------------------


def test_a_run_stopped_anywhere_equals_the_one_that_was_not(train, monkeypatch):
    """Signals and deaths at any step, in any number.

    Weights, average, optimizer, log and previews are the same bits.
    """
    monkeypatch.setattr(journal, "ROW_EVERY", 3)
    options = {"dropout": 0.2, "sample_every": 2}
    assert train(**options).status == 0
    expected = outcome()

    stops = strategies.tuples(
        strategies.integers(1, LAST_STEP),
        strategies.sampled_from(sorted(STOPS)),
        strategies.sampled_from([0, 10]),
    )

    @hypothesis.settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        strategies.lists(stops, min_size=1, max_size=3, unique_by=lambda stop: stop[0]).map(sorted)
    )
    @hypothesis.example([(3, "SIGTERM", 10), (4, "SIGINT", 10), (7, "death", 10)])
    @hypothesis.example([(1, "begun", 0), (5, "written", 0), (6, PREVIOUS.name, 0)])
    @hypothesis.example([(5, CHECKPOINT.name, 0), (8, "done", 0)])
    def holds(stops: list[tuple[int, str, int]]) -> None:
        forget()
        for step, how, save_every in stops:
            with STOPS[how](step):
                # the first save of all replaces nothing, and one that is not due has no moments
                assert train(save_every=save_every, **options).status in (STATUS.get(how, -1), 0)
        assert train(**options).status == 0
        # a preview is made after its save: a death just between the two costs it
        costs_preview = any(how == "done" for _, how, _ in stops)
        assert (
            differences(
                outcome(), expected, ignore=("settings", "pictures" if costs_preview else "")
            )
            == []
        )

    holds()


@pytest.mark.parametrize("how, status", STATUS.items())
@pytest.mark.parametrize("step", [1, 4, LAST_STEP - 1])
def test_a_signal_saves_the_step_it_came_in(train, how, status, step):
    with STOPS[how](step):
        result = train()
    assert result.status == status
    assert f"stopped and saved at step {step} of {LAST_STEP}" in result.out
    assert stored()["step"] == step


def test_a_signal_in_the_last_step_comes_too_late(train, uninterrupted):
    with STOPS["SIGTERM"](LAST_STEP):
        result = train()
    assert result.status == 0
    assert "trained for" in result.out
    assert differences(outcome(), uninterrupted) == []


def test_a_second_ctrl_c_ends_at_once(train):
    def press_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with at_step(5, press_twice):
        result = train(save_every=0)
    assert (result.status, result.err) == (130, "ddpm.py: stopped\n")
    assert stored()["step"] == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork a process")
@pytest.mark.parametrize("moment", MOMENTS[1:4])
def test_a_kill_within_a_save_loses_only_that_step(train, uninterrupted, moment):
    child = os.fork()
    if child == 0:
        try:
            with at_save(5, moment, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                train(save_every=0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    result = train()
    assert result.status == 0
    assert "4 steps are done" in result.out
    assert differences(outcome(), uninterrupted) == []
    assert not [name for name in files_below(Path("models")) if "unfinished" in name]


def test_more_epochs_are_as_if_asked_for_at_once(train):
    options = {"lr_decay": "none", "dropout": 0.2}
    assert train(epochs=3, **options).status == 0
    expected = stored()
    forget()
    for epochs in (1, 2, 3):
        result = train(epochs=epochs, **options)
        assert result.status == 0
        assert "stretched" not in result.out
    # the weights of the first fourth are those of what was planned when it came
    differ = differences(stored(), expected)
    assert [name for name in differ if not name.startswith("/early/")] == []


def test_a_stretched_fall_of_the_learning_rate_is_said_once(train, finished):
    with STOPS["SIGTERM"](5):
        assert "decay is stretched from 1 epochs to 3" in train(epochs=3).out
    result = train(epochs=3)
    assert result.status == 0
    assert "stretched" not in result.out
    assert stored()["step"] == LAST_STEP


@pytest.mark.parametrize("epochs", [1, 2])
def test_nothing_is_done_where_the_epochs_are_reached(train, finished, epochs):
    if epochs == 2:
        assert train(epochs=2).status == 0
    before = files("models")
    result = train(epochs=1)
    assert result.status == 0
    assert "nothing to do" in result.out
    assert "stretched" not in result.out
    assert files("models") == before


@pytest.mark.parametrize("flag", OTHER)
def test_a_run_does_not_go_on_with_other_settings(train, finished, flag):
    before = files("models", "results")
    result = train(**{"epochs": 2, flag: OTHER[flag]})
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"--{flag} was " in result.err
    assert result.err.count(" is now ") == 1
    assert files("models", "results") == before


def test_a_refusal_comes_before_the_images_are_read(train, finished):
    shutil.rmtree("datasets")
    assert train(lr=0.002).status == 2
    assert not Path("datasets").exists()


def test_a_run_that_another_process_has_trained_just_now_is_not_overwritten(
    train, one_epoch, place, monkeypatch
):
    """It was not there when this one looked, and is there when this one has the lock."""
    lock_run = runs.lock_run

    def lock_later(folder: Path):
        shutil.copytree(one_epoch[0] / "models", place / "models")
        return lock_run(folder)

    monkeypatch.setattr(runs, "lock_run", lock_later)
    result = train()
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "another process has just trained models/run" in result.err
    assert stored()["step"] == 3


def test_a_last_preview_that_a_death_has_cost_is_made_up_for(train, uninterrupted):
    with STOPS["done"](LAST_STEP):
        assert train().status == -1
    assert not PREVIEWS.exists()
    result = train()
    assert "nothing to do" in result.out
    assert differences(outcome(), uninterrupted) == []


def test_another_budget_of_time_is_said(train, finished):
    result = train(epochs=2, max_minutes=60)
    assert result.status == 0
    assert "--max_minutes changes from 0 to 60 minutes" in result.out
    assert "the budget of time" not in train(epochs=2, max_minutes=60).out


def test_every_other_setting_is_named(train, finished):
    assert train(epochs=2).status == 0
    result = train(epochs=2, lr=0.002, multipliers="2,1", img_size="8x16")
    assert result.status == 2
    assert "--lr was 0.001, is now 0.002" in result.err
    assert "--multipliers was 1,2, is now 2,1" in result.err
    assert "--img_size was 8x8, is now 8x16" in result.err


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: paint(folder, count=11),
        lambda folder: (folder / "picture_0003.png").unlink(),
        lambda folder: (folder / "picture_0003.png").rename(folder / "renamed.png"),
        lambda folder: Image.new("RGB", (12, 10)).save(folder / "picture_0003.png"),
    ],
    ids=["one more", "one less", "renamed", "repainted"],
)
def test_a_run_does_not_go_on_with_other_images(train, finished, change):
    before = files("models", "results")
    change(Path("pictures"))
    result = train(epochs=2)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "are not those it was trained on (" in result.err
    assert "(10 of pictures)" in result.err  # the number it was trained on, not that of today
    assert files("models", "results") == before


def test_resume_no_refuses_only_a_run_that_exists(train):
    assert train(resume="no", epochs=1).status == 0
    before = files("models", "results")
    result = train(resume="no", epochs=2)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "models/run holds a run" in result.err
    assert files("models", "results") == before


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "moved"},
        {"sample_every": 1, "resume": "yes"},
        {"save_every": 0},
        {"device": "auto"},
    ],
    ids=str,
)
def test_what_may_change_changes_nothing_that_is_learned(train, uninterrupted, monkeypatch, change):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # auto is the CPU then
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert change.keys() <= set(runs.MAY_CHANGE)
    with STOPS["SIGTERM"](4):
        train()
    if "dataset" in change:
        shutil.move("pictures", change["dataset"])
    result = train(**change)
    assert result.status == 0
    assert "4 steps are done" in result.out
    assert differences(stored(), uninterrupted, ignore=("settings", "pictures")) == []


def test_a_second_trainer_is_refused_while_the_first_lives(train, place):
    first = start(*words(epochs=100_000), cwd=place)
    try:
        while not first.stdout.readline().startswith("files"):
            assert first.poll() is None
        second = train()
        assert (second.status, second.err.count("\n")) == (2, 1)
        assert "another process is training this run" in second.err
    finally:
        first.kill()
        first.communicate()
    assert train().status == 0


# ---- damage and trouble --------------------------------------------------------------------------


def flip_a_bit_of_a_weight(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["network"]["conv_in.bias"]
    contents[contents.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(contents)


DAMAGES = {
    "a bit flipped": flip_a_bit_of_a_weight,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "text": lambda path: path.write_text("not a checkpoint"),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(train, uninterrupted, damage):
    with STOPS["SIGTERM"](5):
        train(save_every=0)
    damage(CHECKPOINT)
    result = train()
    assert result.status == 0
    assert f"{CHECKPOINT} cannot be read as a checkpoint" in result.out
    assert f"{PREVIOUS.name}, the one before it, is used" in result.out
    assert "4 steps are done" in result.out
    assert differences(outcome(), uninterrupted) == []


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(train):
    """A death between the two renames of a save must find the good one in place still."""
    with STOPS["SIGTERM"](5):
        train(save_every=0)
    flip_a_bit_of_a_weight(CHECKPOINT)
    with STOPS[CHECKPOINT.name](5):
        assert train(save_every=0).status == -1
    result = train()
    assert result.status == 0, result.err
    assert stored()["step"] == LAST_STEP


def test_without_a_readable_checkpoint_nothing_begins_anew(train):
    with STOPS["SIGTERM"](5):
        train(save_every=0)
    for path in (CHECKPOINT, PREVIOUS):
        os.truncate(path, 1000)
    before = files("models", "results")
    result = train()
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"{PREVIOUS} cannot be read" in result.err
    assert files("models", "results") == before


def gradient_of_a_root_at_zero(network) -> Tensor:
    """0, whose gradient is not a number."""
    return 0 * (0 * next(network.parameters()).sum()).sqrt()


INFINITIES = {
    "loss inf": lambda network: torch.tensor(math.inf),
    "loss NaN": lambda network: torch.tensor(math.nan),
    "gradient NaN": gradient_of_a_root_at_zero,
}


@pytest.mark.parametrize(
    "kind, save_every, noticed, rate",
    [
        ("loss inf", 0, 5, "5.0e-04"),
        ("loss NaN", 10, 6, "3.1e-04"),
        ("gradient NaN", 0, 5, "5.0e-04"),
    ],
)
def test_what_is_not_finite_ends_the_run_and_is_not_saved(
    train, monkeypatch, kind, save_every, noticed, rate
):
    """It is noticed at the next save or row of the log.

    Rates: cos^2(pi/2 * 4/8) and cos^2(pi/2 * 5/8) of 1e-3.
    """
    monkeypatch.setattr(journal, "ROW_EVERY", 3)
    with STOPS["SIGTERM"](4):
        train(save_every=0)
    before = files("models")
    loss = ddpm.Diffusion.loss
    additions = itertools.chain([INFINITIES[kind]], itertools.repeat(lambda network: 0))
    monkeypatch.setattr(
        ddpm.Diffusion,
        "loss",
        lambda self, net, *rest: loss(self, net, *rest) + next(additions)(net),
    )
    result = train(save_every=save_every)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"infinite or NaN at step {noticed}, learning rate {rate}" in result.err
    assert files("models") == before


TROUBLES = {
    "disk": (OSError, 28, "No space left on device"),
    "PyTorch": (RuntimeError, "unexpected pos 704 vs 598"),
}
PLACES = [
    ("written", "disk"),
    ("written", "PyTorch"),
    (PREVIOUS.name, "disk"),
    (CHECKPOINT.name, "disk"),
]


def trouble(kind: str) -> Callable[[], None]:
    def fail() -> None:
        error, *facts = TROUBLES[kind]
        raise error(*facts)

    return fail


@pytest.mark.parametrize("moment, kind", PLACES)
def test_a_save_that_fails_does_not_end_the_training(train, uninterrupted, moment, kind):
    found = []
    with (
        at_save(5, moment, trouble(kind)),
        at_step(6, lambda: found.append(checkpoints.load("run")["step"])),
    ):
        result = train(save_every=0)
    assert result.status == 0
    assert str(CHECKPOINT) in result.out.partition("not written")[2]
    assert "training goes on" in result.out
    assert found == [4]
    assert differences(outcome(), uninterrupted, ignore=("settings",)) == []


@pytest.mark.parametrize(
    "moment, kind, step", [*((*place, LAST_STEP) for place in PLACES), ("written", "disk", 5)]
)
def test_a_last_save_that_fails_is_an_error(train, moment, kind, step):
    """The last one of all, or the one of a training that was asked to stop."""
    stop = contextlib.nullcontext() if step == LAST_STEP else STOPS["SIGTERM"](step)
    with at_save(step, moment, trouble(kind)), stop:
        result = train(save_every=0)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert ("No space left" if kind == "disk" else "disk full") in result.err
    assert checkpoints.load("run")["step"] == step - 1


@pytest.mark.parametrize(
    "owner, writer", [(utils, "save_png"), (journal.Log, "write")], ids=["preview", "log"]
)
def test_trouble_beside_the_checkpoint_costs_none_of_the_training(
    train, uninterrupted, monkeypatch, owner, writer
):
    """A preview or a row of the log that cannot be written, when the checkpoint still can be.

    In the last step, too.
    """
    monkeypatch.setattr(journal, "ROW_EVERY", 4)
    write, calls = getattr(owner, writer), itertools.count()

    def fail(*inputs, **options) -> None:
        # the first call is before the training: the data, and the log as it was
        if next(calls) > 0:
            trouble("disk")()
        write(*inputs, **options)

    monkeypatch.setattr(owner, writer, fail)
    assert train(sample_every=1).status == 0
    assert stored()["step"] == LAST_STEP
    assert differences(stored()["average"], uninterrupted["average"]) == []
    monkeypatch.setattr(owner, writer, write)
    assert train().status == 0
    outcome()


@pytest.mark.skipif(
    not hasattr(signal, "SIGHUP"), reason="this system has no terminals that hang up"
)
def test_a_training_outlives_its_terminal(train, uninterrupted):
    with at_step(4, lambda: signal.raise_signal(signal.SIGHUP)):
        assert train().status == 0
    assert differences(outcome(), uninterrupted) == []


# ---- what a run leaves behind --------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "rising"), [(0, 0), (2, 1), (1000, 4)])
def test_the_learning_rate_rises_over_the_warmup_or_a_tenth_of_the_training(
    train, monkeypatch, warmup, rising
):
    monkeypatch.setattr(journal, "ROW_EVERY", 1)
    assert train(warmup=warmup, epochs=16, lr_decay="none").status == 0  # 40 steps
    rates = [row[journal.COLUMNS.index("lr")] / 1e-3 for row in stored()["log"]]
    expected = [min(1, max((step + 1) / max(1, warmup), step / 4)) for step in range(40)]
    assert rates == pytest.approx(expected)
    assert sum(rate < 0.999 for rate in rates) == rising


def out_of_memory_above(images: int) -> Callable:
    """The network's forward pass on a GPU that holds so many images.

    It is the last moment at which memory can run out.
    """
    forward = UNet.forward

    def forward_or_fail(self: UNet, x: Tensor, *others: Tensor) -> Tensor:
        answer = forward(self, x, *others)
        if self.training and len(x) > images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer

    return forward_or_fail


def distance(one: dict, two: dict) -> float:
    """The largest difference of weights or of what the log tells.

    It is relative to 1 and to the larger of the two.
    """
    one, two = (
        leaves({key: state[key] for key in ("network", "average", "log")}) for state in (one, two)
    )
    assert one.keys() == two.keys()
    return max(
        float((torch.as_tensor(one[key]) - torch.as_tensor(two[key])).abs().max()) for key in one
    )


@pytest.mark.parametrize("fits", [1, 2, 3])
@pytest.mark.parametrize("way", ["asked for", "found out"])
def test_however_a_batch_is_cut_the_same_is_learned(train, in_float64, monkeypatch, way, fits):
    """By --micro_batch, or because memory runs out, which is said once for each halving."""
    options = {"epochs": 15, "batch_size": 6}
    assert train(**options).status == 0
    whole = stored()
    forget()
    if way == "asked for":
        assert train(**options, micro_batch=fits).status == 0
    else:
        monkeypatch.setattr(UNet, "forward", out_of_memory_above(fits))
        result = train(**options)
        assert result.status == 0, result.err
        halvings = [3, 2, 1][: 4 - fits] if fits < 3 else [3]
        assert [line for line in result.out.splitlines() if "out of memory" in line] == [
            f"out of memory: micro-batches of {size} from now on (--micro_batch={size}); "
            "the result is the same"
            for size in halvings
        ]
    assert [row[0] for row in whole["log"]] == [20, 25]
    assert distance(stored(), whole) < 1e-10


@pytest.mark.parametrize("options", [{"micro_batch": 2}, {"batch_size": 1}])
def test_memory_that_does_not_suffice_is_said_in_one_line(train, monkeypatch, options):
    """Where the parts were asked for, or a single image is too large."""
    monkeypatch.setattr(UNet, "forward", out_of_memory_above(options.get("micro_batch", 1) - 1))
    result = train(**options)
    assert result.status == 2
    assert result.err.splitlines()[-1].startswith(
        "ddpm.py: out of memory; a smaller --batch_size or --img_size or --micro_batch"
    )


def test_what_is_dropped_hangs_on_other_numbers_than_the_noise(train, monkeypatch):
    """A generator that began where t and the noise did would drop by the very same numbers."""
    seeds, begin = [], devices.seed
    monkeypatch.setattr(devices, "seed", lambda *told: seeds.append(told[1]) or begin(*told))
    assert train(dropout=0.3, epochs=1, micro_batch=2).status == 0
    # three steps of two parts, the first of which is begun at the step's own seed
    assert len(seeds) == len(set(seeds)) == 9


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_what_is_computed_twice_is_the_same(train, monkeypatch, dropout):
    """To the bit, and with the same activations dropped.

    Every block is computed again once a step.
    """
    calls, forward = [], ResidualBlock.forward
    monkeypatch.setattr(
        ResidualBlock, "forward", lambda *inputs: calls.append(1) or forward(*inputs)
    )
    assert train(dropout=dropout, epochs=1).status == 0
    once, number = stored(), len(calls)
    forget()
    assert train(dropout=dropout, epochs=1, grad_checkpointing="yes").status == 0
    assert len(calls) - number > number
    del once["settings"]
    assert (
        differences(once, {key: part for key, part in stored().items() if key != "settings"}) == []
    )


def compile_by(monkeypatch, backend: Callable) -> None:
    """Have --compile use a backend of our own: PyTorch's would call a C++ compiler for minutes."""
    torch.compiler.reset()
    compile_in_place = UNet.compile
    monkeypatch.setattr(
        UNet, "compile", lambda self, **options: compile_in_place(self, backend=backend, **options)
    )


@pytest.mark.parametrize("options", [{}, {"conditional": "yes", "grad_checkpointing": "yes"}])
def test_a_compiled_network_learns_the_same(place, train, in_float64, monkeypatch, options):
    """It is compiled once and whole; the same run goes on compiled or not."""
    graphs, options = [], options | {"lr_decay": "none", "warmup": 0}
    compile_by(monkeypatch, lambda graph, inputs: graphs.append(graph) or graph.forward)
    shutil.rmtree("pictures")
    for number in (1, 2):
        paint(place / "pictures" / str(number), first_seed=5 * number, count=5)
    assert train(**options, epochs=3).status == 0
    as_it_is = stored()
    forget()
    result = train(**options, epochs=2, compile="yes")
    assert (result.status, result.out.count("compiled in ")) == (0, 1)
    assert len(graphs) == 1
    assert train(**options, epochs=3).status == 0
    assert distance(stored(), as_it_is) < 1e-10
    result = train(**options, epochs=3, compile="yes")
    assert ("compiled" in result.out, "nothing to do" in result.out) == (False, True)


@pytest.mark.parametrize("when", ["at once", "as it compiles"])
def test_what_cannot_be_compiled_is_said_in_one_line(train, monkeypatch, when):
    def fail(*_, **options):
        raise RuntimeError("no C++ compiler for torch.compile\nand a long story")

    if when == "at once":
        monkeypatch.setattr(UNet, "compile", fail)
    else:
        compile_by(monkeypatch, fail)
    result = train(compile="yes")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("ddpm.py: --compile: ")
    assert (
        "no C++ compiler for torch.compile" in result.err
        and "without it, the result is the same" in result.err
    )
    assert not Path("models/run/checkpoint.pt").exists()


def test_parts_of_a_batch_drop_other_activations(train, monkeypatch):
    """Else two GPUs, or two parts, would drop the same.

    The seed knows the step and where a part begins.
    """
    seeds, forward = [], UNet.forward

    def note_seed(self: UNet, *inputs) -> Tensor:
        if self.training and not inputs[0].is_meta:
            seeds.append(torch.initial_seed())
        return forward(self, *inputs)

    monkeypatch.setattr(UNet, "forward", note_seed)
    assert train(dropout=0.5, epochs=2, micro_batch=2).status == 0
    assert len(seeds) == len(set(seeds)) == 10  # two parts of five steps


def test_every_option_is_tried():
    """A new option of train belongs to OTHER, or to those that may change."""
    assert (
        OTHER.keys()
        | set(runs.MAY_CHANGE)
        | {"run_name", "init_from", "conditional", "preset", "frames", "crop_margin"}
        == inspect.signature(ddpm.train).parameters.keys()
    )


@pytest.mark.parametrize("flag", OTHER)
def test_every_option_changes_what_is_learned(train, finished, flag):
    forget()
    assert train(**{"epochs": 1, flag: OTHER[flag]}).status == 0
    assert differences({"average": stored()["average"]}, {"average": finished["average"]})


def test_seed_and_step_decide_order_and_noise(train, monkeypatch):
    """Other noise in every step of every seed, each epoch in an order of its own."""
    orders, noises, batch_indices, draw = [], [], utils.batch_indices, ddpm.Diffusion.draw

    def note_order(*numbers: int) -> Tensor:
        orders[-1].extend(indices := batch_indices(*numbers))
        return indices

    def note_noise(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        noises.append(draw(self, shape))
        return noises[-1]

    monkeypatch.setattr(utils, "batch_indices", note_order)
    monkeypatch.setattr(ddpm.Diffusion, "draw", note_noise)
    for seed in (0, 1):
        orders.append([])
        assert train(seed=seed, run_name=f"seed_{seed}").status == 0
    assert len({eps.numpy().tobytes() for _, eps in noises}) == 2 * LAST_STEP
    # four of 8 steps are drawn: few are drawn twice
    assert len({t.numpy().tobytes() for t, _ in noises}) > LAST_STEP
    epochs = [
        tuple(map(int, order[start : start + 10])) for order in orders for start in (0, 10, 20)
    ]
    assert len(set(epochs)) == 6
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(range(10))}


def test_the_same_command_learns_the_same(train, finished):
    """Without this, the test above would prove nothing."""
    forget()
    assert train(epochs=1).status == 0
    assert differences(outcome(), finished) == []


def test_a_checkpoint_describes_its_run(train, finished):
    asked_for = {
        "run_name": "run",
        "img_size": (8, 8),
        "multipliers": (1, 2),
        "lr": 1e-3,
        "epochs": 1,
        "flip": "horizontal",
    }
    flags = inspect.signature(ddpm.train).parameters.keys()
    assert finished["settings"].keys() == flags - {"preset"} | {"classes", "input_mode"}
    assert asked_for.items() <= finished["settings"].items()
    assert finished["data"] == utils.load_dataset(Path("pictures"), (8, 8)).fingerprint
    network, _ = ddpm.build(finished["settings"], "cpu")
    names = [name for name, _ in network.named_parameters()]
    assert list(finished["network"]) == list(finished["average"]) == names
    assert finished["step"] == 3


def test_a_run_writes_only_where_it_should(finished, place):
    written = {
        name
        for name in files_below(place)
        if not name.endswith(".lock") and (place / name).is_file()
    }
    pictures = {f"pictures/picture_{number:04d}.png" for number in range(10)}
    outside = {name for name in written - pictures if not name.startswith("datasets/.cache/")}
    results = {
        LOG.as_posix(),
        "results/run/loss.png",
        "results/run/data.png",
        "results/run/index.html",
        "results/run/command.txt",
        f"{PREVIEWS.as_posix()}/epoch_0001.png",
    }
    assert outside == {CHECKPOINT.as_posix()} | results


@pytest.mark.parametrize("sample_every, epochs", [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5])])
def test_previews_come_after_every_so_many_epochs(train, sample_every, epochs):
    assert train(epochs=5, sample_every=sample_every).status == 0
    assert sorted(path.name for path in PREVIEWS.iterdir()) == [
        f"epoch_{epoch:04d}.png" for epoch in epochs
    ]


def test_the_last_preview_shows_what_sample_makes(train, run, monkeypatch):
    """The averaged weights, seeds 0 to 15.

    A level of 255 is allowed for: kernels may add in another order.
    """
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    assert train(objective="v", lr=0.05).status == 0  # so that weights and average are far apart
    assert run("sample", "--run_name=run", "--n_img=16", "--steps=8", "--device=cpu").status == 0
    preview, samples = (
        np.asarray(Image.open(path), dtype=int)
        for path in (PREVIEWS / "epoch_0003.png", Path("results/run/samples/samples.png"))
    )
    assert preview.shape == (32, 32, 3)
    assert abs(preview - samples).max() <= 1


@pytest.mark.parametrize(
    "save_every, takes, steps",
    [
        (0, 0, list(range(1, 31))),
        (1, 0, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]),  # 1.2 minutes apart; step 30 is the last
        # 3.2 minutes apart; step 10 ends an epoch after 0.8 minutes, step 20 after 1.6
        (3, 0, [8, 16, 20, 28, 30]),
        (math.inf, 0, [10, 20, 30]),  # the ends of the epochs
        (math.inf, 2, [10, 20, 30]),  # of 242 seconds, two are less than a hundredth
        (math.inf, 4, [10, 30]),  # four are more
        (0, 4, list(range(1, 31))),  # but who asks for saves has them
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_saves_come_by_the_clock(train, monkeypatch, save_every, takes, steps, fails):
    """A step takes 0.4 minutes here, and an epoch 10 steps.

    On a full disk, not every step tries again.
    """
    clock, saved, batch_indices = SimpleNamespace(seconds=0), [], utils.batch_indices

    def save(run_name: str, **state) -> None:
        saved.append(state["step"])
        clock.seconds += takes
        if fails and state["step"] < 30:
            raise OSError("disk full")

    def take_time(*numbers: int) -> Tensor:
        clock.seconds += 24
        return batch_indices(*numbers)

    for place in (ddpm, journal, session):
        monkeypatch.setattr(place, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    monkeypatch.setattr(utils, "batch_indices", take_time)
    monkeypatch.setattr(checkpoints, "save", save)
    assert train(batch_size=1, width=4, multipliers=1, save_every=save_every).status == 0
    assert saved == steps


def test_the_log_tells_what_happened(train, monkeypatch):
    """Every row against what was seen.

    The mean loss since the row before, and the closed form of the rate.
    """
    monkeypatch.setattr(journal, "ROW_EVERY", 3)
    losses, loss = [], ddpm.Diffusion.loss

    def listen(*inputs) -> Tensor:
        losses.append(loss(*inputs))
        return losses[-1]

    monkeypatch.setattr(ddpm.Diffusion, "loss", listen)
    monkeypatch.setattr(journal, "plot_curves", plot_curves)
    assert train().status == 0
    first, *rows = csv.reader(LOG.read_text().splitlines())
    quarters = ["loss_q1", "loss_q2", "loss_q3", "loss_q4"]
    assert first == [
        "step",
        "epoch",
        "images",
        "loss",
        "lr",
        "grad_norm",
        "clipped",
        *quarters,
        "img_per_s",
    ]
    assert [row[:3] for row in rows] == [
        ["3", "1.2", "12"],
        ["6", "2.4", "24"],
        ["8", "3.2", "32"],  # the last two steps
    ]
    for row, seen in zip(rows, (losses[:3], losses[3:6], losses[6:]), strict=True):
        # float32 has 7 digits
        assert float(row[3]) == pytest.approx(torch.cat(seen).mean().item(), rel=1e-6)
        assert 0 < float(row[5]) < math.inf
        assert int(row[6]) in range(4)
        assert float(row[-1]) > 0
    rates = [
        1e-3
        * min(1, max((step + 1) / 5, 10 * step / LAST_STEP))
        * (1 + math.cos(math.pi * step / LAST_STEP))
        / 2
        for step in (2, 5, 7)
    ]
    assert [float(row[4]) for row in rows] == pytest.approx(rates)
    with Image.open("results/run/loss.png") as curve:
        assert min(curve.size) > 100


def test_the_loss_falls(train, place):
    """Four pictures of one color each: after some hundred steps most of the noise is recognized."""
    for number, color in enumerate(("white", "black", "red", "blue")):
        (place / "colors").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), color).save(place / f"colors/{number}.png")
    assert train(dataset="colors", epochs=200, width=8, multipliers=1, lr=3e-3).status == 0
    losses = [row[journal.COLUMNS.index("loss")] for row in stored()["log"]]
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_images_than_a_batch_are_used_as_they_are(train, place, count):
    paint(place / "few", count)
    result = train(dataset="few", epochs=4)
    assert result.status == 0
    assert f"4 epochs, 4 steps of {count} images" in result.out
    assert stored()["step"] == 4


def test_a_run_keeps_the_numbers_of_its_preset_not_the_name(train, monkeypatch):
    tiny = {"seed": 7, "lr_decay": "none"}
    monkeypatch.setitem(runs.PRESETS, "tiny", tiny)
    result = train(preset="tiny")
    assert result.status == 0
    assert "preset   tiny: --seed=7 --lr_decay=none\n" in result.out
    settings = checkpoints.load("run")["settings"]
    assert (settings["seed"], settings["lr_decay"]) == (7, "none")
    assert "preset" not in settings
    assert "nothing to do" in train(**tiny).out  # the same run, written out


@pytest.mark.parametrize("hours", [0, 1e9])
def test_a_training_of_many_hours_is_told_before_it_begins(
    train, monkeypatch, uninterrupted, hours
):
    """The trial steps it takes to know change nothing."""
    monkeypatch.setattr(session, "MANY_HOURS", hours)
    monkeypatch.setattr(session, "SLOWEST_CPU", 1e-9)
    result = train()
    told = [line for line in result.out.splitlines() if "--max_minutes=60 takes" in line]
    assert [line.startswith("time ") for line in told] == ([True] if hours == 0 else [])
    assert differences(outcome(), uninterrupted) == []
    assert "on this CPU" not in train(epochs=9).out  # it has begun


def test_a_smaller_network_is_advised_where_it_is_one_and_the_time_is_open(train, monkeypatch):
    monkeypatch.setattr(session, "MANY_HOURS", 0)
    monkeypatch.setattr(session, "SLOWEST_CPU", 1e-9)
    assert "on this CPU; --max_minutes=60 takes" in train(dry_run=True).out
    monkeypatch.setitem(runs.SMALL, "width", 2)
    assert "on this CPU; --preset=laptop takes one hour, with a" in train(dry_run=True).out
    assert "on this CPU" not in train(dry_run=True, max_minutes=500).out
    assert "on this CPU" not in train(epochs=1, max_minutes=500).out
