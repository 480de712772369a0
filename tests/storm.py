"""A storm of kills: a tiny network is trained, killed wherever it happens to be, and started again.

    python tests/storm.py --minutes=10
    python tests/storm.py --minutes=1 --seed=7

After every death the checkpoint must load and no finished save may be missing from it. A training
that was killed many times must end with what one that was never killed ends with, to the bit. (What
kill -9 cannot show is a missing fsync: what was written survives it in memory. test_checkpoints.py
asks for the order of the calls instead.)

Reading order: one training in a child, the ways to die, what must be true, the storm.
"""

import argparse
import collections
import contextlib
import io
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ddpm
from machinery import basics, checkpoints, journal
from machinery.listing import CACHE

# Dropout draws from PyTorch's generator in every step; 3 does not divide 16: epochs end within
# batches.
WORDS = "train --dataset=pictures --run_name=run --img_size=8 --width=4 --multipliers=1 --blocks=1"
WORDS += " --attention_size=0 --dropout=0.1 --noise_steps=5 --batch_size=3 --epochs=6 --warmup=5"
WORDS += " --lr=1e-3 --ema_decay=0.9 --sample_every=0 --device=cpu"
RUN, RESULTS, SAVES, OUTPUT = Path("models/run"), Path("results/run"), Path("saves"), Path("output")
AT_A_POINT = 77  # exit status of a child that ended itself at a named point


def train(save_every: float, prepare: Callable[[], None] = lambda: None) -> int:
    """Start the training in a child of this process: its id.

    It notes every finished save in a file.
    """
    if child := os.fork():
        return child
    status = 1
    try:
        sys.stdout = sys.stderr = open(OUTPUT, "w", buffering=1)
        save = checkpoints.save

        def save_and_note(run_name: str, **state) -> None:
            save(run_name, **state)
            with open(SAVES, "a") as file:
                file.write(f"{state['step']}\n")

        checkpoints.save = save_and_note
        journal.plot_curves = lambda rows, path: None  # it takes as long as the whole training
        journal.ROW_EVERY = 5
        journal.gflop_per_image = lambda network, size: 0.0
        prepare()
        sys.argv = ["ddpm.py", *WORDS.split(), f"--save_every={save_every}"]
        ddpm.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except KeyboardInterrupt:  # before the training, or after it
        status = 128 + signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


# ---- the ways to die -----------------------------------------------------------------------------

# Between the two renames of a save the newest checkpoint has no name: that is the place to look at
# most.
POINTS = [
    (os, "replace", "before"),
    (os, "replace", "before"),
    (os, "replace", "before"),
    (os, "replace", "after"),
]
POINTS += [
    (torch, "save", "in"),
    (torch, "save", "after"),
    (os, "fsync", "before"),
    (os, "fsync", "after"),
]
POINTS += [
    (checkpoints, "write_whole", "before"),
    (Path, "unlink", "before"),
    (Path, "unlink", "after"),
]


def die_at(owner, name: str, moment: str, call: int) -> Callable[[], None]:
    """Have a child end itself, without a last word, before, in or after one call of a function.

    Calls are counted from 1.
    """

    def prepare() -> None:
        function, left = getattr(owner, name), call

        def dying(*args, **options):
            nonlocal left
            left -= 1
            if left == 0 and moment == "before":
                os._exit(AT_A_POINT)
            if left == 0 and moment == "in":  # torch.save has written one half
                function(args[0], whole := io.BytesIO())
                args[1].write(whole.getvalue()[: len(whole.getvalue()) // 2])
                args[1].flush()
                os._exit(AT_A_POINT)
            answer = function(*args, **options)
            if left == 0:
                os._exit(AT_A_POINT)
            return answer

        setattr(owner, name, dying)

    return prepare


def strike(chance: random.Random, points: Iterator[tuple], seconds: float) -> tuple[str, int]:
    """Start the training, and end it in one of the ways: how, and the exit status.

    It may well finish before.
    """
    way = chance.choices(["kill -9", "named point", "signal"], [5, 4, 1])[0]
    save_every = chance.choice([0, 0, 0, 0.002])
    if way == "named point":
        prepare = die_at(*next(points), chance.randint(1, 12))
        return way, os.waitstatus_to_exitcode(os.waitpid(train(save_every, prepare), 0)[1])
    child = train(save_every)
    number = signal.SIGKILL if way == "kill -9" else chance.choice([signal.SIGTERM, signal.SIGINT])
    time.sleep(chance.uniform(0, 0.3 * seconds))  # some seven starts make one whole run
    os.kill(child, number)
    return way, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- what must be true ---------------------------------------------------------------------------


def same(a, b) -> bool:
    """Whether two checkpoints, or parts of them, are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def result() -> dict:
    """All that a finished run has learned and told, without the speeds."""
    with contextlib.redirect_stdout(io.StringIO()):
        state = checkpoints.load("run")
    table = [line.split(",")[:-1] for line in (RESULTS / "log.csv").read_text().splitlines()]
    of_the_clock = {"settings": None, "minutes": None}
    return state | of_the_clock | {"log": [row[:-1] for row in state["log"]], "table": table}


def last_save() -> int:
    noted = SAVES.read_text().split() if SAVES.exists() else []  # killed before it wrote: empty
    return int(noted[-1]) if noted else 0


def fault_after_a_death(status: int) -> str:
    """What is wrong once a child has ended, if anything is."""
    known = {
        0,
        -signal.SIGKILL,
        -signal.SIGTERM,
        128 + signal.SIGTERM,
        128 + signal.SIGINT,
        AT_A_POINT,
    }
    if status not in known:
        return f"the training ended with status {status}"
    if not SAVES.exists() and not checkpoints.exists("run"):
        return ""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            step = checkpoints.load("run")["step"]
    except basics.UserError as error:
        return f"lost: {error}"
    return (
        ""
        if step >= last_save()
        else f"lost: step {last_save()} was saved, the checkpoint is of step {step}"
    )


def fault_after_a_run(expected: dict) -> str:
    """What is wrong with a finished run, if anything is."""
    found = result()
    if different := [name for name in expected if not same(expected[name], found[name])]:
        return f"different from a run that was never killed: {', '.join(different)}"
    files = {path.name for path in RUN.iterdir()}
    return (
        ""
        if files <= {".lock", "checkpoint.pt", "checkpoint.previous.pt"}
        else f"left behind: {sorted(files)}"
    )


# ---- the storm -----------------------------------------------------------------------------------

ENDS = ("kill -9", "named point", "signal", "finished runs")


def begin_anew() -> None:
    for folder in (RUN, RESULTS):
        shutil.rmtree(folder, ignore_errors=True)
    SAVES.unlink(missing_ok=True)


def all_came(counts: collections.Counter) -> bool:
    return all(counts[end] for end in ENDS)


def storm(seconds: float, seed: int) -> tuple[collections.Counter, list[str]]:
    """Kill and start again for so long: what happened how often, and what was wrong.

    It goes on until every end has come, however slow the machine. It works in the current
    directory.
    """
    chance, counts, faults = random.Random(seed), collections.Counter(), []
    # every one of them comes, however short the storm
    points = itertools.cycle(chance.sample(POINTS, len(POINTS)))
    started = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(train(save_every=0), 0)[1])
    whole, expected = time.monotonic() - started, result()
    assert status == 0, OUTPUT.read_text()
    begin_anew()
    while len(faults) < 10 and (time.monotonic() - started < seconds or not all_came(counts)):
        if chance.random() < 0.05:
            shutil.rmtree(CACHE, ignore_errors=True)  # the next start decodes the images
        way, status = strike(chance, points, whole)
        counts["starts"] += 1
        counts["finished runs" if status == 0 else way] += 1
        fault = fault_after_a_death(status) or (status == 0 and fault_after_a_run(expected))
        if fault:
            counts["lost saves"] += fault.startswith("lost")
            faults.append(f"start {counts['starts']} ({way}): {fault}\n{OUTPUT.read_text()}")
        if fault or status == 0:
            begin_anew()
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    # a child of a process that has used threads could wait for them forever
    torch.set_num_threads(1)
    import matplotlib.pyplot  # noqa: F401  so that no child has to
    from conftest import paint

    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        paint(Path("pictures"), 16, (8, 8))
        counts, faults = storm(60 * options.minutes, options.seed)
    names = ("starts", *ENDS, "lost saves")
    print(f"seed {options.seed}:", ", ".join(f"{counts[name]:,} {name}" for name in names))
    if faults:
        print(*faults, sep="\n")
        again = f"{Path(__file__).name} --seed={options.seed}"
        sys.exit(f"{len(faults)} faults; the same kills again: {again}")


if __name__ == "__main__":
    main()
