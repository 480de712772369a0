"""Which sampler and spacing needs how many steps: a run is sampled in every way and judged alike.

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
from benchmarks.quality import FIGURES, done_before, matching
from machinery import checkpoints, command_line, devices
from machinery.steps import SPACINGS, Way, by_number, choose, suited
from tools import evaluate

FOUND = "found"  # beside the spacings: the steps that tools.steps or tools.distill gave the run
LIMITS = measuring.LIMITS | {"n_img": (16, 10**9)}
COLUMNS = ("run", "step", "weights", "sampler", "spacing", "steps", "measure", "n", *FIGURES)
COLUMNS += ("seconds", *measuring.WHERE)


def ways(
    stored: dict, samplers: str, spacings: str, steps: tuple[int, ...]
) -> list[tuple[str, Way]]:
    """The ways to sample a run, with what each one's spacing is called; the quickest first.

    Raises:
        UserError: a name or a number is not known.
    """
    known = {"samplers": ddpm.SAMPLERS, "spacings": [*SPACINGS, FOUND]}
    chosen = {}
    for flag, text in (("samplers", samplers), ("spacings", spacings)):
        chosen[flag] = known[flag] if text == "all" else text.split(",")
        for name in chosen[flag]:
            command_line.check_limits({flag: name}, {flag: dict.fromkeys(known[flag])})
    own = by_number(stored["paths"]) if "paths" in stored else {}
    found = []
    for count, sampler, spacing in itertools.product(steps, *chosen.values()):
        if spacing != FOUND:
            way = choose(Way(sampler, count, spacing), stored, ddpm.USUAL)
            found.append((spacing, way))
        elif count in own and sampler in suited(stored["paths"]):
            found.append((spacing, choose(Way(sampler, count, "auto"), stored, ddpm.USUAL)))
    return found


def samplers(
    run_name: str = "landscapes",
    n_img: int = 512,
    steps: tuple = (4, 5, 6, 8, 10, 15, 25),
    samplers: str = "all",
    spacings: str = "all",
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Sample a run by every sampler and spacing in 4 to 25 steps, and judge the images.

    They are judged by the images that the run was trained on.

        python -m benchmarks.samplers --run_name=landscapes

    Adds a row for every way to results/benchmarks/samplers.csv, and prints all of them. Where the
    run keeps steps of its own (tools.steps, tools.distill), these are a spacing more: found.

    Args:
        run_name: the run to sample from, a folder in models/.
        n_img: how many images are judged; distances can be compared for the same number only.
        steps: the numbers of steps.
        samplers: all, or some with commas: dpm++,ipndm.
        spacings: all, or some with commas: even,log-snr,rho-7,found.
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
    wanted = ways(stored, samplers, spacings, steps)
    features = evaluate.load_efficientnet(place)
    folder = Path(settings["dataset"])
    images = utils.load_dataset(folder, settings["img_size"], settings["mode"]).images
    n = evaluate.comparable(n_img, len(images))
    weights = checkpoints.fingerprint_of(stored["average"])
    shared = {"run": run_name, "step": stored["step"], "weights": weights, "n": n}
    for spacing, way in wanted:
        key = shared | {"sampler": way.sampler, "spacing": spacing, "steps": way.steps}
        if matching(done_before(path), key):
            continue
        print(f"\n{way.sampler}, {spacing}, {way.steps} steps", flush=True)
        began = time.monotonic()
        samples = evaluate.make_samples(stored, range(n), way, batch_size, place)
        seconds = time.monotonic() - began
        figures = evaluate.judge(samples, images, features, place)
        row = key | {"seconds": seconds} | figures | measuring.facts_of(place)
        measuring.add_rows(path, [{name: row[name] for name in COLUMNS}], COLUMNS)
    rows = []
    for row in matching(done_before(path), shared):
        rows.append(row | {name: float(row[name]) for name in (*FIGURES, "seconds")})
    shown = {name: (name, "") for name in ("sampler", "spacing", "steps")}
    shown |= {"seconds": ("seconds", ".0f")} | {name: (name, ".3f") for name in FIGURES}
    print(f"\n{run_name}: {n:,} images, {features.measure}; {measuring.hardware(place)}")
    print(measuring.table(rows, shown))


if __name__ == "__main__":
    command_line.run_command_line("-m benchmarks.samplers", {"samplers": samplers}, LIMITS)
