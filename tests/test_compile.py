"""--compile changes how fast the DiT computes, and nothing else: each block is one graph, which all
blocks of its kind share, and after the first updates nothing is compiled any more."""

import json
import os
import subprocess
import sys

import pytest
import ranks
import tiny
import torch
from peft import inject_adapter_in_model
from test_grpo import close
from test_recipes import SANA, gradients
from test_shard import near, numbers
from torch._dynamo import explain
from torch._dynamo.utils import counters

import common.record as record_py
from common.layers import compile_blocks
from common.record import read_log
from common.sana import SanaDiT
from common.weights import adapter, adapters_off
from model import MMDiT

ROOT = tiny.ROOT
SLOW = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes: SLOW=1 pytest ...")
MINE = {MMDiT: tiny.MMDIT | dict(dual_attention_layers=(0,)), SanaDiT: SANA | dict(num_layers=1)}
KINDS = {MMDiT: 2, SanaDiT: 1}           # of blocks: with two attentions, the last


@pytest.fixture(autouse=True)
def graphs():
    """All that is compiled, as it is handed to the compiler; here it then runs as it stands."""
    made = []

    def keep(graph, inputs):
        made.append(graph)
        return graph.forward
    torch.compiler.reset()
    torch.compiler.set_default_backend(keep)
    counters.clear()
    yield made
    torch.compiler.set_default_backend(None)
    torch.compiler.reset()


def build(kind):
    torch.manual_seed(0)
    dit = kind(**MINE[kind])
    tiny.randomise(dit)
    return dit


def inputs(kind, n, L, pads=False, refs=False, size=16):
    """What a DiT is asked: n latents, contexts of up to L tokens, references of any size"""
    g = torch.Generator().manual_seed(n * L)
    x, ctx = torch.randn(n, 4, size, size, generator=g), torch.randn(n, L, 32, generator=g)
    mask = torch.arange(L) < L - torch.arange(n)[:, None] if pads else None
    shown = [[torch.randn(4, 8, 8 + 2 * b, generator=g)] * (b + 1) for b in range(n)]
    return x, torch.rand(n, generator=g), ctx, mask, None, shown if refs else None


def answers(dit, asked):
    """-> velocity and gradient; velocities without gradient, and of the DiT without its LoRA"""
    dit.zero_grad()
    v = dit(*asked)
    v.square().mean().backward()
    grad = torch.cat([p.grad.flatten() for p in dit.parameters() if p.grad is not None])
    with torch.no_grad():
        still = dit(*asked)
        with adapters_off(dit):
            return v.detach(), grad, still, dit(*asked)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_one_graph(kind):
    """By torch's own account, with pads, with references, with a LoRA."""
    dit, seen = build(kind), []
    inject_adapter_in_model(adapter("dit", 2, 4), dit)
    for block in dit.transformer_blocks:
        block.register_forward_pre_hook(lambda block, given: seen.append((block, given)))
    dit(*inputs(kind, 3, 7, pads=True, refs=kind is MMDiT))
    assert len(seen) == len(dit.transformer_blocks)
    for block, given in seen:
        block._forward_pre_hooks.clear()
        told = explain(block)(*given)
        assert (told.graph_count, told.graph_break_count) == (1, 0)


PADS = [dict(n=2, L=5, pads=True)], [dict(n=5, L=6, pads=True), dict(n=3, L=8, pads=True, size=8)]
PLAIN = [dict(n=3, L=7)], [dict(n=4, L=9)]
REFS = [dict(n=2, L=5, pads=True, refs=True)], [dict(n=3, L=4, refs=True, size=24)]
CASES = {"MMDiT": (MMDiT, [PADS], False), "MMDiT, all": (MMDiT, [PADS, PLAIN, REFS], True),
         "SANA, all": (SanaDiT, [PADS, PLAIN], True)}


@pytest.mark.parametrize("case", [pytest.param(k, marks=[SLOW] * (", " in k)) for k in CASES])
def test_compiled_blocks_compute_the_same(graphs, case):
    """And share their graphs: those of the first inputs do for any batch, length and size, and for
    any number of references; also where a backward computes the blocks again."""
    kind, given, lora = CASES[case]
    dit = build(kind)
    if lora:
        inject_adapter_in_model(adapter("dit", 2, 4), dit)
        tiny.randomise(dit)
    first, later = (sum(some, []) for some in zip(*given))
    asked = [inputs(kind, **a) for a in first + later]
    want = [answers(dit, a) for a in asked]
    compile_blocks(dit).checkpoint = True
    for i, a in enumerate(asked):
        for got, wanted in zip(answers(dit, a), want[i]):
            close(got, wanted, 1e-5)
        if i + 1 == len(first):
            made = len(graphs)
    # With gradient, without, and without the LoRA
    assert len(graphs) == made == (2 + lora) * KINDS[kind] * len(first)
    assert not counters["graph_break"]


def test_compile_in_main(graphs, parts, tmp_path, monkeypatch):
    """Of the DiT that learns and of a KL's copy of it; rows and names of weights stay."""
    flags = ["--steps", 1, "--beta", 0.1, "--no-final-bench"]
    plain = tiny.play(parts, tmp_path / "a", *flags)
    assert not graphs
    rows = tiny.play(parts, tmp_path / "b", *flags, "--compile")
    assert len(graphs) == 2 * 3            # of both blocks: with gradient, without, the reference's
    for a, b in zip(plain[1:], rows[1:]):
        assert a.keys() == b.keys()
        assert all(abs(a[k] - b[k]) <= 1e-5 for k in a if "grad_norm" in k or "kl" in k)
    names = [sorted(torch.load(tmp_path / k / "ckpt/optim.pt", weights_only=True)["raw"])
             for k in "ab"]
    assert names[0] == names[1]


@SLOW
def test_nothing_is_compiled_after_the_third_update(graphs, parts, tmp_path, monkeypatch):
    """200 updates, of prompts whose lengths differ, now and then not; of a last micro-batch of any
    size; of a KL."""
    lines = (ROOT / "data/shapes/prompts/train.jsonl").read_text().splitlines()[:40]
    rows = [json.dumps(json.loads(line) | dict(flat=False)) for line in lines]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    made, real = [], record_py.Recorder.record

    def record(*given):
        made.append(len(graphs))
        return real(*given)
    monkeypatch.setattr(record_py.Recorder, "record", record)
    tiny.play(parts, tmp_path / "out", "--steps", 200, "--B", 2, "--G", 3, "--beta", 0.1,
              "--micro", 7, "--compile", "--eval-every", 200, "--no-final-bench", "--prompts",
              tmp_path / "prompts.jsonl")
    assert len(made) == 200 and made[2] == made[-1] > 0


@SLOW
@pytest.mark.parametrize("kind", [MMDiT, SanaDiT])
def test_compiled_gradients(kind):
    """By the compiler itself, of contexts of any length, in batches of any size; of SANA without
    C++, which would take a minute more."""
    torch.compiler.set_default_backend("inductor" if kind is MMDiT else "aot_eager")
    dit = build(kind)
    cases = [inputs(kind, n, L, pads)[2:4] for n, L, pads in (
        (2, 5, False), (3, 7, False), (3, 9, True), (4, 6, True))]
    want = [gradients(dit, *c)[:2] for c in cases]
    compile_blocks(dit)
    for c, (v, grad) in zip(cases, want):
        got_v, got, _ = gradients(dit, *c)
        torch.testing.assert_close(got_v, v, atol=1e-4, rtol=1e-4)
        close(got, grad, 1e-4)


@SLOW
def test_compiled_and_sharded(parts, tmp_path):
    """By the compiler itself, on two ranks that share out the weights; torchrun's, since what has
    compiled cannot fork."""
    photos = ranks.photos_of(parts)
    plain = ranks.play(photos, tmp_path / "plain", "sft")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         ranks.__file__, photos, tmp_path / "both", "sft", "--shard", "--compile"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    near(numbers(read_log(tmp_path / "both")), numbers(plain))
