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


class Muon(torch.optim.AdamW):
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

    def __init__(self, network: nn.Module, precision: torch.dtype):
        super().__init__(network.parameters(), weight_decay=0.0, fused=True)
        weights = dict(network.named_parameters())
        self.hidden = [weights[name] for name in hidden_names(network)]
        # what processes add up is of one type, on machines without bfloat16, too
        (is_long,) = processes.largest(float(precision != torch.bfloat16))
        self.precision = None if is_long else torch.bfloat16

    @torch.no_grad()
    def step(self) -> None:
        """Move all weights; the gradients of the hidden ones are used up."""
        alike = {}  # what has one shape is turned together
        for weight, direction in zip(self.hidden, self.advance_momenta(), strict=True):
            weight.grad = None  # so that AdamW passes it over
            alike.setdefault(direction.shape, []).append((weight, direction))
        super().step()
        matrices = [torch.stack([each for _, each in group]).flatten(2) for group in alike.values()]
        turned = [orthogonalize_shared(matrix.to(dtype=self.precision)) for matrix in matrices]
        processes.add_up(turned)
        lr = self.param_groups[0]["lr"]
        for group, directions in zip(alike.values(), turned, strict=True):
            length = 0.2 * math.sqrt(max(directions.shape[1:]))
            for (weight, _), direction in zip(group, directions, strict=True):
                weight.add_(direction.view(weight.shape), alpha=-lr * length)

    def advance_momenta(self) -> list[Tensor]:
        """Add each hidden weight's gradient to its momentum: where both lead, as Nesterov.

        A step that a loss scaler skips changes nothing and leads nowhere, as with AdamW.
        """
        for weight in self.hidden:
            if weight not in self.state:
                step = torch.zeros((), device=weight.device)
                self.state[weight] = {"step": step, "exp_avg": torch.zeros_like(weight)}
        steps = [self.state[weight]["step"] for weight in self.hidden]
        momenta = [self.state[weight]["exp_avg"] for weight in self.hidden]
        gradients = [weight.grad for weight in self.hidden]
        is_skipped = getattr(self, "found_inf", None)
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
