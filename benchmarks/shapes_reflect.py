"""The classroom's first pictures, half of them wrong: judged, and drawn again."""

from benchmarks import About
from data.shapes.talk import bench_reflect

ABOUT = About("", "second looks at pictures of the classroom's world", 720)


def run(tested, args, out):
    results = bench_reflect(tested.reflect, args.n or 1, png=out and out / "reflections.png")
    return results, {args.bench: results}
