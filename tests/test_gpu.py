"""What a GPU would meet, rehearsed without one: see pretended_gpu.py."""

import inspect
import shutil
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, paint
from PIL import Image
from pretended_gpu import GPU, gpu_facts, pretended_gpu
from torch import nn

import ddpm
import modules
import utils
from machinery import command_line, devices, journal, session
from machinery.basics import UserError
from modules import UNet
from tools import evaluate

WORDS = [word for word in TINY if not word.startswith("--device")]
WORDS += ["--dataset=sorted", "--conditional"]


def train(device: str, **options) -> None:
    """Train the tiny run by the command line."""
    words = [*WORDS, f"--device={device}", *(f"--{name}={value}" for name, value in options.items())]
    command_line.plan("ddpm.py", {"train": ddpm.train}, ["train", *words])()


def train_three_ways(device: str) -> None:
    """Train, resume and start from another run, with all that a step can have."""
    how = {"precision": "float32", "dropout": 0.1, "grad_checkpointing": "yes", "micro_batch": 3}
    train(device, run_name=device, epochs=1, **how)
    train(device, run_name=device, epochs=2, **how)
    train(device, run_name=f"{device}_fine", init_from=device, epochs=1, precision="float32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A place with runs that were trained on a pretended GPU and on the CPU: made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        patch.setattr(ddpm, "STEPS", 1)  # of the previews
        for name in ("cats", "dogs"):
            paint(Path("sorted", name), count=4, first_seed=len(name) + ord(name[0]))
        with pretended_gpu():
            train_three_ways("cuda")
        train_three_ways("cpu")
        return Path.cwd()


def weights_of(run_name: str) -> dict[str, torch.Tensor]:
    return torch.load(Path("models", run_name, "checkpoint.pt"), weights_only=True)["average"]


def images_in(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("sample_*.png"))])


# ---- the whole program ---------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "_fine"])
def test_a_gpu_learns_what_the_cpu_does(here, end):
    """Resumed, from other weights, in micro-batches, with classes, dropout and recomputing."""
    ours, theirs = weights_of(f"cuda{end}"), weights_of(f"cpu{end}")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


WAYS = {sampler: [f"--sampler={sampler}"] for sampler in ddpm.SAMPLERS}
WAYS["inpainting"] = ["--init_image=image.png", "--mask=mask.png", "--gif"]


@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_makes_the_images_of_the_cpu(here, run, way):
    """By every sampler, with guidance, and from an image with a mask."""
    for name in ("image.png", "mask.png"):
        shutil.copyfile(next(Path("sorted", "cats").iterdir()), name)
    words = ["sample", "--run_name=cpu", "--n_img=3", "--steps=3", "--precision=float32"]
    assert run(*words, "--device=cpu", *WAYS[way]).status == 0
    with pretended_gpu():
        result = run(*words, "--device=cuda", *WAYS[way])
    assert result.status == 0, result.err
    folder = Path("results", "cpu")
    assert (images_in(folder / "samples") == images_in(folder / "samples_2")).all()


def test_a_gpu_judges_as_the_cpu_does(here, run_main, monkeypatch):
    extract = lambda images: images.float().mean(dim=(2, 3))  # noqa: E731
    features = evaluate.Features("FD", "of colors", extract)
    monkeypatch.setitem(evaluate.FEATURES, "efficientnet", lambda device: features)
    monkeypatch.setattr(evaluate, "FEWEST", 4)
    monkeypatch.setitem(evaluate.LIMITS, "n_img", (4, 10))
    words = ["--run_name=cpu", "--n_img=4", "--steps=1", "--precision=float32"]
    told = [run_main(evaluate.main, *words, "--device=cpu")]
    shutil.rmtree("datasets")  # features are kept there
    with pretended_gpu():
        told.append(run_main(evaluate.main, *words, "--device=cuda"))
    assert [result.status for result in told] == [0, 0], told[1].err
    assert told[0].out == told[1].out


def test_a_t4_learns_in_float16(place):
    """It has tensor cores and no bfloat16, so `auto` takes float16, with loss scaling."""
    paint(Path("sorted", "cats"), count=4)
    for device, precision in (("cuda", "auto"), ("cpu", "float16")):
        with pretended_gpu() if device == "cuda" else gpu_facts():
            train(device, run_name=device, epochs=1, precision=precision)
    stored = [torch.load(Path("models", name, "checkpoint.pt")) for name in ("cuda", "cpu")]
    assert stored[0]["loss_scale_steps"] == 1
    assert all(map(torch.equal, *(each["average"].values() for each in stored)))
