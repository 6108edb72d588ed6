"""--shard: what learns lies in parts on all ranks, by torch's FSDP2: weights, gradients, average,
AdamW's state."""

import os
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common.stop import fail


def share_out(model, device):
    """DiT and bridge, where they learn: a block's weights are whole only while it computes, so that
    all ranks run it equally often. The VLM with its LoRA and the queries, which are used outside of
    their module, stay whole. Of several nodes each has all parts (HSDP). -> model"""
    if not dist.is_initialized():
        fail("--shard shares out over ranks: start the script by torchrun")
    world, near = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shape = (world // near, near) if 1 < near < world else (world,)
    mesh = init_device_mesh(device.type, shape)
    for part in (model.dit, model.bridge):
        blocks = (part.transformer_blocks if part is model.dit else
                  part.connector["layers"] if hasattr(part, "connector") else ())
        queries = {p for name, p in part.named_parameters() if name.endswith("_queries")}
        if any(p.requires_grad for p in part.parameters()):
            for module in [*blocks, part]:
                fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=queries)
                module.set_force_sum_reduction_for_comms(True)   # as sum_grads does, no mean
                module.set_gradient_divide_factor(1.0)
    return model


def is_sharded(model):
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(value):
    """A sharded tensor, all of it, on the CPU; what is none as it is; so within dicts and lists.
    Every rank calls it."""
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(whole, value)]
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def local(tensor):
    """This rank's part of a tensor, or all of one that is not sharded"""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor, other):
    """A whole tensor, shared out as another one is"""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements,
                             src_data_rank=None)


@contextmanager
def gathered(model):
    """For a while each rank has all weights, so that one may compute without the others. Every rank
    enters; what learns must not change inside."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
