"""A dataclass as a strict command line; values of presets and recipes stand below flags."""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path

from common.presets import PARTS, RECIPES, preset
from common.run import fail

OLD = {                                   # flags that were renamed, and what to give instead
    "--chat": "--answer", "--prompts": "--data", "--eval-prompts": "--eval-data",
    "--task": "a flag of reflect.py, where the language model acts: python reflect.py --task text, "
              "vqa, cot or reflect",
}


def flag(default, help, group="", setting=False):
    """A field of a script's Args. help: what --help says of it; group: the title of the flags that
    begin with this one; setting: no flag, but one that recipes have: see parse."""
    return field(default=default, metadata=dict(help=help, group=group, setting=setting))


@dataclass
class RunFlags:
    """What every script that trains has: how its run is begun, gone on with and kept."""
    resume: str = flag("", "go on with the run in --out, by the flags that it had; auto: or begin, "
                       "where there is no checkpoint", group="The run")
    change: str = flag("", "flags that --resume may change, such as lr,B")
    keep: int = flag(0, "so many checkpoints' weights stay in ckpt/step_..., and always the best "
                     "by held-out score in ckpt/best")


def flag_of(name):
    return "--" + name.replace("_", "-")


def command_line(description, epilog="", names=(), settings=()):
    """A strict parser, which knows no abbreviations and takes one line for an error. Its --help is
    the description, then groups of flags: no usage, in which the few that matter would drown.
    names: the flags, for the error of an unknown one; settings: see parse."""
    p = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS, add_help=False,
                                allow_abbrev=False, epilog=epilog,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    of_recipes = {flag_of(no + name): name for name in settings for no in ("", "no_")}

    def error(message):                                # one line instead of the whole usage
        typed = message.partition("unrecognized arguments: ")[2].split()
        for word in typed:
            name = word.partition("=")[0]
            if name in of_recipes:
                setting = of_recipes[name]
                fail(f"{flag_of(setting)} is a setting of recipes: write {{\"{setting}\": ...}} "
                     "into a .json file and give that as --recipe")
            if name in OLD:
                fail(f"{name} is now {OLD[name]}")
        fail(message + (f"; there are: {' '.join(names)}" if typed and names else ""))
    p.error = error
    return p


def check_seed(args):
    if not 0 <= getattr(args, "seed", 0) < 2**63:
        fail(f"--seed {args.seed} is not from 0 to 2**63 - 1")


def add_flags(p, Args):
    """Every field of Args as a flag, in its group; a boolean gets its --no-x."""
    group = p
    own = [f for f in fields(Args) if f.name not in RunFlags.__dataclass_fields__]
    for f in own + [f for f in fields(Args) if f not in own]:
        if title := f.metadata.get("group"):             # the fields that follow belong to it, too
            group = p.add_argument_group(title)
        if f.metadata.get("setting"):
            continue
        boolean = f.type in (bool, bool | None)          # None: its help says when it is on
        kind = (dict(action=argparse.BooleanOptionalAction) if boolean else
                dict(type=f.type, metavar=f.type.__name__))
        if f.name == "resume":                           # alone it means: there is one
            kind = dict(nargs="?", const="yes", choices=("yes", "auto"), metavar="auto")
        default = ("off", "on")[f.default] if f.type is bool else f.default
        about = f.metadata.get("help", "") + (f" [{default}]" if default not in ("", None) else "")
        group.add_argument(flag_of(f.name), help=about.replace("%", "%%"), **kind)
    group.add_argument("-h", "--help", action="help", help="print this text")
    p.set_defaults(**asdict(Args()))


def recipe_of(name, Args):
    """--recipe: a name in RECIPES, or a .json of settings, which may go on from another's
    ("recipe": its name) -> {field: value}"""
    if not name.endswith(".json"):
        if name not in RECIPES:
            fail(f"unknown recipe {name!r}; there are: {', '.join(RECIPES)}, or a .json of them")
        return RECIPES[name]
    try:
        own = dict(**json.loads(Path(name).read_text()))         # TypeError unless an object
        base = recipe_of(own.pop("recipe"), Args) if "recipe" in own else {}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as e:
        fail(f"--recipe {name} is no JSON object of settings: {e}")
    kinds = {f.name: bool if f.type == bool | None else f.type for f in fields(Args)}
    for k, value in own.items():
        if k in kinds and type(value) is not kinds[k] and (type(value), kinds[k]) != (int, float):
            fail(f"--recipe {name}: {k} is a {kinds[k].__name__}, not {value!r}")
    return base | own


def parse(Args, description, stage=None, tasks=None, not_here=None):
    """A dataclass of `flag`s as a command line: typos die, booleans get --no-x, all are grouped.
    Precedence: the dataclass < `tasks`[--task] < the preset's values for `stage` < its recipe's, or
    --recipe's < a flag. What papers alone set is no flag: a recipe sets it, or a .json of settings
    that is given as --recipe. not_here: {task: settings of recipes that it goes without, which it
    says}; others that the script lacks are an error."""
    settings = [f for f in fields(Args) if f.metadata.get("setting")]
    about = [f"  {f.name:14} {f.metadata['help']}" + f" [{f.default}]" * (f.default != "")
             for f in settings]
    p = command_line(
        description, "\n".join([
            "Settings of recipes; to change one, give a .json as --recipe, such as {\"recipe\": "
            "\"fast\", \"wd\": 0.01}:", *about]) if settings else "",
        [flag_of(f.name) for f in fields(Args) if f not in settings], [f.name for f in settings])
    add_flags(p, Args)
    args = p.parse_args()

    def settle(who, values):
        lacks = [flag_of(k) for k in values if k not in vars(args)]
        if lacks:
            fail(f"{who} needs {', '.join(lacks)}, which this script lacks")
        p.set_defaults(**values)
        return p.parse_args()
    if tasks:
        if args.task not in tasks:
            fail(f"unknown --task {args.task!r}; there are: {', '.join(tasks)}")
        args = settle(f"task {args.task!r}", tasks[args.task])
    if stage:
        paper = getattr(preset(args.preset), stage)
        if paper is None:
            fail(f"the paper of preset {args.preset!r} has no {stage}: see common/presets.py")
        args = settle(f"preset {args.preset!r}", paper)
    if hasattr(args, "recipe"):
        values = recipe_of(args.recipe, Args)
        without = (not_here or {}).get(getattr(args, "task", ""), ())
        if left := [k for k in values if k in without]:
            print(f"recipe {args.recipe!r}: {', '.join(left)} are grpo.py's and left out")
        args = settle(f"recipe {args.recipe!r}",
                      {k: v for k, v in values.items() if k not in without})
    if getattr(args, "resume", ""):
        args = settle("the run in --out", as_before(args, given(p)))
    check_seed(args)
    return Args(**vars(args))


def given(p):
    """-> {name: value} of the flags that stand on the command line"""
    absent, defaults = object(), vars(p.parse_args([]))
    p.set_defaults(**dict.fromkeys(defaults, absent))
    found = {name: value for name, value in vars(p.parse_args()).items() if value is not absent}
    p.set_defaults(**defaults)
    return found


def fork(Args, without, **own):
    """Args of a script that departs from another's: without some of its fields, and with its own,
    {name: flag(...)}, behind them -> dataclass"""
    kept, title = [], ""
    for f in fields(Args):
        about = f.metadata
        title = about["group"] or title                  # of a group whose first field is left out
        if f.name not in {*without, *own}:
            kept.append((f.name, f.type, flag(f.default, about["help"], title, about["setting"])))
            title = ""
    return make_dataclass("Args", kept + [(name, type(f.default), f) for name, f in own.items()])


def given_parts(args):
    """--vlm, --dit, --vae, --refs, --solver, where given: in place of the preset's."""
    return {k: getattr(args, k) for k in (*PARTS, "refs", "solver") if getattr(args, k, "")}


# What a run was started with, and --resume goes on with


def settings_of(out):
    """The flags that a run goes by: those it was started with, in config.json, or those of its
    last --resume that changed some, in config_00120.json. -> {name: value}, {} of no run"""
    files = sorted(Path(out).glob("config*.json"))
    try:
        settings = json.loads(files[-1].read_text()) if files else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) and "out" in settings else {}


def script():
    """-> the name of the script that runs"""
    return Path(sys.argv[0]).name


# These may differ from what a run was started with: they change no update.
FREE = {"out", "resume", "change", "keep", "track", "steps", "eval_every", "final_bench", "micro",
        "checkpoint", "compile", "judge_url", "max_failed"}


def as_before(args, given):
    """--resume goes on with the flags that the run had. given: {name: value} of those on the
    command line, of which only FREE ones, and those that --change names, may differ.
    -> {name: value} of the others, {} where no run is"""
    had = settings_of(args.out)
    if had and had.pop("script", script()) != script():
        fail(f"{args.out} is not a run of {script()}: choose another --out")
    allowed = FREE | {name.strip().strip("-").replace("-", "_") for name in args.change.split(",")}
    for name, value in given.items():
        if name in had and had[name] != value and (
                name not in allowed or name in ("preset", "recipe", "task")):
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} was {had[name]!r} when {args.out} was begun, not {value!r}: leave it out"
                 + ("" if name in ("preset", "recipe", "task") else f", or add --change {name}"))
    return {k: v for k, v in had.items() if k in vars(args) and k not in given
            and k not in ("out", "resume", "change")}
