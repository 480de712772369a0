"""GroupNorm on a GPU without its detour by float32 and NCHW: two candidates, tried by `speed`.

PyTorch 2.14's own, under CUDA's autocast, computes in float32 and copies its input to NCHW. Which
of these becomes the network's is decided by what `benchmarks.h100.speed` measures.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowPrecisionNorm(nn.GroupNorm):
    """In the type of its input: for eager mode."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ChannelSumsNorm(nn.GroupNorm):
    """By sums of channels first, then of groups, in float32: what a compiler fuses in NHWC."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = x.float()
            groups = (self.num_groups, -1)
            mean = y.mean((2, 3)).unflatten(1, groups).mean(2, keepdim=True)  # (B, groups, 1)
            square = y.square().mean((2, 3)).unflatten(1, groups).mean(2, keepdim=True)
            scale = (square - mean.square()).clamp(min=0).add(self.eps).rsqrt()
            scale = scale * self.weight.unflatten(0, groups)  # (B, groups, C / groups)
            shift = self.bias.unflatten(0, groups) - mean * scale
            scale, shift = (each.flatten(1)[:, :, None, None] for each in (scale, shift))
            return (y * scale + shift).to(x.dtype)


def replace_norms(network: nn.Module, kind: type[nn.GroupNorm]) -> nn.Module:
    """The network, in place, with every GroupNorm computed as `kind` does; weights stay."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = kind
    return network
