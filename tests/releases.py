"""Miniature releases of the official benchmarks, in the layouts in which people have them, with a
few words where their templates are: write(name, folder)."""

import csv
import json

import datasets
import numpy as np
from PIL import Image


def picture(path, seed, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, rows[0].keys())
        out.writeheader()
        out.writerows(rows)


def dpg(home):
    def row(item, q, parents, kind, ask):
        return dict(item_id=item, text=f"a long prompt of {item}", keywords="", proposition_id=q,
                    dependency=parents, category_broad="", category_detailed="",
                    tuple=f"{kind} (x, y)", question_natural_language=ask)
    rows(home / "dpg_bench/dpg_bench.csv", [
        row("left out", 1, "0", "entity - whole", "Is it skipped?"),
        row("a", 1, "0", "entity - whole", "Is there a cat?"),
        row("a", 2, "1", "attribute - color", "Is the cat red?"),
        row("a", 3, "1, 2", "relation - spatial", "Is the red cat left of a dog?"),
        row("b", 1, "0", "global", "Is it a photo?")])


def unigenbench(home):
    text(home / "eval/gemini_en_eval.py", '''
def call(args):
    prompt, testpoint = args
    explanation_dict = {"Style": "styles", 'Attribute - Color': 'colours', "Attribute - Size": "s"}
    explanation = ""
    while True:
        system_prompt = f\'\'\'Judge 「{prompt}」 by {testpoint}. {explanation} {test_explanation}
        <prompt>{prompt}</prompt> in square brackets `[]`\'\'\'
''')
    rows(home / "data/test_prompts_en.csv", [
        dict(index=i, prompt_en=f'a "red" cat, {i}', sub_dims_en=json.dumps({
            "Testpoints": points, "Testpoint Description": [f"{p} of it" for p in points]}))
        for i, points in ((0, ["Style", "Attribute - Color"]),
                          (7, ["Attribute - Color", "Attribute - Size"]))])


def wise(home):
    text(home / "gpt_eval.py", '''
def messages(prompt_data):
    return ["You are a quality audit expert.", f"""Aesthetic Quality (0-2): {{}}
PROMPT: "{prompt_data['Prompt']}"
EXPLANATION: "{prompt_data['Explanation']}" """]
''')
    for name, ids in dict(zip(
            ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science"),
            ((1, 400), (401, 700), (701, 801, 1000)))).items():
        text(home / f"data/{name}.json", [dict(
            prompt_id=i, Prompt=f"the plant of day {i}", Explanation=f"carnation {i}", Category="",
            Subcategory="") for i in ids])


def corebench(home):
    text(home / "evaluate.py", 'TEMPLATE = """\nBe strict: "yes" or "no".\n"""\n')
    for task in "C-MI C-MA C-MR C-TR R-LR R-BR R-HR R-PR R-GR R-AR R-CR R-RR".split():
        text(home / f"data/{task}.json", {f"{task}-001": {
            "Main Class": "", "Sub Class": "", "Prompt": f"draw {task}", "Checklist": [
                dict(question=f"Is {task} there, {i}?", tags=[]) for i in range(2)]}})


def cvtg(home):
    for kind in ("CVTG", "CVTG-Style"):
        for area in (2, 3, 4, 5):
            text(home / f"{kind}/{area}.json", dict(data_list=[dict(
                index=0, prompt=f"a sign with 'Big Sale' and 'shop {area}'", carrier_list=[],
                sentence_list=[])]))


def imgedit(home):
    kinds = ("add", "alter")
    text(home / "Benchmark/Basic/basic_edit.json", {str(10 + i): dict(
        id=f"animal/{i}.png", prompt=f"make it {i}", edit_type=kinds[i % 2]) for i in range(3)})
    text(home / "Benchmark/Basic/prompts.json", {k: f"Rate {k}: <edit_prompt>" for k in kinds})
    for i in range(3):
        picture(home / f"Benchmark/singleturn/animal/{i}.png", i, ((64, 64), (96, 48))[i % 2])


def gedit(home):
    text(home / "GEdit-Bench/viescore/vie_prompts.py", '''
_context_no_delimit = """You are an artist: {"score" : [...]}"""
_prompts_0shot_two_image_edit_rule = "Two images."
_prompts_0shot_tie_rule_SC = "Editing instruction: <instruction>"
_prompts_0shot_rule_PQ = "How natural?"
''')
    for i in range(4):
        picture(home / f"{i}.png", i, (48 + 16 * i, 64))
    its = dict(task_type=["color_alter", "subject-add", "color_alter", "color_alter"],
               key=[f"key{i}" for i in range(4)], instruction=[f"edit {i}" for i in range(4)],
               instruction_language=["en", "en", "cn", "en"], Intersection_exist=[True] * 4,
               input_image=[str(home / f"{i}.png") for i in range(4)],
               input_image_raw=[str(home / f"{i}.png") for i in range(4)])
    data = datasets.Dataset.from_dict(its)
    for name in ("input_image", "input_image_raw"):
        data = data.cast_column(name, datasets.Image())
    data.save_to_disk(home / "GEdit-Bench/GEdit-Bench")


TEXTS = ("consist reasoning reasoning_w_input generation spatial_cons spatial_ref spatial_qual "
         "spatial_ref_w_input spatial_ref_img logical_cons logical_cons_ans logical_txt "
         "logical_img logical_img_wo_q").split()


def rise(home):
    text(home / "utils.py", "import missing\n" + "\n".join(
        f'prompt_{name} = """{name} of {{instruct}}: {{reference}}"""' for name in TEXTS))
    its = [dict(category="temporal_reasoning"), dict(category="causal_reasoning", reasoning_img=1),
           dict(category="causal_reasoning", consistency_free=True),
           dict(category="spatial_reasoning", reference_img="ref.png"),
           dict(category="spatial_reasoning", reasoning_img=1),
           dict(category="logical_reasoning", reference_txt="seven"),
           dict(category="logical_reasoning", reference_img="ref.png")]
    for i, row in enumerate(its):
        row.update(index=f"{row['category']}_{i}", instruction=f"do {i}", image=f"{i}.png",
                   reference=f"done {i}", subtask="x")
        picture(home / f"data/{i}.png", i, (64, 64))
    picture(home / "data/ref.png", 99)
    text(home / "data/datav2_total_w_subtask.json", its)


def uniredit(home):
    text(home / "eval/utils.py", "import missing\n" + "\n".join(
        f'{name} = """{name} of {{instruct}}: {{reference}}"""' for name in (
            "prompt_consist", "prompt_reasoning_w_ref_image", "prompt_generation")))
    its = [dict(name="physics", idx=0, instruction="drop it", reference_effect="broken"),
           dict(name="physics", idx=2, instruction="lift it"),
           dict(name="sudoku", idx=1, instruction="solve it", rules="Nine digits.",
                reference_effect="solved")]
    for row in its:
        for what in ("original", "reference"):
            row[f"{what}_image_path"] = f"{what}_image/{row['name']}/{row['idx']}.png"
            picture(home / "UniREditBench" / row[f"{what}_image_path"], row["idx"])
    text(home / "UniREditBench/data.json", its)


def reconstruction(home):
    for i in range(3):
        picture(home / f"{i}.png", i)
        (home / f"{i}.txt").write_text(f"picture {i}")


NAMES = ("dpg", "unigenbench", "wise", "corebench", "cvtg", "imgedit", "gedit", "rise", "uniredit",
         "reconstruction")


def write(name, home):
    globals()[name](home)
    return home
