"""What learns: the U-Net of the DDPM paper, and the moving average (EMA) of its weights.

Parameters have the names of diffusers' UNet2DModel: a `state_dict()` fits both.

Reading order: timestep_embedding, the blocks, UNet, update_ema.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t: Tensor, width: int, frequency_shift: float = 0.0) -> Tensor:
    """Cosines, then sines, of t at width / 2 frequencies from 1 towards 1 / 10,000.

    Vaswani et al. 2017, section 3.5.

    Args:
        t: times (B,), of any real type.
        width: size of the embedding, even.
        frequency_shift: with 1, as in DDPM's own code, the last frequency is 1 / 10,000 itself.

    Returns:
        (B, width) float32.
    """
    half = width // 2
    scale = -math.log(10_000) / (half - frequency_shift)
    frequencies = torch.exp(torch.arange(half, device=t.device) * scale)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Two-layer perceptron between the raw embedding and the blocks: (B, width) -> (B, size)."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, size)
        self.linear_2 = nn.Linear(size, size)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embedding)))


def zero(layer: nn.Module) -> nn.Module:
    """A layer that begins at 0, so that no block adds anything yet, as in the paper's code."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the embedding of time (and class) is added in between.

    x (B, C_in, H, W), embedding (B, E) -> (B, C_out, H, W)
    """

    def __init__(
        self, channels_in: int, channels_out: int, time_size: int, norm: Callable, dropout: float
    ):
        super().__init__()
        self.norm1 = norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_size, channels_out)
        self.norm2 = norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.conv_shortcut = nn.Identity()
        if channels_in != channels_out:
            self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1)

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
        # a list of one: diffusers' name is to_out.0
        self.to_out = nn.ModuleList([zero(nn.Linear(channels, channels))])

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (
            project(pixels).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )  # (B, heads, HW, C / heads) each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, HW, C)
        return x + self.to_out[0](mixed).transpose(1, 2).unflatten(2, x.shape[2:])


class Resample(nn.Module):
    """Half the resolution (3x3 convolution with stride 2), or twice (nearest, then 3x3).

    In float32, twice is one transposed 4x4 convolution, of less than half the operations: a 3x3
    window over pixels that all stand there four times meets some of them twice or more, and their
    weights can be added first. In bfloat16 that gains nothing (benchmarks/README.md, "Levers").
    """

    def __init__(self, channels: int, up: bool, padding: int = 1):
        super().__init__()
        self.up = up
        # zeros right and below alone
        self.pad = nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1))
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if not self.up:
            return self.conv(self.pad(x))
        if x.dtype in (torch.bfloat16, torch.float16):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        weight = self.conv.weight.flip(2, 3)  # a transposed convolution turns it round
        shifts = [(left, 1 - left, top, 1 - top) for left in (0, 1) for top in (0, 1)]
        weight = sum(F.pad(weight, shift) for shift in shifts)  # (C, C, 4, 4)
        return F.conv_transpose2d(x, weight.transpose(0, 1), self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """One resolution of the U: residual blocks, each followed by attention or the identity."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()


class UNet(nn.Module):
    """After Ho et al. 2020, appendix B; details as in diffusers. A noisy image in, an image out.

    What the output means (the noise, v or the clean image) is up to `Diffusion`.

    Args:
        img_size: height and width in pixels, each a multiple of 2^(levels - 1), or one number.
        channels: of the image: 1 gray, 3 RGB, 4 RGBA; other numbers for arrays.
        width: channels, to be multiplied; a multiple of 4 up to 128, of 32 above.
        multipliers: channels of each level, as multiples of `width`; levels halve the resolution.
        blocks: residual blocks per level on the way down (and one more on the way up).
        attention_size: levels whose shorter side has at most this many pixels get attention; the
            middle always has it.
        dropout: share of activations dropped inside residual blocks, in [0, 1).
        classes: number of classes, or None for an unconditional network.
        input_channels: of an image shown beside the noisy one (Saharia et al. 2022); 0 for none.

    These make networks fit that were trained elsewhere:
        attention_levels: levels with attention, 0 is the full resolution; () for `attention_size`.
        head_width: channels of an attention head, a level with fewer has one head; 0 for the
            largest power of two, up to 64, that divides all levels with attention.
        norm_groups: groups of every GroupNorm; 0 for 32, or fewer with at least four channels each.
        norm_eps: what every GroupNorm adds to the variance.
        downsample_padding: 1 for zeros all around before halving; 0 for right and below alone.
        frequency_shift: see `timestep_embedding`.

    Attributes:
        recompute: gradient checkpointing: the backward pass computes the blocks again instead of
            keeping their activations: a fourth of the memory, a third more operations.
    """

    recompute = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 64,
        channels: int = 3,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        attention_size: int = 16,
        dropout: float = 0.0,
        classes: int | None = None,
        input_channels: int = 0,
        attention_levels: tuple[int, ...] = (),
        head_width: int = 0,
        norm_groups: int = 0,
        norm_eps: float = 1e-5,
        downsample_padding: int = 1,
        frequency_shift: float = 0.0,
    ):
        super().__init__()
        widths = [width * multiplier for multiplier in multipliers]
        depths = range(len(widths))
        shorter = img_size if isinstance(img_size, int) else min(img_size)
        small = [depth for depth in depths if shorter // 2**depth <= attention_size]
        attended = attention_levels or small
        self.channels = channels
        self.input_channels = input_channels
        self.width = widths[0]
        self.null_class = classes
        self.frequency_shift = frequency_shift

        embedding_size = 4 * self.width
        # with one channel per group, GroupNorm would remove the time: it subtracts a group's mean
        norm = functools.partial(nn.GroupNorm, norm_groups or min(32, width // 4), eps=norm_eps)
        # one number for all levels, as in diffusers
        head_width = head_width or math.gcd(64, widths[-1], *(widths[depth] for depth in attended))

        def resnets(inputs: list[int], width: int) -> list[nn.Module]:
            return [ResidualBlock(here, width, embedding_size, norm, dropout) for here in inputs]

        def level(inputs: list[int], depth: int) -> Level:
            blocks = resnets(inputs, widths[depth])
            if depth not in attended:
                return Level(blocks, [nn.Identity() for _ in blocks])
            return Level(blocks, [SelfAttention(widths[depth], norm, head_width) for _ in blocks])

        self.time_embedding = TimeEmbedding(self.width, embedding_size)
        # the last embedding stands for no class
        self.class_embedding = nn.Embedding(classes + 1, embedding_size) if classes else None
        self.conv_in = nn.Conv2d(channels + input_channels, self.width, 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skips = [self.width]  # channels of what the way up is given
        for depth in depths:
            here, above = widths[depth], widths[max(0, depth - 1)]
            block = level([above] + [here] * (blocks - 1), depth)
            skips += [here] * blocks
            if depth < depths[-1]:
                block.downsamplers.append(Resample(here, up=False, padding=downsample_padding))
                skips.append(here)
            self.down_blocks.append(block)

        bottom = widths[-1]
        middle = resnets([bottom, bottom], bottom)
        self.mid_block = Level(middle, [SelfAttention(bottom, norm, head_width), nn.Identity()])

        self.up_blocks = nn.ModuleList()
        for depth in reversed(depths):
            here, below = widths[depth], widths[min(depth + 1, depths[-1])]
            inputs = [below] + [here] * blocks
            block = level([before + skips.pop() for before in inputs], depth)  # each beside a skip
            if depth > 0:
                block.upsamplers.append(Resample(here, up=True))
            self.up_blocks.append(block)

        self.conv_norm_out = norm(self.width)
        self.conv_out = zero(nn.Conv2d(self.width, channels, 3, padding=1))

    def block(
        self, resnet: nn.Module, attention: nn.Module, h: Tensor, embedding: Tensor
    ) -> Tensor:
        """A residual block and its attention: h (B, C_in, H, W) -> (B, C_out, H, W)."""
        if self.recompute and torch.is_grad_enabled():
            both = lambda *inputs: attention(resnet(*inputs))  # noqa: E731
            drops = resnet.dropout.p > 0  # what is dropped depends on the generator's state
            return checkpoint(both, h, embedding, use_reentrant=False, preserve_rng_state=drops)
        return attention(resnet(h, embedding))

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, inputs: Tensor | None = None
    ) -> Tensor:
        """The output for a batch of noisy images.

        Args:
            x: images (B, C, H, W); clean ones lie in [-1, 1].
            t: noising step of each image (B,), 1..T.
            labels: class of each image (B,), `null_class` for none; left out, all are that.
            inputs: shown beside the images (B, C_in, H, W) in [-1, 1]; left out, 0 throughout.

        Returns:
            (B, C, H, W)
        """
        raw = timestep_embedding(t - 1, self.width, self.frequency_shift)  # here time is from 0
        embedding = self.time_embedding(raw)  # (B, 4 width)
        if self.class_embedding is not None:
            labels = torch.full_like(t, self.null_class) if labels is None else labels
            embedding = embedding + self.class_embedding(labels)

        if self.input_channels:
            shape = (len(x), self.input_channels, *x.shape[2:])
            x = torch.cat([x, x.new_zeros(shape) if inputs is None else inputs], dim=1)
        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            for resnet, attention in zip(level.resnets, level.attentions, strict=True):
                h = self.block(resnet, attention, h, embedding)
                skips.append(h)
            for downsample in level.downsamplers:
                h = downsample(h)
                skips.append(h)

        middle = self.mid_block
        for resnet, attention in zip(middle.resnets, middle.attentions, strict=True):
            h = self.block(resnet, attention, h, embedding)

        for level in self.up_blocks:
            for resnet, attention in zip(level.resnets, level.attentions, strict=True):
                h = self.block(resnet, attention, torch.cat([h, skips.pop()], dim=1), embedding)
            for upsample in level.upsamplers:
                h = upsample(h)

        return self.conv_out(F.silu(self.conv_norm_out(h)))


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, step: int, decay: float) -> None:
    """Fold the weights after step `step` (1, 2, ...) into their exponential moving average.

        ema <- decay * ema + (1 - decay) * network

    The EMA weights make far better images than the weights themselves. The decay is warmed up as
    min(decay, (1 + step) / (10 + step)), so that the random start is soon forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
