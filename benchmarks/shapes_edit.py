"""The classroom's 300 held-out edits: is the edit there, and is all else as it was?"""

from benchmarks import About
from common.flags import inside, number
from common.show import plot_trade_off
from data.shapes.edits import bench_edit

ABOUT = About("", "edits in the classroom's world", 300, edits=True)


def read_guidances(text):
    """ "1,3" -> [1.0, 3.0]; ValueError"""
    values = [number(g) for g in text.split(",")] if text else []
    if not all(inside(g, "[0, 100]") for g in values):
        raise ValueError("must be numbers in [0, 100] with commas between them, such as 1,3,5,7")
    return values


def run(tested, args, out):
    """With --guidances once for each, and their trade-off as a picture."""
    guidances = read_guidances(args.guidances) or [args.guidance]
    runs = {}
    for g in guidances:
        runs[f"guidance {g:g}"] = bench_edit(
            lambda says, images, numbers: tested.edit(says, images, numbers, g), args.n or 1,
            png=out and out / f"edits_{g:g}.png", draw=tested.draw if g == guidances[0] else None)
    if args.guidances:
        plot_trade_off({args.init: runs}, out / "trade_off.png")
    return runs if len(runs) > 1 else [*runs.values()][0] | dict(guidance=guidances[0]), runs
