"""RISEBench (arXiv 2504.02826): edits that need reasoning. A picture is right where each mark that
applies to it is 5; `score` is the share of right ones, as since the scorer was corrected in 2026.
"""

from benchmarks import About
from benchmarks.drawing import source_array
from benchmarks.release import assigned, fill, final_score, json_of, located
from benchmarks.tables import metrics, per_tag

ABOUT = About("images/{tag}/{id}.png", "edits that need reasoning", 360,
              "github.com/PhoenixZ810/RISEBench with data.zip, unpacked, and the .json of "
              "huggingface.co/datasets/PhoenixZ/RISEBench in data/", "GPT-4.1", 1000, tokens=4096,
              edits=True, text_first=True, longest=768)


# A category's templates in utils.py: of consistency, reasoning and quality, `prompt_` left out.
TEXTS = dict(temporal="consist reasoning generation", causal="consist reasoning generation",
             spatial="spatial_cons spatial_ref spatial_qual", logical="logical_cons logical_img")


def items(release):
    rows = json_of(release, "data/datav2_total_w_subtask.json", "data/data_total.json")
    texts = {name: assigned(release, f"prompt_{name}", "utils.py") for name in (
        *" ".join(TEXTS.values()).split(), "reasoning_w_input", "spatial_ref_w_input",
        "spatial_ref_img", "logical_txt", "logical_cons_ans", "logical_img_wo_q")}
    home, found = located(release, "data"), []
    alone = any("reasoning_wo_ins" in row for row in rows)      # as there: of all, if of one
    for row in rows:
        kind, image, text = row["category"].split("_")[0], row.get("reference_img"), row.get(
            "reference_txt")
        names = TEXTS[kind].split()
        if kind == "logical":
            image, names = (None, ["logical_cons_ans", "logical_txt"]) if text else (
                image, ["logical_cons", "logical_img_wo_q" if alone else "logical_img"])
        elif kind == "spatial" and image:
            names[1] = "spatial_ref_img"
        elif row.get("reasoning_img"):
            names[1] += "_w_input"
        asked = {what: fill(texts[name], instruct=row["instruction"],
                            reference=text or row.get("reference"))
                 for what, name in zip(("consistency", "reasoning", "quality"), names)
                 if what != "consistency" or not row.get("consistency_free")}
        by_image = kind in ("spatial", "logical") and image
        found.append(dict(
            id=str(row["index"]), prompt=row["instruction"], tag=row["category"], asked=asked,
            source=home / row["image"], before=home / (image if by_image else row["image"]),
            beside=bool(by_image or kind != "logical" and row.get("reasoning_img"))))
    return found


def questions(item, image):
    both = [source_array(item, "before"), image]
    shown = dict(consistency=both, reasoning=both if item["beside"] else [image], quality=[image])
    return {what: (shown[what], text) for what, text in item["asked"].items()}


def read(item, name, answer):
    """Logical marks are 0 or 1, which count as 1 and 5."""
    logical = item["tag"].startswith("logical")
    mark = final_score(answer, 0 if logical else 1, 1 if logical else 5)
    return mark if mark is None or not logical else 4 * mark + 1


def verdict(item, values):
    weights = dict(consistency=0.3, reasoning=0.5, quality=0.2)
    if item["tag"].startswith("logical"):
        weights = dict(consistency=0.3, reasoning=0.7)
    elif "consistency" not in values:
        weights = dict(reasoning=0.8, quality=0.2)
    marks = sum(w * values[k] for k, w in weights.items())
    if values["reasoning"] == 1:
        marks = max(1, marks / 2)
    return values | dict(marks=25 * (marks - 1), score=float(all(v == 5 for v in values.values())))


def table(rows):
    """In percent of all pictures; `marks` is the weighted mark, 0 to 100."""
    return (metrics(rows, 100, score="score") | metrics(rows, marks="marks")
            | per_tag(rows, "score", 100, lambda tag: tag.split("_")[0]))
