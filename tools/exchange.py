"""Publish a run, export it to Hugging Face's diffusers, or import a model from there.

    python -m tools.exchange publish --run_name=my_run --to=my_model
    python -m tools.exchange export --run_name=my_run --to=folder
    python -m tools.exchange import --source=folder --run_name=my_model

Folders have the form of diffusers, which need not be installed. What the other side cannot
express exactly is refused.

Reading order: publish; descriptions for diffusers, used in both directions; export; import_; main.
The card that goes with an export is in model_card.py.
"""

import json
import math
import os
import re
from pathlib import Path

import torch
from torch import Tensor

import ddpm
from machinery import basics, checkpoints, command_line, reading, runs
from machinery.basics import UserError
from machinery.command_line import FilePath
from machinery.inputs import is_made, is_sound
from machinery.pixels import NUMBERS
from machinery.steps import are_paths, kept
from modules import SelfAttention, UNet
from tools.model_card import write_card


def publish(run_name: str = "", to: str = "") -> None:
    """Cut a run down to what sampling needs: a small file to give away.

        python -m tools.exchange publish --run_name=my_run --to=my_model

    Writes models/TO/checkpoint.pt: the EMA weights in half precision, the settings and the log.
    You can sample from it, and fine-tune it with --init_from, but not resume it.

    Args:
        run_name: the run to publish, a folder in models/.
        to: the new run's name.

    Raises:
        UserError: there is no such run, there is already one called TO, or half precision cannot
            hold its weights.
    """
    for flag, name in (("run_name", run_name), ("to", to)):
        if not name:
            raise UserError(f"--{flag} is missing")
        command_line.check_name(flag, name)
    stored = ddpm.load_run(run_name)
    runs.check_free("to", to)
    published = checkpoints.published(stored, to)
    average = published["average"]
    if not all(weight.isfinite().all() for weight in average.values()):
        raise UserError(
            f"a weight of {run_name} is beyond 65,504, the largest number of half precision"
        )
    with runs.new_run("to", to):
        checkpoints.save(to, **published)
    path = checkpoints.paths_of(to)[0]
    number = sum(weight.numel() for weight in average.values())
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {number:,} weights")


# ---- descriptions for diffusers ------------------------------------------------------------------

OBJECTIVES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
# schedulers of one and the same noising process
SCHEDULERS = ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"]
# What UNet2DModel and the schedulers take for an entry that is left out.
UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "dropout": 0.0,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "mid_block_scale_factor": 1,
    "attention_head_dim": 8,
    "add_attention": True,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "resnet_time_scale_shift": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
NOISING = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "clip_sample_range": 1.0,
}
# what diffusers' EMAModel adds to the description of its network
EMA_KEYS = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup"}
EMA_KEYS |= {"inv_gamma", "power", "min_value", "max_value", "foreach"}
INPUTS = "inputs.json"  # what an image-to-image network is shown behind the channels of x_t
INPUT_KEYS = ("inputs", "input_mode")
PATHS = "paths.json"  # which steps suit the run; diffusers takes other ones
CLASSES = "classes.json"  # names, in the order of their numbers; diffusers has no place for them


def unet_config(network: UNet, settings: dict) -> dict:
    """UNet2DModel's description of a network, built from `settings`.

    Raises:
        UserError: its attention heads have different widths.
    """
    size = settings["img_size"]
    levels = network.down_blocks
    attentions = [module for module in network.modules() if isinstance(module, SelfAttention)]
    head_widths = {attention.to_q.in_features // attention.heads for attention in attentions}
    has_one_head = all(attention.heads == 1 for attention in attentions)
    if len(head_widths) > 1 and not has_one_head:
        raise UserError(f"its attention heads have {len(head_widths)} different widths")
    kinds = ["Attn" * isinstance(level.attentions[0], SelfAttention) for level in levels]
    return UNET | {
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "in_channels": network.conv_in.in_channels,
        "out_channels": network.conv_out.out_channels,
        "layers_per_block": settings["blocks"],
        "freq_shift": network.frequency_shift,
        "block_out_channels": [level.resnets[0].conv1.out_channels for level in levels],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "downsample_padding": settings.get("downsample_padding", 1),
        "dropout": settings["dropout"],
        "attention_head_dim": None if has_one_head else head_widths.pop(),
        "norm_num_groups": network.conv_norm_out.num_groups,
        "norm_eps": network.conv_norm_out.eps,
        "num_class_embeds": network.class_embedding and network.class_embedding.num_embeddings,
    }


def scheduler_config(diffusion: ddpm.Diffusion, schedule: str) -> dict:
    """DDPMScheduler's description of a noising process.

    Over all T steps the scheduler samples as `Diffusion.denoise` does.

    Raises:
        UserError: float32, in which schedulers compute, is too coarse for the schedule's end.
    """
    betas = 1 - diffusion.alpha_bar[1:] / diffusion.alpha_bar[:-1]  # (T,) float64
    kept = torch.cumprod(1 - betas.float(), dim=0) / diffusion.alpha_bar[1:]
    if (kept.sqrt() - 1).abs().max() > 1e-3:
        given = f"schedule={schedule} with noise_steps={diffusion.noise_steps}"
        raise UserError(f"{given} ends in too little signal for float32")
    config = NOISING | {
        "num_train_timesteps": diffusion.noise_steps,
        "prediction_type": OBJECTIVES[diffusion.objective],
        "variance_type": "fixed_large",
        "clip_sample": True,
        "timestep_spacing": "trailing",
    }
    if schedule == "cosine":
        return config | {"beta_schedule": "squaredcos_cap_v2"}
    if schedule == "linear" and diffusion.noise_steps == 1000:
        return config
    return config | {"trained_betas": betas.tolist()}


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("this needs one more package: pip install safetensors") from error
    return safetensors


# ---- export --------------------------------------------------------------------------------------


def export(run_name: str = "", to: FilePath = "", license: str = "unknown") -> None:
    """Write a run as a folder of Hugging Face's diffusers, ready for their hub.

        python -m tools.exchange export --run_name=my_run --to=my_model

    Writes unet/ (the network with its EMA weights), scheduler/ (the noising process),
    model_index.json, classes.json (for class-conditional runs), samples.png and README.md, the
    model card: read it before you show it to others. Image-to-image runs have inputs.json instead
    of model_index.json: a network without a pipeline.

    Args:
        run_name: the run to export, a folder in models/.
        to: the folder to write; it must not exist.
        license: license of the weights, as the hub spells it, such as mit or cc-by-4.0; it goes
            into the card.

    Raises:
        UserError: there is no such run, the folder exists, or diffusers cannot express the run
            exactly.
    """
    safetensors = import_safetensors()
    command_line.check_name("run_name", run_name)
    if not to:
        raise UserError("--to is missing: the folder to write")
    folder = Path(os.path.realpath(to))  # a/.. is a folder that exists
    if os.path.lexists(folder):
        raise UserError(f"--to={to} exists; nothing is overwritten")
    if not re.fullmatch("[a-z0-9][a-z0-9.-]*", license):
        examples = "mit, cc-by-4.0, other"
        raise UserError(f"--license={license} is not how the hub spells one; examples: {examples}")
    stored = ddpm.load_run(run_name)
    settings = stored["settings"]
    network, diffusion = ddpm.build(settings, torch.device("cpu"))
    try:
        if settings["mode"] in NUMBERS:
            raise UserError(f"its pipelines make no images of {settings['mode']} channels")
        configs = {"unet/config.json": unet_config(network, settings)}
        configs["scheduler/scheduler_config.json"] = scheduler_config(
            diffusion, settings["schedule"]
        )
    except UserError as error:
        raise UserError(f"diffusers cannot express {run_name}: {error}") from error
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    if settings["inputs"]:  # no pipeline of diffusers shows a network anything
        flag = settings["inputs"]
        kind = flag if is_made(flag) else Path(flag).name  # the path is private
        configs[INPUTS] = {"inputs": kind, "input_mode": settings["input_mode"]}
    else:
        configs["model_index.json"] = {"_class_name": "DDPMPipeline"} | parts
    if settings["classes"]:
        configs[CLASSES] = settings["classes"]
    if "paths" in stored:
        configs[PATHS] = stored["paths"]
    copies = {
        name: weight.clone(memory_format=torch.contiguous_format)
        for name, weight in stored["average"].items()
    }
    weights = safetensors.torch.save(copies, {"format": "pt"})
    with (
        basics.folder_while_used(folder.parent),
        basics.unfinished_folder(folder.parent) as place,
    ):
        draft = place / folder.name
        for name, config in configs.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_text(json.dumps(config, indent=2))
        (draft / "unet/diffusion_pytorch_model.safetensors").write_bytes(weights)
        write_card(draft, stored, run_name, license)
        draft.rename(folder)  # the folder is there whole or not at all
    card = "README.md is its card, with Python code that samples"
    print(f"{basics.printable(to)}: a model of diffusers; {card}")


# ---- import --------------------------------------------------------------------------------------


def read_json(path: Path):
    """What a JSON file says."""
    basics.check_file(path)  # a pipe would be waited for
    return json.loads(path.read_text())


def noising_of(config: dict) -> dict:
    """The settings of a scheduler's noising process.

    Raises:
        UserError: no settings describe it.
    """
    config = NOISING | config
    objectives = {theirs: ours for ours, theirs in OBJECTIVES.items()}
    known = {"_class_name": SCHEDULERS, "prediction_type": [*objectives], "clip_sample_range": [1]}
    known |= {"rescale_betas_zero_snr": [False], "beta_schedule": ["linear", "squaredcos_cap_v2"]}
    others = [f"{key}={config[key]}" for key, values in known.items() if config[key] not in values]
    if others:
        raise UserError(f"its noising process has {', '.join(others)}")
    steps = config["num_train_timesteps"]
    command_line.check_limits({"noise_steps": steps}, ddpm.LIMITS)
    betas = config["trained_betas"]
    if betas is None and config["beta_schedule"] == "squaredcos_cap_v2":
        alpha_bar = ddpm.cosine_alpha_bar(steps)
    else:
        if betas is None:
            betas = torch.linspace(config["beta_start"], config["beta_end"], steps).tolist()
        alpha_bar = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)
    for schedule, compute in ddpm.NOISE_SCHEDULES.items():
        # theirs may be float32
        if len(alpha_bar) == steps and (alpha_bar / compute(steps) - 1).abs().max() < 1e-3:
            objective = objectives[config["prediction_type"]]
            return {"noise_steps": steps, "schedule": schedule, "objective": objective}
    raise UserError(f"its noise follows none of the schedules {', '.join(ddpm.NOISE_SCHEDULES)}")


def classes_of(config: dict, path: Path) -> tuple[str, ...]:
    """The names of a network's classes, which an export keeps at `path`; () if it has none.

    Raises:
        UserError: they are missing, and with them the promise that the last class stands for no
            class, as here; or they could not be written in `--label=a,b`.
    """
    count = config.get("num_class_embeds")
    if count is None:
        return ()
    names = read_json(path) if path.exists() else None
    are_names = isinstance(names, list) and all(
        isinstance(name, str) and "," not in name for name in names
    )
    if not are_names or not len({*names} - {"", "all"}) == len(names) == count - 1:
        network = f"its network is class-conditional (num_class_embeds={count})"
        needed = f"{path.name} must name all classes but the last, which stands for no class"
        raise UserError(f"{network}; {needed}")
    return tuple(names)


def inputs_of(path: Path) -> dict:
    """The settings of an image-to-image network, which an export keeps at `path`; {} without.

    Raises:
        UserError: they are others than known.
    """
    if not path.exists():
        return {}
    found = read_json(path)
    are_texts = isinstance(found, dict) and all(type(found.get(key)) is str for key in INPUT_KEYS)
    if not are_texts or not found["inputs"] or found["input_mode"] not in reading.CHANNELS:
        rule = 'it takes {"inputs": "@gray", "input_mode": "L"}'
        raise UserError(f"its {path.name} has other entries than known; {rule}")
    return {key: found[key] for key in INPUT_KEYS}


def paths_in(path: Path, noise_steps: int) -> dict:
    """The entry "paths" of a checkpoint, which an export keeps at `path`; {} if it has none.

    Raises:
        UserError: it is none for so many noising steps.
    """
    if not path.exists():
        return {}
    read = read_json(path)
    try:
        paths = kept(**read)
    except TypeError as error:
        raise UserError(f"{path.name} does not tell which steps suit the run") from error
    if not are_paths(paths, noise_steps, ddpm.SAMPLERS):
        raise UserError(f"{path.name} names steps that do not fall from {noise_steps} to 0")
    return {"paths": paths}


def attended_levels(config: dict) -> tuple[int, ...]:
    """The levels of a UNet2DModel that have attention."""
    kinds = config["down_block_types"]
    return tuple(level for level, kind in enumerate(kinds) if kind == "AttnDownBlock2D")


def settings_of(config: dict, noising: dict, classes: tuple[str, ...], given: dict) -> dict:
    """The settings of a UNet2DModel, guessed from its description, but for what no flag sets.

    Raises:
        UserError: its size, mode, width or depth is not possible here.
    """
    size = config["sample_size"]
    if size is None:
        raise UserError("its config.json has no sample_size")
    channels = config["out_channels" if given else "in_channels"]
    modes = {number: mode for mode, number in reading.CHANNELS.items()}
    if channels not in modes:
        raise UserError(f"its network has in_channels={channels}; 1 is gray, 3 RGB and 4 RGBA")
    widths = config["block_out_channels"]
    width = math.gcd(*widths)
    settings = {
        "img_size": (size,) if isinstance(size, int) else tuple(size),
        "width": width,
        "multipliers": tuple(here // width for here in widths),
        "blocks": config["layers_per_block"],
        "dropout": config["dropout"],
        "min_snr": 0.0,
        **noising,
        "mode": modes[channels],
        "classes": classes,
        "conditional": bool(classes),
        "inputs": "",
        "input_mode": "",
        **given,
    }
    if not is_sound(settings):
        raise UserError(f"its {INPUTS} does not fit images of mode {settings['mode']}")
    command_line.check_limits(settings, ddpm.LIMITS)  # before anything of that size is built
    runs.check_network(settings)
    settings["img_size"] = runs.full_size(settings["img_size"])
    levels = attended_levels(config)
    settings["attention_size"] = min(settings["img_size"]) // 2 ** levels[0] if levels else 0
    if levels and levels != tuple(range(levels[0], len(widths))):
        settings["attention_levels"] = levels
    return settings


def network_of(
    config: dict, noising: dict, classes: tuple[str, ...] = (), given: dict | None = None
) -> tuple[UNet, dict]:
    """The network of a UNet2DModel's description, on "meta" (without weights), and its settings.

    The settings are guessed, described as for an export, and compared: what was not understood
    shows as a difference.

    Raises:
        UserError: no settings describe it.
    """
    # the first entry is unused, the second is left to `weights_of`
    config = {key: value for key, value in config.items() if key not in EMA_KEYS}
    wanted = UNET | config | {"num_train_timesteps": None, "flip_sin_to_cos": True}
    widths = wanted["block_out_channels"]
    head_width = wanted["attention_head_dim"]
    if {widths[level] for level in (*attended_levels(wanted), -1)} == {head_width}:
        wanted["attention_head_dim"] = None  # another word for one head
    settings = settings_of(wanted, noising, classes, given or {})
    height, width = settings["img_size"]
    wanted["sample_size"] = height if height == width else [height, width]

    def build() -> tuple[UNet, dict]:
        with torch.device("meta"):
            network = ddpm.build_network(settings)
        return network, unet_config(network, settings)

    _, found = build()
    beyond_flags = {
        "norm_groups": "norm_num_groups",
        "norm_eps": "norm_eps",
        "frequency_shift": "freq_shift",
        "downsample_padding": "downsample_padding",
        "head_width": "attention_head_dim",
    }
    missed = {name: wanted[key] for name, key in beyond_flags.items() if found[key] != wanted[key]}
    if "head_width" in missed:
        missed["head_width"] = head_width or max(widths)
    settings |= {name: runs.IMPORTED[name](value) for name, value in missed.items()}
    command_line.check_limits(settings, ddpm.LIMITS)
    network, found = build()
    compared = [key for key in wanted if key[:1] != "_" or key == "_class_name"]
    others = [f"{key}={wanted[key]}" for key in compared if wanted[key] != found.get(key)]
    if others:
        raise UserError(f"its network has {', '.join(others[:3])}")
    return network, settings


WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# attention's weights: their names in 2022, and today's
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def weights_of(folder: Path, network: UNet, flip_sin_to_cos: bool) -> dict[str, Tensor]:
    """The weights in a UNet2DModel's folder, float32, named and shaped as in `network`.

    Raises:
        UserError: there are none, or they are another network's.
    """
    safe = folder / "diffusion_pytorch_model.safetensors"
    pickled = safe.with_suffix(".bin")
    if safe.is_file():
        safetensors = import_safetensors()
        try:
            weights = safetensors.torch.load_file(safe)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{safe.name}: {error}") from error
    elif checkpoints.is_whole(pickled):
        weights = torch.load(pickled, map_location="cpu", weights_only=True)
    else:
        raise UserError(f"{folder} has no complete {safe.name}, nor {pickled.name}")
    for old, new in OLD_NAMES.items():
        weights = {name.replace(f".{old}.", f".{new}."): weight for name, weight in weights.items()}
    expected = checkpoints.shapes_of(network.state_dict())
    found = checkpoints.shapes_of(weights)
    for name in expected | found:
        if expected.get(name) != found.get(name):
            shapes = f"{found.get(name)}, its network takes {expected.get(name)}"
            raise UserError(f"{name} has the shape {shapes}")
    weights = {name: weight.detach() for name, weight in weights.items()}
    for name, weight in weights.items():
        if weight.dtype not in WEIGHT_TYPES:
            raise UserError(f"{name} is of {weight.dtype}; weights are floating-point numbers")
        if not checkpoints.is_plain(weight):
            raise UserError("a tensor claims to be larger than the file")
    if not flip_sin_to_cos:  # sines come first there: swap the weights that multiply them, too
        name = "time_embedding.linear_1.weight"
        weights[name] = torch.cat(weights[name].chunk(2, dim=1)[::-1], dim=1)
    weights = {name: weights[name].float().contiguous() for name in expected}
    if names := checkpoints.not_finite(weights):
        raise UserError(f"{names[0]} has values that are infinite or NaN")
    return weights


UNETS = ("unet_ema", "unet")  # folders of a pipeline's network; the first there is


def import_(source: FilePath = "", run_name: str = "") -> None:
    """Make a run of a model of Hugging Face's diffusers.

        python -m tools.exchange import --source=my_folder --run_name=my_run

    The model is a folder: a UNet2DModel, or a pipeline that has one; of both, the EMA weights
    (unet_ema) are taken rather than those of training (unet). `hf download
    google/ddpm-cifar10-32 --local-dir=my_folder` fetches one of the DDPM paper's own models.

    Writes models/RUN/checkpoint.pt: a run to sample from, or to fine-tune with --init_from.

    For class-conditional models, the last class must stand for no class, and classes.json, a list
    in the folder, must name the others.

    Args:
        source: the folder; weights are read from safetensors, or from a .bin file, which cannot run
            code here.
        run_name: the new run's name.

    Raises:
        UserError: there is no such folder, there is already such a run, or its network or noise is
            not known here.
    """
    folder = Path(source)
    command_line.check_name("run_name", run_name)
    runs.check_free("run_name", run_name)
    if not source or not folder.is_dir():
        advice = "`hf download NAME --local-dir=FOLDER` fetches one"
        raise UserError(f"--source={source} is not a folder; {advice}")
    unet, *others = [folder / part for part in UNETS if (folder / part).is_dir()] or [folder]
    if not (unet / "config.json").exists():
        raise UserError(f"--source={source} holds no model of diffusers: no {unet / 'config.json'}")
    scheduler = folder / "scheduler"
    process = (scheduler if scheduler.is_dir() else folder) / "scheduler_config.json"
    is_bare = not process.exists()
    try:
        config = read_json(unet / "config.json")
        noising = noising_of({} if is_bare else read_json(process))
        given = inputs_of(folder / INPUTS)
        classes = classes_of(config, folder / CLASSES)
        network, settings = network_of(config, noising, classes, given)
        weights = weights_of(unet, network, config.get("flip_sin_to_cos", True))
        paths = paths_in(folder / PATHS, noising["noise_steps"])
    except UserError as error:
        raise UserError(f"--source={source} cannot be imported: {error}") from error
    except basics.BROKEN_FILE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        message = f"--source={source} cannot be read as a model of diffusers ({reason})"
        raise UserError(message) from error
    settings |= {"run_name": run_name, "dataset": folder.resolve().name}
    with runs.new_run("run_name", run_name):
        facts = {"settings": settings, "data": "", "step": 1, "log": []} | paths
        checkpoints.save(run_name, **facts, average=weights)
    number = sum(weight.numel() for weight in weights.values())
    message = f"{checkpoints.paths_of(run_name)[0]}: {number:,} weights"
    if others:
        message += f"; these are the EMA weights, of {unet.name}, not those of {others[0].name}"
    if is_bare:
        message += f"; there is no {process.name}: the noise of the DDPM paper is assumed"
    if settings["mode"] == "RGBA":
        message += "; its four channels are taken as colors times alpha, and alpha"
    print(message)
    asked = f"--inputs={'@' * is_made(settings['inputs'])}FOLDER" if given else "--n_img=16"
    print(f"to generate images:\n  python ddpm.py sample --run_name={run_name} {asked}")


def main() -> None:
    commands = {"publish": publish, "export": export, "import": import_}
    command_line.run_command_line("-m tools.exchange", commands, {})


if __name__ == "__main__":
    main()
