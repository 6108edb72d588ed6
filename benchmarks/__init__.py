"""Benchmarks by name. Each is a module of at most forty lines of code that says, and no more:

    ABOUT                     what it measures, who judges, how many pictures: an About
    items(release)            the folder of the official release -> its prompts, a dict each: `id`,
                              `prompt`, `tag` (its category) and, of edits, `source` (a picture)
    files(item)               what else the official scorer wants to find: {path: bytes}; optional
    shots_in(folder)          anybody's pictures, where their number differs; optional

then either  measure(shots, images) -> [{column: number}], a picture each, without a judge
or           questions(item, image) -> {name: ([images], text)}, what its judge is asked of one
             read(item, name, answer) -> what an answer says, None where it says nothing usable
             verdict(item, values) -> {column: number}, of {name: what was read}

and          table(rows) -> {metric: value, metric_se: its standard error}, of rows that have an
             item's `tag` and `prompt`, `k`, and the picture's columns; `score` is the headline.

Where a benchmark draws in memory, as the classroom's do, run(tested, args, out) takes the place of
all these. What draws, asks, reads releases and makes tables stands once, in drawing.py, judging.py,
release.py and tables.py. Images are uint8 (H,W,3).
"""

from dataclasses import dataclass
from importlib import import_module

NAMES = ("shapes", "geneval", "dpg", "unigenbench", "wise", "corebench", "cvtg", "imgedit", "gedit",
         "rise", "uniredit", "reconstruction", "shapes-edit", "shapes-think", "shapes-reflect",
         "shapes-answer", "layers")


@dataclass(frozen=True)
class About:
    """What --help, docs/benchmarks.md and the machinery know of a benchmark."""
    layout: str                # where the official scorer looks for a picture: "{tag}/{id}_{k}.png"
    measures: str              # in a line
    images: int                # of a whole run
    release: str = ""          # what to fetch, and from where; "": nothing
    judge: str = ""            # the official one; "": none is asked
    calls: int = 0             # of the judge, in a whole run
    n: int = 1                 # pictures of a prompt
    tokens: int = 1024         # longest answer
    text_first: bool = False   # in a question, does the text stand before the images?
    longest: int = 0           # most pixels of a side of what the judge sees; 0: all
    edits: bool = False        # is each picture made from an item's `source`?
    grid: bool = False         # are a prompt's pictures the quarters of one file?
    partial: bool = False      # does a picture count by those of its questions that were answered?


def listing():
    """-> what --help says of each: what it measures, pictures, judge and its questions, release"""
    lines = []
    for name in NAMES:
        about = find(name).ABOUT
        judge = f"; {about.judge}, {about.calls:,} questions" if about.judge else ""
        lines.append(f"  {name:15} {about.measures}; {about.images:,} pictures{judge}"
                     + f"\n{'':18}--bench-dir: {about.release}" * bool(about.release))
    return "\n".join(lines)


def find(name):
    """A benchmark's name -> its module"""
    return import_module("benchmarks." + name.replace("-", "_"))
