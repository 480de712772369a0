"""A network of one size on larger images: in tiles that overlap, blended without seams."""

import math

import torch
from torch import Tensor, nn

OVERLAP = 4  # tiles overlap by at least this fraction of their side: 1 / 4


def starts(side: int, tile: int) -> list[int]:
    """Where tiles begin that cover `side` pixels, evenly spread."""
    if side <= tile:
        return [0]
    count = 1 + math.ceil((side - tile) / (tile - tile // OVERLAP))
    return [round(number * (side - tile) / (count - 1)) for number in range(count)]


def window(tile: tuple[int, int]) -> Tensor:
    """How much each pixel of a tile counts (h, w): 1 in the middle, falling to its borders."""
    ramps = []
    for side in tile:
        place = torch.arange(side) + 0.5
        ramps.append((torch.minimum(place, side - place) / max(1, side // OVERLAP)).clamp(max=1))
    return ramps[0][:, None] * ramps[1]


class Tiled:
    """Answers as a network does, for images of any size; smaller ones than `tile` are one.

    An output is affine in what it says of the image, so that blended outputs are those of a blended
    guess: at every step the tiles agree on what lies in two of them.

    Args:
        network: see `UNet.forward`.
        tile: height and width.
    """

    def __init__(self, network: nn.Module, tile: tuple[int, int]):
        self.network = network
        self.tile = tile
        self.channels = network.channels
        self.null_class = network.null_class

    def __call__(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, inputs: Tensor | None = None
    ) -> Tensor:
        height, width = map(min, zip(self.tile, x.shape[2:], strict=True))
        share = window((height, width)).to(x.device)
        total = torch.zeros_like(x)
        weight = x.new_zeros(x.shape[2:])
        for top in starts(x.shape[2], height):
            for left in starts(x.shape[3], width):
                place = (..., slice(top, top + height), slice(left, left + width))
                shown = None if inputs is None else inputs[place]
                output = self.network(x[place], t, labels, shown)
                total[place] += share * output.float()
                weight[place] += share
        return total / weight
