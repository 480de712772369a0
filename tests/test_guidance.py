"""Autoguidance: a run is led away from a weaker one; classifier-free guidance is in test_modes."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, awaken, paint, refused
from PIL import Image

import ddpm
from machinery import checkpoints
from modules import UNet

STEPS = "--steps=4"


def pixels_of(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("sample_*.png"))])


@pytest.fixture
def two_runs(place, run):
    """A run and a weaker one of the same images, both tiny."""
    paint(place / "pictures")
    for name, more in (("run", ["--epochs=6"]), ("weaker", ["--epochs=1", "--width=8"])):
        flags = dict(word.split("=") for word in (*TINY, "--noise_steps=8", *more))
        words = [f"{flag}={value}" for flag, value in flags.items()]
        result = run("train", "--dataset=pictures", f"--run_name={name}", *words)
        assert result.status == 0, result.err


@pytest.fixture
def sample(run):
    def sample_run(name: str, *words: str) -> np.ndarray:
        words = (f"--name={name}", "--n_img=3", STEPS, *words)
        result = run("sample", "--run_name=run", *words)
        assert result.status == 0, result.err
        return pixels_of(Path("results/run") / name)

    return sample_run


@pytest.mark.parametrize("labels", [None, torch.tensor([1, 0])])
def test_autoguidance_leads_from_the_guide_through_the_network(labels):
    """At 0 it is the guide, at 1 the network, at w that far along the line through both."""
    torch.manual_seed(0)
    shape = {"img_size": 8, "width": 16, "multipliers": (1,), "blocks": 1}
    shape["classes"] = None if labels is None else 3
    networks = [UNet(**shape).eval() for _ in range(2)]
    for network in networks:
        awaken(network)
    network, guide = networks
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    better, worse = network(x_t, t, labels), guide(x_t, t, labels)
    assert (better - worse).abs().max() > 0.1
    for guidance in (0.0, 1.0, 2.5):
        output = ddpm.guided(network, x_t, t, labels, guidance, guide)
        torch.testing.assert_close(output, worse + guidance * (better - worse))


def test_a_guidance_of_one_changes_nothing_and_more_does(two_runs, sample):
    plain = sample("plain")
    assert np.array_equal(sample("one", "--guide=weaker", "--guidance=1"), plain)
    led = sample("led", "--guide=weaker", "--guidance=3")
    assert not np.array_equal(led, plain)


def test_no_run_leads_away_from_itself_under_whatever_name(two_runs, run):
    """It would take twice the time and change nothing."""
    shutil.copytree("models/run", "models/copied")
    for name in ("run", "copied"):
        line = refused(run("sample", "--run_name=run", f"--guide={name}", STEPS))
        assert f"--guide={name} has the weights of the run that it is to guide" in line
    assert not Path("results/run/samples").exists()


def test_at_zero_it_makes_the_images_of_the_guide(two_runs, run, sample):
    led = sample("zero", "--guide=weaker", "--guidance=0")
    assert run("sample", "--run_name=weaker", "--n_img=3", STEPS).status == 0
    assert np.array_equal(led, pixels_of(Path("results/weaker/samples")))


def test_an_image_tells_its_guide_and_its_command_makes_it_again(two_runs, run, sample):
    led = sample("led", "--guide=weaker", "--guidance=3", "--batch_size=2")
    with Image.open("results/run/led/sample_0003.png") as image:
        words = shlex.split(image.info["command"], comments=True)[2:]
    assert {"--guide=weaker", "--guidance=3"} <= {word.removesuffix(".0") for word in words}
    assert run(*words, "--name=again").status == 0
    assert np.array_equal(pixels_of(Path("results/run/again"))[-1], led[2])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--noise_steps=9"], "--guide=other does not fit: it has --noise_steps=9"),
        (["--objective=eps"], "--guide=other does not fit: it has --objective=eps"),
        (["--mode=L"], "--guide=other does not fit: it has --mode=L"),
    ],
)
def test_a_guide_of_another_kind_is_refused(two_runs, run, flags, reason):
    flags = dict(word.split("=") for word in (*TINY, "--noise_steps=8", "--epochs=1", *flags))
    words = [f"{flag}={value}" for flag, value in flags.items()]
    assert run("train", "--dataset=pictures", "--run_name=other", *words).status == 0
    line = refused(run("sample", "--run_name=run", "--guide=other", STEPS))
    assert reason in line
    assert not (Path("results/run/samples")).exists()


def test_guidance_alone_is_refused_with_what_it_needs(two_runs, run):
    line = refused(run("sample", "--run_name=run", "--guidance=3", STEPS))
    assert "--guidance=3 is for class-conditional runs" in line
    assert "others need a --guide" in line
    assert "nowhere is not a trained run" in refused(
        run("sample", "--run_name=run", "--guide=nowhere", STEPS)
    )


def test_a_training_keeps_the_weights_of_its_first_fourth(place, run):
    """Also one that is resumed; without a decay, a run of 5 of its 15 steps ends with the same."""
    paint(place / "pictures")
    words = ["train", "--dataset=pictures", "--noise_steps=8", "--lr_decay=none", "--warmup=0"]
    words += [word for word in TINY if "warmup" not in word]
    # 10 pictures, 4 a step: 6 epochs are 15 steps, a fourth are done when the fifth begins
    for name, epochs in (("whole", 6), ("fifth", 2), ("resumed", 1), ("resumed", 6)):
        assert run(*words, f"--run_name={name}", f"--epochs={epochs}").status == 0
    early = checkpoints.load("whole")["early"]
    expected = checkpoints.load("fifth")["average"]
    assert {weight.dtype for weight in early.values()} == {torch.float16}
    assert all(torch.equal(early[name], expected[name].half()) for name in expected)
    # one epoch kept what was a fourth of it, and that stays
    resumed = checkpoints.load("resumed")["early"]
    assert any((resumed[name] != early[name]).any() for name in early)


def test_early_guides_and_a_run_without_it_says_so(two_runs, run, sample):
    plain = sample("plain")
    assert np.array_equal(sample("one", "--guide=early", "--guidance=1"), plain)
    assert not np.array_equal(sample("led", "--guide=early", "--guidance=3"), plain)
    stored = checkpoints.load("run")
    checkpoints.save("early_one", **stored | {"average": stored["early"]})
    zero = sample("zero", "--guide=early", "--guidance=0")
    assert run("sample", "--run_name=early_one", "--n_img=3", STEPS).status == 0
    assert np.array_equal(zero, pixels_of(Path("results/early_one/samples")))
    del stored["early"]
    checkpoints.save("run", **stored)
    line = refused(run("sample", "--run_name=run", "--guide=early", STEPS))
    assert "--guide=early: this run has no early weights" in line


def test_a_guide_must_fit_the_size_and_be_named_plainly(two_runs, run):
    flags = dict(word.split("=") for word in (*TINY, "--noise_steps=8", "--epochs=1"))
    words = [f"{flag}={value}" for flag, value in (flags | {"--multipliers": "1,1,1"}).items()]
    assert run("train", "--dataset=pictures", "--run_name=deep", *words).status == 0
    line = refused(run("sample", "--run_name=run", "--guide=deep", "--img_size=10", STEPS))
    assert "--guide=deep does not fit: --img_size=10x10" in line
    line = refused(run("sample", "--run_name=run", "--guide=../models/run", STEPS))
    assert "--guide=../models/run is not a usable name" in line
    assert not Path("results/run/samples").exists()


def test_a_guide_of_another_loss_weight_fits_and_its_weights_are_told(two_runs, run):
    flags = dict(word.split("=") for word in (*TINY, "--noise_steps=8", "--epochs=1"))
    words = [f"{flag}={value}" for flag, value in (flags | {"--min_snr": "1"}).items()]
    assert run("train", "--dataset=pictures", "--run_name=other", *words).status == 0
    assert run("sample", "--run_name=run", "--guide=other", "--n_img=1", STEPS).status == 0
    told = Image.open("results/run/samples/sample_0001.png").info
    weights = checkpoints.load("other")["average"]
    assert told["guide_weights"] == checkpoints.fingerprint_of(weights)
    assert told["computed_in"] in ("float32", "bfloat16")


def test_a_run_of_an_older_version_keeps_no_late_weights_as_early_ones(place, run):
    paint(place / "pictures")
    words = ["train", "--dataset=pictures", "--noise_steps=8", *TINY, "--run_name=run"]
    assert run(*words, "--epochs=2").status == 0
    stored = checkpoints.load("run")
    del stored["early"]
    checkpoints.save("run", **stored)
    assert run(*words, "--epochs=3").status == 0
    assert not checkpoints.load("run")["early"]
