"""Promises that rot unless something checks them."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["pretrain.py", "sft.py", "grpo.py", "cycle_edit.py", "reflect.py"]
FILES = {f.relative_to(ROOT).as_posix(): ast.parse(f.read_text()) for folder in (
    ".", "benchmarks", "common", "data", "data/shapes", "docs", "labs", "rewards")
    for f in (ROOT / folder).glob("*.py")}
# Behind the scripts:
ROOMS = ["eval.py", "benchmarks/", "rewards/", "data/shapes/", "model.py", "common/"]
STEPS = {"main", "check", "encode", "preview", "bench"}  # each script's own, under the same names


INDEX = r"`(\w+)` \| \[(\S+?):(\d+)\]"
TREE = r"(?m)^([\w/]+(?:\.py|/)) +([\d,]+)  "


def test_index_points_at_what_it_names(monkeypatch):
    """README: | equation | `name` | [file.py:12](file.py#L12) |. docs/index.py gives the lines that
    define those names; a line that is inserted since breaks nothing, a name that is gone does."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    index = importlib.import_module("index")
    old = (ROOT / "README.md").read_text()
    new = index.renumbered(old)
    rows = re.findall(INDEX, new)
    assert len(rows) >= 10 and len(rows) == len(re.findall(INDEX, old))
    for name, file, line in rows:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.search(rf"\b(def|class) {name}\b", text), (name, file, line, text)
    with pytest.raises(SystemExit, match="model.py defines no gone"):
        index.renumbered("`gone` | [model.py:1](model.py#L1)")


def test_the_file_tree_is_about_right():
    """README's lines of code, to a tenth."""
    rows = re.findall(TREE, (ROOT / "README.md").read_text())
    assert {"grpo.py", "model.py", "rewards/", "common/run.py"} <= {path for path, _ in rows}
    for path, said in rows:
        files = (ROOT / path).glob("**/*.py") if path.endswith("/") else [ROOT / path]
        lines = sum(len(f.read_text().splitlines()) for f in files)
        assert abs(int(said.replace(",", "")) - lines) <= 10 + lines / 10, (path, lines)


def test_no_function_stands_twice():
    """Not even under two names; nor two under one name in scripts, but for their own steps."""
    bodies, names = {}, {}
    for file, tree in FILES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                body = ast.unparse(node.args) + ast.unparse(node.body)
                assert bodies.setdefault(body, file) == file, f"{file}: {node.name} stands twice"
                if file in SCRIPTS and node.name not in STEPS:
                    assert names.setdefault(node.name, file) == file, f"{file}: {node.name}"
    assert len(bodies) > 200 and len(names) > 10


def test_no_function_is_long():
    """Sixty lines at most, but for the mains; the loop of grpo.py is 90 at most."""
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            lines = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                assert lines <= 60, f"{file}: {node.name} has {lines} lines"
            if file == "grpo.py" and isinstance(node, ast.For) and "step" in ast.unparse(
                    node.target):
                assert lines <= 90
    assert len((ROOT / "grpo.py").read_text().splitlines()) <= 350
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


class WithoutWords(ast.NodeTransformer):
    def visit_If(self, node):
        mine = re.search(r"args\.(task|lm_loss)\b", ast.unparse(node.test))
        return None if mine else self.generic_visit(node)


def test_stages_1_and_2_share_their_loop():
    """pretrain.py and sft.py differ in what learns, in defaults, and in what only sft.py does where
    words were said; flow matching is the same."""
    trees = [ast.parse((ROOT / f).read_text()) for f in ("pretrain.py", "sft.py")]
    whole = [[n for n in ast.walk(tree) if isinstance(n, ast.For)
              and ast.unparse(n.target) == "step"] for tree in trees]
    assert "lm_loss" in ast.unparse(whole[1][0]) and "args.task" not in ast.unparse(whole[0][0])
    loops = [[ast.unparse(WithoutWords().visit(n)) for n in ns] for ns in whole]
    assert len(loops[0]) == 1 and loops[0] == loops[1]


def file_of(module):
    """"common.run" -> "common/run.py", None of what is not ours"""
    path = module.replace(".", "/")
    return next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in FILES), None)


def imported(tree):
    """Our files that a file imports, at its top or anywhere inside, or names, as rewards are."""
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "all are named from the root"
            modules += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"\w+(\.\w+)+", str(node.value)):
            modules.append(node.value)
    return {file_of(m) for m in modules if isinstance(m, str)} - {None}


def room(file):
    """0: a script; then along the arrows"""
    return next((i for i, name in enumerate(ROOMS, 1) if file.startswith(name)), 0)


def test_arrows_run_one_way():
    """scripts -> eval -> benchmarks/ -> rewards/ -> data/shapes/ -> model -> common/: a file
    imports from its own room or from those behind it; a script no script, but that RL and the labs
    have grpo.py, and a lab sft.py; and no file comes back to itself."""
    arrows = {file: imported(tree) for file, tree in FILES.items()}
    for file, those in arrows.items():
        for other in those:
            assert room(file) <= room(other), f"{file} imports {other}"
            rl = other == "grpo.py" and file in ("cycle_edit.py", "reflect.py")
            lab = other in ("grpo.py", "sft.py", "labs/begin.py") and file.startswith("labs/")
            assert room(other) or rl or lab, f"{file} imports {other}, a script"
    assert {room(f) for f in FILES} == {*range(7)} and arrows["rewards/__init__.py"]

    def walk(file, way):
        assert file not in way, " -> ".join([*way, file])
        for other in arrows[file]:
            if other not in done:
                walk(other, [*way, file])
        done.add(file)
    done = set()
    for file in FILES:
        walk(file, [])
    assert done == FILES.keys()


def test_readme_numbers_are_in_the_log():
    """Every score in README's tables (0.xx or 0.xxx with its error) stands in LOG.md."""
    log = (ROOT / "LOG.md").read_text()
    for number in re.findall(r"\| [^|\n]*?(0\.\d{3}) ± ", (ROOT / "README.md").read_text()):
        assert number in log, f"README's {number} is not in LOG.md"
