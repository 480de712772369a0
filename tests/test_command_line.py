"""The command line's manners: a line is understood whole, or refused with nothing done."""

import contextlib
import functools
import inspect
import io
import math
import re
import shlex
import shutil
import sys

import fire
import pytest
import torch
from conftest import TINY, files_below, paint, start
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ddpm
from machinery import checkpoints, command_line, devices, runs
from machinery.basics import UserError
from tools import evaluate

pytestmark = pytest.mark.quick

COMMANDS = {"train": ddpm.train, "sample": ddpm.sample}
FLAGS = [
    (name, flag, parameter)
    for name, command in COMMANDS.items()
    for flag, parameter in inspect.signature(command).parameters.items()
]


def settings_of(*words: str) -> dict:
    """What a command would be called with: the real signatures, with nothing behind them."""

    def echo(command):
        @functools.wraps(command)
        def tell(*values) -> dict:
            return dict(zip(inspect.signature(command).parameters, values, strict=True))

        return tell

    return command_line.plan(
        "ddpm.py",
        {name: echo(command) for name, command in COMMANDS.items()},
        list(words),
        runs.PRESETS,
    )()


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Four pictures, a run trained on them with 20 noising steps, an empty folder and a file.

    No test changes it.
    """
    house = tmp_path_factory.mktemp("house")
    paint(house / "pictures", count=4)
    (house / "empty").mkdir()
    (house / "a_file").touch()
    line = (
        "train",
        *TINY,
        "--dataset=pictures",
        "--run_name=tiny",
        "--noise_steps=20",
        "--epochs=1",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(house)
        ddpm.train(**settings_of(*line))
    # its cache: that a refused line begins another would not be seen
    shutil.rmtree(house / "datasets")
    return house


@pytest.fixture
def refused(house, run, monkeypatch):
    """Run a command line in the house, on a machine without GPUs, and insist on a refusal.

    Gives its one line.
    """
    monkeypatch.chdir(house)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    def refused_words(*words: str) -> str:
        before = files_below(house)
        result = run(*words)
        assert result.status == 2
        assert result.out == ""
        assert re.fullmatch(r"ddpm\.py: [^\n]+\n", result.err)
        assert files_below(house) == before
        return result.err

    return refused_words


# ---- what is refused -----------------------------------------------------------------------------

MISREAD = [  # a command line, and what the answer names
    # no such command or option
    ("trian", "'trian' is not a command; did you mean train?"),
    ("Train", "'Train'"),
    ("pop train", "'pop'"),
    ("clear", "'clear'"),
    ("''", "''"),
    ("--dataset=pictures", "'--dataset=pictures' is not a command"),
    ("train --epcohs=5", "--epcohs is not an option of train; did you mean --epochs?"),
    ("train --epcohs 5", "did you mean --epochs?"),
    ("train --img-sise=8", "did you mean --img_size?"),
    ("train --nodataset", "--nodataset"),
    ("train --noflip=yes", "--noflip"),
    ("train --n_img=3", "--n_img is not an option of train"),
    ("train --Epochs=3", "did you mean --epochs?"),
    ("train --zzz", "--zzz"),
    # names that other trainers and samplers have
    ("train --learning_rate=1e-3", "--learning_rate is not an option of train; did you mean --lr?"),
    ("train --learning-rate 1e-3", "did you mean --lr?"),
    ("train --num_train_epochs=3", "did you mean --epochs?"),
    ("train --resolution=8", "did you mean --img_size?"),
    ("train --image_size=8", "did you mean --img_size?"),
    ("train --train_batch_size=8", "did you mean --batch_size?"),
    ("train --output_dir=a", "did you mean --run_name?"),
    ("sample --output_dir=a", "did you mean --name?"),
    ("sample --num_samples=3", "did you mean --n_img?"),
    ("sample --num_inference_steps=3", "did you mean --steps?"),
    ("sample --guidance_scale=3", "did you mean --guidance?"),
    # letters that no option has
    (
        "train --größe=8",
        "--größe is not an option of train: 'ö' (LATIN SMALL LETTER O WITH DIAERESIS) is in no",
    ),
    ("train --épochs=8", "is in no option's name; did you mean --epochs?"),
    ("train --\u0435pochs=8", "(CYRILLIC SMALL LETTER IE) is in no option's name; did you mean"),
    ("train --lr\u200b=8", "(ZERO WIDTH SPACE) is in no option's name; did you mean --lr?"),
    ("train --übung", "--übung is not an option of train: 'ü'"),
    ("train \u2013epochs=8", "begins with a long dash; write two hyphens: --epochs=8"),
    ("train \u2014epochs 8", "begins with a long dash; write two hyphens: --epochs"),
    ("sample --epochs=3", "--epochs is not an option of sample"),
    ("sample --run_name=tiny --label=3", "--label"),
    ("sample --run_name=tiny --guidance=3", "--guidance"),
    # words that are no options
    ("train pictures", "'pictures'"),
    ("train --epochs=1 2", "'2'"),
    ("train sample", "'sample'"),
    ("train clear", "'clear'"),
    ("sample - pop x", "'-'"),
    ("train --run_name - pop x", "'pop'"),
    ("train -", "'-'"),
    ("train --", "'--'"),
    ("train -- --interactive", "'--'"),
    ("train --dataset=pictures -- --bogus", "'--'"),
    ("train -b 1", "'-b'"),
    ("train -epochs=1", "'-epochs=1'"),
    ("train ---epochs=1", "'---epochs=1'"),
    ("train --=1", "'--=1'"),
    ("train --1=2", "'--1=2'"),
    # given twice
    ("train --epochs=1 --epochs=2", "--epochs is given twice"),
    ("train --epochs 1 --epochs=2", "--epochs is given twice"),
    ("train --epochs 1 --epochs 1", "--epochs is given twice"),
    ("train --img-size=8 --img_size=8", "--img_size is given twice"),
    ("train --flip --noflip", "--flip is given twice"),
    # no value
    ("train --run_name", "--run_name needs a value"),
    ("train --epochs", "--epochs needs a value"),
    ("train --epochs --lr=1e-3", "--epochs needs a value"),
    ("train --epochs=", "--epochs="),
    ("train --lr ''", "--lr="),
    ("train --flip=", "--flip="),
    ("train --multipliers=", "--multipliers="),
    ("train --img_size=", "--img_size="),
    ("train --img_size=8 --width=16 --multipliers=1 --epochs=1 --dataset=", "--dataset="),
    ("train --dataset ''", "--dataset="),
    # the wrong type
    ("train --epochs=many", "--epochs=many is not a whole number"),
    ("train --epochs=5,000", "--epochs=5,000"),
    ("train --epochs=0x10", "--epochs=0x10"),
    ("train --epochs=1.5", "--epochs=1.5"),
    ("train --epochs=nan", "--epochs=nan"),
    ("train --epochs=inf", "--epochs=inf"),
    ("train --epochs=1e400", "--epochs=1e400"),
    ("train --epochs=True", "--epochs=True"),
    ("train --batch_size=auto", "--batch_size=auto"),
    ("train --lr=fast", "--lr=fast is not a number"),
    ("train --lr=1,5", "--lr=1,5"),
    ("train --flip=maybe", "--flip=maybe is not no, horizontal or both"),
    ("train --resume=2", "--resume=2"),
    ("train --flip stray", "--flip=stray"),
    ("train --multipliers=1,two", "--multipliers=1,two is not whole numbers"),
    ("train --multipliers=1,1.5", "--multipliers=1,1.5"),
    ("train --multipliers='1;2'", "--multipliers=1;2"),
    ("sample --run_name=tiny --batch_size=many", "--batch_size=many is not a whole number or auto"),
]

IMPOSSIBLE = [
    ("train --preset=laptob", "--preset=laptob is not one of: none, laptop, tiny"),
    # numbers
    ("train --lr=0", "--lr=0.0"),
    ("train --lr=-0.001", "--lr=-0.001"),
    ("train --lr -1e-3", "--lr=-0.001"),
    ("train --lr=nan", "--lr=nan"),
    ("train --lr=inf", "--lr=inf"),
    ("train --epochs=0", "--epochs=0"),
    ("train --epochs=-1", "--epochs=-1"),
    ("train --epochs -1", "--epochs=-1"),
    ("train --batch_size=0", "--batch_size=0"),
    ("train --dropout=1", "--dropout=1.0"),
    ("train --noise_steps=1", "--noise_steps=1"),
    ("train --seed -1", "--seed=-1"),
    ("sample --run_name=tiny --n_img=0", "--n_img=0"),
    ("sample --run_name=tiny --n_img=-1", "--n_img=-1"),
    ("sample --run_name=tiny --batch_size=0", "--batch_size=0"),
    ("sample --run_name=tiny --steps=0", "--steps=0"),
    ("sample --run_name=tiny --steps=21", "--steps=21 is more than the 20 noising steps"),
    ("sample --run_name=tiny --steps=1 --n_img=1e300", "--n_img=1000"),
    # so many that the number of steps leaves the range of a float
    (
        "train --dataset=pictures --img_size=8 --width=16 --multipliers=1 --batch_size=1"
        " --epochs=1.7e308",
        "--epochs=1",
    ),
    # the network
    ("train --width=6", "--width=6"),
    ("train --width=130", "--width=130"),
    ("train --multipliers=0", "--multipliers=0"),
    ("train --multipliers=-1", "--multipliers=-1"),
    ("train --multipliers=1,2,0", "--multipliers=1,2,0"),
    ("train --multipliers=65", "--multipliers=65"),
    ("train --multipliers=1,1,1,1,1,1,1,1,1,1,1,1,1", "--multipliers=1,1,1,1,1,1,1,1,1,1,1,1,1"),
    # sizes
    ("train --img_size=0", "--img_size=0"),
    ("train --img_size=-64", "--img_size=-64"),
    ("train --img_size=7", "--img_size=7"),
    ("train --img_size=65", "--img_size=65: 65 is not a multiple of 8"),
    ("train --img_size=64x", "--img_size=64x"),
    ("train --img_size=x64", "--img_size=x64"),
    ("train --img_size=64x63", "--img_size=64x63: 63 is not"),
    ("train --img_size=8x8x8", "--img_size=8x8x8"),
    ("train --img_size=1x2x3", "--img_size=1x2x3"),
    ("train --img_size=abc", "--img_size=abc"),
    ("train --img_size=2056", "--img_size=2056"),
    ("train --img_size=1e300", "--img_size=1000"),
    ("sample --run_name=tiny --steps=1 --img_size=7", "--img_size=7"),
    ("sample --run_name=tiny --steps=1 --img_size=0x8", "--img_size=0x8"),
    # devices
    ("train --device=meta", "--device=meta is not one of: auto, cpu"),
    ("train --device=cpu:3", "--device=cpu:3"),
    ("train --device=CPU", "--device=CPU"),
    ("train --device=", "--device="),
    (
        "train --device=cuda",
        "--device=cuda is not on this machine (0 CUDA devices); --device=cpu works everywhere",
    ),
    ("train --device=cuda:0", "--device=cuda:0 is not on this machine"),
    ("train --device=cuda:99", "--device=cuda:99 is not on this machine"),
    ("train --device=cuda:-1", "--device=cuda:-1"),
    ("train --device=mps", "--device=mps is not on this machine"),
    ("sample --run_name=tiny --steps=1 --device=cuda", "--device=cuda is not on this machine"),
    # folders and runs
    ("train --dataset=nowhere", "--dataset=nowhere does not exist"),
    ("train --dataset=pictures/nowhere", "nowhere does not exist"),
    ("train --dataset='no\nwhere'", "--dataset=no"),
    ("train --dataset=a_file", "--dataset=a_file is a file"),
    ("train --dataset=empty", "--dataset=empty holds no images"),
    ("train", "datasets"),
    ("train --resume=no --run_name=tiny --dataset=pictures", "models/tiny holds a run"),
    ("sample --run_name=other", "other is not a trained run; runs there are: tiny"),
]


@pytest.mark.parametrize("line, named", MISREAD + IMPOSSIBLE)
def test_what_cannot_be_done_is_refused_in_one_line_before_anything_is_written(
    line, named, refused
):
    assert named in refused(*shlex.split(line))


def beyond(parameter: inspect.Parameter, limit: dict | tuple) -> list:
    """Values just outside a limit, NaN among them where the type has one."""
    if isinstance(limit, dict) and parameter.annotation is int:
        return [min(limit) - 1, min(limit) + 1, max(limit) + 1]
    if isinstance(limit, dict):
        return ["nonsense", "", next(iter(limit)).upper()]
    if parameter.annotation is float:
        values = [limit[0] / 2 if limit[0] else -1e-9, limit[1] * 1.01, math.nan, -math.inf]
    else:
        values = [limit[0] - 1, limit[1] + 1]
    return [value for value in values if value != math.inf]


@pytest.mark.parametrize(
    "name, flag, value",
    [
        (name, flag, value)
        for name, flag, parameter in FLAGS
        if flag in ddpm.LIMITS
        for value in beyond(parameter, ddpm.LIMITS[flag])
    ],
)
def test_every_limit_is_kept(name, flag, value, refused):
    assert f"--{flag}={value} is " in refused(name, f"--{flag}={value}")


@pytest.mark.parametrize("flag", ddpm.LIMITS)
def test_every_limit_belongs_to_a_flag_and_includes_its_ends(flag):
    assert flag in {flag for _, flag, _ in FLAGS} | runs.IMPORTED.keys()
    for end in ddpm.LIMITS[flag]:
        command_line.check_limits({flag: end}, ddpm.LIMITS)


NO_NAMES = [
    ".",
    "..",
    "/abs",
    "a/b",
    "a\\b",
    "../tiny",
    "C:",
    "con",
    "NUL.txt",
    "Com1",
    "lpt9.x",
    "a.",
    ".hidden",
    "-a",
    "_a",
]
NO_NAMES += ["a b", "a\nb", "a\n", "\u00e9", "\u65e5\u672c", "a\u0661", "~", "$HOME", "a*"]


@pytest.mark.parametrize(
    "option", ["train --run_name", "sample --run_name", "sample --run_name=tiny --steps=1 --name"]
)
@pytest.mark.parametrize("name", [*NO_NAMES, pytest.param("x" * 300, id="300")])
def test_a_name_that_is_no_folder_of_its_own_is_refused(option, name, refused):
    """It would lead out of models/, hide, alias another run, or fail on another system."""
    flag = option.split()[-1]
    assert f"{flag}={name.splitlines()[0]}" in refused(*option.split()[:-1], f"{flag}={name}")


def test_a_name_that_is_empty_is_refused(refused):
    for line in (
        ["train", "--run_name="],
        ["train", "--run_name", ""],
        ["sample", "--run_name=tiny", "--name", ""],
    ):
        assert "name= is not a usable name" in refused(*line)


@pytest.mark.parametrize(
    "name", ["a", "7", "1.10", "my_run-2.b", "console", "nul_1", "com10", "x" * 64]
)
def test_an_ordinary_name_is_taken(name):
    command_line.check_name("run_name", name)


@pytest.mark.parametrize(
    "text", ["cuda:2", "cuda:01", "cuda:\u0661", "cuda:128", "cuda:200", "cuda:" + "9" * 20]
)
def test_only_a_gpu_there_is_can_be_picked(text, monkeypatch):
    """PyTorch's own reader wraps 200 round to -56.

    It answers leading zeros and huge numbers with a traceback.
    """
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=f"--device={text}"):
        devices.pick_device(text)


@pytest.mark.parametrize(
    "gpus, mps, text, device",
    [
        (2, False, "auto", "cuda"),
        (2, False, "cuda:1", "cuda:1"),
        (0, True, "auto", "mps"),
        (0, True, "mps", "mps"),
        (0, False, "auto", "cpu"),
        (2, True, "cpu", "cpu"),
    ],
)
def test_auto_is_the_first_device_there_is(gpus, mps, text, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(devices, "lacks_kernels", lambda text: "")
    assert devices.pick_device(text) == torch.device(device)


def test_larger_images_and_wider_networks_go_through_in_smaller_batches():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [devices.images_at_once(device, (64, 64), 64) for device in (cpu, gpu)] == [16, 256]
    assert [devices.images_at_once(gpu, (64, 64), width) for width in (16, 128, 256)] == [
        256,
        128,
        64,
    ]
    assert [
        devices.images_at_once(gpu, size, 64) for size in ((32, 32), (64, 128), (256, 256))
    ] == [256, 128, 16]
    assert devices.images_at_once(cpu, (1024, 1024), 512) == 1


def test_a_gpu_whose_driver_is_too_old_is_not_there(monkeypatch):
    """PyTorch counts it all the same."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.pick_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="--device=cuda is not on this machine"):
        devices.pick_device("cuda")


@given(st.integers(-5000, 1_000_000), st.integers(1, 12))
@settings(deadline=None)
def test_the_size_it_advises_is_possible_and_none_is_nearer(side, levels):
    multipliers = (1,) * levels
    possible = range(2 ** (levels - 1), 2049, 2 ** (levels - 1))
    if side in possible:
        return runs.check_size((side,), multipliers)
    with pytest.raises(UserError) as refusal:
        runs.check_size((side,), multipliers)
    nearest = int(re.search(r"the nearest is (-?\d+)$", str(refusal.value))[1])
    assert nearest in possible
    assert abs(nearest - side) == min(abs(other - side) for other in possible)


@pytest.mark.parametrize("known, others", command_line.OTHER_NAMES.items())
def test_other_names_are_of_flags_there_are_and_none_of_ours(known, others):
    """Of some command; and each leads to a flag that it is not spelt like."""
    commands = (ddpm.train, ddpm.sample, evaluate.evaluate)
    flags = {flag for command in commands for flag in inspect.signature(command).parameters}
    assert known in flags
    assert not flags & set(others.split())


# ---- what is understood --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, flag, value",
    [
        ("train --epochs=1e3", "epochs", 1000),
        ("train --epochs 3", "epochs", 3),
        ("train --epochs=2.0", "epochs", 2),
        ("train --seed -5", "seed", -5),
        ("train --seed=-5", "seed", -5),
        ("train --lr -1e-3", "lr", -1e-3),
        ("train --lr=3", "lr", 3.0),
        *[
            (f"train --resume={no}", "resume", False)
            for no in ("false", "False", "no", "NO", "0", "off")
        ],
        *[(f"train --resume={yes}", "resume", True) for yes in ("true", "TRUE", "yes", "1", "on")],
        ("train --resume no", "resume", False),
        ("train --noresume", "resume", False),
        ("train --noflip --epochs=3", "flip", "no"),
        ("sample --save_grid", "save_grid", True),
        ("sample --nosave_grid", "save_grid", False),
        ("sample --save-grid=no", "save_grid", False),
        ("train --flip --resume=no", "flip", "horizontal"),
        ("train --img_size=64", "img_size", (64,)),
        ("train --img-size=64", "img_size", (64,)),
        ("train --img-size 48x96", "img_size", (48, 96)),
        ("train --img_size=48X96", "img_size", (48, 96)),
        ("train --img_size=48\u00d796", "img_size", (48, 96)),
        ("train --img_size=48,96", "img_size", (48, 96)),
        ("train --multipliers='(1, 2, 4)'", "multipliers", (1, 2, 4)),
        ("train --multipliers=[1,2]", "multipliers", (1, 2)),
        ("train --multipliers=1,2,", "multipliers", (1, 2)),
        ("train --multipliers='(3,)'", "multipliers", (3,)),
        ("train --multipliers 1,2", "multipliers", (1, 2)),
        ("sample --batch_size=auto", "batch_size", "auto"),
        ("sample --batch_size=1e2", "batch_size", 100),
        ("train --run_name 2024", "run_name", "2024"),
        ("train --run_name help", "run_name", "help"),
        *[
            (f"train --run_name={text}", "run_name", text)
            for text in (
                "2024",
                "1e3",
                "True",
                "007",
                "None",
                "1.10",
                "(1,)",
                "data#1",
                "a=b",
                "--epochs",
                "-",
            )
        ],
    ],
)
def test_a_value_is_read_as_it_is_meant(line, flag, value):
    found = settings_of(*shlex.split(line))[flag]
    assert found == value
    assert type(found) is type(value)


@given(st.text())
@example("data#1")
@example("'quoted'")
@example("--dataset=x")
@example("a\nb")
@example("\udcff")
@settings(deadline=None)
def test_text_stays_exactly_as_typed(text):
    assert settings_of("sample", f"--label={text}")["label"] == text


@given(st.integers(-(10**300), 10**300))
@settings(deadline=None)
def test_no_digit_of_a_whole_number_is_lost(number):
    assert settings_of("train", f"--seed={number}")["seed"] == number


@given(st.floats(allow_nan=False))
@settings(deadline=None)
def test_no_digit_of_a_number_is_lost(number):
    assert settings_of("train", f"--lr={number!r}")["lr"] == number


@given(
    st.lists(st.integers(0, 10**6), min_size=1).map(tuple), st.sampled_from(["{}", "({})", "[{}]"])
)
@settings(deadline=None)
def test_whole_numbers_are_read_in_every_spelling(numbers, spelling):
    for between in (",", ", ", "x"):
        text = spelling.format(between.join(map(str, numbers)))
        assert settings_of("train", f"--multipliers={text}")["multipliers"] == numbers


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_not_said_is_the_default(name):
    defaults = {flag: parameter.default for command, flag, parameter in FLAGS if command == name}
    assert settings_of(name) == defaults


WORDS = st.text(max_size=12) | st.sampled_from(
    ["-", "--", "--help", "-b", "train", "sample", "auto", "1", "no"]
)
WORDS |= st.builds(
    "{}{}{}".format,
    st.sampled_from(["--", "--no", "-"]),
    st.sampled_from([f for _, f, _ in FLAGS]),
    WORDS,
)
WORDS |= st.builds(
    "--{}={}".format, st.sampled_from([f for _, f, _ in FLAGS]), WORDS | st.floats().map(repr)
)


@given(st.sampled_from(["train", "sample"]), st.lists(WORDS))
@settings(deadline=None, max_examples=500)
def test_any_line_is_understood_or_refused(name, words):
    with contextlib.suppress(UserError):
        assert (
            settings_of(name, *words).keys() == inspect.signature(COMMANDS[name]).parameters.keys()
        )


@given(st.lists(st.text(), min_size=1))
@settings(deadline=None)
def test_any_words_are_understood_or_refused(words):
    with contextlib.suppress(UserError):
        settings_of(*words)


def test_planning_runs_nothing():
    calls = []

    def command(number: int = 0) -> None:
        """Remember the call."""
        calls.append(number)

    planned = command_line.plan("program", {"do": command}, ["do", "--number=3"])
    assert calls == []
    planned()
    assert calls == [3]


def test_a_training_and_a_sampling_do_as_they_are_told(run, place):
    """What the plan understood is what happens.

    Odd names, both spellings, and a space for an equals sign.
    """
    paint(place / "data#1", count=4)
    result = run(
        "train",
        *TINY,
        "--dataset",
        "data#1",
        "--run_name=1.10",
        "--epochs=1e0",
        "--noflip",
        "--noise-steps=9",
    )
    assert (result.status, result.err) == (0, "")
    stored = checkpoints.load("1.10")["settings"]
    assert stored["dataset"] == "data#1"
    assert stored["flip"] == "no"
    assert (stored["epochs"], stored["noise_steps"], stored["img_size"]) == (1, 9, (8, 8))

    result = run(
        "sample", "--run_name=1.10", "--n-img", "2", "--steps=3", "--save_grid=no", "--device=cpu"
    )
    assert (result.status, result.err) == (0, "")
    names = {"sample_0001.png", "sample_0002.png"}
    assert files_below(place / "results" / "1.10" / "samples") == names


# ---- help ----------------------------------------------------------------------------------------


def spoken(run, *words: str) -> str:
    """The help that a command line asks for."""
    result = run(*words)
    assert (result.status, result.err) == (0, "")
    return result.out


HELP = [
    "",
    "--help",
    "-h",
    "help",
    "train --help",
    "train -h",
    "help sample",
    "sample --help",
    "--help train",
]
HELP += [
    "train --epochs=1 --help",
    "train --epcohs=5 --help",
    "train --epochs --help",
    "train stray --help",
]
HELP += ["train -- --help", "nothing --help", "sample --run_name=tiny --help --n_img=2"]


@pytest.mark.parametrize("line", HELP)
def test_help_wins_and_does_nothing_else(line, run, house, monkeypatch):
    """On a terminal Fire's own help would open a pager.

    A mistake in the line is a reason to read help.
    """
    monkeypatch.chdir(house)
    monkeypatch.setattr(fire, "Fire", lambda *_: pytest.fail("Fire was asked"))
    before = files_below(house)
    text = spoken(run, *line.split())
    assert text.startswith("usage: python ddpm.py ")
    assert max(map(len, text.splitlines())) <= 80
    assert files_below(house) == before


@pytest.mark.parametrize(
    "name, flag, parameter", FLAGS, ids=[f"{name}-{flag}" for name, flag, _ in FLAGS]
)
def test_help_tells_every_flag_its_default_its_limit_and_a_sentence(name, flag, parameter, run):
    entry = re.search(
        rf"^  --{flag}=(.*?)    \((.+)\)\n((?:      \S.*\n)+)",
        spoken(run, name, "--help"),
        re.MULTILINE,
    )
    default, kind, sentence = entry.groups()
    assert settings_of(name, f"--{flag}={default}")[flag] == parameter.default
    assert sentence.split()[-1].endswith(".")
    limit = ddpm.LIMITS.get(flag, ())
    words = limit if isinstance(limit, dict) else (f"{end:g}" for end in limit if end < 10**9)
    assert all(str(word) in kind for word in words)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_docstring_explains_exactly_the_flags_there_are(name):
    arguments = inspect.getdoc(COMMANDS[name]).split("\nArgs:\n")[1].split("\n\n")[0]
    explained = re.findall(r"^    (\w+): \S.*", arguments, re.MULTILINE)
    assert explained == list(inspect.signature(COMMANDS[name]).parameters)


def test_without_a_word_it_lists_the_commands_and_two_examples(run):
    text = spoken(run)
    for name, command in COMMANDS.items():
        assert re.search(
            rf"^  {name} +{re.escape(inspect.getdoc(command).splitlines()[0])}$", text, re.MULTILINE
        )
    assert len(re.findall("^  python ddpm.py (train|sample) --", text, re.MULTILINE)) == 2


@pytest.mark.parametrize("line", ["", "train --help", "sample --help", None])
def test_the_examples_can_be_typed(line, run):
    text = ddpm.__doc__ if line is None else spoken(run, *line.split())
    examples = re.findall(r"^ +python ddpm\.py ((?:train|sample) .*)$", text, re.MULTILINE)
    assert examples
    for words in map(shlex.split, examples):
        assert settings_of(*words)


# ---- how it ends ---------------------------------------------------------------------------------


def end_with(monkeypatch, command, *words: str) -> int:
    """The exit status of a program with one command, `do`, called as `do WORDS...`."""
    monkeypatch.setattr(sys, "argv", ["program", "do", *words])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # it wraps both streams; this puts them back
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    try:
        command_line.run_command_line("program", {"do": command}, {})
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("--x=1 is odd"), 2, "--x=1 is odd"),
        (UserError("--x=1\n2 is odd"), 2, "--x=1 2 is odd"),
        (
            OSError(28, "No space left on device", "models/x"),
            2,
            "models/x: No space left on device",
        ),
        (OSError("full"), 2, "disk: full"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
    ids=repr,
)
def test_an_expected_end_is_one_line_and_a_status(error, status, line, monkeypatch, capsys):
    def command() -> None:
        raise error

    assert end_with(monkeypatch, command) == status
    assert capsys.readouterr() == ("", f"program: {line}\n")


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        end_with(monkeypatch, command)


@pytest.mark.parametrize("text", ["caf\u00e9", "\u65e5\u672c", "\udcff"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "cp1252"])
def test_a_name_that_a_stream_cannot_write_stops_nothing(text, encoding, monkeypatch):
    """A pipe on Windows is not UTF-8, and a file's name on Linux need not be text at all."""
    done = []

    def command() -> None:
        print(f"reading {text}")
        print(f"reading {text}", file=sys.stderr)
        done.append(True)

    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding, errors="strict"))
    assert end_with(monkeypatch, command) == 0
    assert done


def test_the_program_itself_refuses_in_one_line(place):
    process = start("train", "--epcohs=5", cwd=place)
    out, err = process.communicate()
    assert process.returncode == 2
    assert (out, err) == (
        "",
        "ddpm.py: --epcohs is not an option of train; did you mean --epochs?\n",
    )
    assert files_below(place) == set()


@pytest.mark.parametrize("preset", runs.PRESETS)
def test_a_preset_stands_for_its_flags_and_one_beside_it_wins(preset):
    defaults = settings_of("train")
    chosen = settings_of("train", f"--preset={preset}")
    assert chosen == defaults | runs.PRESETS[preset] | {"preset": preset}
    for words in ([f"--preset={preset}", "--width=64"], ["--width=64", f"--preset={preset}"]):
        assert settings_of("train", *words) == chosen | {"width": 64}  # the default, but given


def test_the_help_lists_the_flags_of_every_preset(capsys):
    assert command_line.try_command("ddpm.py", COMMANDS, ddpm.LIMITS, ["train", "--help"])[1] == 0
    text = " ".join(capsys.readouterr().out.split())
    for preset, flags in runs.PRESETS.items():
        assert f"{preset}: {command_line.in_flags(flags)}" in text
