"""A GPU for machines that have none: inside `pretended()` tensors say cuda:0 and lie on the CPU.

What a GPU would refuse is refused, mixed devices above all; where the host would wait for the GPU,
the place in our code is noted. Not pretended: kernels, memory, speed, streams, several ranks.

How: an OnGpu is a tensor of the CPU to C++ and so to autograd, whose engine wants a driver for any
other, and to autocast, whose CPU has fewer operations in fp32; to Python it is one of cuda:0. Each
operation that is given one, or asked for one, goes through `compute`.
"""

import sys
import threading
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import common.layers as layers_py

OURS = f"{Path(__file__).parent.parent}/"
GPU = torch.device("cuda", 0)
HOME = torch.device("cpu", 0)            # the CPU, where our code and not C++ asks for it

# kind: what the host waits for; place: "common/run.py:189 clip_grads", the innermost of ours; at:
# the line of the script's main, which tells the step of its loop
Sync = namedtuple("Sync", "kind place at")
syncs = []

# Operations whose result the host must see before it can go on.
READ = {"_local_scalar_dense": "item", "equal": "equal", "nonzero": "nonzero", "_unique2": "unique",
        "unique_dim": "unique", "unique_consecutive": "unique", "masked_select": "mask",
        "masked_scatter_backward": "mask"}
COPY, INDEX = ("_to_copy", "copy_"), ("index", "index_put_", "index_put", "_unsafe_index")


class OnGpu(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = GPU, True, False

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        return compute(f, args, kwargs or {})

    # C++ would do these as for a tensor of the CPU.

    def to(self, *args, copy=False, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, wait_not, form = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            form = form or torch.preserve_format
            return super().to(dtype or self.dtype, copy=copy, memory_format=form)
        return torch.ops.aten._to_copy(self, dtype=dtype, device=HOME, non_blocking=wait_not,
                                       memory_format=form)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.cpu() if self.ndim else self.item(), spec)

    def type_as(self, other):
        return self.to(other)

    def get_device(self):
        return GPU.index

    def quantile(self, q):
        return on_gpu(bare(self.detach()).quantile(q))

    def numpy(self, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = on_gpu(bare(self).clone()).requires_grad_(self.requires_grad)
            memo[id(self)].__dict__.update(self.__dict__)        # is it a parameter?
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self.detach().cpu().__reduce_ex__(protocol)


class Everywhere(TorchDispatchMode):
    """What is asked for on cuda:0 becomes an OnGpu."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        return compute(f, args, kwargs or {})


def on_gpu(x):
    return torch.Tensor._make_subclass(OnGpu, x)


def bare(x):
    """-> the tensor of the CPU that an OnGpu is, in the same memory"""
    with torch._C._DisableTorchDispatch():
        return torch.empty(0, dtype=x.dtype).set_(
            x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def over(f, x):
    """f of each tensor in what an operation is given or returns"""
    if isinstance(x, torch.Tensor):
        return f(x)
    return type(x)([over(f, a) for a in x]) if isinstance(x, (list, tuple)) else x


def compute(f, args, kwargs):
    """Any operation of torch: on the CPU, once it is clear that a GPU could do it."""
    given = []
    over(given.append, [*args, *kwargs.values()])
    ours, asked = [x for x in given if isinstance(x, OnGpu)], kwargs.get("device")
    if not ours and (asked is None or asked.type != "cuda"):
        return f(*args, **kwargs)
    if torch.Tag.inplace_view in f.tags:
        raise NotImplementedError(f"{f}: tests/pretend.py would lose the new shape")
    name = f.overloadpacket.__name__
    check(f, name, args, kwargs, ours, [x for x in given if not isinstance(x, OnGpu)])
    if kind := what_waits(name, args, kwargs):
        syncs.append(where(kind))
    its = {id(x): bare(x) for x in ours}
    was = {id(its[id(x)]): x for x in ours}
    leaves = asked == HOME or name == "copy_" and not isinstance(args[0], OnGpu)

    def unwrap(x):
        return its.get(id(x), x)

    def wrap(x):                         # an operation in place returns what it was given
        if leaves or x.device.type != "cpu":
            return x
        return was[id(x)] if id(x) in was else on_gpu(x)
    kwargs = {k: over(unwrap, v) for k, v in kwargs.items()}
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    return over(wrap, f(*over(unwrap, args), **kwargs))


def check(f, name, args, kwargs, ours, others):
    """RuntimeError where a GPU would raise one: it wants all tensors, but some numbers, itself."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if not ours or name in COPY:
        return
    if name in INDEX and isinstance(args[0], OnGpu):             # rows may be named by the CPU
        others = [x for x in args[2:] if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu)]
    numbers = torch.Tag.pointwise in f.tags or name in INDEX or "fill" in name
    if any(x.ndim or not numbers for x in others):
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                           f"devices, cuda:0 and {others[0].device}! ({f})")


def what_waits(name, args, kwargs):
    """-> what the host waits for, or None. A copy without non_blocking waits until the GPU has done
    all that it had to do before."""
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "repeat"
    if name in INDEX:
        index = [x for x in args[1] if x is not None]
        if not all(isinstance(x, OnGpu) for x in index):
            return "H2D"
        number = name == "index_put_" and not isinstance(args[2], OnGpu)     # x[mask] = 0 is a fill
        masks = any(x.dtype in (torch.bool, torch.uint8) for x in index)
        return "mask" if masks and not number else None
    if name in COPY:
        to, source = args[:2] if name == "copy_" else (None, args[0])
        comes = isinstance(to, OnGpu) if name == "copy_" else kwargs.get("device") != HOME
        waits = not kwargs.get("non_blocking") and args[2:] != (True,)
        return ("H2D" if comes else "D2H") if waits and comes != isinstance(source, OnGpu) else None
    return READ.get(name)


def where(kind):
    """-> Sync, by the stack of calls"""
    frame, place, at = sys._getframe(1), "", 0
    while frame:
        code = frame.f_code
        ours = code.co_filename.startswith(OURS) and "site-packages" not in code.co_filename
        if ours and code.co_filename != __file__ and code.co_name[0] != "<":     # a comprehension's
            place = place or (f"{code.co_filename.removeprefix(OURS)}:{frame.f_lineno} "
                              f"{code.co_name}")
            at = frame.f_lineno if code.co_name == "main" else at
        frame = frame.f_back
    return Sync(kind, place, at)


def forget():
    """Rewards keep models, on the device that there was when they were first asked for."""
    for name, module in [*sys.modules.items()]:
        for value in vars(module).values() if name.startswith("rewards.") else ():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@contextmanager
def pretended():
    """Inside there is one GPU. -> a list of Syncs, which grows"""
    autocast, enabled, run = torch.autocast, torch.is_autocast_enabled, threading.Thread.run
    make, bare = torch.tensor, torch.empty
    group = torch._C._group_tensors_by_device_and_dtype

    class Autocast(autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__(device_type.replace("cuda", "cpu"), *args, **kwargs)

    # What C++ does in one piece, where it would ask the CPU for what it needs.

    def tensor(data, device=None, **kwargs):
        over(lambda x: isinstance(x, OnGpu) and syncs.append(where("item")), data)
        made = make(data, **kwargs)
        return made if device is None else made.to(device)

    def empty(*size, pin_memory=False, **kwargs):            # there is no driver to pin by
        return bare(*size, **kwargs)

    def pad_sequence(rows, batch_first=False, value=0.0, side="right"):
        most = max(map(len, rows))
        padded = torch.stack([F.pad(a, (0, 0) * (a.ndim - 1) + (0, most - len(a)), value=value)
                              for a in rows])
        return padded if batch_first else padded.transpose(0, 1)

    def varlen(q, k, v, cuts, cuts_k, most, most_k):         # the kernel of CUDA alone: (n,heads,d)
        of = torch.bucketize(torch.arange(len(q), device=q.device), cuts, right=True)
        y = F.scaled_dot_product_attention(*(a.transpose(0, 1) for a in (q, k, v)),
                                           attn_mask=of[:, None] == of)
        return y.transpose(0, 1)

    def by_device(tensors, with_indices=False):              # of optimisers and norms
        return {(lists[0][0].device, kind): (lists, at) for (_, kind), (lists, at) in group(
            tensors, with_indices).items()}

    def run_too(thread):                 # a mode is one thread's
        with Everywhere():
            run(thread)
    properties = SimpleNamespace(name="pretended", total_memory=80 * 2**30, major=9, minor=0)
    stream = SimpleNamespace(is_capturing=lambda: False)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as m:
        for name, value in dict(
                is_available=True, device_count=1, current_device=0, set_device=None,
                is_bf16_supported=True, get_device_properties=properties, _lazy_init=None,
                get_device_capability=(9, 0), synchronize=None,
                is_current_stream_capturing=False).items():
            m.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
        for module, name, value in (
                (torch, "autocast", Autocast), (torch.amp, "autocast", Autocast),
                (torch, "is_autocast_enabled", lambda kind="cuda": enabled("cpu")),
                (torch, "get_autocast_dtype", lambda kind="cuda": torch.bfloat16),
                (torch, "tensor", tensor), (torch._C._nn, "pad_sequence", pad_sequence),
                (torch._C, "_group_tensors_by_device_and_dtype", by_device),
                (layers_py, "varlen_attn", varlen),
                (torch, "set_float32_matmul_precision", lambda how: None),
                (torch.accelerator, "current_stream", lambda: stream),
                (torch, "empty", empty), (threading.Thread, "run", run_too)):
            m.setattr(module, name, value)
        m.setenv("PYTORCH_ALLOC_CONF", "")               # what setup sets stays not behind
        torch.__future__.set_swap_module_params_on_conversion(True)     # ties stay ties
        forget()
        syncs.clear()
        try:
            with Everywhere():
                yield syncs
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)
            forget()
