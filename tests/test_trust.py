"""What comes from strangers: checkpoints, models, names, the environment. One line, or harmless."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY, files_below, paint, refused, start
from torch import Tensor

import ddpm
import tools.exchange
import utils
from machinery import basics, command_line, devices, journal, processes
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
def state(here) -> dict:
    return torch.load(CHECKPOINT, weights_only=False)  # ours, and so loaded faster


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


# ---- models of diffusers -------------------------------------------------------------------------


@pytest.fixture
def model(exchange) -> Path:
    """An exported model whose unet_ema has other weights than its unet, and an EMAModel's keys."""
    assert exchange("export", "--run_name=run", "--to=model").status == 0
    shutil.copytree("model/unet", "model/unet_ema")
    config = json.loads(Path("model/unet/config.json").read_text())
    config |= {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "power": 2 / 3}
    config |= {"optimization_step": 9, "update_after_step": 0, "use_ema_warmup": False}
    Path("model/unet_ema/config.json").write_text(json.dumps(config))
    change_file(Path("model/unet_ema"), lambda weight: weight + 1)
    return Path("model")


def change_file(folder: Path, how) -> None:
    """Change the first convolution in a safetensors file."""
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["conv_in.weight"] = how(weights["conv_in.weight"]).contiguous()
    safetensors.torch.save_file(weights, path)


def test_of_two_networks_the_ema_weights_are_imported_and_it_says_so(exchange, model):
    result = exchange("import", "--source=model", "--run_name=new")
    assert result.status == 0, result.err
    assert "EMA weights, of unet_ema" in result.out
    own, new = (ddpm.load_run(name)["average"]["conv_in.weight"] for name in ("run", "new"))
    assert torch.allclose(new, own + 1)
    assert "DDPM paper is assumed" not in result.out


@pytest.mark.parametrize("folder, more", [("unet_ema", 1), ("unet", 0)])
def test_either_can_be_named(exchange, model, folder, more):
    assert exchange("import", f"--source=model/{folder}", "--run_name=new").status == 0
    own, new = (ddpm.load_run(name)["average"]["conv_in.weight"] for name in ("run", "new"))
    assert torch.allclose(new, own + more)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_weights_that_are_no_fractions_are_not_imported(exchange, model, kind):
    change_file(model / "unet_ema", lambda weight: weight.to(kind))
    line = refused(exchange("import", "--source=model", "--run_name=new"))
    assert f"conv_in.weight is of {kind}" in line
    assert not Path("models/new").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_weights_that_are_not_finite_are_not_imported(exchange, model, value):
    """1e300 is beyond float32."""
    change_file(
        model / "unet_ema", lambda weight: torch.full_like(weight, value, dtype=torch.double)
    )
    line = refused(exchange("import", "--source=model", "--run_name=new"))
    assert "conv_in.weight has values that are infinite or NaN" in line
    assert not Path("models/new").exists()


# ---- names in the terminal -----------------------------------------------------------------------

ESCAPE = "\x1b[31mred\x07\u202e"


def is_plain(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("caf\u00e9 \u65e5\u672c", "caf\u00e9 \u65e5\u672c"),
        ("a\nb", r"a\nb"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\udcff", r"\udcff"),
        ("\u202e", r"\u202e"),
        ("x" * 200, "x" * 200),
    ],
)
def test_what_is_told_is_printable(text, shown):
    assert basics.printable(text) == shown


def test_what_is_long_is_cut_in_the_middle():
    shown = basics.printable("a" * 5_000 + "z" * 5_000)
    assert len(shown) <= 210
    assert (shown[0], shown[-1]) == ("a", "z")


@pytest.mark.skipif(os.name == "nt", reason="no such names on Windows")
def test_names_of_files_folders_and_classes_do_not_command_the_terminal(run, place):
    folder = place / f"pictures{ESCAPE}\nline"
    for name in (f"a{ESCAPE}", "b\nb"):
        paint(folder / name)
    (folder / "b\nb" / f"broken{ESCAPE}.png").write_text("no picture")
    words = [word for word in TRAIN if not word.startswith("--dataset")]
    result = run(*words[:-1], "--epochs=1", f"--dataset={folder}")
    assert result.status == 0, result.err
    assert is_plain(result.out)
    assert r"\x1b[31mred" in result.out
    assert (
        sum(line.startswith(("data ", "network ", "length ")) for line in result.out.split("\n"))
        == 3
    )
    table = run("sample").out
    assert is_plain(table)
    assert is_plain(refused(run("train", f"--dataset=gone{ESCAPE}")))


@pytest.mark.skipif(os.name == "nt", reason="no such names on Windows")
def test_names_of_runs_do_not_command_the_terminal(run, here):
    Path("models/run").rename(f"models/run{ESCAPE}")
    result = run("sample")
    assert is_plain(result.out)
    assert r"run\x1b[31mred" in result.out
    assert is_plain(refused(run("sample", "--run_name=other")))


@pytest.mark.parametrize("text", ["x" * 10_000, "x y " * 2_500, "\x1b" * 10_000])
@pytest.mark.parametrize("flag", ["--epochs", "--dataset", "--run_name", "--sampler", "--x"])
def test_a_long_value_is_not_echoed_whole(run, flag, text):
    line = refused(run("train", f"{flag}={text}"))
    assert len(line) < 10_000 / 2
    assert is_plain(line)


# ---- the environment -----------------------------------------------------------------------------

WORLDS = [
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE= "),
    ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE=1.5"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1"),
    ({"WORLD_SIZE": "1" * 5000}, "WORLD_SIZE=1"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
    ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
    ({"RANK": "x"}, "RANK=x"),
    ({"RANK": "1"}, "RANK=1"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2"),
    ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE=two"),
]
FULL = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
FULL |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}


@pytest.mark.parametrize("words", [["sample"], ["train", "--help"]], ids=" ".join)
@pytest.mark.parametrize("world, named", WORLDS, ids=lambda each: str(each)[:50])
def test_a_world_that_cannot_be_is_refused(run, monkeypatch, words, world, named):
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    assert named in refused(run(*words))


@pytest.mark.parametrize("left_out", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", ""])
def test_half_a_world_is_not_torchruns(monkeypatch, left_out):
    for name, value in FULL.items():
        monkeypatch.setenv(name, value)
    if left_out:
        monkeypatch.delenv(left_out)
    with pytest.raises(UserError, match="not by torchrun"):
        processes.join(torch.device("cpu"))


@pytest.fixture(scope="module")
def optimized(tmp_path_factory) -> dict[str, str]:
    """The environment in which Python leaves out asserts and docstrings; it compiles once."""
    folder = str(tmp_path_factory.mktemp("bytecode"))
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": folder}
    return {"PYTHONOPTIMIZE": "2"} | compiled


@pytest.mark.parametrize("words", [["train", "--help"], []], ids=" ".join)
def test_help_survives_where_docstrings_are_left_out(place, optimized, words):
    texts = []
    for environment in ({"PYTHONOPTIMIZE": "0"}, optimized):
        process = start(*words, cwd=place, env=environment)
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        texts.append(out)
    assert texts[0] == texts[1]
    assert "run_name" in texts[0]


def test_it_trains_and_samples_where_asserts_and_docstrings_are_left_out(here, optimized):
    for words in ([*TRAIN[:-1], "--epochs=5"], SAMPLE):
        process = start(*words, cwd=here, env=optimized)
        _, err = process.communicate()
        assert process.returncode == 0, err


@pytest.mark.parametrize("flag", ["min_snr=1e39", "min_snr=inf", "seed=1e30"])
def test_numbers_beyond_their_type_are_out_of_range(run, here, flag):
    name = flag.partition("=")[0]
    assert f"--{name}=" in (line := refused(run(*TRAIN, f"--{flag}")))
    assert "is out of range, which is at most " in line


def test_the_largest_min_snr_is_trained_with(run, here):
    flags = [*TRAIN[:-1], "--epochs=1", "--min_snr=1e6"]
    assert run(*[flag.replace("=run", "=new") for flag in flags]).status == 0


def test_what_onednn_says_without_memory_is_no_memory():
    assert devices.is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not devices.is_out_of_memory(RuntimeError("could not find a primitive"))
    sizes = []

    def work(part: slice) -> None:
        sizes.append(part.stop - part.start)
        if sizes[-1] > 2:
            raise RuntimeError("could not create a primitive")

    devices.MicroBatches(range(8), "auto").run(work, reset=lambda: None)
    assert sizes == [8, 4, 2, 2, 2, 2]
