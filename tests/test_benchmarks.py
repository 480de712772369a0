"""The benchmarks: like is compared with like, figures are right, files can be read."""

import contextlib
import csv
import functools
import inspect
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, paint
from torch import Tensor, nn

import ddpm
import utils
from benchmarks import (
    levers,
    measuring,
    peers,
    quality,
    quality_peers,
    sample_speed,
    samplers,
    train_speed,
)
from benchmarks.measuring import Timing
from machinery import command_line, journal, runs
from machinery.basics import UserError
from modules import UNet
from tools.evaluate import Features

TINY = {"img_size": 8, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention_size": 4}
CPU = torch.device("cpu")


@pytest.fixture
def installed(monkeypatch):
    """Pretend that of the peers only the named ones are installed."""

    def install(*modules: str) -> None:
        for missing in peers.PIP_NAMES.keys() - set(modules):
            monkeypatch.setitem(sys.modules, missing, None)

    return install


@pytest.fixture
def hurried(monkeypatch):
    """One call a turn, in fp32: what a variant does is looked at, not how fast it is."""
    monkeypatch.setattr(measuring, "TURN_SECONDS", 1e-9)
    monkeypatch.setattr(measuring, "WARM_UP", 1)
    monkeypatch.setattr(measuring, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(measuring, "peak_shape", lambda device, small: (1, 4, 8))


def run(program: str, command, words: list[str], monkeypatch) -> tuple[int, str, str]:
    """The status, the output and the errors of `python -m PROGRAM WORDS...`."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", [program, *words])
    monkeypatch.setattr(command_line, "steady_streams", lambda: None)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command_line.run_command_line(
                f"-m {program}", {command.__name__: command}, measuring.LIMITS
            )
            status = 0
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


# ---- like with like ------------------------------------------------------------------------------


def test_diffusers_network_has_our_weights_our_answer_and_our_operations():
    network = peers.our_network(TINY)
    twin = peers.diffusers_twin(network, TINY)
    ours, theirs = network.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 999])
    with torch.no_grad():
        answer = network(x, t)
        # float32, and attention in another order
        assert (answer - twin(x, t - 1).sample).abs().max() < 1e-4
    assert answer.std() > 0.1, "an answer of 0 would equal any other"
    # upsampling, of 32 channels to 8x8: 4 products for each weight's worth of 9
    spared = 2 * 32 * 32 * 8 * 8 * (9 - 4)
    for training in (False, True):
        counts = [measuring.count_flop(each, 8, training) for each in (network, twin)]
        assert counts[1] - counts[0] == (3 if training else 1) * spared


def test_another_network_is_not_taken_for_ours():
    network = peers.our_network(TINY)
    twin = peers.diffusers_twin(network, TINY)
    nn.init.normal_(twin.up_blocks[0].resnets[0].conv1.weight)
    with pytest.raises(AssertionError, match="not ours"):
        peers.check_same_answer(network, twin, TINY["img_size"])


def test_reference_network_is_the_default_of_the_command_line():
    defaults = {
        name: value.default for name, value in inspect.signature(ddpm.train).parameters.items()
    }
    assert {name: defaults[name] for name in peers.REFERENCE} == peers.REFERENCE | {
        "img_size": (64,)
    }


def test_ours_and_diffusers_make_the_same_image_in_one_step():
    """More steps may differ: diffusers' pipeline does not correct the noise where x_0 is clipped.

    We correct it to fit.
    """
    network, x = peers.our_network(TINY), torch.randn(2, 3, 8, 8)
    ours = peers.sample_ours(network, "fp32", x, 1)()
    theirs = peers.sample_diffusers(peers.diffusers_twin(network, TINY), "fp32", x, 1)()
    # float32, divided by the signal left at T, which is 0.006
    assert (ours - theirs).abs().max() < 1e-2


@pytest.mark.parametrize("project", ["ours", "diffusers"])
def test_training_step_moves_the_weights_of_its_own_copy_alone(project, monkeypatch):
    network = peers.our_network(TINY)
    network = peers.diffusers_twin(network, TINY) if project == "diffusers" else network
    before = [parameter.detach().clone() for parameter in network.parameters()]
    made, deepcopy = [], peers.copy.deepcopy
    monkeypatch.setattr(
        peers.copy, "deepcopy", lambda thing: made.append(deepcopy(thing)) or made[-1]
    )
    step = peers.TRAINING[project](network, "fp32", torch.rand(2, 3, 8, 8) * 2 - 1)
    step()
    step()  # the first one of diffusers' warm-up has learning rate 0
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(before, made[0].parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)  # not the bias of attention's keys, which changes nothing
    assert all(parameter.grad is None for parameter in made[0].parameters())


@pytest.mark.parametrize("project", ["ours", "diffusers"])
def test_walk_asks_the_network_once_per_step(project):
    network = peers.our_network(TINY)
    network = peers.diffusers_twin(network, TINY) if project == "diffusers" else network
    asked = []
    network.register_forward_hook(lambda *_: asked.append(1))  # copies of the network have it, too
    images = peers.SAMPLING[project](network, "fp32", torch.randn(2, 3, 8, 8), 5)()
    assert images.shape == (2, 3, 8, 8)
    assert len(asked) == 5


# ---- figures -------------------------------------------------------------------------------------


def test_rates_and_milliseconds_of_known_seconds():
    timing = Timing([2.0, 0.5, 1.0], None)
    assert measuring.rates(timing, 8) == (8, 4, 16)
    assert measuring.milliseconds(timing, 10) == (100, 50, 200)


def test_gain_compares_the_turns_of_one_round():
    """The machine slows down fourfold meanwhile; the lever's gain is 2 in every round."""
    assert measuring.gains(Timing([1.0, 2.0, 4.0], None), Timing([0.5, 1.0, 2.0], None)) == (
        2,
        2,
        2,
    )


def test_gain_of_a_larger_batch_is_per_image(monkeypatch):
    """Four images in twice the time of one: twice as fast."""
    timings = {"without": Timing([0.5], None), "with": Timing([1.0], None)}
    monkeypatch.setattr(measuring, "take_turns", lambda *_: timings)
    row = levers.measure(levers.Lever("a larger batch", "fp32", (1, 4), None, None), 1, CPU)
    assert (row["without"], row["with"], row["gain"], row["batch_size"]) == (2, 4, 2, 4)


def test_share_of_the_peak_is_of_the_better_format_in_its_best_round():
    """On a CPU the convolution has 2 * 16 * 64^2 * 256^2 * 9 operations."""
    flop = 2 * 16 * 64 * 64 * 256 * 256 * 9
    timings = {"fp32 NCHW": Timing([4.0, 0.5], None), "fp32 NHWC": Timing([2.0, 1.0], None)}
    timings |= {"bf16 NCHW": Timing([0.25], None)}
    assert measuring.peaks_of(timings, CPU, small=False) == {"fp32": 2 * flop, "bf16": 4 * flop}
    assert measuring.share_of_peak(flop=3e9, per_second=50, peak=600e9) == 0.25


def test_operations_of_one_convolution_are_counted():
    """3 to 5 channels, 3x3, 8x8 pixels.

    The backward has as many for the weights, and none for the image.
    """

    class Answer(nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    network = Answer(3, 5, 3, padding=1)
    forward = 2 * 8 * 8 * 3 * 5 * 9
    assert measuring.count_flop(network, 8, training=False) == forward
    assert measuring.count_flop(network, 8, training=True) == 2 * forward


def test_variants_take_turns_and_every_second_round_goes_backwards(hurried):
    calls = []
    builders = {name: lambda name=name: lambda: calls.append(name) for name in "abc"}
    timings = measuring.take_turns(builders, rounds=3, device=CPU)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"  # the first are the warm-up
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3, 3]


def test_a_turn_is_as_many_calls_as_fill_its_time_and_a_call_is_what_is_told(monkeypatch):
    """A clock that moves 0.25 s a call: half a second is two calls."""
    now, calls = [0.0], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def call() -> None:
        calls.append(1)
        now[0] += 0.25

    timings = measuring.take_turns({"it": lambda: call}, rounds=2, device=CPU)
    assert timings["it"].seconds == [0.25, 0.25]
    assert len(calls) == measuring.WARM_UP + 2 * 2


def test_overhead_is_told_against_the_bare_step_before_and_after():
    rows = [
        {"variant": "ours, fp32", "img_per_s": 90.0},
        {"variant": "ours, bf16", "img_per_s": 200.0},
    ]
    rows += [{"variant": "ours, bf16, again", "img_per_s": 220.0}]
    rows += [{"variant": "ours, bf16, ddpm.train", "img_per_s": 189.0}]
    assert "10.0% slower" in train_speed.overhead(rows)
    assert "+10.0%" in train_speed.overhead(rows)


# ---- tables and files ----------------------------------------------------------------------------


def test_table_lines_up_and_shows_what_is_not_known_as_a_dash():
    rows = [
        {"who": "ours", "speed": 12.345, "memory": None},
        {"who": "theirs", "speed": 1.0, "memory": 0.5},
    ]
    shown = {"who": ("who", ""), "speed": ("img/s", ".1f"), "memory": ("GB", ".2f")}
    lines = measuring.table(rows, shown).splitlines()
    assert lines == ["who     img/s    GB", "-" * 19, "ours     12.3     -", "theirs    1.0  0.50"]


def test_file_keeps_what_was_measured_before_and_can_be_read(place):
    path, columns = place / "results" / "speed.csv", ("name", "speed", "memory")
    command_line.check_table(path, columns)
    for speed in (1.5, 1 / 3):
        measuring.add_rows(path, [{"name": "ours, fp32", "speed": speed, "memory": None}], columns)
    command_line.check_table(path, columns)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["speed"]) for row in rows] == [1.5, 0.333333]
    assert rows[0] == {"name": "ours, fp32", "speed": "1.5", "memory": ""}
    with pytest.raises(UserError, match="other columns"):
        command_line.check_table(path, ("name", "speed"))


@pytest.mark.parametrize("benchmark", ["train_speed", "sample_speed", "levers"])
def test_whole_benchmark_prints_a_table_and_writes_its_figures(
    benchmark, place, hurried, installed, monkeypatch
):
    installed("diffusers")
    monkeypatch.setattr(peers, "SMALL", TINY)
    monkeypatch.setattr(sample_speed, "BATCH_SIZES", (2, 1))
    monkeypatch.setattr(train_speed, "end_to_end", lambda *_: measuring.Spread(1.0, 0.5, 2.0))
    command = {"train_speed": train_speed.train_speed, "sample_speed": sample_speed.sample_speed}
    command = (command | {"levers": levers.levers})[benchmark]
    status, out, err = run(
        f"benchmarks.{benchmark}", command, ["--quick", "--rounds=2", "--device=cpu"], monkeypatch
    )
    assert status == 0, err
    assert "left out: bf16" in out
    with open(measuring.RESULTS / f"{benchmark}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = out[out.index("---") :]
    assert all(row["variant"] in table and row["torch"] == torch.__version__ for row in rows)
    assert max(map(len, out.splitlines())) <= 120
    if benchmark != "levers":
        assert {row["variant"] for row in rows} >= {"ours, fp32", "diffusers, fp32"}
        assert all(row["ratio"] == "1" for row in rows if row["variant"] == "diffusers, fp32")
        peer = "denoising-diffusion-pytorch"
        assert f"{peer} is not installed here; pip install {peer}" in out
        for row in rows:  # share * peak = operations per image * images per second
            per_second = float(row.get("img_per_s") or 1000 / float(row.get("ms") or 1))
            reached = float(row["share_of_peak"]) * float(row["peak_tflop_per_s"]) * 1000
            # six digits are kept
            assert reached == pytest.approx(float(row["gflop_per_img"]) * per_second, rel=1e-4)


def test_end_to_end_is_what_training_logs_after_its_first_row(place, monkeypatch):
    """Stands in for `ddpm.train`: a log of known speeds.

    It is checked for the pictures, steps and settings that were asked for.
    """

    def train(dataset: str, run_name: str, **settings) -> None:
        told.update(settings, pictures=len(list(Path(dataset).iterdir())))
        log = Path("results", run_name, "log.csv")
        log.parent.mkdir(parents=True)
        log.write_text("step,img_per_s\n20,1\n40,30\n60,10\n80,20\n100,1000\n")

    told = {}
    monkeypatch.setattr(ddpm, "train", train)
    assert train_speed.end_to_end(TINY, batch_size=2, rows=3, device=CPU) == (20, 10, 30)
    assert told["epochs"] * told["pictures"] / told["batch_size"] >= 4 * journal.ROW_EVERY
    assert told["device"] == "cpu"
    assert list(place.iterdir()) == [], "nothing is left behind"


def test_end_to_end_goes_through_training_itself(place):
    """Fails if `ddpm.train` no longer has the settings or the log that are made use of."""
    assert train_speed.end_to_end(TINY, batch_size=1, rows=1, device=CPU).median > 0


# ---- peers and flags -----------------------------------------------------------------------------


@pytest.mark.parametrize("missing", sorted(peers.PIP_NAMES))
def test_missing_peer_is_left_out_and_named_with_its_pip_command(missing, installed, capsys):
    installed()
    assert list(peers.all_networks(TINY)) == ["ours"]
    assert f"pip install {peers.PIP_NAMES[missing]}\n" in capsys.readouterr().out


def test_compiled_variants_are_there_when_asked_for_alone():
    networks = {"ours": nn.Identity(), "diffusers": nn.Identity(), "lucidrains": nn.Identity()}
    plain = peers.variants(networks, peers.SAMPLING, (), ["fp32", "bf16"], compiled=False)
    compiled = peers.variants(networks, peers.SAMPLING, (), ["fp32", "bf16"], compiled=True)
    assert len(plain) == 6
    assert compiled.keys() - plain.keys() == {"ours, bf16, compiled", "diffusers, bf16, compiled"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rouns=3"], "did you mean --rounds?"),
        (["--rounds=0"], "--rounds=0 is out of range, which is 1 to 1000"),
        (["--device=gpu"], "--device=gpu is not one of: auto, cpu, cuda, cuda:N, mps, xpu, xpu:N"),
        (["quick"], "'quick' is not an option"),
    ],
)
@pytest.mark.parametrize(
    "command", [train_speed.train_speed, sample_speed.sample_speed, levers.levers]
)
def test_wrong_flag_ends_in_one_line(command, words, message, place, monkeypatch):
    status, out, err = run(f"benchmarks.{command.__name__}", command, words, monkeypatch)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "command", [train_speed.train_speed, sample_speed.sample_speed, levers.levers]
)
def test_help_names_the_command_to_type_and_every_flag(command, monkeypatch):
    program = f"benchmarks.{command.__name__}"
    status, out, _ = run(program, command, ["--help"], monkeypatch)
    assert status == 0
    assert out.startswith(f"usage: python -m {program} [--option=value ...]")
    assert "--rounds=auto" in out


# ---- quality -------------------------------------------------------------------------------------


def pixels(device: torch.device) -> Features:
    """Stands in for a network that looks at pictures."""
    return Features("FD (pixels)", "1", lambda images: images.float().flatten(1))


@pytest.fixture
def small_experiment(place, monkeypatch):
    """Two variants of the tiny network, judged by their pixels."""

    shape = {name: (value,) if name == "img_size" else value for name, value in TINY.items()}
    variants = {"slow": {"lr": 1e-5}, "fast": {"lr": 1e-3}}
    monkeypatch.setattr(quality, "BASE", shape | {"batch_size": 4, "noise_steps": 30})
    monkeypatch.setitem(quality.EXPERIMENTS, "rate", variants)
    monkeypatch.setattr(quality.evaluate, "load_efficientnet", pixels)
    paint(place / "pictures", count=40)
    paint(place / "unseen", count=40, first_seed=1000)


def judged() -> list[dict]:
    with open("results/benchmarks/quality.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_variant_and_seed_is_trained_and_judged_once(small_experiment, monkeypatch):
    words = [
        "--experiment=rate",
        "--images=80",
        "--seeds=2",
        "--dataset=pictures",
        "--held_out=unseen",
        "--device=cpu",
    ]
    status, _, err = run("benchmarks.quality", quality.quality, words[:2] + words[3:], monkeypatch)
    assert status == 0, err
    assert [(row["variant"], row["seed"]) for row in judged()] == [("slow", "0"), ("fast", "0")]
    first = {path: path.stat().st_mtime_ns for path in Path("models").glob("*/checkpoint.pt")}
    status, out, _ = run("benchmarks.quality", quality.quality, words, monkeypatch)
    assert status == 0
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    rows = judged()
    assert [row["variant"] + row["seed"] for row in rows] == ["slow0", "fast0", "slow1", "fast1"]
    assert {row["images"] for row in rows} == {"80"}
    assert len(list(Path("models").iterdir())) == 4
    # another data set is another experiment
    words = [*words[:2], "--seeds=1", "--dataset=unseen", "--held_out=pictures", "--device=cpu"]
    assert run("benchmarks.quality", quality.quality, words, monkeypatch)[0] == 0
    assert [row["dataset"] for row in judged()] == ["pictures"] * 4 + ["unseen"] * 2
    assert len(list(Path("models").iterdir())) == 6
    for variant in ("slow", "fast"):
        mean = sum(float(row["distance"]) for row in rows if row["variant"] == variant) / 2
        assert f"{variant:7}" in out
        assert f"{mean:.3f}" in out


def test_what_changes_nothing_is_trained_once_for_all_experiments(small_experiment, monkeypatch):
    monkeypatch.setitem(
        quality.EXPERIMENTS, "rate", {"slow": {"lr": 1e-5}, "as always": {"batch_size": 4}}
    )
    monkeypatch.setitem(
        quality.EXPERIMENTS, "average", {"as ever": {}, "short": {"ema_decay": 0.5}}
    )
    words = ["--images=40", "--dataset=pictures", "--held_out=unseen", "--device=cpu"]
    for experiment in ("rate", "average"):
        status, out, err = run(
            "benchmarks.quality",
            quality.quality,
            [*words, f"--experiment={experiment}"],
            monkeypatch,
        )
        assert status == 0, err
    assert [(row["experiment"], row["variant"]) for row in judged()] == [
        ("rate", "slow"),
        ("rate", "base"),
        ("average", "short"),
    ]
    assert [line.split()[0] for line in out.splitlines()[-2:]] in (
        ["base", "short"],
        ["short", "base"],
    )


def test_no_two_experiments_call_different_settings_by_one_name():
    named = [
        item
        for experiment in quality.EXPERIMENTS
        for item in quality.variants_of(experiment).items()
    ]
    settings = {}
    for name, changed in named:
        assert settings.setdefault(name, quality.BASE | changed) == quality.BASE | changed


def test_networks_of_another_shape_take_as_many_operations():
    def flop(changed: dict) -> float:
        settings = quality.BASE | changed
        shape = {name: settings[name] for name in ddpm.NETWORK if name in settings} | {
            "img_size": 32
        }
        return measuring.count_flop(UNet(**shape), 32, training=False)

    base, *others = map(flop, quality.EXPERIMENTS["shape"].values())
    assert others
    for other in others:
        assert other == pytest.approx(base, rel=0.06)


def test_every_variant_is_a_training_that_can_be(place):
    """All settings are options of train, in their limits, for a network that there can be."""
    names = inspect.signature(ddpm.train).parameters.keys()
    for experiment in quality.EXPERIMENTS.values():
        assert len({tuple(changed.items()) for changed in experiment.values()}) == len(experiment)
        for changed in experiment.values():
            settings = quality.BASE | changed
            assert settings.keys() <= names
            command_line.check_limits(settings, ddpm.LIMITS)
            runs.check_network({"blocks": 2} | settings)


# ---- quality, against the peers ------------------------------------------------------------------

SIDE = 32  # diffusers' six levels need it


@pytest.fixture
def small_peers(monkeypatch):
    """Their networks as small as may be, sampled in three steps.

    Gives the trainer of a project that is installed.
    """
    small = {"layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 8}
    for layers, widths in (
        (quality_peers.DIFFUSERS, (8,) * 6),
        (quality_peers.OUR_LAYERS, (8,) * 3),
    ):
        for name, value in (small | {"block_out_channels": widths}).items():
            monkeypatch.setitem(layers, name, value)
    for layers in (quality_peers.LUCIDRAINS, quality_peers.DIM_32):
        small = {"dim": 8, "dim_mults": (1, 1, 1), "attn_heads": 1, "attn_dim_head": 8}
        for name, value in small.items():
            monkeypatch.setitem(layers, name, value)
    monkeypatch.setattr(quality_peers, "PEER_STEPS", 3)

    def trainer(project: str):
        module, train, layers = quality_peers.PEERS[project]
        pytest.importorskip(module)
        return functools.partial(train, layers=layers)

    return trainer


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when a batch is drawn, by `clock.tick` seconds."""
    hands = SimpleNamespace(now=0.0, tick=1.0, drawn=0)
    draw = quality_peers.Task.batches

    def batches(task, batch_size):
        for batch in draw(task, batch_size):
            hands.now, hands.drawn = hands.now + hands.tick, hands.drawn + 1
            yield batch

    monkeypatch.setattr(quality_peers.Task, "batches", batches)
    monkeypatch.setattr(quality_peers, "time", SimpleNamespace(monotonic=lambda: hands.now))
    return hands


def task(
    place: Path, images: np.ndarray | None = None, minutes: float = 0.25
) -> quality_peers.Task:
    """A quarter of a minute, of noisy pictures if no others are given."""
    paint(place / "pictures", count=100)  # as many as lucidrains' Trainer asks for
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (100, 3, SIDE, SIDE), dtype=np.uint8)
    measuring.RESULTS.mkdir(parents=True, exist_ok=True)
    return quality_peers.Task("pictures", images, minutes, 0, CPU)


@pytest.mark.parametrize(("seconds", "steps"), [(1.0, 60), (7.0, 9), (100.0, 1)])
def test_training_ends_with_the_first_step_that_passes_its_minutes(seconds, steps, monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr(quality_peers, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def step(done: float) -> None:
        told.append(done)
        now[0] += seconds

    assert quality_peers.train_by_clock(step, minutes=1) == (steps, steps * seconds)
    assert told == [number * seconds / 60 for number in range(steps)]


def test_first_step_does_not_count_for_how_many_fit(monkeypatch):
    now, durations = [0.0], iter((20.0, 0.5, 1.0))
    monkeypatch.setattr(quality_peers, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def step(done: float) -> None:
        now[0] += next(durations)

    assert quality_peers.steps_that_fit(step, minutes=1) == 80


@pytest.mark.parametrize(("project", "tried"), [("diffusers", 3), ("lucidrains", 0)])
def test_peer_is_shown_a_batch_a_step_for_its_minutes_and_tries_are_not_counted(
    project, tried, small_peers, clock, place
):
    learned = small_peers(project)("fp32", task(place))
    assert learned.images == 15 * 16
    assert (learned.prepared_s, learned.trained_s) == (tried, 15)
    assert clock.drawn == tried + 15


@pytest.mark.parametrize("slower", [1, 3])
def test_rate_of_diffusers_warms_up_and_ends_with_the_minutes_even_on_a_machine_that_slows_down(
    slower, small_peers, clock, place, monkeypatch
):
    class Noted(torch.optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            clock.tick = slower if len(rates) > 20 else 1
            return super().step()

    rates = []
    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    small_peers("diffusers")("fp32", task(place, minutes=1))
    rates = rates[3:]  # those that see how many fit
    peak = rates.index(max(rates))
    assert rates[0] == 0
    assert rates[peak] == pytest.approx(1e-4)
    assert peak == 6, "a tenth of the 60 steps that fit"
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    # a last step of 3 seconds begins at 57: 0.8% of the cosine's height are left
    assert rates[-1] < 1e-6


@pytest.mark.parametrize("project", ["diffusers", "lucidrains"])
def test_samples_come_from_the_averaged_weights(project, small_peers, clock, place, monkeypatch):
    train, used = small_peers(project), []
    if project == "diffusers":
        import diffusers
        from diffusers import training_utils

        class Kept(training_utils.EMAModel):
            def copy_to(self, parameters):
                kept = list(parameters)
                averages.append((self.shadow_params, [weight.detach().clone() for weight in kept]))
                assert self.optimization_step == 15, "those that see how many fit do not count"
                super().copy_to(kept)

        class Pipeline(diffusers.DDPMPipeline):
            def __call__(self, *args, **options):
                used.append(list(self.unet.parameters()))
                return super().__call__(*args, **options)

        averages = []
        monkeypatch.setattr(training_utils, "EMAModel", Kept)
        monkeypatch.setattr(diffusers, "DDPMPipeline", Pipeline)
        train("fp32", task(place)).sample(2)
        average, last = averages[-1]
    else:
        import denoising_diffusion_pytorch as package

        class Kept(package.Trainer):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                trainers.append(self)

        def sample(self, batch_size):
            used.append(list(self.parameters()))
            return torch.zeros(batch_size, 3, SIDE, SIDE)

        trainers = []
        monkeypatch.setattr(package, "Trainer", Kept)
        monkeypatch.setattr(package.GaussianDiffusion, "sample", sample)
        train("fp32", task(place)).sample(2)
        average, last = (
            list(trainers[0].ema.ema_model.parameters()),
            list(trainers[0].model.parameters()),
        )
    assert all(torch.equal(a, b) for a, b in zip(used[0], average, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(used[0], last, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("project", ["diffusers", "lucidrains"])
def test_one_color_is_learned_and_made_when_the_network_knows_it(
    project, precision, small_peers, clock, place, monkeypatch
):
    """Images go in and come out in the range of each.

    A network that knows the color finds pure noise beside it.
    """
    train, color = (
        small_peers(project),
        torch.tensor([250, 128, 20], dtype=torch.uint8).view(3, 1, 1),
    )
    x_0, found, types = color / 127.5 - 1, [], set()

    def beside(x_t, t, alpha_bar):
        signal, noise = (
            part[t].view(-1, 1, 1, 1).float() for part in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        )
        eps = (x_t - signal * x_0) / noise
        found.append(eps)
        return eps, signal, noise

    if project == "diffusers":
        import diffusers

        alpha_bar, walk_on = diffusers.DDPMScheduler().alphas_cumprod, diffusers.DDPMScheduler.step

        def step(self, output, *args, **options):
            assert output.dtype == torch.float32, "only the network itself works in bfloat16"
            return walk_on(self, output, *args, **options)

        monkeypatch.setattr(diffusers.DDPMScheduler, "step", step)

        class Knowing(diffusers.UNet2DModel):
            def forward(self, x_t, t):
                output = super().forward(x_t, t)  # whose weights must have a gradient
                types.add(output.sample.dtype)
                eps, _, _ = beside(x_t, t.expand(len(x_t)), alpha_bar)
                return type(output)(eps.to(output.sample.dtype) + 0 * output.sample)

        monkeypatch.setattr(diffusers, "UNet2DModel", Knowing)
    else:
        import denoising_diffusion_pytorch as package

        alpha_bar = package.GaussianDiffusion(package.Unet(8), image_size=SIDE).alphas_cumprod

        class Knowing(package.Unet):
            def forward(self, x_t, t, _condition=None):
                eps, signal, noise = beside(x_t, t, alpha_bar)
                output = super().forward(x_t, t)
                types.add(output.dtype)
                return signal * eps - noise * x_0 + 0 * output

        monkeypatch.setattr(package, "Unet", Knowing)
    learned = train(precision, task(place, images=color.expand(100, 3, SIDE, SIDE).numpy()))
    assert types == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}
    seen = torch.cat([eps.flatten(1) for eps in found])
    assert len(seen) >= 15 * 16
    # of half a million draws, float32's rounding divided by the noise of t = 1 included
    assert abs(seen.mean()) < 0.02
    assert abs(seen.std() - 1) < 0.02
    samples = learned.sample(3)
    assert (samples.shape, samples.dtype) == ((3, 3, SIDE, SIDE), torch.uint8)
    assert (samples.int() - color.int()).abs().max() <= 1


@pytest.fixture
def small_contest(place, monkeypatch):
    """One who gives back real pictures, and one who stumbles first and then gives black ones."""

    def learned(image: Callable[[int], Tensor]) -> quality_peers.Learned:
        return quality_peers.Learned(160, 1.5, 2.0, 60.0, "ddim", 50, image)

    def perfect(task: quality_peers.Task) -> quality_peers.Learned:
        calls.append(("perfect", task.seed))
        images = utils.load_dataset(Path("unseen"), (SIDE, SIDE)).images
        order = np.random.default_rng(0).permutation(len(images))
        # whom `evaluate.judge` calls real
        return learned(lambda n: torch.from_numpy(images[order[n : 2 * n]]))

    def black(task: quality_peers.Task) -> quality_peers.Learned:
        calls.append(("black", task.seed))
        if len(calls) == 2:
            raise UserError("stumbled")
        return learned(lambda n: torch.zeros(n, 3, SIDE, SIDE, dtype=torch.uint8))

    calls = []
    monkeypatch.setattr(
        quality_peers,
        "contenders_of",
        lambda device, names: {"perfect": perfect, "black": black},
    )
    monkeypatch.setattr(quality_peers.evaluate, "load_efficientnet", pixels)
    paint(place / "pictures", count=100)
    paint(place / "unseen", count=40, first_seed=1000)
    return calls


CONTEST = [
    "--dataset=pictures",
    "--held_out=unseen",
    "--n_img=16",
    "--device=cpu",
    "--minutes=0.25",
]


def contest(monkeypatch, *words: str) -> tuple[int, str, str]:
    """The contest, `words` instead of the same flags above."""
    given = {word.split("=")[0] for word in words}
    kept = [word for word in CONTEST if word.split("=")[0] not in given]
    return run(
        "benchmarks.quality_peers", quality_peers.quality_peers, [*kept, *words], monkeypatch
    )


def rows_of_contest() -> list[dict]:
    with open("results/benchmarks/quality_peers.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_perfect_samples_score_the_floor_and_others_more(small_contest, monkeypatch):
    small_contest += ["nobody stumbles"] * 2
    status, out, err = contest(monkeypatch)
    assert status == 0, err
    perfect, black = rows_of_contest()
    for name in ("distance", "contrast"):
        assert perfect[name] == perfect[f"{name}_real"] == black[f"{name}_real"]
    assert float(black["distance"]) > float(black["distance_real"])
    assert float(black["contrast"]) == 0
    title, *_ = [line for line in out.splitlines() if line.startswith("contender")]
    table = {line.split()[0]: line.split() for line in out[out.index(title) :].splitlines()[2:]}
    column = title.replace("weights M", "weights").split().index("excess") + 1  # "ddim 50" is two
    assert float(table["perfect"][column]) == 0
    excess = float(black["distance"]) - float(black["distance_real"])
    # a digit is shown, and six are kept
    assert float(table["black"][column]) == pytest.approx(excess, rel=1e-3)
    assert list(table) == ["perfect", "black"], "the best is on top"
    assert max(map(len, out.splitlines())) <= 120


def test_contest_goes_on_where_it_was_stopped(small_contest, monkeypatch):
    assert contest(monkeypatch)[0] == 2
    assert [row["contender"] for row in rows_of_contest()] == ["perfect"], (
        "written before the other one began"
    )
    assert contest(monkeypatch)[0] == 0
    assert contest(monkeypatch, "--seeds=2")[0] == 0
    assert small_contest == [
        ("perfect", 0),
        ("black", 0),
        ("black", 0),
        ("perfect", 1),
        ("black", 1),
    ]
    rows = rows_of_contest()
    assert [(row["contender"], row["seed"]) for row in rows] == [
        ("perfect", "0"),
        ("black", "0"),
        ("perfect", "1"),
        ("black", "1"),
    ]
    assert {(row["minutes"], row["images"], row["sampler"], row["n"]) for row in rows} == {
        ("0.25", "160", "ddim", "16")
    }
    assert len(list(Path("results/benchmarks/quality_peers").glob("*.png"))) == 4


def test_another_machine_begins_a_contest_of_its_own(small_contest, monkeypatch):
    small_contest += ["nobody stumbles"] * 2
    assert contest(monkeypatch)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "hardware", lambda device: "a faster one")
        status, out, err = contest(patch)
    assert (status, len(small_contest)) == (0, 6), err
    assert [row["hardware"] == "a faster one" for row in rows_of_contest()] == [0, 0, 1, 1]
    assert "a faster one, " in out
    assert contest(monkeypatch)[0] == 0
    assert len(rows_of_contest()) == 4


def test_every_contender_learns_samples_and_is_judged(small_peers, place, monkeypatch):
    """All parts together, with networks as small as may be, for a second each."""
    small = {name: value for name, value in TINY.items() if name != "img_size"}
    monkeypatch.setattr(quality_peers, "OURS", {"ours": ("defaults", small | {"batch_size": 4})})
    for project in ("diffusers, our layers", "lucidrains, dim 32"):  # differ in their layers alone
        monkeypatch.delitem(quality_peers.PEERS, project)
    monkeypatch.setattr(quality_peers.evaluate, "load_efficientnet", pixels)
    paint(place / "pictures", count=100)
    paint(place / "unseen", count=40, first_seed=1000)
    status, out, err = contest(monkeypatch, "--minutes=0.017")
    assert status == 0, err
    rows = rows_of_contest()
    assert [row["contender"] for row in rows] == list(quality_peers.contenders_of(CPU))
    for row in rows:
        assert int(row["images"]) > 0
        assert float(row["trained_s"]) >= 1.0199, (
            "60 times 0.017 minutes, and the rest of the last step"
        )
        assert row["contender"] in out[out.index("---") :]


def test_contenders_are_ours_alone_where_nothing_is_installed_and_it_says_so(
    installed, hurried, capsys
):
    installed()
    assert list(quality_peers.contenders_of(CPU)) == list(quality_peers.OURS)
    out = capsys.readouterr().out
    assert "left out: bf16" in out
    for package in peers.PIP_NAMES.values():
        assert f"pip install {package}\n" in out


def test_ours_is_the_default_of_the_command_line_and_the_first_training_of_the_readme():
    (_, defaults), (_, first), (_, before) = quality_peers.OURS.values()
    assert defaults == {}
    assert before == first | {"optimizer": "adamw"}
    command = re.search(
        r"ddpm.py train (--run_name=first .*?) &&",
        (ROOT / "README.md").read_text(),
        flags=re.DOTALL,
    )
    parameters = {
        name: value.annotation for name, value in inspect.signature(ddpm.train).parameters.items()
    }
    flags = command_line.read_flags(
        "train", parameters, command.group(1).replace("\\\n", "").split()
    )
    preset = runs.PRESETS[flags.pop("preset")]
    settings = preset | {
        name: command_line.FLAG_TYPES[parameters[name]][0](text) for name, text in flags.items()
    }
    by_default = inspect.signature(ddpm.train).parameters
    settings |= {name: by_default[name].default for name in first if name not in settings}
    assert settings == first | {"run_name": "first", "max_minutes": preset["max_minutes"]}


def test_our_layers_are_those_of_our_network():
    diffusers = pytest.importorskip("diffusers")
    names = ("width", "multipliers", "attention_size")
    shape = {name: quality_peers.FOR_A_CPU[name] for name in names} | {
        "img_size": SIDE,
        "blocks": 2,
    }
    ours = peers.our_network(shape)
    theirs = diffusers.UNet2DModel(sample_size=SIDE, **quality_peers.OUR_LAYERS)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    peers.check_same_answer(ours, theirs.eval(), SIDE)


def test_some_contenders_are_chosen_by_name():
    chosen = quality_peers.contenders_of(CPU, "ours, for a CPU; ours")
    assert list(chosen) == ["ours, for a CPU", "ours"]
    with pytest.raises(UserError, match="--contenders=theirs"):
        quality_peers.contenders_of(CPU, "theirs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes=0"], "--minutes=0.0 is out of range, which is 0.01 to 1e+06"),
        (["--img_size=48"], "--img_size=48 is not a multiple of 32"),
        (["--dataset=unseen"], "--dataset=unseen holds fewer than 100 images"),
        (["--held_out=nowhere"], "nowhere does not exist"),
        (["--sampler=ddim"], "--sampler is not an option"),
    ],
)
def test_contest_that_cannot_be_is_refused_before_any_work(
    words, message, small_contest, monkeypatch
):
    status, out, err = contest(monkeypatch, *words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert small_contest == []


@pytest.mark.quick
@pytest.mark.parametrize(
    "module", [levers, quality, quality_peers, sample_speed, samplers, train_speed]
)
def test_the_tables_that_come_along_can_be_added_to(module):
    name = module.__name__.rpartition(".")[2]
    command_line.check_table(ROOT / "results" / "benchmarks" / f"{name}.csv", module.COLUMNS)
