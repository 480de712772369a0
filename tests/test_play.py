"""The page to play with a model, in a real browser: the command line's pixels, and manners."""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, files_below, paint, refused
from PIL import Image

import ddpm
from machinery import command_line
from tools import play

PLAY = Path("results/tiny/play")
TRAIN = ("train", "--dataset=pictures", "--run_name=tiny", "--conditional", "--epochs=6")
TRAIN += (*(word for word in TINY if not word.startswith("--lr=")), "--lr=0.01")
SIZE = "Size (height x width)"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""


# ---- the server and the browser ------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Skipped aloud where Gradio, Playwright or Chromium is missing."""
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install gradio")
    driver = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not CHROMIUM:
        pytest.skip("there is no chromium to open the page with")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Server:
    """The page, served by a process of its own, in a place with a tiny class-conditional run."""

    def __init__(self, place: Path, scratch: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "tools.play", f"--port={self.port}", "--run_name=tiny"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"TMPDIR": str(scratch), "CUDA_VISIBLE_DEVICES": ""}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, cwd=place, env=environment, **streams)
        self.place = place
        self.scratch = scratch
        assert "Ctrl-C ends it" in self.process.stdout.readline()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("place")
        patch.chdir(place)
        for name in ("hills", "lakes"):
            paint(Path("pictures", name), first_seed=len(name))
        command_line.plan("ddpm.py", {"train": ddpm.train}, TRAIN)()
        # Gradio's temporary files must lie where we look for what is left of them
        server = Server(place, tmp_path_factory.mktemp("scratch"))
        server.before = files_below(place)
        yield server
        if server.process.poll() is None:
            server.stop()


@pytest.fixture
def page(browser, server):
    """The page, newly opened at desktop width; `asked` are the addresses it asks."""
    with opened(browser, server) as page:
        yield page


@contextlib.contextmanager
def opened(browser, server, width: int = 1280):
    page = browser.new_page(viewport={"width": width, "height": 1600})
    page.set_default_timeout(20_000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(f"http://127.0.0.1:{server.port}")
    page.get_by_role("button", name="Make images").wait_for()
    yield page
    page.close()


def fill(page, **values) -> None:
    """Type into inputs by their labels, such as From_seed."""
    for label, value in values.items():
        field = page.get_by_label(label.replace("_", " "), exact=True)
        field.first.fill(str(value))
        field.first.press("Tab")


def set_slider(page, label: str, value: float) -> None:
    field = page.get_by_label(f"number input for {label}")
    field.fill(str(value))
    field.press("Tab")


def make(page, button: str, count: int) -> tuple[str, np.ndarray]:
    """Press a button and wait: the command on the page, and the pixels of the files."""
    before = page.locator(".live").inner_text().strip()
    page.get_by_role("button", name=button, exact=True).click()
    text = page.locator(".live").filter(has_text=re.compile(f"{count} images? in"))
    text = text.filter(has_not_text=before)
    text.wait_for()
    folder = re.search(r"in (\S+)\.", text.inner_text()[text.inner_text().index(", in") :]).group(1)
    page.get_by_text("Image 1").wait_for()
    return shown_command(page), pixels_in(Path(folder))


def shown_command(page) -> str:
    return page.locator(".command code").inner_text().strip()


def pixels_in(folder: Path) -> np.ndarray:
    paths = sorted(folder.glob("sample_*.png"))
    return np.stack([np.asarray(Image.open(path), dtype=int) for path in paths])


names = (f"again_{number}" for number in itertools.count())


def made_by(command: str) -> np.ndarray:
    """What the command line makes of the page's command."""
    name = next(names)
    words = shlex.split(command, comments=True)[2:]
    command_line.plan("ddpm.py", {"sample": ddpm.sample}, [*words, f"--name={name}"])()
    found = pixels_in(Path("results/tiny", name))
    shutil.rmtree(Path("results/tiny", name))
    return found


# ---- what it makes -------------------------------------------------------------------------------


def test_the_page_makes_what_the_command_line_makes(page):
    """To the bit, and what the browser is given are the files themselves."""
    fill(page, Seed=5)
    set_slider(page, "Images", 3)
    command, made = make(page, "Make images", 3)
    assert {"--seed=5", "--n_img=3", "--label=hills,lakes"} <= {*shlex.split(command)}
    assert np.array_equal(made, made_by(command))
    source = page.locator(".shelf button img").nth(1).get_attribute("src")
    assert page.request.get(source).body() == (PLAY / "samples/sample_0002.png").read_bytes()

    page.get_by_label("Classes, in turn").click()
    page.get_by_role("option", name="lakes").click()
    set_slider(page, "Guidance", 7.5)
    command, other = make(page, "Make images", 3)
    assert {"--label=lakes", "--guidance=7.5"} <= {*shlex.split(command)}
    assert np.array_equal(other, made_by(command))
    assert abs(other - made).max() > 8

    page.get_by_text("Sampler, steps, size, autoguidance").click()
    page.get_by_label("Lead away from a weaker run").click()
    page.get_by_role("option", name="early").click()
    command, guided = make(page, "Make images", 3)
    assert {"--guide=early", "--guidance=7.5"} <= {*shlex.split(command)}
    assert np.array_equal(guided, made_by(command))
    assert not np.array_equal(guided, other)
    assert {url.split("/")[2] for url in page.asked if url.startswith("http")} == {
        f"127.0.0.1:{page.url.split(':')[2].strip('/')}"
    }


def test_a_click_on_an_image_offers_variations_and_more_steps(page):
    fill(page, Seed=40)
    make(page, "Make images", 4)
    page.get_by_label("Thumbnail 2 of 4").click()
    page.get_by_text("seed 41").wait_for()
    assert "# this is sample_0002.png there" in shown_command(page)
    command, made = make(page, "Variations", 8)
    assert {"--seed=41", "--variation=0.2", "--label=lakes"} <= {*shlex.split(command)}
    assert np.array_equal(made, made_by(command))
    page.get_by_role("button", name="More steps").click()
    page.locator(".command code").filter(has_text="--steps=16").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").click()
    with Image.open(download.value.path()) as picture:
        assert picture.text["command"] == shown_command(page)


def test_a_film_between_two_seeds(page):
    page.get_by_role("tab", name="Film").click()
    page.get_by_role("button", name="Make the film").click()
    page.get_by_role("alert").filter(has_text="leads through images of one class").wait_for()
    page.get_by_label("Classes, in turn").click()
    page.get_by_role("option", name="hills").click()
    fill(page, From_seed=3, To_seed=9)
    set_slider(page, "Images of the film", 5)
    command, made = make(page, "Make the film", 5)
    assert "--interpolate=3,9" in command
    assert np.array_equal(made, made_by(command))
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the film").click()
    with Image.open(download.value.path()) as film:
        assert (film.format, film.n_frames) == ("GIF", 5)


# ---- image-to-image and inpainting ---------------------------------------------------------------


def upload(page, path: Path) -> None:
    page.get_by_role("tab", name="Picture").click()
    page.locator("input[type=file]").first.set_input_files(path)


def paint_with_the_mouse(page, canvas) -> None:
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4, steps=3)
    page.mouse.up()


def paint_with_the_keys(page, canvas) -> None:
    """Down on the left of where the mouse has left the brush."""
    canvas.focus()
    for _ in range(8):
        canvas.press("ArrowLeft")
    for _ in range(12):
        canvas.press("ArrowDown")
    canvas.press("Shift+ArrowDown")
    canvas.press(" ")


def test_what_is_not_painted_is_kept_to_the_pixel(page):
    paint(Path("uploads"), count=1, size=(40, 32))
    upload(page, Path("uploads/picture_0000.png"))
    page.get_by_text("Now press Change the picture").wait_for()
    canvas = page.get_by_role("application")
    canvas.wait_for()
    set_slider(page, "Strength", 1)
    masks = []
    for paint_it in (paint_with_the_mouse, paint_with_the_keys):
        paint_it(page, canvas)
        command, made = make(page, "Change the picture", 4)
        flags = dict(re.findall(r"--(\w+)=(\S+)", command))
        start = np.asarray(Image.open(flags["init_image"]), dtype=int)
        mask = np.asarray(Image.open(flags["mask"]))[:, :, 3]
        assert mask.shape == (8, 8)
        assert 0 < (mask > 0).sum() < 32
        assert (made[:, mask == 0] == start[mask == 0]).all()
        assert abs(made - start)[:, mask > 100].max() > 0
        assert np.array_equal(made, made_by(command))
        masks.append(mask)
        page.get_by_role("button", name="Clear the mask").click()
    assert (masks[0] > 0)[:4].sum() > (masks[0] > 0)[4:].sum()  # above the middle
    assert (masks[1] > 0)[:4].sum() < (masks[1] > 0)[4:].sum()  # below it
    command, made = make(page, "Change the picture", 4)
    assert "--mask" not in command
    assert (made[:, mask == 0] != start[mask == 0]).any()


def test_an_image_of_the_gallery_can_be_changed_and_repainted(page):
    _, made = make(page, "Make images", 4)
    page.get_by_label("Thumbnail 3 of 4").click()
    page.get_by_text("Image 3").wait_for()
    page.get_by_role("button", name="Change it").click()
    page.get_by_role("application").wait_for()
    set_slider(page, "Strength", 0)
    _, same = make(page, "Change the picture", 4)
    assert (same == made[2]).all()


# ---- manners -------------------------------------------------------------------------------------


def make_slowly(page) -> None:
    """Begin what takes seconds."""
    page.get_by_text("Sampler, steps, size").click()
    page.get_by_label("Sampler", exact=True).click()
    page.get_by_role("option", name="ddpm").click()
    fill(page, Steps=1000)
    page.get_by_role("button", name="Make images").click()
    page.get_by_text(re.compile("Step [1-9].* of 1000")).wait_for()


def test_stop_leaves_nothing_and_the_next_begins(page):
    before = files_below(PLAY)
    make_slowly(page)
    assert page.get_by_role("progressbar").get_attribute("max") == "1000"
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    fill(page, Steps=2)
    command, _ = make(page, "Make images", 4)
    assert "--steps=2" in command  # the other has not come to its end
    new = {Path(name).parts[0] for name in files_below(PLAY) - before}
    assert len(new) == 1


def test_a_second_visitor_waits_and_is_told(browser, server, page):
    with opened(browser, server) as second:
        make_slowly(page)
        second.get_by_role("button", name="Make images").click()
        second.get_by_text("Another visitor's images are being made").wait_for()
        page.get_by_role("button", name="Stop").click()
        second.get_by_text("4 images in").wait_for()


WRONG = [
    ("Seed", -5, "--seed=-5 is out of range, which is 0 or more"),
    ("Seed", "", "--seed= is not a whole number"),
    ("Seed", 0, ""),
    ("Steps", 1.5, "--steps=1.5 is not a whole number"),
    ("Steps", 2000, "--steps=2000 is more than the 1000 noising steps of this run"),
    ("Steps", 3, ""),
    (SIZE, "9x8", "9 is not a multiple of 2"),
    (SIZE, "big", "big is not whole numbers"),
    (SIZE, "2048", "2048 is more than 16 times what the run was trained at"),
    (SIZE, "", ""),
]


def test_what_does_not_go_is_said_on_the_page_and_the_server_lives(page, tmp_path):
    page.get_by_text("Sampler, steps, size").click()
    for label, value, message in WRONG:
        fill(page, **{label: value})
        if message:
            page.get_by_role("button", name="Make images").click()
            page.get_by_role("alert").filter(has_text=message).wait_for()
    assert make(page, "Make images", 4)


def test_uploads_that_cannot_be_read_are_refused_on_the_page(page, tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "giant.png")
    (tmp_path / "broken.png").write_bytes(bytes(500))
    (tmp_path / "heavy.png").write_bytes(bytes(21_000_000))
    messages = {
        "broken": "broken.png is not an image that can be read",
        "giant": "giant.png is not an image that can be read (more than 89,478,485 pixels)",
        "heavy": "exceed the maximum allowed size",
    }
    for name, message in messages.items():
        upload(page, tmp_path / f"{name}.png")
        page.get_by_text(message).wait_for()
        page.reload()
    assert make(page, "Make images", 4)


def test_a_phone_needs_no_scrolling_to_the_side_and_all_inputs_have_names(browser, server):
    with opened(browser, server, width=360) as page:
        make(page, "Make images", 4)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.get_by_role("tab").count() == 3  # none is hidden in a menu
        for image in page.locator(".shelf button img").all():
            box = image.bounding_box()
            assert box["x"] + box["width"] <= 360
        nameless = page.evaluate(
            """[...document.querySelectorAll("input:not([type=file]), textarea, button, img")]
            .filter(each => each.offsetParent !== null && !(each.labels && each.labels.length)
                && !each.closest("[aria-label]") && !each.alt && !each.innerText.trim()
                && !each.title)
            .map(each => each.outerHTML.slice(0, 200))"""
        )
        assert not nameless


def test_ctrl_c_ends_it_and_nothing_lies_elsewhere(server):
    """The last one: it ends the server."""
    assert server.stop() == 130
    new = files_below(server.place) - server.before - {"results", "results/tiny"}
    new = {name for name in new if not name.startswith("uploads")}
    assert all(name.startswith("results/tiny/play") for name in new), new
    assert not files_below(server.scratch)
    assert "Traceback" not in server.process.stdout.read()


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--run_name=none"], "none is not a trained run"),
        (["--run_name=../x"], "is not a usable name"),
        (["--port=0"], "--port=0 is out of range, which is 1 to 65535"),
        (["--share=yes"], "--share is not an option of play"),
        ([], "there is no run yet"),
    ],
)
def test_what_cannot_be_played_with_is_refused(run_main, monkeypatch, words, message):
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(play, "check_address", lambda *address: None)
    assert message in refused(run_main(play.main, *words))


def test_a_hidden_guidance_asks_for_nothing(monkeypatch):
    """A guide is chosen, the slider moved, the guide let go: a run without classes has no use."""
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install gradio")
    from tools import play_page

    monkeypatch.setattr(play_page, "is_led", lambda run_name: False)
    shown = play_page.Page.show_guidance(None, "plain", "early")
    assert shown.visible
    hidden = play_page.Page.show_guidance(None, "plain", "")
    assert not hidden.visible
    assert hidden.value == ddpm.GUIDANCE


def test_an_address_in_use_is_named(run_main, monkeypatch):
    monkeypatch.setattr(play, "first_run", lambda name: name)
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda name: True)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port={port} cannot be used: " in refused(run_main(play.main, f"--port={port}"))


def test_without_gradio_its_command_is_named(run_main, monkeypatch):
    monkeypatch.setattr(play, "first_run", lambda name: name)
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda name: None)
    assert "pip install gradio" in refused(run_main(play.main))
