"""The page of a run and that of all runs, as a real browser shows them."""

import html
import http.server
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, paint, refused
from PIL import Image

import tools.report
from machinery import checkpoints, command_line, held_out, journal, page, writing

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TRAIN = ("train", *TINY, "--dataset=pictures", "--run_name=run", "--noise_steps=8")
SAMPLE = ("sample", "--run_name=run", "--n_img=3", "--steps=2", "--device=cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A place with a run that has held-out images, raw previews and samples."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(journal, "ROW_EVERY", 5)
        patch.setattr(held_out, "COST", 1e9)
        paint(Path("pictures"), count=16)
        import ddpm

        words = [*TRAIN, "--epochs=8", "--held_out=4", "--raw_previews"]
        words = [word for word in words if "sample_every" not in word] + ["--sample_every=2"]
        commands = {"train": ddpm.train, "sample": ddpm.sample}
        for line in (words, [*SAMPLE]):
            command_line.plan("ddpm.py", commands, line)()
    return place


@pytest.fixture
def report(here, run_main):
    """Run `python -m tools.report WORDS...` within this process."""
    return lambda *words: run_main(tools.report.main, *words)


def data_in(path: Path) -> dict:
    """What a page's script draws."""
    found = re.search(r'id="data">(.*?)</script>', path.read_text(), flags=re.DOTALL)
    return json.loads(found.group(1))


# ---- what is written -----------------------------------------------------------------------------


def test_training_writes_its_page(trained):
    data = data_in(trained / "results/run/index.html")
    assert [preview["when"] for preview in data["previews"]][-1] == "epoch 8"
    assert len(data["previews"]) == 4
    for preview in data["previews"]:
        for kind in ("ema", "raw"):
            assert (trained / "results/run" / preview[kind]).is_file()
    assert data["albums"] == [], "samples came later"


def test_the_curves_are_the_log(here, report):
    assert report("--run_name=run").status == 0
    data = data_in(Path("results/run/index.html"))
    rows = checkpoints.load("run")["log"]
    charts = {chart["title"]: chart["series"] for chart in data["curves"]["charts"]}
    assert data["curves"]["images"] == [journal.cells_of(row)["images"] for row in rows]
    for series, name in [(0, "loss"), (2, "held_out"), (3, "learned")]:
        expected = [journal.cells_of(row)[name] for row in rows]
        assert charts["Loss"][series]["y"] == pytest.approx(expected, rel=1e-4)


def test_samples_are_shown_with_seeds_and_commands(here, report):
    assert report().status == 0
    [album] = data_in(Path("results/run/index.html"))["albums"]
    assert [image["about"] for image in album["images"]] == [
        f"sample_{number + 1:04d}.png, seed {number}, step 24" for number in range(3)
    ]
    for image in album["images"]:
        assert image["command"].startswith("python ddpm.py sample --run_name=run ")
        assert (Path("results/run") / image["file"]).is_file()


def test_a_run_of_an_older_version_gets_a_page(here, report):
    """Without count, minutes, held-out images, previews or a command.txt."""
    stored = torch.load("models/run/checkpoint.pt", weights_only=True)
    kept = {name: stored[name] for name in (*checkpoints.TO_SAMPLE, "format")}
    kept["log"] = [row[: len(journal.COLUMNS)] for row in stored["log"]]
    for name in ("held_out", "keep_best", "track", "raw_previews"):
        del kept["settings"][name]
    shutil.rmtree("models")
    shutil.rmtree("results")
    checkpoints.save("old", **{name: kept[name] for name in checkpoints.TO_SAMPLE})
    result = report()
    assert (result.status, result.out.splitlines()) == (
        0,
        [str(Path("results/old/index.html")), str(Path("results/index.html"))],
    )
    text = Path("results/old/index.html").read_text()
    assert "held_out" in text and "Previews" not in text


def test_a_run_that_cannot_be_read_is_left_out_and_told(here, report):
    Path("models/broken").mkdir()
    Path("models/broken/checkpoint.pt").write_text("text")
    result = report()
    assert result.status == 0
    assert "left out: models/broken/checkpoint.pt cannot be read" in result.out
    assert "broken" not in Path("results/index.html").read_text()


def test_wrong_runs_are_refused(here, report):
    before = Path("results/run/index.html").read_bytes()
    assert "other is not a trained run" in refused(report("--run_name=other"))
    assert "not a usable name" in refused(report("--run_name=../run"))
    shutil.rmtree("models")
    assert "there is no run yet" in refused(report())
    assert Path("results/run/index.html").read_bytes() == before


@pytest.mark.quick
def test_what_a_run_says_cannot_become_markup(place):
    """A stranger's run: classes, settings and file texts with tags, quotes and line ends."""
    evil = '</script><script>alert("x")</script>\n<b a=\'"'
    settings = {"dataset": evil, "classes": (evil, "b"), "img_size": (8, 8), "batch_size": 4}
    settings |= {"max_minutes": 0.0, "epochs": 10}
    Path("results/run").mkdir(parents=True)
    writing.save_png(
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        Path("results/run/samples/sample_0001.png"),
        command=evil,
        label=evil,
    )
    Path("results/run/command.txt").write_text(evil)
    Path("results/run/a<b>'\".txt").write_text("")
    Path("results/run/evaluation.csv").write_text(f'distance,date\n1.5,"{evil[:9]}"\n')
    stored = {"settings": settings, "log": [], "step": 3, "count": 8, "weights": 9}
    text = page.write_page("run", stored).read_text()
    assert "<script>alert" not in text and not re.search("<b[ >]", text)
    assert text.count("</script>") == 2
    assert data_in(Path("results/run/index.html"))["albums"][0]["images"][0]["command"]
    assert html.escape("</script>") in text


@pytest.mark.quick
def test_long_logs_are_thinned_and_gaps_are_no_numbers():
    rows = [
        [step, step / 7, 4 * step, 1.0 + step % 2, 1e-3, 1.0, 0, None, 1.0, 2.0, 3.0, 9.0]
        for step in range(1, 10_001)
    ]
    curves = page.curves_of(rows)
    assert len(curves["images"]) == page.POINTS
    assert curves["images"] == sorted(curves["images"])
    for chart in curves["charts"]:
        for line in chart["series"]:
            assert len(line["y"]) == page.POINTS
    loss = curves["charts"][0]["series"][0]["y"]
    assert np.allclose(loss, 1.5, atol=0.1)
    assert page.curves_of([])["images"] == []


def test_the_command_and_the_machine_are_noted_at_every_start(trained, here, run):
    before = Path("results/run/command.txt").read_text()
    assert before.count("python") >= 1 and "torch" in before and "on cpu" in before
    words = [word for word in TRAIN if "sample_every" not in word]
    assert run(*words, "--epochs=9", "--sample_every=2").status == 0
    after = Path("results/run/command.txt").read_text()
    assert after.startswith(before) and after.count("\n  ") >= 2 * before.count("\n  ") - 1
    assert "--epochs=9" in after


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Debian's chromium without a window, driven by playwright; skipped where one is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("chromium is not installed: the pages are opened in no browser")
    with api.sync_playwright() as driver:
        options = ["--no-sandbox"]  # a container's root needs that
        found = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@pytest.fixture
def look(browser) -> Iterator[Callable]:
    """Open an address: the page, which may have no errors and nothing that could not be loaded."""
    faults = []
    opened = []

    def open_page(address: str, width: int = 800, scheme: str = "light", asked: list | None = None):
        viewport = {"width": width, "height": 900}
        tab = browser.new_page(viewport=viewport, color_scheme=scheme)
        opened.append(tab)
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        if asked is not None:
            tab.on("request", lambda request: asked.append(request.url))
        tab.on("requestfailed", lambda request: faults.append(request.url))
        tab.on("response", lambda got: got.ok or faults.append(got.url))
        tab.goto(address)
        return tab

    yield open_page
    for tab in opened:
        tab.close()
    assert faults == []


def widths(tab) -> bool:
    """Whether nothing lies beyond the right edge."""
    return tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", [360, 800, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_every_screen(here, report, look, width, scheme):
    report()
    colors = {}
    for path in ("results/run/index.html", "results/index.html"):
        tab = look(Path(path).resolve().as_uri(), width, scheme)
        assert widths(tab)
        for name in ("color", "backgroundColor"):
            color = tab.evaluate(f"getComputedStyle(document.body).{name}")
            colors[name] = sum(map(int, re.findall(r"\d+", color)[:3]))
        contrast = colors["color"] - colors["backgroundColor"]
        assert contrast > 400 if scheme == "dark" else contrast < -400


def test_the_slider_shows_previews_over_time_and_curves_tell_their_values(here, report, look):
    report()
    tab = look(Path("results/run/index.html").resolve().as_uri())
    assert tab.inner_text("#when") == "epoch 8"
    slider = tab.locator("#time input")
    slider.fill("0")
    assert tab.inner_text("#when") == "epoch 2"
    for kind, end in (("ema", "epoch_0002.png"), ("raw", "epoch_0002_raw.png")):
        assert tab.get_attribute(f"#{kind}", "src") == f"training_progress/{end}"
        assert tab.evaluate(f"document.getElementById('{kind}').decode().then(() => true)")
    first = tab.locator("#curves svg").first
    first.hover(position={"x": 62, "y": 50})
    legend = tab.locator("#curves .legend").first.inner_text()
    rows = [journal.cells_of(row) for row in checkpoints.load("run")["log"]]
    assert f"{rows[0]['images']} images" in legend
    assert f"{rows[0]['held_out']:.4g}".rstrip("0") in legend
    first.focus()
    tab.keyboard.press("ArrowRight")
    assert f"{rows[1]['images']} images" in tab.locator("#curves .legend").first.inner_text()


def test_a_sample_shows_its_seed_and_its_command(here, report, look):
    report()
    tab = look(Path("results/run/index.html").resolve().as_uri())
    tab.locator("#album_0 .thumbs button").nth(1).click()
    assert tab.inner_text("#album_0 .about") == "sample_0002.png, seed 1, step 24"
    with Image.open("results/run/samples/sample_0002.png") as picture:
        assert tab.inner_text("#album_0 pre") == picture.info["command"]
    tab.locator("#album_0 button.copy").click()
    assert tab.inner_text("#album_0 button.copy") == "Copied"


def test_over_http_every_link_leads_somewhere(here, report, look):
    report()
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": print_nothing})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(here)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        root = f"http://127.0.0.1:{server.server_port}/results"
        for path in ("index.html", "run/index.html"):
            tab = look(f"{root}/{path}")
            tab.wait_for_load_state("networkidle")
            for link in tab.eval_on_selector_all("a", "all => all.map((each) => each.href)"):
                assert tab.request.get(link).ok, link
    finally:
        server.shutdown()
        server.server_close()


def print_nothing(*_) -> None:
    """In the place of a server's log."""


@pytest.mark.parametrize("count", [1, 20, 500])
def test_many_previews_load_one_picture_at_a_time(here, report, look, count):
    folder = Path("results/run/training_progress")
    shutil.rmtree(folder)
    folder.mkdir()
    picture = Image.new("RGB", (256, 256), "teal")
    picture.save(folder / "epoch_0001.png")
    for number in range(2, count + 1):
        os.link(folder / "epoch_0001.png", folder / f"epoch_{number:04d}.png")
    report()
    asked = []
    tab = look(Path("results/run/index.html").resolve().as_uri(), asked=asked)
    assert len([address for address in asked if "training_progress" in address]) == 1
    assert tab.get_attribute("#time input", "max") == str(count - 1)


@pytest.mark.parametrize("mode, channels", [("RGBA", 4), ("L", 1)])
def test_runs_of_other_colors_and_of_classes_are_shown(place, run, run_main, look, mode, channels):
    for number, kind in enumerate(("apples & pears", "<plums>")):
        paint(place / "pictures" / kind, count=5, first_seed=10 * number)
    words = [word for word in TRAIN if "batch" not in word]
    options = ("--conditional", f"--mode={mode}", "--epochs=1", "--batch_size=8")
    assert run(*words, *options).status == 0
    assert run(*SAMPLE, "--label=all").status == 0
    assert (
        run(*SAMPLE, "--name=changed", "--init_image=pictures/<plums>/picture_0010.png").status == 0
    )
    assert run_main(tools.report.main).status == 0
    tab = look(Path("results/run/index.html").resolve().as_uri())
    assert "rows from the top: <plums>, apples & pears" in tab.inner_text("body")
    assert tab.locator(".album").count() == 2
    tab.locator("#album_0 .thumbs button").first.click()
    assert "label <plums>" in tab.inner_text("#album_0 .about")
    assert "--init_image=" in tab.inner_text("#album_0 pre")


def test_a_run_whose_budget_is_used_up_is_finished_on_its_page(place, run):
    """It ends before the last minute is over: the last preview is part of the budget."""
    paint(place / "pictures")
    words = ["train", "--dataset=pictures", "--noise_steps=8", *TINY, "--run_name=brief"]
    assert run(*words, "--epochs=100000", "--max_minutes=0.03").status == 0
    assert checkpoints.load("brief")["step"] < 10_000
    text = Path("results/brief/index.html").read_text()
    assert "finished" in text
    assert "% is done" not in text
