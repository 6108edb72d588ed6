"""The papers' ablations of RL, at classroom scale. Not a test: about an hour on two cores.

    python tests/ablations.py --out out/ablations     # two runs side by side, one core each

DeepGen table 7 (auxiliary SFT, KL, reward-wise normalisation), Flow-GRPO's denoising reduction,
windows, kernels, a judge that compares or rates, ParaUni's LDAM, and a reward that gets hacked. An
arm is grpo.py itself, called as a user would; within a seed all see the same prompts and noise.

Arms that cost more per update have fewer updates: so that seconds are about equal, and shown.
A claim is judged as in bridges.py. What is done in --out is not done again.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from bridges import command_line, difference, folder, run_all, told

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import eval as eval_py  # noqa: E402
import grpo  # noqa: E402
import model  # noqa: E402
import rewards  # noqa: E402
import rewards.judge as judge_py  # noqa: E402
from common.show import mean_and_error  # noqa: E402
from data.shapes.bench import PROMPTS, draw_images, summary  # noqa: E402
from data.shapes.judge import check  # noqa: E402
from eval import read_weights, score  # noqa: E402
from rewards.prompts import read_prompts  # noqa: E402

# Of the base, held out: what the images' rewards are compared in. Spreads differ a thousandfold.
THREE = "geneval,clip,jpeg_compressibility"
# Weights that show at this scale: DeepGen's (1e-4, 5e-7) are a thousandth of the surrogate here.
FULL = f"--reward {THREE} --sft 0.02 --beta 0.05 --kl velocity"
SANA = "--preset shapes-sana --train both"
# arm: updates, flags. One forward a step and three a trained step: 19, 16, 37, 13 and 29 an image.
ARMS = {
    "fast": (36, ""),
    "window 2": (40, "--window 2"),
    "window 9": (20, "--window 9 --window-stop 0"),
    "T 4": (46, "--T 4 --window-stop 0"),
    "T 20": (25, "--T 20 --window-stop 6"),              # the same noise levels as T 10
    # As much fresh noise as flow at 0.9: a standard deviation of 0.72, on average of 5 steps.
    "cps": (36, "--kind cps --eta 0.6"),
    "dance": (36, "--kind dance --eta 3.25"),
    "three rewards": (36, FULL),
    "without SFT": (36, FULL + " --sft 0"),
    "without KL": (36, FULL + " --beta 0"),
    "joint norm": (36, FULL + " --norm joint"),
    "three rewards, alone": (36, f"--reward {THREE}"),
    "joint norm, alone": (36, f"--reward {THREE} --norm joint"),
    "pairwise judge": (36, "--reward preference --judge noisy"),
    "pointwise judge": (36, "--reward judge --judge noisy"),
    "pointwise judge, 14 times": (36, "--reward judge_often --judge noisy"),
    "lim": (36, SANA),
    "lim, LDAM": (36, SANA + " --ldam geneval:4-6 --ldam-leap 0 --ldam-falls 2"),
    "jpeg alone": (72, "--reward jpeg_compressibility --lr 3e-4"),
}
CLAIMS = [                                # better, worse, in what, where
    ("three rewards", "without SFT", "mean", "DeepGen table 7"),
    ("three rewards", "without KL", "mean", "DeepGen table 7"),
    ("three rewards", "joint norm", "mean", "DeepGen table 7"),
    ("three rewards, alone", "joint norm, alone", "mean", "the same, no KL, no SFT"),
    ("fast", "T 4", "score", "as few steps as still draw"),
    ("fast", "T 20", "score", "Flow-GRPO: few steps suffice"),
    ("fast", "window 2", "score", "design of the default"),
    ("fast", "window 9", "score", "design of the default"),
    ("cps", "fast", "score", "DeepGen section 3.3"),
    ("fast", "dance", "score", "Flow-GRPO: right marginals"),
    ("pairwise judge", "pointwise judge", "score", "DeepGen, Pref-GRPO"),
    ("pairwise judge", "pointwise judge, 14 times", "score", "as many questions"),
    ("lim, LDAM", "lim", "score", "ParaUni, algorithm 1"),
]


class NoisyJudge:
    """Answers as a VLM would that sees how right an image is, 0 to 1, through noise of its own at
    every look, and prefers what it is shown first. Stands in for the classroom's VLM, which gives
    the same answer in whatever order it is shown two images (LOG.md)."""

    NOISE, BIAS = 0.5, 0.3

    def __init__(self, prompts, seed):
        self.metas = {m["prompt"]: m for m in read_prompts(prompts)}
        self.rng, self.known = np.random.default_rng(seed), {}

    def worth(self, image, prompt):
        at = image.tobytes(), prompt
        if at not in self.known:
            self.known[at] = check(image, self.metas[prompt])["partial"]
        return self.known[at] + self.NOISE * self.rng.standard_normal()

    def __call__(self, questions):
        answers = []
        for images, text in questions:
            seen = [self.worth(x, re.search('for the prompt "(.*?)"', text)[1]) for x in images]
            answers.append(str(round(1 + 4 * min(1, max(0, seen[0])))) if len(seen) == 1 else
                           "first" if seen[0] + self.BIAS > seen[1] else "second")
        self.known = {k: v for k, v in list(self.known.items())[-1000:]}
        return answers


def judge_often(images, metas, judge):
    """Pointwise, asked as often as `preference` asks of each image."""
    G = sum(m["group"] == metas[0]["group"] for m in metas)
    return torch.stack([judge_py.judge(images, metas, judge) for _ in range(2 * (G - 1))]).mean(0)


def evaluate(init, out):
    """Held-out images of a checkpoint -> out/rewards.npy (P,4,4), right and THREE; results.json"""
    done = model.Unified.load(init)
    rows = read_prompts(PROMPTS / "eval.jsonl")
    images = draw_images(done.draw, rows, range(len(rows)), 4)                   # (P,4,64,64,3)
    results, right = summary(rows, images)
    flat = torch.from_numpy(images.reshape(-1, *images.shape[2:])).permute(0, 3, 1, 2)
    R = score(flat, [r for r in rows for _ in range(4)], read_weights(THREE)).values
    (out / "results.json").write_text(json.dumps(results, indent=1))
    np.save(out / "rewards.npy", np.concatenate([right[..., None], R.view(*right.shape, 3)], 2))


def run_arm(arm, seed, out):
    steps, flags = ARMS[arm]
    rewards.REWARDS["judge_often"] = judge_often
    if "--judge noisy" in flags:
        noisy = NoisyJudge(grpo.Args().prompts, seed)
        judge_py.Judge.ask_all = lambda self, questions: noisy(questions)
    # Evaluated once, below, and its base once for all arms.
    eval_py.bench_shapes = lambda *_, **__: dict(score=0.0, extra_rate=0.0, jpeg_kb=0.0)
    eval_py.show_table = lambda *_: None
    flags = {name[2:].replace("-", "_"): x for name, x in zip(*[iter(flags.split())] * 2)}
    sys.argv = ["grpo.py", *told(grpo.Args, dict(
        out=out, seed=seed, steps=steps, eval_every=10000, lr=1.6e-4) | flags, out)]
    grpo.main()
    evaluate(out, out)


def table(out, seeds, arms):
    """Arms beside their base, the claims about them with their verdicts, as markdown."""
    rows = read_prompts(PROMPTS / "eval.jsonl")

    def read(name, file):
        return [json.loads(f.read_text()) if f.suffix == ".json" else np.load(f)
                for f in (out / f"seed{s}" / folder(name) / file for s in range(seeds))]
    bases = {name: np.load(out / name / "rewards.npy") for name in ("base", "base-sana")}
    values = {}                                            # arm: right, gains (P,seeds,4) each
    print("| arm | updates | seconds | score | mean gain | extra | diversity | kB | each seed |\n"
          "|" + "---|" * 9)
    for arm in ["base", "base-sana", *arms]:
        base = bases["base-sana" if "sana" in ARMS.get(arm, (0, arm))[1] else "base"]
        if arm in bases:
            R, results = base[:, None], [json.loads((out / arm / "results.json").read_text())]
        else:
            R, results = np.stack(read(arm, "rewards.npy"), 1), read(arm, "results.json")
            logs = [[json.loads(x) for x in (out / f"seed{s}" / folder(arm) / "log.jsonl").open()]
                    for s in range(seeds)]
        # What THREE have gained, in standard deviations of the base's images, on average.
        gains = ((R - base[:, None]) / base.std((0, 1)))[..., 1:].mean(3)
        values[arm] = dict(score=R[..., 0], mean=gains)
        seconds = "" if arm in bases else f"{np.mean([log[-1]['at'] for log in logs]):.0f}"
        cells = [mean_and_error(v.reshape(len(rows), -1), rows) for v in (R[..., 0], gains)]
        print(f"| {arm} | {ARMS[arm][0] if arm in ARMS else ''} | {seconds} | "
              + " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in cells) + " | "
              + " | ".join(f"{np.mean([r[k] for r in results]):.3f}"
                           for k in ("extra_rate", "diversity", "jpeg_kb")) + " | "
              + " ".join(f"{r['score']:.3f}" for r in results) + " |")
        if "LDAM" in arm:
            noisy = [sum(r.get("ldam", 0) for r in log) for log in logs]
            leaps = [max(b["grad_norm"] / a["grad_norm"] for a, b in zip(log[1:], log[2:]))
                     for log in logs]
    print("\n| claim | in | difference | verdict |\n|---|---|---|---|")
    for better, worse, what, where in (c for c in CLAIMS if {*c[:2]} <= {*arms}):
        mean, error, verdict = difference(values[better][what], values[worse][what], rows)
        print(f"| {better} > {worse} ({where}) | {what} | {mean:+.3f} ± {error:.3f} | {verdict} |")
    if "lim, LDAM" in arms:
        print(f"\nLDAM: noisy updates of each run {noisy}; from update to update the gradient "
              f"norm grew at most {max(leaps):.1f} times, where the paper's gate wants 100.")


def main():
    a = command_line(__doc__, ARMS, "out/ablations")
    if a.arm:
        return run_arm(a.arm, a.seed, a.out / f"seed{a.seed}" / folder(a.arm))
    for name, init in (("base", "data/shapes/sft"), ("base-sana", "data/shapes/sana/sft")):
        if not (a.out / name / "rewards.npy").exists():
            (a.out / name).mkdir(parents=True, exist_ok=True)
            evaluate(init, a.out / name)
    run_all(__file__, a.out, [a.arms], a.seeds, "rewards.npy")
    table(a.out, a.seeds, a.arms)


if __name__ == "__main__":
    main()
