"""What `sample` promises: an image hangs on its seed alone, nothing is overwritten."""

import errno
import inspect
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, files_below, paint, refused
from PIL import Image

import ddpm
from machinery import basics, checkpoints, command_line, devices, writing

NOISE_STEPS = 30
RUN = Path("results/tiny")
CHECKPOINT, PREVIOUS = Path("models/tiny/checkpoint.pt"), Path("models/tiny/checkpoint.previous.pt")
TRAIN = ("train", "--dataset=pictures", "--run_name=tiny", f"--noise_steps={NOISE_STEPS}")
# A high rate: after 20 steps the network has to have a say in the pictures.
TRAIN += (*(word for word in TINY if not word.startswith("--lr=")), "--lr=0.01")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A place with a trained run, its checkpoint and the one before: made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        paint(Path("pictures"))
        for epochs in (7, 8):
            command_line.plan("ddpm.py", {"train": ddpm.train}, [*TRAIN, f"--epochs={epochs}"])()
        return Path.cwd()


@pytest.fixture
def sample(run, trained, place):
    """Sample from that run, in a place that holds its models/ and nothing else."""
    shutil.copytree(trained / "models", place / "models")

    def sample_words(*words: str):
        return run("sample", "--run_name=tiny", "--device=cpu", *words)

    return sample_words


@pytest.fixture
def float32(monkeypatch):
    """What any processor computes, with or without bfloat16."""
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, dtype=int)  # (H, W, 3)


def images(folder: str = "samples") -> np.ndarray:
    """The single images in a folder, in the order of their numbers."""
    return np.stack(
        [pixels(path) for path in sorted((RUN / folder).glob("sample_*.png"))]
    )  # (N, H, W, 3)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes()
        for name in files_below(folder)
        if (folder / name).is_file()
    }


# ---- an image hangs on its seed alone ------------------------------------------------------------

# n_img, batch_size; each against 20 images in batches of 16
LAYOUTS = ((1, 1), (5, 3), (20, 3), (20, 1))


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_an_image_does_not_depend_on_the_others(sample, float32, sampler):
    """One level of 255: the kernels add in another order where a batch has another size."""
    assert sample("--n_img=20", "--batch_size=16", f"--sampler={sampler}", "--steps=5").status == 0
    for number, (n_img, batch_size) in enumerate(LAYOUTS, 2):
        words = (
            f"--n_img={n_img}",
            f"--batch_size={batch_size}",
            f"--sampler={sampler}",
            "--steps=5",
        )
        assert sample(*words).status == 0
        assert abs(images(f"samples_{number}") - images()[:n_img]).max() <= 1


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_an_image_hardly_depends_on_the_others_in_bfloat16(sample, sampler):
    """35 dB: an error of 4.5 levels, hardly seen.

    bfloat16 has 3 digits, and the order of additions costs the last.
    """
    if not devices.has_bfloat16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16")
    assert sample("--n_img=20", "--batch_size=16", f"--sampler={sampler}", "--steps=5").status == 0
    for number, (n_img, batch_size) in enumerate(LAYOUTS, 2):
        words = (
            f"--n_img={n_img}",
            f"--batch_size={batch_size}",
            f"--sampler={sampler}",
            "--steps=5",
        )
        assert sample(*words).status == 0
        errors = ((images(f"samples_{number}") - images()[:n_img]) ** 2).mean(axis=(1, 2, 3))
        assert errors.max() < 255**2 / 10**3.5


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_all_noise_is_drawn_from_the_seed_of_its_image(sample, monkeypatch, sampler):
    """The starting noise, and the fresh noise of ddpm, to the bit.

    Image i is told by NumPy's generator of seed + i.
    """
    drawn, denoise = [], ddpm.Diffusion.denoise

    def listen(self, predict_clean, x_t, path, sampler, draw_noise):
        batch = [x_t]
        drawn.append(batch)
        return denoise(
            self, predict_clean, x_t, path, sampler, lambda: batch.append(draw_noise()) or batch[-1]
        )

    monkeypatch.setattr(ddpm.Diffusion, "denoise", listen)
    draws = 4 if sampler == "ddpm" else 1  # none is added in the last of the 4 steps
    for n_img, batch_size, seed in ((7, 16, 0), (7, 3, 0), (5, 1, 2)):
        drawn.clear()
        words = (
            f"--n_img={n_img}",
            f"--batch_size={batch_size}",
            f"--seed={seed}",
            f"--sampler={sampler}",
        )
        assert sample(*words, "--steps=4").status == 0
        noise = torch.cat([torch.stack(batch, dim=1) for batch in drawn])  # (N, draws, 3, H, W)
        generators = [np.random.default_rng(seed + number) for number in range(n_img)]
        expected = [rng.standard_normal((draws, 3, 8, 8), dtype=np.float32) for rng in generators]
        assert torch.equal(noise, torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_seeds_count_on(sample, sampler):
    """Image 4 of seed 0 is image 2 of seed 2, and image 1 of seed 3.

    The same file, in batches of the same size.
    """
    for seed in (0, 2, 3):
        words = (
            f"--n_img={4 - seed}",
            f"--seed={seed}",
            f"--name=from_{seed}",
            f"--sampler={sampler}",
            "--steps=5",
        )
        assert sample(*words, "--batch_size=1").status == 0
    files = [contents(RUN / f"from_{seed}")[f"sample_{4 - seed:04d}.png"] for seed in (0, 2, 3)]
    assert files[0] == files[1] == files[2]
    assert len({image.tobytes() for image in images("from_0")}) == 4


# ---- what is asked for counts --------------------------------------------------------------------


def test_samplers_and_steps_change_the_pictures(sample, float32):
    shown = []
    for number, (sampler, steps) in enumerate(itertools.product(ddpm.SAMPLERS, (4, 8))):
        words = (f"--name=way_{number}", f"--sampler={sampler}", f"--steps={steps}", "--n_img=2")
        assert sample(*words).status == 0
        shown.append(images(f"way_{number}"))
    for one, two in itertools.combinations(shown, 2):
        assert abs(one - two).max() > 1  # more than rounding


@pytest.mark.parametrize(
    "part, is_used", [("average", True), ("network", False), ("optimizer", False)]
)
def test_the_averaged_weights_make_the_images(sample, part, is_used):
    assert sample("--n_img=2").status == 0
    state = torch.load(CHECKPOINT, weights_only=True)
    weights = state["optimizer"]["state"][0] if part == "optimizer" else state[part]
    for weight in weights.values():
        weight.zero_()
    torch.save(state, CHECKPOINT)
    assert sample("--n_img=2").status == 0
    assert (abs(images("samples_2") - images()).max() > 1) == is_used


def test_all_steps_of_the_paper_can_be_walked_and_no_more(sample):
    assert sample("--sampler=ddpm", f"--steps={NOISE_STEPS}", "--n_img=1").status == 0
    refused = sample(f"--steps={NOISE_STEPS + 1}", "--name=refused")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert f"--steps=31 is more than the {NOISE_STEPS} noising steps" in refused.err
    assert not (RUN / "refused").exists()


@pytest.mark.parametrize(
    "img_size, shape, is_other",
    [("16", (16, 16), True), ("6x10", (6, 10), True), ("8x8", (8, 8), False)],
)
def test_another_size_is_made_with_a_remark(sample, img_size, shape, is_other):
    result = sample(f"--img_size={img_size}", "--n_img=2", "--steps=2")
    assert result.status == 0
    assert ("tiny was trained at 8x8; another size may look worse" in result.out) == is_other
    assert images().shape == (2, *shape, 3)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_img, rows, columns", [(1, 1, 1), (2, 1, 2), (4, 2, 2), (5, 2, 3), (11, 3, 4)]
)
def test_the_grid_shows_the_single_images_in_their_order(sample, n_img, rows, columns):
    assert sample(f"--n_img={n_img}", "--img_size=4x8", "--batch_size=3", "--steps=3").status == 0
    singles = [f"sample_{number:04d}.png" for number in range(1, n_img + 1)]
    assert files_below(RUN / "samples") == {*singles, "samples.png"}
    grid = pixels(RUN / "samples/samples.png")
    assert grid.shape == (4 * rows, 8 * columns, 3)
    cells = grid.reshape(rows, 4, columns, 8, 3).swapaxes(1, 2).reshape(-1, 4, 8, 3)
    assert np.array_equal(cells[:n_img], images())
    assert not cells[n_img:].any()


@pytest.mark.parametrize(
    "words", [("--save_grid=no",), ("--nosave_grid",), ("--save_grid", "false")]
)
def test_the_grid_can_be_left_out(sample, words):
    assert sample("--n_img=2", "--steps=1", *words).status == 0
    assert files_below(RUN / "samples") == {"sample_0001.png", "sample_0002.png"}


def test_the_grid_holds_the_first_images_only(sample, monkeypatch):
    monkeypatch.setattr(writing, "GRID_IMAGES", 4)
    result = sample("--n_img=7", "--batch_size=3", "--steps=1")
    assert "4 of them in one" in result.out
    assert pixels(RUN / "samples/samples.png").shape == (16, 16, 3)
    assert len(images()) == 7


@pytest.mark.parametrize(
    "n_img, first, last", [(9_999, "0001", "9999"), (10_000, "00001", "10000")]
)
def test_numbers_grow_with_the_number_of_images(sample, monkeypatch, n_img, first, last):
    """So that names are in order; pictures of this number are neither made nor written here."""
    names = []
    monkeypatch.setattr(
        ddpm,
        "generate",
        lambda net, diffusion, seeds, *_, **__: [(torch.zeros(len(seeds), 3, 1, 1), None)],
    )
    monkeypatch.setattr(writing, "save_png", lambda image, path, *_, **__: names.append(path.stem))
    assert sample(f"--n_img={n_img}", "--batch_size=1000").status == 0
    *singles, grid = names
    singles.sort()  # they are written at the same time
    assert (singles[0], singles[-1], grid) == (f"sample_{first}", f"sample_{last}", "samples")
    assert [int(name.removeprefix("sample_")) for name in singles] == list(range(1, n_img + 1))


def test_a_picture_that_cannot_be_written_is_an_error(sample, monkeypatch):
    """Said at the end of its batch: the others of that are there, no later ones."""
    save_png = writing.save_png

    def save_all_but_one(image: torch.Tensor, path: Path, **facts) -> None:
        if path.stem == "sample_0003":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_png(image, path, **facts)

    monkeypatch.setattr(writing, "save_png", save_all_but_one)
    result = sample("--n_img=12", "--batch_size=4", "--steps=1")
    assert (result.status, result.err) == (
        2,
        f"ddpm.py: {RUN / 'samples/sample_0003.png'}: No space left on device\n",
    )
    assert files_below(RUN / "samples") == {f"sample_{number:04d}.png" for number in (1, 2, 4)}


def test_every_picture_tells_how_it_was_made(sample):
    assert (
        sample(
            "--n_img=3", "--seed=40", "--sampler=ddim", "--steps=5", "--batch_size=2", "--name=told"
        ).status
        == 0
    )
    # 8 epochs of 10, 4 a step
    facts = {"run": "tiny", "step": "20", "sampler": "ddim", "steps": "5", "device": "cpu"}
    facts["weights"] = checkpoints.fingerprint_of(checkpoints.load("tiny")["average"])
    for name, seed in (("sample_0001", "40"), ("sample_0003", "42"), ("samples", "40")):
        with Image.open(RUN / f"told/{name}.png") as picture:
            assert picture.text.pop("command").startswith("python ddpm.py sample --run_name=tiny ")
            precision = devices.precision_of("auto", torch.device("cpu"))
            assert picture.text.pop("computed_in") == str(precision).removeprefix("torch.")
            assert picture.text == facts | {"seed": seed}


@pytest.mark.parametrize(
    "how", [("--sampler=ddpm", "--steps=5"), ("--img_size=16", "--steps=3", "--seed=1000")]
)
def test_the_command_in_a_picture_makes_it_again_to_the_pixel(sample, run, how):
    assert sample("--n_img=5", "--batch_size=3", *how).status == 0
    for name in ("sample_0001", "sample_0003", "sample_0005", "samples"):
        with Image.open(RUN / f"samples/{name}.png") as picture:
            command, _, comment = picture.text["command"].partition("  # this is ")
        assert f"--batch_size={2 if name == 'sample_0005' else 3}" in command
        _, _, *words = shlex.split(command)
        assert run(*words, "--name=again", "--device=cpu").status == 0
        again = comment.split()[0] if comment else "samples.png"
        assert np.array_equal(pixels(RUN / "again" / again), pixels(RUN / f"samples/{name}.png"))
        shutil.rmtree(RUN / "again")


@pytest.mark.parametrize("how", [("--interpolate=3,9",), ("--seed=3", "--variation=0.2")])
def test_the_command_in_a_picture_between_seeds_makes_all_of_them(sample, run, how):
    """Such a picture depends on its number: it has no seed of its own to begin with."""
    assert sample("--n_img=5", "--batch_size=2", "--steps=3", *how).status == 0
    with Image.open(RUN / "samples/sample_0004.png") as picture:
        command, _, comment = picture.text["command"].partition("  # this is ")
        assert "seed" not in picture.text
    _, _, *words = shlex.split(command)
    assert {"--n_img=5", "--batch_size=2", *how} <= {*words}
    assert run(*words, "--name=again", "--device=cpu").status == 0
    assert comment == "sample_0004.png there"
    assert np.array_equal(images("again"), images())


# ---- between seeds -------------------------------------------------------------------------------


def test_between_two_noises_lies_an_arc():
    """Of vectors at right angles and of one length, all points in between have that length."""
    first, second = np.float32([3, 0, 4]), np.float32([0, 5, 0])
    assert np.array_equal(basics.between(first, second, 0), first)
    assert np.array_equal(basics.between(first, second, 1), second)
    middle = basics.between(first, second, 0.5)
    assert np.allclose(middle, (first + second) / np.sqrt(2))
    third = basics.between(first, second, 1 / 3)
    assert np.allclose((third @ first / 25, third @ second / 25), (np.sqrt(0.75), 0.5))
    assert np.allclose(basics.between(first, first, 0.3), first)
    assert third.dtype == np.float32


@pytest.mark.parametrize("sampler", [ddpm.USUAL.sampler, "ddpm"])
def test_an_interpolation_leads_from_seed_to_seed(sample, float32, sampler):
    how = (f"--sampler={sampler}", "--steps=4", "--batch_size=1")
    result = sample("--n_img=5", "--interpolate=3,9", *how)
    assert (result.status, "interpolation.gif" in result.out) == (0, True)
    for number, seed in ((0, 3), (4, 9)):
        assert sample("--n_img=1", f"--seed={seed}", f"--name=from_{seed}", *how).status == 0
        assert np.array_equal(images(f"from_{seed}")[0], images()[number])
    moves = [abs(a - b).mean() for a, b in itertools.pairwise(images())]
    assert max(moves) < abs(images()[0] - images()[-1]).mean()
    with Image.open(RUN / "samples/interpolation.gif") as film:
        assert (film.n_frames, film.size) == (5, (8, 8))


def test_variations_are_nearer_than_other_seeds_and_begin_with_the_seed(sample):
    assert sample("--n_img=9", "--seed=3", "--steps=4").status == 0
    for number, variation in ((2, 0.01), (3, 0.2), (4, 1)):
        words = ("--n_img=9", "--seed=3", "--steps=4", f"--variation={variation}")
        assert sample(*words).status == 0
        assert np.array_equal(images(f"samples_{number}")[0], images()[0])
    differences = [
        abs(images(f"samples_{number}")[1:] - images()[0]).mean() for number in (2, 3, 4)
    ]
    assert differences == sorted(differences)
    assert abs(images("samples_4") - images()).max() <= 1  # 1 is the other seed itself


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--interpolate=3"], "--interpolate=3 is not two seeds"),
        (["--interpolate=1,2,3"], "is not two seeds"),
        (["--interpolate=-1,2"], "--interpolate=-1 is out of range"),
        (["--interpolate=3,9", "--seed=1"], "leave out --seed=1"),
        (["--interpolate=3,9", "--variation=0.5"], "leave out --variation=0.5"),
        (["--interpolate=3,9", "--n_img=1"], "2 to 256; 1 is not"),
        (["--interpolate=3,9", "--n_img=257"], "2 to 256; 257 is not"),
        (["--variation=1.5"], "--variation=1.5 is out of range"),
    ],
)
def test_what_is_not_between_two_seeds_is_refused(sample, words, reason):
    assert reason in refused(sample(*words))
    assert not RUN.exists()


# ---- what a picture and a film show --------------------------------------------------------------


def test_other_weights_have_another_fingerprint():
    weights = {"one": torch.zeros(3), "two": torch.zeros(2, 2)}
    known = {checkpoints.fingerprint_of(weights)}
    known.add(
        checkpoints.fingerprint_of(weights | {"two": torch.tensor([[0.0, 0.0], [0.0, 1e-30]])})
    )
    known.add(checkpoints.fingerprint_of({"one": torch.zeros(3), "too": torch.zeros(2, 2)}))
    assert len(known) == 3
    strided = weights | {"two": torch.zeros(2, 2).t()}
    assert checkpoints.fingerprint_of(strided) in known


@pytest.mark.parametrize("batch_size", [1, 6, 16, 20])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_film_ends_with_the_images(sample, steps, batch_size):
    """Left what there is, right what it is taken for, of the first 16 images.

    At last both are the image. They may come in several batches.
    """
    result = sample("--n_img=20", f"--steps={steps}", "--gif", f"--batch_size={batch_size}")
    assert result.status == 0
    assert "the denoising of 16 as a GIF" in result.out
    with Image.open(RUN / "samples/samples.gif") as film:
        assert film.n_frames == steps
        assert film.size == (2 * 32, 32)
        left, right = np.split(np.asarray(film.convert("RGB"), dtype=int), 2, axis=1)
        assert (abs(left - right).max() > 0) == (steps > 1)
        assert steps == 1 or (steps - 1) * film.info["duration"] > 1900  # however few, to be seen
        film.seek(film.n_frames - 1)
        assert film.info["duration"] >= 3000
        left, right = np.split(np.asarray(film.convert("RGB"), dtype=int), 2, axis=1)
    assert abs(left - right).max() == 0
    shown = images()[:16].reshape(4, 4, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(32, 32, 3)
    assert abs(left - shown).mean() < 16  # 256 colors have to do for what is nearly noise


def test_a_long_walk_is_filmed_in_fifty_frames(sample, monkeypatch):
    """Evenly: the brightness of these images says which of 1,000 steps a frame shows."""
    walk = [
        (torch.full((1, 3, 8, 8), step / 500 - 1), torch.zeros(1, 3, 8, 8))
        for step in range(1, 1001)
    ]
    stored = ddpm.load_run("tiny")
    stored["settings"]["noise_steps"] = 1000
    monkeypatch.setattr(ddpm, "load_run", lambda name: stored)
    monkeypatch.setattr(ddpm, "generate", lambda *_, **__: walk)
    assert sample("--n_img=1", "--steps=1000", "--gif").status == 0
    with Image.open(RUN / "samples/samples.gif") as film:
        assert film.n_frames == writing.GIF_FRAMES
        levels = []
        for frame in range(film.n_frames):
            film.seek(frame)
            levels.append(film.convert("RGB").getpixel((0, 0))[0])
    assert np.abs(np.diff(levels) - 255 / 50).max() <= 1


def test_the_same_command_makes_the_same_files_beside_the_first(sample):
    for _ in range(3):
        assert sample("--n_img=3", "--sampler=ddpm", "--steps=5").status == 0
    assert {path.name for path in RUN.iterdir()} == {"samples", "samples_2", "samples_3"}
    first, second, third = (contents(RUN / name) for name in ("samples", "samples_2", "samples_3"))
    assert len(first) == 4
    assert first == second == third


def test_without_a_name_the_run_that_train_made_without_one_is_taken(sample, run):
    assert run("sample", "--n_img=1", "--steps=1").status == 2  # there is none: all are listed
    shutil.copytree("models/tiny", "models/untitled")
    result = run("sample", "--n_img=1", "--steps=1", "--device=cpu")
    assert (result.status, result.err) == (0, "")
    assert files_below(Path("results/untitled/samples")) == {"sample_0001.png", "samples.png"}
    assert inspect.signature(ddpm.train).parameters["run_name"].default == "untitled"


def test_nothing_in_the_way_is_overwritten(sample):
    RUN.mkdir(parents=True)
    (RUN / "samples").write_text("a file")
    (RUN / "samples_2").mkdir()
    result = sample("--n_img=1", "--steps=1")
    assert result.status == 0
    assert str(RUN / "samples_3") in result.out
    assert (RUN / "samples").read_text() == "a file"
    assert not files_below(RUN / "samples_2")
    assert files_below(RUN / "samples_3") == {"sample_0001.png", "samples.png"}


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_to_nowhere_is_named(sample):
    Path("results").mkdir()
    RUN.symlink_to("nowhere")
    result = sample("--n_img=1", "--steps=1")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert str(RUN) in result.err


def test_two_at_the_same_time_do_not_share_a_folder(sample, monkeypatch):
    """The second begins when the first has not written anything."""
    walk = ddpm.generate

    def let_another_go_first(*inputs, **options):
        monkeypatch.setattr(ddpm, "generate", walk)
        ddpm.sample(run_name="tiny", n_img=2, seed=7, steps=1, device="cpu")
        return walk(*inputs, **options)

    monkeypatch.setattr(ddpm, "generate", let_another_go_first)
    assert sample("--n_img=2", "--steps=1").status == 0
    seeds = {}
    for path in RUN.glob("*/sample_*.png"):
        with Image.open(path) as picture:
            seeds.setdefault(path.parent.name, set()).add(picture.text["seed"])
    assert seeds == {"samples": {"0", "1"}, "samples_2": {"7", "8"}}


def test_nothing_is_written_outside_results(sample, place):
    before = contents(place)
    assert sample("--n_img=2", "--steps=1", "--name=here").status == 0
    written = {
        f"results/tiny/here/{name}.png" for name in ("sample_0001", "sample_0002", "samples")
    }
    after = contents(place)
    assert after.keys() - before.keys() == written
    assert {name: after[name] for name in before} == before


# ---- how soon ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sample", "train"])
def test_it_begins_without_what_takes_a_second_to_import(here, command):
    """Torchvision, PyTorch's compiler and what these bring along; a training draws its curves."""
    slow = ["torchvision", "torch._dynamo", "sympy", "scipy"]
    words = ["sample", "--run_name=tiny", "--device=cpu", "--gif"]
    if command == "train":
        words = [*TRAIN, "--run_name=new", "--epochs=1"]
        words.remove("--run_name=tiny")
    code = f"import sys; sys.argv[1:] = {words}; import ddpm; ddpm.main()"
    code += f"; sys.exit('slow: ' + str([name for name in {slow} if name in sys.modules]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = [sys.executable, "-c", code]
    end = subprocess.run(process, env=environment, capture_output=True, text=True)
    assert end.stderr.splitlines()[-1] == "slow: []"


# ---- runs ----------------------------------------------------------------------------------------


def test_with_a_wrong_run_those_there_are_get_listed(sample, run, place):
    shutil.copytree("models/tiny", "models/another")
    (place / "models/empty").mkdir()
    result = run("sample", "--run_name=tniy")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.endswith("runs there are: another, tiny\n")
    assert not Path("results").exists()


def test_without_any_run_none_is_listed(run, place):
    """But where it was looked for one."""
    where = f"{place.resolve() / 'models'}"
    told = run("sample", "--run_name=tiny").err
    assert told.endswith(f"runs there are: none yet in {where}\n")
    assert f"there is no run yet in {where}; " in run("sample").err


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda path: os.truncate(path, path.stat().st_size // 2)]
)
def test_the_checkpoint_before_is_used_where_the_newest_cannot(sample, spoil):
    spoil(CHECKPOINT)
    result = sample("--n_img=1", "--steps=1")
    assert result.status == 0
    assert f"{CHECKPOINT} cannot be read" in result.out
    assert f"{PREVIOUS.name}, the one before it, is used" in result.out
    with Image.open(RUN / "samples/sample_0001.png") as picture:
        assert picture.text["step"] == "18"  # of 7 epochs


def test_without_a_readable_checkpoint_nothing_is_made(sample):
    for path in (CHECKPOINT, PREVIOUS):
        os.truncate(path, 1000)
    result = sample()
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"{PREVIOUS} cannot be read" in result.err
    assert not Path("results").exists()


def test_a_run_can_be_sampled_while_it_is_trained_and_after_a_stop(sample, run, place, monkeypatch):
    paint(place / "pictures")
    shutil.rmtree("models")
    loss, sampled = ddpm.Diffusion.loss, []

    def stop_in_step_3(*inputs):
        sampled.append(CHECKPOINT.exists())
        if len(sampled) == 3:
            ddpm.sample(run_name="tiny", n_img=1, steps=1, name="during", device="cpu")
            signal.raise_signal(signal.SIGTERM)
        return loss(*inputs)

    monkeypatch.setattr(ddpm.Diffusion, "loss", stop_in_step_3)
    assert run(*TRAIN, "--epochs=8", "--save_every=0").status == 143
    assert sample("--n_img=1", "--steps=1", "--name=after").status == 0
    for folder, step in (("during", "2"), ("after", "3")):
        with Image.open(RUN / folder / "sample_0001.png") as picture:
            assert picture.text["step"] == step
