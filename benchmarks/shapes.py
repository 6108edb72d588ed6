"""GenEval at classroom scale: 360 held-out prompts, and pairs of colour and shape never seen."""

from benchmarks import About
from data.shapes.bench import bench_shapes

ABOUT = About("", "GenEval's tags in the classroom's world", 1440, n=4)


def run(tested, args, out):
    results = bench_shapes(tested.draw, args.n or 4, png=out and out / "samples.png")
    return results, {"held out": results}
