"""The example data set and the script that paints it."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "datasets"))
import paint_landscapes

LANDSCAPES = ROOT / "datasets" / "landscapes"


def pixels(picture: Image.Image, size: int) -> np.ndarray:
    """A picture shrunk to size x size, as (size, size, 3) float."""
    return np.asarray(
        picture.convert("RGB").resize((size, size), Image.Resampling.BOX), dtype=np.float64
    )


def test_the_data_set_is_complete_and_small():
    names = [path.name for path in sorted(LANDSCAPES.glob("*.jpg"))]
    assert names == [f"landscape_{seed:06d}.jpg" for seed in range(4096)]
    assert sum(path.stat().st_size for path in LANDSCAPES.iterdir()) <= 12_000_000
    assert Image.open(LANDSCAPES / names[0]).size == (96, 96)


@pytest.mark.parametrize("seed", [0, 77, 4095])
def test_a_seed_paints_the_picture_that_was_shipped(seed):
    shipped = pixels(Image.open(LANDSCAPES / f"landscape_{seed:06d}.jpg"), 96)
    painted = pixels(paint_landscapes.paint(seed, 96), 96)
    # what JPEG changes; another seed is 20 and more away
    assert np.abs(shipped - painted).mean() < 4
    assert np.abs(shipped - pixels(paint_landscapes.paint(seed + 1, 96), 96)).mean() > 15


def test_a_seed_is_the_same_scene_at_every_size():
    small, large = paint_landscapes.paint(5, 48), paint_landscapes.paint(5, 144)
    assert large.size == (144, 144)
    # details below a pixel come and go
    assert np.abs(pixels(small, 24) - pixels(large, 24)).mean() < 4


def test_painting_again_gives_the_same_bytes_and_wrong_numbers_one_line(tmp_path):
    def paint(*words: str) -> subprocess.CompletedProcess:
        script = str(ROOT / "datasets" / "paint_landscapes.py")
        return subprocess.run([sys.executable, script, *words], capture_output=True, text=True)

    for folder in ("a", "b"):
        result = paint(
            "--count=2", "--size=32", "--first_seed=1000000", f"--folder={tmp_path / folder}"
        )
        assert result.returncode == 0
    names = ["landscape_1000000.jpg", "landscape_1000001.jpg"]
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == names
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in names
    )
    for wrong in ("--count=0", "--size=9", "--first_seed=-1", "--size=abc"):
        result = paint(wrong)
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1].startswith("paint_landscapes.py: error:")
