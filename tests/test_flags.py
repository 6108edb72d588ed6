"""Wrong values of every flag and every setting of every script, made from what the flag declares:
each is one line that names the flag, before anything is loaded or written."""

import json
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, fields, make_dataclass
from pathlib import Path

import pytest
import tiny
from test_cli import complaint

import cycle_edit
import eval as eval_py
import grpo
import pretrain
import reflect
import sample
import sft
from common import flags as flags_py
from common.flags import DATA, FILE, HUB, flag, flag_of, fork, inside, number, parse
from common.presets import PRESETS, RECIPES
from data import convert
from data.shapes import prepare
from labs import awm, dgpo, nft
from model import Unified

SCRIPTS = [pretrain, sft, grpo, cycle_edit, reflect, eval_py, sample, nft, awm, dgpo]
STAGE = {pretrain: "stage1", sft: "stage2"} | dict.fromkeys(
    [grpo, cycle_edit, reflect, nft, awm, dgpo], "stage3")
TEXT = {"prompts", "edit", "answer"}          # of sample.py: any text will do
LABS = [nft, awm, dgpo]                       # of these what grpo.py has not, see fork
FLAGS = [(script, f) for script in SCRIPTS for f in fields(script.Args) if script not in LABS or
         f.name not in {g.name for g in fields(grpo.Args)}]
NAMES = [f"{script.__name__} {f.name}" for script, f in FLAGS]
LONG = "x" * 5000


def ends(interval):
    """ "0 or [0.01, 100]" -> [(0, 0, True, True), (0.01, 100, True, True)]: each part's ends, and
    whether they belong to it"""
    for part in interval.split(" or "):
        numbers = [eval(x) for x in part.strip("[()]").split(", ")]
        yield float(numbers[0]), float(numbers[-1]), part[0] != "(", part[-1] != ")"


def outside(f):
    """Texts just outside of a number's range, and some far from it."""
    allowed, texts = f.metadata["allowed"], []
    for low, high, has_low, has_high in ends(allowed):
        if f.type is int:
            texts += [int(low) - has_low, int(high) + has_high]
        else:
            texts += [math.nextafter(low, -math.inf) if has_low else low,
                      math.nextafter(high, math.inf) if has_high else high]
    assert not any(inside(x, allowed) for x in texts)
    return [*map(str, texts), str(-10**400), str(10**400), "9" * 5000, "1e400", "-1e400"]


NO_NUMBERS = ["nan", "NaN", "-nan", "inf", "-inf", "Infinity", "", " ", "three", "1,5", "0x10", "½",
              "１", "٣", "−1", "1 2", "None", "[1]", LONG]
NO_INTEGERS = ["1.5", "1.0", "1e3", "True"]
NO_NAMES = ["nonsense", "ünïcode", LONG, "a b", "None", "\udce9"]
NO_FILES = ["no such file", "no/such/folder/ünïcode", LONG, "data/shapes/" + LONG, "/dev/null/x",
            "\udce9"]
# Of texts with a grammar of their own; where a flag's default is something, "" as well.
WRONG = dict(
    recipe=["", "nonsense", LONG, "none.json", LONG + ".json", "ü.json", "\udce9"],
    reward=["", "nonsense", "geneval:x", "geneval:nan", "geneval:inf", "geneval:1e300",
            "geneval:0", "geneval:1,geneval:2", ",", "none.json", LONG + ".json", "{", "{}x",
            '{"*": "geneval:nan"}', "[" * 100_000 + ".json", "none.py:f", "ünïcode", "\udce9"],
    mix=["nosuch:1", "position:0", "*:-1", "*:nan", "*:inf", "*:1e300", "*", "*:", "*:x", "*:１",
         ",:", LONG, "\udce9"],
    ldam=["geneval", "geneval:", "geneval:x", "geneval:-1", "geneval:1-x", "nosuch:1-6", ",",
          "geneval:99-999999999999999", LONG, "\udce9"],
    judge=["nonsense", "no such folder", "ünïcode/x", LONG, "\udce9"],
    judge_url=["nonsense", "localhost:8000", "ftp://host/v1", "http://", "https:///v1",
               "http:/host", "http://[::1", "http://host:99999", "http://host:x", "http://ho st", "file:///etc",
               "http://host\n", "http://hö.st", LONG, "\udce9"],
    guidances=["nan", "1,nan", "1,inf", "-1", "1,", ",", "1;3", "101", "x", "１", LONG, "\udce9"],
    cache=["HERE", "HERE/x", "/dev/null/x", "/proc/x/y", LONG, "\udce9"],
    export=["HERE", "HERE/x", "/dev/null/x", "/proc/x/y", LONG, "\udce9"],
    mask=NO_FILES, final_bench=[], size=["nonsense", "0x", "x5", "1x2x3", "-5", "1.5", "９", LONG],
    columns=["nonsense", "caption", "caption=", "=x", "nosuch=x", ",", "caption=x,", LONG],
    change=["nonsense", "lr,nonsense", ",", "preset", LONG, "\udce9"])


def wrong(script, f):
    """Texts that the flag f of a script must refuse."""
    allowed, empty = f.metadata["allowed"], [""] * (f.default != "")
    if f.type in (bool, bool | None):
        return []
    if f.type in (int, float):
        return outside(f) + NO_NUMBERS + NO_INTEGERS * (f.type is int)
    if f.name == "out":
        where = {eval_py: ["HERE", "HERE/x"], sample: [
            "", "x.jpg", "x", "no/such/x.png", "HERE/x.png", "FOLDER.png", LONG + ".png"]}.get(
                script, ["", " ", "HERE", "HERE/x", LONG])
        return [*where, "/dev/null/x.png", "/proc/x.png", "\udce9.png"]
    if f.name in WRONG:
        return WRONG[f.name]
    if allowed in (FILE, DATA):
        return NO_FILES + empty
    return NO_FILES if allowed == HUB else NO_NAMES + empty


# What else must be given for a flag to be read at all.
BESIDE = {"judge_url": ["--judge", "any name"],
          "guidances": ["--bench", "shapes-edit", "--out", "x"],
          ("sample", "mask"): ["--image", "HERE.png", "--edit", "x"],
          ("sample", "image"): ["--edit", "x"], ("sample", "export"): [],
          "ldam": ["--preset", "shapes-sana"],
          ("reflect", "mix"): ["--task", "text", "--data", "data/shapes/prompts/textqa.jsonl"]}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty working folder, beside which a file and a folder lie; nothing may be loaded."""
    def loaded(*inputs, **more):
        raise AssertionError("something was loaded")
    monkeypatch.setattr(Unified, "from_preset", loaded)
    for part in ("pretrained", "fetch"):
        monkeypatch.setattr(f"common.weights.{part}", loaded)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "desk").mkdir()
    (tmp_path / "desk/FOLDER.png").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path


def run(monkeypatch, script, *argv):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
    script.main()


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(monkeypatch, script, name, *argv):
    """A run ends with one short line that names a flag."""
    said = complaint(run, monkeypatch, script, *argv)
    assert re.search(rf"(--|\b){name}\b|{flag_of(name)}\b", said), said
    assert len(said) < 1500 and said.isprintable(), said
    return said


@pytest.mark.parametrize("script, f", FLAGS, ids=NAMES)
def test_wrong_values(desk, monkeypatch, script, f):
    if f.name in TEXT:
        return
    here, setting = str(desk / "file"), f.metadata["setting"]
    if f.type in (bool, bool | None) and not setting:
        refused(monkeypatch, script, f.name, f"{flag_of(f.name)}=x")
    more = BESIDE.get((script.__name__, f.name), BESIDE.get(f.name, []))
    more = [here.replace("file", "a.png") if x == "HERE.png" else x for x in more]
    if "--image" in more:
        shutil.copy(tiny.ROOT / "docs/jpeg.png", desk / "a.png")
    before = contents(desk)
    for text in wrong(script, f) if not setting else ():
        refused(monkeypatch, script, f.name, *more, f"{flag_of(f.name)}={text}".replace(
            "HERE", here), *["x"] * (script is sample and not more))
    assert contents(desk) == before
    for text in wrong(script, f) if setting and f.type is str else ():
        as_setting(monkeypatch, desk, script, f, text)


NO_JSON = [True, None, "1", [1], {}, 1.5, math.nan, math.inf, -math.inf, 10**400, -10**400, -1]


def as_setting(monkeypatch, desk, script, f, value):
    """In a recipe of one's own, which the error names, too."""
    (desk / "mine.json").write_text(json.dumps({f.name: value}))
    more = BESIDE.get((script.__name__, f.name), BESIDE.get(f.name, []))
    said = refused(monkeypatch, script, f.name, *more, "--recipe", str(desk / "mine.json"))
    assert "mine.json" in said or f.name in WRONG, said
    assert set(os.listdir(desk)) == {"file", "desk", "mine.json"}
    assert os.listdir(desk / "desk") == ["FOLDER.png"]


@pytest.mark.parametrize("script, f", [x for x in FLAGS if STAGE.get(x[0]) == "stage3"],
                         ids=[n for n, x in zip(NAMES, FLAGS) if STAGE.get(x[0]) == "stage3"])
def test_wrong_values_in_a_recipe(desk, monkeypatch, script, f):
    """Of any flag: a recipe may set them all."""
    kinds = {bool: [True], str: ["1"], float: [-1], int: [-1], bool | None: [True]}
    allowed = f.metadata["allowed"]
    if f.name in ("recipe", "preset", "out", "resume", "task"):
        return
    values = [v for v in NO_JSON if not any(type(v) is type(x) and v == x for x in kinds[f.type])]
    if f.type is float:
        values = [v for v in values if type(v) not in (int, float) or not inside(v, allowed)] + [
            float(x) for x in outside(f) if math.isfinite(float(x))][:4]
    elif f.type is int:
        values += [int(x) for x in outside(f) if len(x) < 4000 and "e" not in x][:4]
    elif allowed and not isinstance(allowed, str):
        values += ["nonsense", "\udce9"]
    for value in values:
        as_setting(monkeypatch, desk, script, f, value)


# --- what is declared ---


@pytest.mark.parametrize("script, f", FLAGS, ids=NAMES)
def test_every_number_has_a_range(monkeypatch, tmp_path, script, f):
    """And takes its own default, the ends that belong to the range, and what lies just within the
    others. No integer is without a bound."""
    allowed = f.metadata["allowed"]
    if f.type not in (int, float):
        assert f.type in (str, tuple, bool, bool | None)
        if allowed and not isinstance(allowed, str) and not callable(allowed):
            given = [*allowed, f.default]
            assert "" not in allowed and (f.default in allowed or f.default == "")
            for value in given:
                got(monkeypatch, tmp_path, script, f, value)
        assert isinstance(allowed, str) <= (allowed in (DATA, FILE, HUB))
        return
    assert isinstance(allowed, str) and inside(f.default, allowed)
    values = [f.default]
    for low, high, has_low, has_high in ends(allowed):
        assert math.isfinite(low) and math.isfinite(high) and low <= high
        if f.type is int:
            values += [int(low) + (not has_low), int(high) - (not has_high)]
        else:
            values += [low if has_low else math.nextafter(low, math.inf),
                       high if has_high else math.nextafter(high, -math.inf)]
    for value in values:
        got(monkeypatch, tmp_path, script, f, value)


def got(monkeypatch, tmp_path, script, f, value):
    """parse takes a value, from the command line or as a recipe's."""
    Args = make_dataclass("Args", [(f.name, f.type, f), ("out", str, flag("none", "x"))][
        : 1 + (f.name != "out")])
    argv = [f"{flag_of(f.name)}={value!r}" if f.type is not str else f"{flag_of(f.name)}={value}"]
    if f.metadata["setting"]:
        (tmp_path / "own.json").write_text(json.dumps({f.name: value}))
        argv = ["--recipe", str(tmp_path / "own.json")]
        Args = make_dataclass("Args", [(f.name, f.type, f), ("recipe", str, flag("fast", "x"))])
    monkeypatch.setattr(sys, "argv", ["x.py", *argv])
    x = getattr(parse(Args, ""), f.name)
    assert x == value and type(x) is f.type


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_defaults_presets_and_recipes_are_within(script):
    """Nothing that a script sets by itself is refused: parse would say so."""
    known, own = {f.name: f for f in fields(script.Args)}, asdict(script.Args())
    layers = [("the script", {k: v for k, v in own.items() if v not in (None, ())})]
    layers += [(name, getattr(c, STAGE[script]) or {}) for name, c in PRESETS.items()
               if script in STAGE]
    layers += [*RECIPES.items()] if "recipe" in known else []
    layers += [*reflect.TASKS.items()] if script is reflect else []
    for who, values in layers:
        for name, value in values.items():
            if name in known:
                assert flags_py.check(known[name], value, who) == value


def test_intervals():
    for interval, good, bad in [
            ("[0, 1)", [0, 0.0, 0.5, math.nextafter(1, 0)], [-1e-9, 1, 1.0, 2, math.nan, math.inf]),
            ("(0, 1]", [5e-324, 1], [0, 0.0, -0.0, 1.0000001]),
            ("0 or [0.01, 100]", [0, 0.01, 100], [0.001, 100.1, -0.1, math.nan]),
            ("[0, 1/3]", [1 / 3, 0], [0.34]), ("[-1e6, 1e6]", [-1e6, 0], [1e6 + 1]),
            ("[0, 2**63)", [2**63 - 1], [2**63, 10**400, -1])]:
        assert all(inside(x, interval) for x in good) and not any(inside(x, interval) for x in bad)
    assert number("1e3") == 1000 and number("7", int) == 7 and number(3, float) == 3.0
    assert all(math.isnan(number(x, kind)) for x in ("", "x", "１", 10**400) for kind in (float,))


def test_a_fork_keeps_what_is_declared():
    Args = fork(grpo.Args, ("window",), times=flag(3, "times", "[1, 9]", group="Mine"))
    old, new = ({f.name: f for f in fields(A)} for A in (grpo.Args, Args))
    assert new.keys() == old.keys() - {"window"} | {"times"}
    for name in new.keys() - {"times"}:
        mine, its = dict(new[name].metadata), dict(old[name].metadata)
        assert mine | dict(group="") == its | dict(group="")


# --- flags that do not go together, and what is not there ---


@pytest.mark.parametrize("script, argv, words", [
    (pretrain, "", "--data 'data/shapes/train': must be a file or folder that exists; the cl"),
    (sft, "--init data/shapes/sft", "--data 'data/shapes/train': must be"),
    (sft, "--init data/shapes/sft --data . --task cot", "--tuples 'data/shapes/cot': must be"),
    (grpo, "--sft 0.1", "--sft-data 'data/shapes/train': must be"),
    (grpo, "--preset deepgen --prompts HERE.txt", "draws photos and needs --sft-data of its own"),
    (sft, "--preset deepgen --init data/shapes/sft", "draws photos and needs --data of its own"),
    (pretrain, "--preset deepgen", "draws photos and needs --data of its own"),
    (sft, "--preset flow-grpo", "has no stage2; presets that have: shapes, shapes-sana, unirl"),
    (cycle_edit, "--preset deepgen", "which this script lacks: give another --recipe, such as f"),
    (eval_py, "--bench shapes --bench-dir .", "--bench-dir: --bench shapes reads none"),
    (grpo, "--bench shapes", "unrecognized arguments: --bench"),
    (sft, "--task cot --edits . --share 0.6 --edit-share 0.6 --data .", "--share 0.6 and --edit-"),
    (eval_py, "--init=", "--init '' draws from the weights of --preset"),
    (eval_py, "--bench shapes-reason", "--bench shapes-reason is now --bench shapes-think"),
    (sample, "x --init=", "--init '' draws from the weights of --preset"),
    (reflect, "--task text --train both", "unknown --train 'both'; there are: lm"),
    (grpo, "--judge any", "--judge 'any': must be a folder that exists, or owner/repo on the Hub"),
])
def test_what_does_not_go_together(desk, monkeypatch, script, argv, words):
    if (tiny.ROOT / "data/shapes/train").exists():       # as on a machine without the shards
        monkeypatch.setattr(flags_py, "there", lambda name, allowed=FILE: "shapes/" not in name)
    (desk / "desk/HERE.txt").write_text("a cat")
    before = contents(desk)
    assert words in complaint(run, monkeypatch, script, *argv.split())
    assert contents(desk) == before


def test_a_recipe_goes_on_from_the_preset_s(desk, monkeypatch):
    """Where it names none: one setting changes, and the paper's others stay."""
    for own, lora_rank in ((dict(wd=0.5), 32), (dict(wd=0.5, recipe="fast"), 0)):
        Path("my.json").write_text(json.dumps(own))
        argv = "grpo.py --preset flow-grpo --recipe my.json"
        monkeypatch.setattr(sys, "argv", argv.split())
        args = parse(grpo.Args, "", "stage3")
        assert (args.wd, args.lora_rank) == (0.5, lora_rank)


def test_convert_refuses(desk, monkeypatch):
    file = str(desk / "file")
    for argv, words in [
            (["nonsense", file, "out"], "argument layout: invalid choice: 'nonsense'"),
            (["deepgen", "", "out"], "path '' does not exist"),
            (["deepgen", "none", "out"], "path 'none' does not exist"),
            (["deepgen", LONG, "out"], "path 'xxxx"), (["deepgen", file, ""], "out '' exists"),
            (["deepgen", file, file], "exists: choose another OUT"),
            (["deepgen", file, file + "/x"], "Not a directory"),
            (["deepgen", file, LONG], "out 'xxxx"), (["deepgen", file, "/proc/x/y"], "out '/proc"),
            (["deepgen", file, "out", "--lora-from", "none"], "--lora-from 'none' does not exist"),
            (["deepgen", file, "out", "--vlm", "none"], "--vlm 'none': must be"),
            (["deepgen", file, "out", "--vlm", ""], "--vlm '': must be")]:
        before = contents(desk)
        assert words in complaint(run, monkeypatch, convert, *argv)
        assert contents(desk) == before


def test_prepare_refuses(desk, monkeypatch):
    for argv in (["nonsense"], [""], [], ["data", "more"], ["\udce9"]):
        assert complaint(run, monkeypatch, prepare, *argv).isprintable()
    assert os.listdir() == ["FOLDER.png"]


def test_places_to_write(desk):
    flags_py.can_hold("a/b/c")
    sample.can_write(Path("x.png"), ".png")
    assert os.listdir() == ["FOLDER.png"]
