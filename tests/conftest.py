"""What the tests share: a place to work in, small pictures, a tiny network, the command line."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ddpm
import tools.exchange
from machinery import checkpoints, devices, journal

ROOT = Path(__file__).resolve().parent.parent
# The smallest run that goes through every part: 8x8 pixels, two levels, attention, 4 channels a
# group.
TINY = (
    "--img_size=8",
    "--width=16",
    "--multipliers=1,2",
    "--blocks=1",
    "--attention_size=4",
    "--batch_size=4",
)
TINY += ("--sample_every=0", "--warmup=5", "--lr=1e-3", "--device=cpu")

# threads cost more than they give at this size, most of all on a busy machine
torch.set_num_threads(1)
# so a shell starts what ends in "&"; programs would inherit it
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def compute_in_float64(set_attribute: Callable) -> None:
    """Have `ddpm.train` compute in float64.

    So what differs by more than 1e-10 is not the order of additions.

    `set_attribute` is monkeypatch.setattr, or setattr in a process of its own. The default type is
    the caller's to set back. Previews stay empty: their noise is float32.
    """
    set_attribute(devices, "has_bfloat16", lambda device: False)
    # its weights may be float32 and float16 only
    set_attribute(checkpoints, "fits", lambda *_: True)
    set_attribute(torch.Tensor, "float", torch.Tensor.double)
    set_attribute(ddpm, "generate", lambda *_, **__: iter([(torch.zeros(16, 3, 8, 8),) * 2]))
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def in_float64(monkeypatch):
    """See `compute_in_float64`."""
    compute_in_float64(monkeypatch.setattr)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session", autouse=True)
def plain_curve() -> Iterator[None]:
    """Have loss.png hold numbers here, but for the tests of curves, and count no operations.

    Drawing takes longer than a tiny run; counting would be seen by tests that watch the network.
    """

    def write_rows(rows: list[list[float]], path: Path) -> None:
        path.write_text(repr([row[:-1] for row in rows]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "plot_curves", write_rows)
        patch.setattr(journal, "gflop_per_image", lambda network, size: 0.0)
        yield


class Result:
    """How a command line ended: exit status, standard output, standard error."""

    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty current directory: models/, results/ and datasets/ of a test land here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_main(place, monkeypatch, capfd):
    """Run a program's `main` with `WORDS...` within this process, in the test's own place."""

    def run_words(main: Callable[[], None], *words: str) -> Result:
        streams = sys.stdout, sys.stderr
        monkeypatch.setattr(sys, "argv", ["program.py", *words])
        capfd.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            sys.stdout, sys.stderr = streams
        return Result(status, *capfd.readouterr())

    return run_words


@pytest.fixture
def run(run_main):
    """Run `ddpm.py WORDS...` within this process, in the test's own place."""
    return lambda *words: run_main(ddpm.main, *words)


@pytest.fixture
def here(trained, place) -> Path:
    """The test's own place, with a copy of what the module's `trained` has made."""
    shutil.copytree(trained, place, dirs_exist_ok=True)
    return place


@pytest.fixture
def exchange(here, run_main):
    """Run `python -m tools.exchange WORDS...` within this process."""
    return lambda *words: run_main(tools.exchange.main, *words)


def awaken(network: nn.Module) -> None:
    """Fill what begins at 0: else the output is 0, and hardly anything before it matters."""
    for weight in network.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.05)


def refused(result: Result) -> str:
    """The one line of a refusal."""
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    return result.err


def start(*words: str, cwd: Path, **options) -> subprocess.Popen:
    """Start `ddpm.py WORDS...` as a process of its own, with one thread and its output in pipes."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **options.pop("env", {}),
    }
    command = [sys.executable, str(ROOT / "ddpm.py"), *words]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, cwd=cwd, env=environment, **options)


def paint(
    folder: Path, count: int = 10, size: tuple[int, int] = (12, 10), first_seed: int = 0
) -> Path:
    """A folder of small noisy pictures, every one different, of `size` (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first_seed, first_seed + count):
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture_{seed:04d}.png")
    return folder


def files_below(folder: Path) -> set[str]:
    """Everything in a folder, by its path from there."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
