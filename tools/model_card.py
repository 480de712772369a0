"""The model card of an export, in the form of Hugging Face's hub, with an image of samples.

Reading order: write_samples, figures_of, write_card.
"""

import contextlib
import csv
import json
import shlex
import shutil
from pathlib import Path

from PIL import Image

import ddpm
from machinery import (
    basics,
    checkpoints,
    command_line,
    devices,
    journal,
    reading,
    runs,
    sampling,
    writing,
)
from machinery.basics import UserError
from machinery.inputs import input_channels, is_made
from machinery.steps import AUTO, by_number, choose, teacher_of
from tools.evaluate import make_samples

CARD = """---
license: {license}
library_name: diffusers
{task}tags: [diffusers, pytorch, {kind}, ddpm]
datasets: [{dataset}]
---

# {name}

![samples](samples.png)

A denoising diffusion model ([DDPM](https://arxiv.org/abs/2006.11239)) with {weights:,} weights,
for images of {size} pixels in {colors}.

```python
{code}
```

{remarks}

{tables}
"""

CODE = """from diffusers import DDIMPipeline
pipeline = DDIMPipeline.from_pretrained("{name}")
images = pipeline(batch_size=4, num_inference_steps={few}, use_clipped_model_output=True).images"""
REMARK = "`DDPMPipeline` with `num_inference_steps={noise_steps}` is the paper's slower sampler."

CODE_BY_CLASS = """import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

network = UNet2DModel.from_pretrained("{name}", subfolder="unet")
scheduler = DDIMScheduler.from_pretrained("{name}", subfolder="scheduler")
scheduler.set_timesteps({few})
labels = torch.tensor([0, 0, {last}, {last}])
x_t = torch.randn(len(labels), {channels}, {height}, {width})
for t in scheduler.timesteps:
    with torch.no_grad():
        {answer}
    x_t = scheduler.step(answer, t, x_t, use_clipped_model_output=True).prev_sample
images = DDIMPipeline.numpy_to_pil((x_t / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())"""
ANSWER_GUIDED = """with_class = network(x_t, t, labels).sample
        without = network(x_t, t, torch.full_like(labels, {none})).sample
        answer = without + {guidance} * (with_class - without)  # classifier-free guidance"""
ANSWER_TAUGHT = "answer = network(x_t, t, labels).sample"
REMARK_BY_CLASS = """The model is class-conditional: `classes.json` names its classes, from number
0 to {last}. In the image above, each row is of one class, the first one on top. The pipelines of
diffusers do not support that."""
REMARK_GUIDED = """ In the code, {none} stands for no class; a guidance of 1 instead of {guidance}
samples what was learned, more gives clearer and less varied images."""

CODE_WITH_INPUTS = """import torch
from diffusers import DDIMScheduler, UNet2DModel

network = UNet2DModel.from_pretrained("{name}", subfolder="unet")
scheduler = DDIMScheduler.from_pretrained("{name}", subfolder="scheduler")
scheduler.set_timesteps({few})
inputs = torch.zeros(1, {input_channels}, {height}, {width})  # yours, from -1 to 1
x_t = torch.randn(1, {channels}, {height}, {width})
for t in scheduler.timesteps:
    with torch.no_grad():
        answer = network(torch.cat([x_t, inputs], dim=1), t{labels}).sample
    x_t = scheduler.step(answer, t, x_t, use_clipped_model_output=True).prev_sample
image = (x_t / 2 + 0.5).clamp(0, 1)"""
REMARK_WITH_INPUTS = """The model makes images from images: its network takes an input behind the
channels of the noisy image. `inputs.json` says what kind of input it was trained with; 0 throughout
stands for none. The pipelines of diffusers do not support that."""

CODE_STRAIGHT = """
from PIL import Image
images = [Image.frombytes("RGBa", each.size, each.tobytes()).convert("RGBA") for each in images]"""
REMARK_STRAIGHT = """

The four channels are colors times alpha (premultiplied), and alpha. The last two lines of the code
divide by alpha."""

REMARK_DISTILLED = """

The model was distilled from `{teacher}` for DDIM at the noising steps t = {visited}, without any
further guidance. The code takes others, which suit it less."""


def write_samples(stored: dict, run_name: str, path: Path) -> None:
    """The newest grid that `sample` made with these weights, or images that are generated now.

    A grid counts if it is of all classes, and from noise. Images generated now are 16, or a row of
    four for each class, of 16 classes at most.
    """
    grids = Path("results", run_name).glob("samples*/samples.png")
    weights = checkpoints.fingerprint_of(stored["average"])
    classes = stored["settings"]["classes"]
    for grid in sorted(grids, key=lambda grid: grid.stat().st_mtime, reverse=True):
        with contextlib.suppress(*basics.BROKEN_FILE), Image.open(grid) as image:
            flags = dict(word.partition("=")[::2] for word in shlex.split(image.text["command"]))
            is_whole = flags.get("--label", "") == ",".join(classes) and "--init_image" not in flags
            if image.text["weights"] == weights and is_whole:
                shutil.copyfile(grid, path)
                return
    if stored["settings"]["inputs"]:
        made_by = f"python ddpm.py sample --run_name={run_name} --inputs=..."
        raise UserError(f"there are no images of {run_name} for its card; `{made_by}` makes some")
    shown = classes[:16]
    count = 4 * len(shown) or 16
    labels = sampling.labels_in_turn(range(len(shown)), range(count))
    device = devices.pick_device("auto")
    way = choose(AUTO, stored, ddpm.USUAL)
    samples = make_samples(stored, range(count), way, 4, device, labels)
    writing.save_png(samples, path, shown)


def table(*rows: tuple) -> str:
    """A table in Markdown; the first row is its head."""
    first, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([first, "|---" * len(rows[0]) + "|", *others])


def figures_of(stored: dict, run_name: str) -> list[str]:
    """Tables: training, from the run's log, and how tools.evaluate last judged these weights."""
    tables = []
    path = Path("results", run_name, "evaluation.csv")
    if stored["log"]:
        loss, steps = journal.last_loss(stored["log"])
        _, images, epochs = runs.learned(stored)
        lines = [
            ("steps", f"{stored['step']:,}"),
            ("epochs", f"{epochs:.1f}"),
            ("images seen", f"{images:,}"),
            (f"loss, mean of the last {steps:,} steps", f"{loss:.4f}"),
        ]
        tables.append(table(("training", ""), *lines))
    judged = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    for row in [row for row in judged if row["step"] == str(stored["step"])][-1:]:
        about = f"{row['n']} images, {row['sampler']} in {row['steps']} steps"
        if row.get("guidance"):  # earlier versions have no such column
            about += f", guidance {row['guidance']}"
        titles = {"distance": f"Frechet distance: {row['measure']}"}
        titles |= {
            "precision": "precision (above that of real images: blur)",
            "recall": "recall (variety)",
        }
        lines = [
            (title, f"{float(row[name]):.3f}", f"{float(row[f'{name}_real']):.3f}")
            for name, title in titles.items()
        ]
        if row["copies"]:  # other images than those of the training cannot tell
            copies = f"{float(row['copies']):.3f}"
            lines.append(("memorization (copies of training images)", copies, ""))
        tables.append(table((about, "generated", "real images"), *lines))
    return tables


def code_and_remarks(stored: dict, name: str) -> tuple[str, str]:
    """Lines that make images with the model `name`, and what there is to say of them."""
    settings = stored["settings"]
    classes, mode, noise_steps = (settings[each] for each in ("classes", "mode", "noise_steps"))
    teacher = teacher_of(stored)
    code, remarks, answer = CODE, REMARK, ""
    if settings["inputs"]:
        code, remarks = CODE_WITH_INPUTS, REMARK_WITH_INPUTS
    elif classes and teacher:
        code, remarks, answer = CODE_BY_CLASS, REMARK_BY_CLASS, ANSWER_TAUGHT
    elif classes:
        code, remarks, answer = CODE_BY_CLASS, REMARK_BY_CLASS + REMARK_GUIDED, ANSWER_GUIDED
    if mode == "RGBA" and not settings["inputs"]:
        code += CODE_STRAIGHT
        remarks += REMARK_STRAIGHT
    facts = {
        "name": name,
        "channels": reading.CHANNELS[mode],
        "input_channels": input_channels(settings),
        "labels": ", torch.tensor([0])" if classes else "",
        "height": settings["img_size"][0],
        "width": settings["img_size"][1],
        "last": len(classes) - 1,
        "none": len(classes),
        "guidance": ddpm.GUIDANCE,
        "noise_steps": noise_steps,
        # a divisor, so that all steps are of one length
        "few": max(steps for steps in range(1, 51) if noise_steps % steps == 0),
    }
    code = code.format(answer=answer.format(**facts), **facts)
    remarks = remarks.format(**facts)
    if teacher:
        visited = by_number(stored["paths"])[stored["paths"]["default"]]
        teacher = basics.printable(teacher).replace("`", "'")
        remarks += REMARK_DISTILLED.format(teacher=teacher, visited=", ".join(map(str, visited)))
    return code, remarks


def write_card(folder: Path, stored: dict, run_name: str, license: str) -> None:
    """README.md and samples.png of the model in `folder`, whose name is the model's."""
    settings = stored["settings"]
    classes = settings["classes"]
    shown = [
        "mode",
        *(["inputs"] if is_made(settings["inputs"]) else []),
        *ddpm.NETWORK,
        *runs.IMPORTED,
        *ddpm.NOISING,
    ]
    if stored["log"]:
        shown += ["depth", "resize", "crop", "flip"]
        shown += ["optimizer", "batch_size", "lr", "warmup", "lr_decay", "ema_decay"]
    rows = [
        (name, command_line.as_typed(name, settings[name])) for name in shown if name in settings
    ]
    write_samples(stored, run_name, folder / "samples.png")
    kind = "class-conditional-image-generation" if classes else "unconditional-image-generation"
    kind = "image-to-image" if settings["inputs"] else kind
    code, remarks = code_and_remarks(stored, folder.name)
    text = CARD.format(
        license=license,
        task="" if kind.startswith("class") else f"pipeline_tag: {kind}\n",
        kind=kind,
        # the path on the author's disk is private
        dataset=json.dumps(Path(settings["dataset"]).name),
        name=folder.name,
        size=command_line.as_typed("img_size", settings["img_size"]),
        colors=reading.MODES[settings["mode"]],
        weights=sum(weight.numel() for weight in stored["average"].values()),
        code=code,
        remarks=remarks,
        tables="\n\n".join([table(("setting", ""), *rows), *figures_of(stored, run_name)]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
