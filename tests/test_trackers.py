"""Trackers show the numbers of log.csv; whatever befalls them, the training is the same."""

import ast
import csv
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import fake_trackers
import pytest
import torch
from conftest import TINY, paint, refused

from machinery import checkpoints, held_out, journal, trackers

# trackio asks for this when it is imported
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio_")

TRAIN = ("train", *TINY, "--dataset=pictures", "--run_name=run", "--noise_steps=8", "--epochs=5")
NUMBERS = (*journal.ALL_COLUMNS[1:],)


@pytest.fixture
def train(run, place, monkeypatch):
    """Train the tiny run, with rows after every five steps and held-out images."""
    monkeypatch.setattr(journal, "ROW_EVERY", 5)
    monkeypatch.setattr(held_out, "COST", 1e9)
    paint(place / "pictures", count=12)
    return lambda *words: run(*TRAIN, "--held_out=4", *words)


def in_log() -> dict[str, list[tuple[int, float]]]:
    """What log.csv holds: of each column its steps and numbers, to the digit."""
    rows = list(csv.DictReader(Path("results/run/log.csv").open()))
    return {
        name: [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        for name in NUMBERS
    }


@pytest.fixture
def alone(train) -> str:
    """The fingerprint of the weights that the run has without any tracker."""
    assert train().status == 0
    found = fingerprint()
    shutil.rmtree("models")
    return found


def fingerprint() -> str:
    return checkpoints.fingerprint_of(checkpoints.load("run")["network"])


def records_in(data: bytes) -> list[bytes]:
    """The records in a file of wandb's, which has the form of LevelDB's logs."""
    records, place = [], 7
    while place + 7 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]  # whole, first, middle or last part; 0 fills the end of a block
        part = data[place + 7 : place + 7 + length]
        if kind in (1, 2):
            records.append(part)
        elif kind in (3, 4):
            records[-1] += part
        place += 7 + length
        left = -place % 32_768
        place += left if left < 7 else 0
    return records


@pytest.fixture
def fake(monkeypatch):
    """Have a class of fake_trackers.py stand for wandb."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def put(kind: type) -> None:
        monkeypatch.setitem(trackers.TRACKERS, "wandb", kind)

    monkeypatch.setattr(trackers, "is_installed", lambda name: True)
    return put


# ---- the same numbers ----------------------------------------------------------------------------


def test_a_tracker_is_told_everything_in_its_order(train, fake):
    fake(fake_trackers.Fake)
    assert train("--track=wandb", "--raw_previews").status == 0
    told = [ast.literal_eval(line) for line in fake_trackers.NOTES.read_text().splitlines()]
    assert [message[0] for message in told] == [
        *("open", "scalars", "scalars", "images", "images", "conclude", "close")
    ]
    rows = [message[1:] for message in told if message[0] == "scalars"]
    for name, expected in in_log().items():
        assert [(step, numbers[name]) for step, numbers in rows if name in numbers] == expected
    assert {message[1:] for message in told if message[0] == "images"} == {
        ("previews", (16, 3, 8, 8)),
        ("previews_raw", (16, 3, 8, 8)),
    }
    _, step, figures, model = told[-2]
    assert (step, figures["images"]) == (10, 40)
    assert figures["best_held_out"] == min(loss for _, loss in in_log()["held_out"])
    published = torch.load(model, weights_only=True)
    assert "network" not in published and published["step"] == 10
    assert {weight.dtype for weight in published["average"].values()} == {torch.float16}


@pytest.mark.parametrize("flag", ["--tensorboard", "--track=tensorboard"])
def test_tensorboard_has_the_numbers_of_the_log(train, flag):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(flag).status == 0
    events = accumulator.EventAccumulator("runs/run")
    events.Reload()
    for name, expected in in_log().items():
        found = [(each.step, each.tensor_proto.double_val[0]) for each in events.Tensors(name)]
        assert found == expected
    assert events.Tags()["images"] == ["previews"]


def test_wandb_has_the_numbers_of_the_log(train, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train("--track=wandb").status == 0
    [path] = Path("runs/wandb").glob("offline-run-*/*.wandb")
    found = {name: [] for name in NUMBERS}
    for data in records_in(path.read_bytes()):
        record = Record.FromString(data)
        items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        for name in found.keys() & items.keys():
            found[name].append((record.history.step.num, json.loads(items[name])))
    assert found == in_log()


def test_trackio_has_the_numbers_of_the_log(train):
    trackio = pytest.importorskip("trackio")
    assert train("--track=trackio").status == 0
    rows = trackio.SQLiteStorage.get_logs(trackers.PROJECT, "run")
    for name, expected in in_log().items():
        assert [(row["step"], row[name]) for row in rows if name in row] == expected
    trackio.delete_project(trackers.PROJECT, force=True)


# ---- whatever befalls them -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["NeverOpens", "NeverWrites", "NeverCloses"])
def test_a_tracker_that_fails_is_told_of_once_and_changes_nothing(train, fake, kind, alone):
    fake(getattr(fake_trackers, kind))
    result = train("--track=wandb")
    assert result.status == 0
    text = result.out + result.err
    assert text.count("wandb is no longer told: No space left on device") == 1
    assert fingerprint() == alone


@pytest.mark.parametrize("pending, reason", [(2, "it does not answer"), (99, "not finished")])
def test_a_tracker_that_hangs_is_not_waited_for(train, fake, monkeypatch, pending, reason, alone):
    """With a disk and a pipe that take nothing more, or at the end; its process is gone then."""
    fake(fake_trackers.Hangs)
    started = []
    popen = subprocess.Popen

    def start(*words, **options) -> subprocess.Popen:
        started.append(popen(*words, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(trackers, "PATIENCE", 0.5)
    if pending == 2:
        monkeypatch.setattr(trackers.Tracker, "pass_on", lambda self: time.sleep(5))
    monkeypatch.setattr(trackers, "PENDING", pending)
    result = train("--track=wandb")
    assert result.status == 0
    assert (result.out + result.err).count(reason) == 1
    assert fingerprint() == alone
    assert started[-1].wait(timeout=30) == -9


def test_a_tracker_whose_process_is_killed_is_told_of(train, fake, monkeypatch, alone):
    fake(fake_trackers.Fake)
    tell = trackers.Tracker.tell

    def tell_and_kill(self, call: str, *inputs) -> None:
        self.process.kill()
        self.process.wait()
        tell(self, call, *inputs)

    monkeypatch.setattr(trackers.Tracker, "tell", tell_and_kill)
    result = train("--track=wandb")
    assert result.status == 0
    assert (result.out + result.err).count("wandb is no longer told: its process ended (-9)") == 1
    assert fingerprint() == alone


# ---- which ---------------------------------------------------------------------------------------


def test_an_unknown_tracker_is_refused(train):
    told = refused(train("--track=tensorboard,mlflow"))
    assert "--track=mlflow is not one of: tensorboard, wandb, trackio" in told


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_does(
    train, monkeypatch, name
):
    monkeypatch.setattr(trackers, "is_installed", lambda name: False)
    assert f"pip install {name}" in refused(train(f"--track={name}"))
    assert not Path("models").exists() and not Path("runs").exists()


@pytest.mark.quick
def test_both_ways_to_name_tensorboard_are_one():
    settings = {"track": "wandb,tensorboard", "tensorboard": True}
    assert trackers.chosen(settings) == ["wandb", "tensorboard"]
    assert trackers.chosen({"track": "", "tensorboard": False}) == []
