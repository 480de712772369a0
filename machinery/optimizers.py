"""What moves the weights down the gradient: AdamW, or Muon for the hidden layers and AdamW beside.

Algorithm 1 says "take a gradient descent step", and leaves open which.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from machinery import processes

# what Muon leaves to AdamW, beside biases and norms: the first and last layers, and embeddings
OUTER = ("conv_in", "conv_out", "time_embedding", "class_embedding")
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of AdamW, PyTorch's defaults
MOMENTUM = 0.95  # of Muon
# a, b, c of each step of `orthogonalize`, and how many steps: of Jordan et al. 2024
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def hidden_names(network: nn.Module) -> list[str]:
    """The weights that Muon moves: the matrices and convolutions between the first and the last."""
    weights = network.named_parameters()
    return [name for name, it in weights if it.ndim >= 2 and not name.startswith(OUTER)]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Give matrices (N, rows, columns) singular values near 1, and leave their directions.

    The Newton-Schulz iteration of Jordan et al. 2024: the singular values end between 0.68 and 1.2,
    however unlike they were; those below some thousandth of the whole stay smaller.
    """
    a, b, c = QUINTIC
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices  # (N, rows, columns), at least as many columns
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(ROUNDS):
        gram = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) without weight decay, for all weights; PyTorch's kernel.

    Not `torch.optim.AdamW`: it imports PyTorch's compiler, which takes more than a second.

    Args:
        network: whose weights are moved.
        precision: of the network.

    Attributes:
        lr: learning rate of the next step.
        moments: what is kept of each weight, in order; see `moments_of`.
        found_inf: not 0 where the next step is to be skipped; a loss scaler sets it for that step.
        param_groups: the weights, as PyTorch's loss scaler looks for them.
    """

    name = "adamw"
    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True  # PyTorch's name for: it looks at `found_inf`

    def __init__(self, network: nn.Module, precision: torch.dtype):
        self.lr = 0.0
        self.weights = list(network.parameters())
        self.param_groups = [{"params": self.weights}]
        self.moments = []
        for weight, kinds in zip(self.weights, moments_of(network, self.name), strict=True):
            kept = {kind: torch.zeros_like(weight) for kind in kinds if kind != "step"}
            step = torch.zeros((), dtype=torch.float32, device=weight.device)
            self.moments.append({"step": step} | kept)

    def state_dict(self) -> dict:
        """What a checkpoint keeps; the inverse of `load_state_dict`."""
        return {"state": dict(enumerate(self.moments))}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Stand where `state` was saved, on whatever device and in whatever layout."""
        for number, kept in enumerate(self.moments):
            for kind, moment in kept.items():
                moment.copy_(state["state"][number][kind])

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None

    def step(self) -> None:
        """Move all weights down their gradients."""
        self.move_by_adamw(range(len(self.weights)))

    @torch.no_grad()
    def move_by_adamw(self, numbers: Sequence[int]) -> None:
        """Move the weights of these numbers; each must have its gradient."""
        weights = [self.weights[number] for number in numbers]
        moments = [self.moments[number] for number in numbers]
        adamw(
            weights,
            [weight.grad for weight in weights],
            [kept["exp_avg"] for kept in moments],
            [kept["exp_avg_sq"] for kept in moments],
            [],
            [kept["step"] for kept in moments],
            fused=True,
            found_inf=self.found_inf,
            lr=self.lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPSILON,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
        )


class Muon(AdamW):
    """Hidden weights go in the direction of their orthogonalized momentum; AdamW moves the rest.

    A gradient's matrix is mostly a few strong directions. Muon (Jordan et al. 2024) goes as far in
    the weak ones, in which much is left to learn. A convolution counts as the matrix of its output
    channels. The length of a step is AdamW's for the same learning rate (Liu et al. 2025).

    Several processes share the matrices and add up what each has found, so all go the same way to
    the bit.

    Args:
        network: whose weights are moved.
        precision: of the network; where that is bfloat16 for all processes, `orthogonalize`
            computes in it, too.
    """

    name = "muon"

    def __init__(self, network: nn.Module, precision: torch.dtype):
        super().__init__(network, precision)
        hidden = set(hidden_names(network))
        names = [name for name, _ in network.named_parameters()]
        self.hidden = [number for number, name in enumerate(names) if name in hidden]
        self.outer = [number for number, name in enumerate(names) if name not in hidden]
        # what processes add up is of one type, on machines without bfloat16, too
        (is_long,) = processes.largest(float(precision != torch.bfloat16))
        self.precision = None if is_long else torch.bfloat16

    @torch.no_grad()
    def step(self) -> None:
        """Move all weights; the gradients of the hidden ones are used up."""
        alike = {}  # what has one shape is turned together
        for number, direction in zip(self.hidden, self.advance_momenta(), strict=True):
            weight = self.weights[number]
            weight.grad = None  # its memory is wanted
            alike.setdefault(direction.shape, []).append((weight, direction))
        self.move_by_adamw(self.outer)
        matrices = [torch.stack([each for _, each in group]).flatten(2) for group in alike.values()]
        turned = [orthogonalize_shared(matrix.to(dtype=self.precision)) for matrix in matrices]
        processes.add_up(turned)
        for group, directions in zip(alike.values(), turned, strict=True):
            length = 0.2 * math.sqrt(max(directions.shape[1:]))
            for (weight, _), direction in zip(group, directions, strict=True):
                weight.add_(direction.view(weight.shape), alpha=-self.lr * length)

    def advance_momenta(self) -> list[Tensor]:
        """Add each hidden weight's gradient to its momentum: where both lead, as Nesterov.

        A step that a loss scaler skips changes nothing and leads nowhere, as with AdamW.
        """
        steps = [self.moments[number]["step"] for number in self.hidden]
        momenta = [self.moments[number]["exp_avg"] for number in self.hidden]
        gradients = [self.weights[number].grad for number in self.hidden]
        is_skipped = self.found_inf
        if is_skipped is not None:
            pairs = zip(momenta, gradients, strict=True)
            gradients = [momentum.where(is_skipped > 0, each) for momentum, each in pairs]
        torch._foreach_add_(steps, 1.0)
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        directions = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        if is_skipped is not None:
            torch._foreach_sub_(steps, [is_skipped] * len(steps))
            directions = [each * (1 - is_skipped) for each in directions]
        return directions


def orthogonalize_shared(matrices: Tensor) -> Tensor:
    """`orthogonalize` those that are this process's share; the rest are 0."""
    share = processes.share(len(matrices))
    if len(share) == len(matrices):
        return orthogonalize(matrices)
    turned = torch.zeros_like(matrices)
    if share:
        turned[share.start : share.stop] = orthogonalize(matrices[share.start : share.stop])
    return turned


OPTIMIZERS = {"muon": Muon, "adamw": AdamW}  # of a network and its precision


def moments_of(network: nn.Module, optimizer: str) -> list[dict[str, torch.Size]]:
    """What an optimizer keeps of each weight, in order: name and shape."""
    hidden = {"muon": hidden_names(network), "adamw": ()}[optimizer]
    kept = []
    for name, weight in network.named_parameters():
        squares = {} if name in hidden else {"exp_avg_sq": weight.shape}
        kept.append({"step": torch.Size(), "exp_avg": weight.shape} | squares)
    return kept
