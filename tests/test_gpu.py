"""tests/gpu.py where there is no GPU: each of its checks runs here, at small size."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checks
import full
import plans
import pytest
import torch

import common.presets as presets_py
from model import Unified

ROOT = Path(__file__).parent.parent
# What a CPU can tell; of the others the figures mean nothing there, or a part of them.
PASSES = {"parity", "ratio", "compile", "saving", "torchrun", "pytest"}
# Checks that take minutes on a CPU, and what is made from their figures: SLOW=1 pytest runs them.
SLOW = {"memory", "compile", "torchrun", "pytest", "MFU", "images per second", "+0.20"}


def test_every_check_runs(tmp_path):
    names = [(n, name) for n, (name, *_) in enumerate((*checks.CHECKS, *checks.TARGETS), 1)
             if name not in SLOW or "SLOW" in os.environ]
    done = subprocess.run(
        [sys.executable, "tests/gpu.py", "--out", tmp_path / "gpu", "--minutes", "30", "--only",
         ",".join(str(n) for n, _ in names)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1"))
    first, *lines = done.stdout.splitlines()
    assert first.startswith("no GPU: every check runs small"), done.stdout + done.stderr
    rows = [re.fullmatch(r" ?(\d+) (PASS|FAIL|SKIP) (.+?) \(\d+ s\): (.+)", line).groups()
            for line in lines]
    assert [(int(n), name) for n, _, name, _ in rows] == names
    said = {name: (status, text) for _, status, name, text in rows}
    assert {name: status for name, (status, _) in said.items()} == {
        name: "PASS" if name in PASSES else "SKIP" for _, name in names}, done.stdout
    for name, (status, text) in said.items():
        assert "needs a GPU" in text or name in ("ratio", "torchrun", "pytest"), text
    assert re.search(r"fp32 \(.+\)", said["parity"][1])
    assert re.match(r"ratio off by \d\.\de[+-]\d+ \(eager\)", said["ratio"][1])
    assert len(re.findall(r"\d+ ms \(foretold \d+", said["speed"][1])) == len(checks.FORETOLD)
    assert "a run gone on with is the same; " in said["saving"][1]
    if "SLOW" in os.environ:
        assert len(re.findall(r"[\d.]+ \(plan [\d.]+\)", said["memory"][1])) == 6
        assert "updates [1, 2, 3]" in said["torchrun"][1]
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["machine"]["device"] == "cpu" and len(told["checks"]) == len(rows)
    assert done.returncode == 0
    run = {name for name, *_ in checks.CHECKS} & said.keys()
    assert all((tmp_path / f"gpu/{name}.txt").exists() for name in run)


CRASHES = """
import os, sys, time
sys.path.insert(0, "tests")
import gpu, checks

def breaks(m, folder, limit):
    raise SystemExit("error: on purpose")
gpu.find = lambda: (checks.Machine("cpu"), "fork")
gpu.CHECKS = [("breaks", breaks, 5), ("hangs", lambda *given: time.sleep(1000), 2),
              ("dies", lambda *given: os._exit(9), 5), ("thread", checks.in_a_thread, 9)]
gpu.TARGETS = [("images per second", checks.images)]
sys.exit(gpu.main())
"""


def test_a_crash_stops_no_other(tmp_path):
    """Nor does a check that hangs; the exit code says that some failed."""
    done = subprocess.run([sys.executable, "-c", CRASHES, "--out", tmp_path / "gpu"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["FAIL", "FAIL", "FAIL", "SKIP", "FAIL"]
    assert "SystemExit: error: on purpose" in lines[0]
    assert "no answer within 12 s" in lines[1] and "exit code 9" in lines[2]
    assert "not measured: 'compile'" in lines[4]


def test_what_is_counted():
    """A product's FLOP; of a DiT, whose backward costs two forwards, or one where a LoRA learns"""
    plain = torch.nn.Linear(64, 32, bias=False)
    x = torch.ones(8, 64)
    assert checks.counted(lambda: plain(x)) == pytest.approx(2 * 8 * 64 * 32 / 1e12)
    cfg = presets_py.PRESETS["flow-grpo"]
    cfg = replace(cfg, mmdit=cfg.mmdit | dict(num_layers=2))
    both, there = checks.flops_of_a_row(cfg, dit=None)
    lora, again = checks.flops_of_a_row(cfg, dit=checks.adapter("dit", 32, 64))
    assert 0.1 < there < 0.25 and 2.9 < both / there < 3.1
    assert there < again < 1.05 * there and 1.9 < lora / again < 2.3


def test_busy_share():
    share, gaps = checks.busy([("a", 0, 40), ("b", 30, 50), ("c", 90, 100)])
    assert share == 0.6 and gaps == [(0.04, "c")]


@pytest.mark.parametrize("said, gib", [
    ("GiB, rough  weights 9.2  sum 63.1  of 79.6 on cuda\n", 63.1),
    ("held: weights 9.2; the largest of: look 3.0; 63.1 of 79.6 on cpu\nthis does not fit", 63.1)])
def test_what_a_run_says_it_needs(said, gib):
    assert checks.planned("parameters  vlm 3.0 M\n" + said) == gib


def test_weights_of_a_released_shape(tmp_path, monkeypatch):
    """Small ones draw; those of full size have as many weights as the released parts."""
    small = full.presets(tmp_path / "small", small=True)
    large = full.presets(tmp_path / "large")
    for name, cfg in small.items():
        monkeypatch.setitem(presets_py.PRESETS, name, cfg)
    make = full.random_weights(Unified.from_preset, torch.device("cpu"))
    for name in small:
        model = make(name)
        images = model.draw(["a red star", "two cups"], [0, 1], 2)
        assert images.shape == (2, 3, 64, 64) and images.float().std() > 1, name
    million = dict(vlm=(3754.6, 8292.2), text_encoder=(5580.6,), dit=(2243.2,), vae=(83.8, 312.3))
    for name, cfg in large.items():
        monkeypatch.setitem(presets_py.PRESETS, name, cfg)
    for name in ("deepgen", "unipic2", "flow-grpo", "openuni"):
        model = Unified.from_preset(name, meta=True)
        for part, sizes in million.items():
            if getattr(model, part) is not None and not (name == "openuni" and part != "vae"):
                n = sum(p.numel() for p in getattr(model, part).parameters())
                assert min(abs(n / 1e6 - size) for size in sizes) < 0.1, (name, part, n)


APART = """
import os, sys, time
sys.path.insert(0, "tests")
from apart import Apart, Lost, metered

def hold(mega):
    return len(b"x" * (mega * 2**20))
print(Apart(metered, hold, 64).answer(60)[::2])
try:
    Apart(int, "no").answer(60)
except Lost as e:
    print(e)
print(Apart(os.environ.get, "WHO", WHO="me").answer(60))
"""


def test_apart():
    """What a process answers, by how much it grew, its error, its environment"""
    done = subprocess.run([sys.executable, "-c", APART], cwd=ROOT, capture_output=True, text=True)
    first, error, who = done.stdout.splitlines()
    value, grown = ast.literal_eval(first)
    assert value == 64 * 2**20 and 60 * 2**20 < grown < 80 * 2**20
    assert error.startswith("ValueError: invalid literal") and who == "me"


def test_the_page_is_what_is_planned():
    """A row of docs/gpus.md, computed again (after a change: python tests/gpu.py --plan)"""
    rows = (ROOT / "docs/gpus.md").read_text().splitlines()
    for script, name, flags in plans.PLANS:
        assert sum(row.startswith(f"| `{script.__name__}.py --preset {name} {flags}` |")
                   for row in rows) == 1
    plan = next(plan for plan in plans.PLANS if plan[1] == "flow-grpo")
    with plans.without_weights() as folder:
        assert plans.line(*plan, folder) in rows
