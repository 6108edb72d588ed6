"""Long runs, not a test: what becomes of a run that goes on for three times the usual.

    python tests/long.py --arms fast,nft --rates 2e-4,2e-4     # one core each; resumes where it was

Each row is the benchmark of the weights at a ninth of the run and so on, two pictures a prompt,
mean and standard error over seeds: does the score fall again, do pictures get alike (diversity),
brighter, emptier (jpeg_kb), gridded (seams), full of what nobody asked for (extra_rate)?
"""

import argparse
import json
from pathlib import Path

from race import ROOT, call, command_of, spread, tree_of

COLUMNS = ("score", "extra_rate", "diversity", "brightness", "jpeg_kb", "seams")
LOOKS = 9                                                # at a run, evenly spaced


def go_on(home, arm, rate, seed, steps):
    """A run from wherever it is, then its benchmarks. -> {updates: results}"""
    tree = tree_of(arm, home.parent.parent)
    home.parent.mkdir(parents=True, exist_ok=True)
    said = f"{home}.txt"
    call([*command_of(arm, rate, seed), "--steps", steps, "--eval-every", steps // LOOKS, "--keep",
          LOOKS, "--no-final-bench", "--resume", "auto", "--out", home], tree, said)
    found = {}
    for weights in sorted((home / "ckpt").glob("step_*")):
        out = home / "bench" / weights.name
        if not (out / "results.json").exists():
            call(["eval.py", "--init", weights, "--n", 2, "--out", out], tree, said)
        found[int(weights.name[5:])] = json.loads((out / "results.json").read_text())
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arms", default="fast")
    p.add_argument("--rates", default="2e-4", help="one of each arm")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--steps", type=int, default=450)
    p.add_argument("--out", type=Path, default=ROOT / "out/long")
    a = p.parse_args()
    for arm, rate in zip(a.arms.split(","), a.rates.split(","), strict=True):
        runs = [go_on(a.out.resolve() / arm / f"seed-{seed}", arm, rate, seed, a.steps)
                for seed in a.seeds.split(",")]
        print(f"| {arm}, updates | " + " | ".join(COLUMNS) + " | unseen |")
        for step in runs[0]:
            now = [run[step] for run in runs]
            print(f"| {step} | " + " | ".join(spread([r[k] for r in now]) for k in COLUMNS)
                  + f" | {spread([r['unseen']['score'] for r in now])} |", flush=True)


if __name__ == "__main__":
    main()
