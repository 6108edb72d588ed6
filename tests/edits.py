"""What RL on edits gains, and UniPic 2.0's two tables. Not a test: about an hour on two cores.

    python tests/edits.py --out out/edits     # two runs side by side, one core each

Cycle Edit RL beside its control rows (continued fine-tuning, shuffled rewards), UniPic 2.0's table
4 (no RL, drawing only, editing only, PDTR: editing then drawing) and table 2 (who is shown the
references). An arm is sft.py, grpo.py or cycle_edit.py itself, called as a user would; within a
seed all see the same sources, prompts and noise. Judged on 300 held-out edits and 360 prompts,
without guidance. A claim is judged as in bridges.py. What is done in --out is not done again.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from bridges import command_line, difference, folder, run_all

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import cycle_edit  # noqa: E402
import eval as eval_py  # noqa: E402
import grpo  # noqa: E402
import model  # noqa: E402
import sft  # noqa: E402
from common.draw import draw_edits  # noqa: E402
from data.shapes.world import render  # noqa: E402
from common.read import arrays  # noqa: E402
from common.show import mean_and_error  # noqa: E402
from data.shapes.bench import PROMPTS, draw_images, summary  # noqa: E402
from data.shapes.edits import check_edit  # noqa: E402
from rewards.prompts import read_prompts  # noqa: E402

BASE, DRAWS = "data/shapes/sft-edit", "data/shapes/sft"
EDITS = "--edits data/shapes/edits --edit-share"
# arm: what it goes on from, script, updates, flags. Where that is another arm, its own seed's.
ARMS = {
    "cycle": (BASE, cycle_edit, 150, ""),
    "edit": (BASE, cycle_edit, 120, "--reward edit"),
    "T2I": (BASE, grpo, 60, "--lr 1.6e-4"),
    "fine-tuning": (BASE, sft, 900, EDITS + " 0.75 --lr 2e-4"),
    "cycle, shuffled": (BASE, cycle_edit, 150, "--shuffle"),
    "edit, then T2I": ("edit", grpo, 60, "--lr 1.6e-4"),
    "both": (DRAWS, sft, 300, EDITS + " 1 --refs both"),
    "VLM": (DRAWS, sft, 300, EDITS + " 1 --refs vlm"),
    "DiT": (DRAWS, sft, 300, EDITS + " 1 --refs dit"),
}
CLAIMS = [                                # better, worse, in what, where
    ("cycle", "base", "edits", "UniRL-Zero: Cycle Edit RL"),
    ("cycle", "fine-tuning", "edits", "the same, beside the controls"),
    ("cycle", "cycle, shuffled", "edits", "the same, beside the controls"),
    ("edit", "base", "edits", "UniPic 2.0 table 4: 6.59 > 6.31"),
    ("edit", "base", "draws", "UniPic 2.0 table 4: equal, .83"),
    ("T2I", "base", "edits", "UniPic 2.0 table 4: 6.40 > 6.31"),
    ("T2I", "base", "draws", "UniPic 2.0 table 4: .87 > .83"),
    ("edit, then T2I", "T2I", "draws", "UniPic 2.0 table 4: .89 > .87"),
    ("edit, then T2I", "T2I", "edits", "UniPic 2.0 table 4: 6.59 > 6.40"),
    ("edit, then T2I", "edit", "edits", "UniPic 2.0 table 4: equal, 6.59"),
    ("both", "DiT", "edits", "UniPic 2.0 table 2: 6.90 > 6.40"),
    ("DiT", "VLM", "edits", "UniPic 2.0 table 2: 6.31 > 5.00"),
]


def evaluate(init, out):
    """Of a checkpoint -> out/edits.npy (P,2) success, preservation; out/draws.npy (P,2) right."""
    done = model.Unified.load(init)
    rows = read_edits()
    images = [[torch.from_numpy(render(row["source"])).permute(2, 0, 1)] for row in rows]
    edited = torch.cat([draw_edits(done, [row["instruction"] for row in rows[i : i + 64]],
                                  images[i : i + 64], range(i, min(i + 64, len(rows))))
                        for i in range(0, len(rows), 64)])
    judged = [check_edit(x, row) for x, row in zip(arrays(edited.cpu()), rows)]
    prompts = read_prompts(PROMPTS / "eval.jsonl")
    drawn = draw_images(done.draw, prompts, range(len(prompts)), 2)
    np.save(out / "draws.npy", summary(prompts, drawn)[1])
    np.save(out / "edits.npy", [[v["success"], v["preservation"]] for v in judged])


def read_edits():
    rows = [json.loads(x) for x in (PROMPTS / "edit_eval.jsonl").read_text().splitlines()]
    return [dict(row, tag=row["kind"], prompt=str(i)) for i, row in enumerate(rows)]


def run_arm(arm, seed, out):
    start, script, steps, flags = ARMS[arm]
    # Evaluated once, below, and its base once for all arms.
    for module in (cycle_edit, grpo):
        module.bench_shapes = lambda *_, **__: dict(
            score=0.0, score_se=0.0, extra_rate=0.0, jpeg_kb=0.0)
    eval_py.show_table = lambda *_: None
    cycle_edit.bench_edit = lambda *_, **__: dict(both=0.0, success=0.0, preservation=0.0)
    start = out.parent / folder(start) if start in ARMS else start
    sys.argv = [script.__name__, "--init", str(start), "--out", str(out), "--seed", str(seed),
                "--steps", str(steps), "--eval-every", "10000", *flags.split()]
    script.main()
    evaluate(out, out)


def table(out, seeds, arms):
    """Arms beside their base, the claims about them with their verdicts, as markdown."""
    units = dict(edits=read_edits(), draws=read_prompts(PROMPTS / "eval.jsonl"))
    values = {}                      # arm: edits' linear part of the root (P,seeds,1), draws' right
    print("| arm | minutes | success | preservation | root of the product | drawing | each seed |\n"
          "|" + "---|" * 7)
    for arm in ["base", *arms]:
        homes = [out / "base"] if arm == "base" else [
            out / f"seed{s}" / folder(arm) for s in range(seeds)]
        edits, draws = (np.stack([np.load(home / f"{k}.npy") for home in homes], 1) for k in units)
        s, p = edits.mean((0, 1))
        # The root's error is that of its linear part, as in edit_table.
        root = (p * edits[..., :1] + s * edits[..., 1:]) / (2 * (s * p) ** 0.5 or 1)
        values[arm] = dict(edits=root, draws=draws)
        each = [np.sqrt(np.prod(edits[:, i].mean(0))) for i in range(len(homes))]
        cells = [mean_and_error(x.reshape(len(x), -1), units[k])
                 for k, x in (("edits", edits[..., 0]), ("edits", edits[..., 1]), ("edits", root),
                              ("draws", draws))]
        minutes = "" if arm == "base" else "%.1f" % np.mean(
            [json.loads((h / "log.jsonl").read_text().splitlines()[-1])["at"] / 60 for h in homes])
        print(f"| {arm} | {minutes} | " + " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in cells)
              + " | " + " ".join(f"{x:.3f}" for x in each) + " |")
    print("\n| claim | in | difference | verdict |\n|---|---|---|---|")
    for better, worse, what, where in (c for c in CLAIMS if {*c[:2]} <= {"base", *arms}):
        a, b = values[better][what], values[worse][what]
        mean, error, verdict = difference(a, np.broadcast_to(b, a.shape), units[what])
        if "equal" in where:
            verdict = "reproduced" if abs(mean) <= 2 * error else "not reproduced"
        print(f"| {better} > {worse} ({where}) | {what} | {mean:+.3f} ± {error:.3f} | {verdict} |")


def main():
    a = command_line(__doc__, ARMS, "out/edits")
    if a.arm:
        return run_arm(a.arm, a.seed, a.out / f"seed{a.seed}" / folder(a.arm))
    if not (a.out / "base/edits.npy").exists():
        (a.out / "base").mkdir(parents=True, exist_ok=True)
        evaluate(BASE, a.out / "base")
    waiting = [arm for arm in a.arms if ARMS[arm][0] in ARMS]            # for another arm's end
    run_all(__file__, a.out, [[arm for arm in a.arms if arm not in waiting], waiting], a.seeds,
            "edits.npy")
    table(a.out, a.seeds, a.arms)


if __name__ == "__main__":
    main()
