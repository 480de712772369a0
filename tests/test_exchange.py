"""Publishing, exporting and importing runs, and beginning from another run's weights.

What is exported or imported is compared with diffusers itself, from the weights to the images.
"""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, awaken, files_below, paint
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from PIL import Image
from torch import Tensor, nn

import ddpm
import tools.exchange
import utils
from machinery import checkpoints, command_line, devices, runs, writing
from tools import evaluate

TRAIN = ("train", *TINY, "--dataset=pictures", "--noise_steps=20", "--epochs=8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A place with a trained run, `tiny`."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        paint(place / "pictures")
        command_line.plan("ddpm.py", {"train": ddpm.train}, [*TRAIN, "--run_name=tiny"])()
    return place


# ---- publish -------------------------------------------------------------------------------------


def test_what_is_published_is_small_and_makes_the_same_images(exchange, run, monkeypatch):
    """Half precision has 11 binary digits, down to 2^-24.

    A few sampling steps show little of what is behind them.
    """
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    assert exchange("publish", "--run_name=tiny", "--to=public").status == 0
    whole, small = (checkpoints.paths_of(name)[0] for name in ("tiny", "public"))
    assert small.stat().st_size < whole.stat().st_size / 6
    published = checkpoints.load("public")
    assert {weight.dtype for weight in published["average"].values()} == {torch.float16}
    assert published.keys() == checkpoints.TO_SAMPLE | {"format", "count"}
    for name, weight in checkpoints.load("tiny")["average"].items():
        assert (
            (weight - published["average"][name].float()).abs() <= weight.abs() * 2**-11 + 2**-25
        ).all()
    for name in ("tiny", "public"):
        assert (
            run("sample", f"--run_name={name}", "--n_img=4", "--steps=5", "--device=cpu").status
            == 0
        )
    one, two = (
        np.asarray(Image.open(f"results/{name}/samples/samples.png"), int)
        for name in ("tiny", "public")
    )
    assert abs(one - two).mean() < 0.5


def test_a_published_run_tells_what_was_learned_as_the_run_itself_does(exchange):
    assert exchange("publish", "--run_name=tiny", "--to=given").status == 0
    given, own = (runs.learned(ddpm.load_run(name)) for name in ("given", "tiny"))
    assert given == own
    assert own.images < math.inf


def test_a_published_run_is_not_gone_on_with_and_says_what_it_is_for(exchange, run, here):
    assert exchange("publish", "--run_name=tiny", "--to=public").status == 0
    before = checkpoints.paths_of("public")[0].read_bytes()
    result = run(*TRAIN, "--run_name=public")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "weights only" in result.err
    assert "--init_from=public" in result.err
    assert checkpoints.paths_of("public")[0].read_bytes() == before
    assert run(*TRAIN, "--run_name=mine", "--init_from=public").status == 0


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_published_run_keeps_its_mode_and_its_classes(exchange, run, here, mode):
    make_run("mine", mode=mode, classes=("cats", "dogs"))
    assert exchange("publish", "--run_name=mine", "--to=public").status == 0
    assert (
        run(
            "sample", "--run_name=public", "--label=dogs", "--n_img=2", "--steps=2", "--device=cpu"
        ).status
        == 0
    )
    with Image.open("results/public/samples/sample_0002.png") as picture:
        assert (picture.mode, picture.text["label"]) == (mode, "dogs")


def test_a_published_run_does_not_tell_where_folders_lie(here):
    state = checkpoints.load("tiny")
    near = {"dataset": "pictures", "inputs": "@gray", "cache": ""}
    far = {name: f"{here}/{name}" for name in near}
    root = {"dataset": "/", "inputs": f"{here}/@gray", "cache": "../somebody/cache"}
    names = {"dataset": "images", "inputs": "gray", "cache": "cache"}
    for places, expected in ((near, near), (far, {name: name for name in near}), (root, names)):
        published = checkpoints.published(
            state | {"settings": state["settings"] | places}, "public"
        )
        assert {name: published["settings"][name] for name in near} == expected


def test_a_published_run_stands_in_the_table(exchange, run):
    assert exchange("publish", "--run_name=tiny", "--to=public").status == 0
    lines = [line.split() for line in run("sample").out.splitlines()]
    assert [line[0] for line in lines] == ["run", "public", "tiny"]
    assert lines[1][1:5] == lines[2][1:5]


@pytest.mark.parametrize(
    "words, named",
    [
        (("--to=public",), "--run_name is missing"),
        (("--run_name=tiny",), "--to is missing"),
        (("--run_name=tiny", "--to=../public"), "--to=../public is not a usable name"),
        (("--run_name=other", "--to=public"), "other is not a trained run; runs there are: tiny"),
        (("--run_name=tiny", "--to=tiny"), "models/tiny holds a run"),
        (("--run_name=tiny", "--to=public", "--n_img=3"), "--n_img is not an option of publish"),
    ],
)
def test_what_cannot_be_published_is_refused_in_one_line(exchange, here, words, named):
    before = files_below(here)
    result = exchange("publish", *words)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("tools.exchange: ")
    assert named in result.err
    assert files_below(here) == before


def test_weights_beyond_half_precision_are_not_published(exchange, here):
    state = torch.load(checkpoints.paths_of("tiny")[0], weights_only=True)
    state["average"]["conv_in.bias"][0] = 1e5
    torch.save(state, checkpoints.paths_of("tiny")[0])
    result = exchange("publish", "--run_name=tiny", "--to=public")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "beyond 65,504" in result.err
    assert not checkpoints.exists("public")


# ---- beginning from another run ------------------------------------------------------------------


def test_a_run_begins_with_the_average_of_another(here, run):
    """At a rate of nearly nothing the weights stay what they were at the beginning.

    So does their average.
    """
    start = checkpoints.load("tiny")
    words = [word for word in TRAIN if not word.startswith("--lr=")]
    assert run(*words, "--lr=1e-9", "--run_name=mine", "--init_from=tiny").status == 0
    mine = checkpoints.load("mine")
    for kind in ("network", "average"):
        for name, weight in mine[kind].items():
            assert abs(weight - start["average"][name]).max() < 1e-7
    assert abs(start["network"]["conv_in.weight"] - start["average"]["conv_in.weight"]).max() > 1e-6


@pytest.mark.parametrize(
    "changed, flags",
    [
        (("--width=32",), "--width=16"),
        (("--multipliers=1,1",), "--multipliers=1,2"),
        (("--objective=eps", "--schedule=linear"), "--schedule=cosine --objective=v"),
        (("--img_size=16",), "--attention_size=8"),
        (("--attention_size=0",), "--attention_size=4"),
    ],
)
def test_another_network_is_refused_with_the_flags_that_fit(here, run, changed, flags):
    words = dict(word.split("=") for word in (*TRAIN[1:], *changed))
    command = [
        "train",
        *("=".join(item) for item in words.items()),
        "--run_name=mine",
        "--init_from=tiny",
    ]
    before = files_below(here)
    result = run(*command)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.endswith(f"to fit it, add {flags}\n")
    assert files_below(here) == before
    words |= dict(word.split("=") for word in flags.split())
    assert (
        run(
            "train",
            *("=".join(item) for item in words.items()),
            "--run_name=mine",
            "--init_from=tiny",
        ).status
        == 0
    )


@pytest.mark.parametrize(
    "name, named", [("other", "other is not a trained run"), ("../x", "--init_from=../x is not")]
)
def test_a_run_to_begin_from_must_be_there(here, run, name, named):
    before = files_below(here)
    result = run(*TRAIN, "--run_name=mine", f"--init_from={name}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert named in result.err
    assert files_below(here) == before


def test_once_begun_the_other_run_is_not_needed_any_more(here, run):
    command = (*TRAIN, "--run_name=mine", "--init_from=tiny")
    assert run(*command).status == 0
    shutil.rmtree("models/tiny")
    words = [word if word != "--epochs=8" else "--epochs=9" for word in command]
    assert run(*words).status == 0
    result = run(*[word for word in words if not word.startswith("--init_from")])
    assert result.status == 0, result.err
    assert checkpoints.load("mine")["settings"]["init_from"] == "tiny"


# ---- models from elsewhere -----------------------------------------------------------------------

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# What the DDPM paper's converted checkpoints have in common.
PAPERS = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
}
PAPERS |= {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "out_channels": 3,
}
PAPERS |= {
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "time_embedding_type": "positional",
}


def kinds(levels: int, *attended: int) -> dict:
    """The types of so many levels, attention on some of them."""
    down = ["AttnDownBlock2D" if level in attended else "DownBlock2D" for level in range(levels)]
    return {
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
    }


CIFAR = PAPERS | {"sample_size": 32, "block_out_channels": [128, 256, 256, 256], **kinds(4, 1)}
LARGE = PAPERS | {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    **kinds(6, 4),
}


def scaled(config: dict, **changes) -> dict:
    """An eighth of the channels, as many in a group; 32x32 pixels."""
    small = {
        "block_out_channels": [width // 8 for width in config["block_out_channels"]],
        "sample_size": 32,
    }
    return config | small | {"norm_num_groups": config["norm_num_groups"] // 8} | changes


COURSE = {
    "sample_size": [16, 8],
    "block_out_channels": [16, 32, 32, 64],
    "norm_num_groups": 8,
    **kinds(4, 2, 3),
}
MODELS = {  # a network, its noising process, and where a pipeline of it keeps its files
    "ddpm-cifar10-32": (scaled(CIFAR), {"variance_type": "fixed_large"}, ""),
    "ddpm-celebahq-256": (scaled(LARGE), {"variance_type": "fixed_small"}, "unet"),
    "ddpm-ema-church-256": (scaled(LARGE, block_out_channels=[16, 16, 32, 32, 48, 64]), {}, ""),
    "attention on two levels": (
        COURSE,
        {"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2"},
        "unet",
    ),
    "v, heads of 4 and 8 channels a group": (
        {
            "sample_size": 8,
            "block_out_channels": [32, 96],
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            **kinds(2, 0),
        },
        {
            "prediction_type": "v_prediction",
            "num_train_timesteps": 25,
            "beta_start": 0.004,
            "beta_end": 0.8,
        },
        "unet",
    ),
}


def their_model(name: str) -> UNet2DModel:
    """One of MODELS with random weights."""
    torch.manual_seed(0)
    model = UNet2DModel(**MODELS[name][0]).eval()
    for norm in [module for module in model.modules() if isinstance(module, nn.GroupNorm)]:
        nn.init.normal_(norm.weight, 1, 0.1)
        nn.init.normal_(norm.bias, 0, 0.1)
    return model


def write_model(name: str, folder: Path) -> DDPMPipeline:
    """One of MODELS as a folder, in today's form or in that of 2022.

    The latter: all in one place, weights in a .bin, old names.
    """
    _, noising, place = MODELS[name]
    pipeline = DDPMPipeline(their_model(name), DDPMScheduler(**noising))
    pipeline.save_pretrained(folder)
    if not place:
        weights = safetensors.torch.load_file(folder / "unet/diffusion_pytorch_model.safetensors")
        for new, old in OLD_NAMES.items():
            weights = {
                key.replace(f".{new}.", f".{old}."): weight for key, weight in weights.items()
            }
        assert any("proj_attn" in key for key in weights)
        torch.save(weights, folder / "diffusion_pytorch_model.bin")
        # no entry that is newer
        config = {key: MODELS[name][0][key] for key in sorted(MODELS[name][0])}
        (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
        shutil.move(folder / "scheduler/scheduler_config.json", folder)
        shutil.rmtree(folder / "unet")
        shutil.rmtree(folder / "scheduler")
    return pipeline


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.fixture
def quick_picture(monkeypatch):
    """Has the picture that goes with an export be black: making one takes two seconds."""
    black = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr("tools.model_card.make_samples", lambda *_: black)


@pytest.fixture
def same_noise(monkeypatch):
    """Has diffusers draw its noise as `ddpm.generate` draws that of one image of seed 5.

    All compute in float32.
    """
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)

    def begin(shape: tuple[int, int, int]):
        generator = np.random.default_rng(5)

        def draw(*_, **__) -> Tensor:
            return torch.from_numpy(generator.standard_normal((1, *shape), dtype=np.float32))

        places = (
            "pipelines.ddpm.pipeline_ddpm",
            "pipelines.ddim.pipeline_ddim",
            "schedulers.scheduling_ddpm",
        )
        for place in places:
            monkeypatch.setattr(f"diffusers.{place}.randn_tensor", draw)
        return draw

    return begin


def our_image(run_name: str, sampler: str, steps: int) -> Tensor:
    """The image (1, C, H, W) of seed 5."""
    stored = ddpm.load_run(run_name)
    network, diffusion = ddpm.build_trained(stored, torch.device("cpu"))
    how = {"visited_steps": diffusion.visited_steps(steps), "sampler": sampler}
    *_, (image, _) = ddpm.generate(network, diffusion, [5], stored["settings"]["img_size"], **how)
    return image


def their_image(pipeline: DDPMPipeline, sampler: str, steps: int, same_noise) -> Tensor:
    """The image (1, C, H, W) that diffusers makes from the same noise.

    Their thresholding with a ceiling of 1 is the clip to [-1, 1].
    """
    size, config = pipeline.unet.config.sample_size, pipeline.scheduler.config
    size = (size, size) if isinstance(size, int) else tuple(size)
    draw = same_noise((pipeline.unet.config.in_channels, *size))
    if sampler == "dpm++":
        scheduler = DPMSolverMultistepScheduler.from_config(
            config, thresholding=True, sample_max_value=1.0, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(steps)
        x_t = draw()
        for t in scheduler.timesteps:
            with torch.no_grad():
                x_t = scheduler.step(pipeline.unet(x_t, t).sample, t, x_t).prev_sample
        return x_t
    kind = "fixed_large" if steps == config.num_train_timesteps else "fixed_small"
    if sampler == "ddpm":
        pipeline = DDPMPipeline(
            pipeline.unet,
            DDPMScheduler.from_config(config, variance_type=kind, timestep_spacing="trailing"),
        )
        extra = {}
    else:
        pipeline = DDIMPipeline(
            pipeline.unet, DDIMScheduler.from_config(config, timestep_spacing="trailing")
        )
        extra = {"use_clipped_model_output": True}
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=steps, output_type="pt", **extra).images  # in [0, 1]
    return images * 2 - 1


# ---- import --------------------------------------------------------------------------------------


# diffusers' own affair
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_what_is_imported_answers_and_samples_as_diffusers_does(exchange, place, same_noise, name):
    pipeline = write_model(name, place / "theirs")
    result = exchange("import", "--source=theirs", "--run_name=mine")
    assert (result.status, result.err) == (0, "")
    network, diffusion = ddpm.build_trained(ddpm.load_run("mine"), torch.device("cpu"))
    size = pipeline.unet.config.sample_size
    x = torch.randn(3, 3, *((size, size) if isinstance(size, int) else size))
    t = torch.tensor([1, diffusion.noise_steps // 2, diffusion.noise_steps])
    same_noise(x.shape[1:])  # and float32
    with torch.no_grad():
        answer = network(x, t)
        # float32, and attention in another order
        assert distance(answer, pipeline.unet(x, t - 1).sample) < 1e-4
    assert answer.std() > 0.1
    for sampler in ("ddpm", "ddim", "dpm++"):
        ours, theirs = our_image("mine", sampler, 5), their_image(pipeline, sampler, 5, same_noise)
        assert distance(ours, theirs) < 1e-4  # float32 over 5 steps, in another order
    if diffusion.noise_steps < 1000:
        ours, theirs = (
            our_image("mine", "ddpm", diffusion.noise_steps),
            their_image(pipeline, "ddpm", diffusion.noise_steps, same_noise),
        )
        assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize("config", [CIFAR, LARGE], ids=["cifar10-32", "256"])
def test_the_papers_own_networks_have_our_names_and_shapes_in_full_size(config):
    with torch.device("meta"):
        theirs = UNet2DModel(**config)
    network, settings = tools.exchange.network_of(config, tools.exchange.noising_of({}))
    assert checkpoints.shapes_of(network.state_dict()) == checkpoints.shapes_of(theirs.state_dict())
    assert {attention.heads for attention in network.modules() if hasattr(attention, "heads")} == {
        1
    }
    assert (settings["schedule"], settings["objective"], settings["noise_steps"]) == (
        "linear",
        "eps",
        1000,
    )


def test_a_network_alone_is_imported_with_the_papers_noise_and_says_so(exchange, place, run):
    their_model("ddpm-cifar10-32").save_pretrained(place / "theirs")
    result = exchange("import", "--source=theirs", "--run_name=mine")
    assert "the noise of the DDPM paper is assumed" in result.out
    command = (
        re.search("ddpm.py (sample .*)", result.out)[1].replace("--n_img=16", "--n_img=1").split()
    )
    assert run(*command, "--steps=2", "--device=cpu").status == 0
    settings = ddpm.load_run("mine")["settings"]
    assert [settings[name] for name in ("noise_steps", "schedule", "objective")] == [
        1000,
        "linear",
        "eps",
    ]
    assert settings["dataset"] == "theirs"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder that can be imported."""
    folder = tmp_path_factory.mktemp("whole") / "theirs"
    write_model("attention on two levels", folder)
    return folder


def refused(exchange, place: Path, named: str, *words: str) -> None:
    """The command ends in one line that names the reason, and nothing is written."""
    before = files_below(place)
    result = exchange(*words)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1), result.err
    assert named in result.err
    assert files_below(place) == before


def import_changed(
    whole: Path, exchange, place: Path, named: str, file: str, changed: dict
) -> None:
    """Importing that folder is refused once some entries of a configuration are others."""
    shutil.copytree(whole, place / "theirs")
    path = place / "theirs" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    refused(exchange, place, named, "import", "--source=theirs", "--run_name=mine")


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift=scale_shift"),
        (
            {"down_block_types": ["DownBlock2D"] * 3 + ["ResnetDownsampleBlock2D"]},
            "ResnetDownsampleBlock2D",
        ),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types="),
        ({"mid_block_type": None}, "mid_block_type=None"),
        ({"attention_head_dim": 24}, "attention_head_dim=24"),
        ({"attention_head_dim": 64}, "attention_head_dim=64"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups=4"),
        ({"norm_num_groups": 5}, "num_channels"),
        ({"act_fn": "gelu", "add_attention": False}, "act_fn=gelu"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"downsample_type": "resnet"}, "downsample_type=resnet"),
        ({"downsample_padding": 2}, "downsample_padding=2 is out of range"),
        ({"in_channels": 1}, "out_channels=3"),
        ({"in_channels": 2, "out_channels": 2}, "in_channels=2; 1 is gray, 3 RGB and 4 RGBA"),
        ({"out_channels": 6}, "out_channels=6"),
        (
            {"num_class_embeds": 10},
            "classes.json must name all classes but the last, which stands for no class",
        ),
        ({"num_class_embeds": 0}, "class-conditional (num_class_embeds=0)"),
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep"),
        ({"something_new": 3}, "something_new=3"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name=UNet2DConditionModel"),
        ({"sample_size": None}, "no sample_size"),
        ({"sample_size": 20}, "20 is not a multiple of 8"),
        ({"block_out_channels": [16, 32, 32, 65]}, "width=1 is out of range"),
        ({"block_out_channels": [0, 0, 0, 0]}, "cannot be read"),
        ({"layers_per_block": 10**9}, "out of range"),
        ({"norm_eps": "small"}, "cannot be read"),
        ({"freq_shift": 8}, "frequency_shift=8.0 is out of range"),
        ({"layers_per_block": 1}, "has the shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_network_that_cannot_be_expressed_is_refused_by_name(
    whole, exchange, place, changed, named
):
    import_changed(whole, exchange, place, named, "unet/config.json", changed)


@pytest.mark.parametrize(
    "text, named",
    [
        (None, "classes.json must name all classes but the last, which stands for no class"),
        ('["cats"]', "(num_class_embeds=3); classes.json must name"),
        ('["cats", "dogs", "suns"]', "classes.json must name"),
        ('["cats", "cats"]', "classes.json must name"),
        ('["cats", "dogs", "dogs"]', "classes.json must name"),
        ('["cats", "dogs,wolves"]', "classes.json must name"),
        ('["cats", "all"]', "classes.json must name"),
        ('["cats", ""]', "classes.json must name"),
        ('["cats", 3]', "classes.json must name"),
        ('{"cats": 0, "dogs": 1}', "classes.json must name"),
        ('["cats", "do', "cannot be read"),
    ],
)
def test_a_network_by_class_is_refused_where_its_classes_are_not_told(
    exchange, place, quick_picture, text, named
):
    make_run("mine", classes=("cats", "dogs"))
    assert exchange("export", "--run_name=mine", "--to=model").status == 0
    path = Path("model/classes.json")
    path.unlink() if text is None else path.write_text(text)
    refused(exchange, place, named, "import", "--source=model", "--run_name=again")


def test_of_four_channels_it_is_said_what_they_are_taken_for(exchange, place):
    for channels, is_said in {1: False, 3: False, 4: True}.items():
        kind = {"in_channels": channels, "out_channels": channels}
        UNet2DModel(**MODELS["attention on two levels"][0] | kind).save_pretrained(
            place / str(channels)
        )
        result = exchange("import", f"--source={channels}", f"--run_name=of_{channels}")
        assert result.status == 0
        assert ("taken as colors times alpha, and alpha" in result.out) == is_said
    assert [ddpm.load_run(f"of_{channels}")["settings"]["mode"] for channels in (1, 3, 4)] == [
        "L",
        "RGB",
        "RGBA",
    ]


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"beta_schedule": "scaled_linear"}, "beta_schedule=scaled_linear"),
        (
            {"beta_schedule": "linear", "beta_end": 0.03},
            "none of the schedules linear, cosine, sigmoid",
        ),
        ({"trained_betas": [0.1] * 10}, "none of the schedules"),
        ({"trained_betas": [0.1] * 9}, "none of the schedules"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        (
            {"prediction_type": "flow", "clip_sample_range": 2.0},
            "prediction_type=flow, clip_sample_range=2.0",
        ),
        ({"_class_name": "EDMEulerScheduler"}, "_class_name=EDMEulerScheduler"),
        ({"num_train_timesteps": 10**9}, "out of range"),
        ({"num_train_timesteps": "many"}, "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_noise_that_cannot_be_expressed_is_refused_by_name(whole, exchange, place, changed, named):
    import_changed(whole, exchange, place, named, "scheduler/scheduler_config.json", changed)


class Bomb:
    """Writes a file as soon as it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_a_bin_that_would_run_code_is_refused_and_does_not(exchange, place):
    write_model("ddpm-cifar10-32", place / "theirs")
    path = place / "theirs/diffusion_pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True) | {"conv_in.bias": Bomb()}, path)
    refused(exchange, place, "cannot be read", "import", "--source=theirs", "--run_name=mine")
    torch.load(path, weights_only=False)
    assert Path("exploded").exists(), "it was a bomb"


@pytest.mark.parametrize(
    "damage, named",
    [
        (
            lambda weights: weights | {"conv_in.bias": torch.zeros(1).expand(16)},
            "larger than the file",
        ),
        (
            lambda weights: weights | {"conv_in.bias": torch.zeros(17)},
            "conv_in.bias has the shape torch.Size([17])",
        ),
        (
            lambda weights: weights | {"more": torch.zeros(1)},
            "more has the shape torch.Size([1]), its network takes None",
        ),
        (lambda weights: {}, "has the shape None"),
        (lambda weights: list(weights), "cannot be read"),
    ],
)
def test_weights_that_do_not_fit_are_refused(exchange, place, damage, named):
    write_model("ddpm-cifar10-32", place / "theirs")
    path = place / "theirs/diffusion_pytorch_model.bin"
    torch.save(damage(torch.load(path, weights_only=True)), path)
    refused(exchange, place, named, "import", "--source=theirs", "--run_name=mine")


@pytest.mark.parametrize("file", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_damaged_or_missing_file_is_refused(whole, exchange, place, file):
    shutil.copytree(whole, place / "theirs")
    path = place / "theirs" / file
    path.write_bytes(path.read_bytes()[:-100])
    refused(exchange, place, "cannot be read", "import", "--source=theirs", "--run_name=mine")
    path.unlink()
    refused(exchange, place, path.name, "import", "--source=theirs", "--run_name=mine")


@pytest.mark.parametrize(
    "words, named",
    [
        (("import", "--source=theirs"), "--run_name= is not a usable name"),
        (("import", "--run_name=mine"), "--source= is not a folder"),
        (("import", "--source=nowhere", "--run_name=mine"), "hf download"),
        (("import", "--source=theirs", "--run_name=tiny"), "models/tiny holds a run"),
        (("export", "--run_name=tiny"), "--to is missing"),
        (("export", "--run_name=tiny", "--to=theirs"), "--to=theirs exists"),
        (("export", "--run_name=other", "--to=folder"), "other is not a trained run"),
        (
            ("export", "--run_name=tiny", "--to=folder", "--license=a: b"),
            "--license=a: b is not how the hub spells one",
        ),
    ],
)
def test_nothing_is_overwritten_and_everything_has_a_name(exchange, here, words, named):
    Path("theirs").mkdir()
    refused(exchange, here, named, *words)


# ---- export --------------------------------------------------------------------------------------


def make_run(name: str, **changes) -> None:
    """A run of 8x8 pixels with random weights."""
    settings = {
        "run_name": name,
        "dataset": "/a/secret place/pictures",
        "img_size": (8, 8),
        "width": 16,
    }
    settings |= {
        "multipliers": (1, 2),
        "blocks": 1,
        "attention_size": 4,
        "noise_steps": 20,
        "min_snr": 0.0,
    }
    settings |= {
        "schedule": "linear",
        "objective": "eps",
        "dropout": 0.0,
        "mode": "RGB",
        "classes": (),
        **changes,
    }
    settings["conditional"] = bool(settings["classes"])
    torch.manual_seed(0)
    network = ddpm.build(settings, "cpu")[0]
    awaken(network)
    checkpoints.save(name, settings=settings, data="", step=7, log=[], average=network.state_dict())


RUNS = [
    {},
    {"schedule": "cosine", "objective": "v", "noise_steps": 25},
    {"schedule": "sigmoid", "objective": "x0", "noise_steps": 1000, "img_size": (16, 8)},
    {"noise_steps": 1000, "attention_size": 8, "multipliers": (2, 3), "min_snr": 5.0},
    {
        "head_width": 99,
        "attention_levels": (0,),
        "norm_groups": 2,
        "frequency_shift": 1.0,
        "downsample_padding": 0,
    },
    {"mode": "L", "objective": "v"},
    {"mode": "RGBA", "img_size": (8, 16)},
]
BY_CLASS = [
    {"classes": ("cats", "dogs", "suns")},
    {"classes": ("cats", "dogs"), "mode": "RGBA", "img_size": (8, 16), "objective": "v"},
]


def as_words(changes: dict) -> str:
    return "-".join(map(str, changes.values()))


# diffusers' own affair
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("changes", RUNS, ids=as_words)
def test_what_is_exported_answers_and_samples_as_here(
    exchange, place, quick_picture, same_noise, changes
):
    make_run("mine", **changes)
    result = exchange("export", "--run_name=mine", "--to=out/model")
    assert (result.status, result.err) == (0, "")
    assert [path.name for path in Path("out").iterdir()] == ["model"]
    pipeline = DDPMPipeline.from_pretrained("out/model")
    network, diffusion = ddpm.build_trained(ddpm.load_run("mine"), torch.device("cpu"))
    x = torch.randn(3, network.conv_in.in_channels, *ddpm.load_run("mine")["settings"]["img_size"])
    t = torch.tensor([1, diffusion.noise_steps // 2, diffusion.noise_steps])
    same_noise(x.shape[1:])  # and float32
    with torch.no_grad():
        answer = network(x, t)
        # float32, and attention in another order
        assert distance(answer, pipeline.unet(x, t - 1).sample) < 1e-4
    assert answer.std() > 0.1
    for sampler in ("ddpm", "ddim", "dpm++"):
        ours, theirs = our_image("mine", sampler, 5), their_image(pipeline, sampler, 5, same_noise)
        assert distance(ours, theirs) < 1e-4  # float32 over 5 steps, in another order
    if diffusion.noise_steps < 1000:  # the pipelines as they are
        same_noise(x.shape[1:])
        pipeline.set_progress_bar_config(disable=True)
        images = (
            pipeline(num_inference_steps=diffusion.noise_steps, output_type="pt").images * 2 - 1
        )
        assert distance(our_image("mine", "ddpm", diffusion.noise_steps), images) < 1e-4
    same_noise(x.shape[1:])
    pipeline = DDIMPipeline.from_pretrained("out/model")
    pipeline.set_progress_bar_config(disable=True)
    images = (
        pipeline(num_inference_steps=5, output_type="pt", use_clipped_model_output=True).images * 2
        - 1
    )
    assert distance(our_image("mine", "ddim", 5), images) < 1e-4


@pytest.mark.parametrize("changes", [*RUNS, *BY_CLASS], ids=as_words)
def test_what_was_exported_and_imported_is_the_run(exchange, place, quick_picture, changes):
    """All but min_snr, a matter of training, and what says the same in other words."""
    make_run("mine", **changes)
    assert exchange("export", "--run_name=mine", "--to=model").status == 0
    assert exchange("import", "--source=model", "--run_name=again").status == 0
    mine, again = ddpm.load_run("mine"), ddpm.load_run("again")
    other_words = (
        {"min_snr", "attention_size", "head_width"} if "head_width" in changes else {"min_snr"}
    )
    kept = {"mode", "classes", "conditional", *ddpm.NETWORK, *runs.IMPORTED, *ddpm.NOISING}
    for name in kept - other_words:
        assert mine["settings"].get(name) == again["settings"].get(name), name
    assert all(
        torch.equal(weight, again["average"][name]) for name, weight in mine["average"].items()
    )
    assert torch.equal(our_image("mine", "dpm++", 5), our_image("again", "dpm++", 5))


@pytest.mark.parametrize("changes", BY_CLASS, ids=as_words)
def test_an_exported_network_answers_by_class_as_here_and_its_last_class_is_none(
    exchange, place, quick_picture, monkeypatch, changes
):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    make_run("mine", **changes)
    assert exchange("export", "--run_name=mine", "--to=model").status == 0
    theirs = UNet2DModel.from_pretrained("model", subfolder="unet")
    network, diffusion = ddpm.build_trained(ddpm.load_run("mine"), torch.device("cpu"))
    count = len(changes["classes"])
    x = torch.randn(1, network.conv_in.in_channels, *changes.get("img_size", (8, 8))).repeat(
        count + 1, 1, 1, 1
    )
    t, labels = torch.full((count + 1,), diffusion.noise_steps // 2), torch.arange(count + 1)
    with torch.no_grad():
        answer = network(x, t, labels)
        assert distance(answer, theirs(x, t - 1, labels).sample) < 1e-4  # float32, in another order
        assert distance(answer[-1], network(x[:1], t[:1])[0]) < 1e-4
    assert torch.pdist(answer.flatten(1)).min() > 0.1, "classes are told apart"


# diffusers' own affair
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("changes", [*RUNS[-2:], *BY_CLASS], ids=as_words)
def test_the_lines_of_the_card_make_the_images_that_are_made_here(
    exchange, place, quick_picture, monkeypatch, changes
):
    """A level of 255 may be the rounding's."""
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    make_run("mine", **changes)
    assert exchange("export", "--run_name=mine", "--to=model").status == 0
    network, diffusion = ddpm.build_trained(ddpm.load_run("mine"), torch.device("cpu"))
    size, last = changes.get("img_size", (8, 8)), len(changes.get("classes", ())) - 1
    labels = torch.tensor([0, 0, last, last]) if last > 0 else None
    how = {"visited_steps": diffusion.visited_steps(20), "sampler": "ddim", "labels": labels}
    *_, (images, _) = ddpm.generate(network, diffusion, range(4), size, **how)
    noise = [
        np.random.default_rng(seed).standard_normal(images.shape[1:], dtype=np.float32)
        for seed in range(4)
    ]
    noise, names = torch.from_numpy(np.stack(noise)), {}
    monkeypatch.setattr(torch, "randn", lambda *shape: noise.view(shape))
    monkeypatch.setattr(
        "diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda shape, **_: noise.view(shape)
    )
    exec(re.search("```python\n(.*?)```", Path("model/README.md").read_text(), re.DOTALL)[1], names)
    assert len(names["images"]) == 4
    for image, expected in zip(
        names["images"], map(writing.to_pillow, utils.to_bytes(images)), strict=True
    ):
        assert (image.mode, image.size) == (expected.mode, expected.size)
        premultiplied = [
            np.asarray(side.convert("RGBA").convert("RGBa"), dtype=int)
            for side in (image, expected)
        ]
        assert np.abs(premultiplied[0] - premultiplied[1]).max() <= 1


@pytest.mark.parametrize("changes", [*RUNS[-2:], *BY_CLASS], ids=as_words)
def test_the_card_tells_what_kind_of_images_there_are(exchange, place, quick_picture, changes):
    make_run("mine", **changes)
    assert exchange("export", "--run_name=mine", "--to=model").status == 0
    card = huggingface_hub.ModelCard.load("model/README.md")
    for part, is_told in {
        "by class": "classes" in changes,
        "premultiplied": changes.get("mode") == "RGBA",
    }.items():
        words = {"by class": f"{len(changes.get('classes', ()))} stands for no class"}.get(
            part, part
        )
        assert (words in card.text) == is_told
    tag = "unconditional-image-generation"
    assert [tag in card.data.tags, card.data.pipeline_tag == tag] == ["classes" not in changes] * 2
    assert f"| mode | {changes.get('mode', 'RGB')} |" in card.text
    assert Path("model/classes.json").exists() == ("classes" in changes)


@pytest.mark.parametrize("count, shown", [(0, (4, 4)), (3, (4, 3)), (20, (4, 16))])
def test_the_cards_picture_has_a_row_for_each_class(exchange, place, monkeypatch, count, shown):
    """Of 16 classes at most.

    The images that stand in for those of a network are as bright as their class says.
    """

    def make_samples(stored, seeds, way, batch_size, device, labels) -> Tensor:
        labels = torch.zeros(len(seeds)) if labels is None else labels
        return (10 * labels).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, 8)

    monkeypatch.setattr("tools.model_card.make_samples", make_samples)
    make_run("mine", classes=tuple(f"class {number:02d}" for number in range(count)))
    assert exchange("export", "--run_name=mine", "--to=model").status == 0
    with Image.open("model/samples.png") as picture:
        pixels = np.asarray(picture)[:, :, 0]
    assert pixels.shape == (8 * shown[1], 8 * shown[0])
    assert (pixels == (np.arange(shown[1]) * 10 * (count > 0)).repeat(8)[:, None]).all()


@pytest.mark.parametrize(
    "changes, named",
    [
        (
            {"schedule": "sigmoid"},
            "schedule=sigmoid with noise_steps=20 ends in too little signal for float32",
        ),
        (
            {"head_width": 32, "multipliers": (1, 4), "attention_levels": (0,)},
            "heads have 2 different widths",
        ),
    ],
)
def test_a_run_that_cannot_be_expressed_is_refused_by_name(exchange, place, changes, named):
    make_run("mine", **changes)
    refused(exchange, place, named, "export", "--run_name=mine", "--to=folder")


def test_the_card_tells_of_the_run_and_its_three_lines_make_images(exchange, here):
    table = [
        [
            "run",
            "step",
            "sampler",
            "steps",
            "n",
            "measure",
            "distance",
            "distance_real",
            "precision",
        ]
    ]
    step = checkpoints.load("tiny")["step"]
    for row_step, figure in ((step, 1.0), (step, 123.45678), (step + 1, 9.0)):
        table.append(["tiny", row_step, "dpm++", 25, 64, "FD", figure, 4.5, 0.5])
    lines = [",".join(map(str, row)) for row in table]
    columns = [",precision_real,recall,recall_real,copies"] + [",0.25,0.75,1.0,0.0"] * 3
    text = "\n".join(line + more for line, more in zip(lines, columns, strict=True))
    Path("results/tiny/evaluation.csv").write_text(text)
    assert exchange("export", "--run_name=tiny", "--to=model", "--license=mit").status == 0
    card = huggingface_hub.ModelCard.load("model/README.md")
    facts = {"license": "mit", "library_name": "diffusers", "datasets": ["pictures"]}
    assert facts.items() <= card.data.to_dict().items()
    assert "unconditional-image-generation" in card.data.tags
    assert "| width | 16 |" in card.text
    assert "| images seen | 80 |" in card.text
    assert "| Frechet distance: FD | 123.457 | 4.500 |" in card.text
    assert "| recall (variety) | 0.750 | 1.000 |" in card.text
    assert "| precision (above that of real images: blur) | 0.500 | 0.250 |" in card.text
    assert "| memorization (copies of training images) | 0.000 |" in card.text
    with Image.open("model/samples.png") as picture:
        assert picture.size == (32, 32)
    code = re.search("```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert code.count("\n") == 3
    names = {}
    exec(code, names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 4


def test_the_card_claims_no_copies_where_none_were_looked_for(exchange, here):
    """As by other images than those of the training."""
    figures = [1.0] * (len(evaluate.COLUMNS) - 10)
    step = checkpoints.load("tiny")["step"]
    facts = ["", "tiny", step, "dpm++", 25, "", 0, "others", "FD", 64]
    row = dict(zip(evaluate.COLUMNS, [*facts, *figures], strict=True))
    for copies in (0.0, ""):
        evaluate.add_row(Path("results/tiny/evaluation.csv"), row | {"copies": copies})
        assert exchange("export", "--run_name=tiny", f"--to=model{copies}").status == 0
        card = Path(f"model{copies}/README.md").read_text()
        assert "| Frechet distance: FD | 1.000 | 1.000 |" in card
        assert ("memorization" in card) == (copies == 0.0)


def test_the_cards_picture_is_the_newest_of_these_weights(exchange, run, here):
    assert run("sample", "--run_name=tiny", "--n_img=4", "--steps=5", "--device=cpu").status == 0
    assert run("sample", "--run_name=tiny", "--n_img=4", "--steps=4", "--device=cpu").status == 0
    assert exchange("export", "--run_name=tiny", "--to=one").status == 0
    assert (
        Path("one/samples.png").read_bytes()
        == Path("results/tiny/samples_2/samples.png").read_bytes()
    )
    make_run("tiny")
    assert exchange("export", "--run_name=tiny", "--to=two").status == 0
    with Image.open("two/samples.png") as picture:
        assert picture.size == (32, 32), "16 new images"


@pytest.mark.parametrize(
    "words",
    [("--label=dogs",), ("--label=dogs,cats",), ("--init_image=pictures/picture_0000.png",)],
)
def test_the_cards_picture_is_of_all_classes_and_of_no_other_picture(exchange, run, here, words):
    make_run("mine", classes=("cats", "dogs"))
    command = ("sample", "--run_name=mine", "--n_img=4", "--steps=4", "--device=cpu")
    for options in ((), words):
        assert run(*command, *options).status == 0
    assert exchange("export", "--run_name=mine", "--to=model").status == 0
    assert (
        Path("model/samples.png").read_bytes()
        == Path("results/mine/samples/samples.png").read_bytes()
    )


def test_the_card_keeps_where_the_pictures_lay_to_itself(exchange, place, quick_picture):
    make_run("mine")
    assert exchange("export", "--run_name=mine", "--to=model").status == 0
    for path in Path("model").rglob("*.*"):
        assert b"secret place" not in path.read_bytes(), path


def test_a_full_disk_leaves_no_half_of_a_folder(exchange, place, quick_picture, monkeypatch):
    def fail(path: Path, *_) -> None:
        raise OSError(28, "No space left on device", str(path))

    make_run("mine")
    monkeypatch.setattr(Path, "write_bytes", fail)
    refused(exchange, place, "No space left", "export", "--run_name=mine", "--to=model")


def test_without_safetensors_the_command_to_get_it_is_named(exchange, place, monkeypatch):
    make_run("mine")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(exchange, place, "pip install safetensors", "export", "--run_name=mine", "--to=model")


# ---- runs that were imported ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_eps": "small"},
        {"norm_groups": 5},
        {"norm_groups": 4.0},
        {"head_width": 10},
        {"head_width": "wide"},
        {"frequency_shift": 8},
        {"downsample_padding": 2},
        {"attention_levels": (0,)},
        {"attention_levels": 3},
        {"norm_eps": float("nan")},
    ],
    ids=str,
)
def test_a_strangers_facts_of_a_network_are_not_trusted(run, place, changes):
    make_run("mine")
    state = torch.load(checkpoints.paths_of("mine")[0], weights_only=True)
    state["settings"] |= changes
    torch.save(state, checkpoints.paths_of("mine")[0])
    result = run("sample", "--run_name=mine", "--n_img=1", "--device=cpu")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "do not fit its settings" in result.err


def test_a_run_begun_from_an_imported_one_keeps_its_network_and_goes_on(here, run, monkeypatch):
    """Both trainings do next to nothing: their network still answers as the imported one."""
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    make_run(
        "theirs", norm_eps=0.1, attention_levels=(0,), downsample_padding=0, frequency_shift=1.0
    )
    words = [
        word for word in TRAIN if not word.startswith(("--lr=", "--attention_size", "--epochs"))
    ]
    words += [
        "--lr=1e-9",
        "--schedule=linear",
        "--objective=eps",
        "--run_name=mine",
        "--init_from=theirs",
    ]
    for epochs in (2, 3):
        result = run(*words, f"--epochs={epochs}")
        assert result.status == 0, result.err
        mine = ddpm.load_run("mine")["settings"]
        assert [mine[name] for name in ("norm_eps", "downsample_padding", "frequency_shift")] == [
            0.1,
            0,
            1.0,
        ]
    assert distance(our_image("mine", "dpm++", 5), our_image("theirs", "dpm++", 5)) < 1e-3


def test_a_run_by_class_that_was_imported_is_one_to_begin_from(here, run, exchange, quick_picture):
    make_run("mine", classes=("cats", "dogs"))
    assert exchange("export", "--run_name=mine", "--to=model").status == 0
    assert exchange("import", "--source=model", "--run_name=theirs").status == 0
    for name in ("cats", "dogs"):
        paint(here / "sorted" / name, count=4)
    words = [word for word in TRAIN if not word.startswith(("--dataset=", "--epochs="))]
    words += ["--schedule=linear", "--objective=eps", "--dataset=sorted", "--epochs=1"]
    words += ["--run_name=new", "--init_from=theirs"]
    assert "to fit it, add --conditional=True" in run(*words).err
    assert run(*words, "--conditional").status == 0
