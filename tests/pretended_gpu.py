"""A GPU that is not there: CPU tensors that say they are on `cuda`, which may not be mixed.

    with pretended_gpu() as waits:
        ddpm.train(dataset="pictures", device="cuda")

What is marked is a tensor's storage, so that views and in-place operations keep it. Everything is
computed on the CPU, by the same numbers; autocast is that of the CPU. What would make a GPU wait is
counted, by the line that asks for it.

Not modelled: threads (modes are per thread), streams and graphs, nccl, memory and its layout,
CUDA's own list of what autocast keeps in float32.
"""

import collections
import contextlib
import traceback
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from machinery import devices

GPU = torch.device("cuda", 0)
# the first is .item() or `if tensor`
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
# their indices; these are copied, for which the GPU is waited for
SECOND_MAY_BE_ON_CPU = {"index", "index_put_", "_index_put_impl_"}


def storage(tensor: Tensor):
    return torch._C.TensorBase.untyped_storage(tensor)


def is_marked(tensor: Tensor) -> bool:
    return getattr(storage(tensor), "is_on_gpu", False)


def move(tensor: Tensor, to_gpu: bool) -> Tensor:
    moved = tensor.clone(memory_format=torch.preserve_format)
    storage(moved).is_on_gpu = to_gpu
    return moved


def tensors_in(*what) -> list[Tensor]:
    return [each for each in tree_leaves(what) if isinstance(each, Tensor)]


class Operations(TorchDispatchMode):
    """Sees every operation, those of backward and of the optimizer too: all here, or all there."""

    def __init__(self, waits: collections.Counter):
        super().__init__()
        self.waits = waits

    def note(self, what: str) -> None:
        """Count a wait, under the innermost line that is neither PyTorch's nor of this file."""
        for frame in reversed(traceback.extract_stack()):
            is_foreign = "site-packages" in frame.filename or "/lib/python" in frame.filename
            if frame.filename != __file__ and not is_foreign:
                name = frame.filename.rpartition("/")[2]
                self.waits[f"{what} at {name}:{frame.name}"] += 1
                return

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, given = func.overloadpacket.__name__, tensors_in(args, kwargs or {})
        marked = [is_marked(each) for each in given]
        if any(marked) and not all(marked) and name != "copy_":
            pairs = zip(given, marked, strict=True)
            strangers = [each for each, there in pairs if not there and each.dim() > 0]
            if strangers and not (name in SECOND_MAY_BE_ON_CPU and marked[0]):
                mixed = f"but {name} got cuda and cpu"
                raise RuntimeError(f"Expected all tensors to be on the same device, {mixed}")
            if strangers:
                self.note(f"{name} by a CPU tensor")
        by_mask = name == "index" and any(each.dtype == torch.bool for each in given[1:])
        if any(marked) and (name in WAITS or by_mask):
            self.note(name)
        answer = func(*args, **(kwargs or {}))
        if any(marked) and name != "copy_":
            for each in tensors_in(answer):
                if not each.is_meta:
                    storage(each).is_on_gpu = True
        return answer


class Words(TorchFunctionMode):
    """All that names a device in Python: `.device`, `.to(...)`, `.cpu()`, `zeros(device=...)`."""

    def __init__(self, operations: Operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return GPU if is_marked(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return is_marked(args[0])
        if name == "cpu":
            return self.carry(args[0], torch.device("cpu"), False)
        if name == "to":
            return self.to(func, args, kwargs)
        if name == "tolist" and is_marked(args[0]):
            self.operations.note(name)
        if name in ("numpy", "__array__") and is_marked(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            made = func(*args, **kwargs | {"device": "cpu"})
            storage(made).is_on_gpu = True
            return made
        return func(*args, **kwargs)

    def to(self, func, args: tuple, kwargs: dict) -> Tensor:
        copies = kwargs.pop("copy", False)
        if len(args) > 1 and isinstance(args[1], Tensor):
            device, dtype, non_blocking, layout = args[1].device, args[1].dtype, False, None
        else:
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args[1:], **kwargs)
        if device is not None and device.type == "meta":
            return func(*args, **kwargs)
        dtype = args[0].dtype if dtype is None else dtype
        cast = func(args[0], dtype, memory_format=layout or torch.preserve_format)
        return self.carry(cast.clone() if copies else cast, device, non_blocking)

    def carry(self, tensor: Tensor, device: torch.device | None, non_blocking: bool) -> Tensor:
        to_gpu = is_marked(tensor) if device is None else device.type == "cuda"
        if to_gpu == is_marked(tensor):
            return tensor
        if not non_blocking:
            self.operations.note("a copy to the " + ("GPU" if to_gpu else "CPU"))
        return move(tensor, to_gpu)


class CpuAutocast(torch.autocast):
    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@contextlib.contextmanager
def gpu_facts(capability: tuple[int, int] = (7, 5), name: str = "a pretended GPU") -> Iterator[int]:
    """Within this block PyTorch says there is such a GPU; nothing can be computed on it."""
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None}
    answers |= {"get_device_capability": capability, "get_device_name": name}
    answers |= {"mem_get_info": (2**35, 2**35), "manual_seed_all": None, "empty_cache": None}
    answers |= {"memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None}
    answers |= {"get_arch_list": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]}
    remembered = (devices.has_bfloat16, devices.has_tensor_cores)
    with contextlib.ExitStack() as stack:
        for function, answer in answers.items():
            stand_in = mock.Mock(return_value=answer)
            stack.enter_context(mock.patch.object(torch.cuda, function, stand_in))
        for function in ("synchronize", "empty_cache"):
            stack.enter_context(mock.patch.object(torch.accelerator, function, mock.Mock()))
        for cached in remembered:
            if hasattr(cached, "cache_clear"):  # a test may have put something in its place
                cached.cache_clear()
                stack.callback(cached.cache_clear)
        yield


@contextlib.contextmanager
def pretended_gpu(capability: tuple[int, int] = (7, 5)) -> Iterator[collections.Counter]:
    """Within this block there is one; counted are the places that would make it wait."""
    operations = Operations(collections.Counter())
    clipping = torch.nn.utils.clip_grad
    group = clipping._group_tensors_by_device_and_dtype

    def grouped(lists, *rest) -> dict:  # asks C++ for the device
        parts = group(lists, *rest).items()
        return {(each[0][0][0].device, dtype): each for (_, dtype), each in parts}

    with gpu_facts(capability), contextlib.ExitStack() as stack:
        grouping = "_group_tensors_by_device_and_dtype"
        stack.enter_context(mock.patch.object(clipping, grouping, grouped))
        stack.enter_context(mock.patch.object(torch, "autocast", CpuAutocast))
        stack.enter_context(operations)
        stack.enter_context(Words(operations))
        yield operations.waits
