"""Which sampler needs how many steps: a trained run is sampled in every way and judged alike.

    python -m benchmarks.samplers --run_name=landscapes
    python -m benchmarks.samplers --help

Every way begins from the same noise, so two rows differ by the way alone. What is judged is written
down at once; the same command does what is still missing.
"""

import itertools
import time
from pathlib import Path

import ddpm
import utils
from benchmarks import measuring
from benchmarks.quality import FIGURES, done_before
from machinery import command_line, devices
from tools import evaluate

STEPS = (10, 15, 20, 25, 50, 100, 250, 1000)
LIMITS = measuring.LIMITS | {"n_img": (16, 10**9), "most_steps": (1, 10**9)}
COLUMNS = ("run", "step", "sampler", "steps", "measure", "n", *FIGURES, "seconds", *measuring.WHERE)


def samplers(
    run_name: str = "landscapes",
    n_img: int = 2048,
    most_steps: int = 1000,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Sample a run by every sampler at 10 to 1,000 steps, and judge the images.

    They are judged by the images that the run was trained on.

        python -m benchmarks.samplers --run_name=landscapes

    Adds a row for every sampler and number of steps to results/benchmarks/samplers.csv, and prints
    all of them.

    Args:
        run_name: the run to sample from, a folder in models/.
        n_img: how many images are judged; distances can be compared for the same number only.
        most_steps: leave out what takes more steps; 1,000 take as long as all of the others and
            half of that again.
        batch_size: images made at the same time.
        device: auto, cpu, cuda, cuda:N, mps or xpu.

    Raises:
        UserError: a flag, package, checkpoint or data set that does not fit.
    """
    command_line.check_limits(locals(), LIMITS)
    command_line.check_name("run_name", run_name)
    place = devices.pick_device(device)
    path = measuring.RESULTS / "samplers.csv"
    command_line.check_table(path, COLUMNS)
    stored = ddpm.load_run(run_name)
    settings = stored["settings"]
    features = evaluate.load_efficientnet(place)
    folder = Path(settings["dataset"])
    images = utils.load_dataset(folder, settings["img_size"], settings["mode"]).images
    n = evaluate.comparable(n_img, len(images))
    shared = {"run": run_name, "step": stored["step"], "n": n}

    def is_shared(row: dict) -> bool:
        return all(row[name] == str(value) for name, value in shared.items())

    counts = [steps for steps in STEPS if steps <= min(most_steps, settings["noise_steps"])]
    for steps, sampler in itertools.product(counts, ddpm.SAMPLERS):
        done = [(row["sampler"], row["steps"]) for row in done_before(path) if is_shared(row)]
        if (sampler, str(steps)) in done:
            continue
        print(f"\n{sampler}, {steps} steps", flush=True)
        began = time.monotonic()
        samples = evaluate.make_samples(stored, range(n), sampler, steps, batch_size, place)
        seconds = time.monotonic() - began
        figures = evaluate.judge(samples, images, features, place)
        row = shared | {"sampler": sampler, "steps": steps, "seconds": seconds}
        row |= figures | measuring.facts_of(place)
        measuring.add_rows(path, [{name: row[name] for name in COLUMNS}], COLUMNS)
    rows = []
    for row in filter(is_shared, done_before(path)):
        rows.append(row | {name: float(row[name]) for name in (*FIGURES, "seconds")})
    shown = {"sampler": ("sampler", ""), "steps": ("steps", ""), "seconds": ("seconds", ".0f")}
    shown |= {name: (name, ".3f") for name in FIGURES}
    print(f"\n{run_name}: {n:,} images, {features.measure}; {measuring.hardware(place)}")
    print(measuring.table(rows, shown))


if __name__ == "__main__":
    command_line.run_command_line("-m benchmarks.samplers", {"samplers": samplers}, LIMITS)
