"""Image to image: what a network is shown, pairs of files, and what is made of them."""

import csv
import itertools
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, awaken, paint, refused
from PIL import Image

import ddpm
import utils
from machinery import checkpoints, command_line, devices, input_files, inputs, reading, runs, tiles
from modules import UNet
from tools import distill, evaluate, fidelity, play_images, steps

TRAIN = ["train", *TINY, "--dataset=pictures", "--noise_steps=8", "--epochs=2"]
KINDS = ("@gray", "@small:2", "@edges", "@masked")


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def a_network(**shape) -> UNet:
    """A tiny network whose output is not zero."""
    torch.manual_seed(0)
    shape = {"img_size": 8, "width": 16, "multipliers": (1, 2), "blocks": 1} | shape
    network = UNet(**shape).eval()
    awaken(network)
    return network


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A place with pictures, and a run of each made kind and of pairs, named after these."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        paint(Path("pictures"), 6, size=(8, 8))
        paint(Path("drawings"), 6, size=(8, 8), first_seed=0)
        for kind in (*KINDS, "drawings"):
            words = [*TRAIN, f"--inputs={kind}", f"--run_name={name_of(kind)}"]
            command_line.plan("ddpm.py", {"train": ddpm.train}, words)()
    return place


def name_of(kind: str) -> str:
    return kind.strip("@").partition(":")[0]


# ---- what is made --------------------------------------------------------------------------------


def test_gray_is_luma_and_transparent_pixels_are_white():
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert torch.allclose(inputs.gray(red), torch.tensor(2 * 0.299 - 1), atol=1e-6)
    nothing = torch.full((1, 4, 8, 8), -1.0)  # premultiplied: black, of no alpha
    assert torch.equal(inputs.gray(nothing), torch.ones(1, 1, 8, 8))


def test_edges_are_dark_lines_where_an_image_changes():
    image = torch.full((1, 3, 8, 8), -1.0)
    assert torch.equal(inputs.edges(image), torch.ones(1, 1, 8, 8))
    image[..., 4:] = 1
    drawn = inputs.edges(image)[0, 0]
    assert (drawn[:, 3:5] == -1).all()
    assert (drawn[:, [0, 1, 6, 7]] == 1).all()


def test_small_keeps_what_is_smooth_and_loses_what_is_fine():
    smooth = torch.linspace(-1, 1, 32).expand(1, 1, 32, 32)
    shown = inputs.make("@small:4", smooth, torch.zeros(1, 0))
    assert shown.shape == smooth.shape
    assert (shown - smooth).abs().max() < 0.1
    fine = torch.tensor([1.0, -1]).repeat(16).expand(1, 1, 32, 32)
    assert inputs.make("@small:4", fine, torch.zeros(1, 0)).abs().max() < 0.2


def test_masks_are_many_and_never_empty_and_hide_what_they_cover():
    chances = torch.rand(500, inputs.draws_of("@masked"), generator=torch.manual_seed(0))
    hidden = inputs.holes(chances, 16, 24)
    shares = hidden.float().mean(dim=(1, 2, 3))
    assert shares.min() > 0
    assert 0.1 < shares.mean() < 0.4
    assert shares.max() < 0.95
    assert len({mask.numpy().tobytes() for mask in hidden}) > 490
    images = torch.rand(500, 3, 16, 24)
    shown = inputs.make("@masked", images, chances)
    assert torch.equal(shown[:, 3:] == -1, hidden)
    assert torch.equal(shown[:, :3].where(~hidden, 0), images.where(~hidden, 0))
    assert (shown.where(hidden, -1) == -1).all()  # nothing of the hidden is told


# ---- pairs ---------------------------------------------------------------------------------------


def load_pairs(**how) -> utils.Loader:
    listing = inputs.list_pairs(Path("pictures"), "drawings", Path("cache"))
    data = reading.read_pairs(listing, (8, 8), inputs="drawings", **how)
    return utils.Loader(data, 4, seed=0, flip="both", device=torch.device("cpu"))


def test_flips_and_crops_hit_both(place):
    """Inputs that are the images stay them, whatever happens to these."""
    paint(place / "pictures")
    shutil.copytree("pictures", "drawings")
    loader = load_pairs(crop="random", crop_margin=2)
    seen = set()
    for step in range(20):
        torch.manual_seed(step)
        indices, chances = loader.draw(step)
        x_0 = loader.load(indices, chances)
        assert torch.equal(inputs.load_inputs(loader, indices, chances, x_0), x_0)
        seen |= {image.numpy().tobytes() for image in x_0}
    assert len(seen) > 70  # of 80: they are flipped and cropped


def test_pairs_are_found_by_name_and_what_is_left_out_is_told(place, run):
    paint(place / "pictures/a", 6)
    paint(place / "pictures/b", 6)
    for path in sorted(Path("pictures").rglob("*.png")):
        other = Path("drawings", *path.parts[1:]).with_suffix(".BMP")
        other.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("L").save(other)
    Path("drawings/a/picture_0002.BMP").unlink()
    paint(place / "drawings/b", 2, first_seed=40)
    shutil.copy("pictures/a/picture_0003.png", "pictures/a/picture_0003.bmp")
    Path("drawings/b/picture_0005.BMP").write_text("damaged")
    result = run(*TRAIN, "--inputs=drawings", "--run_name=run")
    assert result.status == 0, result.err
    assert "data     9 images" in result.out
    for told in (
        "1 left out, without an input: a/picture_0002.png",
        "3 inputs left out, without an image: a/picture_0003.BMP",
        "2 left out, which share a name but for its suffix: a/picture_0003.bmp",
        "1 pairs of which a file is unreadable are left out",
    ):
        assert told in result.out
    stored = checkpoints.load("run")
    assert (stored["settings"]["mode"], stored["settings"]["input_mode"]) == ("RGB", "L")
    assert stored["average"]["conv_in.weight"].shape[1] == 4
    assert pixels("results/run/data.png").shape == (4 * 8, 8 * 8, 3)
    rows = pixels(next(Path("results/run/training_progress").iterdir()))
    assert rows.shape == (2 * 3 * 8, 8 * 8, 3)  # inputs, outputs and truth, twice eight
    # the same pairs elsewhere are the same run; others are not
    Path("drawings").rename("elsewhere")
    words = [word for word in TRAIN if "epochs" not in word] + ["--run_name=run", "--epochs=3"]
    assert run(*words, "--inputs=elsewhere").status == 0
    Path("elsewhere/a/picture_0000.BMP").write_bytes(
        Path("elsewhere/a/picture_0001.BMP").read_bytes()
    )
    assert "are not those it was trained on" in refused(run(*words, "--inputs=elsewhere"))
    assert "--inputs was elsewhere, is now @gray" in refused(run(*words, "--inputs=@gray"))


def test_pairs_that_are_shuffled_are_learned_worse(place, run):
    """Images of one color each, which the input tells, or does not."""
    colors = np.random.default_rng(0).integers(0, 256, (24, 1, 1, 3), dtype=np.uint8)
    for name, order in (("pictures", range(24)), ("true", range(24)), ("false", range(1, 25))):
        Path(name).mkdir()
        for number, place_of in enumerate(order):
            color = np.broadcast_to(colors[place_of % 24], (8, 8, 3))
            Image.fromarray(np.ascontiguousarray(color)).save(f"{name}/{number}.png")
    losses = {}
    for name in ("true", "false"):
        words = [f"--inputs={name}", f"--run_name={name}", "--epochs=15", "--lr=4e-3"]
        words.append("--objective=x0")
        flags = dict(word.split("=") for word in [*TRAIN[1:], *words])
        assert run("train", *(f"{flag}={value}" for flag, value in flags.items())).status == 0
        with open(f"results/{name}/log.csv") as file:
            losses[name] = float([*csv.DictReader(file)][-1]["loss"])
    assert losses["true"] < 0.7 * losses["false"], losses


# ---- a training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["@masked", "@small:2"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(place, run, kind):
    paint(place / "pictures", size=(20, 20))
    words = [word for word in TRAIN if "epochs" not in word]
    words += [f"--inputs={kind}", "--crop=random", "--lr_decay=none", "--flip=both"]
    for name, epochs in (("whole", 4), ("stopped", 1), ("stopped", 4)):
        result = run(*words, f"--run_name={name}", f"--epochs={epochs}")
        assert result.status == 0, result.err
    whole, stopped = (checkpoints.load(name) for name in ("whole", "stopped"))
    for part in ("network", "average"):
        assert all(torch.equal(whole[part][name], stopped[part][name]) for name in whole[part])


def test_however_a_batch_is_cut_the_same_is_learned(place, run, in_float64):
    paint(place / "pictures")
    weights = []
    for name, more in (("whole", []), ("cut", ["--micro_batch=1"])):
        assert run(*TRAIN, "--inputs=@masked", f"--run_name={name}", *more).status == 0
        weights.append(checkpoints.load(name)["average"])
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-10 for name in weights[0])


def test_a_tenth_of_the_inputs_is_hidden(place, run, monkeypatch):
    paint(place / "pictures", 12)
    forward, hidden = UNet.forward, []

    def note(self, x, t, labels=None, shown=None):
        if self.training:
            hidden.extend((shown == 0).flatten(1).all(dim=1).tolist())
        return forward(self, x, t, labels, shown)

    monkeypatch.setattr(UNet, "forward", note)
    words = [word for word in TRAIN if "batch" not in word and "epochs" not in word]
    assert run(*words, "--inputs=@gray", "--epochs=100", "--batch_size=12").status == 0
    assert 0.07 < sum(hidden) / len(hidden) < 0.13  # 1,200 draws: a standard deviation is 0.009


def test_a_run_without_inputs_goes_on_with_some(place, run):
    """The new channels begin at 0, so that at first inputs change nothing."""
    paint(place / "pictures")
    assert run(*TRAIN, "--run_name=plain").status == 0
    plain = checkpoints.load("plain")["average"]
    shown = a_network(input_channels=4).conv_in.weight.shape
    wide = inputs.widen(plain, shown)
    networks = [UNet(8, width=16, multipliers=(1, 2), blocks=1, attention_size=4) for _ in "ab"]
    networks[1] = UNet(
        8, width=16, multipliers=(1, 2), blocks=1, attention_size=4, input_channels=4
    )
    for network, weights in zip(networks, (plain, wide), strict=True):
        network.load_state_dict(weights)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
    torch.testing.assert_close(networks[1](x, t, None, torch.randn(2, 4, 8, 8)), networks[0](x, t))
    words = [*TRAIN, "--init_from=plain", "--inputs=@masked", "--run_name=tuned"]
    assert run(*words).status == 0
    assert checkpoints.load("tuned")["average"]["conv_in.weight"].shape[1] == 7
    line = refused(run(*TRAIN, "--init_from=tuned", "--inputs=@gray", "--run_name=other"))
    assert "add --inputs=@masked" in line


@pytest.mark.parametrize(
    "words, told",
    [
        (["--inputs=@grey"], "--inputs=@grey is not one of: @gray, @small:4"),
        (["--inputs=@small"], "is not one of"),
        (["--inputs=@gray:2"], "is not one of"),
        (["--inputs=@small:x"], "x is not a number from 2 to 32"),
        (["--inputs=@small:3"], "--img_size has 8, no multiple of 3"),
        (["--inputs=@gray", "--mode=L"], "made of images of the mode RGB or RGBA"),
        (["--inputs=@masked", "--mode=RGBA"], "made of images of the mode L or RGB"),
        (["--inputs=nowhere"], "--inputs=nowhere does not exist"),
        (["--inputs=others"], "no image of pictures has one of its name in others"),
        (["--crop_margin=0.5"], "--crop_margin=0.5 is out of range"),
        (["--crop_margin=2"], "--crop_margin=2 is for --crop=random"),
    ],
)
def test_inputs_that_cannot_be_are_one_line(place, run, words, told):
    paint(place / "pictures")
    paint(place / "others", first_seed=90)
    assert told in refused(run(*TRAIN, *words, "--run_name=run"))
    assert not Path("models").exists()
    assert not Path("results").exists()


def test_a_checkpoint_of_other_inputs_than_its_own_is_refused(here, run):
    stored = checkpoints.load("gray")
    for other in ({"inputs": "@edges", "input_mode": "RGB"}, {"inputs": ""}, {"input_mode": "no"}):
        checkpoints.save("gray", **stored | {"settings": stored["settings"] | other})
        line = refused(run("sample", "--run_name=gray", "--inputs=pictures"))
        assert "models/gray holds" in line


# ---- guidance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 3])
def test_the_input_is_heard_and_guidance_leads_from_none_through_it(classes):
    network = a_network(input_channels=2, classes=classes)
    labels = torch.tensor([1, 0]) if classes else None
    x, t, shown = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 2, 8, 8)
    better, worse = network(x, t, labels, shown), network(x, t)
    assert (better - worse).abs().max() > 0.1
    for guidance in (0.0, 1.0, 2.5):
        output = ddpm.guided(network, x, t, labels, guidance, inputs=shown)
        torch.testing.assert_close(output, worse + guidance * (better - worse), rtol=0, atol=1e-3)
    one, other = (ddpm.guided(network, x, t, labels, 0, inputs=each) for each in (shown, -shown))
    assert torch.equal(one, other)


def test_guidance_of_zero_ignores_the_input_exactly(here, run):
    paint(here / "others", 6, size=(8, 8), first_seed=50)
    Path("others").rename("changed")
    for guidance, alike in ((0, True), (1, False)):
        made = []
        for source in ("@pictures", "@changed"):
            name = f"{source.strip('@')}_{guidance}"
            words = [f"--inputs={source}", f"--guidance={guidance}", "--steps=4", f"--name={name}"]
            assert run("sample", "--run_name=edges", *words).status == 0
            files = sorted(Path("results/edges", name).glob("picture*.png"))
            made.append(np.stack([pixels(path) for path in files]))
        assert np.array_equal(*made) == alike


# ---- sample --------------------------------------------------------------------------------------


def test_images_are_named_after_their_inputs_and_a_grid_shows_both(here, run):
    paint(here / "nested/deep", 2, size=(8, 8), first_seed=70)
    words = ["--inputs=nested", "--n_img=2", "--steps=4"]
    result = run("sample", "--run_name=drawings", *words)
    assert result.status == 0, result.err
    folder = Path("results/drawings/samples")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    expected = {f"deep/picture_00{n}_{k}.png" for n in (70, 71) for k in (1, 2)}
    assert names == expected | {"samples.png"}
    assert pixels(folder / "samples.png").shape == (2 * 8, 2 * 16, 3)
    again = Image.open(folder / "deep/picture_0071_2.png").info["command"]
    assert again.endswith("# this is deep/picture_0071_2.png there")
    assert run(*shlex.split(again, comments=True)[2:]).status == 0
    for name in expected:
        assert np.array_equal(pixels(folder / name), pixels(Path(f"{folder}_2") / name))


def test_known_pixels_come_back_exactly(here, run):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    picture[:, :, 3] = 255
    picture[2:5, 3:7, 3] = 0
    picture[6, 6, 3] = 128  # in part: it is painted anew
    Image.fromarray(picture).save("holes.png")
    assert run("sample", "--run_name=masked", "--inputs=holes.png", "--steps=4").status == 0
    made = pixels("results/masked/samples/holes.png")
    known = picture[:, :, 3] == 255
    assert np.array_equal(made[known], picture[known][:, :3])
    assert not np.array_equal(made[~known], picture[~known][:, :3])
    line = refused(run("sample", "--run_name=masked", "--inputs=pictures", "--steps=4"))
    assert "picture_0000.png is transparent nowhere" in line


def test_known_pixels_of_a_colored_input_are_its_luma_in_a_gray_run(here, run):
    words = ("--inputs=@masked", "--mode=L", "--run_name=in_gray")
    assert run(*TRAIN, *words).status == 0
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    picture[:, :, 3] = np.where(np.arange(8) < 4, 255, 0)
    Image.fromarray(picture).save("holes.png")
    assert run("sample", "--run_name=in_gray", "--inputs=holes.png", "--steps=2").status == 0
    luma = np.asarray(Image.fromarray(picture[:, :, :3]).convert("L"))
    made = pixels("results/in_gray/samples/holes.png")
    assert np.array_equal(made[:, :4], luma[:, :4])


def test_inputs_of_a_run_with_classes_are_of_the_class_that_is_named(place, run):
    for name in ("hills", "lakes"):
        paint(place / "pictures" / name, 3, size=(8, 8))
    assert run(*TRAIN, "--inputs=@gray", "--conditional", "--run_name=both").status == 0
    words = ["sample", "--run_name=both", "--inputs=pictures/lakes", "--steps=2"]
    assert "say of which class the images are: --label=hills" in refused(run(*words))
    assert run(*words, "--label=lakes").status == 0
    with Image.open("results/both/samples/picture_0001.png") as picture:
        assert picture.text["label"] == "lakes"


def test_outputs_have_names_of_their_own():
    """Those that differ in their suffix alone, and one where the folder of another must be."""
    names = ["a.jpg", "A.png", "x.jpg", "x.png/y.png", "samples.png"]
    outputs = input_files.names_of_outputs(names)
    assert outputs == ["a", "A_2", "x_2", "x.png/y", "samples_2"]


def test_small_images_of_any_size_are_enlarged(here, run):
    """Larger outputs than those of the training are made in tiles; grids of `sample` are passed."""
    paint(here / "small", 2, size=(4, 4))
    paint(here / "small", 1, size=(13, 9), first_seed=5)
    shutil.copy("small/picture_0000.png", "small/samples.png")
    result = run("sample", "--run_name=small", "--inputs=small", "--steps=4")
    assert result.status == 0, result.err
    assert "1 that show many images are left out, such as samples.png" in result.out
    assert "they have several sizes, so that no grid shows them" in result.out
    folder = Path("results/small/samples")
    sizes = {path.name: pixels(path).shape[:2] for path in folder.iterdir()}
    assert sizes == {f"picture_000{n}.png": (8, 8) for n in (0, 1)} | {"picture_0005.png": (18, 26)}
    assert run("sample", "--run_name=small", "--inputs=@small", "--steps=2").status == 0
    with pytest.raises(runs.UserError, match=r"12x8 .* at least 16 or a multiple of 8"):
        settings = {"multipliers": (1, 1, 1, 1), "img_size": (16, 16)}
        input_files.check_output("thin.png", (12, 8), settings)


@pytest.mark.parametrize(
    "run_name, words, told",
    [
        ("gray", [], "trained with --inputs=@gray, and makes nothing without: --inputs=FOLDER"),
        ("plain", ["--inputs=pictures"], "is for runs trained with --inputs"),
        ("gray", ["--inputs=nowhere"], "--inputs=nowhere does not exist"),
        ("gray", ["--inputs=broken.png"], "broken.png (no image of a kind that is read)"),
        ("gray", ["--inputs=empty"], "--inputs=empty holds no images"),
        ("small", ["--inputs=huge.png"], "would become 2x4000"),
        ("small", ["--inputs=pictures", "--img_size=15"], "is not a multiple of 2"),
        ("drawings", ["--inputs=@pictures"], "takes images like those in drawings, without @"),
        ("drawings", ["--inputs=five.npy"], "five.npy[0] (5 channels"),
        ("gray", ["--inputs=pictures", "--init_image=broken.png"], "do not go together"),
        ("gray", ["--inputs=pictures", "--interpolate=1,2"], "do not go together"),
        ("gray", ["--inputs=pictures", "--n_img=0"], "--n_img=0 is out of range"),
        ("gray", ["--inputs=pictures", "--img_size=8x8x8"], "--img_size=8x8x8 is not a size"),
        ("gray", ["--inputs=pictures", "--img_size=0"], "would become 0x0"),
        ("small", ["--inputs=@thin.png"], "would become 8x0"),
        ("gray", ["--inputs=@nowhere"], "--inputs=@nowhere does not exist"),
        ("gray", ["--inputs=@"], "--inputs=@ names no images"),
    ],
)
def test_inputs_that_cannot_be_used_are_one_line(here, run, run_name, words, told):
    Path("broken.png").write_text("no picture")
    Path("empty").mkdir()
    Image.new("RGB", (2000, 1)).save("huge.png")
    Image.new("RGB", (1, 8)).save("thin.png")
    np.save("five.npy", np.zeros((2, 8, 8, 5), np.uint8))
    if run_name == "plain":
        assert run(*TRAIN, "--run_name=plain").status == 0
    assert told in refused(run("sample", f"--run_name={run_name}", "--steps=4", *words))
    assert not Path("results", run_name, "samples").exists()


def test_tiles_cover_an_image_and_leave_no_seam():
    """What answers each pixel by itself answers the same in tiles."""
    network = lambda x, t, labels, shown: 2 * x + shown  # noqa: E731
    network.channels, network.null_class = 3, None
    x, shown = torch.randn(2, 3, 19, 40), torch.randn(2, 3, 19, 40)
    tiled = tiles.Tiled(network, (8, 16))
    torch.testing.assert_close(tiled(x, None, None, shown), 2 * x + shown)
    for side in range(8, 60):
        places = tiles.starts(side, 8)
        assert (places[0], places[-1]) == (0, side - 8)
        assert all(0 < b - a <= 6 for a, b in itertools.pairwise(places))
    assert tiles.window((8, 16)).min() > 0


def test_the_page_to_play_refuses_in_a_line(here):
    with pytest.raises(runs.UserError, match="trained with --inputs, which this page has none of"):
        play_images.load("gray")


@pytest.mark.parametrize("tool, words", [(steps, []), (distill, ["--to=fast", "--steps=2"])])
def test_what_starts_from_noise_alone_refuses_in_a_line(here, run_main, tool, words):
    line = refused(run_main(tool.main, "--run_name=gray", *words))
    assert "--run_name=gray" in line
    assert "inputs" in line


# ---- evaluation ----------------------------------------------------------------------------------


def test_figures_have_their_known_values():
    truth = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert fidelity.psnr(truth + 5, truth) == pytest.approx(20 * np.log10(255 / 5), abs=1e-4)
    pytest.importorskip("skimage")
    noise = torch.randint(0, 256, truth.shape, dtype=torch.uint8)
    assert fidelity.ssim(noise, noise) == pytest.approx(1)
    assert fidelity.ssim(noise.flip(0), noise) < 0.2


def test_a_model_worse_than_the_baseline_is_told(here, run_main, monkeypatch):
    """Untrained as it is, it loses against Lanczos; against itself it does not."""
    paint(here / "many", 40, size=(8, 8))
    plain = evaluate.Features("mean colors", "1", lambda images: images.float().mean(dim=(2, 3)))
    monkeypatch.setitem(evaluate.FEATURES, "efficientnet", lambda device: plain)
    words = ["--run_name=small", "--dataset=many", "--n_img=16", "--steps=4"]
    result = run_main(evaluate.main, *words)
    assert result.status == 0, result.err
    assert "16 images that it was not trained on; baseline: Lanczos" in result.out
    assert "worse than the baseline (Lanczos) in: psnr" in result.out
    with open("results/small/evaluation.csv") as file:
        [row] = csv.DictReader(file)
    assert float(row["psnr"]) < float(row["psnr_baseline"])
    assert row["compared"] == "16"
    assert run_main(evaluate.main, *words, "--inputs=drawings").status == 2
    same = {"psnr": 1.0, "ssim": 1.0, "apart": 1.0, "distance": 1.0, "compared": 16}
    same |= {f"{name}_baseline": 1.0 for name in ("psnr", "ssim", "apart", "distance")}
    assert "worse" not in fidelity.report(same, "Lanczos", "images")


# ---- exchange ------------------------------------------------------------------------------------


def test_diffusers_answers_the_same_and_the_way_back_is_exact(here, exchange, run, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    assert "there are no images of masked" in refused(
        exchange("export", "--run_name=masked", "--to=early")
    )
    words = ["--inputs=@pictures", "--steps=4"]
    assert run("sample", "--run_name=masked", *words).status == 0
    result = exchange("export", "--run_name=masked", "--to=model")
    assert result.status == 0, result.err
    theirs = diffusers.UNet2DModel.from_pretrained("model", subfolder="unet").eval()
    assert (theirs.config.in_channels, theirs.config.out_channels) == (7, 3)
    ours, _ = ddpm.build_trained(ddpm.load_run("masked"), torch.device("cpu"))
    x, shown = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        mine = ours(x, torch.tensor([5, 5]), None, shown)
        answer = theirs(torch.cat([x, shown], dim=1), 4).sample
    torch.testing.assert_close(mine, answer, rtol=1e-4, atol=1e-5)
    card = Path("model/README.md").read_text()
    assert "image-to-image" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    assert "torch.zeros(1, 4, 8, 8)" in code
    exec(code.replace('"model"', repr(str(here / "model"))), {})
    assert exchange("import", "--source=model", "--run_name=back").status == 0
    for name in ("masked", "back"):
        assert run("sample", f"--run_name={name}", *words, "--name=compared").status == 0
    for path in Path("results/masked/compared").glob("picture*.png"):
        assert np.array_equal(pixels(path), pixels(Path("results/back/compared", path.name)))
    Path("model/inputs.json").write_text(json.dumps({"inputs": "@gray", "input_mode": "RGB"}))
    assert exchange("import", "--source=model", "--run_name=other").status == 2
    weights = safetensors.torch.load_file("model/unet/diffusion_pytorch_model.safetensors")
    assert weights["conv_in.weight"].shape[1] == 7
    assert exchange("publish", "--run_name=masked", "--to=public").status == 0
    assert run("sample", "--run_name=public", *words).status == 0
