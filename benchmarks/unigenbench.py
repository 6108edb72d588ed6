"""UniGenBench (Pref-GRPO, arXiv 2508.20751): prompts of several test points, of ten dimensions.

`score` is the share of test points that are shown, `dimensions` the mean of the ten dimensions,
whose parts alone the official script prints.
"""

import ast
import json
import re

from benchmarks import About
from benchmarks.release import assigned, field, fill, table_of, template
from benchmarks.tables import metrics, per_tag

ABOUT = About("{id}_{k}.png", "test points of ten dimensions", 2400,
              "github.com/CodeGoat24/UniGenBench",
              "Gemini-2.5-Pro, or UniGenBench-EvalModel-qwen-72b-v1", 2400, n=4, tokens=4096)


def items(release):
    ask = template(release, "「{prompt}」", "eval/gemini_en_eval.py")
    means = assigned(release, "explanation_dict", "eval/gemini_en_eval.py")
    found = []
    for row in table_of(release, "data/test_prompts_en.csv"):
        about = json.loads(field(row, "sub_dims_en", "sub_dims"))
        points, said = about["Testpoints"], about["Testpoint Description"]
        prompt = field(row, "prompt_en", "prompt")
        told = [f"Checkpoints {what}:「" + "".join(f"\n{p}: {t}" for p, t in zip(points, texts))
                + "\n」" for what, texts in (("Defination", [means.get(p, "") for p in points]),
                                            ("Description", said))]
        text = fill(ask, prompt=prompt, testpoint=points, explanation=told[0],
                    test_explanation=told[1])
        found.append(dict(id=str(int(row["index"])), prompt=prompt, tag="", points=points,
                          text=text))
    return found


def questions(item, image):
    return dict(points=([image], item["text"]))


def read(item, name, answer):
    found = re.search(r"<score>(.*?)</score>", answer, re.S)
    try:
        scores = ast.literal_eval(found[1].strip())
        return [{0: 0.0, 1: 1.0}[s] for s in scores] if len(scores) == len(item["points"]) else None
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        return None


def verdict(item, values):
    return dict(score=sum(values["points"]) / len(values["points"]), points=[
        *zip([p.split("-")[0].strip() for p in item["points"]], values["points"])])


def table(rows):
    """In percent."""
    points = [dict(prompt=r["prompt"], tag=tag, right=right) for r in rows if "points" in r
              for tag, right in r["points"]]
    return (metrics(points, 100, score="right", dimensions=("right", True))
            | per_tag(points, "right", 100))
