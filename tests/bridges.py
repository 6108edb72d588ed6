"""The papers' ablations of bridge and fine-tuning, at classroom scale. Not a test: it takes 30 min.

    python tests/bridges.py --out out/bridges     # two seeds side by side, one core each

DeepGen table 6 (stacked layers, think tokens, the VLM's LoRA), ParaUni table 3 (which layers, the
LayerNorm), UniPic 2.0 table 3 (what is frozen in fine-tuning). An arm is pretrain.py or sft.py
itself, called as a user would, on the classroom's DiT and VLM; within a seed all arms see the same
batches, noise and held-out prompts. Arms of stage 2 go on from the seed's arm "scb".

A claim is judged on the difference of its two arms, prompt by prompt: it counts beyond two standard
errors, of prompts or of seeds, whichever is larger. What is done in --out is not done again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common.presets as presets_py  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402
import sft  # noqa: E402
from common.show import mean_and_error  # noqa: E402
from data.shapes.bench import PROMPTS, draw_images, summary  # noqa: E402
from rewards.prompts import read_prompts  # noqa: E402

ALL = (6, 5, 4, 3, 2, 1)                      # the classroom VLM's layers, deep to shallow
LIM = dict(bridge="lim", layers=ALL)
# arm: what of the preset changes, stage, flags
ARMS = {
    "scb": ({}, 1, ""),
    "last": (dict(bridge="last", layers=()), 1, ""),
    "scb, no think tokens": (dict(n_query=0), 1, ""),
    "lim": (LIM, 1, ""),
    "lim, no shallow layers": (LIM | dict(layers=(6, 5, 4, 3)), 1, ""),
    "lim, no middle layers": (LIM | dict(layers=(6, 5, 2, 1)), 1, ""),
    "lim, no deep layers": (LIM | dict(layers=(4, 3, 2, 1)), 1, ""),
    "lim, every other layer": (LIM | dict(layers=(6, 4, 2)), 1, ""),
    "lim, no LayerNorm": (LIM, 1, ""),
    "both learn": ({}, 2, ""),
    "DiT frozen": ({}, 2, "--train bridge"),
    "connector frozen": ({}, 2, "--train dit"),
    "both and the VLM's LoRA": ({}, 2, "--vlm-lora-rank 16 --vlm-lora-alpha 32"),
}
CLAIMS = [                                    # better, worse, GenEval there, where
    ("scb", "last", "none given", "DeepGen table 6"),
    ("scb", "scb, no think tokens", "none given", "DeepGen table 6"),
    ("both and the VLM's LoRA", "both learn", ".86 > .85", "DeepGen table 6"),
    ("lim", "lim, no shallow layers", ".87 > .82", "ParaUni table 3"),
    ("lim", "lim, no middle layers", ".87 > .85", "ParaUni table 3"),
    ("lim", "lim, no deep layers", ".87 > .84", "ParaUni table 3"),
    ("lim", "lim, every other layer", ".87 > .86", "ParaUni table 3"),
    ("lim", "lim, no LayerNorm", ".87 > .73", "ParaUni table 3"),
    ("both learn", "connector frozen", ".86 > .84", "UniPic 2.0 table 3"),
    ("both learn", "DiT frozen", ".86 > .85", "UniPic 2.0 table 3"),
]


def run_arm(arm, seed, out, steps):
    """Train one arm and keep which of the held-out images are right: out/right.npy (P,4)."""
    changes, stage, flags = ARMS[arm]
    name = "shapes" if not changes else f"shapes-{out.name}"        # a preset of its own
    presets_py.PRESETS[name] = replace(presets_py.PRESETS["shapes"], preset=name, **changes)
    if arm == "lim, no LayerNorm":
        class Bare(model.Bridge):
            def __init__(self, cfg, dit):
                super().__init__(cfg, dit)
                self.agglayer_norm = nn.Identity()
        model.Bridge = Bare
    sys.argv = [f"stage {stage}", "--preset", name, "--out", str(out), "--seed", str(seed),
                "--steps", str(steps if stage == 1 else steps * 3 // 4), "--eval-every", "10000",
                *flags.split()]
    if stage == 2:
        sys.argv += ["--init", str(out.parent / folder("scb"))]
    [pretrain, sft][stage - 1].main()

    done = model.Unified.load(out)
    rows = read_prompts(PROMPTS / "eval.jsonl")
    np.save(out / "right.npy", summary(rows, draw_images(done.draw, rows, range(len(rows)), 4))[1])


def folder(arm):
    return arm.replace(",", "").replace("'", "").replace(" ", "-").lower()


def told(Args, flags, out):
    """{flag or setting of a recipe: value} -> a command line; settings, which are no flags, go into
    a .json beside `out`, on top of the recipe that is named."""
    kinds = {f.name: f.type for f in fields(Args) if f.metadata.get("setting")}
    own = {k: kinds[k](v) for k, v in flags.items() if k in kinds}
    flags = {k: v for k, v in flags.items() if k not in own}
    if own:
        own = dict(recipe=flags.get("recipe", "fast")) | own
        flags["recipe"] = Path(f"{out}.json")
        flags["recipe"].parent.mkdir(parents=True, exist_ok=True)
        flags["recipe"].write_text(json.dumps(own))
    return [str(x) for k, v in flags.items() for x in ("--" + k.replace("_", "-"), v)]


def command_line(doc, arms, out, seeds=3, **more):
    """What the experiments are told; more: an option's name -> argparse's settings for it."""
    p = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path(out))
    p.add_argument("--seeds", type=int, default=seeds)
    for name, settings in more.items():
        p.add_argument(f"--{name}", **settings)
    p.add_argument("--arms", nargs="+", choices=arms, default=list(arms), help="only these")
    p.add_argument("--arm", choices=arms, help="run this one alone, for --seed")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    if a.seeds < 2 and not a.arm:
        sys.exit("error: a paired comparison has no standard error with fewer than two --seeds")
    return a


def run_all(script, out, waves, seeds, done):
    """Each arm of each wave with each seed: `script --arm`, one run per core, a wave after the one
    before, whose ends it may start from. What has the file `done` is not done again."""
    env = os.environ | dict(OMP_NUM_THREADS="1")

    def run(job):
        seed, arm = job
        here = out / f"seed{seed}" / folder(arm)
        if (here / done).exists():
            return 0
        shutil.rmtree(here, ignore_errors=True)          # half an arm begins again
        here.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{here}.txt", "w") as log:
            return subprocess.call([sys.executable, script, "--out", out, "--arm", arm,
                                    "--seed", str(seed)], env=env, stdout=log, stderr=log)
    for arms in waves:
        jobs = [(seed, arm) for seed in range(seeds) for arm in arms]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failed = [job for job, code in zip(jobs, pool.map(run, jobs)) if code]
        if failed:
            sys.exit(f"error: {failed} failed: see the .txt beside their folders in {out}")


def difference(better, worse, rows):
    """Values (P,seeds,n) of two arms, for the P rows' same noise -> mean of better - worse, the
    larger of its standard errors over prompts and over seeds (of one: over prompts), and what it
    says of the claim."""
    gain, seeds = better - worse, better.shape[1]
    mean, error = mean_and_error(gain.reshape(len(rows), -1), rows)
    each = [mean_and_error(gain[:, s], rows)[0] for s in range(seeds)]
    error = max(error, np.std(each, ddof=1) / seeds**0.5) if seeds > 1 else error
    return mean, error, ("inside the noise" if abs(mean) <= 2 * error else
                         "reproduced" if mean > 0 else "not reproduced")


def table(out, seeds, arms):
    """Scores of these arms, and the claims about them with their verdicts, as markdown."""
    rows = read_prompts(PROMPTS / "eval.jsonl")
    right = {arm: np.stack([np.load(out / f"seed{s}" / folder(arm) / "right.npy")
                            for s in range(seeds)], 1) for arm in arms}        # (P,seeds,4)
    print(f"| arm | minutes | score, {seeds} seeds | each seed |\n|---|---|---|---|")
    for arm in arms:
        each = [mean_and_error(right[arm][:, s], rows)[0] for s in range(seeds)]
        mean, error = mean_and_error(right[arm].reshape(len(rows), -1), rows)
        logs = [out / f"seed{s}" / folder(arm) / "log.jsonl" for s in range(seeds)]
        minutes = np.mean([json.loads(f.read_text().splitlines()[-1])["at"] / 60 for f in logs])
        print(f"| {arm} | {minutes:.1f} | {mean:.3f} ± {error:.3f} | "
              + " ".join(f"{e:.3f}" for e in each) + " |")
    print("\n| claim | GenEval there | difference here | verdict |\n|---|---|---|---|")
    for better, worse, there, where in (c for c in CLAIMS if {*c[:2]} <= {*arms}):
        mean, error, verdict = difference(right[better], right[worse], rows)
        print(f"| {better} > {worse} ({where}) | {there} | {mean:+.3f} ± {error:.3f} | {verdict} |")


def main():
    a = command_line(__doc__, ARMS, "out/bridges", 2, steps=dict(
        type=int, default=200, help="of stage 1; stage 2 has 3/4 of them"))
    if a.arm:
        return run_arm(a.arm, a.seed, a.out / f"seed{a.seed}" / folder(a.arm), a.steps)
    env = os.environ | dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // a.seeds)))
    for arm in a.arms:
        todo = [s for s in range(a.seeds)
                if not (a.out / f"seed{s}" / folder(arm) / "right.npy").exists()]
        runs = [subprocess.Popen([sys.executable, __file__, "--out", a.out, "--arm", arm,
                                  "--seed", str(s), "--steps", str(a.steps)], env=env)
                for s in todo]
        if any([r.wait() for r in runs]):
            sys.exit(f"error: arm {arm!r} failed; remove its folder in {a.out} and start again")
    table(a.out, a.seeds, a.arms)


if __name__ == "__main__":
    main()
