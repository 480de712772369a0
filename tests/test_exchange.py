"""Publishing a run: a small file to sample from and to begin from; and beginning from another run's weights."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Result, files_below, paint
from PIL import Image

import checkpoints
import command_line
import ddpm
import tools.exchange
import utils

TRAIN = ("train", *TINY, "--dataset=pictures", "--noise_steps=20", "--epochs=8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A place with a trained run, `tiny`."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        paint(place / "pictures")
        command_line.plan("ddpm.py", {"train": ddpm.train}, [*TRAIN, "--run_name=tiny"])()
    return place


@pytest.fixture
def here(trained, place) -> Path:
    """The test's own place, with that run and its pictures."""
    shutil.copytree(trained, place, dirs_exist_ok=True)
    return place


@pytest.fixture
def exchange(here, monkeypatch, capfd):
    """Run `python -m tools.exchange WORDS...` within this process."""

    def exchange_words(*words: str) -> Result:
        streams = sys.stdout, sys.stderr
        monkeypatch.setattr(sys, "argv", ["exchange.py", *words])
        capfd.readouterr()
        status = 0
        try:
            tools.exchange.main()
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.stdout, sys.stderr = streams
        return Result(status, *capfd.readouterr())

    return exchange_words


# ---- publish --------------------------------------------------------------------------------------------------------


def test_what_is_published_is_small_and_makes_the_same_images(exchange, run, monkeypatch):
    """Half precision has 11 binary digits, down to 2^-24; a walk of few steps shows little of what is behind them."""
    monkeypatch.setattr(utils, "has_bfloat16", lambda device: False)
    assert exchange("publish", "--run_name=tiny", "--to=public").status == 0
    whole, small = (checkpoints.paths_of(name)[0] for name in ("tiny", "public"))
    assert small.stat().st_size < whole.stat().st_size / 6
    published = checkpoints.load("public")
    assert {weight.dtype for weight in published["average"].values()} == {torch.float16}
    assert published.keys() == checkpoints.TO_SAMPLE | {"format"}
    for name, weight in checkpoints.load("tiny")["average"].items():
        assert ((weight - published["average"][name].float()).abs() <= weight.abs() * 2**-11 + 2**-25).all()
    for name in ("tiny", "public"):
        assert run("sample", f"--run_name={name}", "--n_img=4", "--steps=5", "--device=cpu").status == 0
    one, two = (np.asarray(Image.open(f"results/{name}/samples/samples.png"), int) for name in ("tiny", "public"))
    assert abs(one - two).mean() < 0.5


def test_a_published_run_is_not_gone_on_with_and_says_what_it_is_for(exchange, run, here):
    assert exchange("publish", "--run_name=tiny", "--to=public").status == 0
    before = checkpoints.paths_of("public")[0].read_bytes()
    result = run(*TRAIN, "--run_name=public")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "weights only" in result.err
    assert "--init_from=public" in result.err
    assert checkpoints.paths_of("public")[0].read_bytes() == before
    assert run(*TRAIN, "--run_name=mine", "--init_from=public").status == 0


def test_a_published_run_stands_in_the_table(exchange, run):
    assert exchange("publish", "--run_name=tiny", "--to=public").status == 0
    lines = [line.split() for line in run("sample").out.splitlines()]
    assert [line[0] for line in lines] == ["run", "public", "tiny"]
    assert lines[1][1:5] == lines[2][1:5]


@pytest.mark.parametrize(
    "words, named",
    [
        (("--to=public",), "--run_name is missing"),
        (("--run_name=tiny",), "--to is missing"),
        (("--run_name=tiny", "--to=../public"), "--to=../public is not a usable name"),
        (("--run_name=other", "--to=public"), "other is not a trained run; runs there are: tiny"),
        (("--run_name=tiny", "--to=tiny"), "models/tiny holds a run"),
        (("--run_name=tiny", "--to=public", "--n_img=3"), "--n_img is not an option of publish"),
    ],
)
def test_what_cannot_be_published_is_refused_in_one_line(exchange, here, words, named):
    before = files_below(here)
    result = exchange("publish", *words)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("tools.exchange: ")
    assert named in result.err
    assert files_below(here) == before


def test_weights_beyond_half_precision_are_not_published(exchange, here):
    state = torch.load(checkpoints.paths_of("tiny")[0], weights_only=True)
    state["average"]["conv_in.bias"][0] = 1e5
    torch.save(state, checkpoints.paths_of("tiny")[0])
    result = exchange("publish", "--run_name=tiny", "--to=public")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "beyond 65,504" in result.err
    assert not checkpoints.exists("public")


# ---- beginning from another run -------------------------------------------------------------------------------------


def test_a_run_begins_with_the_average_of_another(here, run):
    """At a learning rate of nearly nothing the weights and their average stay what they were at the beginning."""
    start = checkpoints.load("tiny")
    words = [word for word in TRAIN if not word.startswith("--lr=")]
    assert run(*words, "--lr=1e-9", "--run_name=mine", "--init_from=tiny").status == 0
    mine = checkpoints.load("mine")
    for kind in ("network", "average"):
        for name, weight in mine[kind].items():
            assert abs(weight - start["average"][name]).max() < 1e-7
    assert abs(start["network"]["conv_in.weight"] - start["average"]["conv_in.weight"]).max() > 1e-6


@pytest.mark.parametrize(
    "changed, flags",
    [
        (("--width=32",), "--width=16"),
        (("--multipliers=1,1",), "--multipliers=1,2"),
        (("--objective=v", "--schedule=cosine"), "--schedule=linear --objective=eps"),
        (("--img_size=16",), "--attention_size=8"),
        (("--attention_size=0",), "--attention_size=4"),
    ],
)
def test_another_network_is_refused_with_the_flags_that_fit(here, run, changed, flags):
    words = dict(word.split("=") for word in (*TRAIN[1:], *changed))
    command = ["train", *("=".join(item) for item in words.items()), "--run_name=mine", "--init_from=tiny"]
    before = files_below(here)
    result = run(*command)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.endswith(f"to fit it, add {flags}\n")
    assert files_below(here) == before
    words |= dict(word.split("=") for word in flags.split())
    assert run("train", *("=".join(item) for item in words.items()), "--run_name=mine", "--init_from=tiny").status == 0


@pytest.mark.parametrize("name, named", [("other", "other is not a trained run"), ("../x", "--init_from=../x is not")])
def test_a_run_to_begin_from_must_be_there(here, run, name, named):
    before = files_below(here)
    result = run(*TRAIN, "--run_name=mine", f"--init_from={name}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert named in result.err
    assert files_below(here) == before


def test_once_begun_the_other_run_is_not_needed_any_more(here, run):
    command = (*TRAIN, "--run_name=mine", "--init_from=tiny")
    assert run(*command).status == 0
    shutil.rmtree("models/tiny")
    words = [word if word != "--epochs=8" else "--epochs=9" for word in command]
    assert run(*words).status == 0
    result = run(*[word for word in words if not word.startswith("--init_from")])
    assert result.status == 2
    assert "--init_from was tiny, is now " in result.err
