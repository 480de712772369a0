"""What does a GPU learn in ten minutes: a model, judged by pictures it has not seen, published.

python datasets/paint_landscapes.py --size=64 --count=12000 --folder=datasets/landscapes_64
python -m benchmarks.h100.train --dataset=datasets/landscapes_64
python -m benchmarks.h100.train --device=cpu --quick
"""

import csv
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.h100.report import LIMITS, Report
from machinery import checkpoints, command_line, devices
from machinery.basics import UserError

RUN = "gpu"
GOAL = 1_000_000  # images seen in training
PIECE = 15 * 2**20  # bytes of a part of the published model


def run(report: Report, name: str, *words: str) -> bool:
    """Whether a command of ours ends well; prints how long it took, and its last lines."""
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = ended.stdout.decode(errors="replace").splitlines()
    print("\n".join(lines[-14:]))
    report.line(name, time.monotonic() - began, "s", ended.returncode == 0)
    return ended.returncode == 0


def split(path: Path) -> list[Path]:
    """A file's pieces, beside it: `cat NAME.part*` is the file again."""
    pieces = []
    with open(path, "rb") as file:
        while data := file.read(PIECE):
            piece = path.with_name(f"{path.name}.part{len(pieces):02d}")
            piece.write_bytes(data)
            pieces.append(piece)
    return pieces


def train(
    dataset: command_line.FilePath = "datasets/landscapes",
    device: str = "auto",
    quick: bool = False,
    minutes: float = 7.5,
    compile: bool = True,
) -> None:
    """A model trained for some minutes, its images, its figures, and its published files.

        python -m benchmarks.h100.train

    Args:
        dataset: what to learn from.
        device: auto, cpu, cuda, cuda:N, mps or xpu.
        quick: a small network for some seconds, to see that all works.
        minutes: of training, with compiling.
        compile: compile the network first; never on a CPU.
    """
    command_line.check_limits(locals(), LIMITS)
    place = devices.pick_device(device)
    run_name = f"{RUN}_quick" if quick else RUN
    if checkpoints.exists(run_name):
        raise UserError(f"models/{run_name} holds a run; delete it, to train another")
    report = Report(10)
    held_out = f"datasets/held_out{'_quick' if quick else ''}"
    count = 60 if quick else 2048
    if not Path(held_out).exists():
        painting = ["--first_seed=1000000", f"--count={count}", f"--folder={held_out}"]
        run(report, "painting held-out pictures", "datasets/paint_landscapes.py", *painting)
    if quick:
        dataset = held_out
    small = ["--img_size=16", "--width=16", "--multipliers=1,2", "--batch_size=16"]
    size = small if quick else ["--batch_size=128", "--lr=1e-3", "--sample_every=500"]
    how = [f"--max_minutes={0.3 if quick else minutes}", "--epochs=100000", "--save_every=2"]
    how += [f"--dataset={dataset}", f"--device={place}"]
    how += ["--compile=yes"] if compile and place.type != "cpu" else []
    name = f"--run_name={run_name}"
    if run(report, "training", "ddpm.py", "train", name, *size, *how):
        with open(Path("results", run_name, "log.csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        images = int(rows[-1]["images"]) if rows else 0
        report.line("images seen in training", images, "", quick or images >= GOAL)
        if rows:
            report.line("loss of the last row", float(rows[-1]["loss"]))
            best = max(float(row["img_per_s"]) for row in rows)
            report.line("the best row of the log", best, "img/s")
    run(report, "64 images", "ddpm.py", "sample", name, "--n_img=64", f"--device={place}")
    for judges in dict.fromkeys([held_out, dataset]):
        words = [name, f"--n_img={20 if quick else 2048}", f"--dataset={judges}"]
        run(report, f"judging by {judges}", "-m", "tools.evaluate", *words, f"--device={place}")
    published = f"{run_name}_published"
    if run(report, "publishing", "-m", "tools.exchange", "publish", name, f"--to={published}"):
        path = checkpoints.paths_of(published)[0]
        report.line("size of the published model", path.stat().st_size / 1e6, "MB")
        print("pieces:", *split(path))
    report.close()


if __name__ == "__main__":
    command_line.run_command_line("-m benchmarks.h100.train", {"train": train}, LIMITS)
