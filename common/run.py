"""A run: ranks, seeds, gradients, files. Nothing here learns."""

import atexit
import math
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import disk_usage
from zlib import crc32

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from common.shard import by_kind, local
from common.stop import at_once, codes, fail, heed, quietly, this_rank

ROOT = Path(__file__).parent.parent       # of the repository, beside whose scripts data/ lies


def beside(path):
    """A path as given or, where that is the classroom's and not here, the one beside the scripts:
    they run in any working directory. -> Path"""
    path = Path(path)
    ours = path.parts[:2] == ("data", "shapes") and not os.path.exists(path)
    return ROOT / path if ours else path


@cache
def load_file(path):
    """A Python file -> its module, read once."""
    name = f"{Path(path).stem}_{crc32(path.encode()):08x}"           # no other module's
    spec = spec_from_file_location(name, path)
    module = sys.modules[name] = module_from_spec(spec)      # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def from_file(name):
    """ "file.py:name" -> what bears that name in a user's file; ValueError: there is none."""
    file, _, what = name.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"{name}: there is no file {file}")
    try:
        module = load_file(str(Path(file).resolve()))
    except Exception as e:                           # whatever a user's file may do wrong
        raise ValueError(f"{name}: {file} cannot be loaded, {type(e).__name__}: {e}")
    if not callable(getattr(module, what, None)):
        raise ValueError(f"{name}: {file} has no {what!r} that could be called")
    return getattr(module, what)


def first_line(error):
    """-> what an exception of a library says, of which the rest is advice, or its kind where it
    says nothing"""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error):
    """-> all that an exception of ours says, up to 400 letters, or its kind"""
    return " ".join(str(error).split())[:400] or type(error).__name__


def has_bf16():
    """bf16 where the hardware computes in it; elsewhere it would be emulated, slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return able.get("avx512_bf16", False) or able.get("amx_bf16", False)


def local_device():
    """-> this rank's GPU, by number: plain "cuda" is the first one in a new thread. Or the CPU"""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def leave():
    """At the end of a process among several: its group is destroyed, or the group's threads may
    outlive Python and abort. But one that ends before its time just goes: the others stand in a
    collective without it, for which NCCL would wait, and torchrun would not see that it is gone."""
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[-1])
    dist.destroy_process_group()


def use_gpu():
    """Makes plain "cuda" this rank's GPU: in a new thread it is the first one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())


def setup():
    """-> rank, world, device. Under torchrun: one process per GPU, or gloo on the CPU."""
    heed(at_once)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), this_rank()
    device = local_device()
    cuda = device.type == "cuda"
    if cuda:
        # Memory that grows in place is not cut up by batches of many sizes; read at CUDA's start.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")    # TF32, where bf16 is not: rewards, for one
    elif "OMP_NUM_THREADS" not in os.environ or world > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // world))  # torchrun would give each only one
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=timedelta(hours=1))      # ranks wait while one saves
        sys.excepthook = quietly
        atexit.register(leave)
    return rank, world, device


def all_mean(values):
    """Mean over ranks of a list of numbers; every rank calls it. Those that are still on a GPU come
    over together: the host waits once."""
    far = {i: v.double() for i, v in enumerate(values) if torch.is_tensor(v) and v.is_cuda}
    read = dict(zip(far, torch.stack([*far.values()]).tolist())) if far else {}
    v = torch.tensor([read.get(i, v) for i, v in enumerate(values)], dtype=torch.float64)
    if dist.is_initialized():
        v = v.to(local_device())
        dist.all_reduce(v)
        v /= dist.get_world_size()
    return v.tolist()


def all_gather(value):
    """A value of each rank, of anything -> a list of them; every rank calls it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def same_start(model):
    """Every rank goes on from rank 0's weights, bit for bit; then see check_ranks."""
    if dist.is_initialized():
        for p in model.parameters():
            if p.requires_grad:
                dist.broadcast(p.detach(), 0)
    check_ranks(dict(model.named_parameters()), "before the first update")
    return model


def check_ranks(weights, when):
    """Ends the run, on every rank and in one line, if weights {name: tensor} are not finite or
    differ by a bit between ranks, which from then on would train different models. Of what is
    sharded each rank has another part."""
    bits = {2: torch.int16, 4: torch.int32}                      # by the bytes of a number
    mine = {name: local(p.detach()) for name, p in weights.items()}
    sums = torch.stack([p.flatten().view(bits[p.element_size()]).sum(dtype=torch.int64) * (
        not isinstance(weights[name], DTensor)) for name, p in mine.items()])
    broken = torch.stack([~p.isfinite().all() for p in mine.values()]).long()
    most = torch.stack([sums, -sums, broken])
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)                 # largest, and minus the smallest
    for wrong, what in ((most[2] > 0, "weights are not finite"),
                        (most[0] != -most[1], "the ranks hold different weights")):
        if wrong.any():
            name = [*weights][wrong.tolist().index(True)]
            fail(f"{what} {when}, first {name}: nothing was saved, an older checkpoint stays")


def sum_grads(params, watched=()):
    """Add gradients over ranks, once per update; those of --shard are added already. No wrapper
    around the model: RL samples it bare and calls backward many times; the price is no overlap of
    computing and sending. watched: losses or ratios. One that is not finite, on one rank, makes the
    gradient nan on all, so that all leave this update out: see Finite."""
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    wrong = torch.zeros((), device=params[0].device)
    for x in watched:
        wrong += 0 * x.detach().sum()                            # 0 x inf is nan, as 0 x nan is
    if dist.is_initialized() and dist.get_world_size() > 1:
        for some in in_buckets([p.grad for p in params if not isinstance(p, DTensor)] + [wrong]):
            flat = torch.cat([g.flatten() for g in some])
            dist.all_reduce(flat)
            for g, summed in zip(some, flat.split([g.numel() for g in some])):
                g.copy_(summed.view_as(g))
    local(params[0].grad).add_(wrong)


def in_buckets(tensors, most=2**26):
    """Tensors -> lists of them, of so many numbers or of one tensor: 256 MB are sent at once."""
    size, some = 0, []
    for t in tensors:
        if some and size + t.numel() > most:
            yield some
            size, some = 0, []
        size, some = size + t.numel(), [*some, t]
    if some:
        yield some


def clip_grads(params, most=1.0):
    """torch's clip_grad_norm_, of whole and of sharded gradients together. -> their norm"""
    kinds = by_kind(params)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in some]) for some in kinds]
    norms = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for some in kinds:
        torch.nn.utils.clip_grads_with_norm_(some, most, norm)
    return norm.item()


def learning(model):
    """-> {name: parameter} of what learns"""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adamw(model, args):
    """AdamW of stages 1 and 2, which decays matrices alone"""
    params = learning(model)
    kinds = [[p for p in params.values() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    return torch.optim.AdamW(
        [dict(params=some, weight_decay=args.wd if some[0].ndim > 1 else 0)
         for kind in kinds for some in by_kind(kind)],
        lr=args.lr, betas=(0.9, 0.95), fused=on_gpu(params))


def on_gpu(params):
    """Is AdamW to be fused? On a GPU that takes a third of the time and no copy of the weights."""
    return next(iter(params.values())).is_cuda


class Finite:
    """Decides whether an update is taken: one whose gradient norm is not finite never reaches the
    weights, and so neither the average nor a checkpoint. Gradients are summed over ranks, so that
    all ranks decide alike."""

    MOST = 5                                                     # skipped in a row, then the end

    def __init__(self):
        self.in_a_row = self.skipped = 0

    def __call__(self, step, norms, prompts):
        """norms: of an update of iteration `step`; prompts: this rank's. -> is it taken?"""
        wrong = [norm for norm in norms if not math.isfinite(norm)]
        if not wrong:
            self.in_a_row = 0
            return True
        self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
        named = ", ".join([repr(p) for p in dict.fromkeys(prompts) if p is not None][:3])
        print(f"update {step + 1} is skipped: its gradient norm is {wrong[0]:g}; prompts of rank "
              f"{os.environ.get('RANK', 0)}: {named} ... ({len(prompts)} in all)", file=sys.stderr)
        if self.in_a_row > self.MOST:
            fail(f"{self.in_a_row} updates in a row were not finite: try a lower --lr; the last "
                 "checkpoint is from before them")
        return False

    def column(self):
        """-> what a row of the log says of the updates since the row before"""
        skipped, self.skipped = self.skipped, 0
        return dict(skipped=skipped) if skipped else {}


def descend(trained, finite, args, step, loss, told):
    """One step by the gradients summed over ranks: the rate warms up and then falls as a cosine to
    a 25th. Where loss or gradient are not finite it is left out; told: what the batch was of, for
    the message then. The average follows. -> the gradient's norm before it was clipped"""
    sum_grads(list(trained.params.values()), [loss])
    norm = clip_grads(trained.params.values())
    ramp = min(1, (step + 1) / args.warmup)
    for group in trained.opt.param_groups:
        group["lr"] = args.lr * ramp * (0.52 + 0.48 * math.cos(math.pi * step / args.steps))
    if finite(step, [norm], told):
        trained.opt.step()
    trained.opt.zero_grad(set_to_none=True)
    trained.ema.update(step)
    return norm


# The `index` of key: sample n's are PER_SAMPLE n, its initial noise, and the 99 behind it, the
# noise on its steps; from OF_PAIRS on, two for each pair of a fine-tuning loss; OF_LDAM is LDAM's.
# What all ranks draw alike, such as the prompts, has 0, as has the initial noise of sample 0.
PER_SAMPLE, OF_PAIRS, OF_LDAM = 100, 500_000, 1_000_000


def key(seed, step, index):
    """One integer in [0, 2^64) per (seed, step, global sample index): noise that neither ranks nor
    a restart change. torch's CPU generator heeds the low 32 bits of it; so that all of a seed
    counts, its high half is added to the low one."""
    seed = seed % 2**32 + seed // 2**32
    return ((seed * 1_000_003 + step) * 1_000_003 + index) % 2**64


def keyed(key):
    """-> a generator whose numbers come from one integer alone, of any size"""
    return torch.Generator().manual_seed(key % 2**64)


@contextmanager
def seeded(seed):
    """For a while torch's own generator starts from `seed`: what is drawn here is drawn alike on
    every rank and in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def slices(n, size):
    """Micro-batches of n rows; size 0: one of all."""
    size = size or n or 1                                        # of none, none
    return [slice(i, i + size) for i in range(0, n, size)]


def table(text, value):
    """ "a:1,b:2" -> {"a": value("1"), "b": value("2")}"""
    rows = [item.partition(":") for item in text.split(",") if item]
    return {name.strip(): value(v) for name, _, v in rows}


def span(text):
    """ "4-6" -> range(4, 7); "4" -> range(4, 5)"""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def category_of(row):
    """-> what --reward and --mix go by: a row's `category`, or else its `tag`"""
    return row.get("category", row.get("tag"))


def odds(rows, mix):
    """The weight of each prompt in the draw, by its category ("*" is every other). {"text": 3,
    "*": 1}: each text prompt comes three times as often as any other (DeepGen's proportional
    sampling), whatever share of the prompts they are. -> (rows,)"""
    kinds = map(category_of, rows)
    return torch.tensor([float(mix.get(k, mix.get("*", 0))) for k in kinds])


def sync(path):
    """What was written to a file, or which files a folder has, outlives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def writing(path):
    """What cannot be written, as on a full disk, ends the run in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:    # torch's and safetensors' own
        home = next(p for p in Path(path).absolute().parents if p.exists())
        free = disk_usage(home).free / 1e6
        fail(f"{path} could not be written ({first_line(e)}; {free:.0f} MB are free there): what "
             "was there before stays")


@contextmanager
def replacing(path):
    """A file that appears whole or not at all: gives the name of another beside it to write, which
    then takes its place. Where that fails, what was there stays."""
    path = Path(path)
    fresh = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            fresh.touch()
            mode = fresh.stat().st_mode                  # other files': safetensors' are private
            yield fresh
            fresh.chmod(mode)
            sync(fresh)
            os.replace(fresh, path)
            sync(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def write(path, text):
    """Atomic: a reader sees the old file or the new one."""
    with replacing(path) as fresh:
        fresh.write_text(text)
