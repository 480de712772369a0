"""The command line's manners: everything is understood, or refused in one line, before anything runs.

A command is a function: its signature is its options, its docstring is its help. Nothing here computes anything.

Reading order: how values are read, the plan, help, checks, signals and locks, streams, run_command_line.
"""

import csv
import difflib
import functools
import inspect
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import fire
from filelock import FileLock, Timeout

import devices
import processes
from utils import UserError


def yes_or_no(text: str) -> bool:
    """`--resume`, `--resume=no`, `--resume=0`: every spelling people try."""
    yes, no = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
    return (yes + no).index(text.lower()) < len(yes)


def whole_number(text: str) -> int:
    """`1000`, and `1e3` too."""
    number = float(text)
    if not number.is_integer():
        raise ValueError
    return int(text) if text.strip("+-").isdecimal() else int(number)  # a float would round large seeds


def whole_numbers(text: str) -> tuple[int, ...]:
    """`1,2,4`, `(1, 2, 4)`, `[1,2,4]`, or `48x96`."""
    return tuple(whole_number(part) for part in re.split("[,x]", text.strip("()[] ").rstrip(",")) if text)


def whole_number_or_auto(text: str) -> int | str:
    return text if text == "auto" else whole_number(text)


# How the text of a flag is read, and what the flag is called in messages. Text itself stays exactly as typed.
FLAG_TYPES = {
    bool: (yes_or_no, "yes or no"),
    int: (whole_number, "a whole number"),
    float: (float, "a number"),
    str: (str, "text"),
    tuple: (whole_numbers, "whole numbers"),
    int | str: (whole_number_or_auto, "a whole number or auto"),
}


def as_typed(flag: str, value) -> str:
    """A setting as it is written on the command line."""
    between = "x" if flag == "img_size" else ","
    return between.join(map(str, value)) if isinstance(value, tuple) else str(value)


def in_words(limit: tuple) -> str:
    """A range (smallest, largest)."""
    return f"{limit[0]:g} or more" if limit[1] >= 10**9 else f"{limit[0]:g} to {limit[1]:g}"


def choices(limit: dict) -> str:
    """The keys of a dict, with their values where these explain them."""
    explained = [f"{name}: {value}" for name, value in limit.items() if isinstance(value, str)]
    return "; ".join(explained) or ", ".join(limit)


def in_short(names: tuple[str, ...]) -> str:
    """The first twenty, and whether there are more."""
    return ", ".join(names[:20]) + ", ..." * (len(names) > 20)


def did_you_mean(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def read_flags(name: str, parameters: dict, words: list[str]) -> dict[str, str]:
    """The flags on a command line, as texts; refuses unknown, repeated and empty ones, and words that are none.

    Fire would run the command before it complains about an unknown flag, let the last of two repeated ones win, and
    take a flag without a value for True.
    """
    flags, words = {}, list(words)
    while words:
        word = words.pop(0)
        if not re.match("--[A-Za-z]", word):
            raise UserError(f"{word!r} is not an option; the options of {name} are written --option=value")
        flag, equals, text = word[2:].partition("=")
        flag = flag.replace("-", "_")
        if flag not in parameters and flag[:2] == "no" and parameters.get(flag[2:]) is bool and not equals:
            flag, equals, text = flag[2:], "=", "no"
        if flag not in parameters:
            raise UserError(
                f"--{flag} is not an option of {name}{did_you_mean(f'--{flag}', [f'--{p}' for p in parameters])}"
            )
        if flag in flags:
            raise UserError(f"--{flag} is given twice")
        if not equals and words and not re.match("--[A-Za-z]", words[0]):
            text = words.pop(0)
        elif not equals and parameters[flag] is not bool:
            raise UserError(f"--{flag} needs a value: --{flag}=...")
        elif not equals:
            text = "yes"
        flags[flag] = text
    return flags


def plan(program: str, commands: dict[str, Callable], words: list[str]) -> Callable[[], None]:
    """Understand a whole command line without running anything: the command, ready to be called."""
    name, *rest = words
    if name not in commands:
        raise UserError(f"{name!r} is not a command{did_you_mean(name, commands)} (there are: {', '.join(commands)})")
    parameters = {
        flag: parameter.annotation for flag, parameter in inspect.signature(commands[name]).parameters.items()
    }
    flags, planned = read_flags(name, parameters, rest), []

    def read(flag: str, text: str):
        try:
            return FLAG_TYPES[parameters[flag]][0](text)
        except (ValueError, OverflowError) as error:
            raise UserError(f"--{flag}={text} is not {FLAG_TYPES[parameters[flag]][1]}") from error

    @functools.wraps(commands[name])
    def stand_in(*values) -> None:  # Fire calls this; the command itself starts when the whole line is understood
        planned.append(functools.partial(commands[name], *values))

    readers = {flag: functools.partial(read, flag) for flag in parameters}
    words = [name, *(f"--{flag}={text}" for flag, text in flags.items())]
    fire.Fire({name: fire.decorators.SetParseFns(**readers)(stand_in)}, words, program)
    return planned[0]


def help_text(program: str, commands: dict[str, Callable], limits: dict, words: list[str]) -> str:
    """The whole help of a command, made of its signature, its docstring and `limits`; or the list of commands."""
    name = next((word for word in words if word in commands), None if len(commands) > 1 else next(iter(commands)))
    if name is None:
        about = [f"  {name:9}{inspect.getdoc(command).splitlines()[0]}" for name, command in commands.items()]
        examples = [re.search("  python .*", inspect.getdoc(command)).group() for command in commands.values()]
        lines = [f"usage: python {program} COMMAND [--option=value ...]", "", *about, "", "for example:", *examples]
        return "\n".join([*lines, "", f"all options: python {program} COMMAND --help"])
    about, _, arguments = inspect.getdoc(commands[name]).partition("\nArgs:\n")
    sentences = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, flags=re.MULTILINE))
    named = f"{program} {name}" if len(commands) > 1 else program
    lines = [f"usage: python {named} [--option=value ...]", ""]
    lines += [(part if part[0] == " " else textwrap.fill(part, 80)) + "\n" for part in about.strip().split("\n\n")]
    for flag, parameter in inspect.signature(commands[name]).parameters.items():
        limit, kind = limits.get(flag), FLAG_TYPES[parameter.annotation][1]
        if limit:
            kind = choices(limit) if isinstance(limit, dict) else f"{kind}, {in_words(limit)}"
        lines.append(f"  --{flag}={as_typed(flag, parameter.default)}    ({kind})")
        lines += textwrap.wrap(" ".join(sentences[flag].split()), 80, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def check_limits(settings: dict, limits: dict) -> None:
    """Refuse a setting that is not among its choices (a dict) or not in its range (a pair); NaN is in none."""
    for flag, value in settings.items():
        limit = limits.get(flag)
        if isinstance(limit, dict) and value not in limit:
            raise UserError(f"--{flag}={value} is not one of: {', '.join(limit)}")
        if isinstance(limit, tuple) and value != "auto" and not limit[0] <= value <= limit[1]:
            raise UserError(f"--{flag}={value} is out of range, which is {in_words(limit)}")


def check_name(flag: str, name: str) -> None:
    """Refuse what could not be one folder's name on every system, or would lead elsewhere (`..`, `/abs`, `a/b`)."""
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name)
    if reserved or name.endswith(".") or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        rules = "1 to 64 letters, digits, '.', '_', '-', the first a letter or digit, and no reserved word such as con"
        raise UserError(f"--{flag}={name} is not a usable name; it takes {rules}")


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


def check_table(path: Path, columns: tuple[str, ...]) -> None:
    """Refuse, before anything is made, a CSV file that rows of these columns could not be added to."""
    if path.exists():
        with open(path, newline="", errors="replace") as file:
            if next(csv.reader(file), None) != list(columns):
                raise UserError(f"{path} has other columns than this version writes; move it away")


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


class StopSignals:
    """Within this block the first Ctrl-C or SIGTERM only sets `status` (130, 143), so that a step can be finished.

    A second one acts as it always does, which harms nothing: files appear whole or not at all.
    """

    status = 0

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        # the terminal was closed: the training goes on; torchrun would not let it, so there it stops
        if hasattr(signal, "SIGHUP"):
            wanted = self.note if processes.count() > 1 else signal.SIG_IGN
            self.before[signal.SIGHUP] = signal.signal(signal.SIGHUP, wanted)
        return self

    def note(self, number: int, _frame) -> None:
        self.status = 128 + number
        self.__exit__()

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def lock_run(folder: Path) -> FileLock:
    """Keep other trainers out of a run's folder while this lock is referred to; it dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder}: another process is training this run; choose another --run_name") from error
    return lock


class SteadyStream:
    """A standard stream that outlives its reader: after `| head` has left, a training goes on, in silence."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def steady_streams() -> None:
    """Have standard output and error always there, and take every text."""
    for number in range(3):  # started without one of them (`>&-`), a checkpoint would get its number, and its text
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a file's name need not be text in the terminal's encoding
    sys.stdout, sys.stderr = SteadyStream(sys.stdout), SteadyStream(sys.stderr)


def run_command_line(program: str, commands: dict[str, Callable], limits: dict) -> None:
    """Do what `sys.argv` asks for.

    Exit status: 0 done; 2 what was asked for is not possible; 1 another process of torchrun has ended, or a mistake of
    ours; 130 Ctrl-C, 143 SIGTERM and 129 a closed terminal under torchrun, with the run saved.

    Of torchrun's processes only the first one prints, and of each machine the first one says what is wrong.
    """
    steady_streams()
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")
    try:
        message, status = try_command(program, commands, limits, sys.argv[1:])
        if message:
            print(f"{program.removeprefix('-m ')}: {' '.join(message.splitlines())}", file=sys.stderr)
        if status:
            sys.exit(status)
    finally:
        processes.leave()


def try_command(program: str, commands: dict[str, Callable], limits: dict, words: list[str]) -> tuple[str, int]:
    """Run a command line; what went wrong, and the exit status."""
    if len(commands) == 1 and words[:1] != [*commands]:  # the only command need not be named
        words = [*commands, *words]
    try:
        if not words or {"--help", "-h", "help"} & set(words):
            print(help_text(program, commands, limits, words))
        else:
            plan(program, commands, words)()
        return "", 0
    except (UserError, processes.Abandoned) as error:  # all processes find these alike
        return str(error) if processes.is_first_here() else "", 2 if isinstance(error, UserError) else 1
    except OSError as error:  # a folder that may not be written to, a full disk
        return f"{error.filename or 'disk'}: {error.strerror or error}", 2
    except (MemoryError, RuntimeError) as error:  # PyTorch's own errors of this kind are RuntimeErrors
        if re.match(r"torch\._(dynamo|inductor)", type(error).__module__) or "torch.compile" in str(error):
            reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
            return f"--compile: {reason}; without it, the same is learnt" if processes.is_first_here() else "", 2
        if not devices.is_out_of_memory(error):
            raise
        known = inspect.signature(commands[words[0]]).parameters
        flags = [f"--{flag}" for flag in ("batch_size", "img_size", "micro_batch", "width") if flag in known]
        more = "; so does --grad_checkpointing" if "grad_checkpointing" in known else ""
        return f"out of memory; a smaller {' or '.join(flags)} takes less{more}", 2
    except KeyboardInterrupt:
        return "stopped", 130
