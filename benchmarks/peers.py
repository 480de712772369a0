"""The networks that are compared, and what each project does with them in a step.

diffusers gets our network with our weights. denoising-diffusion-pytorch (lucidrains) has a network
of its own.

Reading order: networks, training steps, sampling, variants.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm
import utils
from ddpm import Diffusion
from machinery import devices, reading
from modules import UNet

# The command line's default network, and a small one for a quick look.
REFERENCE = {
    "img_size": 64,
    "width": 64,
    "multipliers": (1, 2, 4, 4),
    "blocks": 2,
    "attention_size": 16,
}
SMALL = {"img_size": 32, "width": 32, "multipliers": (1, 2, 2), "blocks": 1, "attention_size": 8}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PIP_NAMES = {"diffusers": "diffusers", "denoising_diffusion_pytorch": "denoising-diffusion-pytorch"}


def is_installed(module: str) -> bool:
    """Whether a peer can be imported; says how to get it if not."""
    try:
        importlib.import_module(module)
    except ImportError:
        name = PIP_NAMES[module]
        print(f"left out: {name} is not installed here; pip install {name}")
        return False
    return True


def autocast(device: torch.device, precision: str, **options) -> torch.autocast:
    """fp32 or bf16, whatever the hardware would rather have."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", **options)


# ---- networks ------------------------------------------------------------------------------------


def our_network(shape: dict) -> UNet:
    """Our network, from a fixed seed, on the CPU.

    Nothing in it is 0, as some layers are when a training begins: all networks would give the same
    answer.
    """
    torch.manual_seed(0)
    network = UNet(**shape)
    network.settings = shape  # a training is set up with them
    for weight in network.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    return network.eval()


def diffusers_twin(network: UNet, shape: dict) -> nn.Module:
    """diffusers' UNet2DModel of the same layers and weights.

    It is checked that its answer is ours.
    """
    from diffusers import UNet2DModel

    side = shape["img_size"]
    depths = range(len(shape["multipliers"]))
    attended = [side // 2**depth <= shape["attention_size"] for depth in depths]
    widths = [shape["width"] * multiplier for multiplier in shape["multipliers"]]
    twin = UNet2DModel(
        sample_size=side,
        block_out_channels=widths,
        layers_per_block=shape["blocks"],
        norm_num_groups=min(32, shape["width"] // 4),
        attention_head_dim=widths[-1] // network.mid_block.attentions[0].heads,
        down_block_types=["AttnDownBlock2D" if there else "DownBlock2D" for there in attended],
        up_block_types=["AttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attended)],
    ).eval()
    twin.load_state_dict(network.state_dict(), strict=True)
    check_same_answer(network, twin, side)
    return twin


def check_same_answer(network: UNet, twin: nn.Module, side: int) -> None:
    """Check that both answers agree to 1e-3 of their size.

    float32's rounding is far below that, another layer far above.
    """
    x = torch.randn(2, 3, side, side)
    t = torch.tensor([1, 700])
    with torch.no_grad():
        ours = network(x, t)
        theirs = twin(x, t - 1).sample
    apart = ((ours - theirs).abs().max() / ours.abs().max()).item()
    assert apart < 1e-3, f"diffusers' network is not ours: answers are {apart:.1e} apart"


def lucidrains_network(shape: dict) -> nn.Module:
    """The Unet of its README, of the same first width."""
    from denoising_diffusion_pytorch import Unet

    torch.manual_seed(0)
    return Unet(dim=shape["width"], dim_mults=(1, 2, 4, 8), flash_attn=True)


def all_networks(shape: dict) -> dict[str, nn.Module]:
    """Ours and those of the installed peers, by project, on the CPU."""
    networks = {"ours": our_network(shape)}
    if is_installed("diffusers"):
        networks["diffusers"] = diffusers_twin(networks["ours"], shape)
    if is_installed("denoising_diffusion_pytorch"):
        networks["lucidrains"] = lucidrains_network(shape)
    return networks


# ---- training steps ------------------------------------------------------------------------------
# All begin with the same batch of images, (B, 3, H, W) in [-1, 1], on the device: reading files is
# another matter.


def our_training(network: UNet, precision: str, images: Tensor, **settings) -> ddpm.Training:
    """A training with these images as its data set, and other `settings` than the defaults."""
    pixels = utils.to_bytes(images).cpu().numpy()
    labels = np.zeros(len(images), np.int64)
    data = reading.Dataset(pixels, fingerprint="", remarks=[], mode="RGB", labels=labels)
    loader = utils.Loader(data, len(images), seed=0, flip="horizontal", device=images.device)
    parameters = inspect.signature(ddpm.train).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    settings = defaults | {"optimizer": "muon"} | settings
    settings["precision"] = str(PRECISIONS[precision]).removeprefix("torch.")
    side = network.settings["img_size"]
    settings |= network.settings | {"img_size": (side, side), "mode": "RGB", "classes": ()}
    training = ddpm.Training(settings, loader, images.device)
    training.start_from(network.state_dict())
    return training


def train_ours(
    network: UNet,
    precision: str,
    images: Tensor,
    memory_format: torch.memory_format | None = None,  # as in Training
    optimizer: str = "muon",
    compiled: bool = False,
) -> Callable[[], None]:
    """`ddpm.Training.advance`, from these images as its data set."""
    training = our_training(network, precision, images, optimizer=optimizer)
    training.network.to(memory_format=memory_format or devices.layout(images.device))
    if compiled:
        training.network.compile(dynamic=False)
    return functools.partial(training.advance, 0.5)


def train_diffusers(
    network: nn.Module, precision: str, images: Tensor, compiled: bool = False
) -> Callable[[], None]:
    """The step of diffusers' train_unconditional.py with --use_ema.

    The script lies in examples/unconditional_image_generation/.
    """
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    network = copy.deepcopy(network).train().to(images.device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    average = EMAModel(
        network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4
    )
    noising = DDPMScheduler(num_train_timesteps=1000)
    if compiled:
        network.compile(dynamic=False)

    def step() -> None:
        noise = torch.randn_like(images)
        t = torch.randint(0, 1000, (len(images),), device=images.device)
        with autocast(images.device, precision):
            answer = network(noising.add_noise(images, noise, t), t).sample
        loss = F.mse_loss(answer.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        loss.item()  # its log asks for the loss of every step

    return step


def train_lucidrains(network: nn.Module, precision: str, images: Tensor) -> Callable[[], None]:
    """The step of denoising-diffusion-pytorch's Trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA  # comes with it

    diffusion = GaussianDiffusion(copy.deepcopy(network), image_size=images.shape[-1])
    diffusion.train().to(images.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10).to(images.device)
    bright = (images + 1) / 2  # it takes [0, 1]

    def step() -> None:
        with autocast(images.device, precision):
            loss = diffusion(bright)
            loss.item()  # its progress bar asks for the loss of every step
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    return step


# ---- sampling ------------------------------------------------------------------------------------
# All are DDIM's: one answer of the network per step, and no fresh noise.


def captured(network: nn.Module, precision: str, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A network's forward pass as a CUDA graph: one launch instead of hundreds.

    The graph holds for inputs of the shape of `x` only.
    """
    still_x = x.clone()
    still_t = torch.ones(len(x), dtype=torch.long, device=x.device)

    def forward() -> Tensor:
        # a cache would not outlive the graph
        with torch.no_grad(), autocast(x.device, precision, cache_enabled=False):
            return network(still_x, still_t)

    # streams and graphs are of the current device, which need not be this one
    torch.cuda.set_device(x.device)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = forward()

    def replay(x: Tensor, t: Tensor) -> Tensor:
        still_x.copy_(x)
        still_t.copy_(t)
        graph.replay()
        return answer

    return replay


def sample_ours(
    network: UNet,
    precision: str,
    x: Tensor,
    steps: int,
    memory_format: torch.memory_format | None = None,  # as in ddpm.sample
    compiled: bool = False,
    graph: bool = False,
) -> Callable[[], Tensor]:
    """`Diffusion.denoise` from noise x (B, 3, H, W); the network is called as in `ddpm.sample`."""
    memory_format = memory_format or devices.layout(x.device)
    network = copy.deepcopy(network).to(x.device, memory_format=memory_format)
    if compiled:
        network.compile(dynamic=False)
    diffusion = Diffusion(device=x.device)
    answer_to = captured(network, precision, x) if graph else network

    def predict_clean(x_t: Tensor, t: int) -> Tensor:
        times = torch.full((len(x_t),), t, device=x_t.device)
        with autocast(x_t.device, precision):
            output = answer_to(x_t, times)
        return diffusion.clean(x_t, times, output.float()).clamp(-1, 1)

    def sample() -> Tensor:
        visited_steps = diffusion.visited_steps(steps)
        *_, (images, _) = diffusion.denoise(predict_clean, x, visited_steps, "ddim")
        return images

    return sample


def sample_diffusers(
    network: nn.Module, precision: str, x: Tensor, steps: int, compiled: bool = False
) -> Callable[[], Tensor]:
    """The loop of diffusers' DDIMPipeline, visiting the same steps as ours."""
    from diffusers import DDIMScheduler

    network = copy.deepcopy(network).to(x.device)
    if compiled:
        network.compile(dynamic=False)
    noising = DDIMScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    noising.set_timesteps(steps)

    @torch.no_grad()
    def sample() -> Tensor:
        x_t = x
        for t in noising.timesteps:
            with autocast(x.device, precision):
                output = network(x_t, t).sample
            x_t = noising.step(output.float(), t, x_t, eta=0.0).prev_sample
        return x_t

    return sample


def sample_lucidrains(
    network: nn.Module, precision: str, x: Tensor, steps: int
) -> Callable[[], Tensor]:
    """`GaussianDiffusion.sample` with DDIM; it draws its own noise of the shape of x."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    network = copy.deepcopy(network).eval()
    diffusion = GaussianDiffusion(network, image_size=x.shape[-1], sampling_timesteps=steps)
    diffusion.to(x.device)

    def sample() -> Tensor:
        # its progress bar is hidden
        with autocast(x.device, precision), contextlib.redirect_stderr(io.StringIO()):
            return diffusion.sample(batch_size=len(x))

    return sample


# ---- variants ------------------------------------------------------------------------------------

TRAINING = {"ours": train_ours, "diffusers": train_diffusers, "lucidrains": train_lucidrains}
SAMPLING = {"ours": sample_ours, "diffusers": sample_diffusers, "lucidrains": sample_lucidrains}
BASELINE = "diffusers, fp32"  # as it is shipped; the others are so many times faster


class Variant(NamedTuple):
    """One way to do a piece of work."""

    precision: str
    network: nn.Module
    build: Callable[[], Callable]  # sets it up, and gives the call to be measured


def variants(
    networks: dict[str, nn.Module],
    actions: dict[str, Callable],
    arguments: tuple,
    precisions: list[str],
    compiled: bool,
) -> dict[str, Variant]:
    """Every network in every precision, and compiled in the last one if wanted.

    lucidrains' network is not made for compiling.

    Args:
        networks: see `all_networks`.
        actions: TRAINING or SAMPLING.
        arguments: what an action is given after the network and the precision.
        precisions: "fp32", "bf16" or both.
        compiled: whether there are compiled variants too.
    """
    found = {}
    for project, network in networks.items():
        for precision in precisions:
            build = functools.partial(actions[project], network, precision, *arguments)
            found[f"{project}, {precision}"] = Variant(precision, network, build)
        if compiled and project != "lucidrains":
            compiling = functools.partial(build, compiled=True)
            found[f"{project}, {precision}, compiled"] = Variant(precision, network, compiling)
    return found
