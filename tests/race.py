"""A race, not a test: which algorithm gains most in the same seconds, each at its best rate.

    python tests/race.py                             # one core; what was run is not run again
    python tests/race.py --arms fast,nft --seeds 0   # a part of it
    python tests/race.py --arms guard,moving,dpm,cps --rates 2e-4

Every arm is a script as users run it, from the same checkpoint, on the same prompts and reward, and
each run has --seconds of training. The first seed is run at every rate; the one whose last looks
score best is the arm's, and the other seeds run at that. What an update of an arm costs is measured
once, in a trial of six, and says how many fit into these seconds; so its rate has come down to a
tenth by the end, and a machine that is slow for a while does no arm wrong. A gain counts when two
looks in a row show it. In the end the whole benchmark, without guidance and with what an arm was
trained with; of the winner a control whose rewards are shuffled. Everything is kept under --out,
and the curves in race.png there.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from bench import GAINS, PARTS, reached
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
ARMS = {
    "fast": "grpo.py",
    "nft": "labs/nft.py --old-growth 0.001",             # as they were measured: of long runs
    "awm": "labs/awm.py --old-growth 0.001",             # both labs keep more since
    "dgpo": "labs/dgpo.py",
    # As in tests/bench.py: batch and clip range in nats are the classroom's, all weights learn.
    "flow-grpo": "grpo.py --recipe flow-grpo --B 16 --G 8 --lora-rank 0 --clip 2e-3 --ema 0.95 "
                 "--eval-T 10",
}
PATCHES = dict(guard="labs/guard.diff", moving="labs/moving.diff", dpm="labs/dpm.diff")
MORE = dict.fromkeys(PATCHES, "grpo.py") | dict(cps="grpo.py --kind cps")    # if --arms says so
RATES = "2e-4,4e-4"


def tree_of(arm, out):
    """-> where an arm's script is run: a patch has a copy of all to itself"""
    tree = out.resolve() / arm / "tree"
    if arm in PATCHES and not tree.exists():
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "out", "tests", "docs"))
        subprocess.run(["git", "init", "-q"], cwd=tree, check=True)          # or paths are ROOT's
        subprocess.run(["git", "apply", ROOT / PATCHES[arm]], cwd=tree, check=True)
    return tree if arm in PATCHES else ROOT


def command_of(arm, rate, seed, more=""):
    return [*(ARMS | MORE)[arm].split(), "--reward", "geneval", "--init", "data/shapes/sft",
            "--lr", str(rate), "--seed", str(seed), *more.split()]


def play(home, arm, rate, seed, seconds, more):
    """One run of an arm, unless it is there already. more: flags. -> rows of its log"""
    if not (home / "done").exists():
        steps = max(10, round(seconds / pace(home.parent, arm, more)))
        run([*command_of(arm, rate, seed, more), "--steps", str(steps),
             "--eval-every", str(math.ceil(steps / 12))], home, arm)
        (home / "done").touch()
    return rows_of(home)


def pace(folder, arm, more=""):
    """Seconds of an update of this arm: the median of a trial's last four, kept beside its runs."""
    trial = folder / "trial"
    if not (trial / "done").exists():
        run([*command_of(arm, 1e-4, 0, more), "--steps", "6", "--eval-every", "1000"], trial, arm)
        (trial / "done").touch()
    return np.median([sum(row.get(f"s_{part}", 0) for part in PARTS)
                      for row in rows_of(trial)[3:]])


def bench(home, arm):
    """The whole benchmark of what a run has learned, unless it is there already
    -> {guidance: results}"""
    found = {}
    for guidance in {1.0, json.loads((home / "config.json").read_text())["guidance"]}:
        out = home.resolve() / f"bench-{guidance:g}"
        if not (out / "results.json").exists():
            call(["eval.py", "--init", home.resolve() / "ckpt", "--guidance", guidance, "--out",
                  out], tree_of(arm, home.parent.parent), f"{home}.txt")
        found[guidance] = json.loads((out / "results.json").read_text())
    return found


def run(command, home, arm):
    if home.exists():                                    # a run that was cut short begins again
        shutil.rmtree(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    call([*command, "--no-final-bench", "--out", home.resolve()],
         tree_of(arm, home.parent.parent), f"{home}.txt")


def call(command, tree, said):
    """A script of ours in the folder `tree`, on one core; what it says is added to a file."""
    with open(said, "a") as file:
        subprocess.run([sys.executable, *map(str, command)], cwd=tree, check=True, stdout=file,
                       stderr=file, env=dict(OMP_NUM_THREADS="1") | os.environ)


def rows_of(home):
    return [json.loads(line) for line in open(home / "log.jsonl")]


def curve(rows, each):
    """each: seconds of an update -> [(seconds of training, held-out score)] at each look"""
    return [(row["step"] * each, row["score"]) for row in rows if "score" in row]


def late(rows):
    """The last three looks' mean: one look of 96 pictures errs by .05."""
    return float(np.mean([row["score"] for row in rows if "score" in row][-3:]))


def draw(path, curves):
    """curves {arm: [curve of a seed, ...]} -> a picture: thin lines are seeds, thick ones their
    means, since seeds of an arm look at the same updates."""
    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (arm, its) in enumerate(curves.items()):
        x, y = np.array(its).transpose(2, 0, 1)                          # (seeds,looks)
        axes.plot(x.T, y.T, color=f"C{i}", alpha=0.3, linewidth=0.8)
        axes.plot(x[0], y.mean(0), color=f"C{i}", linewidth=2, label=arm)
    axes.set(xlabel="seconds of training", ylabel="held-out score (flow-grpo with its guidance)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def spread(values, digits=3):
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f} ({len(values)})"


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=900, help="of training, for each run")
    p.add_argument("--arms", default=",".join(ARMS))
    p.add_argument("--rates", default=RATES, help="learning rates; with a single one no control")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--more", default="", help="flags of every run, such as '--B 32'")
    p.add_argument("--out", type=Path, default=Path("out/race"))
    a = p.parse_args()
    seeds, rates = a.seeds.split(","), [float(rate) for rate in a.rates.split(",")]

    def played(arm, rate, seed):
        home = a.out / arm / f"{rate:g}-{seed}"
        return home, play(home, arm, rate, seed, a.seconds, a.more)
    means, all_curves = {}, {}
    for arm in a.arms.split(","):
        found = {rate: late(played(arm, rate, seeds[0])[1]) for rate in rates}
        rate = max(found, key=found.get)
        print(f"{arm}: " + ", ".join(f"{score:.3f} at {r:g}" for r, score in found.items()))
        runs = [played(arm, rate, seed) for seed in seeds]
        each = pace(a.out / arm, arm, a.more)
        curves = all_curves[arm] = [curve(rows, each) for _, rows in runs]
        draw(a.out / "race.png", all_curves)
        gains = [spread([reached(c, gain) for c in curves], 0) for gain in GAINS]
        benches = [bench(home, arm) for home, _ in runs]
        for guidance in sorted(benches[0]):
            its = [found[guidance] for found in benches]
            print(f"| {arm}, guidance {guidance:g} | {rate:g} | "
                  f"{spread([r['score'] for r in its])} | "
                  f"{spread([r['unseen']['score'] for r in its])} | "
                  f"{spread([r['extra_rate'] for r in its])} | "
                  f"{spread([r['diversity'] for r in its])} | {each:.1f} | "
                  + " | ".join(gains) + " |", flush=True)
        means[arm] = np.mean([found[1]["score"] for found in benches]), rate
    arm = max(means, key=means.get)
    for seed in seeds if len(rates) > 1 else ():
        home = a.out / arm / f"shuffled-{seed}"
        play(home, arm, means[arm][1], seed, a.seconds, a.more + " --shuffle")
        after = bench(home, arm)[1]
        print(f"{arm}, rewards shuffled, seed {seed}: {after['score']:.3f} ± "
              f"{after['score_se']:.3f}", flush=True)


if __name__ == "__main__":
    main()
