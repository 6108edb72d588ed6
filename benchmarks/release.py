"""Official releases, as people have them: a clone of the repository, with the data where its README
puts it. Judges' templates are read from there, since several come without a licence to copy them.
"""

import ast
import re
from functools import cache
from pathlib import Path

from common.layouts import all_records
from common.read import UNREADABLE, csv_rows, read_json, regular, utf8
from common.run import fail


def located(release, *paths):
    """The first of some paths that is in a release -> Path, or the user's error. Of a/b/c.json
    b/c.json and c.json do, too: people unpack a part of a release."""
    for path in map(Path, paths):
        for i in range(len(path.parts)):
            if (file := Path(release, *path.parts[i:])).exists():
                return file
    fail(f"--bench-dir {release} has no {' or '.join(map(str, paths))}")


def json_of(release, *paths):
    """-> what stands in one of these files"""
    try:
        return read_json(located(release, *paths))
    except UNREADABLE as e:
        fail(e)


def table_of(release, *paths):
    """-> rows {column: text} of one of these .csv files"""
    try:
        return [row for _, row in csv_rows(located(release, *paths))]
    except UNREADABLE as e:
        fail(e)


@cache
def parsed(release, *paths):
    """-> all nodes of the syntax of a Python file of a release, which is never run"""
    file = located(release, *paths)
    try:
        with open(regular(file), "rb") as f:
            return list(ast.walk(ast.parse(utf8(f.read())))), file
    except (*UNREADABLE, SyntaxError, RecursionError) as e:
        fail(f"{file} cannot be read: {e}")


def assigned(release, name, *paths):
    """The text, or the dict of texts, that a Python file of a release gives a name."""
    nodes, file = parsed(release, *paths)
    for node in nodes:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            try:
                return ast.literal_eval(node.value)
            except ValueError:
                pass                                     # computed, perhaps; another may be plain
    fail(f"{file} has no plain {name}: is it another version of the benchmark?")


def template(release, words, *paths):
    """The text in a Python file of a release that has these words in it; of an f-string the holes
    stand as {expression}."""
    nodes, file = parsed(release, *paths)
    for text in map(text_of, nodes):
        if words in text:
            return text
    fail(f"{file} has no text with {words!r} in it: is it another version of the benchmark?")


def text_of(node):
    """A node of Python's syntax -> its text, "" where it is none"""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(f"{{{ast.unparse(part.value)}}}" if isinstance(part, ast.FormattedValue)
                       else part.value for part in node.values)
    return ""


def fill(text, **values):
    """A template with {holes} -> the text; other braces stay."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def field(item, *names):
    """The first of some fields that an item of a release has, or the user's error"""
    for name in names:
        if name in item:
            return item[name]
    fail(f"an item of --bench-dir has no {' or '.join(names)}: {str(item)[:200]}")


def records_of(release, *paths):
    """-> rows of a dataset in a release: parquet, or as `datasets` saves it"""
    try:
        return [row for _, row, _ in all_records(located(release, *paths))]
    except UNREADABLE as e:
        fail(e)


# ---------------------------------------------------------------------------------------------
# What several judges are told to answer


def yes_or_no(item, name, answer):
    """A `read`: an answer that has yes, or else no -> 1.0, 0.0, or None"""
    said = set(re.findall(r"[a-z]+", answer.lower()))
    return 1.0 if "yes" in said else 0.0 if "no" in said else None


def final_score(answer, low, high):
    """The whole number behind an answer's first "Final Score", or None where it is off the scale"""
    found = re.search(r"final scores?[\s*:]*(\d+)", answer, re.I)
    return int(found[1]) if found and low <= int(found[1]) <= high else None
