"""What `sample` is asked for: checked against the run, cut into batches, and where it is written.

Nothing here knows how a network makes images.

Reading order: classes and seeds; checks; Request.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from machinery import checkpoints, devices, input_files, processes, reading
from machinery.basics import Seed, UserError, counted, in_short, printable
from machinery.command_line import as_typed, check_limits, check_name, did_you_mean
from machinery.input_files import InputFiles
from machinery.inputs import are_alike
from machinery.listing import composed
from machinery.reading import Start
from machinery.runs import RANGES, check_size, full_size
from machinery.steps import Way, remark_on, teacher_of
from machinery.tiles import Tiled
from machinery.writing import GRID_IMAGES, Album

GUIDANCE = 2.0
IMAGES = 16  # that are made where nobody says how many
PREVIEWS = 16  # images; more where there are more classes, 64 at most

# ---- classes and seeds ---------------------------------------------------------------------------


def labels_in_turn(classes: Sequence[int], numbers: Sequence[int]) -> Tensor | None:
    """The class of each image (B,), by its number alone; None for an unconditional network."""
    if not classes:
        return None
    return torch.tensor([classes[number % len(classes)] for number in numbers])


def preview_seeds(classes: int) -> range:
    """Of the images that previews show: as many of each class."""
    if not classes:
        return range(PREVIEWS)
    return range(min(64, classes * math.ceil(PREVIEWS / classes)))


def seeds_in_turn(flags: dict, numbers: Sequence[int]) -> list[Seed]:
    """What the noise of each image comes from, by its number and the flags of `sample` alone."""
    seed = flags["seed"]
    if flags["interpolate"]:
        last = flags["n_img"] - 1
        return [(*flags["interpolate"], number / last) for number in numbers]
    if flags["variation"]:
        turned = [(seed, seed + number, flags["variation"]) for number in numbers]
        return [each if number else seed for number, each in zip(numbers, turned, strict=True)]
    return [seed + number for number in numbers]


def guided_by(checkpoint: dict) -> str:
    """The teacher whose guidance a distilled run of classes has learned; "" for all others."""
    return teacher_of(checkpoint) if checkpoint["settings"]["classes"] else ""


def guidance_of(guidance: float | str, settings: dict, teacher: str = "") -> float:
    """`--guidance`; auto is 1 where more would do harm, or else GUIDANCE.

    That is where nothing but an input leads, so that images keep to it, and where guidance was
    learned from a `teacher`; see `guided_by`.
    """
    if guidance != "auto":
        return float(guidance)
    is_led_by_inputs = settings["inputs"] and not settings["classes"]
    return 1.0 if is_led_by_inputs or teacher else GUIDANCE


# ---- checks --------------------------------------------------------------------------------------


def check_labels(label: str, classes: tuple[str, ...]) -> list[int]:
    """The numbers of the classes in `--label=NAME|a,b|all`; none for an unconditional run."""
    if label == "all":
        return list(range(len(classes)))
    if not classes:
        rule = "for class-conditional runs, trained with --conditional"
        raise UserError(f"--label={label} is {rule}")
    names = [composed(name) for name in label.split(",")]
    if "" in names:
        raise UserError(f"--label={label} has an empty name between or after its commas")
    for name in names:
        if name not in classes:
            known = f"{did_you_mean(name, classes)} (there are: {in_short(classes)})"
            raise UserError(f"--label={name} is not a class of this run{known}")
    return [classes.index(name) for name in names]


def check_guidance(settings: dict, guidance: float | str, guide: str, teacher: str = "") -> None:
    """Refuse guidance where nothing leads, or where a run has learned it.

    Args:
        settings: of the run.
        guidance, guide: of the sampling.
        teacher: see `guided_by`.
    """
    if teacher and (guide or guidance not in ("auto", 1)):
        flag = f"--guide={guide}" if guide else f"--guidance={guidance:g}"
        rule = "leave it out"
        raise UserError(
            f"{flag}: this run has learned its guidance from {printable(teacher)}; {rule}"
        )
    is_led = settings["classes"] or settings["inputs"] or guide
    if guidance != "auto" and not is_led:
        rule = "for class-conditional runs, trained with --conditional; others need a --guide"
        raise UserError(f"--guidance={guidance:g} is {rule}")


def sampling_size(flags: dict, settings: dict) -> tuple[int, int]:
    """The height and width of a sampling; those of the run if left out."""
    size = full_size(flags["img_size"] or settings["img_size"])
    check_size(size, settings["multipliers"])
    return size


def check_start(flags: dict, default_strength: float, classes: int) -> None:
    """Refuse a start of `sample` that is none: strength without an image, seeds that contradict.

    `classes` is how many take turns: from image to image of a film, none may.
    """
    if flags["strength"] != default_strength and not flags["init_image"]:
        strength = f"--strength={flags['strength']:g}"
        raise UserError(f"{strength} needs an image to change: --init_image=...")
    if not flags["interpolate"]:
        return
    flag = f"--interpolate={as_typed('interpolate', flags['interpolate'])}"
    if len(flags["interpolate"]) != 2:
        raise UserError(f"{flag} is not two seeds, such as --interpolate=3,8")
    for seed in flags["interpolate"]:
        check_limits({"interpolate": seed}, {"interpolate": RANGES["seed"]})
    if not 2 <= flags["n_img"] <= GRID_IMAGES:
        rule = f"--n_img is how many images lead from one to the other, 2 to {GRID_IMAGES}"
        raise UserError(f"{flag}: {rule}; {flags['n_img']} is not")
    if classes > 1:
        raise UserError(f"{flag} leads through images of one class: choose it with --label")
    for other in ("seed", "variation"):
        if flags[other]:
            raise UserError(f"{flag} names the seeds; leave out --{other}={flags[other]:g}")


def filled_in(flags: dict, settings: dict, teacher: str = "") -> dict:
    """The flags of `sample` with what auto means for a run of these settings.

    Raises:
        UserError: inputs do not go with another flag.
    """
    guidance = guidance_of(flags["guidance"], settings, teacher)
    n_img = flags["n_img"]
    if n_img == "auto":
        n_img = 1 if flags["inputs"] else IMAGES
    if flags["inputs"] and flags["label"] == "all" and len(settings["classes"]) > 1:
        rule = f"say of which class the images are: --label={settings['classes'][0]}"
        raise UserError(f"--inputs of a run with classes: {rule}, or several, which take turns")
    for other in ("init_image", "interpolate", "variation"):
        if flags["inputs"] and flags[other]:
            value = as_typed(other, flags[other])
            raise UserError(f"--inputs and --{other}={value} do not go together; leave out one")
    return flags | {"guidance": guidance, "n_img": n_img}


def early_weights(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The EMA weights that a run has kept from a fourth of its training.

    Raises:
        UserError: there are none.
    """
    if not checkpoint.get("early"):
        reason = "those are kept after a fourth of a training, not in published or older runs"
        raise UserError(f"--guide=early: this run has no early weights; {reason}")
    return checkpoint["early"]


def check_guide(name: str, source: dict, settings: dict, size: tuple[int, int]) -> None:
    """Refuse the run `name`, of settings `source`, as a guide of a run with `settings` at `size`.

    Raises:
        UserError: naming what differs.
    """
    alike = ("noise_steps", "schedule", "objective", "mode", "classes", "input_mode")
    differs = [flag for flag in alike if source[flag] != settings[flag]]
    if not are_alike(source["inputs"], settings["inputs"]):
        differs = ["inputs"]
    try:
        check_size(size, source["multipliers"])
    except UserError as error:
        raise UserError(f"--guide={name} does not fit: {error}") from error
    if differs:
        flag = differs[0]
        has = f"it has --{flag}={as_typed(flag, source[flag])}"
        if source[flag] == "":
            has = f"it has no --{flag}"
        if flag == "classes":
            has = f"it has {counted(len(source[flag]), 'class')}"
        rule = "a guide shares the classes, inputs, colors and noise of the run that it guides"
        raise UserError(f"--guide={name} does not fit: {has}; {rule}")


def load_guide(
    name: str, checkpoint: dict, size: tuple[int, int], load: Callable[[str], dict]
) -> dict | None:
    """The checkpoint of a weaker network, for autoguidance at `size`: "early", a run, or ""."""
    if not name:
        return None
    if name == "early":
        return checkpoint | {"average": early_weights(checkpoint)}
    check_name("guide", name)
    guide = processes.from_first(load(name) if processes.is_first() else None)
    check_guide(name, guide["settings"], checkpoint["settings"], size)
    weights, own = (checkpoints.fingerprint_of(each["average"]) for each in (guide, checkpoint))
    if weights == own:
        rule = "a run does not lead away from itself; try a weaker one"
        raise UserError(f"--guide={name} has the weights of the run that it is to guide: {rule}")
    return guide


# ---- Request -------------------------------------------------------------------------------------


def facts_of_images(
    flags: dict, checkpoint: dict, guide: dict | None, device: torch.device
) -> dict[str, str | int]:
    """What a PNG file tells beside its command: what that has to find for the same image."""
    weights = checkpoints.fingerprint_of(checkpoint["average"])
    facts = {"run": flags["run_name"], "step": checkpoint["step"], "weights": weights}
    if guide:
        facts["guide_weights"] = checkpoints.fingerprint_of(guide["average"])
    precision = str(devices.precision_of(flags["precision"], device)).removeprefix("torch.")
    facts |= {"sampler": flags["sampler"], "steps": flags["steps"]}
    return facts | {"device": device.type, "computed_in": precision}


def flags_of_images(flags: dict, settings: dict, size: tuple[int, int], batch_size: int) -> dict:
    """The flags of `sample` that decide what its images look like, as its PNG files tell them."""
    classes = settings["classes"]
    flags = flags | {"batch_size": batch_size}
    if not flags["inputs"]:
        flags["img_size"] = size
    idle = {"name", "save_grid", "gif", "device"}
    idle |= {flag for flag, value in flags.items() if value in ("", "auto", ())}
    if not classes:
        idle |= {"label"}
    if not classes and not flags["guide"] and not flags["inputs"]:
        idle |= {"guidance"}
    if not flags["init_image"]:
        idle |= {"strength"}
    if not flags["variation"]:
        idle |= {"variation"}
    if flags["interpolate"]:
        idle |= {"seed"}
    return {flag: value for flag, value in flags.items() if flag not in idle}


class Batch(NamedTuple):
    """Images that are made at the same time."""

    numbers: range  # of all that are asked for, from 0
    seeds: list[Seed]
    labels: Tensor | None  # (B,)
    size: tuple[int, int]  # height and width


class Request:
    """What `sample` is asked for, checked against the run.

    Args:
        flags: those of `sample`, in their ranges.
        defaults: the parameters of `sample`: what has its default was not asked for.
        checkpoint: of the run.
        visited_steps: the values of t that an image passes through.
        device: where to compute.
        load: reads a run's checkpoint.

    Attributes:
        size: height and width, but where inputs have their own.
        inputs: what images are made from, or None.
        guide: the checkpoint of a weaker network, or None.
        start: an image to start from, or None.
        batches: those of this process.
        album: the files.

    Raises:
        UserError: a flag does not fit the run or another flag.
    """

    def __init__(
        self,
        flags: dict,
        defaults: Mapping[str, Parameter],
        checkpoint: dict,
        visited_steps: Sequence[int],
        device: torch.device,
        load: Callable[[str], dict],
    ):
        settings = checkpoint["settings"]
        self.checkpoint = checkpoint
        self.visited_steps = visited_steps
        self.chosen = check_labels(flags["label"], settings["classes"])
        input_files.check_inputs(flags["inputs"], settings)
        teacher = guided_by(checkpoint)
        check_guidance(settings, flags["guidance"], flags["guide"], teacher)
        self.flags = flags = filled_in(flags, settings, teacher)
        check_start(flags, defaults["strength"].default, len(self.chosen))
        self.inputs = None
        if flags["inputs"]:
            size = full_size(flags["img_size"]) if flags["img_size"] else ()
            self.inputs = InputFiles(flags["inputs"], settings, size)
            if flags["gif"] and len(set(self.inputs.sizes)) > 1:
                fault = "--gif shows images of one size"
                raise UserError(f"{fault}; those of these inputs have several")
        self.count = flags["n_img"] * (len(self.inputs.images) if self.inputs else 1)
        # larger ones are made in tiles of the size that the run was trained at
        self.size = settings["img_size"] if self.inputs else sampling_size(flags, settings)
        self.guide = load_guide(flags["guide"], checkpoint, self.size, load)
        images = flags["init_image"], flags["mask"]
        how = (settings["mode"], settings["resize"], settings["depth"])
        self.start = reading.read_start(*images, self.size, *how)
        self.batch_size = flags["batch_size"]
        if self.batch_size == "auto":
            self.batch_size = devices.images_at_once(device, self.size, settings["width"])
        # fail now if a batch cannot fit, before the list of its noise is built
        channels = reading.CHANNELS[settings["mode"]]
        largest = max(self.inputs.sizes, key=math.prod) if self.inputs else self.size
        torch.empty((min(self.count, self.batch_size), channels, *largest), device=device)
        self.starts = range(0, self.count, self.batch_size)
        if self.inputs:
            self.starts = self.inputs.starts(flags["n_img"], self.batch_size)
        self.starts = processes.share_of(self.starts)
        self.album = self.open_album(device)
        self.print_remarks()

    def print_remarks(self) -> None:
        """Tell what is unusual, or is the run's own; last, since a mistake ends in one line."""
        settings = self.checkpoint["settings"]
        way = Way(*(self.flags[name] for name in Way._fields))
        remark = remark_on(way, self.checkpoint, self.visited_steps)
        if remark and len(self.visited_steps) > 1:  # with a strength of 0 none is visited
            print(remark)
        if self.size != settings["img_size"]:
            height, width = settings["img_size"]
            trained = f"{self.flags['run_name']} was trained at {height}x{width}"
            print(f"{trained}; another size may look worse")

    def numbers_from(self, first: int) -> range:
        """The images that are made at the same time as the first of them."""
        stop = min(first + self.batch_size, self.count)
        if self.inputs:
            stop = self.inputs.end_of_a_size(first, stop, self.flags["n_img"])
        return range(first, stop)

    def size_of(self, numbers: range) -> tuple[int, int]:
        """Height and width of a batch."""
        if self.inputs:
            return self.inputs.sizes[numbers.start // self.flags["n_img"]]
        return self.size

    def fitted(self, network: nn.Module) -> Callable:
        """The network, in tiles where images are larger than those it was trained with."""
        return Tiled(network, self.size) if self.inputs else network

    @property
    def moves(self) -> int:
        """Steps of this process, of all its batches."""
        return max(1, len(self.visited_steps) - 1) * len(self.starts)

    def batches(self) -> Iterator[Batch]:
        for numbers in map(self.numbers_from, self.starts):
            labels = labels_in_turn(self.chosen, numbers)
            seeds = seeds_in_turn(self.flags, numbers)
            yield Batch(numbers, seeds, labels, self.size_of(numbers))

    def shown(self, numbers: range, from_bytes: Callable) -> tuple[Tensor | None, Start | None]:
        """What the network is shown beside a batch (B, C_in, H, W), and what the batch starts from.

        Args:
            from_bytes: levels to [-1, 1].
        """
        if not self.inputs:
            return None, self.start
        places = [number // self.flags["n_img"] for number in numbers]
        channels = reading.CHANNELS[self.checkpoint["settings"]["mode"]]
        return self.inputs.show(places, self.flags["seed"], channels, from_bytes)

    def open_album(self, device: torch.device) -> Album:
        """The files of the images, which make themselves again by their command."""
        flags, settings = self.flags, self.checkpoint["settings"]
        classes = settings["classes"]
        return Album(
            folder=Path("results", flags["run_name"], flags["name"]),
            flags=flags_of_images(flags, settings, self.size, self.batch_size),
            names=self.inputs.names_of_all(flags["n_img"]) if self.inputs else [],
            labels=[classes[number] for number in self.chosen],
            facts=facts_of_images(flags, self.checkpoint, self.guide, device),
            save_grid=flags["save_grid"],
            gif=flags["gif"],
            moves=max(1, len(self.visited_steps) - 1),
        )
