"""RISEBench (arXiv 2504.02826): edits that need reasoning. A picture is right where each mark that
applies to it is the best: 5, of logic 1; `score` is the share of right ones, as since the scorer
was corrected in 2026. Departs from it where a judge's answer gives no mark, or one of logic above
1: there the picture is wrong, or right; here it is not scored, and counted as unparsed.
"""

from benchmarks import About
from benchmarks.drawing import source_array
from benchmarks.release import assigned, fill, final_score, json_of, located
from benchmarks.tables import metrics, per_tag

ABOUT = About("images/{tag}/{id}.png", "edits that need reasoning", 360, "github.com/PhoenixZ810/"
              "RISEBench with huggingface.co/datasets/PhoenixZ/RISEBench, unpacked, in data/",
              "GPT-4.1", 1000, tokens=4096, edits=True, text_first=True, longest=768)


def texts_of(row, alone):
    """-> names of the judge's templates, and the picture that stands beside in the second"""
    kind, beside = row["category"].split("_")[0], row.get("reasoning_img") and row["image"]
    if kind == "logical":
        return ("logical_cons_ans logical_txt", None) if row.get("reference_txt") else (
            "logical_cons logical_img" + "_wo_q" * alone, row["reference_img"])
    if kind == "spatial" and row.get("reference_img"):
        return "spatial_cons spatial_ref_img spatial_qual", row["reference_img"]
    texts = "consist reasoning{} generation" if kind != "spatial" else (
        "spatial_cons spatial_ref{} spatial_qual")
    return texts.format("_w_input" if beside else ""), beside


def items(release):
    rows = json_of(release, "data/datav2_total_w_subtask.json", "data/data_total.json")
    alone = any("reasoning_wo_ins" in row for row in rows)      # as there: of all, if of one
    home, found = located(release, "data"), []
    for row in rows:
        names, beside = texts_of(row, alone)
        asked = {what: fill(assigned(release, f"prompt_{name}", "utils.py"), reference=row.get(
            "reference_txt") or row.get("reference"), instruct=row["instruction"])
            for what, name in zip(("consistency", "reasoning", "quality"), names.split())
            if what != "consistency" or not row.get("consistency_free")}
        found.append(dict(id=str(row["index"]), prompt=row["instruction"], tag=row["category"],
                          source=home / row["image"], before=home / (beside or row["image"]),
                          beside=bool(beside), asked=asked))
    return found


def questions(item, image):
    both = [source_array(item, "before"), image]
    shown = dict(consistency=both, reasoning=both if item["beside"] else [image], quality=[image])
    return {what: (shown[what], text) for what, text in item["asked"].items()}


def read(item, name, answer):
    """A mark of 1 to 5; those of logic are 0 or 1. -> is it the best?"""
    low, high = (0, 1) if item["tag"].startswith("logical") else (1, 5)
    mark = final_score(answer, low, high)
    return None if mark is None else float(mark == high)


def verdict(item, values):
    return values | dict(score=min(values.values()))


def table(rows):
    """In percent: right pictures, of all and by category; best marks, of those that were asked."""
    return (metrics(rows, 100, score="score", consistency="consistency", reasoning="reasoning")
            | per_tag(rows, "score", 100, lambda tag: tag.split("_")[0]))
