"""What is there only to be quicker says what the slow way says."""

import os

import pytest
import tiny
import torch
import torch.distributed as dist
from test_compile import MINE, inputs
from test_grpo import close, config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import common.layers as layers_py
import common.record as record_py
import common.run as run_py
import model as ours
from common.layers import attend, attend_packed
from model import MMDiT, rollout, sigmas

# --- attention without a mask ---


def one_by_one(q, k, v, cuts, cuts_k, most, most_k):
    """In place of the kernel, which runs on GPUs alone: each sequence (n,heads,d) by itself"""
    lengths = cuts.diff()
    assert cuts.dtype == torch.int32 and cuts is cuts_k and cuts[0] == 0 and cuts[-1] == len(q)
    assert 1 <= lengths.min() and lengths.max() <= most == most_k
    rows = zip(*(a.transpose(0, 1).split(lengths.tolist(), 1) for a in (q, k, v)))
    return torch.cat([attend(*(a[None] for a in row), None)[0] for row in rows], 1).transpose(0, 1)


@pytest.fixture
def packed(monkeypatch):
    """-> how many attentions were packed, here on the CPU"""
    calls = []

    def on_gpus(q, k, v, mask, first=False):
        if mask is None or not first:
            return attend(q, k, v, mask)
        calls.append(mask)
        return attend_packed(q, k, v, mask)
    monkeypatch.setattr(layers_py, "varlen_attn", one_by_one)
    monkeypatch.setattr(ours, "attend", on_gpus)
    return calls


def test_packed_attention(packed):
    """Of rows with many pads, with one, without; values and gradients, of what is real."""
    torch.manual_seed(0)
    given = [torch.randn(4, 3, 9, 8, requires_grad=True) for _ in range(3)]
    mask = (torch.arange(9) < torch.tensor([5, 9, 1, 8])[:, None])[:, None, None]
    real = mask[:, 0, 0, :, None, None]
    said = []
    for way in attend, attend_packed:
        y = way(*given, mask).transpose(1, 2) * real
        said.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for a, b in zip(*said):
        tiny.same(a, b, 1e-6)


@pytest.mark.parametrize("refs", [False, True])
def test_packed_attention_in_the_dit(packed, refs, monkeypatch):
    """References of several sizes leave pads between image and context: then only the attention
    among image tokens is packed, else only the joint one has pads."""
    dit = MMDiT(**MINE[MMDiT])
    tiny.randomise(dit)
    asked = inputs(MMDiT, 4, 7, pads=True, refs=refs)
    v = dit(*asked)
    blocks = len(dit.transformer_blocks)
    assert len(packed) == (1 if refs else blocks)
    monkeypatch.setattr(ours, "attend", attend)
    close(dit(*asked), v)


def test_the_kernel_takes_what_it_is_given(monkeypatch):
    """By its own account of shapes and types, on tensors that pretend to be on a GPU; in fp32 it is
    not asked. Backwards on pretended tensors of the CPU: the other ones want a CUDA context."""
    asked, real = [], layers_py.varlen_attn
    monkeypatch.setattr(layers_py, "varlen_attn", lambda *a: [asked.append(a), real(*a)][1])
    with FakeTensorMode():
        for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.bfloat16),
                              ("cuda", torch.float32)):
            mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device=device)
            q, k, v = (torch.empty(2, 3, 9, 8, dtype=dtype, device=device, requires_grad=True)
                       for _ in range(3))
            given = q.float(), k.float(), v, mask            # autocast leaves norms in fp32
            y = attend(*given, True) if device == "cuda" else attend_packed(*given)
            assert y.shape == q.shape and (y.dtype, y.device.type) == (dtype, device)
            if device == "cpu":
                y.sum().backward()
                assert all(a.grad.shape == a.shape and a.grad.dtype == dtype for a in (q, k, v))
    assert len(asked) == 2 and all(a.dtype == torch.bfloat16 for a in asked[0][:3])


# --- weights cast to bf16 ---


class Casts(TorchDispatchMode):
    """Which of these tensors were cast, each time"""

    def __init__(self, tensors):
        super().__init__()
        self.mine, self.seen = {t.data_ptr() for t in tensors}, []

    def __torch_dispatch__(self, func, types, given=(), named=None):
        if func is torch.ops.aten._to_copy.default and given[0].data_ptr() in self.mine:
            self.seen.append(given[0].data_ptr())
        return func(*given, **(named or {}))


@pytest.mark.parametrize("way", ["rollout", "sample"])
def test_weights_are_cast_once(parts, way):
    """Not at each step; the images are, to the last bit, those of a cast wherever one is needed."""
    m = tiny.build(config(parts), bf16=True, init=parts / "sft")
    m.dit.requires_grad_(True)                               # what is frozen is bf16 on a GPU
    with torch.no_grad():
        branches = m.guided(m.encode(["a red circle", "a blue square"]), 1.5)
    matrices = [p for p in m.dit.parameters() if p.ndim > 1]

    def draw():
        if way == "sample":
            return m.sample(branches, 6)
        keys = [(n, 100 * n) for n in range(4)]
        return rollout(m, branches, sigmas(6).tolist(), range(1, 3), keys, 0.9).xs
    with Casts(matrices) as casts:
        got = draw()
    assert len(matrices) > 20 and sorted(casts.seen) == sorted(casts.mine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "autocast", lambda: torch.autocast("cpu", torch.bfloat16,
                                                            cache_enabled=False))
        with Casts(matrices) as casts:
            assert torch.equal(draw(), got)
    assert len(casts.seen) >= 6 * len(casts.mine)


# --- ranks ---


def test_an_update_sends_three_times(parts, tmp_path, monkeypatch):
    """Beside its gradients: what the rewards said, the spread of the advantages, the log's row."""
    sent, updates, real, record = [], [], dist.all_reduce, record_py.Recorder.record

    def send(*given):
        sent.append(1)
        return real(*given)

    def recorded(*given):
        updates.append(len(sent))
        return record(*given)
    monkeypatch.setattr(dist, "all_reduce", send)
    monkeypatch.setattr(record_py.Recorder, "record", recorded)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tiny.play(parts, tmp_path / "out", "--steps", 3, "--no-final-bench")
    finally:
        dist.destroy_process_group()
    assert len(updates) == 3 and updates[2] - updates[1] == 3


def test_what_is_set_on_gpus(monkeypatch):
    """And on no CPU: its rows would be others. What the user has set stays."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    run_py.setup()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert torch.get_float32_matmul_precision() == "highest"
    def set_device(device):                              # there is none; CUDA starts here
        assert "PYTORCH_ALLOC_CONF" in os.environ
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(run_py, "local_device", lambda: torch.device("cuda", 0))
    try:
        run_py.setup()
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        assert torch.get_float32_matmul_precision() == "high"
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
        run_py.setup()
        assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    finally:
        torch.set_float32_matmul_precision("highest")
