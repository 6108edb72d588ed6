"""A GPU that holds nothing: tensors of full size without numbers, whose bytes are counted.

A tensor here says that it is on cuda:0. Below it lies one on torch's meta device, which has a
shape, a type and a storage, but no memory. Each operation makes its results there, and whatever
autograd or a library keeps of them counts until the last view of it is gone: so peaks come out as a
GPU's allocator would see them. What it does not see: the kernels' own workspaces, and fragments.
"""

import gc
import weakref
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, META = torch.device("cuda:0"), torch.device("meta")


class OnGpu(torch.Tensor):
    """Says cuda:0 to Python; to torch's engine it is a meta tensor, or it would look for a GPU."""

    @staticmethod
    def __new__(cls, below):
        own = torch.Tensor._make_subclass(cls, below, device_for_backend_keys=CUDA)
        own.below = below
        return own

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda = property(lambda self: CUDA), property(lambda self: True)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise AssertionError(f"{op} outside of fake_gpu()")


TENSORS = {OnGpu, torch.Tensor, torch.nn.Parameter}    # isinstance asks torch, which takes long


def each(f, value):
    """f of every tensor in arguments or results of an operation"""
    if type(value) in TENSORS:
        return f(value)
    if isinstance(value, (list, tuple)):
        return type(value)([each(f, v) for v in value])
    return value


def shape_of(value):
    """What the results of an operation depend on, of one of its arguments or results"""
    if type(value) in TENSORS:
        return value.shape, value.stride(), value.dtype
    return tuple(map(shape_of, value)) if isinstance(value, (list, tuple)) else value


@cache
def makes_new(op):
    """Has every result a memory of its own, and is no argument changed?"""
    own = [*op._schema.arguments, *op._schema.returns]
    return not any(a.alias_info for a in own) and all(
        str(a.type) == "Tensor" for a in op._schema.returns)


RESULTS = {}          # shapes of an operation's results, by those of its arguments


class Memory(TorchDispatchMode):
    """Every operation while it is entered, whose results lie on the GPU. held, peak: bytes."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.known = 0, 0, {}

    @classmethod
    def _should_skip_dynamo(cls):         # nothing is compiled here, and asking takes time
        return False

    def put(self, below):
        """A meta tensor -> the GPU's; its storage counts as long as anybody has it."""
        storage = below.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = -(-storage.nbytes() // 512) * 512    # as CUDA's allocator
            self.held += self.known[storage._cdata]
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self.free, storage._cdata)
        return OnGpu(below)

    def free(self, storage):
        self.held -= self.known.pop(storage)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, ours = kwargs or {}, {}

        def lower(tensor):
            if type(tensor) is OnGpu:
                ours[id(tensor.below)] = tensor
                return tensor.below
            return tensor.to(META) if tensor.ndim else tensor
        below = each(lower, args)
        named = {k: each(lower, v) for k, v in kwargs.items()}
        where = torch.device(kwargs.get("device") or "cpu").type
        if where == "cpu" and not ours:
            return op(*args, **kwargs)
        if op is torch.ops.aten._local_scalar_dense.default:     # what the host reads: ones
            return torch.ones((), dtype=args[0].dtype).item()
        if where == "cpu" and "device" in kwargs:
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if where == "cuda":
            named["device"] = META
        if makes_new(op):
            return each(self.put, self.once(op, below, named))
        # What is changed in place stays itself.
        return each(lambda t: ours.get(id(t)) if id(t) in ours else self.put(t),
                    op(*below, **named))

    def once(self, op, args, named):
        """An operation on meta tensors, whose rules in Python take long: once for each shape."""
        key = op, shape_of(args), *map(shape_of, named.values()), *named
        if key not in RESULTS:
            out = op(*args, **named)
            RESULTS[key] = shape_of(out), isinstance(out, tuple)
            return out
        made, several = RESULTS[key]
        made = [one and torch.empty_strided(*one[:2], dtype=one[2], device=META)
                for one in (made if several else [made])]
        return tuple(made) if several else made[0]


# What torch.autocast("cuda") computes in bf16, what in the widest type among its inputs and what by
# `dtype`; all else that it knows it computes in fp32.
IN_BF16 = set("""_convolution addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d convolution einsum linalg_multi_dot linear
    matmul mm mv prelu scaled_dot_product_attention""".split())
WIDEST = set("""addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add
    tensordot vdot""".split())
BY_DTYPE = set("cumprod cumsum log_softmax prod softmax sum".split())


class Autocast:
    """CUDA's, which asks the engine whether a tensor is on a GPU: the same rules for ours."""

    def __init__(self):
        self.cache = {}                   # weights that learn, cast once until autocast is left
        self.rules = torch.library.Library("aten", "IMPL")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"):
            name, _, overload = name.removeprefix("aten::").partition(".")
            if hasattr(torch.ops.aten, name) and name not in WIDEST:
                op = getattr(getattr(torch.ops.aten, name), overload or "default")
                self.rules.impl(op, self.rule(op, name), "AutocastCUDA", allow_override=True)
        self.rules.impl("dropout", lambda x, p, train: (      # as on a GPU, one byte of mask each
            torch.native_dropout(x, p, True)[0] if train and p else x), "AutocastCUDA")

    def cast(self, tensor, dtype):
        if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        if dtype == torch.float32 or not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(dtype)
        if id(tensor) not in self.cache:
            self.cache[id(tensor)] = tensor.to(dtype)
        return self.cache[id(tensor)]

    def rule(self, op, name):
        dtype = torch.bfloat16 if name in IN_BF16 else torch.float32
        call = attention if name == "scaled_dot_product_attention" else op
        here = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

        def run(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(here):
                if name in BY_DTYPE:
                    given = any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values()))
                    return call(*args, **(kwargs if given else kwargs | dict(dtype=dtype)))
                return call(*each(lambda t: self.cast(t, dtype), args),
                            **{k: each(lambda t: self.cast(t, dtype), v)
                               for k, v in kwargs.items()})
        return run


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
              enable_gqa=False):
    """As on a GPU: the flash kernel or, where there is a mask, the memory-efficient one."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    learns = torch.is_grad_enabled() and any(a.requires_grad for a in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def fake_gpu():
    """Inside, torch has a GPU. -> Memory"""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.cuda, "_lazy_init", lambda: None)
        m.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        m.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        torch._C._set_only_lift_cpu_tensors(True)     # torch.tensor(..., device): CPU first
        autocast, left = Autocast(), torch.clear_autocast_cache
        m.setattr(torch, "clear_autocast_cache", lambda: (left(), autocast.cache.clear()))
        try:
            gc.freeze()               # what was made before is not gone through again and again
            with Memory() as memory:
                memory.autocast = autocast
                yield memory
        finally:
            gc.unfreeze()
            autocast.rules._destroy()
            torch._C._set_only_lift_cpu_tensors(False)


def place(memory, module):
    """A module on the meta device -> on the GPU, its weights and buffers counted."""
    own = {}

    def moved(tensor):
        if id(tensor) not in own:
            own[id(tensor)] = memory.put(tensor.detach())
        return own[id(tensor)]
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = torch.nn.Parameter(moved(p), requires_grad=p.requires_grad)
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = moved(b)
    return module
