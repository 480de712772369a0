"""What the page of tools/play.py asks for, and makes: the flags of `sample`, and its files.

Nothing here knows Gradio.

Reading order: the model in memory; what the page asks for; making; an image that is there.
"""

import base64
import contextlib
import hashlib
import html
import inspect
import io
import math
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from torch import Tensor

import ddpm
import utils
from machinery import checkpoints, command_line, devices, reading, runs, writing
from machinery.basics import UserError, counted
from machinery.pixels import NUMBERS
from machinery.sampling import Request, guided_by
from machinery.steps import AUTO, choose

MOST_IMAGES = 16  # at a time
MOST_FRAMES = 64  # of a film
LARGER = 16  # times the pixels a run was trained at: a visitor must not take all memory
MASK_BYTES = 2**22
PACE = 0.1  # seconds between two steps that are shown: more often, a browser falls behind
VARIATION = 0.2  # of the way to another seed: another picture of the same scene
# what the page asks for, in the order of its inputs
FORM = ("run_name", "seed", "n_img", "sampler", "steps", "img_size", "label", "guide", "guidance")
FORM += ("variation", "strength", "init_image", "mask", "seed_from", "seed_to", "frames")

# ---- the model in memory -------------------------------------------------------------------------

# one at a time; `busy` while it makes images for somebody
memory = types.SimpleNamespace(key=None, checkpoint=None, trained=None, busy=False)


def load(run_name: str) -> tuple[dict, tuple]:
    """A run's checkpoint, and its network and noising process; the one before is let go first."""
    command_line.check_name("run_name", run_name)
    paths = checkpoints.paths_of(run_name)
    key = run_name, [path.stat().st_mtime for path in paths if path.exists()]
    if memory.key != key:
        memory.key = memory.checkpoint = memory.trained = None
        checkpoint = ddpm.load_run(run_name)
        settings = checkpoint["settings"]
        if settings["inputs"]:
            way_on = f"`python ddpm.py sample --run_name={run_name} --inputs=...` makes images"
            raise UserError(
                f"{run_name} was trained with --inputs, which this page has none of; {way_on}"
            )
        is_gray = settings["mode"] == "L"
        if settings["mode"] in NUMBERS or (settings["depth"] == 16 and not is_gray):
            way_on = f"`python ddpm.py sample --run_name={run_name}` makes them"
            raise UserError(f"{run_name} makes .npy files, which no page shows; {way_on}")
        for name in ("network", "optimizer"):  # only a training needs these
            checkpoint.pop(name, None)
        memory.trained = ddpm.build_trained(checkpoint, devices.pick_device("auto"))
        memory.checkpoint = checkpoint
        memory.key = key
    return memory.checkpoint, memory.trained


def facts_of(run_name: str) -> str:
    """What a visitor wants to know of a run, in a sentence."""
    checkpoint, (network, _) = load(run_name)
    settings = checkpoint["settings"]
    height, width = settings["img_size"]
    weights = sum(weight.numel() for weight in network.parameters()) / 1e6
    count, _, epochs = runs.learned(checkpoint)
    facts = [f"{width} x {height} pixels ({settings['mode']})", f"{weights:.1f} million weights"]
    if count < math.inf:
        facts.append(f"has seen {count:,} images {epochs:,.0f} times")
    if settings["classes"]:
        facts.append(f"{len(settings['classes'])} classes")
    return f"**{run_name}**: {', '.join(facts)}."


def usual_steps(run_name: str) -> int:
    """How many steps `sample` would take of a run."""
    return choose(AUTO, load(run_name)[0], ddpm.USUAL).steps


def is_led(run_name: str) -> bool:
    """Whether a run has classes that guidance leads to; a distilled one has learned its own."""
    checkpoint = load(run_name)[0]
    return bool(checkpoint["settings"]["classes"]) and not guided_by(checkpoint)


def guides_of(run_name: str) -> list[str]:
    """What autoguidance may lead away from; whether a run fits is seen when it is asked for."""
    checkpoint = load(run_name)[0]
    if guided_by(checkpoint):
        return [""]
    early = ["early"] if checkpoint.get("early") else []
    return ["", *early, *(name for name in checkpoints.run_names() if name != run_name)]


# ---- what the page asks for ----------------------------------------------------------------------


def flags_of(kind: str, form: dict) -> dict:
    """The flags of `sample` for what is filled in, read and checked as on the command line.

    Args:
        kind: "images", "change" (of a picture) or "walk" (between two seeds).
        form: values by the names in FORM.
    """
    wanted = {name: form[name] for name in ("run_name", "n_img", "sampler", "steps")}
    if form["img_size"]:
        wanted["img_size"] = form["img_size"]
    if form["label"]:
        wanted["label"] = ",".join(form["label"])
    if form["guide"]:
        wanted["guide"] = form["guide"]
    if form["guidance"] != ddpm.GUIDANCE:
        wanted["guidance"] = form["guidance"]
    if kind == "walk":
        wanted["n_img"] = form["frames"]
        wanted["interpolate"] = f"{form['seed_from']},{form['seed_to']}"
    else:
        wanted |= {"seed": form["seed"], "variation": form["variation"]}
    if kind == "change":
        if not form["init_image"]:
            raise UserError("there is no picture yet: upload one, or take one of the images")
        wanted |= {"init_image": form["init_image"], "strength": form["strength"]}
        if form["mask"]:
            wanted["mask"] = keep_mask(form["run_name"], form["mask"])
    # an empty field is None
    typed = {flag: "" if value is None else value for flag, value in wanted.items()}
    words = ["sample", *(f"--{flag}={value}" for flag, value in typed.items())]
    planned = command_line.plan("ddpm.py", {"sample": ddpm.sample}, words)
    flags = dict(zip(inspect.signature(ddpm.sample).parameters, planned.args, strict=True))
    command_line.check_limits(flags, ddpm.LIMITS)
    most = MOST_FRAMES if kind == "walk" else MOST_IMAGES
    if flags["n_img"] > most:
        raise UserError(f"{counted(flags['n_img'], 'image')} at a time; here it is at most {most}")
    return flags | {"name": "play/samples"}


def size_of(text: str, settings: dict) -> tuple[int, int]:
    """Height and width of what is filled in, or those the run was trained at."""
    try:
        size = runs.full_size(command_line.whole_numbers(text) or settings["img_size"])
    except ValueError as error:
        raise UserError(
            f"{text} is not a size; write 64, or height x width such as 48x96"
        ) from error
    runs.check_size(size, settings["multipliers"])
    if math.prod(size) > LARGER * math.prod(settings["img_size"]):
        raise UserError(f"{text} is more than {LARGER} times what the run was trained at")
    return size


def inputs_folder(run_name: str) -> Path:
    command_line.check_name("run_name", run_name)
    return Path("results", run_name, "play", "inputs")


def keep_mask(run_name: str, mask: str) -> str:
    """Where the painter's mask, a PNG in a data URL, lies as a file."""
    kind, _, text = mask.partition(",")
    if kind != "data:image/png;base64" or len(text) > MASK_BYTES:
        raise UserError("the mask is not a picture of the painter's")
    data = base64.b64decode(text)
    # what is no PNG is refused where it is read
    path = inputs_folder(run_name) / f"mask_{hashlib.sha256(data).hexdigest()[:12]}.png"
    writing.write_whole(path, lambda file: file.write(data))
    return str(path)


def keep_start(run_name: str, path: str, img_size: str) -> Path:
    """Where a picture lies as a file once it is read, at the size the model makes."""
    settings = load(run_name)[0]["settings"]
    size = size_of(img_size, settings)
    try:
        image = reading.read_start(path, "", size, settings["mode"], settings["resize"]).image
    except UserError as error:
        raise UserError(str(error).replace(f"--init_image={path}", Path(path).name)) from error
    digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12]
    kept = inputs_folder(run_name) / f"start_{digest}.png"
    writing.save_png(image[None], kept)
    return kept


# ---- making --------------------------------------------------------------------------------------


def as_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def show(text: str, role: str = "status", bar: str = "", image: str = "", about: str = "") -> str:
    """What stands above the images: a sentence, a bar, a picture."""
    picture = f'<img src="{image}" alt="{html.escape(about)}">' if image else ""
    return f'<div class="live"><p role="{role}">{html.escape(text)}</p>{bar}{picture}</div>'


def show_step(done: int, request: Request, x_0: Tensor) -> str:
    """The guess of the images after a step."""
    picture = io.BytesIO()
    writing.to_pillow(writing.tile(utils.to_bytes(x_0).cpu())).save(picture, "png")
    text = f"Step {done} of {request.moves}"
    bar = f'<progress max="{request.moves}" value="{done}" aria-label="{text}"></progress>'
    about = "The images as the network sees them in the noise"
    # not a status: a screen reader would read out every step
    return show(text, "presentation", bar, as_url(picture.getvalue()), about)


def explain(error: Exception) -> str:
    """An error in a sentence for the page; what is a mistake of ours is raised again."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'disk'}: {error.strerror or error}"
    if devices.is_out_of_memory(error):
        return command_line.out_of_memory(ddpm.sample)
    raise error


def make(
    kind: str, form: dict, is_stopped: Callable[[], bool]
) -> Iterator[tuple[str, dict | None]]:
    """Make what the page asks for: what to show after every step, and at last the outcome.

    `is_stopped` is asked before every step. Nothing is kept of a batch that is stopped.
    """
    if is_stopped():  # while it waited for its turn
        return
    memory.busy = True
    began = time.monotonic()
    try:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):  # remarks are for the visitor
            flags = flags_of(kind, form)
            checkpoint, trained = load(flags["run_name"])
            size_of(form["img_size"], checkpoint["settings"])
            request = ddpm.plan_images(flags, checkpoint, trained[1].signal.device)
        shown_at = 0.0
        with contextlib.closing(ddpm.make_images(request, *trained)) as steps:
            for done, (_, x_0) in enumerate(steps, 1):
                if is_stopped():
                    yield show("Stopped."), None
                    return
                if time.monotonic() - shown_at >= PACE:
                    yield show_step(done, request, x_0), None
                    shown_at = time.monotonic()
        album = request.album
        album.close()
        paths = sorted(map(str, album.folder.glob("sample_*.png")))
        outcome = {"kind": kind, "form": form, "paths": paths, "film": ""}
        done = f"{counted(len(paths), 'image')} in {time.monotonic() - began:.1f} seconds"
        hints = said.getvalue() + runs.advice(flags["run_name"], checkpoint)
        text = f"{done}, in {album.folder}. {hints}"
        if kind == "walk":
            film = album.folder / "interpolation.gif"
            outcome["film"] = str(film)
            yield show(text, image=as_url(film.read_bytes(), "gif"), about="The film"), outcome
        else:
            yield show(text), outcome
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        yield show(explain(error), "alert"), None
    finally:
        memory.busy = False


def wait() -> tuple[str, float]:
    """What is shown until it is one's turn, and since when one waits."""
    text = (
        "Another visitor's images are being made; yours come next." if memory.busy else "It begins."
    )
    return show(text), time.monotonic()


# ---- an image that is there ----------------------------------------------------------------------


def facts_in(outcome: dict, index: int) -> dict[str, str]:
    """What the PNG of an image tells: the command that makes it, its seed, its class."""
    with Image.open(outcome["paths"][index]) as picture:
        return picture.text


def changed(action: str, outcome: dict, index: int) -> dict:
    """What "Variations" and "More steps" of an image fill in.

    Raises:
        UserError: variations of an image without a seed of its own.
    """
    form = outcome["form"]
    told = facts_in(outcome, index)
    new = {"seed": int(told["seed"]), "n_img": 1, "variation": 0} if "seed" in told else {}
    if "label" in told:
        new["label"] = [told["label"]]
    if action == "More steps":
        most = load(form["run_name"])[0]["settings"]["noise_steps"]
        return new | {"steps": min(2 * int(form["steps"]), most)}
    if not new:
        raise UserError("this one lies between two seeds; variations are of an image with a seed")
    return new | {"n_img": 8, "variation": VARIATION}
