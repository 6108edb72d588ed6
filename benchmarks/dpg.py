"""DPG-Bench (ELLA, arXiv 2403.05135): does a picture show all that a long prompt says?

Departs from the official scorer in its judge: that is mPLUG-large, a VQA model of another library;
here any VLM, which is told to answer yes or no. The first row of the .csv is skipped, as there.
"""

from benchmarks import About
from benchmarks.release import table_of, yes_or_no
from benchmarks.tables import metrics

ABOUT = About("{id}.png", "long prompts, by questions with yes or no", 4260,
              "github.com/TencentQQGYLab/ELLA", "mPLUG-large VQA", 57_000, n=4, tokens=16,
              grid=True)
read = yes_or_no


def items(release):
    found = {}
    for row in table_of(release, "dpg_bench/dpg_bench.csv")[1:]:
        item = found.setdefault(row["item_id"], dict(
            id=row["item_id"], prompt=row["text"], tag="", questions={}, parents={}, kinds={}))
        q = int(row["proposition_id"])
        item["questions"][q] = row["question_natural_language"]
        item["parents"][q] = [int(d) for d in row["dependency"].split(",")]
        item["kinds"][q] = row["tuple"].split("(")[0].split("-")[0].strip().lower()
    return [*found.values()]


def questions(item, image):
    return {q: ([image], f"{text} Answer only yes or no.") for q, text in item["questions"].items()}


def verdict(item, values):
    """A question counts only where those that it depends on were answered yes."""
    right = dict(values)
    for q, parents in item["parents"].items():
        if any(right.get(p, 1) == 0 for p in parents if p):
            right[q] = 0.0
    kinds = {kind: [values[q] for q in values if item["kinds"][q] == kind]
             for kind in item["kinds"].values()}
    return dict(score=sum(right.values()) / len(right), kinds=kinds)


def table(rows):
    """In percent. As there, categories are those of each prompt's last picture, before the rule."""
    last = [r for r in rows if "kinds" in r and r["k"] == max(x["k"] for x in rows)]
    asked = [dict(prompt=r["prompt"], **{kind: v}) for r in last
             for kind, its in r["kinds"].items() for v in its]
    kinds = dict.fromkeys(k for r in asked for k in r if k != "prompt")
    return metrics(rows, 100, score="score") | metrics(asked, 100, **{k: k for k in kinds})
