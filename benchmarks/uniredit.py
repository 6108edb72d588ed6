"""UniREditBench (arXiv 2511.01295): edits that need reasoning, of the real world and of games,
beside a reference picture.
"""

from benchmarks import About
from benchmarks.drawing import source_array
from benchmarks.release import assigned, fill, final_score, json_of, located
from benchmarks.tables import metrics, per_tag

ABOUT = About("{tag}/{id}.png", "edits that need reasoning, of the world and of games", 2700,
              "github.com/Maplebb/UniREditBench with huggingface.co/datasets/maplebb/UniREditBench "
              "in UniREditBench/, unpacked", "GPT-4.1-2025-04-14", 8100, tokens=4096, edits=True,
              text_first=True, longest=768)
TEXTS = dict(consistency="prompt_consist", reasoning="prompt_reasoning_w_ref_image",
             quality="prompt_generation")


def items(release):
    texts = {what: assigned(release, name, "eval/utils.py") for what, name in TEXTS.items()}
    file = located(release, "UniREditBench/data.json")
    found = []
    for row in json_of(release, "UniREditBench/data.json"):
        told = "\n".join(filter(None, [row.get("rules"), row["instruction"]]))
        found.append(dict(
            id=str(row["idx"]), prompt=row["instruction"], tag=str(row["name"]),
            world="games" if row.get("rules") else "real",
            source=file.parent / row["original_image_path"],
            reference=file.parent / row["reference_image_path"],
            asked={what: fill(text, instruct=told, reference=row.get("reference_effect") or "")
                   for what, text in texts.items()}))
    return found


def questions(item, image):
    source, reference = source_array(item), source_array(item, "reference")
    shown = dict(consistency=[source, image], reasoning=[source, reference, image], quality=[image])
    return {what: (shown[what], text) for what, text in item["asked"].items()}


def read(item, name, answer):
    return final_score(answer, 1, 5)


def verdict(item, values):
    marks = sum(w * values[k] for k, w in dict(consistency=0.3, reasoning=0.5, quality=0.2).items())
    return values | dict(score=25 * (marks - 1), world=item["world"],
                         right=float(all(v == 5 for v in values.values())))


def table(rows):
    """In percent: 25 (mark - 1) of all, the two worlds, each kind; `right`: all marks are 5."""
    worlds = [dict(r, tag=r["world"]) for r in rows if "world" in r]
    return (metrics(rows, score="score") | metrics(rows, 100, right="right")
            | per_tag(worlds, "score") | per_tag(rows, "score"))
