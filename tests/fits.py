"""What fits on one GPU, by the memory plan:

    python tests/fits.py        # writes the table of docs/weights.md

Each row is a command, whose own main goes on here until it would print the plan of its memory: on
shapes alone, without a GPU and without a download, since full.py knows the sizes of released parts.
tests/test_memory.py holds the rows against fake_gpu.py.
"""

import json
import re
import shlex
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import full
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common.memory as memory_py  # noqa: E402
import common.weights as weights_py  # noqa: E402
import cycle_edit  # noqa: E402
import grpo  # noqa: E402
import model as model_py  # noqa: E402
import pretrain  # noqa: E402
import reflect  # noqa: E402
import sft  # noqa: E402
from common.presets import PRESETS  # noqa: E402

SCRIPTS = {f"{s.__name__}.py": s for s in (pretrain, sft, grpo, cycle_edit, reflect)}


@contextmanager
def released():
    """Inside, presets name parts of the released sizes, and the working directory is a new one."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as m:
        for name, cfg in full.presets(Path(folder)).items():
            m.setitem(PRESETS, name, cfg)
        m.chdir(folder)
        yield


class Planned(Exception):
    """Thrown where a script would print its plan"""


@cache
def planned(command, ranks=1):
    """A script's command line -> what its main gives memory_report: the model on the meta device,
    args, rows ... ranks: as under torchrun on one node"""
    script, *flags = shlex.split(command)
    module, cuda = SCRIPTS[script], torch.device("cuda")

    def stop(*given):
        raise Planned(given)
    with released(), pytest.MonkeyPatch.context() as m:
        Path("own.jsonl").write_text(json.dumps(dict(
            prompt="a photo of a bench", tag="single_object", include=[{"class": "bench",
                                                                        "count": 1}])))
        own = ["--out", "out/run", "--init", ""]
        own += (["--prompts", "own.jsonl", "--sft-data", "own.jsonl"] if module is grpo else
                ["--data", "own.jsonl"])
        m.setattr(sys, "argv", [script, *flags, *own])
        m.setattr(module, "setup", lambda: (0, ranks, cuda))
        m.setattr(model_py, "has_bf16", lambda: True)
        m.setattr(weights_py, "memory_report", stop)
        for name in ("uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_"):
            m.setattr(torch.nn.init, name, lambda tensor, *how, **more: tensor)  # has no numbers
        try:
            module.main()
        except Planned as found:
            return found.args[0]
    raise AssertionError(f"{command} printed no plan")


def at(row, n):
    """What a row's main gives memory_report with --micro n"""
    command, ranks = ROWS[row]
    plain, again, _ = command.partition(" --checkpoint")
    model, args, _, reads, copies, device = planned(f"{plain} --micro 1", ranks)
    args = replace(args, micro=n, checkpoint=bool(again))
    return model, args, n, reads if hasattr(args, "window") else n, copies, device


@cache
def plan_of(row, n):
    """-> {phase: bytes}, of all that is held in it"""
    ranks = ROWS[row][1]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(memory_py, "ranks_of", lambda args: (ranks, ranks if "--shard" in row else 1))
        held, phases = memory_py.memory_plan(*at(row, n))
    return {name: sum(held.values()) + size for name, size in phases.items()}


# What is to be used of a card: a tenth is left for CUDA, kernels' workspaces and fragments.
CARDS = {"24 GB": 21.6, "48 GB": 40.5, "80 GB": 71.5, "141 GB": 125.5}      # GiB
ROWS = {f"{'torchrun --nproc-per-node 8 ' if ranks > 1 else ''}{command}": (command, ranks)
        for command, ranks in (
    ("grpo.py --preset flow-grpo", 1),
    ("grpo.py --preset flow-grpo --checkpoint", 1),
    ("grpo.py --preset flow-grpo", 8),
    ("grpo.py --preset deepgen --reward geneval --lora-rank 32", 1),
    ("grpo.py --preset deepgen", 1),
    ("pretrain.py --preset deepgen", 1),
    ("pretrain.py --preset deepgen --checkpoint", 1),
    ("pretrain.py --preset openuni", 1),
    ("sft.py --preset deepgen", 1),
    ("sft.py --preset deepgen --checkpoint", 1),
    ("sft.py --preset deepgen --shard", 8),
    ("sft.py --preset deepgen --lora-rank 32 --checkpoint", 1),
    ("sft.py --preset openuni", 1),
    ("sft.py --preset unirl-zero", 1))}  # fmt: skip
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)                                        # of --micro


def most(row, card):
    """-> the largest --micro that fits, and its GiB; None: none does"""
    sizes = [(n, max(plan_of(row, n).values()) / 2**30) for n in SIZES]
    fits = [(n, gib) for n, gib in sizes if gib <= CARDS[card]]
    return fits[-1] if fits else None


def table():
    lines = ["| with `--micro N` | " + " | ".join(CARDS) + " |", "|---" * (1 + len(CARDS)) + "|"]
    for row in ROWS:
        cells = [most(row, card) for card in CARDS]
        lines.append(f"| `{row}` | " + " | ".join(
            f"{n} ({gib:.0f})" if n else "-" for n, gib in [cell or (0, 0) for cell in cells])
            + " |")
    return "\n".join(lines)


def written(text):
    """docs/weights.md with the table as it is now"""
    return re.sub(r"\| with `--micro N` \|.*?\|\n\n", lambda _: table() + "\n\n", text, flags=re.S)


if __name__ == "__main__":
    page = ROOT / "docs/weights.md"
    page.write_text(written(page.read_text()))
    print(table())
