"""What pretrain.py and sft.py show of a run: pictures of each task that is taught and, in the
classroom, scores of what is held out.
"""

from functools import partial

import torch

from common.draw import draw_edits, draw_reflecting, draw_thinking
from common.data import pairs
from common.show import grid
from data.shapes.bench import bench_shapes
from data.shapes.edits import bench_edit
from data.shapes.talk import bench_reflect, bench_think

CURVES = [["loss", "edit_loss", "cot_loss", "reflect_loss"], ["grad_norm"],
          ["score", "edit_score", "cot_score", "corrected"]]     # panels of curves.png


def what_to_show(args, cfg, n):
    """The first 16 records of each task's data -> {form: (prompts, references ...)}, see pairs"""
    folders = dict(t2i=args.data, edit=args.edits)
    if getattr(args, "tuples", ""):
        folders[args.task] = args.tuples
    firsts = {form: next(pairs(folder, cfg, n, args.seed, form=form, columns=args.columns))[1:]
              for form, folder in folders.items() if folder}
    return {form: [column[:16] for column in columns] for form, columns in firsts.items()}


def two_by_two(left, right):
    """Pictures (N,3,H,W) in pairs -> (2N,3,H,W)"""
    return torch.stack([left, right.cpu()], 1).flatten(0, 1)


def preview(model, shown, file):
    """Draws what is shown, see what_to_show, into `file` and others beside it. -> {name: score}"""
    def beside(task):
        return file.with_name(file.name.replace("step", task))
    model.eval()
    classroom, scores = model.cfg.preset.startswith("shapes"), {}
    prompts, = shown["t2i"]
    keys = range(16)
    grid(model.draw(prompts, keys[: len(prompts)], guidance=3.0), prompts, file)
    if classroom:
        scores["score"] = bench_shapes(model.draw, 1, 96)["score"]
    if "edit" in shown:
        orders, sources = shown["edit"]
        drawn = draw_edits(model, orders, sources, keys[: len(orders)], guidance=3.0)
        grid(two_by_two(torch.stack([first for first, *_ in sources]), drawn),
             [text for order in orders for text in ("", order)], beside("edits"))
        if classroom:                                    # root of success x preservation
            scores["edit_score"] = bench_edit(partial(draw_edits, model), 1, 100)["both"]
    if "cot" in shown:
        prompts = shown["cot"][0]
        drawn, said = draw_thinking(model, prompts, keys[: len(prompts)], guidance=3.0)
        grid(drawn, [f"{p}\n{text}" for p, text in zip(prompts, said.texts)], beside("cot"))
        if classroom:
            scores["cot_score"] = bench_think(model.draw, partial(draw_thinking, model), 1)["score"]
    if "reflect" in shown:
        prompts, looks = shown["reflect"][:2]
        firsts = torch.stack([first for first, *_ in looks])
        drawn, said = draw_reflecting(model, prompts, firsts, keys[: len(prompts)], guidance=3.0)
        grid(two_by_two(firsts, drawn), [t for p, row in zip(prompts, said) for t in (p, row[0])],
             beside("reflect"))
        if classroom:
            scores["corrected"] = bench_reflect(partial(draw_reflecting, model))["corrected"]
    return scores
