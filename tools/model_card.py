"""What an exported model tells of itself: a card in the form of Hugging Face's hub, and a picture of samples.

Reading order: write_picture, figures_of, write_card.
"""

import contextlib
import csv
import json
import shutil
from pathlib import Path

from PIL import Image

import checkpoints
import command_line
import ddpm
import utils
from journal import COLUMNS
from tools.evaluate import make_samples

CARD = """---
license: {license}
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusers, pytorch, unconditional-image-generation, ddpm]
datasets: [{dataset}]
---

# {name}

![samples](samples.png)

A denoising diffusion model ([DDPM](https://arxiv.org/abs/2006.11239)) for images of {size} pixels: {weights:,} weights.

```python
from diffusers import DDIMPipeline
pipeline = DDIMPipeline.from_pretrained("{name}")
images = pipeline(batch_size=4, num_inference_steps={few}, use_clipped_model_output=True).images
```

`DDPMPipeline` with `num_inference_steps={noise_steps}` is the paper's own, slower way.

{tables}
"""


def write_picture(stored: dict, run_name: str, path: Path) -> None:
    """The newest grid that `sample` made with these very weights; if there is none, 16 images made now."""
    grids = Path("results", run_name).glob("samples*/samples.png")
    weights = checkpoints.fingerprint_of(stored["average"])
    for grid in sorted(grids, key=lambda grid: grid.stat().st_mtime, reverse=True):
        with contextlib.suppress(*utils.BROKEN_FILE), Image.open(grid) as picture:
            if picture.text["weights"] == weights:
                return shutil.copyfile(grid, path)
    steps = min(25, stored["settings"]["noise_steps"])
    utils.save_png(make_samples(stored, range(16), "dpm++", steps, 4, utils.pick_device("auto")), path)


def table(*rows: tuple) -> str:
    """A table in Markdown; the first row is its head."""
    first, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([first, "|---" * len(rows[0]) + "|", *others])


def figures_of(stored: dict, run_name: str) -> list[str]:
    """Tables: what the run's log tells, and how tools.evaluate last judged these weights."""
    tables, path = [], Path("results", run_name, "evaluation.csv")
    if stored["log"]:
        losses = [row[COLUMNS.index("loss")] for row in stored["log"][-50:]]
        last = dict(zip(COLUMNS, stored["log"][-1], strict=True))
        lines = [("steps", f"{stored['step']:,}"), ("epochs", f"{last['epoch']:.1f}")]
        lines += [("images seen", f"{last['images']:,}"), ("loss, lately", f"{sum(losses) / len(losses):.4f}")]
        tables.append(table(("training", ""), *lines))
    judged = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    for row in [row for row in judged if row["step"] == str(stored["step"])][-1:]:
        about = f"{row['n']} images, {row['sampler']} in {row['steps']} steps"
        lines = [(row["measure"], row["distance"], row["distance_real"])]
        lines += [(name, row[name], row[f"{name}_real"]) for name in ("precision", "recall")]
        lines = [(name, *(f"{float(figure):.3f}" for figure in figures)) for name, *figures in lines]
        copies = ("copies of training pictures", f"{float(row['copies']):.3f}", "")
        tables.append(table((about, "generated", "real, in their place"), *lines, copies))
    return tables


def write_card(folder: Path, stored: dict, run_name: str, license: str) -> None:
    """README.md and samples.png of the model in `folder`, whose name is the model's."""
    settings = stored["settings"]
    told = [name for name in (*ddpm.NETWORK, *ddpm.IMPORTED, *ddpm.NOISING) if name in settings]
    told += ["flip", "batch_size", "lr", "warmup", "lr_decay", "ema_decay"] if stored["log"] else []
    rows = [(name, command_line.as_typed(name, settings[name])) for name in told]
    write_picture(stored, run_name, folder / "samples.png")
    text = CARD.format(
        license=license,
        dataset=json.dumps(Path(settings["dataset"]).name),  # where it lay on a disk is nobody's business
        name=folder.name,
        size=command_line.as_typed("img_size", settings["img_size"]),
        weights=sum(weight.numel() for weight in stored["average"].values()),
        few=max(steps for steps in range(1, 51) if settings["noise_steps"] % steps == 0),  # so that all are equal
        noise_steps=settings["noise_steps"],
        tables="\n\n".join([table(("setting", ""), *rows), *figures_of(stored, run_name)]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
