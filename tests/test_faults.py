"""What goes wrong while the program runs: kills, signals, full disks, little memory, odd input."""

import contextlib
import inspect
import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, files_below, paint, start
from hypothesis import strategies
from PIL import Image

import ddpm
import utils
from machinery import checkpoints, command_line, reading, runs
from machinery.basics import UserError
from machinery.pixels import FileFault, NeedsScale, Scale

CHECKPOINT = Path("models/run/checkpoint.pt")
TRAIN = [
    "train",
    "--dataset=pictures",
    "--run_name=run",
    "--noise_steps=8",
    "--save_every=0",
    *TINY,
]
FOREVER = [*TRAIN, "--epochs=1_000_000"]
LENGTH = int(os.environ.get("FUZZ", "1"))  # FUZZ=100 tries a hundred times as many examples
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


# ---- kills and signals ---------------------------------------------------------------------------


@pytest.mark.skipif(
    sys.platform != "linux", reason="only on Linux may a process that has used PyTorch fork"
)
def test_a_storm_of_kills_loses_nothing(place):
    """No finished save is lost, and the end is that of a run without kills, to the bit."""
    command = [sys.executable, str(ROOT / "tests" / "storm.py"), "--minutes=0.2"]
    end = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert end.returncode == 0, end.stdout + end.stderr
    for name in ("kill -9", "named point", "signal", "finished runs"):
        assert re.search(f"[1-9][0-9]* {name}", end.stdout), end.stdout


@pytest.fixture
def training(place):
    """A training without end, in a process of its own; it has saved for the first time."""
    paint(place / "pictures")
    process = start(*FOREVER, cwd=place)
    wait_for_a_save(process, -1)
    yield process
    process.kill()
    process.communicate()


def wait_for_a_save(process: subprocess.Popen, step: int) -> int:
    """Wait until the checkpoint is of a later step than this: which one."""
    while True:
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(UserError), contextlib.redirect_stdout(io.StringIO()):
            if (found := checkpoints.load("run")["step"]) > step:
                return found
        time.sleep(0.05)


def stopped_at(process: subprocess.Popen, status: int) -> int:
    """Wait for the end of a training that was asked to stop: the step that it says it saved."""
    out, err = process.communicate()
    assert (process.returncode, err.count("Traceback")) == (status, 0), err
    return int(re.search(r"stopped and saved at step ([\d,]+)", out)[1].replace(",", ""))


@posix
def test_a_training_outlives_its_terminal_until_it_is_told_to_stop(training):
    training.send_signal(signal.SIGHUP)
    step = wait_for_a_save(training, wait_for_a_save(training, -1) + 1)
    training.send_signal(signal.SIGTERM)
    assert stopped_at(training, 143) == checkpoints.load("run")["step"] >= step


@posix
def test_ctrl_c_saves(training):
    step = wait_for_a_save(training, -1)
    training.send_signal(signal.SIGINT)
    assert stopped_at(training, 130) == checkpoints.load("run")["step"] >= step


@posix
def test_ctrl_c_again_and_again_harms_nothing(training, run):
    """The first asks it to stop, the next ends it at once, in a step or in a save."""
    step = wait_for_a_save(training, -1)
    while training.poll() is None:
        training.send_signal(signal.SIGINT)
        time.sleep(0.003)
    out, _ = training.communicate()
    # the latter if one more comes while it is leaving
    assert training.returncode in (130, -signal.SIGINT)
    assert "stopped and saved" not in out
    assert checkpoints.load("run")["step"] >= step
    assert run(*TRAIN, f"--epochs={checkpoints.load('run')['step']}").status == 0
    assert not list(CHECKPOINT.parent.glob("*.unfinished*"))


@posix
def test_the_lock_of_a_killed_training_dies_with_it(training, run):
    """It holds while its owner lives; the file that is left behind says nothing."""
    with (
        pytest.raises(UserError, match="another process is training this run"),
        runs.lock_run(CHECKPOINT.parent),
    ):
        pass
    training.kill()
    training.communicate()
    step = checkpoints.load("run")["step"]
    result = run(*TRAIN, f"--epochs={step}")
    assert result.status == 0, result.err
    assert f"{step:,} steps are done" in result.out


# ---- readers that leave --------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [("stdout",), ("stdout", "stderr")], ids="+".join)
def test_a_training_outlives_its_readers(place, gone):
    """As in `ddpm.py train ... | head -1`, or `2>&1 | head -1`."""
    paint(place / "pictures")
    process = start(*TRAIN, "--epochs=4", cwd=place)
    assert process.stdout.readline().startswith("data")
    for name in gone:
        getattr(process, name).close()
    err = "" if process.stderr.closed else process.stderr.read()
    assert (process.wait(), err) == (0, "")
    assert checkpoints.load("run")["step"] == 10
    process.stderr.close()


@posix
def test_a_training_needs_no_streams_at_all(place):
    """As in `ddpm.py train ... >&- 2>&-`, or where a service starts it."""
    paint(place / "pictures")
    script = 'exec "$0" "$@" >&- 2>&-'
    command = [sys.executable, str(ROOT / "ddpm.py"), *TRAIN, "--epochs=4"]
    end = subprocess.run(
        ["sh", "-c", script, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=place
    )
    assert end.returncode == 0
    assert checkpoints.load("run")["step"] == 10


# ---- a full disk, too little memory --------------------------------------------------------------


@contextlib.contextmanager
def full_disk(monkeypatch, first: int, last: int):
    """Within this block, the saves of these steps find no room: no file may grow beyond 20 kB."""
    resource = pytest.importorskip(
        "resource", reason="this system has no limits on the size of a file"
    )
    save, limits = checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(run_name: str, **state) -> None:
        room = 20_000 if first <= state["step"] <= last else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            save(run_name, **state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoints, "save", save_on_a_full_disk)
    yield
    monkeypatch.setattr(checkpoints, "save", save)


def test_a_training_goes_on_where_the_disk_is_full_for_a_while(place, run, monkeypatch):
    paint(place / "pictures")
    found, batch_indices = [], utils.batch_indices

    def look(*inputs):
        found.append(checkpoints.load("run")["step"] if checkpoints.exists("run") else 0)
        return batch_indices(*inputs)

    monkeypatch.setattr(utils, "batch_indices", look)
    with full_disk(monkeypatch, 3, 4):
        result = run(*TRAIN, "--epochs=3")
    assert result.status == 0, result.err
    assert found == [0, 1, 2, 2, 2, 5, 6, 7]
    assert result.out.count("not written") == 2
    assert re.search(r"not written: .*checkpoint.*(disk full|File too large)", result.out)


def test_a_disk_that_is_full_at_the_last_save_is_an_error_of_one_line(place, run, monkeypatch):
    paint(place / "pictures")
    with full_disk(monkeypatch, 8, 8):
        result = run(*TRAIN, "--epochs=3")
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert re.search("disk full|File too large", result.err)
    assert checkpoints.load("run")["step"] == 7
    assert files_below(CHECKPOINT.parent) == {".lock", "checkpoint.pt", "checkpoint.previous.pt"}
    assert run(*TRAIN, "--epochs=3").status == 0
    assert checkpoints.load("run")["step"] == 8


MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
]


@pytest.mark.parametrize(
    "error", [*MEMORY, torch.OutOfMemoryError("CUDA out of memory. Tried ...")], ids=repr
)
def test_too_little_memory_is_said_in_one_line(place, run, monkeypatch, error):
    def fail(*inputs):
        raise error

    paint(place / "pictures")
    monkeypatch.setattr(ddpm.Diffusion, "loss", fail)
    result = run(*TRAIN, "--epochs=1")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "out of memory" in result.err
    assert "--batch_size" in result.err


def test_other_errors_are_not_hidden(place, run, monkeypatch):
    paint(place / "pictures")
    monkeypatch.setattr(ddpm.Diffusion, "loss", lambda *inputs: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        run(*TRAIN, "--epochs=1")


# ---- odd input -----------------------------------------------------------------------------------


def picture_files() -> dict[str, bytes]:
    """One small picture in every way of writing it that readers have code of their own for."""
    colors = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    gray = colors.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    ways = {
        "a.png": (colors, {}),
        "palette.png": (colors.convert("P"), {"transparency": 0}),
        "16 bit.png": (Image.fromarray(np.asarray(gray, dtype=np.uint16) * 257), {}),
        "a.jpg": (colors, {"exif": exif}),
        "cmyk.jpg": (colors.convert("CMYK"), {}),
        "progressive.jpg": (colors, {"progressive": True}),
        "moving.gif": (colors, {"save_all": True, "append_images": [colors.rotate(180)]}),
        "a.tif": (colors, {}),
        "packed.tif": (colors, {"compression": "tiff_lzw"}),
        "float.tif": (gray.convert("F"), {}),
        "a.webp": (colors, {"exif": exif}),
        "lossless.webp": (colors.convert("RGBA"), {"lossless": True}),
        "a.bmp": (colors, {}),
        "bits.bmp": (colors.convert("1"), {}),
    }
    files = {}
    for name, (picture, options) in ways.items():
        picture.save(
            file := io.BytesIO(),
            {"jpg": "jpeg", "tif": "tiff"}.get(name[-3:], name.split(".")[1]),
            **options,
        )
        files[name] = file.getvalue()
    return files


def edited(data, whole: bytes) -> bytes:
    """A file with a few bytes replaced, left out or put in.

    Most of them are near its beginning, where the facts are.
    """
    for _ in range(data.draw(strategies.integers(0, 4))):
        start = data.draw(
            strategies.integers(
                0, min(len(whole), data.draw(strategies.sampled_from([100, 10**6])))
            )
        )
        taken = data.draw(strategies.integers(0, 8))
        whole = whole[:start] + data.draw(strategies.binary(max_size=8)) + whole[start + taken :]
    return (
        whole[: data.draw(strategies.integers(0, len(whole)))]
        if data.draw(strategies.booleans())
        else whole
    )


@hypothesis.settings(
    max_examples=300 * LENGTH, deadline=None, database=None, derandomize=LENGTH == 1
)
@hypothesis.given(strategies.data(), strategies.sampled_from([(8, 8), (4, 12)]))
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_are_a_picture_or_a_reason(tmp_path_factory, data, size):
    files = picture_files()
    name = data.draw(strategies.sampled_from(sorted(files)))
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(edited(data, files[name]))
    try:
        image, _ = reading.read_image(folder / name, size)
        assert (image.shape, image.dtype) == ((3, *size), np.uint8)
    except NeedsScale as need:
        assert all(map(math.isfinite, need.scale))
    except FileFault as fault:
        assert str(fault).startswith(f"{name} (")
    assert files_below(folder) <= set(files)


@pytest.mark.parametrize("name, whole", picture_files().items(), ids=picture_files())
def test_the_pictures_that_get_damaged_are_good(place, name, whole):
    Path(name).write_bytes(whole)
    image, _ = reading.read_image(Path(name), (8, 8), scale=Scale(0, 1))
    assert image.shape == (3, 8, 8)


VALUES = [
    "",
    "0",
    "1",
    "-1",
    "2",
    "4",
    "8",
    "16",
    "nan",
    "-inf",
    "1e3",
    "1e400",
    "0.5",
    "8x8",
    "16x8",
    "1,2",
    "2,1,1",
]
VALUES += [
    "auto",
    "cpu",
    "run",
    "pictures",
    "..",
    "/nowhere",
    "../x",
    "a/b",
    ".",
    "no",
    "yes",
    "cosine",
    "v",
    "x0",
    "ddim",
]
VALUES += [
    "models",
    "datasets",
    "None",
    "\u00e9",
    "\0",
    "\n",
    "%s",
    "{}",
    "--",
    "-",
    "con",
    "9" * 30,
    "x" * 300,
]
# "/" is a data set: the whole disk
texts = strategies.text(max_size=5).filter(lambda text: "/" not in text)
values = strategies.sampled_from(VALUES) | texts | strategies.integers(-9, 99).map(str)
COMMANDS = {"train": ddpm.train, "sample": ddpm.sample}
BASE = {
    "train": {
        "dataset": "pictures",
        "img_size": "8",
        "width": "16",
        "multipliers": "1,2",
        "device": "cpu",
    },
    "sample": {"run_name": "run", "steps": "2", "device": "cpu"},
}


@strategies.composite
def lines(draw) -> list[str]:
    """A sensible command line, some options of which were replaced or added.

    Now and then there is a word too many.
    """
    name = draw(strategies.sampled_from(sorted(COMMANDS)))
    flags = strategies.sampled_from(sorted(inspect.signature(COMMANDS[name]).parameters))
    options = BASE[name] | draw(strategies.dictionaries(flags, values, max_size=3))
    words = [name, *(f"--{flag}={value}" for flag, value in options.items())]
    if draw(strategies.integers(0, 9)) == 0:
        words.insert(draw(strategies.integers(1, len(words))), draw(values))
    return words


@pytest.fixture
def far_enough(place, monkeypatch) -> Path:
    """A folder with pictures and a trained run.

    Commands end there once everything has been checked and read.
    """
    paint(place / "here" / "pictures", 2)
    monkeypatch.chdir("here")
    command_line.plan("ddpm.py", COMMANDS, [*TRAIN, "--epochs=1"])()

    def end(settings: dict, device):
        raise UserError("far enough")

    monkeypatch.setattr(ddpm, "build", end)
    monkeypatch.setattr(runs, "lock_run", lambda folder: contextlib.nullcontext())
    return place / "here"


def test_any_words_are_done_or_refused(run, far_enough):
    """Whatever is typed: status 0 or 2, at most one line on stderr.

    Nothing is written where it should not be.
    """
    caches = set()  # where `train` was told to keep decoded images
    for words in (["sample", "--run_name=run", "--steps=2"], [*TRAIN, "--epochs=2"]):
        assert "far enough" in run(*words).err

    @hypothesis.settings(
        max_examples=200 * LENGTH, deadline=None, database=None, derandomize=LENGTH == 1
    )
    @hypothesis.given(lines())
    @hypothesis.example(["sample", "--run_name=run", "--steps=2"])
    def holds(words: list[str]) -> None:
        caches.update(word[8:] for word in words if word.startswith("--cache="))
        result = run(*words)
        assert result.status in (0, 2)
        assert result.err.count("\n") == (result.status == 2), result.err
        assert files_below(far_enough / "pictures") == {"picture_0000.png", "picture_0001.png"}
        assert {path.name for path in (far_enough / "datasets").iterdir()} <= {".cache"}
        known = {"models", "results", "datasets", "pictures", *caches}
        assert {path.name for path in far_enough.iterdir()} <= known
        assert {path.name for path in far_enough.parent.iterdir()} == {"here"}

    holds()
