"""What RL of the language model gains, alone and together with the DiT. Not a test: four hours.

    python tests/words.py --out out/words     # two runs side by side, one core each

UniRL-Zero's scenarios 1, 2, 5 and 6 beside their control rows (no RL, shuffled rewards), who has to
learn (lm, dit, both), and its warning that an autoregressive loss on the language model unlearns
understanding. An arm is reflect.py or sft.py itself, called as a user would; scenarios 5
and 6 go on from the cold starts of README's table, made once. Judged by the script's own benchmark
at its end, row by row, and at temperature 0 as well. A claim is judged as in bridges.py. What is
done in --out is not done again.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
from bridges import command_line, difference, folder, run_all
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data.shapes.talk as talk_py  # noqa: E402
import model  # noqa: E402
import reflect  # noqa: E402
import sft  # noqa: E402
from common.draw import draw_thinking  # noqa: E402
from data.shapes.talk import PICTURE_KINDS  # noqa: E402
from common.show import mean_and_error  # noqa: E402

STARTS = {                                # cold start: what it goes on from, flags
    "cot-start": "--task cot --init data/shapes/sft",
    "reflect-start": "--task reflect --init data/shapes/sft-edit",
}
COLD = "--lr 2e-4 --steps 900"
# arm: what is asked, script, cold start, flags. No RL: no step of it.
ARMS = {
    "text": ("textqa", reflect, "", "--task text"),
    "text, shuffled": ("textqa", reflect, "", "--task text --shuffle"),
    "vqa": ("vqa", reflect, "", "--task vqa"),
    "vqa, shuffled": ("vqa", reflect, "", "--task vqa --shuffle"),
    "cot": ("reason", reflect, "cot-start", "--task cot"),
    "cot, no KL": ("reason", reflect, "cot-start", "--task cot --steps 60 --lm-beta 0"),
    "cot, shuffled": ("reason", reflect, "cot-start", "--task cot --shuffle"),
    "cot, lm": ("reason", reflect, "cot-start", "--task cot --train lm"),
    "cot, dit": ("reason", reflect, "cot-start", "--task cot --train dit"),
    "reflect": ("reflect", reflect, "reflect-start", ""),
    "reflect, shuffled": ("reflect", reflect, "reflect-start", "--shuffle"),
    "cold start, AR loss": ("vqa", sft, "", COLD + " --task reflect --init data/shapes/sft-edit "
                            "--lm-loss 1"),
}
NONE = {"textqa": ("", reflect, "--task text"), "vqa": ("", reflect, "--task vqa"),
        "reason": ("cot-start", reflect, "--task cot"), "reflect": ("reflect-start", reflect, "")}
COLUMNS = {"textqa": ["accuracy", "greedy accuracy", "words"],
           "vqa": ["accuracy", "greedy accuracy", *PICTURE_KINDS],
           "reason": ["raw", "score", "greedy score", "answer", "format", "words"],
           "reflect": (looked := ["accuracy", "caught", "spared", "corrected", "damaged", "score",
                                  "words"]),
           "reflect_known": [f"known {name}" for name in looked]}
CLAIMS = [                                # better, worse, in what
    *[(arm, base, name) for arm, name in [("text", "accuracy"), ("text", "greedy accuracy"),
                                          ("vqa", "accuracy"), ("vqa", "greedy accuracy"),
                                          ("cot", "score"), ("cot", "greedy score"),
                                          ("reflect", "accuracy"), ("reflect", "corrected"),
                                          ("reflect", "score"),
                                          ("reflect", "known accuracy"),
                                          ("reflect", "known corrected")]
      for base in ("no RL", f"{arm}, shuffled")],
    ("no RL", "reflect", "damaged"), ("no RL", "reflect", "known damaged"),
    ("cot", "no RL", "score over raw"), ("cot", "cot, lm", "score"), ("cot", "cot, dit", "score"),
    ("cold start, AR loss", "no RL", "accuracy"), ("cold start, AR loss", "no RL",
                                                   "greedy accuracy"),
]


def judge(what, init, temperature, n=1):
    """A checkpoint's words, n answers to each question or prompt: word_table gets the columns."""
    done = model.Unified.load(init)
    if what == "reason":
        talk_py.bench_think(done.draw, partial(draw_thinking, done, temperature=temperature), n)
    elif what != "reflect":                               # which is greedy already
        talk_py.bench_answer(lambda questions, images, seeds: done.generate(
            questions, images, "answer", 32, temperature, keys=seeds).texts, what, n)


def run_arm(what, script, init, flags, out, seed):
    """-> out/scores.npz: what is measured in the end, each column (P n,) of n for each of P rows"""
    kept, of, real, again = {}, [], talk_py.word_table, talk_py.bench_reflect

    def keep(rows, **columns):
        kept.update({" ".join([*of, name]): np.array(x, float) for name, x in columns.items()})
        return real(rows, **columns)

    def known(*inputs, **more):                           # bench_reflect calls itself for those
        of.append("known")
        return again(*inputs, **more), of.pop()
    talk_py.word_table, talk_py.bench_reflect = keep, lambda *a, **k: known(*a, **k)[0]
    flags = flags.split() + (["--init", init] if init else [])
    flags += ["--final-bench"] * (script is reflect)      # also after no step
    sys.argv = [script.__name__, *flags, "--out", str(out), "--seed", str(seed)]
    script.main()
    if script is sft:                                     # which has no such benchmark
        judge(what, out, 1.0, 4)
    of.append("greedy")
    judge(what, out if "--steps 0" not in " ".join(flags) else init or "data/shapes/sft", 0)
    np.savez(out / "scores.npz", **kept)


def rows_of(what):
    rows, _ = talk_py.choose(what, 1, None)
    return rows if what.startswith("re") else [        # of questions, each is its own unit
        dict(row, prompt=str(i)) for i, row in enumerate(rows)]


def table(out, seeds, arms):
    """Arms beside no RL, the claims about them with their verdicts, as markdown."""
    for what, columns in COLUMNS.items():
        rows, runs, asked = rows_of(what), {}, what.removesuffix("_known")
        of = {name: [row for row in rows if row["tag"] == name] or rows for name in columns}
        print(f"\n| {what} | minutes | " + " | ".join(columns) + " | each seed |\n"
              + "|---" * (len(columns) + 3) + "|")
        for arm in ["no RL", *(arm for arm in arms if ARMS[arm][0] == asked)]:
            homes = [out / folder(f"no RL {asked}")] if arm == "no RL" else [
                out / f"seed{s}" / folder(arm) for s in range(seeds)]
            homes = [home for home in homes if (home / "scores.npz").exists()]
            if not homes:
                continue
            files = [np.load(home / "scores.npz") for home in homes]
            run = runs[arm] = {name: np.stack([f[name].reshape(len(mine), -1) for f in files], 1)
                               for name, mine in of.items()}                     # (P,seeds,n)
            if what == "reason":
                run["score over raw"] = run["raw" if arm == "no RL" else "score"]
            minutes = "" if arm == "no RL" else "%.1f" % np.mean(
                [json.loads((home / "log.jsonl").read_text().splitlines()[-1])["at"] / 60
                 for home in homes])
            cells = ["%.3f ± %.3f" % mean_and_error(run[name].reshape(len(mine), -1), mine)
                     for name, mine in of.items()]
            first = columns[what == "reason"]
            each = [mean_and_error(run[first][:, s], rows)[0] for s in range(len(homes))]
            print(f"| {arm} | {minutes} | " + " | ".join(cells) + " | "
                  + " ".join(f"{x:.3f}" for x in each) + " |")
        print("\n| claim | in | difference | verdict |\n|---|---|---|---|")
        for better, worse, name in CLAIMS:
            if name in runs.get(better, ()) and name in runs.get(worse, ()):
                a, b = runs[better][name], runs[worse][name]
                if 1 in (a.shape[1], b.shape[1]):
                    a, b = np.broadcast_arrays(a, b)
                both = min(a.shape[1], b.shape[1])
                print(f"| {better} > {worse} | {name} | %+.3f ± %.3f | %s |" % difference(
                    a[:, :both], b[:, :both], rows))


def curves(out, seeds):
    """Like UniRL-Zero's figures 3 and 8: rewards, lengths and held-out scores while RL runs."""
    panels = [("cot", "reward_geneval", "reward of the drawing (partial credit)"),
              ("cot", "words", "tokens of reasoning"), ("cot", "score", "held out: drawn right"),
              ("reflect", "reward_verdict", "reward of the verdict"),
              ("reflect", "accuracy", "held out: judge accuracy"),
              ("reflect", "corrected", "held out: wrong pictures corrected"),
              ("text", "reward_answer", "reward: words"), ("vqa", "reward_answer",
                                                           "reward: pictures"),
              ("vqa", "score", "held out: pictures")]
    fig, axes = plt.subplots(3, 3, figsize=(11, 8))
    for ax, (arm, name, title) in zip(axes.flat, panels):
        for kind, color in ((arm, "C0"), (f"{arm}, shuffled", "C7")):
            for s in range(seeds):
                file = out / f"seed{s}" / folder(kind) / "log.jsonl"
                if file.exists():
                    rows = [json.loads(x) for x in file.read_text().splitlines()]
                    x, y = zip(*[(r["step"], r[name]) for r in rows if name in r])
                    if len(y) > 100:                      # of every update: means of ten
                        x, y = x[9::10], np.mean(np.reshape(y[: len(y) // 10 * 10], (-1, 10)), 1)
                    ax.plot(x, y, color, lw=1, label=kind if s == 0 else None)
        ax.set_title(f"{arm}: {title}", fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("update")
    fig.tight_layout()
    fig.savefig(out / "words.png", dpi=90)


def main():
    a = command_line(__doc__, ARMS, "out/words")
    if a.arm:
        what, script, start, flags = ARMS[a.arm]
        return run_arm(what, script, start and str(a.out / start), flags,
                       a.out / f"seed{a.seed}" / folder(a.arm), a.seed)
    for name, flags in STARTS.items():
        if not (a.out / name / "curves.png").exists():
            subprocess.run([sys.executable, ROOT / "sft.py", *flags.split(), *COLD.split(),
                            "--out", a.out / name], check=True)
    for what, (start, script, flags) in NONE.items():
        home = a.out / folder(f"no RL {what}")
        if not (home / "scores.npz").exists():
            run_arm(what, script, start and str(a.out / start), flags + " --steps 0", home, 0)
    run_all(__file__, a.out, [a.arms], a.seeds, "scores.npz")
    curves(a.out, a.seeds)
    table(a.out, a.seeds, list(ARMS))


if __name__ == "__main__":
    main()
