"""What a training tells, and when it ends: clock and epochs, log, curves, TensorBoard, runs."""

import csv
import math
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tqdm
from conftest import TINY, files_below, paint
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import ddpm
import utils
from machinery import checkpoints, journal, reading, runs, session
from machinery.journal import Log, gflop_per_image, plot_curves
from machinery.session import Progress
from modules import UNet

TRAIN = ("train", *TINY, "--dataset=pictures", "--run_name=run", "--noise_steps=8")


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that moves only when told to."""
    clock = SimpleNamespace(seconds=1000.0, monotonic=lambda: clock.seconds)
    for module in (ddpm, journal, session):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def slow_steps(clock, monkeypatch) -> SimpleNamespace:
    """A step takes 6 seconds of that clock, a preview 30."""
    batch_indices, walk = utils.batch_indices, ddpm.generate

    def take_step(*numbers: int) -> Tensor:
        clock.seconds += 6
        return batch_indices(*numbers)

    def take_preview(*inputs, **options):
        clock.seconds += 30
        return walk(*inputs, **options)

    monkeypatch.setattr(utils, "batch_indices", take_step)
    monkeypatch.setattr(ddpm, "generate", take_preview)
    return clock


def ten_epochs(**changed) -> Progress:
    """A training of 10 epochs of 100 images, 10 a step."""
    facts = {
        "count": 100,
        "batch_size": 10,
        "epochs": 10,
        "max_minutes": 0,
        "save_every": 10,
        "sample_every": 0,
    }
    return Progress(
        **facts
        | {"previews": 16, "step": 0, "minutes": 0.0, "began": journal.time.monotonic()}
        | changed
    )


# ---- how far a training is -----------------------------------------------------------------------


@pytest.mark.parametrize("speed, laid_aside", [(0, 0), (10, 32), (1000, 0.32), (0.1, 150)])
@pytest.mark.parametrize("max_minutes", [0, 10])
def test_steps_and_clock_both_count_and_the_larger_share_holds(
    clock, max_minutes, speed, laid_aside
):
    """Without a budget only the steps count; with one the last preview, too.

    That is the time of 320 images, if known.
    """
    training = ten_epochs(max_minutes=max_minutes)
    training.speed = speed
    assert training.last_step == 100
    for step in (0, 1, 50, 99, 100):
        clock.seconds = 1000 + 9 * step
        by_clock = (9 * step + laid_aside) / 600 if max_minutes else 0
        assert training.fraction_done(step) == pytest.approx(min(1, max(step / 100, by_clock)))


def test_the_checkpoint_keeps_the_minutes_used_and_no_more_until_the_budget_is(clock):
    training = ten_epochs(max_minutes=10, minutes=2.0)
    training.speed = 10  # a preview takes half a minute
    clock.seconds += 60
    assert training.minutes_to_keep() == pytest.approx(3)
    clock.seconds += 6.4 * 60
    assert training.minutes_to_keep() == pytest.approx(9.4)
    clock.seconds += 0.2 * 60
    assert training.minutes_to_keep() == 10
    clock.seconds += 60
    assert training.minutes_to_keep() == pytest.approx(10.6)


def test_a_budget_that_is_used_up_stays_so(clock):
    """Also where the last preview looks quicker a moment later.

    Else a finished run would be taken up again.
    """
    training = ten_epochs(max_minutes=10)
    training.speed = 10  # a preview takes half a minute
    clock.seconds += 9.5 * 60
    training.check_clock()
    assert training.fraction_done(1) == 1
    training.measured(1000)
    assert (training.fraction_done(1), training.minutes_to_keep()) == (1, 10)


def test_reading_the_images_takes_from_the_budget(run, place, clock, monkeypatch):
    paint(place / "pictures")
    read_dataset = reading.read_dataset

    def read_for_a_minute(*inputs, **how) -> reading.Dataset:
        clock.seconds += 60
        return read_dataset(*inputs, **how)

    monkeypatch.setattr(reading, "read_dataset", read_for_a_minute)
    result = run(*TRAIN, "--max_minutes=1")
    assert (result.status, checkpoints.exists("run")) == (0, False)
    assert "nothing was learned" in result.out


def test_minutes_of_earlier_sessions_count(clock):
    assert ten_epochs(max_minutes=10, step=50, minutes=8.0).fraction_done(50) == pytest.approx(0.8)
    assert ten_epochs(max_minutes=10, step=50, minutes=12.0).fraction_done(50) == 1


def test_stops_take_nothing_from_the_budget(run, place, slow_steps, monkeypatch):
    """Three sessions of three steps each have used 54 seconds."""
    paint(place / "pictures")
    batch_indices = utils.batch_indices

    def stop_at_every_third(count: int, batch_size: int, step: int, seed: int) -> Tensor:
        if step % 3 == 2:
            signal.raise_signal(signal.SIGTERM)
        return batch_indices(count, batch_size, step, seed)

    monkeypatch.setattr(utils, "batch_indices", stop_at_every_third)
    for sitting in (1, 2, 3):
        assert run(*TRAIN, "--max_minutes=60").status == 143
        assert checkpoints.load("run")["minutes"] == pytest.approx(0.3 * sitting)


@pytest.mark.parametrize(
    "batch_size, ends", [(10, [10, 20, 30]), (30, [4, 7, 10]), (100, [1, 2, 3])]
)
def test_an_epoch_ends_with_the_step_that_completes_it(batch_size, ends):
    training = ten_epochs(batch_size=batch_size)
    found = [step for step in range(1, ends[-1] + 1) if training.ends_epoch(step)]
    assert found == ends
    assert [training.epoch(step) for step in ends] == [1, 2, 3]


# ---- a budget of time ----------------------------------------------------------------------------


def test_a_budget_holds_steps_the_fall_of_the_rate_and_the_last_preview(
    run, place, slow_steps, monkeypatch
):
    """5 minutes of steps of 6 seconds and one preview of 30 that is foreseen.

    The rate is cos^2 of the time gone.
    """
    paint(place / "pictures")
    # of 16 previews five steps of four images: 30 seconds
    monkeypatch.setattr(Progress, "PREVIEW_COST", 5 * 4 / 16)
    monkeypatch.setattr(journal, "ROW_EVERY", 5)
    assert run(*TRAIN, "--max_minutes=5").status == 0
    assert slow_steps.seconds - 1000 == pytest.approx(300, abs=6)
    step = checkpoints.load("run")["step"]
    assert step == 45  # 270 seconds
    rates = [float(row["lr"]) for row in csv.DictReader(Path("results/run/log.csv").open())]
    assert len(rates) == 9
    for row, rate in enumerate(rates, 1):
        laid_aside = 30 if row > 1 else 0  # the speed is not known before the first row
        done = (6 * (5 * row - 1) + laid_aside) / 300
        assert rate == pytest.approx(1e-3 * math.cos(math.pi / 2 * done) ** 2)
    assert {path.suffix for path in Path("results/run/training_progress").iterdir()} == {".png"}


def test_a_budget_that_is_used_up_is_used_up_and_a_larger_one_goes_on(run, place, slow_steps):
    paint(place / "pictures")
    assert run(*TRAIN, "--max_minutes=1").status == 0
    step = checkpoints.load("run")["step"]
    result = run(*TRAIN, "--max_minutes=1")
    assert (result.status, checkpoints.load("run")["step"]) == (0, step)
    assert "nothing to do" in result.out
    assert run(*TRAIN, "--max_minutes=2").status == 0
    assert checkpoints.load("run")["step"] > step


def test_the_epochs_may_be_over_before_the_budget(run, place, slow_steps):
    paint(place / "pictures")
    assert run(*TRAIN, "--max_minutes=60", "--epochs=2").status == 0
    assert checkpoints.load("run")["step"] == 5


# ---- before the first step -----------------------------------------------------------------------


def test_a_dry_run_learns_and_keeps_nothing(run, place, slow_steps):
    paint(place / "pictures")
    result = run(*TRAIN, "--dry_run", "--epochs=100")
    assert result.status == 0
    # 250 steps of 6 seconds
    assert "time     0.7 images per second: about 0:25:00 to go" in result.out
    assert files_below(place / "results") == {"run", "run/data.png"}
    assert not checkpoints.exists("run")


def test_a_dry_run_tells_how_much_fits_into_a_budget(run, place, slow_steps, monkeypatch):
    """Ten minutes at 4 images in 6 seconds, of which two steps are gone."""
    paint(place / "pictures")
    monkeypatch.setattr(Progress, "PREVIEW_COST", 0)
    result = run(*TRAIN, "--dry_run", "--max_minutes=10", "--epochs=100000")
    fits = re.search(r"about (\S+) to go, (\d+) images or (\S+) epochs in all\n", result.out)
    assert fits.groups() == ("0:09:48", "392", "39.2")
    assert "only 392 images will be seen in training" in result.out
    result = run(*TRAIN, "--dry_run", "--max_minutes=10", "--epochs=3")
    assert "epochs in all" not in result.out, "they all fit"


def test_a_dry_run_of_a_run_that_exists_leaves_it_alone(run, place):
    paint(place / "pictures")
    assert run(*TRAIN, "--epochs=2").status == 0
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    result = run(*TRAIN, "--epochs=4", "--dry_run")
    assert result.status == 0
    assert "5 steps are done" in result.out
    assert " images per second: about 0:00:0" in result.out
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("flip", [True, False])
def test_the_sheet_of_the_data_shows_the_images_of_the_first_steps(run, place, flip):
    paint(place / "pictures", count=16)
    assert run(*TRAIN, "--dry_run", f"--flip={flip}").status == 0
    with Image.open("results/run/data.png") as picture:
        sheet = (
            np.asarray(picture).reshape(4, 8, 4, 8, 3).transpose(0, 2, 4, 1, 3).reshape(16, 3, 8, 8)
        )
    images = utils.load_dataset(Path("pictures"), (8, 8)).images
    order = torch.cat([utils.batch_indices(16, 4, step, seed=0) for step in range(4)])
    as_it_is = [
        np.array_equal(shown, images[index]) for shown, index in zip(sheet, order, strict=True)
    ]
    mirrored = [
        np.array_equal(shown[..., ::-1], images[index])
        for shown, index in zip(sheet, order, strict=True)
    ]
    assert all(np.logical_or(as_it_is, mirrored))
    assert any(mirrored) == flip


def test_the_summary_tells_what_will_happen(run, place):
    paint(place / "pictures")
    (place / "pictures/broken.jpg").write_text("not a picture")
    result = run(*TRAIN, "--epochs=20", "--max_minutes=7")
    for words in (
        "10 images of 8x8 from pictures",
        "1 unreadable, left out: broken.jpg",
        " thousand weights, ",
        "on cpu in ",
        "20 epochs, 50 steps of 4 images, or 7 minutes; 0 steps are done",
        "images per second: about 0:00:0",
        "python ddpm.py sample --run_name=run",
        f"the weights are in {checkpoints.paths_of('run')[0]}",
    ):
        assert words in result.out
    loss = checkpoints.load("run")["log"][-1][journal.COLUMNS.index("loss")]
    assert "trained for 20.0 epochs in 0:0" in result.out
    assert "loss " in result.out.partition("trained")[2]
    assert loss > 0


def test_operations_are_those_of_convolutions_and_products():
    """Against the closed form for a network of known layers.

    One level, no attention but the middle's.
    """
    network = UNet(8, width=4, multipliers=(1,), blocks=1, attention_size=0)
    sides = 8 * 8
    convolutions = [
        (3, 4, 9),
        (4, 3, 9),
        *[(4, 4, 9)] * 6,
        *[(8, 4, 9), (4, 4, 9)] * 2,
        *[(8, 4, 1)] * 2,
    ]
    # in and out; a block down and two in the middle; two blocks up with their shortcuts
    linear = [(4, 16, 1), (16, 16, 1), *[(16, 4, 1)] * 5, *[(4, 4, sides)] * 4]
    products = sum(i * o * k * sides for i, o, k in convolutions) + sum(
        i * o * n for i, o, n in linear
    )
    products += 2 * sides * sides * 4  # of the attention: weights, and the mixture
    assert gflop_per_image(network, (8, 8)) * 1e9 == pytest.approx(2 * products, rel=1e-12)


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_operations_are_those_that_pytorch_counts(size):
    from torch.utils.flop_counter import FlopCounterMode

    network = UNet(32, width=32, multipliers=(1, 2, 4), classes=3, input_channels=1)
    counted = gflop_per_image(network, size)
    network.to("meta")
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        network(torch.empty(1, 3, *size), torch.ones(1, dtype=torch.long))
    assert counted * 1e9 == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_few_images_are_given_as_the_reason_for_noise(run, place):
    """After the training and in sampling, until there were enough."""
    paint(place / "pictures")
    told = "only 80 images have been seen in training so far"
    assert told in run(*TRAIN, "--epochs=8").out
    assert told in run("sample", "--run_name=run", "--n_img=1", "--steps=2", "--device=cpu").out
    assert journal.hint(journal.FEW_IMAGES - 1, "this") and not journal.hint(20_000, "this")


SAMPLE = ("sample", "--run_name=run", "--n_img=1", "--steps=2", "--device=cpu")


@pytest.mark.parametrize(
    "words, larger, flags",
    [
        (("--epochs=8",), ("--epochs=9",), "--epochs"),
        (("--max_minutes=1",), ("--max_minutes=2",), "--max_minutes"),
        (("--max_minutes=60", "--epochs=2"), ("--max_minutes=60", "--epochs=3"), "--epochs"),
        (
            ("--max_minutes=0.5", "--epochs=2"),
            ("--max_minutes=9", "--epochs=3"),
            "--epochs and --max_minutes",
        ),
    ],
)
def test_the_flag_that_is_named_continues_the_training(
    run, place, slow_steps, words, larger, flags
):
    """Said after the training, in sampling and by the same command; and tried."""
    paint(place / "pictures")
    advice = f"a larger {flags} continues it"
    assert f"expect blurs and noise; {advice}" in run(*TRAIN, *words).out
    step = checkpoints.load("run")["step"]
    assert f"expect blurs and noise; {advice}" in run(*SAMPLE).out
    assert f"nothing to do: this run is finished; {advice}" in run(*TRAIN, *words).out
    result = run(*TRAIN, *larger)
    assert (result.status, "nothing to do" in result.out) == (0, False)
    assert checkpoints.load("run")["step"] > step


def test_a_run_that_was_stopped_is_continued_by_its_own_command(run, place, monkeypatch):
    paint(place / "pictures")
    batch_indices = utils.batch_indices

    def stop(*numbers: int) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return batch_indices(*numbers)

    monkeypatch.setattr(utils, "batch_indices", stop)
    assert run(*TRAIN, "--epochs=8").status == 143
    assert "blurs and noise; the same `train` command continues it" in run(*SAMPLE).out


def test_a_run_without_what_training_needs_is_continued_by_another(run, place):
    paint(place / "pictures")
    assert run(*TRAIN, "--epochs=8").status == 0
    stored = torch.load("models/run/checkpoint.pt", weights_only=True)
    published = {name: stored[name] for name in (*checkpoints.TO_SAMPLE, "format", "count")}
    torch.save(published, "models/run/checkpoint.pt")
    assert "a new run with --init_from=run continues it" in run(*SAMPLE).out


def test_a_run_that_began_with_what_another_learned_is_not_told_to_expect_noise(run, place):
    """Neither before nor after its training, nor when it is sampled."""
    paint(place / "pictures")
    assert "expect blurs and noise" in run(*TRAIN, "--epochs=2").out
    words = [word for word in TRAIN if not word.startswith("--run_name")]
    tuned = ("--run_name=tuned", "--init_from=run")
    for epochs in (2, 3):
        assert "expect" not in run(*words, *tuned, f"--epochs={epochs}").out
    assert "expect" not in run(*words, "--run_name=tuned", "--epochs=4").out
    sampled = [word.replace("=run", "=tuned") for word in SAMPLE]
    result = run(*sampled)
    assert (result.status, "expect" in result.out) == (0, False)


def test_too_few_images_are_warned_of_before_the_training(run, place, slow_steps, monkeypatch):
    """By the epochs, or once its speed is known by the budget; not where there are enough."""
    paint(place / "pictures")
    monkeypatch.setattr(journal, "FEW_IMAGES", 100)
    monkeypatch.setattr(journal, "ROW_EVERY", 5)
    monkeypatch.setattr(Progress, "PREVIEW_COST", 0)
    advice = "images will be seen in training: expect blurs and noise; a larger"
    nameless = [word for word in TRAIN if not word.startswith("--run_name")]
    result = run(*nameless, "--epochs=8", "--run_name=a")
    before, _, after = result.out.partition("files ")
    assert f"only 80 {advice} --epochs shows it more" in before
    assert "will be seen" not in after
    told = run(*nameless, "--run_name=b", "--max_minutes=2")
    # 20 steps of 4 images fit into two minutes
    assert f"only 80 {advice} --max_minutes shows it more" in told.out + told.err
    for words in ("--epochs=10", "--max_minutes=2.5"):  # 100 images
        result = run(*nameless, f"--run_name=enough{words[-1]}", words)
        assert result.status == 0
        assert "will be seen" not in result.out + result.err


def test_what_was_learned_is_told_by_the_step_not_by_the_last_row(run, place):
    """9 epochs of 10 images are 23 steps of 4; the last full row is of step 20."""
    paint(place / "pictures")
    seen = "only 92 images have been seen in training so far"
    told = run(*TRAIN, "--epochs=9")
    assert seen in told.out and "trained for 9.2 epochs" in told.out
    assert seen in run("sample", "--run_name=run", "--n_img=1", "--steps=2", "--device=cpu").out
    [_, line] = runs.runs_table().splitlines()
    assert "10 from pictures" in line and " 9.2 " in line
    stored = torch.load("models/run/checkpoint.pt", weights_only=True)
    del stored["count"]  # as older checkpoints are: their log tells it
    torch.save(stored, "models/run/checkpoint.pt")
    assert runs.learned(ddpm.load_run("run")) == (10, 92, 9.2)
    assert runs.learned(stored | {"log": []}) == (math.inf,) * 3


def test_a_training_of_few_steps_is_known_by_its_steps(run, place):
    paint(place / "pictures")
    assert run(*TRAIN, "--epochs=1").status == 0  # 3 steps, no full row
    [_, line] = runs.runs_table().splitlines()
    assert "10 from pictures" in line and " 1.2 " in line
    [row] = csv.DictReader(Path("results/run/log.csv").open())
    assert (row["step"], row["images"], float(row["epoch"])) == ("3", "12", 1.2)
    assert float(row["loss"]) == pytest.approx(float(line.split()[-3]), abs=1e-4)


# ---- the log -------------------------------------------------------------------------------------


def test_the_last_row_of_a_training_is_taken_back_by_a_longer_one(run, place, monkeypatch):
    """Two sittings to the end have the log of one; the learning rate is constant here."""
    paint(place / "pictures")
    monkeypatch.setattr(journal, "ROW_EVERY", 5)
    whole = ("--lr_decay=none", "--warmup=0")
    tables = {}
    for name, sittings in {"at_once": (9,), "in_two": (3, 9)}.items():
        for epochs in sittings:
            words = [word for word in TRAIN if not word.startswith(("--run_name", "--warmup"))]
            assert run(*words, *whole, f"--epochs={epochs}", f"--run_name={name}").status == 0
        rows = csv.reader(Path(f"results/{name}/log.csv").open())
        tables[name] = [row[:-1] for row in rows]
    assert [row[0] for row in tables["at_once"][1:]] == ["5", "10", "15", "20", "23"]
    assert tables["in_two"] == tables["at_once"]


def test_the_mean_loss_of_rows_counts_their_steps(monkeypatch):
    monkeypatch.setattr(journal, "ROW_EVERY", 5)
    rows = [[5, 0, 0, 1.0], [10, 0, 0, 2.0], [12, 0, 0, 7.0]]
    assert journal.last_loss(rows) == (pytest.approx((5 * 2 + 2 * 7) / 7), 7)
    assert journal.last_loss(rows[:2]) == (2.0, 5)
    assert journal.last_loss([[3, 0, 0, 4.0]]) == (4.0, 3)
    assert journal.last_loss([[5, 0, 0, 1.0], [7, 0, 0, 8.0]]) == (pytest.approx(3), 7)


@pytest.mark.parametrize(
    "number, taken", [(1, 1), (10, 1), (19, 1), (20, 2), (28, 2), (100, 10), (499, 49), (900, 50)]
)
def test_the_loss_that_is_told_is_that_of_the_last_tenth_at_most(number, taken):
    """Of rows of 20 steps, whose losses are their numbers; and never of more than 50 rows."""
    rows = [[20 * row, 0, 0, float(row)] for row in range(1, number + 1)]
    mean = number - (taken - 1) / 2
    assert journal.last_loss(rows) == (pytest.approx(mean), 20 * taken)
    assert taken == 1 or taken <= number / 10


def test_the_report_says_over_which_steps_the_loss_is(run, place, monkeypatch):
    paint(place / "pictures")
    monkeypatch.setattr(journal, "ROW_EVERY", 5)
    assert " over all 3 steps" in run(*TRAIN, "--epochs=1").out
    result = run(*TRAIN, "--epochs=40")
    losses = [float(row["loss"]) for row in csv.DictReader(Path("results/run/log.csv").open())]
    assert len(losses) == 20
    assert f"loss {(losses[-1] + losses[-2]) / 2:.4f} over the last 10 steps" in result.out


@pytest.mark.parametrize("objective", ddpm.OBJECTIVES)
@pytest.mark.parametrize("min_snr", [0, 5])
def test_zeros_cost_what_is_said_at_most(objective, min_snr):
    """Exactly that where the target has a mean square of 1: of noise, of images of -1 and 1."""
    diffusion = ddpm.Diffusion(100, "cosine", objective, min_snr)
    every_step = torch.arange(1, 101)
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 2, (100, 3, 16, 16), generator=generator) * 2.0 - 1
    eps = torch.randn(100, 3, 16, 16, generator=generator)
    zeros = lambda x_t, t: torch.zeros_like(x_t)  # noqa: E731
    said = diffusion.weight(every_step).mean().item()
    assert diffusion.loss(zeros, x_0, every_step, eps).mean().item() == pytest.approx(
        said, rel=0.02
    )
    assert diffusion.loss(zeros, x_0 / 2, every_step, eps).mean().item() < 1.02 * said
    if not min_snr:
        assert said == 1


@pytest.mark.parametrize("lr, is_told", [("1", True), ("1e-3", False)])
def test_a_loss_far_above_that_of_zeros_gets_a_word(run, place, lr, is_told):
    """Adam with a rate of 1 leaves every scale."""
    paint(place / "pictures")
    words = [word for word in TRAIN if not word.startswith(("--lr", "--warmup"))]
    options = ("--objective=eps", "--min_snr=0", "--epochs=20", "--warmup=0", "--lr_decay=none")
    result = run(*words, *options, f"--lr={lr}")
    assert result.status == 0
    told = "this loss is far above 1.0000, which an output of nothing but zeros costs"
    assert (told in result.out) == is_told
    assert ("start another run with a lower --lr" in result.out) == is_told


def test_three_steps_say_nothing_about_the_learning_rate(run, place, monkeypatch):
    """Of so few steps the drawn t alone may cost more than zeros do on average."""
    paint(place / "pictures")
    monkeypatch.setattr(journal, "SENSELESS", 0.0)
    result = run(*TRAIN, "--epochs=1")
    assert (result.status, "far above" in result.out) == (0, False)


# ---- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (812, "812"),
        (999.94, "1000"),
        (1000, "1.0 thousand"),
        (45_230, "45.2 thousand"),
        (999_940, "999.9 thousand"),
        (999_960, "1.0 million"),
        (26_600_000, "26.6 million"),
        (5e12, "5000.0 billion"),
    ],
)
def test_a_number_is_told_in_the_unit_that_suits_it(value, text):
    assert journal.in_units(value, ("", " thousand", " million", " billion")) == text


def test_a_small_network_has_neither_0_million_weights_nor_0_gflop(monkeypatch):
    monkeypatch.setattr(journal, "gflop_per_image", lambda network, size: 0.01234)
    network = UNet(8, width=4, multipliers=(1,), blocks=1, attention_size=0)
    count = sum(weight.numel() for weight in network.parameters())
    told = journal.describe_network(network, (8, 8), torch.device("cpu"), torch.float32)
    assert told.startswith(f"{count / 1000:.1f} thousand weights, 12.3 MFLOP an image, on cpu")
    assert 1000 < count < 100_000


def test_one_row_is_drawn_as_a_point(tmp_path, monkeypatch):
    markers = []

    def look(figure, *_, **__) -> None:
        markers.extend(line.get_marker() for axes in figure.axes for line in axes.lines)

    monkeypatch.setattr(Figure, "savefig", look)
    row = [1, 0.1, 1, 0.5, 1e-3, 1.0, 0, 0.5, 0.5, 0.5, 0.5, 9.0]
    plot_curves([row], tmp_path / "loss.png")
    assert set(markers) == {"o"}
    markers.clear()
    plot_curves([row, [2, 0.2, 2, *row[3:]]], tmp_path / "loss.png")
    assert set(markers) == {"None"}


def logged(losses: Tensor, t: Tensor, tmp_path: Path) -> dict:
    """The row that a log writes of steps of four images each."""
    log = Log(tmp_path, ten_epochs(batch_size=4), noise_steps=8, device=torch.device("cpu"))
    with log:
        for step in range(len(losses)):
            log.add(step + 1, losses[step], t[step], grad_norm=torch.tensor(float(step)), lr=0.5)
        log.write()
    return next(csv.DictReader((tmp_path / "log.csv").open()))


def test_a_row_tells_the_means_and_the_loss_of_each_quarter(tmp_path, monkeypatch):
    """Steps 1, 2 of 8 are the first quarter, 7 and 8 the last.

    Where no image fell, nothing is said.
    """
    monkeypatch.setattr(journal, "ROW_EVERY", 3)
    losses = torch.rand(3, 4)
    t = torch.tensor([[1, 2, 3, 4], [8, 7, 1, 2], [3, 3, 1, 8]])
    row = logged(losses, t, tmp_path)
    assert float(row["loss"]) == pytest.approx(losses.mean().item())
    assert float(row["grad_norm"]) == pytest.approx(1)
    assert row["clipped"] == "1"
    for name, members in (("loss_q1", t <= 2), ("loss_q2", (t > 2) & (t <= 4)), ("loss_q4", t > 6)):
        assert float(row[name]) == pytest.approx(losses[members].mean().item())
    assert row["loss_q3"] == ""


def test_the_curves_are_drawn_of_a_log_with_gaps(tmp_path):
    rows = [
        [step, step / 10, step, 1 / step, 1e-3, 1.0, 0, None, 1 / step, 2 / step, 3.0, 9.0]
        for step in range(1, 60)
    ]
    for count in (0, 1, 59):
        plot_curves(rows[:count], tmp_path / "loss.png")
        with Image.open(tmp_path / "loss.png") as picture:
            assert picture.width > 3 * picture.height


def test_after_a_stop_the_speed_is_that_of_this_session(run, place, slow_steps, monkeypatch):
    """A step of four images takes 6 seconds.

    The first row of the second session has but three of its five steps.
    """
    paint(place / "pictures")
    monkeypatch.setattr(journal, "ROW_EVERY", 5)
    assert run(*TRAIN, "--epochs=3", "--lr_decay=none").status == 0
    slow_steps.seconds += 1000
    result = run(*TRAIN, "--epochs=9", "--lr_decay=none")
    assert result.status == 0, result.err
    rows = checkpoints.load("run")["log"]
    assert [row[0] for row in rows] == [5, 10, 15, 20, 23]
    assert all(row[-1] == pytest.approx(4 / 6) for row in rows[1:])
    # 8 steps after the first whole row
    assert "time     0.7 images per second: about 0:00:48 to go" in result.out


def test_a_log_that_could_not_be_written_is_whole_at_the_next_row(tmp_path, monkeypatch):
    """One message a row, which names the file; a part of a row that was written does not stay."""
    monkeypatch.setattr(journal, "ROW_EVERY", 2)
    log = Log(tmp_path, ten_epochs(batch_size=4), noise_steps=8, device=torch.device("cpu"))
    numbers = torch.ones(4), torch.ones(4, dtype=torch.long), torch.tensor(1.0), 0.5
    with log:
        log.write()
        for step in range(1, 9):
            log.add(step, *numbers)
            if step == 4:
                log.path.unlink()
                log.path.mkdir()
                with pytest.raises(OSError) as caught:
                    log.write()
                assert caught.value.filename == str(log.path)
                log.path.rmdir()
                log.path.write_text("step,ep")
            log.write()
            if step == 5:
                assert log.path.read_text() == "step,ep", "it is not tried at every step"
    assert [row["step"] for row in csv.DictReader(log.path.open())] == ["2", "4", "6", "8"]


@pytest.mark.parametrize("hours", [0.01, 1, 100])
@pytest.mark.parametrize("max_minutes", [0, 45])
def test_without_a_terminal_a_long_training_tells_itself_in_under_200_lines(
    tmp_path, monkeypatch, capfd, hours, max_minutes
):
    """500 epochs of 100 steps, in so many hours of a clock of our own."""
    clock = SimpleNamespace(seconds=0.0, monotonic=lambda: clock.seconds)
    monkeypatch.setattr(journal, "time", clock)
    monkeypatch.setattr(session, "time", clock)
    monkeypatch.setattr(tqdm.std, "time", clock.monotonic)
    training = ten_epochs(batch_size=1, epochs=500, max_minutes=max_minutes)
    with Log(tmp_path, training, noise_steps=8, device=torch.device("cpu")) as log:
        step = 0
        while training.fraction_done(step) < 1:
            step += 1
            clock.seconds += hours * 3600 / 50_000
            log.bar.total = max(log.bar.total, step)
            log.bar.update(1)
    words = capfd.readouterr().err.split()
    # times gone and left
    assert (1 if hours == 0.01 else 20) <= sum("<" in word for word in words) < 150


@pytest.mark.parametrize("seconds_a_step", [1, 5, 40])
def test_the_first_line_under_a_budget_tells_the_time_that_is_left(
    tmp_path, monkeypatch, capfd, seconds_a_step
):
    """Not that of 500 epochs, which would take days; before the first row of the log, too."""
    clock = SimpleNamespace(seconds=0.0, monotonic=lambda: clock.seconds)
    for module in (journal, session):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(tqdm.std, "time", clock.monotonic)
    training = ten_epochs(count=4000, epochs=500, max_minutes=10)
    one = torch.ones(10)
    with Log(tmp_path, training, noise_steps=8, device=torch.device("cpu")) as log:
        for step in range(1, min(19, 600 // seconds_a_step)):
            clock.seconds += seconds_a_step
            log.add(step, one, one, torch.tensor(1.0), 1e-3)
    lines = re.findall(r"\[([\d:]+)<([\d:]+)", capfd.readouterr().err)
    assert lines
    for times in lines:
        gone, left = (
            sum(60**place * int(part) for place, part in enumerate(reversed(text.split(":"))))
            for text in times
        )
        assert gone + left == pytest.approx(600, abs=10)


# ---- previews on the way -------------------------------------------------------------------------


def previews_of(training: Progress, clock=None, seconds: float = 0) -> list[int]:
    """The steps of a training after which a preview is due."""
    found = []
    step = training.first_step
    while training.fraction_done(step) < 1:
        step += 1
        if clock:
            clock.seconds += seconds
        if training.fraction_done(step) < 1 and training.is_preview_due(step):
            with training.previewing(step):
                pass
            found.append(step)
    return found


def test_long_epochs_have_previews_at_every_tenth_of_the_training():
    """8 epochs of 10,000 images, previews every 10 epochs: 8,000 steps of 10."""
    facts = {"count": 10_000, "epochs": 8, "sample_every": 10}
    tenths = [800 * part for part in range(1, 10)]
    assert previews_of(ten_epochs(**facts)) == tenths
    # a sitting that begins in between goes on alike
    assert previews_of(ten_epochs(**facts, step=3000)) == tenths[3:]
    assert previews_of(ten_epochs(**facts | {"sample_every": 0})) == []


def test_short_epochs_have_previews_after_every_so_many_only():
    facts = {"count": 10_000, "epochs": 40, "sample_every": 2}
    assert previews_of(ten_epochs(**facts)) == [2000 * part for part in range(1, 20)]
    facts = {"count": 10_000, "epochs": 8, "sample_every": 1}
    assert previews_of(ten_epochs(**facts)) == [1000 * part for part in range(1, 8)]
    # two epochs end: so few
    facts = {"count": 10_000, "epochs": 20, "sample_every": 8}
    found = previews_of(ten_epochs(**facts))
    assert {8000, 16_000} < set(found) and 9 <= len(found) <= 11


@pytest.mark.parametrize("count, number", [(100, 0), (200, 1), (400, 2), (800, 4), (1e4, 9)])
def test_previews_on_the_way_cost_little(count, number):
    """At least 5 times 320 images lie between two: 20 for each of the 16, by a generous guess."""
    found = previews_of(ten_epochs(count=int(count), epochs=10, sample_every=20))
    assert len(found) == number
    assert all(10 * step >= 1600 for step in np.diff(found, prepend=0))


def test_a_budget_has_previews_at_every_tenth_of_its_time(clock):
    training = ten_epochs(count=10**6, epochs=500, max_minutes=60, sample_every=10)
    assert previews_of(training, clock, seconds=1) == [360 * part for part in range(1, 10)]


def test_previews_come_by_the_clock_where_that_is_wanted(clock):
    """Steps of 7 seconds: a preview after the first one that begins a new minute and a half."""
    training = ten_epochs(sample_minutes=1.5)
    steps = previews_of(training, clock, seconds=7)
    assert steps == [13 * part for part in range(1, 8)]
    assert previews_of(ten_epochs(), clock, seconds=7) == []


def test_previews_on_the_way_change_nothing_that_is_learned(run, place, monkeypatch):
    """They are named by their step, and lie in their order."""
    paint(place / "pictures")
    words = [word for word in TRAIN if not word.startswith(("--run_name", "--sample_every"))]
    monkeypatch.setattr(Progress, "PREVIEW_COST", 0.1)
    for name, sample_every in {"with": 10, "without": 0}.items():
        options = ("--epochs=8", f"--run_name={name}", f"--sample_every={sample_every}")
        assert run(*words, *options).status == 0
    names = sorted(path.name for path in Path("results/with/training_progress").iterdir())
    # 20 steps of 4 images, 10 an epoch: some tenths end an epoch
    steps = [(2 * part, 8 * part // 10) for part in range(1, 11)]
    assert names == [
        f"epoch_{epoch:04d}" + (f"_step_{step:08d}.png" if 4 * step % 10 >= 4 else ".png")
        for step, epoch in steps
    ]
    assert [path.name for path in Path("results/without/training_progress").iterdir()] == [
        "epoch_0008.png"
    ]
    one, other = (checkpoints.load(name) for name in ("with", "without"))
    assert checkpoints.fingerprint_of(one["network"]) == checkpoints.fingerprint_of(
        other["network"]
    )


# ---- the table of runs ---------------------------------------------------------------------------


def test_without_any_run_there_is_no_table(run, place):
    (place / "models/other").mkdir(parents=True)
    (place / "models/other/checkpoint.old.pt").write_text("no checkpoint of ours")
    result = run("sample")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert "there is no run yet" in result.err


def test_the_table_tells_where_every_run_stands(run, place):
    paint(place / "pictures")
    assert run(*TRAIN, "--epochs=20").status == 0
    Path("models/broken").mkdir()
    Path("models/broken/checkpoint.pt").write_text("text")
    result = run("sample")
    assert (result.status, result.err.count("\n")) == (2, 1)
    head, broken, trained = (line.split() for line in result.out.splitlines())
    assert head == ["run", "images", "size", "epochs", "loss", "saved"]
    assert broken[:4] == ["broken", "cannot", "be", "read"]
    row = checkpoints.load("run")["log"][-1]
    assert trained[:7] == ["run", "10", "from", "pictures", "8x8", f"{row[1]:.1f}", f"{row[3]:.4f}"]
