"""What moves the weights down the gradient: AdamW, or Muon for the hidden layers and AdamW beside.

Algorithm 1 says "take a gradient descent step", and leaves open which.
"""

import math

import torch
from torch import Tensor, nn

from machinery import processes

# what Muon leaves to AdamW, beside biases and norms: the first and last layers, and embeddings
OUTER = ("conv_in", "conv_out", "time_embedding", "class_embedding")
MOMENTUM = 0.95
# a, b, c of each step of `orthogonalize`, and how many steps: of Jordan et al. 2024
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def hidden_names(network: nn.Module) -> list[str]:
    """The weights that Muon moves: the matrices and convolutions between the first and the last."""
    weights = network.named_parameters()
    return [name for name, it in weights if it.ndim >= 2 and not name.startswith(OUTER)]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Give matrices (N, rows, columns) singular values near 1, and leave their directions.

    The Newton-Schulz iteration of Jordan et al. 2024: the singular values end between 0.7 and 1.2,
    however unlike they were; those below a thousandth or so of the whole stay smaller.
    """
    a, b, c = QUINTIC
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices  # (N, rows, columns), at least as many columns
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(ROUNDS):
        gram = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.AdamW):
    """Hidden weights go in the direction of their orthogonalized momentum; AdamW moves the rest.

    A gradient's matrix is mostly a few strong directions. Muon (Jordan et al. 2024) goes as far in
    the weak ones, in which much is left to learn. A convolution counts as the matrix of its output
    channels. The length of a step is AdamW's for the same learning rate (Liu et al. 2025, section
    2.2).

    Several processes share the matrices and add up what each has found, so all go the same way to
    the bit.

    Args:
        network: whose weights are moved.
        precision: of the network; if that is bfloat16, `orthogonalize` computes in it too.
    """

    def __init__(self, network: nn.Module, precision: torch.dtype):
        super().__init__(network.parameters(), weight_decay=0.0, fused=True)
        weights = dict(network.named_parameters())
        self.hidden = [weights[name] for name in hidden_names(network)]
        self.is_short = precision == torch.bfloat16

    @torch.no_grad()
    def step(self) -> None:
        """Move all weights; the gradients of the hidden ones are used up."""
        directions = [self.advance_momentum(weight) for weight in self.hidden]
        for weight in self.hidden:
            weight.grad = None  # so that AdamW passes it over
        super().step()
        lr = self.param_groups[0]["lr"]
        for weight, direction in zip(self.hidden, turned(directions), strict=True):
            length = 0.2 * math.sqrt(max(direction.shape))
            weight.add_(direction.view(weight.shape), alpha=-lr * length)

    def advance_momentum(self, weight: Tensor) -> Tensor:
        """Add a weight's gradient to its momentum: where it leads (rows, columns), as Nesterov.

        A step that a loss scaler skips changes nothing and leads nowhere, as with AdamW.
        """
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
        gradient, momentum = weight.grad, state["exp_avg"]
        share = torch.ones((), dtype=weight.dtype, device=weight.device)
        if (is_infinite := getattr(self, "found_inf", None)) is not None:
            share -= is_infinite
            gradient = gradient.where(share > 0, 0)
        state["step"] += share
        momentum.lerp_(gradient, share * (1 - MOMENTUM))
        direction = gradient.lerp(momentum, MOMENTUM).flatten(1) * share
        return direction.bfloat16() if self.is_short else direction


def turned(matrices: list[Tensor]) -> list[Tensor]:
    """Orthogonalize matrices (rows, columns), those of a shape together, each process some."""
    found = [torch.zeros_like(matrix) for matrix in matrices]
    alike = {}
    for number in range(processes.rank(), len(matrices), processes.count()):
        alike.setdefault(matrices[number].shape, []).append(number)
    for numbers in alike.values():
        together = orthogonalize(torch.stack([matrices[number] for number in numbers]))
        for number, matrix in zip(numbers, together, strict=True):
            found[number].copy_(matrix)
    processes.add_up(found)
    return found


def adamw(network: nn.Module, _: torch.dtype) -> torch.optim.AdamW:
    """AdamW for all weights, without weight decay."""
    return torch.optim.AdamW(network.parameters(), weight_decay=0.0, fused=True)


OPTIMIZERS = {"muon": Muon, "adamw": adamw}  # of a network and its precision


def moments_of(network: nn.Module, optimizer: str) -> list[dict[str, torch.Size]]:
    """What an optimizer keeps of each weight, in order: name and shape."""
    hidden = {"muon": hidden_names(network), "adamw": ()}[optimizer]
    kept = []
    for name, weight in network.named_parameters():
        squares = {} if name in hidden else {"exp_avg_sq": weight.shape}
        kept.append({"step": torch.Size(), "exp_avg": weight.shape} | squares)
    return kept


def restore(optimizer: torch.optim.AdamW, state: dict) -> None:
    """Have an optimizer that has not stepped yet stand where `state`, its `state_dict`, did."""
    options = optimizer.state_dict()["param_groups"]  # a stranger's may ask for absent moments
    optimizer.load_state_dict({"state": state["state"], "param_groups": options})
    for weight, moments in optimizer.state.items():  # AdamW trusts their layout blindly
        for kind in moments.keys() - {"step"}:
            moments[kind] = torch.empty_like(weight).copy_(moments[kind])
