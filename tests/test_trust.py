"""What comes from strangers: checkpoints, models, names, the environment. One line, or harmless."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, files_below, paint
from torch import Tensor

import ddpm
import tools.exchange
import utils
from machinery import checkpoints, command_line, journal
from machinery.basics import UserError
from tools import evaluate

CHECKPOINT = Path("models/run/checkpoint.pt")
TRAIN = ["train", "--dataset=pictures", "--run_name=run", "--noise_steps=8", *TINY, "--epochs=20"]
SAMPLE = ["sample", "--run_name=run", "--n_img=1", "--steps=2", "--device=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A place with a run that has two rows in its log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        paint(Path("pictures"), count=40)
        command_line.plan("ddpm.py", {"train": ddpm.train}, [*TRAIN[:-1], "--epochs=4"])()
        return Path.cwd()


@pytest.fixture
def here(trained, place) -> Path:
    shutil.copytree(trained, place, dirs_exist_ok=True)
    return place


@pytest.fixture
def state(here) -> dict:
    return checkpoints.read(CHECKPOINT)


@pytest.fixture
def exchange(here, run_main):
    return lambda *words: run_main(tools.exchange.main, *words)


def refused(result) -> str:
    """The one line of a refusal."""
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    return result.err


# ---- types and ranges of what a checkpoint holds -------------------------------------------------


def change_row(name: str, value):
    """The last row of the log with another cell."""

    def change(state: dict) -> None:
        state["log"][-1][journal.COLUMNS.index(name)] = value

    return change


def change_weight(how, *kinds: str):
    """One weight made another in the network, the EMA, or both."""

    def change(state: dict) -> None:
        for kind in kinds or ("network", "average"):
            state[kind] = state[kind] | {"conv_in.weight": how(state[kind]["conv_in.weight"])}

    return change


def negative(weight: Tensor) -> Tensor:
    """The same numbers as a view that computes: its bits are those of the opposite."""
    return torch._neg_view(-weight)


SETTINGS = [
    {"img_size": (16.0,)},
    {"img_size": (True, 8)},
    {"img_size": [8, 8]},
    {"img_size": "8"},
    {"dataset": 5},
    {"dataset": ("pictures",)},
    {"flip": 1},
    {"flip": "yes"},
    {"conditional": 0.0},
    {"epochs": True},
    {"epochs": 2.0},
    {"epochs": "auto"},
    {"lr": "auto"},
    {"lr": True},
    {"lr": math.nan},
    {"dropout": "0"},
    {"min_snr": 1e39},
    {"seed": -1},
    {"seed": 10**400},
    {"batch_size": "auto"},
    {"micro_batch": "all"},
    {"micro_batch": 1.5},
    {"blocks": 1.0},
    {"multipliers": (1, 2.0)},
    {"mode": None},
    {"mode": "auto"},
    {"schedule": ("cosine",)},
    {"classes": ("cats", 5)},
    {"classes": "cats"},
    {"classes": ["cats", "dogs"]},
    {"device": 0},
    {"run_name": b"run"},
]
FACTS = {
    "a log row of text": change_row("loss", "0.5"),
    "a log row without loss": change_row("loss", None),
    "a loss of NaN": change_row("loss", math.nan),
    "a negative norm": change_row("grad_norm", -1.0),
    "a loss that is a tensor": change_row("loss", torch.ones(())),
    "a step of the log that is no whole number": change_row("step", 40.0),
    "a step of the log that is to come": change_row("step", 1000),
    "a step of the log that was before": change_row("step", 20),
    "no images": change_row("images", 0),
    "an epoch of 0": change_row("epoch", 0.0),
    "a short row": lambda state: state["log"][-1].pop(),
    "a row that is no list": lambda state: state["log"].append("x" * len(journal.COLUMNS)),
    "a log that is None": lambda state: state.update(log=None),
    "a log that is a dict": lambda state: state.update(log={}),
    "minutes of 1e300": lambda state: state.update(minutes=1e300),
    "minutes that are a tensor": lambda state: state.update(minutes=torch.ones(())),
    "minutes of True": lambda state: state.update(minutes=True),
    "a step of True": lambda state: state.update(step=True),
    "a step of 10**400": lambda state: state.update(step=10**400),
    "a step that is a tensor": lambda state: state.update(step=torch.tensor(40)),
    "a count of 0": lambda state: state.update(count=0),
    "a count of 10.0": lambda state: state.update(count=10.0),
    "data that is a number": lambda state: state.update(data=7),
    "data that is a tensor": lambda state: state.update(data=torch.ones(2)),
    "integer sums": lambda state: state.update(sums=state["sums"].long()),
    "complex sums": lambda state: state.update(sums=state["sums"].to(torch.complex64)),
    "sums that are a list": lambda state: state.update(sums=state["sums"].tolist()),
    "weights with a gradient": change_weight(lambda weight: weight.clone().requires_grad_()),
    "weights that are parameters": change_weight(torch.nn.Parameter),
    "weights of the opposite sign": change_weight(negative),
    "whole weights": change_weight(lambda weight: weight.long()),
    "weights of a network that are whole": change_weight(lambda weight: weight.char(), "network"),
    "complex weights": change_weight(lambda weight: weight.to(torch.complex64)),
    "sparse weights": change_weight(lambda weight: weight.to_sparse()),
    "weights of float64": change_weight(lambda weight: weight.double(), "average"),
    "a format of True": lambda state: state.update(format=True),
}


@pytest.mark.parametrize("words", [SAMPLE, TRAIN], ids=lambda words: words[0])
@pytest.mark.parametrize("changed", SETTINGS, ids=lambda changed: str(changed)[:40])
def test_a_setting_of_another_type_is_refused(run, state, words, changed):
    torch.save(state | {"settings": state["settings"] | changed}, CHECKPOINT)
    before = files_below(Path())
    line = refused(run(*words))
    assert re.search("models.run", line)
    assert "do not fit its settings" in line
    assert files_below(Path()) == before


@pytest.mark.parametrize("words", [SAMPLE, TRAIN], ids=lambda words: words[0])
@pytest.mark.parametrize("change", FACTS.values(), ids=FACTS)
def test_a_fact_or_a_tensor_of_another_type_is_refused(run, state, words, change):
    change(state)
    torch.save(state, CHECKPOINT)
    before = files_below(Path())
    assert re.search("models.run", refused(run(*words)))
    assert files_below(Path()) == before


@pytest.mark.parametrize("words", [["sample"], ["sample", "--run_name=other"]])
@pytest.mark.parametrize("change", FACTS.values(), ids=FACTS)
def test_no_strange_run_keeps_the_table_from_the_others(run, state, change, words):
    change(state)
    torch.save(state, CHECKPOINT)
    result = run(*words)
    assert (result.status, result.err.count("\n")) == (2, 1), result.err


def test_what_is_right_is_taken(run, state):
    """Without this, the tests above would prove nothing."""
    assert len(state["log"]) == 2
    torch.save(state, CHECKPOINT)
    assert run(*SAMPLE).status == 0
    assert run(*TRAIN[:-1], "--epochs=5").status == 0


# ---- what is not finite --------------------------------------------------------------------------


def spoil(value: float, *kinds: str):
    def change(state: dict) -> None:
        for kind in kinds:
            state[kind]["conv_in.weight"][0, 0, 0, 0] = value

    return change


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "words",
    [
        ("ddpm", *SAMPLE),
        ("ddpm", *TRAIN),
        ("ddpm", *TRAIN, "--run_name=new", "--init_from=run"),
        ("evaluate", "--run_name=run", "--n_img=16"),
        ("exchange", "export", "--run_name=run", "--to=model"),
        ("exchange", "publish", "--run_name=run", "--to=new"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_ema_weights_that_are_not_finite_are_refused_by_all(run_main, state, words, value):
    spoil(value, "average")(state)
    torch.save(state, CHECKPOINT)
    before = files_below(Path())
    mains = {"ddpm": ddpm.main, "evaluate": evaluate.main, "exchange": tools.exchange.main}
    flags = {word.partition("=")[0]: word for word in words[1:]}  # the last of two
    line = refused(run_main(mains[words[0]], *flags.values()))
    assert "infinite or NaN" in line
    assert "conv_in.weight" in line
    assert "65,504" not in line
    assert files_below(Path()) == before


@pytest.mark.parametrize("kind", ["network", "moments", "sums"])
def test_what_is_not_finite_is_not_trained_on(run, state, kind):
    tensors = {
        "network": state["network"]["conv_in.weight"],
        "moments": state["optimizer"]["state"][0]["exp_avg_sq"],
        "sums": state["sums"],
    }
    tensors[kind][(0,) * tensors[kind].ndim] = math.nan
    torch.save(state, CHECKPOINT)
    assert "infinite or NaN" in refused(run(*TRAIN))


def test_an_image_that_is_not_finite_is_not_written(run, here, monkeypatch):
    forward = ddpm.UNet.forward
    monkeypatch.setattr(ddpm.UNet, "forward", lambda *inputs: forward(*inputs) * math.nan)
    before = files_below(here)
    assert "infinite or NaN" in refused(run(*SAMPLE))
    assert "infinite or NaN" in refused(run(*SAMPLE, "--gif"))
    assert files_below(here) == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pixels_are_finite(value):
    images = torch.zeros(2, 3, 4, 4)
    images[1, 2, 3, 0] = value
    with pytest.raises(UserError, match="infinite or NaN"):
        utils.to_bytes(images)
