"""Any picture: gray, color, transparent, of any shape, with classes, or made from a picture."""

import gc
import shlex

import numpy as np
import pytest
import torch
from conftest import TINY, files_below, paint
from PIL import Image

import ddpm
import utils
from machinery import checkpoints, processes, writing
from modules import UNet

# What a picture of each kind is made of: Pillow's mode, and a color that only this mode can tell
# from its neighbours'.
KINDS = {"L": ("L", 200), "RGB": ("RGB", (250, 40, 90)), "RGBA": ("RGBA", (250, 40, 90, 128))}
STEPS = "--steps=4"


def draw(folder, mode: str, count: int = 6, size: tuple[int, int] = (16, 8)):
    """Pictures of `mode`, `size` wide and high, no two alike."""
    kind, color = KINDS[mode]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture = Image.new(kind, size, 0 if mode == "L" else (0,) * len(color))
        picture.paste(color, (number, 1, number + 6, 6))
        picture.save(folder / f"{number}.png")
    return folder


@pytest.fixture
def train(run):
    def train_run(*words: str):
        flags = dict(
            word.partition("=")[::2]
            for word in (*TINY, "--run_name=run", "--dataset=pictures", *words)
        )
        return run(
            "train", *(f"{flag}={value}" if value else flag for flag, value in flags.items())
        )

    return train_run


def words_of(path) -> list[str]:
    """The words behind `python ddpm.py` of the command that made a PNG."""
    return shlex.split(Image.open(path).info["command"], comments=True)[2:]


def as_seen(path) -> np.ndarray:
    """A picture over white, (H, W, 4) in 0..255."""
    picture = Image.open(path).convert("RGBA")
    return np.asarray(
        Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    ).astype(int)


# ---- colors and shapes --------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["auto", "L", "RGB", "RGBA"])
@pytest.mark.parametrize("mode", KINDS)
def test_samples_are_in_the_mode_that_was_learned(place, train, run, mode, flag):
    """auto: gray for gray pictures, else color; white stands behind what is transparent."""
    draw(place / "pictures", mode)
    learned = {"auto": "L" if mode == "L" else "RGB"}.get(flag, flag)
    result = train("--epochs=1", f"--mode={flag}", "--img_size=8x16")
    assert result.status == 0, result.err
    assert {"L": "in gray", "RGB": "in color", "RGBA": "in color and alpha"}[learned] in result.out
    settings = checkpoints.load("run")["settings"]
    assert (settings["mode"], settings["img_size"]) == (learned, (8, 16))
    assert run("sample", "--run_name=run", "--n_img=3", STEPS).status == 0
    samples = sorted((place / "results/run/samples").glob("sample_*.png"))
    assert [(Image.open(path).mode, Image.open(path).size) for path in samples] == [
        (learned, (16, 8))
    ] * 3
    grid = Image.open(place / "results/run/samples/samples.png")
    assert (grid.mode, grid.size) == ("RGB", (32, 16))
    preview = Image.open(place / "results/run/training_progress/epoch_0001.png")
    assert (preview.mode, preview.size) == ("RGB", (64, 32))
    assert Image.open(place / "results/run/data.png").size == (48, 16)


@pytest.mark.parametrize("mode", KINDS)
def test_a_run_goes_on_in_its_own_mode(place, train, mode):
    """--mode=auto takes what the run has; another one is another run."""
    draw(place / "pictures", mode)
    assert train("--epochs=1", f"--mode={mode}").status == 0
    other = "RGB" if mode == "L" else "L"
    refused = train("--epochs=2", f"--mode={other}")
    assert refused.status == 2
    assert f"--mode was {mode}, is now {other}" in refused.err
    if mode != "RGBA":  # of transparent pictures auto makes color
        assert train("--epochs=2").status == 0
    assert train("--epochs=3", f"--mode={mode}").status == 0


@pytest.mark.parametrize(("learned", "of"), [("RGB", "L"), ("RGBA", "RGB"), ("L", "RGB")])
def test_auto_is_the_mode_of_the_run_that_goes_on(place, train, learned, of):
    """Also where it would be another mode for a new run."""
    draw(place / "pictures", of)
    assert train("--epochs=1", f"--mode={learned}").status == 0
    assert train("--epochs=2").status == 0
    assert checkpoints.load("run")["settings"]["mode"] == learned


def test_a_run_that_begins_from_another_has_its_mode(place, train, run):
    """Gray pictures for a network of colors, in the first call and in the next."""
    draw(place / "pictures", "RGB")
    draw(place / "gray", "L")
    assert train("--epochs=1").status == 0
    for epochs in (1, 2):
        result = run(
            "train",
            *TINY,
            "--dataset=gray",
            "--run_name=two",
            "--init_from=run",
            f"--epochs={epochs}",
        )
        assert result.status == 0, result.err
        told = "in color, not in gray, as the network of --init_from=run makes them"
        assert (told in result.out) == (epochs == 1)
    assert checkpoints.load("two")["settings"]["mode"] == "RGB"


def test_a_checkpoint_of_a_version_that_knew_no_modes_is_of_colors(place, train, run):
    draw(place / "pictures", "RGB")
    assert train("--epochs=1").status == 0
    stored = checkpoints.load("run")
    for name in ("mode", "classes", "conditional", "micro_batch", "grad_checkpointing"):
        del stored["settings"][name]
    checkpoints.save("run", **{name: value for name, value in stored.items() if name != "format"})
    assert run("sample", "--run_name=run", "--n_img=1", STEPS).status == 0
    assert train("--epochs=2").status == 0


def test_transparency_is_over_white_in_a_grid_and_kept_in_a_picture():
    """Colors are premultiplied: half-transparent full red is (128, 0, 0, 128)."""
    clear, half, solid = (0, 0, 0, 0), (128, 0, 0, 128), (10, 20, 30, 255)
    images = (
        torch.tensor([clear, half, solid], dtype=torch.uint8).view(3, 4, 1, 1).expand(-1, -1, 2, 2)
    )
    assert writing.over_white(images)[:, :, 0, 0].tolist() == [
        [255, 255, 255],
        [255, 127, 127],
        [10, 20, 30],
    ]
    assert [writing.to_pillow(image).getpixel((0, 0)) for image in images] == [
        clear,
        (255, 0, 0, 128),
        solid,
    ]


def test_colors_brighter_than_their_alpha_do_not_wrap_round():
    """A network knows no such rule."""
    images = torch.tensor([255, 100, 0, 100], dtype=torch.uint8).view(1, 4, 1, 1)
    assert writing.over_white(images).flatten().tolist() == [255, 255, 155]
    assert writing.to_pillow(images[0]).getpixel((0, 0)) == (255, 255, 0, 100)


# ---- classes -------------------------------------------------------------------------------------


@pytest.fixture
def classes(place):
    """Three folders of bright, dark and gray pictures."""
    for name, level in (("bright", 250), ("dark", 5), ("middle", 128)):
        folder = place / "pictures" / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), level + number).save(folder / f"{number}.png")


def test_a_grid_that_is_sent_to_another_process_is_no_larger_than_it_looks(
    three_classes, run, monkeypatch
):
    """A view of a batch would be sent with the whole batch, once for each image."""
    sent = []
    monkeypatch.setattr(processes, "gather", lambda what: sent.append(what) or [what])
    assert run("sample", "--run_name=run", "--n_img=12", STEPS).status == 0
    assert [image.untyped_storage().nbytes() for image in sent[0]] == [8 * 8] * 12


def test_without_the_flag_folders_are_mentioned_only(classes, train):
    result = train("--epochs=1")
    assert (
        "3 classes, such as bright, dark, middle; --conditional would tell them apart" in result.out
    )
    assert checkpoints.load("run")["settings"]["classes"] == ()


def test_a_network_learns_its_classes(classes, train, run, place):
    """In 180 steps it tells bright from dark from gray.

    Guidance 0 ignores the class, so that all come out alike.
    """
    result = train(
        "--conditional",
        "--epochs=60",
        "--lr=3e-3",
        "--objective=x0",
        "--schedule=cosine",
        "--ema_decay=0.9",
    )
    assert result.status == 0, result.err
    assert checkpoints.load("run")["settings"]["classes"] == ("bright", "dark", "middle")
    shades = {}
    for guidance in (0, 1, 2):
        sample = (
            "sample",
            "--run_name=run",
            "--n_img=12",
            f"--guidance={guidance}",
            f"--name=g{guidance}",
            "--steps=10",
        )
        assert run(*sample).status == 0
        for path in sorted((place / f"results/run/g{guidance}").glob("sample_*.png")):
            picture = Image.open(path)
            shades.setdefault((guidance, picture.info["label"]), []).append(
                np.asarray(picture).mean()
            )
    assert {len(of_class) for of_class in shades.values()} == {4}  # they take turns
    means = {key: np.mean(of_class) for key, of_class in shades.items()}
    for guidance in (1, 2):
        assert (
            means[guidance, "dark"] + 40
            < means[guidance, "middle"]
            < means[guidance, "bright"] - 40
        ), means
    ignored = [means[0, name] for name in ("bright", "dark", "middle")]
    told = [means[1, name] for name in ("bright", "dark", "middle")]
    assert np.ptp(ignored) < np.ptp(told), means


@pytest.fixture
def three_classes(classes, train):
    assert train("--conditional", "--epochs=1", "--lr=0.01").status == 0


def test_labels_choose_the_classes_and_their_rows(three_classes, run, place):
    for number, (label, rows, labels) in enumerate(
        (
            ("all", 3, ["bright", "dark", "middle", "bright", "dark"]),
            ("middle", None, ["middle"] * 5),
            ("dark,bright", 2, ["dark", "bright", "dark", "bright", "dark"]),
        )
    ):
        assert (
            run(
                "sample",
                "--run_name=run",
                "--n_img=5",
                STEPS,
                f"--label={label}",
                f"--name=n{number}",
            ).status
            == 0
        )
        folder = place / f"results/run/n{number}"
        paths = sorted(folder.glob("sample_*.png"))
        assert [Image.open(path).info["label"] for path in paths] == labels
        grid = np.asarray(Image.open(folder / "samples.png"))
        if rows:
            columns = -(-5 // rows)
            assert grid.shape == (8 * rows, 8 * columns, 3)
            for number, path in enumerate(paths):  # image i stands in row i % rows
                row, column = number % rows, number // rows
                tile = grid[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                assert np.array_equal(tile[:, :, 0], np.asarray(Image.open(path)))


@pytest.mark.parametrize(
    "names, order",
    [
        (["1", "10", "2"], ["1", "2", "10"]),
        (["10", "2", "1"], ["10", "2", "1"]),  # as typed
        (["a10b2", "a10b10", "a9"], ["a10b2", "a10b10", "a9"]),
        (["a10b10", "a10b2", "a9"], ["a9", "a10b2", "a10b10"]),
        (["010", "02", "1", "9" * 5000], ["1", "02", "010", "9" * 5000]),
        (["Dog", "cat", "dog"], ["Dog", "cat", "dog"]),
        ([], []),
    ],
)
def test_names_with_numbers_come_in_the_order_of_these_unless_somebody_chose_another(names, order):
    assert [names[number] for number in writing.natural_order(names)] == order


def test_rows_of_a_grid_are_in_natural_order_and_named(place, train, run):
    """The classes 1, 10 and 2, at levels that tell them apart; which image is of which stays."""
    for name, level in (("1", 5), ("2", 128), ("10", 250)):
        folder = place / "pictures" / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), level + number).save(folder / f"{number}.png")
    result = train("--conditional", "--epochs=1", "--lr=0.01", "--sample_every=1")
    told = "rows from the top: 1, 2, 10"
    assert f"in the previews: {told}" in result.out
    with Image.open(place / "results/run/training_progress/epoch_0001.png") as preview:
        assert preview.text["classes of the rows"] == "1,2,10"
    result = run("sample", "--run_name=run", "--n_img=6", STEPS, "--gif")
    assert f"samples.png; its {told}\n" in result.out
    folder = place / "results/run/samples"
    images = [Image.open(path) for path in sorted(folder.glob("sample_*.png"))]
    assert [image.info["label"] for image in images] == ["1", "10", "2"] * 2, "as ever"
    with Image.open(folder / "samples.png") as picture:
        assert picture.text["classes of the rows"] == "1,2,10"
        grid = np.asarray(picture)[:, :, 0]
    for row, number in enumerate((0, 2, 1)):
        for column in (0, 1):
            tile = grid[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert np.array_equal(tile, np.asarray(images[number + 3 * column]))
    with Image.open(folder / "samples.gif") as film:
        film.seek(film.n_frames - 1)
        assert np.abs(np.asarray(film.convert("L"), int)[:, :16] - grid).max() <= 2
    result = run("sample", "--run_name=run", "--n_img=2", STEPS)
    assert "; its images from the top: 1, 10\n" in result.out
    # what the grid's own command makes looks the same
    with Image.open(folder / "samples.png") as picture:
        words = shlex.split(picture.text["command"])[2:]
    assert run(*words, "--name=again").status == 0
    with Image.open(place / "results/run/again/samples.png") as picture:
        assert np.array_equal(np.asarray(picture)[:, :, 0], grid)


def test_the_command_in_an_image_makes_it_again(three_classes, run, place):
    """Of a batch that begins with another class than the first, too."""
    assert (
        run(
            "sample",
            "--run_name=run",
            "--n_img=7",
            "--batch_size=2",
            STEPS,
            "--guidance=3",
            "--seed=5",
        ).status
        == 0
    )
    for number in (1, 4, 7):
        path = place / f"results/run/samples/sample_{number:04d}.png"
        assert run(*words_of(path), f"--name=again_{number}").status == 0
        again = f"sample_{1 if number == 7 else 2 - number % 2:04d}.png"
        copy = Image.open(place / f"results/run/again_{number}" / again)
        assert copy.info["label"] == Image.open(path).info["label"]
        assert np.array_equal(np.asarray(copy), np.asarray(Image.open(path)))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["--label=bright,drak"],
            "--label=drak is not a class of this run; did you mean dark? (there are: bright, dark",
        ),
        (["--label=bright,"], "--label=bright, has an empty name"),
        (["--guidance=-1"], "--guidance=-1 is out of range"),
        (["--strength=0.5"], "--strength=0.5 needs an image to change"),
        (["--mask=pictures/dark/0.png"], "--mask=pictures/dark/0.png needs an image to inpaint"),
        (["--init_image=nowhere.png"], "--init_image=nowhere.png is not a file"),
    ],
)
def test_what_a_run_cannot_do_is_refused(three_classes, run, place, words, reason):
    before = files_below(place)
    result = run("sample", "--run_name=run", *words)
    assert (result.status, files_below(place)) == (2, before)
    assert reason in result.err


@pytest.mark.parametrize("option", ["--label=bright", "--guidance=3"])
def test_classes_are_for_runs_that_know_them(place, train, run, option):
    draw(place / "pictures", "RGB")
    assert train("--epochs=1").status == 0
    result = run("sample", "--run_name=run", option)
    assert (result.status, f"{option} is for class-conditional runs" in result.err) == (2, True)


def test_a_run_goes_on_with_its_classes_or_not_at_all(three_classes, train, run, place):
    refused = train("--epochs=2", "--lr=0.01")
    assert refused.status == 2
    assert "--conditional was True, is now False" in refused.err
    assert train("--conditional", "--epochs=2", "--lr=0.01").status == 0
    paint(place / "flat")
    refused = run("train", *TINY, "--dataset=flat", "--run_name=other", "--init_from=run")
    assert refused.status == 2
    assert "--conditional=True" in refused.err


def test_forgotten_labels_are_those_of_a_tenth(monkeypatch, classes, train):
    """A network that always knew the class could not be guided away from having none."""
    seen, forward = [], UNet.forward

    def note(self, x, t, labels=None, *inputs):
        if self.training:
            seen.append(labels)
        return forward(self, x, t, labels, *inputs)

    monkeypatch.setattr(UNet, "forward", note)
    assert train("--conditional", "--epochs=100", "--batch_size=12").status == 0
    labels = torch.cat([batch for batch in seen if batch is not None])
    shares = labels.bincount(minlength=4) / len(labels)
    assert abs(shares[3] - ddpm.CONDITION_DROPOUT) < 0.035  # four standard errors of 1,200 draws
    assert (shares[:3] - 0.3).abs().max() < 0.02


@pytest.mark.parametrize("mode", KINDS)
def test_a_stopped_run_of_classes_goes_on_to_the_bit(place, train, run, monkeypatch, mode):
    """In every mode: dropped labels, flips, noise and dropout hang on the step alone."""
    for name in ("one", "two"):
        draw(place / "pictures" / name, mode, count=3 if name == "one" else 4)
    words = (
        "--conditional",
        f"--mode={mode}",
        "--img_size=8x16",
        "--dropout=0.2",
        "--epochs=4",
        "--save_every=0",
    )
    assert train(*words).status == 0
    whole = checkpoints.load("run")
    (place / "models").rename(place / "before")
    batch_indices, places = utils.batch_indices, []

    def stop_at_the_fourth(*numbers):
        places.append(numbers)
        if len(places) == 4:
            raise KeyboardInterrupt
        return batch_indices(*numbers)

    monkeypatch.setattr(utils, "batch_indices", stop_at_the_fourth)
    assert train(*words).status == 130
    assert checkpoints.load("run")["step"] == 3
    gc.collect()  # the lock is in a circle with the error
    assert train(*words).status == 0
    again = checkpoints.load("run")
    assert [row[:-1] for row in again["log"]] == [row[:-1] for row in whole["log"]]
    for kind in ("network", "average"):
        assert all(torch.equal(weight, whole[kind][name]) for name, weight in again[kind].items())
    for number, batch_size in ((1, 2), (2, 3)):  # and its images hang on seed and class alone
        sample = (
            "sample",
            "--run_name=run",
            "--n_img=5",
            f"--batch_size={batch_size}",
            f"--name=n{number}",
            STEPS,
        )
        assert run(*sample).status == 0
    one, two = (sorted((place / f"results/run/n{number}").glob("*_0*")) for number in (1, 2))
    differences = [np.abs(as_seen(a) - as_seen(b)).max() for a, b in zip(one, two, strict=True)]
    assert max(differences) <= (2 if mode == "RGBA" else 1)  # a level in a color, one in alpha


# ---- from a picture ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", KINDS)
def test_black_of_a_mask_is_kept_to_the_pixel_in_every_mode(place, train, run, mode):
    draw(place / "pictures", mode)
    assert train("--epochs=1", f"--mode={mode}", "--img_size=8x16").status == 0
    mask = Image.new("L", (16, 8), 255)
    mask.paste(0, (0, 0, 6, 8))
    mask.save(place / "mask.png")
    begin = ("--init_image=pictures/2.png", "--mask=mask.png", "--strength=0.9")
    assert run("sample", "--run_name=run", "--n_img=2", STEPS, *begin).status == 0
    source = np.asarray(Image.open(place / "pictures/2.png"))
    for number in (1, 2):
        path = place / f"results/run/samples/sample_{number:04d}.png"
        image = np.asarray(Image.open(path))
        kept = np.abs(image[:, :6].astype(int) - source[:, :6])
        assert kept.max() <= (1 if mode == "RGBA" else 0)  # 40 times 128 / 255 is rounded, and back
        assert (image[:, 6:] != source[:, 6:]).any()
        again = words_of(path)
        assert {"--init_image=pictures/2.png", "--mask=mask.png", "--strength=0.9"} <= {*again}


def test_no_strength_gives_the_picture_back_and_films_it(place, train, run):
    draw(place / "pictures", "RGB", size=(8, 8))
    assert train("--epochs=1").status == 0
    begin = ("--init_image=pictures/1.png", "--strength=0")
    assert run("sample", "--run_name=run", "--n_img=2", STEPS, "--gif", *begin).status == 0
    image = Image.open(place / "results/run/samples/sample_0002.png")
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(place / "pictures/1.png")))
