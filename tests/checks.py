"""The thirteen checks of tests/gpu.py, and its targets: check(machine, a folder of its own, seconds
that it may take) -> Verdict. Mostly a script's own main runs, on a model of random weights.
"""

import argparse
import gc
import io
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import bench
import full
import pytest
import ranks
import tiny
import torch
import torch.nn.functional as F
from apart import Apart, Enough, Lost, held
from safetensors.torch import load_file
from test_talk import folder_of
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import common.rl as rl_py
import cycle_edit
import grpo
import pretrain
import reflect
import rewards.shared as shared_py
import sft
from common.checkpoint import Ema, save_weights
from common.presets import PRESETS
from common.record import Recorder, mean_row, read_log
from common.run import adamw, learning, local_device
from common.weights import adapter, learn, slim
from data.shapes.bench import bench_shapes
from model import Attention, MMDiT, Unified

ROOT = Path(__file__).parent.parent
NEEDS = "SKIP: needs a GPU"
LOOK = Recorder.look
# TFLOP/s of dense products in bf16, from the makers' data sheets, by a part of the card's name
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}


@dataclass
class Machine:
    device: str                      # cuda or cpu
    name: str = "no GPU"
    memory: float = 0.0              # GiB of the GPU
    peak: float = 0.0                # TFLOP/s, 0: not known

    def big(self, large, small):
        """What a GPU is given, and what a CPU."""
        return large if self.device == "cuda" else small


@dataclass
class Verdict:
    passed: bool | None              # None: on this machine its figures mean nothing
    said: str
    figures: dict = field(default_factory=dict)


def probe():
    """-> this machine; by a process that may touch its GPU"""
    if not torch.cuda.is_available():
        return Machine("cpu")
    torch.ones(1, device="cuda")
    about = torch.cuda.get_device_properties(0)
    peak = next((x for part, x in PEAKS.items() if part in about.name), 0)
    return Machine("cuda", about.name, about.total_memory / 2**30, peak)


def prepare(m, folder):
    """In this process the papers' presets have random weights, and no picture is drawn just to be
    looked at."""
    PRESETS.update(full.presets(folder / "parts", m.device == "cpu"))
    Unified.from_preset = staticmethod(
        full.random_weights(Unified.from_preset, torch.device(m.device)))
    Recorder.look = lambda self, step: None


# ---------------------------------------------------------------------------------------------
# Seconds, TFLOP, GiB


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(f, times=3):
    """-> median seconds of f(), after a first time that does not count"""
    f()
    spent = []
    for _ in range(times):
        wait()
        begin = time.perf_counter()
        f()
        wait()
        spent.append(time.perf_counter() - begin)
    return median(spent)


def counted(f):
    """-> TFLOP of f(): products of matrices, convolutions, attention"""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops() / 1e12


def holds(m):
    """-> GiB in use; without a GPU those of the process"""
    return (torch.cuda.memory_allocated() if m.device == "cuda" else held()[0]) / 2**30


def most_held(m):
    """-> GiB held at most since this was asked before; without a GPU by the process, ever"""
    if m.device == "cpu":
        return held()[1] / 2**30
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def free():
    """What nobody needs any more leaves the GPU; a model and its parts may point at each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def graphs():
    """-> how many graphs torch.compile has made in this process"""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---------------------------------------------------------------------------------------------
# A script's own main on a model of random weights


@dataclass
class Run:
    rows: list = field(default_factory=list)     # of its log, with what `play` adds
    said: io.StringIO = field(default_factory=io.StringIO)       # what it printed
    look: float = 0.0                            # GiB held at most while it looked at pictures

    @property
    def plan(self):
        """GiB that it said it would need"""
        return planned(self.said.getvalue())


def planned(said):
    """What a script printed before its weights were loaded -> GiB in all"""
    return float(re.search(r"([\d.]+) +of [\d.]+ on (cpu|cuda)", said)[1])


NEXT = dict(rollout="decode", decode="reward", reward="update", update="rollout")


def play(m, main, name, out, updates, *flags, lap=None, run=None, looks=False):
    """main of a script with a preset, stopped after so many updates, before it would save. A row
    also says when (now), what was held at most since the row before (held, GiB), how many graphs
    there are (graphs), and how many rows went through the DiT (drawn: {part of the update: rows}).
    lap(part) is called at the end of each part of grpo.py's update. looks: at last it looks at
    pictures, too. -> Run"""
    run, script = run or Run(), sys.modules[main.__module__]
    now, drawn, inside = ["rollout"], Counter(), []
    real = Recorder.record, rl_py.Clock.lap, Unified.velocity

    def record(self, step, stats, columns, curves):
        wait()
        run.rows.append(mean_row(stats) | columns | dict(
            now=time.perf_counter(), held=most_held(m), graphs=graphs(), drawn=dict(drawn)))
        drawn.clear()
        if len(run.rows) == updates:
            if looks:
                LOOK(self, step + 1)
                run.look = most_held(m)
            raise Enough
        return run.rows[-1]

    def clock(self, part):
        wait()                           # or a part's work would count as the next one's
        real[1](self, part)
        now[0] = NEXT[part]
        if lap:
            lap(part)

    def velocity(self, x, t, branches):
        drawn[now[0]] += 0 if inside else len(x) * len(branches)     # many rows call it again
        inside.append(1)
        try:
            return real[2](self, x, t, branches)
        finally:
            inside.pop()
    Recorder.record, rl_py.Clock.lap, Unified.velocity = record, clock, velocity
    argv = ["--preset", name, "--init", "", "--out", out, *flags]
    sys.argv = [f"{script.__name__}.py", *tiny.as_recipe(
        script.Args, argv, out.parent / f"{out.name}.json")]
    try:
        with redirect_stdout(run.said):
            main()
    except Enough:
        pass
    finally:
        Recorder.record, rl_py.Clock.lap, Unified.velocity = real
        print(run.said.getvalue())
        free()
    return run


def rl(folder):
    """Flags that any run of grpo.py has here: its reward needs no model."""
    return ["--prompts", full.prompts(folder / "prompts.jsonl", 64), "--eval-T", 1,
            "--reward", "jpeg_compressibility"]


def photos(folder, side, n=32):
    """n JPEGs with captions -> their folder"""
    bench.photos(folder, side, n)
    return folder / "folder"


def built(m, name, **what):
    """A preset's model of which `what` learns, see learn; held as in a run"""
    return slim(learn(Unified.from_preset(name), what), torch.device(m.device)).to(m.device)


# ---------------------------------------------------------------------------------------------
# 1 to 4


WORDLESS = "t2i", "LoRA, KL, guidance", "cycle_edit", "sft + edits"      # see `parity`
PARITY = {
    "t2i": (grpo.main, []),
    "LoRA, KL, guidance": (grpo.main, ["--lora-rank", 4, "--beta", 0.1, "--guidance", 2]),
    "cot": (reflect.main, ["--task", "cot", "--limit", 8]),
    "cycle_edit": (cycle_edit.main, []),
    "reflect": (reflect.main, []),
    "sft + edits": (sft.main, ["--edit-share", 0.5, "--batch", 4]),
}


def classroom(m, folder):
    """tiny.py's classroom; on a GPU with the weights that ship. -> folder"""
    folder.mkdir(exist_ok=True)
    tiny.make(folder)
    ranks.photos_of(folder)
    folder_of(folder / "pairs", "edit")
    if m.device == "cuda":                   # --init sft
        (folder / "config.json").write_text(json.dumps(asdict(PRESETS["shapes"])))
        shutil.rmtree(folder / "sft")
        shutil.copytree(ROOT / "data/shapes/sft", folder / "sft")
    return folder


def first_norms(folder, out, names, bf16=False):
    """-> {name: gradient norms of a run's first update}; without bf16 all is exact fp32"""
    if not bf16:
        torch.set_float32_matmul_precision("highest")
        torch.set_float32_matmul_precision = lambda how: None
        torch.backends.cudnn.allow_tf32 = False
    norms = {}

    def record(self, step, stats, columns, curves):
        norms[name] = [value for k, value in columns.items() if k.endswith("grad_norm")]
        raise Enough
    Recorder.record = record
    for name in names:
        main, flags = PARITY[name]
        data = ["--data", folder / "photos", "--edits", folder / "pairs"] * (main is sft.main)
        data += ["--data", folder / "edits.jsonl"] * (main is cycle_edit.main)
        try:
            tiny.play(folder, out / name.replace(" ", "_"), *flags, *data, bf16=bf16, main=main)
        except Enough:
            pass
    return norms


def parity(m, folder, limit):
    """On a GPU the classroom's scripts do what they do on the CPU: their first gradients' norms are
    equal to 1e-3 in fp32, to 2e-2 in bf16, but where words are drawn, of which one may change; the
    shipped model's score is that of the README within two standard errors."""
    Apart(classroom, m, folder).answer(limit)    # what has computed here may hang if it forks
    names = m.big([*PARITY], ["t2i", "reflect", "sft + edits"])
    want, fp32, bf16 = (
        Apart(first_norms, folder, folder / out, names, half, **hidden).answer(limit)
        for out, names, half, hidden in (
            ("cpu", names, False, dict(CUDA_VISIBLE_DEVICES="")), ("fp32", names, False, {}),
            ("bf16", m.big(WORDLESS, WORDLESS[:1]), True, {})))

    def off(norms):
        """-> the largest distance, and whose it is"""
        return max((abs(a - b) / max(b, 1e-6), name) for name in norms
                   for a, b in zip(norms[name], want[name], strict=True))
    worst, half = off(fp32), off(bf16)
    model = Unified.from_preset("shapes", "data/shapes/sft").to(m.device)
    score = bench_shapes(partial(model.draw, steps=10), *m.big((4, None), (1, 6)))["score"]
    return Verdict(
        worst[0] <= 1e-3 and half[0] <= 2e-2 and m.big(abs(score - 0.596) < 0.026, True),
        "gradient norms off by {:.1e} in fp32 ({}), {:.1e} in bf16 ({}); ".format(*worst, *half)
        + m.big(f"score {score:.3f}, .596 +- .013 on a CPU", f"score: {NEEDS}"),
        dict(cpu=want, fp32=fp32, bf16=bf16, score=score))


def ratio(m, folder, limit):
    """Before an update the ratio is 1: rollout and update compute alike to a third of --clip,
    though their batches differ, eager and compiled."""
    off, clip = {}, 1e-4
    for how in m.big(("eager", "--compile"), ("eager",)):        # there see `compiling`
        run = play(m, grpo.main, "flow-grpo", folder / how.strip("-"), 1, *rl(folder), "--B", 2,
                   "--G", m.big(24, 4), "--T", 4, "--window", 3, "--trained", 1, "--updates", 1,
                   "--clip", clip, *[how] * (how != "eager"))
        off[how] = run.rows[0]["ratio_off"]
    return Verdict(max(off.values()) < clip / 3, "ratio off by " + ", ".join(
        f"{x:.1e} ({how})" for how, x in off.items()) + f"; --clip {clip:g}", off)


def memory_cases(m, folder):
    """-> name, main, preset, flags of the runs of check 3"""
    G, data = m.big(24, 2), photos(folder / "photos", m.big(512, 64))
    short = [*rl(folder), "--T", 2, "--window", 1, "--updates", 1, "--G", G]
    pairs = ["--data", data, "--batch"]
    return [
        ("RL, LoRA, micro 1", grpo.main, "flow-grpo", [*short, "--B", 1, "--micro", 1]),
        ("micro 8", grpo.main, "flow-grpo", [*short, "--B", 1, "--micro", m.big(8, 2)]),
        ("micro 8, checkpoint", grpo.main, "flow-grpo",
         [*short, "--B", 1, "--micro", m.big(8, 2), "--checkpoint"]),
        ("rollout of 144", grpo.main, "flow-grpo",
         [*short, "--B", m.big(6, 2), "--guidance", 1, "--micro", m.big(8, 2)]),
        ("stage 1 of 8", pretrain.main, "deepgen", [*pairs, m.big(8, 2)]),
        ("stage 2 of 4", sft.main, "deepgen", [*pairs, m.big(4, 2)]),
    ]


def memory(m, folder, limit):
    """What a run says that it will need is what it holds at most in an update and in a look at
    pictures, to a tenth; what does not fit was not to fit."""
    found, wrong = {}, {}
    for i, (name, main, preset, flags) in enumerate(memory_cases(m, folder)):
        run = Run()
        try:
            play(m, main, preset, folder / f"run{i}", 2, *flags, run=run, looks=True)
            found[name] = max(run.rows[-1]["held"], run.look), run.plan
            wrong[name] = abs(found[name][0] / max(run.plan, 1e-3) - 1)
        except torch.OutOfMemoryError:
            found[name] = float("nan"), run.plan
            wrong[name] = 0 if run.plan > 0.95 * m.memory else float("inf")
        free()
    return Verdict(
        m.big(max(wrong.values()) <= 0.1, None), m.big("", f"{NEEDS}; ") + "; ".join(
            f"{k} {a:.2f} (plan {b:.2f})" for k, (a, b) in found.items()) + " GiB",
        dict(held_and_planned=found))


def in_a_thread(m, folder, limit):
    """A reward's model that is made in a thread lies on its rank's GPU."""
    last = torch.cuda.device_count() - 1 if m.device == "cuda" else 0
    with ThreadPoolExecutor(1) as pool:
        os.environ["LOCAL_RANK"] = str(last)
        made = pool.submit(lambda: shared_py.to_device(torch.nn.Linear(2, 2))).result()
        os.environ["LOCAL_RANK"] = "1"
        other = pool.submit(local_device).result()
    right = m.big((made.weight.device.index, other.index) == (last, 1), other.type == "cpu")
    return Verdict(right and m.big(True, None), f"the model of rank {last} is on "
                   f"{made.weight.device}, that of rank 1 would be on {other}"
                   + m.big("", f"; {NEEDS}"))


# ---------------------------------------------------------------------------------------------
# 5 to 9


def dit_rows(model, n):
    """n rows for `velocity`"""
    cond = model.encode(["a photo of a red circle left of a blue square"] * n)
    return model.noise(range(n)), torch.linspace(0.1, 0.9, n).to(model.device), [(1.0, cond)]


def dit_speed(m, name, n, **what):
    """n rows through the DiT; if some of it learns, there and back. -> model, seconds, TFLOP/s"""
    model = built(m, name, **what)
    rows = dit_rows(model, n)

    def step():
        with torch.set_grad_enabled(bool(what)):
            v = model.velocity(*rows)
        if what:
            v.square().mean().backward()
    seconds = timed(step)
    return model, seconds, counted(step) / seconds


# What the study of this code without a GPU foretold of an H100: milliseconds, without --compile
FORETOLD = {"forward of 24": 245, "LoRA, 9": 211, "full, 9": 257, "stage 1 of 8": 312,
            "encode 4": 25, "decode 4": 52, "a token of 128": 30}


def speed(m, folder, limit):
    """What a run is made of takes, eager, at most 1.3 times what was foretold."""
    n, k = m.big((24, 9), (4, 3))
    ms, rate = {}, {}
    for name, rows, what in (("full, 9", k, dict(dit=None)), ("forward of 24", n, {}),
                             ("LoRA, 9", k, dict(dit=adapter("dit", 32, 64)))):
        model, seconds, rate[name] = dit_speed(m, "flow-grpo", rows, **what)
        ms[name] = 1000 * seconds
    images = model.to_images(model.noise(range(4)))
    ms["encode 4"] = 1000 * timed(lambda: model.to_latents(images))
    ms["decode 4"] = 1000 * timed(lambda: model.to_images(model.noise(range(4))))
    del model
    free()
    run = play(m, pretrain.main, "deepgen", folder / "stage1", 4, "--batch", m.big(8, 2),
               "--data", photos(folder / "photos", m.big(512, 64)))
    at = [row["now"] for row in run.rows]
    ms["stage 1 of 8"] = 1000 * median(b - a for a, b in zip(at, at[1:]))
    model, limit = built(m, "deepgen"), m.big(64, 8)
    asked = [f"draw {i}" for i in range(m.big(128, 4))]
    ms["a token of 128"] = 1000 * timed(lambda: model.generate(asked, limit=limit), 1) / limit
    return Verdict(
        m.big(all(ms[k] <= 1.3 * FORETOLD[k] for k in ms), None), m.big("", f"{NEEDS}; ")
        + "; ".join(f"{k} {ms[k]:.0f} ms (foretold {FORETOLD[k]}"
                    + (f"; {rate[k]:.3g} TFLOP/s)" if k in rate else ")") for k in ms),
        dict(ms=ms, tflops=rate))


class GaveUp(logging.Handler):
    """Notes that torch.compile has met too many cases and goes on without."""

    found = False

    def emit(self, record):
        self.found |= "recompile_limit" in record.getMessage()


def ragged(m, folder):
    """grpo.py with --compile and prompts of any length -> graphs that torch.compile has made by
    each update, and whether it gave up"""
    watch = GaveUp()
    torch.compile = partial(torch.compile, backend="eager")      # the graphs alone, in less time
    logging.getLogger("torch._dynamo").addHandler(watch)
    rows = play(m, grpo.main, "deepgen", folder / "ragged", m.big(8, 16), *rl(folder),
                "--recipe", "fast", "--B", 2, "--G", 2, "--T", 3, "--window", 1, "--window-stop", 0,
                "--lora-rank", m.big(4, 0), "--micro", m.big(3, 0), "--compile").rows
    return [row["graphs"] for row in rows], watch.found


def compiling(m, folder, limit):
    """--compile is ready within a minute and gains a quarter; prompts of any length make no graph
    after the third update. Its runs are the fast recipe's, with a LoRA on SD3.5-M at 512 pixels."""
    made, gave_up = Apart(ragged, m, folder).answer(limit)
    B, G = m.big((4, 8), (2, 4))
    flags = [*rl(folder), "--recipe", "fast", "--lora-rank", 32, "--micro", m.big(16, 4),
             "--B", B, "--G", G]
    eager, fast = (play(m, grpo.main, "flow-grpo", folder / how, 4, *flags, *more).rows
                   for how, more in (("eager", []), ("fast", m.big(["--compile"], []))))

    def seconds(row, parts=NEXT):
        return sum(row[f"s_{part}"] for part in parts)
    dit, late = ("rollout", "update"), made[-1] - made[2]
    gain = seconds(eager[-1], dit) / max(1e-3, seconds(fast[-1], dit))
    first = sum(seconds(row) for row in fast) - 4 * seconds(fast[-1])
    each = (("eager", eager[-1]), ("compiled", fast[-1]))
    return Verdict(
        0 < made[2] and not late and not gave_up and m.big(first < 60 and gain >= 1.25, True),
        f"prompts of any length: {made[2]} graphs in three updates, {late} in those after"
        + ", then it gave up; " * gave_up + "; " * (not gave_up)
        + m.big(f"{gain:.2f} times as fast, {first:.0f} s until then", f"speed: {NEEDS}"),
        dict(gain=gain, first=first, graphs=made, gave_up=gave_up,
             images_per_second={how: B * G / seconds(row) for how, row in each},
             tflops={how: tflops(row) for how, row in each}))


def tflops(row):
    """A row of a run of a LoRA on SD3.5-M -> {part: TFLOP/s of its rollout and of its update}"""
    graded, plain = flops_of_a_row(PRESETS["flow-grpo"], dit=adapter("dit", 32, 64))
    each = dict(rollout=plain, update=graded)
    return {part: row["drawn"][part] * each[part] / max(1e-3, row[f"s_{part}"]) for part in each}


def flops_of_a_row(cfg, **what):
    """-> TFLOP of one row of a preset's MMDiT there and back, and only there; from shapes alone"""
    with torch.device("meta"):
        model = torch.nn.Module()
        model.dit = MMDiT(**cfg.mmdit).requires_grad_(False)
        model.adapters, model.trained = {}, set()
        learn(model, what)
        side = cfg.size // cfg.vae_factor
        row = [torch.empty(1, model.dit.latent_channels, side, side), torch.empty(1),
               torch.empty(1, 77 + cfg.t5_tokens, model.dit.context_dim)]
        graded = counted(lambda: model.dit(*row).square().mean().backward())
        with torch.no_grad():
            return graded, counted(lambda: model.dit(*row))


def attention(m, folder, limit):
    """The DiT's attention of rows that differ in length costs at most half more than of equal
    ones. Beside it torch's kernels themselves, with a mask and without padding."""
    (B, heads, N, d), kind = m.big(((9, 24, 1229, 64), torch.bfloat16),
                                   ((2, 2, 40, 8), torch.float32))
    layer = Attention(heads * d, heads, d, qk_norm=None, joint=False, last=False)
    layer.to_q = layer.to_k = layer.to_v = layer.to_out[0] = torch.nn.Identity()
    x = torch.randn(B, N, heads * d, device=m.device, dtype=kind).requires_grad_()
    lengths = torch.tensor([N - 7 * i for i in range(B)], device=m.device)
    real = torch.arange(N, device=m.device) < lengths[:, None]
    mask, q = real[:, None, None], x.unflatten(-1, (heads, d)).transpose(1, 2)
    ways = {"equal": lambda: layer(x), "ragged": lambda: layer(x, mask=mask),
            "torch's mask": lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask),
            "torch's varlen": lambda: varlen(q, real)}
    ms, kernels = {}, {}
    for name, way in ways.items():
        def step():
            y = way()
            y.backward(torch.ones_like(y), retain_graph=True)
        try:
            ms[name] = 1000 * timed(step, 10)
            kernels[name] = slowest(m, step)
        except (RuntimeError, ImportError) as e:         # NotImplementedError is one of the former
            kernels[name] = f"cannot run here: {str(e).splitlines()[0][:40]}"
    return Verdict(
        m.big(ms["ragged"] <= 1.5 * ms["equal"], None), m.big("", f"{NEEDS}; ") + "; ".join(
            f"{name} " + (f"{ms[name]:.2f} ms ({at})" if name in ms else at)
            for name, at in kernels.items()), dict(ms=ms, kernels=kernels))


def varlen(q, real):
    """torch's attention of q (B,heads,N,d) to itself, its real rows (B,N) one behind another"""
    from torch.nn.attention.varlen import varlen_attn
    q = q.transpose(1, 2)[real]                                          # (tokens,heads,d)
    ends = F.pad(real.sum(1).cumsum(0), (1, 0)).int()
    return varlen_attn(q, q, q, ends, ends, real.shape[1], real.shape[1])


def profiled(m):
    return profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: m.big(2, 1)])


def intervals(m, seen):
    """A profile -> (name, begin, end) in microseconds of each kernel; of a CPU's operations"""
    kind = m.big(DeviceType.CUDA, DeviceType.CPU)
    its = [(e.name, e.time_range.start, e.time_range.end) for e in seen.events()
           if e.device_type == kind]
    return sorted(its, key=lambda each: each[1])


def slowest(m, step):
    """-> the name of the kernel that takes longest in step()"""
    with profiled(m) as seen:
        step()
        wait()
    spent = Counter()
    for name, begin, end in intervals(m, seen):
        spent[name] += end - begin
    return max(spent, key=spent.get)[:50]


def busy(its):
    """Intervals -> the share of their span in which one of them runs; the three longest gaps, in
    milliseconds, and what comes after each"""
    end, total, gaps = its[0][1], 0.0, []
    for name, begin, stop in its:
        if begin > end:
            gaps.append(((begin - end) / 1000, name[:40]))
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total / (end - its[0][1]), sorted(gaps, reverse=True)[:3]


class Watch:
    """Of grpo.py's second update a profile, of its third the lines where the host waits for the
    GPU; rollout and rewards are left out. (The first is warming up.)"""

    def __init__(self, m):
        self.m, self.update, self.waits = m, 0, Counter()

    def __call__(self, part):
        if part == "reward":
            self.begin()
        elif part == "update":
            self.end()

    def begin(self):
        self.update += 1
        if self.update == 2:
            self.seen = profiled(self.m)
            self.seen.__enter__()
        if self.update == 3:
            self.catcher = warnings.catch_warnings(record=True)
            self.warned = self.catcher.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn") if self.m.device == "cuda" else None

    def end(self):
        if self.update == 2:
            self.seen.__exit__(None, None, None)
        if self.update == 3:
            torch.cuda.set_sync_debug_mode("default") if self.m.device == "cuda" else None
            self.catcher.__exit__(None, None, None)
            self.waits.update(f"{Path(w.filename).name}:{w.lineno}" for w in self.warned
                              if "synchroniz" in str(w.message))


def idle(m, folder, limit):
    """In an update the GPU computes for 85% of the time at least, and the host waits for it equally
    often however many micro-batches there are."""
    few, many = Watch(m), Watch(m)
    for micro, watch in zip(m.big((9, 3), (4, 2)), (few, many)):
        play(m, grpo.main, "flow-grpo", folder / f"run{micro}", 3, *rl(folder), "--B", 1,
             "--G", m.big(18, 4), "--T", 2, "--window", 1, "--updates", 1, "--micro", micro,
             lap=watch)
    share, gaps = busy(intervals(m, few.seen))
    more = many.waits.total() - few.waits.total()
    return Verdict(
        m.big(share >= 0.85 and not more, None), m.big("", f"{NEEDS}; ")
        + f"busy {share:.0%}; longest gaps "
        + (", ".join(f"{gap:.1f} ms before {name}" for gap, name in gaps) or "none")
        + f"; {few.waits.total()} waits, {more} more with more micro-batches"
        + "".join(f", {n} at {at}" for at, n in few.waits.items()),
        dict(busy=share, gaps=gaps, waits=dict(few.waits), waits_of_many=dict(many.waits)))


def optimiser(m, folder, limit):
    """AdamW of 2.24 billion weights, as the scripts make it: 35 ms at most, no copy of them."""
    found = {}
    for name in ("ours", "foreach"):
        with torch.device("meta"):
            dit = MMDiT(**PRESETS["flow-grpo"].mmdit)
        full.fill(dit, m.device)
        opt = adamw(dit, argparse.Namespace(wd=0.05, lr=1e-6)) if name == "ours" else (
            torch.optim.AdamW(dit.parameters(), lr=1e-6, foreach=True))
        for p in dit.parameters():
            p.grad = torch.ones_like(p)
        opt.step()                                       # makes its state
        most_held(m)
        had = holds(m)
        found[name] = 1000 * timed(opt.step), most_held(m) - had
        del dit, opt, p
        free()
    return Verdict(
        m.big(found["ours"][0] <= 35 and found["ours"][1] < 1, None), m.big("", f"{NEEDS}; ")
        + "; ".join(f"{name} {ms:.1f} ms, {more:.1f} GiB more" for name, (ms, more) in
                    found.items()), dict(ms_and_gib=found))


# ---------------------------------------------------------------------------------------------
# 10 to 13


def saving(m, folder, limit):
    """A save needs less than a GiB more of the GPU, also where --init brought a VLM; and a run that
    is gone on with is the uninterrupted one, bit for bit."""
    model = Unified.from_preset("deepgen", meta=True)
    for blocks in (model.dit.transformer_blocks, model.vlm.model.language_model.layers):
        del blocks[m.big(6, 1):]                         # a file of 5 GB, not of 24
    model = slim(learn(full.fill(model, m.device), dict(dit=None)), torch.device(m.device))
    model.trained.add("vlm")
    ema = Ema(learning(model), 0.9)
    most_held(m)
    had, begin = holds(m), time.perf_counter()
    save_weights(model, ema, folder / "ckpt", 0)()
    seconds, more = time.perf_counter() - begin, most_held(m) - had
    file = folder / "ckpt/model.safetensors"
    rate = file.stat().st_size / seconds / 1e9
    file.unlink()
    del model, ema
    same, alike = resumed(m, folder)
    return Verdict(
        same and m.big(more < 1, True), f"a run gone on with is {'' if same else 'not '}the same"
        + ("" if alike else ", nor are two in one go") + f"; {rate:.2f} GB/s; "
        + m.big(f"{more:.1f} GiB more on the GPU", f"GiB more: {NEEDS}"),
        dict(gigabytes_per_second=rate, more=more, same=same, alike=alike))


def resumed(m, folder):
    """Two runs of grpo.py of four updates, and one stopped after two of them and gone on with -> do
    the first and the third end alike? The first and the second?"""
    classroom(m, folder / "classroom")
    real = Recorder.record

    def run(name, stop=0, *more):
        def record(self, step, *row):
            row = real(self, step, *row)
            if step + 1 == stop:
                raise Enough
            return row
        Recorder.record = record
        try:
            tiny.play(folder / "classroom", folder / name, "--steps", 4, "--eval-every", 2,
                      "--no-final-bench", *more, bf16=m.big(True, False))
        except Enough:
            return None
        finally:
            Recorder.record = real
        return load_file(folder / name / "ckpt/model.safetensors")

    def equal(a, b):
        return all(torch.equal(a[k], b[k]) for k in a)
    one, two = run("one"), run("two")
    run("half", 2)
    return equal(one, run("half", 0, "--resume")), equal(one, two)


def data(m, folder, limit):
    """Photos of a megapixel are there in time: a step of stage 1 waits for them less than a
    twentieth of its time."""
    waits, real = [], pretrain.mixture

    def clocked(batches):
        while True:
            begin = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - begin)
            yield batch
    pretrain.mixture = lambda *given: clocked(real(*given))
    at = [row["now"] for row in play(
        m, pretrain.main, "deepgen", folder / "run", m.big(12, 4), "--batch", m.big(8, 2), "--data",
        photos(folder / "photos", m.big(1024, 64), m.big(64, 8)), "--workers", 4).rows]
    step, late = median(b - a for a, b in zip(at[2:], at[3:])), median(waits[3:])
    return Verdict(m.big(late < 0.05 * step, None), m.big("", f"{NEEDS}; ") + f"{late * 1000:.1f} "
                   f"ms of {step * 1000:.0f} ms, {late / step:.1%}", dict(wait=late, step=step))


def one_rank(folder, out):
    """What check 12 starts by torchrun: stage 2 with --shard, saved, and gone on with"""
    flags = ["sft", "--shard", "--eval-every", 2, "--steps"]
    ranks.play(Path(folder), Path(out), *flags, 2)
    ranks.play(Path(folder), Path(out), *flags, 3, "--resume")
    print("backend", torch.distributed.get_backend())


def failing(folder, out):
    """A rank that meets a user's error once the ranks have met"""
    ranks.play(folder, out, "sft", "--init", "out/nowhere")


def torchrun(m, folder, limit):
    """Under torchrun with one rank, by NCCL: --shard, a save, going on; it exits with 0, and a
    user's error ends it at once."""
    Apart(classroom, m, folder / "classroom").answer(limit)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1,
               Path(__file__).parent / "gpu.py", "--one-rank", folder / "classroom", folder / "out"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          timeout=limit, cwd=ROOT)
    print(done.stdout, done.stderr, sep="\n")
    steps = [row["step"] for row in read_log(folder / "out")]
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port.getsockname()[1]))
    begin = time.perf_counter()
    try:
        Apart(failing, folder / "classroom", folder / "failed", RANK="0",
              LOCAL_RANK="0", WORLD_SIZE="1", **place).answer(limit)
        why = "no error"
    except Lost as e:
        why = str(e)
    seconds = time.perf_counter() - begin
    backend = "nccl" if m.device == "cuda" else "gloo"
    return Verdict(
        done.returncode == 0 and f"backend {backend}" in done.stdout and steps[-3:] == [1, 2, 3]
        and "no checkpoint at" in why, f"exit code {done.returncode}, {backend}, updates {steps}; "
        f"a user's error ends it after {seconds:.0f} s: {why[:60]}")


def run_tests(m, folder, limit):
    """pytest passes where there is a GPU, which it hides from itself. Beside it, for the third
    target, the classroom learns."""
    learns = Apart(gain, m, folder / "gain", limit - 15)
    which = ["tests/test_laws.py", *m.big(["tests/test_grpo.py"], ["-k", "grid"])]
    tests = Apart(pytest.main, ["-x", "-q", "-p", "no:cacheprovider", *which])
    found = []
    for job in (tests, learns):
        try:
            found.append(job.answer(limit - 5))
        except Lost as e:
            found.append(str(e))
    code, gained = found
    return Verdict(code == 0, f"{' '.join(which)}: "
                   + ("passed" if code == 0 else f"exit code or error: {code}"), dict(gain=gained))


def gain(m, folder, limit):
    """grpo.py in the classroom until it has gained 0.20 -> seconds of its training and of all until
    two evaluations in a row said so (None: they never did), the best gain"""
    folder.mkdir()
    real, begin = Recorder.record, time.perf_counter()

    def record(self, *row):
        row, curve, at = real(self, *row), [], 0.0
        for each in read_log(self.out):
            at += sum(each.get(f"s_{part}", 0) for part in NEXT)
            if "score" in each:
                curve.append((at, each["score"]))
        found.update(seconds=bench.reached(curve, 0.20), all=time.perf_counter() - begin,
                     best=max(score for _, score in curve) - curve[0][1])
        if found["seconds"] or found["all"] > limit:
            raise Enough
        return row
    found, Recorder.record = {}, record
    try:
        if m.device == "cuda":
            sys.argv = ["grpo.py", "--out", str(folder / "run"), "--eval-every", "10",
                        "--no-final-bench"]
            grpo.main()
        else:
            tiny.play(classroom(m, folder / "classroom"), folder / "run", "--steps", 2,
                      "--eval-every", 1, "--no-final-bench")
    except Enough:
        pass
    return found


# ---------------------------------------------------------------------------------------------
# Targets, from the figures of the checks


def mfu(m, figures):
    """The DiT's TFLOP in training step and rollout, of what the card can do: 50% and 55%"""
    rates = figures["compile"]["tflops"]["compiled"]
    shares = {part: rate / m.peak if m.peak else 0 for part, rate in rates.items()}
    full = figures["speed"]["tflops"]["full, 9"] if "speed" in figures else 0
    good = shares["update"] >= 0.5 and shares["rollout"] >= 0.55
    return Verdict(
        good if m.peak else None, (f"training step {shares['update']:.0%}, rollout "
                                   f"{shares['rollout']:.0%} of {m.peak:g} TFLOP/s (a LoRA, "
                                   f"--compile); full and eager {full / m.peak:.0%}")
        if m.peak else m.big(f"no peak is known of {m.name}", NEEDS), shares)


def images(m, figures):
    """GRPO of SD3.5-M, 512 pixels, a LoRA, the fast recipe: 6 optimised images per second"""
    rates = figures["compile"]["images_per_second"]
    return Verdict(m.big(rates["compiled"] >= 6, None), m.big("", f"{NEEDS}; ") + ", ".join(
        f"{rate:.2f} ({how})" for how, rate in rates.items()), rates)


def twenty(m, figures):
    """The classroom's score gains 0.20 in a minute of training."""
    found = figures["pytest"]["gain"]
    if isinstance(found, str):
        return Verdict(False, found)
    said = f"{found['seconds']:.0f} s of training, {found['all']:.0f} s in all" if (
        found["seconds"]) else f"not in {found['all']:.0f} s, best {found['best']:+.2f}"
    return Verdict(m.big(bool(found["seconds"] and found["seconds"] <= 60), None),
                   m.big("", f"{NEEDS}; ") + said, found)


CHECKS = [                                # name, what, seconds on a GPU
    ("parity", parity, 70), ("ratio", ratio, 75), ("memory", memory, 100),
    ("thread", in_a_thread, 15), ("speed", speed, 60), ("compile", compiling, 100),
    ("attention", attention, 20), ("idle", idle, 35), ("optimiser", optimiser, 25),
    ("saving", saving, 45), ("data", data, 35), ("torchrun", torchrun, 50),
    ("pytest", run_tests, 120)]
TARGETS = [("MFU", mfu), ("images per second", images), ("+0.20", twenty)]
