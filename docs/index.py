"""PYTHONPATH=. python docs/index.py: line numbers of README's index, line counts of its file tree;
the table of docs/benchmarks.md."""

import re
from pathlib import Path

from benchmarks import NAMES, find

ROOT = Path(__file__).parent.parent


def row(match):
    """| `name` | [file.py:12](file.py#L12) |: 12 becomes the line that defines that name."""
    name, file = match["name"], match["file"]
    for line, text in enumerate((ROOT / file).read_text().splitlines(), 1):
        if re.match(rf"\s*(def|class) {name}\b", text):
            return f"`{name}` | [{file}:{line}]({file}#L{line})"
    raise SystemExit(f"README's index: {file} defines no {name}")


def count(match):
    """file.py   123  what it is; a folder's count is that of all its Python."""
    path = ROOT / match["path"]
    files = sorted(path.glob("**/*.py")) if path.is_dir() else [path]
    lines = sum(len(f.read_text().splitlines()) for f in files)
    return f"{match['path']:24}{lines:>6,}  "


def renumbered(text):
    text = re.sub(r"`(?P<name>\w+)` \| \[(?P<file>\S+?):\d+\]\(\S+\)", row, text)
    return re.sub(r"^(?P<path>[\w/]+(?:\.py|/)) +[\d,]+  ", count, text, flags=re.M)


# Seconds of a picture, computed: DeepGen, 512 pixels, 50 guided steps, at 200 TFLOP/s.
DRAW = 1.12


def benchmark_row(name):
    """A benchmark's row of docs/benchmarks.md"""
    about = find(name).ABOUT
    flags = f"--bench {name}" + " --bench-dir DIR" * bool(about.release) + " --judge NAME" * bool(
        about.judge)
    pictures = f"{about.images:,}" if about.images else ""
    hours = f"{about.images * DRAW / 3600:.1f}" if about.layout and about.images else ""
    return (f"| `{flags}` | {about.measures} | {about.judge or 'none'} | {pictures} | "
            f"{f'{about.calls:,}' if about.calls else ''} | {hours} | {about.release} |")


def with_benchmarks(page):
    """docs/benchmarks.md, its table made anew"""
    head, mark, rest = page.partition("|---|---|---|---|---|---|---|\n")
    rows = "".join(benchmark_row(name) + "\n" for name in NAMES)
    return head + mark + rows + rest[rest.index("\n\n") + 1:] if mark else page


if __name__ == "__main__":
    for file, made in (("README.md", renumbered), ("docs/benchmarks.md", with_benchmarks)):
        (ROOT / file).write_text(made((ROOT / file).read_text()))
