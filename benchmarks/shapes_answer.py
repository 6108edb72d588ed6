"""The classroom's questions, about pictures and about riddles."""

from benchmarks import About
from data.shapes.talk import bench_answer

ABOUT = About("", "questions about pictures and riddles of the classroom's world", 0)


def run(tested, args, out):
    png, n = out and out / "answers.png", args.n or 1
    results = bench_answer(tested.answer, "vqa", n, png=png)
    results["text"] = bench_answer(tested.answer, "textqa", n)
    return results, {args.bench: results}
