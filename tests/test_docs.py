"""Promises that rot unless something checks them."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ["pretrain.py", "sft.py", "grpo.py", "cycle_edit.py", "reflect.py"]
OURS = {"model", "eval", "data.shapes.prepare"}


def test_index_points_at_what_it_names():
    """README: | equation | `name` | [file.py:12](file.py#L12) |: that line defines that name."""
    rows = re.findall(r"`(\w+)` \| \[(\S+?):(\d+)\]", (ROOT / "README.md").read_text())
    assert len(rows) >= 10
    for name, file, line in rows:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.search(rf"\b(def|class) {name}\b", text), (name, file, line, text)


def test_twins_do_not_drift():
    """A function may stand in two scripts, so that each reads alone; then it must be the same."""
    seen = {}
    for file in SCRIPTS:
        for node in ast.parse((ROOT / file).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                source = ast.unparse(node)
                assert seen.setdefault(node.name, source) == source, f"{file}: {node.name} drifted"


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


def test_scripts_import_only_model_and_eval():
    for file in [*SCRIPTS, "sample.py"]:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
                assert node.module in OURS, f"{file} imports {node.module}"


def test_readme_numbers_are_in_the_log():
    """Every score in README's tables (0.xx or 0.xxx with its error) stands in LOG.md."""
    log = (ROOT / "LOG.md").read_text()
    for number in re.findall(r"\| [^|\n]*?(0\.\d{3}) ± ", (ROOT / "README.md").read_text()):
        assert number in log, f"README's {number} is not in LOG.md"
