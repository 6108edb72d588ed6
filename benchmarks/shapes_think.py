"""The classroom's held-out riddles, drawn as they stand and after a thought."""

from benchmarks import About
from data.shapes.talk import bench_think

ABOUT = About("", "riddles in the classroom's world, drawn after a thought", 480, n=4)


def run(tested, args, out):
    results = bench_think(tested.draw, tested.think, args.n or 4, png=out and out / "thoughts.png")
    return results, {args.bench: results}
