"""ImgEdit-Bench, the basic suite (arXiv 2505.20275): edits of nine kinds, three marks of 1 to 5.

Departs from the official script where a judge gives fewer than three marks: there the others' mean
counts, here the picture is not scored.
"""

import re

from benchmarks import About
from benchmarks.drawing import source_array
from benchmarks.release import json_of, located
from benchmarks.tables import metrics, per_tag

ABOUT = About("{id}.png", "edits of nine kinds", 737, "github.com/PKU-YuanGroup/ImgEdit with "
              "Benchmark.tar of huggingface.co/datasets/sysuyy/ImgEdit, unpacked", "GPT-4o", 737,
              edits=True, text_first=True)


def items(release):
    one, other = "Benchmark/Basic", "Benchmark/singleturn"
    rows = json_of(release, f"{one}/basic_edit.json", f"{other}/singleturn.json")
    ask = json_of(release, f"{one}/prompts.json", f"{other}/judge_prompt.json")
    home = located(release, other, "original_images", ".")
    return [dict(id=key, prompt=row["prompt"], tag=row["edit_type"], source=home / row["id"],
                 text=ask[row["edit_type"]].replace("<edit_prompt>", row["prompt"]))
            for key, row in rows.items()]


def questions(item, image):
    return dict(marks=([source_array(item), image], item["text"]))


def read(item, name, answer):
    marks = [int(m) for m in re.findall(r"(?m)^[^:\n]*: ([1-5])\s*$", answer.strip())]
    return marks if len(marks) == 3 else None


def verdict(item, values):
    return dict(score=round(sum(values["marks"]) / 3, 2))


def table(rows):
    """Marks in [1,5]: the mean of the nine kinds' means."""
    return metrics(rows, score=("score", True)) | per_tag(rows, "score")
