"""Checkpoints: a run on the disk. Saved whole or not at all, read without trust.

models/RUN/checkpoint.pt holds everything needed to go on or to sample; checkpoint.previous.pt is the one before. A run
that was published has what sampling needs, and no more.
"""

import errno
import hashlib
import itertools
import math
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

import utils
from utils import BROKEN_FILE, UserError

FORMAT = 1
TO_SAMPLE = {"settings", "data", "step", "log", "average"}  # all there is in a run that was published
TO_GO_ON = {"network", "optimizer", "sums", "minutes"}  # what training needs besides


def paths_of(run_name: str) -> tuple[Path, Path]:
    """Where a run's newest checkpoint is, and the one before it."""
    return Path("models", run_name, "checkpoint.pt"), Path("models", run_name, "checkpoint.previous.pt")


def exists(run_name: str) -> bool:
    return any(path.exists() for path in paths_of(run_name))


def run_names() -> list[str]:
    """The runs there are to sample from."""
    paths = itertools.chain.from_iterable(Path("models").glob(f"*/{path.name}") for path in paths_of("any"))
    return sorted({path.parent.name for path in paths})


def fingerprint_of(weights: dict[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that are others as soon as one weight is."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there and its check sums are right: only then may it become the one before."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):  # a megabyte could become a thousand
                return False
            return archive.testzip() is None
    except BROKEN_FILE:
        return False


def save(run_name: str, **state) -> None:
    """Put a new checkpoint in the place of the newest, which becomes the one before.

    Raises:
        OSError: the disk is full or not writable; what was there is untouched.
    """
    path, previous = paths_of(run_name)

    def write(file) -> None:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:  # PyTorch's words for a full disk are "unexpected pos 704 vs 598"
            raise OSError(errno.ENOSPC, f"disk full? ({error})") from error

    utils.write_whole(path, write, keep=previous if is_whole(path) else None)


def read(path: Path, peek: bool = False) -> dict:
    """What `save` wrote, on the CPU; opening it cannot run code.

    With `peek`, the weights stay on the disk and are not verified: for a look at the other facts.

    Raises:
        UserError: naming the file, if it is missing, damaged, or written by a newer version of this program.
    """
    try:
        if path.is_file() and not peek and not is_whole(path):  # torch.load compares no check sums
            raise ValueError("a check sum is wrong, or it is compressed")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=peek)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        version = int(state["format"])
        if version > FORMAT:
            raise UserError(f"{path} has format {version}; this program knows {FORMAT}: get a newer one")
        is_weights_only = not TO_GO_ON & state.keys()
        if missing := (TO_SAMPLE if is_weights_only else TO_SAMPLE | TO_GO_ON) - state.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
        tensors = [*state["average"].values()]
        if not is_weights_only:
            tensors += [*state["network"].values(), state["sums"]]
            tensors += [value for facts in state["optimizer"]["state"].values() for value in facts.values()]
        if any(tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in tensors):
            raise ValueError("a tensor claims to be larger than the file")
    except BROKEN_FILE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read as a checkpoint ({reason[:100]})") from error
    return state


def load(run_name: str, peek: bool = False) -> dict:
    """The newest checkpoint of a run; where it is damaged, the one before it, and it says so.

    Raises:
        UserError: there is no such run (those there are get listed), or no readable checkpoint.
    """
    path, previous = paths_of(run_name)
    if not exists(run_name):
        others = ", ".join(run_names()) or "none yet"
        raise UserError(f"{run_name} is not a trained run; runs there are: {others}")
    try:
        return read(path, peek)
    except UserError as error:
        if not previous.exists():
            raise
        print(f"{error}; {previous.name}, the one before it, is used instead")
        return read(previous, peek)


def restore(stored: dict, network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have a training stand where it stood when `stored` was saved; the optimizer is AdamW and has not stepped yet."""
    network.load_state_dict(stored["network"])
    average.load_state_dict(stored["average"])
    options = optimizer.state_dict()["param_groups"]  # a stranger's could ask for moments that are not there
    optimizer.load_state_dict({"state": stored["optimizer"]["state"], "param_groups": options})
    for weight, moments in optimizer.state.items():  # AdamW trusts their layout blindly
        moments |= {kind: torch.empty_like(weight).copy_(moments[kind]) for kind in ("exp_avg", "exp_avg_sq")}


def fits(stored: dict, network: nn.Module, row_length: int, sums: int) -> bool:
    """Whether a checkpoint holds the weights of `network` (on "meta" it takes no memory), and what goes with them."""
    shapes = shapes_of(network.state_dict())
    expected, found = {"average": shapes}, {"average": shapes_of(stored["average"])}
    if "network" in stored:
        moments = [{"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape} for weight in network.parameters()]
        states = {index: shapes_of(state) for index, state in stored["optimizer"]["state"].items()}
        expected |= {"network": shapes, "optimizer": dict(enumerate(moments)), "sums": (sums,), "minutes": True}
        found |= {"network": shapes_of(stored["network"]), "optimizer": states, "sums": stored["sums"].shape}
        found |= {"minutes": 0 <= stored["minutes"] < math.inf}
    expected["types"] = True
    found["types"] = {weight.dtype for weight in stored["average"].values()} <= {torch.float16, torch.float32}
    has_step = isinstance(stored["step"], int) and stored["step"] > 0
    has_settings = all(isinstance(value, int | float | str | tuple) for value in stored["settings"].values())
    return expected == found and has_step and has_settings and all(len(row) == row_length for row in stored["log"])


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
