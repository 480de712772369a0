"""What learns: the U-Net of the DDPM paper and the running average of its weights.

The parameter names are those of diffusers' UNet2DModel, so a `state_dict()` moves between the two as it is.

Reading order: timestep_embedding, the blocks, UNet, update_average.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t: Tensor, width: int, frequency_shift: float = 0.0) -> Tensor:
    """Cosines, then sines, of t at width / 2 frequencies from 1 towards 1 / 10,000 (Vaswani et al. 2017, section 3.5).

    Args:
        t: times (B,), of any real type.
        width: size of the embedding, even.
        frequency_shift: with 1, as in DDPM's own code, the last frequency is 1 / 10,000 itself.

    Returns:
        (B, width) float32.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - frequency_shift)))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Two-layer perceptron that turns the raw embedding into what every block is told: (B, width) -> (B, size)."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, size)
        self.linear_2 = nn.Linear(size, size)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, told the time (and class) in between.

    x (B, C_in, H, W), embedding (B, E) -> (B, C_out, H, W)
    """

    def __init__(self, channels_in: int, channels_out: int, embedding_size: int, norm: Callable, dropout: float):
        super().__init__()
        self.norm1 = norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_size, channels_out)
        self.norm2 = norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + self.conv_shortcut(x)


class SelfAttention(nn.Module):
    """Every pixel looks at every pixel: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, norm: Callable, head_width: int):
        super().__init__()
        self.heads = max(1, channels // head_width)
        if channels % self.heads:
            raise ValueError(f"{channels} channels do not fit into heads of {head_width}")
        self.group_norm = norm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list of one: diffusers' name is to_out.0

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (
            project(pixels).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, HW, C / heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, HW, C)
        return x + self.to_out[0](mixed).transpose(1, 2).unflatten(2, x.shape[2:])


class Resample(nn.Module):
    """Half the resolution (a 3x3 convolution at every other pixel) or twice (every pixel four times, then 3x3)."""

    def __init__(self, channels: int, up: bool, padding: int = 1):
        super().__init__()
        edges = nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1))  # without padding, zeros right and below alone
        self.prepare = nn.Upsample(scale_factor=2.0, mode="nearest") if up else edges
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.prepare(x))


class Level(nn.Module):
    """One resolution of the U: residual blocks, each followed by attention where wanted."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module] | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions or [nn.Identity() for _ in resnets])
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()


class UNet(nn.Module):
    """The network of Ho et al. 2020 (appendix B): it is shown a noisy image and its step, and answers with an image.

    What the answer means - the noise, v or the clean image - is up to `Diffusion`.

    Args:
        img_size: height and width in pixels, each a multiple of 2^(levels - 1); one number for a square.
        channels: of the image: 1 gray, 3 RGB, 4 RGBA.
        width: channels, to be multiplied; a multiple of 4 up to 128, of 32 above.
        multipliers: channels of each level, as multiples of `width`; each has half the resolution of the one above.
        blocks: residual blocks per level on the way down (and one more on the way up).
        attention_size: levels whose shorter side has at most so many pixels get attention; the middle always has it.
        dropout: share of activations dropped inside residual blocks, in [0, 1).
        classes: number of classes, or None for a network that knows none.

    With these, networks that were trained elsewhere fit, too:
        attention_levels: the levels with attention, 0 is the full resolution; (): those that `attention_size` tells.
        head_width: channels of an attention head, a level with fewer has one head; 0: up to 64, the same everywhere.
        norm_groups: groups of every GroupNorm; 0: of four channels or more on the first level, at most 32.
        norm_eps: what every GroupNorm adds to the variance.
        downsample_padding: 1: zeros around the image when its resolution is halved; 0: right and below alone.
        frequency_shift: see `timestep_embedding`.

    Attributes:
        recompute: whether the backward pass computes what is within the blocks anew instead of having kept it: a fourth
            of the memory, a third more to compute.
    """

    recompute = False

    def __init__(
        self,
        img_size: int | tuple[int, int],
        channels: int = 3,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        attention_size: int = 16,
        dropout: float = 0.0,
        classes: int | None = None,
        attention_levels: tuple[int, ...] = (),
        head_width: int = 0,
        norm_groups: int = 0,
        norm_eps: float = 1e-5,
        downsample_padding: int = 1,
        frequency_shift: float = 0.0,
    ):
        super().__init__()
        shorter = img_size if isinstance(img_size, int) else min(img_size)
        widths = [width * multiplier for multiplier in multipliers]
        self.channels, self.width, self.null_class = channels, widths[0], classes
        self.frequency_shift = frequency_shift
        attended = attention_levels or [depth for depth in range(len(widths)) if shorter // 2**depth <= attention_size]
        embedding_size = 4 * self.width
        groups = norm_groups or min(32, width // 4)  # one channel each would erase the time: a group's mean is removed
        norm = functools.partial(nn.GroupNorm, groups, eps=norm_eps)  # of so many channels
        attended_widths = [here for depth, here in enumerate(widths) if depth in attended]
        head_width = head_width or math.gcd(64, widths[-1], *attended_widths)  # one number for all, as in diffusers

        def resnet(channels_in: int, channels_out: int) -> ResidualBlock:
            return ResidualBlock(channels_in, channels_out, embedding_size, norm, dropout)

        def attention(channels: int) -> SelfAttention:
            return SelfAttention(channels, norm, head_width)

        self.time_embedding = TimeEmbedding(self.width, embedding_size)
        self.class_embedding = nn.Embedding(classes + 1, embedding_size) if classes else None  # the last one: no class
        self.conv_in = nn.Conv2d(channels, self.width, 3, padding=1)

        self.down_blocks, skips, last = nn.ModuleList(), [self.width], len(widths) - 1
        for depth, (above, here) in enumerate(zip([self.width, *widths], widths, strict=False)):
            level = Level(
                [resnet(before, here) for before in [above] + [here] * (blocks - 1)],
                [attention(here) for _ in range(blocks)] if depth in attended else None,
            )
            skips += [here] * blocks
            if depth < last:
                level.downsamplers.append(Resample(here, up=False, padding=downsample_padding))
                skips.append(here)
            self.down_blocks.append(level)

        self.mid_block = Level([resnet(here, here), resnet(here, here)], [attention(here), nn.Identity()])

        self.up_blocks, below = nn.ModuleList(), here
        for depth, here in reversed(list(enumerate(widths))):
            level = Level(
                [resnet(before + skips.pop(), here) for before in [below] + [here] * blocks],
                [attention(here) for _ in range(blocks + 1)] if depth in attended else None,
            )
            if depth > 0:
                level.upsamplers.append(Resample(here, up=True))
            self.up_blocks.append(level)
            below = here

        self.conv_norm_out = norm(self.width)
        self.conv_out = nn.Conv2d(self.width, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # the first answer is 0 everywhere: a calm start
        nn.init.zeros_(self.conv_out.bias)

    def block(self, resnet: nn.Module, attention: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        """A residual block, and the attention behind it: h (B, C_in, H, W), embedding (B, E) -> (B, C_out, H, W)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(lambda *inputs: attention(resnet(*inputs)), h, embedding, use_reentrant=False)
        return attention(resnet(h, embedding))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The answer to a batch of noisy images.

        Args:
            x: images (B, C, H, W); clean ones lie in [-1, 1].
            t: noising step of each image (B,), 1..T.
            labels: class of each image (B,); `null_class` for none, which is also meant where they are left out.

        Returns:
            (B, C, H, W)
        """
        raw = timestep_embedding(t - 1, self.width, self.frequency_shift)  # here time counts from 0
        embedding = self.time_embedding(raw)  # (B, 4 width)
        if self.class_embedding is not None:
            labels = torch.full_like(t, self.null_class) if labels is None else labels
            embedding = embedding + self.class_embedding(labels)

        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            for resnet, attention in zip(level.resnets, level.attentions, strict=True):
                h = self.block(resnet, attention, h, embedding)
                skips.append(h)
            for downsample in level.downsamplers:
                h = downsample(h)
                skips.append(h)

        for resnet, attention in zip(self.mid_block.resnets, self.mid_block.attentions, strict=True):
            h = self.block(resnet, attention, h, embedding)

        for level in self.up_blocks:
            for resnet, attention in zip(level.resnets, level.attentions, strict=True):
                h = self.block(resnet, attention, torch.cat([h, skips.pop()], dim=1), embedding)
            for upsample in level.upsamplers:
                h = upsample(h)

        return self.conv_out(F.silu(self.conv_norm_out(h)))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, step: int, decay: float) -> None:
    """Fold the weights after optimizer step `step` (1, 2, ...) into their running average (EMA), in place.

        average <- decay * average + (1 - decay) * network

    The average makes far better images than the weights themselves. The decay is warmed up as
    min(decay, (1 + step) / (10 + step)), so that a young average forgets the random start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
