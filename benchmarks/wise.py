"""WISE (arXiv 2503.07265), whose prompts need knowledge of the world. The protocol is that of the
papers, WiScore of three marks; a release of WISE_Verified, which has one mark, is refused: its
numbers do not compare.
"""

import re

from benchmarks import About
from benchmarks.release import fill, json_of, template
from benchmarks.tables import weighted

ABOUT = About("{id}.png", "prompts that need knowledge of the world", 1000,
              "github.com/PKU-YuanGroup/WISE (its WISE_legacy, or from before 2026)",
              "GPT-4o-2024-05-13", 1000, tokens=2000, text_first=True)
FILES = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")
LAST = dict(culture=400, time=567, space=700, biology=800, physics=900, chemistry=1000)
WEIGHTS = dict(culture=0.4, time=0.167, space=0.133, biology=0.1, physics=0.1, chemistry=0.1)
MARKS = ("consistency", "realism", "aesthetic quality")


def items(release):
    files = "WISE_legacy/gpt_eval.py", "gpt_eval.py"
    ask = template(release, "Aesthetic Quality (0-2)", *files)
    system = template(release, "quality audit expert", *files)
    rows = [row for file in FILES for row in json_of(
        release, f"WISE_legacy/data/{file}", f"data/{file}")]
    return [dict(id=str(r["prompt_id"]), prompt=r["Prompt"], system=system, text=fill(ask, **{
        "prompt_data['Prompt']": r["Prompt"], "prompt_data['Explanation']": r["Explanation"]}),
        tag=next(t for t, last in LAST.items() if r["prompt_id"] <= last)) for r in rows]


def questions(item, image):
    return dict(marks=([image], item["text"]))


def read(item, name, answer):
    found = dict(re.findall(rf"({'|'.join(MARKS)})[\s:*]*([0-2])\b", answer.lower()))
    return [int(found[m]) for m in MARKS] if len(found) == len(MARKS) else None


def verdict(item, values):
    c, r, a = values["marks"]
    return dict(score=(0.7 * c + 0.2 * r + 0.1 * a) / 2, consistency=c, realism=r, aesthetic=a)


def table(rows):
    """WiScore in [0,1]: the six categories' by their weights; without one of them none."""
    return weighted(rows, "score", WEIGHTS)
