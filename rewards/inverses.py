"""The way back of an edit, where the data names none: a VLM writes it."""

import json
from pathlib import Path

from common.presets import preset
from common.read import read_json
from common.run import all_gather, fail, write
from common.weights import attempt
from data.shapes.edits import source_picture
from rewards.judge import Judge, judge_model, without_thoughts

FILE = "inverses.json"               # in --out: those that a VLM wrote
BACK = ('A picture will be edited by the instruction "{}". You see it before that. Write the one '
        'instruction that turns the edited picture back into this one. Answer with it only.')


def write_inverses(rows, args, rank, world):
    """Rows without `inverse` get the one that a VLM writes: --judge's, or the preset's own. A run
    that goes on has those that it began with, for another time a VLM may write others. Every rank
    calls it. -> {its place and instruction: its inverse} of these rows"""
    file, size = Path(args.out) / FILE, preset(args.preset).size
    known = {}
    if args.resume and file.exists():
        known = attempt(f"{file} cannot be read, and without it others would be written; start "
                        "anew in another --out", lambda: dict(read_json(file)))
    bare = [row for row in rows if not row.get("inverse")]
    for row in bare:
        row["inverse"] = known.get(named(row))
    lacks = [row for row in bare if not row["inverse"]]
    if lacks and args.preset.startswith("shapes") and not (args.judge or args.judge_url):
        fail(f"{lacks[0]['where']}: no `inverse` (nor have {len(lacks) - 1} other rows), and the "
             "classroom's VLM writes none: give a --judge that can, or --reward edit")
    if lacks:
        writer = Judge(args.judge or args.vlm or preset(args.preset).vlm, args.judge_url)
        answers = writer.ask_all([([source_picture(row, size).permute(1, 2, 0).numpy()],
                                   BACK.format(row["instruction"])) for row in lacks[rank::world]])
        judge_model.cache_clear()                        # its memory is wanted for the training
        for i, shared in enumerate(all_gather(answers)):
            for row, answer in zip(lacks[i::world], shared):
                row["inverse"] = without_thoughts(answer or "").strip()
    for row in lacks:
        if not row["inverse"]:
            fail(f"{row['where']}: no `inverse`, and the VLM wrote none {writer.error}")
    return {named(row): row["inverse"] for row in bare}


def named(row):
    """A row by its place and what is asked: somebody may have added lines before it."""
    return f"{row['where']}: {row['instruction']}"


def keep_inverses(out, inverses, rank):
    """For --resume, see write_inverses"""
    if inverses and rank == 0:
        write(out / FILE, json.dumps(inverses))
