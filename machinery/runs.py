"""A run: what fits together, its lock, the table of all runs.

Reading order: checks of what a run is asked to be; the lock; the table.
"""

import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from machinery import checkpoints
from machinery.basics import BROKEN_FILE, UserError
from machinery.command_line import as_typed, did_you_mean, in_short
from machinery.journal import COLUMNS


def check_size(img_size: tuple[int, ...], stride: int) -> tuple[int, int]:
    """(height, width) of `--img_size=64` or `--img_size=48x96`, if a network of this stride can take it."""
    if not 1 <= len(img_size) <= 2:
        raise UserError(
            f"--img_size={as_typed('img_size', img_size)} is not a size; write 64, or height x width such as 48x96"
        )
    for side in img_size:
        if side % stride or not stride <= side <= 2048:
            near = stride * min(2048 // stride, max(1, round(side / stride)))
            rule = f"a multiple of {stride} (2 to the power of levels - 1), at most 2048"
            raise UserError(f"--img_size={as_typed('img_size', img_size)}: {side} is not {rule}; the nearest is {near}")
    return img_size[0], img_size[-1]


def check_network(settings: dict) -> tuple[int, int]:
    """Refuse a network that cannot be: the size (height, width) of the images it is for."""
    multipliers, width = settings["multipliers"], settings["width"]
    if not 1 <= len(multipliers) <= 8 or not all(1 <= multiplier <= 64 for multiplier in multipliers):
        raise UserError(f"--multipliers={','.join(map(str, multipliers))} is not 1 to 8 numbers from 1 to 64")
    if width % (4 if width <= 128 else 32):
        raise UserError(f"--width={width} is not a multiple of 4 up to 128, or of 32 above")
    return check_size(settings["img_size"], stride=2 ** (len(multipliers) - 1))


def check_same_run(stored: dict, settings: dict, fingerprint: str, may_change: tuple[str, ...]) -> None:
    """Refuse to go on with a run of other settings or other images; say when its learning rate is stretched."""
    was = stored["settings"]
    differences = [
        f"--{name} was {as_typed(name, was.get(name))}, is now {as_typed(name, value)}"
        for name, value in settings.items()
        if name != "classes"  # these depend on --conditional and on the images
        if name not in was or (name not in may_change and value not in (was[name], "auto"))
    ]
    if stored["data"] != fingerprint:
        differences.append(f"the images in {settings['dataset']} are not those it was trained on ({was['dataset']})")
    if differences:
        ways_out = "repeat its settings to continue it, or begin a new run with another --run_name"
        raise UserError(f"--run_name={settings['run_name']} is another run: {'; '.join(differences)}; {ways_out}")
    if settings["epochs"] > was["epochs"] and settings["lr_decay"] != "none":
        print(f"the learning rate's fall over {was['epochs']} epochs is stretched to {settings['epochs']}")
    before, now = (f"{lengths['max_minutes']:g} minutes" for lengths in (was, settings))
    if now != before and settings["lr_decay"] != "none":
        print(f"the budget of time was {before}, is now {now} (0 is none): the learning rate goes where that puts it")


def check_same_network(name: str, was: dict, settings: dict) -> None:
    """Refuse to begin from the run `name`, of settings `was`, where the network is another; tell the flags that fit."""
    flags = ("width", "multipliers", "blocks", "noise_steps", "schedule", "objective", "mode", "conditional")
    needed = {flag: was[flag] for flag in flags}
    if "attention_levels" not in was:  # as many pixels more as the image has, on the same levels
        needed["attention_size"] = was["attention_size"] * min(settings["img_size"]) // min(was["img_size"])
    flags = [
        f"--{flag}={as_typed(flag, value)}" for flag, value in needed.items() if settings[flag] not in (value, "auto")
    ]
    if flags:
        raise UserError(f"--init_from={name} has another network; to fit it, add {' '.join(flags)}")
    if settings["classes"] != was["classes"]:
        known = in_short(was["classes"])
        raise UserError(f"--init_from={name} knows other classes; it takes folders of these names: {known}")


def check_walk(settings: dict, steps: int, guidance: float, default_guidance: float) -> None:
    """Refuse more steps than a run has, and guidance (other than the default) where there are no classes."""
    if steps > settings["noise_steps"]:
        raise UserError(f"--steps={steps} is more than the {settings['noise_steps']} noising steps of this run")
    if guidance != default_guidance and not settings["classes"]:
        raise UserError(f"--guidance={guidance:g} is for runs that know classes, trained with --conditional")


def check_labels(label: str, classes: tuple[str, ...]) -> list[int]:
    """The numbers of the classes that `--label=NAME|a,b|all` names; none for a run without classes."""
    if label == "all":
        return list(range(len(classes)))
    if not classes:
        raise UserError(f"--label={label} is for runs that know classes, trained with --conditional")
    for name in label.split(","):
        if name not in classes:
            known = f"{did_you_mean(name, classes)} (there are: {in_short(classes)})"
            raise UserError(f"--label={name} is not a class of this run{known}")
    return [classes.index(name) for name in label.split(",")]


def lock_run(folder: Path) -> FileLock:
    """Keep other trainers out of a run's folder while this lock is referred to; it dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder}: another process is training this run; choose another --run_name") from error
    return lock


def runs_table() -> str:
    """All runs there are, a line each: where they stand, and when they were saved.

    Raises:
        UserError: there is none.
    """
    if not checkpoints.run_names():
        raise UserError("there is no run yet; `python ddpm.py train` makes one")
    lines = [("run", "images", "size", "epochs", "loss", "saved")]
    for name in checkpoints.run_names():
        try:
            stored = checkpoints.load(name, peek=True)
            settings = stored["settings"]
            images = "".join(letter for letter in str(settings["dataset"]) if letter.isprintable())
            facts = [images, "x".join(map(str, settings["img_size"])), "", ""]
            if stored["log"]:  # a run of fewer steps than make a row has none
                row = dict(zip(COLUMNS, stored["log"][-1], strict=True))
                facts[0] = f"{row['images'] / row['epoch']:,.0f} from {images}"
                facts[2:] = f"{row['epoch']:.1f}", f"{row['loss']:.4f}"
        except (UserError, *BROKEN_FILE):
            facts = ["cannot be read", "", "", ""]
        saved = max(path.stat().st_mtime for path in checkpoints.paths_of(name) if path.exists())
        lines.append((name, *facts, f"{datetime.datetime.fromtimestamp(saved):%Y-%m-%d %H:%M}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
