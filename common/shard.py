"""--shard: what learns lies in parts on all ranks, by torch's FSDP2: weights, gradients, average,
AdamW's state.

Stages 1 and 2 gather a block while it computes, and so all ranks run it equally often. In RL they
do not: one rank's groups all agree, another's model redraws more. There all weights are gathered
before an iteration (`gather`), ranks compute alone, and their gradients are added up once
(`add_up`): it is weights and gradients that are whole then, AdamW's state and average that are
not."""

import os
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common.layers import blocks_of
from common.stop import fail, this_rank


def share_out(model, device):
    """DiT and bridge, where they learn. The VLM with its LoRA and the queries, which are used
    outside of their module, stay whole. Of several nodes each has all parts (HSDP). -> model"""
    if not dist.is_initialized():
        fail("--shard shares out over ranks: start the script by torchrun")
    # A Linear's output is a view; the warning is of writing into it, which nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    world, near = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 1 < near < world:
        mesh = init_device_mesh(device.type, (world // near, near), mesh_dim_names=("node", "rank"))
    else:
        mesh = init_device_mesh(device.type, (world,))
    for part in (model.dit, model.bridge):
        blocks = (blocks_of(part) if part is model.dit else
                  part.connector["layers"] if hasattr(part, "connector") else ())
        queries = {p for name, p in part.named_parameters() if name.endswith("_queries")}
        if any(p.requires_grad for p in part.parameters()):
            for module in dict.fromkeys([*blocks, part]):
                fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=queries)
                module.set_force_sum_reduction_for_comms(True)   # as sum_grads does, no mean
                module.set_gradient_divide_factor(1.0)
                # A rank's rows may have no reference, and so none of SANA's weights for them.
                module.set_reduce_scatter_unused_params(True)
    if not is_sharded(model):
        fail("--shard: what learns here is the VLM's, and that stays whole on each rank")
    return model


def parts_of(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model):
    return bool(parts_of(model))


def by_kind(params):
    """Whole and sharded parameters apart, since no kernel takes both. -> lists, none empty"""
    kinds = [[p for p in params if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    return [some for some in kinds if some]


def whole(value):
    """A copy of a tensor on rank 0's CPU, of a sharded one all of it, and None on other ranks,
    whose host has no room for as many copies; of dicts and lists of tensors; what is none as it is.
    Every rank calls it."""
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(whole, value)]
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        return None if this_rank() else value.to("cpu", copy=True)
    return value


def local(tensor):
    """This rank's part of a tensor, or all of one that is not sharded"""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor, other):
    """A whole tensor, shared out as another one is"""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements,
                             src_data_rank=None)


def gather(model):
    """Each rank has all weights until they are shared out again, and may compute without the
    others; what its backward passes leave waits for add_up. Every rank calls it."""
    for part in parts_of(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.set_requires_gradient_sync(False, recurse=False)
        part.unshard()


def share_again(model):
    """The other way round: what was gathered lies in parts."""
    for part in parts_of(model):
        part.set_reshard_after_forward(True, recurse=False)
        part.set_reshard_after_backward(True, recurse=False)
        part.set_requires_gradient_sync(True, recurse=False)
        part.reshard()


@contextmanager
def gathered(model):
    """For a while each rank has all weights, as they are now. What learns must not change inside;
    afterwards it lies in parts."""
    share_again(model)
    gather(model)
    try:
        yield
    finally:
        share_again(model)


def add_up(model):
    """Gradients that the ranks have gathered, each by as many backward passes as it had, are added
    up, and weights lie in parts again. FSDP adds at the end of a backward pass: of one row that all
    have, and that counts nothing. Every rank calls it."""
    if not is_sharded(model):
        return
    for part in parts_of(model):
        part.set_requires_gradient_sync(True, recurse=False)
    row = model.noise([0])
    v = model.velocity(row, 0.5, [(0.0, model.encode([None]))])
    v.sum().backward()
    share_again(model)
