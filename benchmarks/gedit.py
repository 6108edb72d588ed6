"""GEdit-Bench, English (Step1X-Edit, arXiv 2504.17761): edits that users asked for, by VIEScore: is
it done, and is nothing else changed (SC, the lower of two marks), does it look real (PQ).

Departs from the official scorer where an answer cannot be read: there a mark is guessed, here the
picture is not scored.
"""

import io
import json
import math
from functools import partial

import numpy as np
from PIL import Image

from benchmarks import About
from benchmarks.drawing import source_array
from benchmarks.release import assigned, records_of
from benchmarks.tables import metrics, per_tag

ABOUT = About("fullset/{tag}/en/{id}.png", "edits that users asked for, English", 606,
              "github.com/stepfun-ai/Step1X-Edit with huggingface.co/datasets/stepfun-ai/"
              "GEdit-Bench in GEdit-Bench/", "GPT-4.1, or Qwen2.5-VL-72B", 1212, edits=True,
              text_first=True)


def items(release):
    text = {name: assigned(release, f"_{name}", "GEdit-Bench/viescore/vie_prompts.py") for name in (
        "context_no_delimit", "prompts_0shot_two_image_edit_rule", "prompts_0shot_tie_rule_SC",
        "prompts_0shot_rule_PQ")}
    context, rule, sc, pq = text.values()
    return [dict(id=row["key"], prompt=row["instruction"], tag=row["task_type"],
                 source=row["input_image_raw"]["bytes"], PQ="\n".join([context, pq]),
                 SC="\n".join([context, rule, sc]).replace("<instruction>", row["instruction"]))
            for row in records_of(release, "GEdit-Bench/GEdit-Bench", "GEdit-Bench", ".")
            if row["instruction_language"] == "en"]


def files(item):
    return {f"fullset/{item['tag']}/en/{item['id']}_SRCIMG.png": partial(source_png, item)}


def source_png(item):
    png = io.BytesIO()
    Image.fromarray(source_array(item)).save(png, "PNG")
    return png.getvalue()


def questions(item, image):
    """Both pictures are shown as the official scorer shows them."""
    source, edited = map(seen, (source_array(item), image))
    return dict(SC=([source, edited], item["SC"]), PQ=([edited], item["PQ"]))


def seen(image):
    """(H,W,3) -> in its own shape, as many pixels as 512 x 512 have"""
    width = math.sqrt(512 * 512 * image.shape[1] / image.shape[0])
    height = width * image.shape[0] / image.shape[1]
    return np.array(Image.fromarray(image).resize((int(width), int(height))))


def read(item, name, answer):
    try:
        marks = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])["score"]
        marks = marks if isinstance(marks, list) else [marks]
        return float(min(marks)) if all(0 <= m <= 10 for m in marks) else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def verdict(item, values):
    return values | dict(score=math.sqrt(values["SC"] * values["PQ"]))


def table(rows):
    """Marks in [0,10]: the means of the eleven kinds' means."""
    return metrics(rows, score=("score", True), SC=("SC", True), PQ=("PQ", True)) | per_tag(
        rows, "score")
