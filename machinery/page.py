"""A page per run that a browser opens: results/RUN/index.html; and results/index.html of all runs.

A page needs no server and no network: style and script are in it, pictures are linked by relative
paths. All text that comes from a run is escaped.

Reading order: parts of pages; what a run's page shows; a run's page; of all runs; command.txt.
"""

import contextlib
import csv
import datetime
import html
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from PIL import Image

from machinery import checkpoints, journal, processes, runs
from machinery.basics import BROKEN_FILE, make_folder, printable, write_whole
from machinery.command_line import as_typed

POINTS = 400  # of a curve: no screen shows more
ALBUMS = 8  # folders of samples, the newest
SHOWN = 64  # images of each
HERE = Path(__file__).parent
FACTS = ("settings", "log", "step", "minutes", "count")  # of a checkpoint, that a page tells

# ---- parts of pages ------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
SCRIPT = """<script type="application/json" id="data">{data}</script>
<script>
{script}</script>"""


def text_of(value) -> str:
    """A value as HTML text."""
    return html.escape(printable(str(value), limit=500))


def write_html(path: Path, title: str, body: str) -> None:
    style = (HERE / "page.css").read_text()
    whole = PAGE.format(title=text_of(title), style=style, body=body)
    write_whole(path, lambda file: file.write(whole.encode("utf-8", "replace")))


def script_of(data: dict) -> str:
    """The page's script, and what it draws; nothing in `data` can end the element it is in."""
    packed = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return SCRIPT.format(data=packed, script=(HERE / "page.js").read_text())


def table_of(rows: Iterable[tuple], kind: str = "facts") -> str:
    """A table of names and values."""
    lines = (f"<tr><th>{text_of(name)}</th><td>{text_of(value)}</td></tr>" for name, value in rows)
    return f'<table class="{kind}">{"".join(lines)}</table>'


def address(*parts: str) -> str:
    """A relative link."""
    return quote("/".join(parts).encode("utf-8", "surrogateescape"))


# ---- what a run's page shows ---------------------------------------------------------------------


def fraction_of(stored: dict) -> float:
    """How much of a run is done, in [0, 1], of its epochs or its time; NaN if unknown."""
    settings = stored["settings"]
    epochs = runs.learned(stored).epochs
    budget = settings["max_minutes"]
    by_clock = stored.get("minutes", 0) / budget if budget else 0
    return min(1.0, max(epochs / settings["epochs"], by_clock)) if epochs < math.inf else math.nan


def summary_of(stored: dict) -> list[tuple]:
    """What a run is and how far it is: names and values."""
    settings = stored["settings"]
    count, images, epochs = runs.learned(stored)
    lines = [("data set", settings["dataset"])]
    if count < math.inf:
        lines.append(("images to learn from", f"{count:,}"))
    lines.append(("size", "{}x{} pixels".format(*settings["img_size"])))
    if settings["classes"]:
        lines.append(("classes", ", ".join(settings["classes"])))
    lines.append(("weights", f"{stored['weights']:,}"))
    if count < math.inf:
        lines.append(("seen in training", f"{images:,} images, {epochs:.1f} epochs"))
    lines.append(("steps", f"{stored['step']:,}"))
    if "minutes" in stored:
        lines.append(("time", str(datetime.timedelta(seconds=round(60 * stored["minutes"])))))
    if stored["log"]:
        loss, steps = journal.last_loss(stored["log"])
        lines.append(("loss", f"{loss:.4f} over the last {steps:,} steps"))
    if best := best_of(stored["log"]):
        lines.append(("best held-out loss", f"{best['held_out']:.4f} at epoch {best['epoch']:.1f}"))
    return lines


def best_of(rows: list[list]) -> dict:
    """The row with the lowest loss on held-out images; empty where there is none."""
    measured = [cells for cells in map(journal.cells_of, rows) if cells.get("held_out") is not None]
    return min(measured, key=lambda cells: cells["held_out"], default={})


def curves_of(rows: list[list]) -> dict:
    """The curves of a log, of POINTS points at most, for page.js."""
    names = journal.ALL_COLUMNS[: len(rows[0])] if rows else journal.COLUMNS
    table = np.array(rows, dtype=float).reshape(-1, len(names))
    parts = np.array_split(table, min(POINTS, len(table)) or 1)
    thinned = np.array([[mean_of(cells) for cells in part.T] for part in parts if len(part)])
    column = dict(zip(names, thinned.reshape(-1, len(names)).T, strict=True))

    def line(name: str, label: str, color: int, is_smooth: bool = False, **how) -> dict:
        values = journal.smooth(column[name]) if is_smooth else column[name]
        return {"name": label, "y": [rounded(value) for value in values], "color": color} | how

    def quarters(kind: str, who: str = "", **how) -> list[dict]:
        labels = ("q1 (details)", "q2", "q3", "q4 (composition)")
        return [line(f"{kind}_q{n}", who + label, n, **how) for n, label in enumerate(labels, 1)]

    loss = [line("loss", "in training", 0), line("loss", "smoothed", 1, is_smooth=True)]
    by_quarter = quarters("loss", is_smooth=True)
    charts = [chart_of("Loss", loss), chart_of("Loss by quarter of t", by_quarter)]
    if "gap" in column:
        loss += [line("held_out", "held out (EMA)", 2), line("learned", "learned (EMA)", 3)]
        both = quarters("held_out") + quarters("learned", "learned ", dash=True)
        charts.append(chart_of("Held out by quarter of t; dashed: learned from", both))
    charts.append(chart_of("Learning rate", [line("lr", "learning rate", 1)], log=False))
    charts.append(chart_of("Gradient norm", [line("grad_norm", "before clipping to 1", 1)]))
    charts.append(chart_of("Speed", [line("img_per_s", "images per second", 1)], log=False))
    return {"images": [round(value) for value in column["images"]], "charts": charts}


def chart_of(title: str, series: list[dict], log: bool = True) -> dict:
    return {"title": title, "series": series, "log": log}


def mean_of(values: np.ndarray) -> float:
    """The mean of what is known; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return known.mean() if len(known) else math.nan


def rounded(value: float) -> float | None:
    """To five digits, which are more than an eye sees; None for NaN."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def previews_of(folder: Path) -> list[dict]:
    """The previews in a run's folder, in their order: EMA weights, and raw ones where they are."""
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    found = []
    for name in sorted(names):
        if parts := re.fullmatch(r"epoch_(\d+)(?:_step_(\d+))?\.png", name):
            epoch, step = parts.groups()
            when = f"epoch {int(epoch):,}" + (f", step {int(step):,}" if step else "")
            raw = name.replace(".png", "_raw.png")
            found.append({"when": when, "ema": address(folder.name, name)})
            if raw in names:
                found[-1]["raw"] = address(folder.name, raw)
    return found


def classes_in(results: Path, previews: list[dict]) -> str:
    """Which class stands where in the previews, as the newest of them tells; "" without classes."""
    if not previews:
        return ""
    info = facts_in(results / unquote(previews[-1]["ema"]))
    for what in ("rows", "images"):
        if names := info.get(f"classes of the {what}"):
            return f"{what} from the top: {names.replace(',', ', ')}"
    return ""


def facts_in(path: Path) -> dict:
    """The texts in a PNG file; none where it is damaged."""
    with contextlib.suppress(*BROKEN_FILE), Image.open(path) as picture:
        return {name: text for name, text in picture.info.items() if isinstance(text, str)}
    return {}


def albums_of(results: Path) -> list[dict]:
    """The newest folders that `sample` has written, with their first images."""
    firsts = results.glob("*/sample_*1.png")
    folders = {path.parent: path.parent.stat().st_mtime for path in firsts}
    newest = sorted(folders, key=folders.get, reverse=True)[:ALBUMS]
    return [album_of(folder, f"album_{number}") for number, folder in enumerate(newest)]


def album_of(folder: Path, name: str) -> dict:
    """Images of a folder, each with what its PNG file tells."""
    paths = sorted(folder.glob("sample_*.png"))
    images = []
    for path in paths[:SHOWN]:
        info = facts_in(path)
        about = [path.name]
        about += [f"{fact} {info[fact]}" for fact in ("seed", "label", "step") if fact in info]
        command = printable(str(info.get("command", "")), limit=2000)
        file = address(folder.name, path.name)
        images.append({"file": file, "about": ", ".join(about), "command": command})
    return {"id": name, "name": folder.name, "count": len(paths), "images": images}


def evaluation_of(table: Path) -> list[dict]:
    """The rows of evaluation.csv, the newest first."""
    with contextlib.suppress(*BROKEN_FILE), open(table, newline="", errors="replace") as file:
        return list(csv.DictReader(file))[::-1]
    return []


# ---- a run's page --------------------------------------------------------------------------------


def section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>\n{body}\n" if body else ""


def about_section(results: Path, stored: dict) -> str:
    """What the run is, its settings, and where it was trained."""
    flags = stored["settings"].items()
    settings = [(flag, as_typed(flag, value)) for flag, value in flags if flag != "classes"]
    cards = [f'<div class="card"><h3>Run</h3>{table_of(summary_of(stored))}</div>']
    half = math.ceil(len(settings) / 2)
    for title, part in (("Settings", settings[:half]), ("Settings, continued", settings[half:])):
        cards.append(f'<div class="card"><h3>{title}</h3>{table_of(part)}</div>')
    commands = ""
    with contextlib.suppress(OSError):
        text = (results / "command.txt").read_text(errors="replace")
        commands = f"<h3>Commands and machine</h3><pre>{html.escape(text[-4000:])}</pre>"
    return f'<div class="grid">{"".join(cards)}</div>{commands}'


def preview_section(previews: list[dict], classes: str) -> str:
    """The newest preview, and a slider over all of them; `classes` says which are where."""
    if not previews:
        return ""
    figures = []
    for kind, title in (("ema", "EMA weights"), ("raw", "raw weights")):
        if any(kind in preview for preview in previews):
            source = previews[-1].get(kind, "")
            image = f'<img id="{kind}" class="pixels" src="{source}" alt="preview, {title}">'
            figures.append(f"<figure>{image}<figcaption>{title}</figcaption></figure>")
    last = len(previews) - 1
    slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="preview">'
    control = f'<div class="time"><button type="button">Play</button>{slider}</div>'
    control = control.replace("<div", '<div id="time"', 1)
    where = f'<p class="faint">{text_of(classes)}</p>' if classes else ""
    when = f'<p id="when">{previews[-1]["when"]}</p>'
    return f'{when}{control}<div class="pair">{"".join(figures)}</div>{where}'


def album_section(albums: list[dict]) -> str:
    """A place for each folder of samples, which page.js fills."""
    places = []
    for album in albums:
        shown = len(album["images"])
        few = f", the first {shown} are shown" if shown < album["count"] else ""
        hint = "choose an image to see its seed and the command that makes it again"
        places.append(
            f'<div class="card album" id="{album["id"]}"><h3>{text_of(album["name"])}</h3>'
            f'<p class="faint">{album["count"]:,} images{few}</p><div class="thumbs"></div>'
            f'<p class="about faint">{hint}</p><pre></pre>'
            f'<button type="button" class="copy">Copy</button></div>'
        )
    return "\n".join(places)


def evaluation_section(results: Path) -> str:
    """The figures of tools.evaluate, and images above the training images nearest to them."""
    rows = evaluation_of(results / "evaluation.csv")
    parts = []
    for row in rows[:1]:
        lines = []
        for name in ("distance", "precision", "recall", "copies"):
            real = row.get(f"{name}_real")
            beside = f"   (real images: {number_of(real)})" if real else ""
            if row.get(name):
                lines.append((name, number_of(row[name]) + beside))
        facts = ("date", "step", "sampler", "steps", "measure", "n")
        lines += [(name, row[name]) for name in facts if row.get(name)]
        more = f'<p class="faint">{len(rows):,} evaluations; the newest:</p>' if rows[1:] else ""
        parts.append(f'<div class="card">{more}{table_of(lines)}</div>')
    if (results / "evaluation.png").is_file():
        image = '<img class="wide pixels" loading="lazy" src="evaluation.png" alt="pairs">'
        title = "Each image above the nearest real one"
        parts.append(f'<div class="card"><h3>{title}</h3>{image}</div>')
    return f'<div class="grid">{"".join(parts)}</div>' if parts else ""


def number_of(text: str) -> str:
    """A number of a table, in four digits."""
    with contextlib.suppress(ValueError):
        return f"{float(text):.4g}"
    return text


def files_section(results: Path, name: str) -> str:
    """Links to what there is, with sizes."""
    found = [path for path in sorted(results.iterdir()) if path.name != "index.html"]
    links = [(path, address(path.name) + "/" * path.is_dir(), path.name) for path in found]
    for path in checkpoints.paths_of(name):
        links.append((path, address("..", "..", *path.parts), path.as_posix()))
    lines = []
    for path, link, shown in links:
        if path.exists() and not path.name.startswith("."):
            size = "" if path.is_dir() else size_of(path.stat().st_size)
            cell = f'<td><a href="{link}">{text_of(shown)}</a></td>'
            lines.append(f'<tr>{cell}<td class="number">{size}</td></tr>')
    return f'<div class="card"><table>{"".join(lines)}</table></div>'


def size_of(count: int) -> str:
    """A number of bytes, in words."""
    return journal.in_units(count, (" B", " kB", " MB", " GB"))


def write_page(name: str, stored: dict) -> Path:
    """Write results/NAME/index.html: where it is.

    Args:
        name: of the run.
        stored: FACTS, of which older runs have fewer, and `weights`, how many there are.

    Raises:
        OSError: a folder or disk cannot be read or written.
    """
    results = Path("results", name)
    make_folder(results)
    previews = previews_of(results / "training_progress")
    classes = classes_in(results, previews)
    albums = albums_of(results)
    done = fraction_of(stored)
    state = "finished" if done >= 1 else "" if math.isnan(done) else f"{done:.0%} is done"
    now = f"as of {datetime.datetime.now():%Y-%m-%d %H:%M}"
    others = '<a href="../index.html">all runs</a>' if Path("results/index.html").is_file() else ""
    about = " · ".join(part for part in (state, now, others) if part)
    parts = [f'<h1>{text_of(name)}</h1><p class="faint">{about}</p>']
    if state:
        parts.append(f'<progress value="{done:.4f}" aria-label="done"></progress>')
    if gap := next(filter(journal.is_open, stored["log"]), None):
        where = f"From epoch {journal.cells_of(gap)['epoch']:.1f} on"
        parts.append(f'<p class="note">{where}: {text_of(journal.MEMORIZES)}.</p>')
    without_script = '<noscript><img class="wide" src="loss.png" alt="loss curves"></noscript>'
    curves = f'<div class="grid" id="curves">{without_script}</div>' if stored["log"] else ""
    parts += [
        section("Previews", preview_section(previews, classes)),
        section("Curves", curves),
        section("Samples", album_section(albums)),
        section("Evaluation", evaluation_section(results)),
        section("What it is", about_section(results, stored)),
        section("Files", files_section(results, name)),
    ]
    data = {"curves": curves_of(stored["log"]), "previews": previews, "albums": albums}
    path = results / "index.html"
    write_html(path, name, "\n".join([*parts, script_of(data)]))
    return path


# ---- the page of all runs ------------------------------------------------------------------------

COMPARED = ("run", "images", "size", "epochs", "loss", "held-out loss", "distance", "saved")


def picture_of(results: Path) -> str:
    """The newest preview of a run, or its samples; where that is from results/."""
    previews = previews_of(results / "training_progress")
    if previews:
        return f"{quote(results.name)}/{previews[-1]['ema']}"
    grids = sorted(results.glob("*/samples.png"), key=lambda path: path.stat().st_mtime)
    return address(*grids[-1].parts[1:]) if grids else ""


def cells_of_run(name: str, stored: dict) -> tuple[str, ...]:
    """What stands in the row of a run, in the order of COMPARED."""
    count, _, epochs = runs.learned(stored)
    loss = f"{journal.last_loss(stored['log'])[0]:.4f}" if stored["log"] else ""
    best = best_of(stored["log"])
    newest = next(iter(evaluation_of(Path("results", name, "evaluation.csv"))), {})
    saved = max(path.stat().st_mtime for path in checkpoints.paths_of(name) if path.exists())
    return (
        name,
        f"{count:,}" if count < math.inf else "",
        "{}x{}".format(*stored["settings"]["img_size"]),
        f"{epochs:.1f}" if epochs < math.inf else "",
        loss,
        f"{best['held_out']:.4f}" if best else "",
        number_of(newest.get("distance") or ""),
        f"{datetime.datetime.fromtimestamp(saved):%Y-%m-%d %H:%M}",
    )


def write_index(found: dict[str, dict]) -> Path:
    """Write results/index.html, all runs side by side: where it is.

    Args:
        found: what each run's checkpoint tells, see `write_page`.
    """
    cards, lines = [], []
    for name, stored in found.items():
        picture = picture_of(Path("results", name))
        image = f'<img class="pixels" loading="lazy" src="{picture}" alt="">' if picture else ""
        cells = cells_of_run(name, stored)
        link = address(name, "index.html")
        facts = f"{cells[1]} images, {cells[3]} epochs, loss {cells[4]}"
        text = f'<h3>{text_of(name)}</h3><p class="faint">{text_of(facts)}</p>'
        cards.append(f'<a class="card" href="{link}">{image}{text}</a>')
        others = "".join(f'<td class="number">{text_of(cell)}</td>' for cell in cells[1:])
        lines.append(f'<tr><td><a href="{link}">{text_of(name)}</a></td>{others}</tr>')
    first, *others = COMPARED
    heads = f"<th>{first}</th>" + "".join(f'<th class="number">{head}</th>' for head in others)
    table = f'<div class="card scroll"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'
    pictures = f'<div class="grid runs">{"".join(cards)}</div>'
    body = f"<h1>All runs</h1>\n{table}\n<h2>Previews</h2>\n{pictures}"
    path = Path("results", "index.html")
    write_html(path, "All runs", body)
    return path


# ---- command.txt ---------------------------------------------------------------------------------

PACKAGES = ("torch", "numpy", "pillow")


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return found.group(1)
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit of this program, and whether files have been changed since; "" without git."""
    git = ["git", "-C", str(HERE.parent)]
    how = {"capture_output": True, "text": True, "timeout": 10}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head = subprocess.run([*git, "rev-parse", "HEAD", "--show-prefix"], **how)
        commit, below, *_ = [*head.stdout.splitlines(), "", ""]
        if commit and not below:  # and not another repository, in which this lies
            changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **how)
            return commit + (", with changes" if changed.stdout.strip() else "")
    return ""


def note_command(path: Path, device: str) -> None:
    """Add to command.txt what has been started: when, the command, versions, the machine."""
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    several = f", {processes.count()} processes" if processes.count() > 1 else ""
    where = f"{platform.system()} {platform.machine()}, {processor()}, {os.cpu_count()} cores"
    program = [f"git commit {commit}"] if (commit := git_commit()) else []
    now = datetime.datetime.now().isoformat(" ", "seconds")
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    lines = [f"{now}  {command}", f"{where}; on {device}{several}", ", ".join(versions), *program]
    before = path.read_bytes() if path.is_file() else b""
    text = "\n  ".join(printable(line, limit=2000) for line in lines)
    write_whole(path, lambda file: file.write(before + text.encode() + b"\n"))
