"""Several processes at one command: all that touches torch.distributed.

    torchrun --nproc_per_node=2 ddpm.py train --dataset=datasets/landscapes --run_name=my_run

Every process runs the whole command. What is random in a step is drawn for the whole batch everywhere, and each process
works on its share of it. The gradients are added up by one all-reduce once a step's backward passes are through, not
by DistributedDataParallel during each of them: a process that runs out of memory can repeat its share in smaller
pieces without the others noticing.

A process that fails just ends. That closes its connections, by which the others learn of it (`Abandoned`); nobody has
to send word. CPU tensors go by gloo, CUDA tensors by nccl. Without torchrun, each function here is the trivial one.

Reading order: who is here, joining and leaving, numbers, objects, waiting, parts of a share.
"""

import contextlib
import datetime
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

import devices
from utils import UserError

PATIENCE = datetime.timedelta(hours=24)  # one process decodes a large data set while the others wait


class Abandoned(Exception):
    """Another process of this command has ended: nothing can be done together any more."""


# ---- who is here -----------------------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process, from 0; known from torchrun before `join`."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes run this command."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this is the first process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def share(total: int) -> range:
    """Which of `total` items this process takes: neighbours, in order of rank; the first has one if anybody has."""
    start, stop = (-(-number * total // count()) for number in (rank(), rank() + 1))  # rounded up
    return range(start, stop)


# ---- joining and leaving ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def noticing_an_end() -> Iterator[None]:
    """Within this block, `Abandoned` takes the place of what PyTorch raises where another process has ended.

    For gloo that is a mere RuntimeError which names a source file of its connections; a check that failed there
    ("enforce fail") is our own mistake, as is any other RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        text, is_store = str(error), isinstance(error, dist.DistNetworkError | dist.DistStoreError)
        if "enforce fail" in text or not (is_store or re.search(r"gloo[/\\]transport|ncclRemoteError", text)):
            raise
        raise Abandoned("another process of this command has ended; its message says why") from error


def join(device: torch.device) -> torch.device:
    """Meet the other processes, once; the device that this one computes on: with "cuda", each has a GPU of its own.

    Raises:
        UserError: there are fewer GPUs than processes, or the device is one that they would have to share.
    """
    if count() == 1:
        return device
    if "LOCAL_RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set in the environment, but not by torchrun; unset it, or use torchrun")
    local_rank, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if not dist.is_initialized():
        gpus = torch.cuda.device_count()
        if device.type not in ("cpu", "cuda") or device.index is not None:
            rule = "--device=cuda gives each a GPU of its own, --device=cpu works everywhere"
            raise UserError(f"--device={device} cannot be shared by the {count()} processes of torchrun; {rule}")
        if device.type == "cuda" and here > gpus:
            ways_on = f"--nproc_per_node={gpus} has torchrun start as many, --device=cpu works everywhere"
            raise UserError(f"--device=cuda: {here} processes, but {gpus} GPUs on this machine; {ways_on}")
        if device.type == "cuda":
            torch.cuda.set_device(local_rank)
        backend, attempt = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", "TORCHELASTIC_RESTART_COUNT"
        with noticing_an_end():
            store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
            store = dist.PrefixStore(os.environ.get(attempt, "0"), store)  # it still has the addresses of the dead
            dist.init_process_group(backend, store=store, rank=rank(), world_size=count(), timeout=PATIENCE)
            if device.type == "cuda":
                dist.all_reduce(torch.zeros(1, device="cuda"))  # nccl takes its memory before PyTorch has taken all
    return torch.device("cuda", local_rank) if device.type == "cuda" else device


def leave() -> None:
    """Part from the other processes; to be called in a `finally` around the whole command.

    Of several, each ends here at once, with its error's traceback and status: a GPU may be in an addition that will
    never have all its terms, for which nccl would wait, and gloo's threads may abort when Python takes them down. What
    was asked for and is not possible, all processes find alike, and one says it: torchrun ends all as soon as one has
    failed, so the others wait for it.
    """
    if count() == 1:
        return
    error = sys.exc_info()[1]
    status = (error.code or 0) if isinstance(error, SystemExit) else int(error is not None)
    if error and not isinstance(error, SystemExit):
        sys.excepthook(*sys.exc_info())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if not is_first_here() and (status == 2 or (error and not dist.is_initialized())):
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(10)
    os._exit(status)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def add_up(tensors: list[Tensor]) -> None:
    """Replace each tensor, of any shape, by its sum over all processes, the same to the bit on all of them."""
    for dtype in {tensor.dtype: None for tensor in tensors} if count() > 1 else ():
        of_this_type = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in of_this_type])  # one message instead of hundreds
        with noticing_an_end():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in of_this_type])
        for tensor, part in zip(of_this_type, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def largest(*numbers: float) -> tuple[float, ...]:
    """The largest value of each number among all processes; it goes from CPU to CPU and waits for no GPU."""
    if count() == 1:
        return numbers
    values = torch.tensor(numbers, dtype=torch.float64)
    with noticing_an_end():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return tuple(values.tolist())


# ---- objects ---------------------------------------------------------------------------------------------------------


def gather(what) -> list:
    """What each process has, by rank; anything that can be pickled, tensors on the CPU."""
    everything = [what] * count()
    if count() > 1:
        with noticing_an_end():
            dist.all_gather_object(everything, what)
    return everything


def from_first(what):
    """What the first process has; anything that can be pickled, tensors on the CPU."""
    box = [what]
    if count() > 1:
        with noticing_an_end():
            dist.broadcast_object_list(box, src=0)
    return box[0]


# ---- waiting ---------------------------------------------------------------------------------------------------------


def wait() -> None:
    """Go on when all processes have come here."""
    largest(0.0)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs this block before the others do; if it fails in it, the others are `Abandoned`."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


# ---- parts of a share ------------------------------------------------------------------------------------------------


class MicroBatches:
    """How a share of a batch goes through the network: at once, or in parts as large as fit into memory.

    Args:
        share: places in the batch that are this process's.
        size: images at a time; "auto": all, and half of that whenever memory runs out.
    """

    def __init__(self, share: range, size: int | str):
        self.share, self.is_fixed = share, size != "auto"
        self.size = min(size, len(share)) if self.is_fixed else len(share)

    def go_through(self, work: Callable[[slice], None], undo: Callable[[], None]) -> None:
        """Call `work` for one part after another; if that runs out of memory, `undo`, and begin with smaller ones."""
        while True:
            try:
                for start in self.share[:: self.size]:
                    work(slice(start, min(start + self.size, self.share.stop)))
                return
            except (RuntimeError, MemoryError) as error:
                if not devices.is_out_of_memory(error) or self.is_fixed or self.size == 1:
                    raise
            undo()
            torch.cuda.empty_cache()
            self.size = math.ceil(self.size / 2)
            print(f"out of memory: --micro_batch={self.size} from now on, which learns the same", flush=True)
