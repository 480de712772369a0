"""Held-out images: which they are, what they cost, and when the program says that it memorizes."""

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, awaken, paint, refused

import ddpm
import utils
from machinery import checkpoints, held_out, journal, processes, reading
from machinery.basics import UserError
from tools import evaluate

NAMELESS = ("train", *TINY, "--dataset=pictures", "--noise_steps=8")
TRAIN = (*NAMELESS, "--run_name=run")
NAMES = [f"{kind}/picture_{number:04d}.png" for kind in "ab" for number in range(200)]


def rows_of(run_name: str) -> list[dict]:
    return list(csv.DictReader(Path(f"results/{run_name}/log.csv").open()))


def state_of(run_name: str) -> dict:
    """What a run has learned and logged, without the time it took."""
    stored = checkpoints.load(run_name)
    kept = {"network", "average", "optimizer", "step"}
    speed = journal.COLUMNS.index("img_per_s")
    log = [row[:speed] + row[speed + 1 :] for row in stored["log"]]
    return {name: stored[name] for name in kept} | {"log": log}


def same(one, other) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture
def often(monkeypatch):
    """Rows after every five steps, each with what the held-out images cost."""
    monkeypatch.setattr(journal, "ROW_EVERY", 5)
    monkeypatch.setattr(held_out, "COST", math.inf)


# ---- which ---------------------------------------------------------------------------------------


@pytest.mark.quick
def test_every_image_is_either_held_out_or_learned_from():
    chosen = held_out.split(NAMES, 0.1)
    assert sorted([*chosen.held_out, *chosen.learned]) == list(range(400))
    assert len(chosen.held_out) == len(chosen.beside) == 40
    assert set(chosen.beside) <= set(chosen.learned)
    assert len(held_out.split(NAMES, 7).held_out) == 7


@pytest.mark.quick
def test_names_alone_decide():
    """Whatever their order, and an accent in one letter or in two."""
    chosen = {NAMES[index] for index in held_out.split(NAMES, 30).held_out}
    turned = NAMES[::-1]
    assert {turned[index] for index in held_out.split(turned, 30).held_out} == chosen
    accented = [f"caf\u00e9_{number}.png" for number in range(50)]
    apart = [name.replace("\u00e9", "e\u0301") for name in accented]
    one, other = held_out.split(accented, 0.2), held_out.split(apart, 0.2)
    assert np.array_equal(one.held_out, other.held_out)


@pytest.mark.quick
def test_a_data_set_that_grows_keeps_its_held_out_images():
    """Of ten times as many, a tenth: those with smaller hashes than before come to them."""
    few = {NAMES[index] for index in held_out.split(NAMES, 0.1).held_out}
    more = NAMES + [f"c/{number}.png" for number in range(40)]
    now = {more[index] for index in held_out.split(more, 0.1).held_out}
    assert len(few & now) >= 34
    assert len(now) == 44


@pytest.mark.quick
def test_no_class_loses_its_last_image():
    labels = np.array([0] * 390 + list(range(1, 11)))
    chosen = held_out.split(NAMES, 200, labels)
    assert len(chosen.held_out) == 200
    assert set(labels[chosen.learned]) == set(range(11))
    alone = held_out.split(NAMES[:8], 4, np.arange(8) // 2)
    assert sorted((np.arange(8) // 2)[alone.learned]) == [0, 1, 2, 3]


@pytest.mark.quick
@pytest.mark.parametrize(
    "value, count, number", [(0, 9, 0), (0.02, 4096, 82), (1, 4, 1), (5, 10, 5)]
)
def test_a_share_or_a_number_is_held_out(value, count, number):
    assert held_out.number_of(value, count) == number


@pytest.mark.quick
@pytest.mark.parametrize("value, count", [(1.5, 100), (0.001, 100), (51, 100), (0.6, 100), (1, 1)])
def test_what_cannot_be_held_out_is_refused(value, count):
    with pytest.raises(UserError, match=f"--held_out={value:g} "):
        held_out.number_of(value, count)


@pytest.mark.quick
@pytest.mark.parametrize("count, share", [(64, 0), (774, 0), (775, 0.02), (4096, 0.02)])
def test_small_data_sets_hold_out_none_by_themselves(count, share):
    assert held_out.automatic(count) == share


def test_a_held_out_image_is_never_drawn(run, place, monkeypatch, often):
    """Over twenty epochs, in every batch, and in data.png; the measurement alone loads them."""
    paint(place / "pictures", count=16)
    chosen = held_out.split([f"picture_{number:04d}.png" for number in range(16)], 5)
    drawn = set()
    draw = utils.Loader.draw

    def note(loader, step):
        indices, flips = draw(loader, step)
        drawn.update(indices.tolist())
        return indices, flips

    monkeypatch.setattr(utils.Loader, "draw", note)
    result = run(*TRAIN, "--epochs=20", "--held_out=5")
    assert result.status == 0
    assert "data     11 images of 8x8" in result.out and "5 more are held out" in result.out
    assert "the loss of fewer than 16 is mostly chance" in result.out
    assert drawn == set(chosen.learned.tolist())
    assert checkpoints.load("run")["count"] == 11


# ---- nothing else is changed ---------------------------------------------------------------------


def test_without_held_out_images_all_is_as_it_was(run, place, often):
    """The columns of older versions, and the same bits as where they are off by themselves."""
    paint(place / "pictures", count=16)
    for words in (("--run_name=run",), ("--run_name=off", "--held_out=0")):
        assert run(*NAMELESS, "--epochs=4", *words).status == 0
    assert same(state_of("run"), state_of("off"))
    assert tuple(rows_of("run")[0]) == journal.COLUMNS
    assert checkpoints.load("run")["settings"]["held_out"] == 0


def test_measuring_changes_nothing_that_is_learned(run, place, often, monkeypatch):
    paint(place / "pictures", count=16)
    assert run(*TRAIN, "--epochs=6", "--held_out=4", "--dropout=0.1").status == 0
    often_measured = state_of("run")
    assert sum(row["gap"] != "" for row in rows_of("run")) == 4
    shutil.rmtree("models")
    monkeypatch.setattr(held_out, "COST", 1e-9)
    assert run(*TRAIN, "--epochs=6", "--held_out=4", "--dropout=0.1").status == 0
    once = state_of("run")
    assert sum(row["gap"] != "" for row in rows_of("run")) == 1, "at the end, in any case"
    del often_measured["log"], once["log"]
    assert same(often_measured, once)


def test_a_run_of_an_older_version_goes_on_without_held_out_images(run, place, monkeypatch):
    """Its settings do not know them; its own command resumes it, while new runs differ."""
    paint(place / "pictures", count=40)
    assert run(*TRAIN, "--epochs=2").status == 0
    stored = torch.load("models/run/checkpoint.pt", weights_only=True)
    del stored["settings"]["held_out"], stored["settings"]["keep_best"]
    torch.save(stored, "models/run/checkpoint.pt")
    monkeypatch.setattr(held_out, "FEWEST", 0)
    assert ddpm.load_run("run")["settings"]["held_out"] == 0
    assert run(*TRAIN, "--epochs=3").status == 0
    assert checkpoints.load("run")["settings"]["held_out"] == 0
    assert "--held_out was 0, is now 0.1" in refused(run(*TRAIN, "--epochs=4", "--held_out=0.1"))
    assert run(*NAMELESS, "--epochs=1", "--run_name=new").status == 0
    assert checkpoints.load("new")["settings"]["held_out"] == held_out.AUTOMATIC


def test_a_resumed_run_measures_what_one_in_one_go_does(run, place, often):
    paint(place / "pictures", count=16)
    words = [word for word in TRAIN if not word.startswith("--warmup")]
    words += ["--warmup=0", "--lr_decay=none"]  # else the length changes the learning rate
    assert run(*words, "--epochs=9", "--held_out=0.25").status == 0
    whole = state_of("run")
    shutil.rmtree("models")
    assert run(*words, "--epochs=4", "--held_out=0.25").status == 0
    assert run(*words, "--epochs=9").status == 0, "auto is what the run has"
    assert same(whole, state_of("run"))
    assert [row["gap"] != "" for row in rows_of("run")] == [True] * 6


# ---- what they cost ------------------------------------------------------------------------------


def measuring(
    batch_size: int = 4, count: int = 40, number: int = 10, objective: str = "v"
) -> held_out.HeldOut:
    """Held-out images of an untrained tiny network, whose last layer is not zero."""
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    names = [f"{index}.png" for index in range(count)]
    chosen = held_out.split(names, number)
    labels = np.zeros(count, np.int64)
    data = reading.Dataset(images, "", [], "RGB", labels, names, chosen.learned)
    loader = utils.Loader(data, batch_size, seed=0, flip="no", device=torch.device("cpu"))
    settings = {"seed": 0, "img_size": (8, 8), "width": 16, "multipliers": (1, 2), "blocks": 1}
    settings |= {"attention_size": 4, "dropout": 0.0, "mode": "RGB", "classes": ()}
    settings |= {"noise_steps": 100, "schedule": "cosine", "objective": objective, "min_snr": 5.0}
    settings |= {"grad_checkpointing": False, "micro_batch": "auto", "precision": "auto"}
    settings["optimizer"] = "muon"
    training = ddpm.Training(settings, loader, torch.device("cpu"))
    awaken(training.ema)
    training.precision = torch.float32
    return held_out.HeldOut(chosen, training)


def cells(measured: list) -> dict:
    return dict(zip(journal.HELD_OUT_COLUMNS, measured, strict=True))


@pytest.mark.quick
def test_the_loss_does_not_depend_on_the_batch_size_nor_on_the_number_of_processes(monkeypatch):
    alone = measuring().measure()
    assert measuring(batch_size=13).measure() == alone
    other = measuring()
    torch.manual_seed(1)
    assert other.measure() == other.measure() == alone, "noise and steps are fixed"
    parts = []
    monkeypatch.setattr(processes, "add_up", lambda tensors: parts.append(tensors[0].clone()))
    for share in (range(0, 7), range(7, 20)):
        monkeypatch.setattr(processes, "share", lambda total, share=share: share)
        other.measure()
    assert other.in_columns(sum(parts).double()) == pytest.approx(alone, rel=1e-5)


@pytest.mark.quick
def test_of_a_network_that_says_nothing_the_loss_is_known():
    """With the clean image as its target, a zero costs the mean square of the images' pixels."""
    held = measuring(objective="x0", number=8)
    for weight in held.training.ema.conv_out.parameters():
        torch.nn.init.zeros_(weight)
    loader = held.training.loader
    x_0 = loader.load(held.indices, torch.zeros(16, 1))
    weights = held.training.diffusion.weight(held.t)
    expected = (weights * x_0.square().mean(dim=(1, 2, 3))).double()
    found = cells(held.measure())
    assert found["held_out"] == pytest.approx(expected[:8].mean().item())
    assert found["learned"] == pytest.approx(expected[8:].mean().item())
    for quarter in range(4):
        members = (held.t[:8] - 1) // 25 == quarter
        assert found[f"held_out_q{quarter + 1}"] == pytest.approx(
            expected[:8][members].mean().item()
        )


@pytest.mark.quick
@pytest.mark.parametrize(
    "number, noise_steps", [(1, 1000), (7, 1000), (128, 1000), (16, 2), (5, 3)]
)
def test_noising_steps_are_spread_evenly(number, noise_steps):
    t = held_out.fixed_steps(number, noise_steps)
    assert t.shape == (number,) and t.min() >= 1 and t.max() <= noise_steps
    if number == 128:
        assert abs(t.float().mean() - 500.5) < 5
        assert torch.bincount((t - 1) * 4 // noise_steps).tolist() == [32] * 4


@pytest.mark.quick
@pytest.mark.parametrize("number, batch_size", [(16, 4), (128, 16), (128, 4096), (82, 32)])
def test_measuring_takes_a_hundredth_of_the_operations_at_most(number, batch_size):
    """A forward pass is a third of what an image costs in training."""
    every = held_out.steps_between(number, batch_size)
    assert every % journal.ROW_EVERY == 0
    assert 2 * number / 3 <= 0.01 * every * batch_size
    assert every == journal.ROW_EVERY or 2 * number / 3 > 0.01 * (every - 20) * batch_size


# ---- the gap -------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_gap_is_counted_in_standard_errors():
    generator = torch.Generator().manual_seed(0)
    beside = torch.rand(64, generator=generator).double() + 0.1
    noise = torch.randn(64, generator=generator).double()
    noise = 0.2 * (noise - noise.mean()) / noise.std()  # 0 on average, with an error of 0.025
    assert held_out.errors_apart(beside * noise.exp(), beside) == pytest.approx(0, abs=1e-9)
    assert held_out.errors_apart(beside * (noise + 0.1).exp(), beside) == pytest.approx(4)
    assert held_out.errors_apart(beside[:1], 2 * beside[:1]) == 0


@pytest.mark.quick
def test_a_gap_is_open_where_it_is_both_sure_and_large():
    row = dict.fromkeys(journal.ALL_COLUMNS, 1.0)
    for gap, loss, is_open in [(3, 1.1, True), (2.9, 2, False), (9, 1.05, False), (None, 2, False)]:
        changed = [*(row | {"gap": gap, "held_out": loss}).values()]
        assert journal.is_open(changed) == is_open
    assert not journal.is_open([1.0] * len(journal.COLUMNS))


def test_a_run_on_few_images_is_told_to_memorize_and_one_on_many_is_not(run, place, monkeypatch):
    """A hundred steps on 48 images, and on 4,014, each beside those that were held out."""
    monkeypatch.setattr(held_out, "COST", 1.0)
    words = ["train", "--img_size=8", "--width=32", "--multipliers=1", "--blocks=1", "--lr=8e-3"]
    words += ["--attention_size=0", "--batch_size=48", "--sample_every=0", "--warmup=5"]
    words += ["--device=cpu", "--flip=no", "--lr_decay=none", "--noise_steps=100"]
    told = {}
    for count, options in {64: ("--held_out=16", "--epochs=130"), 4096: ("--epochs=1",)}.items():
        pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        np.save(f"of_{count}.npy", pixels)
        result = run(*words, f"--dataset=of_{count}.npy", f"--run_name=run_{count}", *options)
        assert result.status == 0, result.err
        told[count] = (result.out + result.err).count(journal.MEMORIZES)
        assert len([row for row in rows_of(f"run_{count}") if row["gap"]]) > 3
    assert told == {64: 1, 4096: 0}


# ---- the best ------------------------------------------------------------------------------------


def test_the_weights_of_the_best_held_out_loss_are_kept_as_a_run(run, place, often, monkeypatch):
    """Losses are dictated here: the best one is of step 10, and a stop comes in between."""
    paint(place / "pictures", count=16)
    losses = {5: 3.0, 10: 1.0, 15: 2.0, 20: 1.5}
    seen = {}

    def dictate(self) -> list:
        step = self.training.step
        seen[step] = {name: each.clone() for name, each in self.training.ema.state_dict().items()}
        return [losses.get(step, 5.0), *[1.0] * 10]

    monkeypatch.setattr(held_out.HeldOut, "measure", dictate)
    words = ("--held_out=4", "--keep_best", "--lr_decay=none")
    for epochs in (4, 7):
        assert run(*TRAIN, *words, f"--epochs={epochs}").status == 0
    best = ddpm.load_run("run_best")
    assert best["step"] == 10 and "network" not in best
    assert same(dict(best["average"]), seen[10])
    sampled = run("sample", "--run_name=run_best", "--n_img=1", "--steps=2", "--device=cpu")
    assert sampled.status == 0
    again = run(*NAMELESS, "--run_name=run_best", "--epochs=8")
    assert "holds EMA weights only" in refused(again)


def test_the_best_weights_are_those_since_the_flag_is_given(run, place, often, monkeypatch):
    """A run that memorizes has had lower losses before: of these nothing was kept."""
    paint(place / "pictures", count=16)
    losses = {5: 1.0, 10: 2.0, 15: 4.0, 20: 3.0, 33: 2.5, 40: 2.7}

    def dictate(self) -> list:
        return [losses.get(self.training.step, 5.0), *[1.0] * 10]

    monkeypatch.setattr(held_out.HeldOut, "measure", dictate)
    words = (*TRAIN, "--held_out=4", "--lr_decay=none")
    assert "run_best" not in run(*words, "--epochs=4").out
    assert not Path("models/run_best").exists()
    for epochs, loss, step in ((7, 3.0, 20), (9, 3.0, 20), (11, 2.5, 33), (14, 2.5, 33)):
        result = run(*words, f"--epochs={epochs}", "--keep_best")
        assert result.out.endswith(f"held-out loss, {loss:.4f}, are the run run_best\n")
        assert ddpm.load_run("run_best")["step"] == step


@pytest.mark.parametrize("value", ["1.5", "6", "0.01", "-1", "some", "nan"])
def test_a_wrong_number_is_refused_before_anything_is_written(run, place, value):
    paint(place / "pictures")
    assert f"--held_out={value}" in refused(run(*TRAIN, f"--held_out={value}"))
    assert {path.name for path in place.iterdir()} == {"pictures"}


def test_keeping_the_best_needs_held_out_images_and_a_free_name(run, place):
    paint(place / "pictures")
    assert "needs held-out images" in refused(run(*TRAIN, "--keep_best"))
    assert not Path("models").exists()
    assert run(*TRAIN, "--epochs=1").status == 0
    shutil.copytree("models/run", "models/other_best")
    words = [word.replace("=run", "=other") for word in TRAIN]
    assert "models/other_best holds a run" in refused(run(*words, "--keep_best", "--held_out=2"))
    settings = {"best_of": "other"}
    for log in (None, [[1.0]]):
        stored = checkpoints.load("run")
        stored |= {"settings": stored["settings"] | settings, "log": log}
        checkpoints.write(checkpoints.paths_of("other_best")[0], **stored)
        assert "other_best holds a run" in refused(run(*words, "--keep_best", "--held_out=2"))


# ---- in an evaluation ----------------------------------------------------------------------------


@pytest.mark.quick
def test_an_evaluation_judges_by_held_out_images_and_finds_copies_of_the_others():
    """All samples are held-out images: near to these, and copies of nothing that was learned."""
    images = np.random.default_rng(0).integers(0, 256, (80, 3, 8, 8), dtype=np.uint8)
    chosen = held_out.split([f"{number}.png" for number in range(80)], 16)
    extract = lambda images: images.float().flatten(1)[:, ::8]  # noqa: E731
    features = evaluate.Features("pixels", "1", extract)
    unseen = torch.from_numpy(images[np.sort(chosen.held_out)])
    device = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "extract_cached", evaluate.extract_all)
        before = evaluate.judge(unseen, images, features, device)
        figures = evaluate.judge(unseen, images, features, device, split=chosen)
        seen = torch.from_numpy(images[chosen.learned[:16]])
        learned = evaluate.judge(seen, images, features, device, split=chosen)
    assert abs(figures["distance"]) < before["distance"] / 100
    assert (before["copies"], figures["copies"], figures["copies_real"]) == (1, 0, 0)
    assert learned["copies"] == 1


# ---- strangers' logs -----------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "change, is_right",
    [
        ({}, True),
        ({"gap": -3.5}, True),
        ({"held_out": None, "gap": None}, True),
        ({"held_out": -1.0}, False),
        ({"gap": math.nan}, False),
        ({"gap": -math.inf}, False),
        ({"learned_q1": "x"}, False),
    ],
)
def test_a_log_with_held_out_columns_is_checked(change, is_right):
    row = dict.fromkeys(journal.ALL_COLUMNS, 1.0) | {"step": 1, "images": 4, "clipped": 0}
    assert journal.is_log([[*(row | change).values()]], 5) == is_right


@pytest.mark.quick
def test_all_rows_of_a_log_have_the_same_columns():
    row = dict.fromkeys(journal.ALL_COLUMNS, 1.0) | {"step": 1, "images": 4, "clipped": 0}
    long, short = [*row.values()], [*(row | {"step": 2}).values()][: len(journal.COLUMNS)]
    assert not journal.is_log([long, short], 5)
    assert not journal.is_log([long[:-1]], 5)


def test_frames_of_one_file_are_on_one_side():
    """But for the film in which the number is reached; else a neighbor would tell of a frame."""
    names = [f"{film}.gif/{frame:05d}" for film in range(20) for frame in range(10)]
    chosen = held_out.split(names, 0.2)
    films = [{names[index].partition("/")[0] for index in side} for side in chosen[:2]]
    assert len(chosen.held_out) == 40
    assert len(films[0]) <= 5
    assert len(films[0] & films[1]) <= 1


def test_no_more_images_at_once_than_a_micro_batch(monkeypatch):
    """A GPU that trains in micro-batches has no memory for more."""
    held = measuring(number=16)
    held.training.micro_batches.size = 3
    sizes = []
    diffusion = held.training.diffusion
    loss = diffusion.loss
    monkeypatch.setattr(
        diffusion, "loss", lambda *inputs: sizes.append(len(inputs[1])) or loss(*inputs)
    )
    held.measure()
    assert sum(sizes) == 32
    assert max(sizes) == 3
