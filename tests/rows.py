"""The first log rows of every script, task and recipe at seed 0; do two trees agree on them?

    python tests/rows.py run TREE OUT     # each command of COMMANDS in TREE; its log goes to OUT
    python tests/rows.py compare OUT OUT  # a table: the largest relative difference of any column

A refactoring must not change what is computed. A command runs with the number of steps it has by
default (rates depend on it) and is stopped once it has logged ROWS updates. One thread, so that
sums have an order. Columns of time are left out; columns that one side lacks are named. Trees from
before the ninth session of LOG.md take other flags: `grpo.py --task`, and flags for settings.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROWS = 5
SMALL = "--B 4 --G 4 --eval-every 1000"
PAPER = SMALL + " --init data/shapes/sft --reward geneval"
COMMANDS = {
    "pretrain": "pretrain.py",
    "pretrain, edits": "pretrain.py --edits data/shapes/edits --edit-share 0.5",
    "sft": "sft.py --init data/shapes/sft",
    "sft, edits": "sft.py --init data/shapes/sft --edits data/shapes/edits --lora-rank 4",
    "sft, cot": "sft.py --init data/shapes/sft --task cot --lr 2e-4",
    "sft, reflect": "sft.py --init data/shapes/sft-edit --task reflect --lm-loss 1",
    "edit_reward": "labs/edit_reward.py --batch 16",
    "grpo": "grpo.py --reward geneval",
    "grpo, sana": "grpo.py --preset shapes-sana",
    "flow-grpo": f"grpo.py --recipe flow-grpo {PAPER}",
    "mr-grpo": (f"grpo.py {PAPER} --T 12 --window 11 --sft-data data/shapes/train",
                dict(recipe="mr-grpo", mix="", trained=5, sft_batch=8)),
    "unirl-zero": f"grpo.py --recipe unirl-zero {PAPER}",
    "unipic2": f"grpo.py --recipe unipic2 {PAPER}",
    "parauni": (f"grpo.py --preset shapes-sana --reward geneval {SMALL} --ldam geneval:4-6",
                dict(recipe="parauni", ldam_leap=0.0, ldam_falls=0)),
    "guidance": f"grpo.py {SMALL} --guidance 3 --reward geneval:0.8,jpeg_compressibility:0.2",
    "both, KL, 2 updates": f"grpo.py {SMALL} --train both --beta 0.01 --updates 2 --micro 5",
    "lora": f"grpo.py {SMALL} --lora-rank 4 --beta 0.01 --shuffle",
    "text": "reflect.py --task text --eval-every 1000",
    "vqa": "reflect.py --task vqa --eval-every 1000 --B 32",
    "cot": "reflect.py --task cot --init data/shapes/sft --eval-every 1000",
    "cot, KL": f"reflect.py --task cot --init data/shapes/sft {SMALL} --images-per-thought 2 "
               "--beta 0.01 --updates 2 --micro 5",
    "cot, answers": f"reflect.py --task cot --init data/shapes/sft {SMALL} --answer-only",
    "cot, lm": f"reflect.py --task cot --init data/shapes/sft {SMALL} --train lm --guidance 2",
    "cot, dit": f"reflect.py --task cot --init data/shapes/sft {SMALL} --train dit --beta 0.01",
    "cycle": "cycle_edit.py --eval-every 1000",
    "cycle, edit": "cycle_edit.py --eval-every 1000 --reward edit --B 4",
    "cycle, KL": f"cycle_edit.py {SMALL} --train both --beta 0.01 --updates 2 --guidance 2",
    "reflect": "reflect.py --init data/shapes/sft-edit --eval-every 1000 --B 32",
    "reflect, KL": "reflect.py --init data/shapes/sft-edit --eval-every 1000 --B 8 --G 4 "
                   "--redraw 4 --beta 0.01 --updates 2 --micro 3",
    "reflect, lm": "reflect.py --init data/shapes/sft-edit --eval-every 1000 --B 8 --G 4 "
                   "--train lm --vlm-lora-rank 2",
    "reflect, dit": "reflect.py --init data/shapes/sft-edit --eval-every 1000 --B 8 --G 4 "
                    "--train dit",
}


def run(tree, out, only=()):
    """Log rows of every command in OUT/<name>/log.jsonl; what is there is not run again."""
    for name, command in COMMANDS.items():
        home = Path(out).resolve() / name.replace(", ", "-").replace(" ", "_")
        if only and name not in only or (home / "done").exists():
            continue
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        command, settings = command if isinstance(command, tuple) else (command, {})
        flags = [*command.split(), "--out", str(home)]
        if settings:
            Path(f"{home}.json").write_text(json.dumps(settings))
            flags += ["--recipe", f"{home}.json"]
        begin, log = time.time(), home / "log.jsonl"
        env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=".")
        with open(f"{home}.txt", "w") as said:
            p = subprocess.Popen([sys.executable, *flags], cwd=tree, env=env, stdout=said,
                                 stderr=said)
            while p.poll() is None:
                time.sleep(0.3)
                if log.exists() and len(rows(home)) >= ROWS:
                    p.send_signal(signal.SIGKILL)
                    break
            p.wait()
        ok = log.exists() and len(rows(home)) >= ROWS
        if ok:
            (home / "done").touch()
        print(f"{name}: {time.time() - begin:.0f} s" + ("" if ok else f", FAILED: {home}.txt"),
              flush=True)


def rows(home):
    found = []
    for line in (home / "log.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:                                   # half a line: it is being written
            break
    return [r for r in found if r["step"]][:ROWS]


def compare(a, b):
    print("| run | columns | largest difference, relative | in | not in both |")
    print("|---|---|---|---|---|")
    for name in COMMANDS:
        homes = [Path(x) / name.replace(", ", "-").replace(" ", "_") for x in (a, b)]
        if not all((h / "done").exists() for h in homes):
            print(f"| {name} | | not run | | |")
            continue
        worst, where, lost, n = 0.0, "", set(), set()
        for x, y in zip(*map(rows, homes)):
            lost |= {k for k in x.keys() ^ y.keys() if not k.startswith("s_")}
            for k in x.keys() & y.keys():
                if k == "at" or k.startswith("s_"):
                    continue
                n.add(k)
                off = abs(x[k] - y[k]) / max(abs(x[k]), abs(y[k]), 1e-3) if x[k] != y[k] else 0.0
                if off > worst:
                    worst, where = off, f"{k}, update {x['step']}"
        print(f"| {name} | {len(n)} | {worst:.1e} | {where} | {', '.join(sorted(lost))} |")


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    run(paths[0], paths[1], paths[2:]) if what == "run" else compare(*paths)
