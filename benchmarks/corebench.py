"""T2I-CoReBench (arXiv 2509.03516): composition and reasoning, by questions with yes or no.

DeepGen reports the mean of the eight dimensions of reasoning alone, R-..., and trained on this
benchmark's prompts: its RL list of prompts names them. Departs from its script for Qwen, which
looks for a yes in the judge's thoughts as well; here it is the answer behind them.
"""

from benchmarks import About
from benchmarks.release import assigned, json_of, yes_or_no
from benchmarks.tables import metrics, per_tag

ABOUT = About("{tag}/{id}-{k}.png", "composition and reasoning, by questions with yes or no", 1080,
              "github.com/KwaiVGI/T2I-CoReBench", "Gemini-2.5-Flash, or Qwen3-VL", 13_536,
              tokens=8192, partial=True)
TASKS = "C-MI C-MA C-MR C-TR R-LR R-BR R-HR R-PR R-GR R-AR R-CR R-RR".split()
read = yes_or_no


def items(release):
    system = assigned(release, "TEMPLATE", "evaluate.py")
    return [dict(id=name, prompt=row["Prompt"], tag=task, system=system,
                 ask=[q["question"] for q in row["Checklist"]])
            for task in TASKS for name, row in json_of(release, f"data/{task}.json").items()]


def questions(item, image):
    return {i: ([image], f'Prompt: "{item["prompt"]}"\nQuestion: "{q}"')
            for i, q in enumerate(item["ask"])}


def verdict(item, values):
    return dict(score=sum(values.values()) / len(values))


def table(rows):
    """In percent: the mean of the dimensions' means, of all and of those of reasoning."""
    reasoning = [r for r in rows if r["tag"].startswith("R-")]
    return (metrics(rows, 100, score=("score", True))
            | metrics(reasoning, 100, reasoning=("score", True)) | per_tag(rows, "score", 100))
