"""A dataclass as a strict command line: numbers have ranges, names have choices. Values of presets
and recipes are held to the same, and stand below flags."""

import argparse
import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from common.presets import PARTS, PRESETS, RECIPES, preset
from common.run import beside, fail
from common.track import TRACKERS

OLD = {                                   # flags that were renamed, and what to give instead
    "--chat": "--answer", "--prompts": "--data", "--eval-prompts": "--eval-data",
    "--task": "a flag of reflect.py, where the language model acts: python reflect.py --task text, "
              "vqa, cot or reflect",
    "--bench shapes-reason": "--bench shapes-think", "--bench shapes-vqa": "--bench shapes-answer",
}
# What a flag's text may name. Of the second kind "" is none, and the Hub is asked when it is read.
FILE = "a file or folder that exists"
HUB = "a folder that exists, or owner/repo on the Hub"
DATA = "a file or folder that exists, or after `pip install datasets` owner/name on the Hub"


def flag(default, help, allowed=None, group="", setting=False, positional=False):
    """A field of a script's Args. help: what --help says of it, {} standing for its choices.
    allowed: a number's range, such as "[0, 1)" or "0 or [0.01, 100]"; of a text its choices, FILE,
    DATA or HUB, or a function that reads it, or raises ValueError; None: any text. The default is
    allowed, too. group: the title of the flags that begin with this one; setting: no flag, but one
    that recipes have: see parse; positional: all that stands on the command line without a flag."""
    if allowed and not isinstance(allowed, str) and not callable(allowed):
        help = help.replace("{}", ", ".join(allowed))
    return field(default=default, metadata=dict(help=help, allowed=allowed, group=group,
                                                setting=setting, positional=positional))


@dataclass
class RunFlags:
    """What every script that trains has: how its run is begun, gone on with and kept."""
    resume: str = flag("", "go on with the run in --out, by the flags that it had; auto: or begin, "
                       "where there is no checkpoint", ("yes", "auto"), group="The run")
    change: str = flag("", "flags that --resume may change, such as lr,B")
    keep: int = flag(0, "so many checkpoints' weights stay in ckpt/step_..., and always the best "
                     "by held-out score in ckpt/best", "[0, 1000]")
    track: str = flag("", "where rows and pictures also go, by your own installation: {}", TRACKERS)


@dataclass
class FlowFlags(RunFlags):
    """What stages 1 and 2 have besides: what a step costs, but not what it learns."""
    micro: int = flag(0, "images per backward; 0: all. The gradients are equal, but for a "
                      "VLM's LoRA with dropout", "[0, 1e5]", group="Memory and speed")
    checkpoint: bool = flag(False, "less memory: DiT and VLM are computed again in the backward "
                            "pass")
    compile: bool = flag(False, "the DiT runs through torch.compile: minutes at first, then faster")
    shard: bool = flag(False, "each rank keeps a part of what learns and of AdamW's state (FSDP2)")
    workers: int = flag(2, "threads that read and decode pictures ahead; 0: none", "[0, 64]")
    cache: str = flag("", "folder that keeps the VAE's latents for later epochs and runs")


def flag_of(name):
    return "--" + name.replace("_", "-")


def number(text, kind=float):
    """ "0.5" -> 0.5; NaN of what is no number, or in another alphabet's digits."""
    try:
        return kind(text) if str(text).isascii() else math.nan
    except (ValueError, OverflowError):
        return math.nan


def inside(x, interval):
    """Is x in an interval such as "[0, 1)", or in one of "0 or [0.01, 100]"? NaN is in none."""
    def end(text):                                       # "1e6", "1/3", "2**63"
        base, _, power = text.partition("**")
        over, _, under = base.partition("/")
        return (float(over) / float(under or 1)) ** int(power or 1)
    for part in interval.split(" or "):
        low, _, high = part.strip("[()]").partition(", ")
        low, high = end(low), end(high or low)
        if low < x < high or x == low and part[0] != "(" or x == high and part[-1] != ")":
            return True
    return False


def shown(value):
    """A value in an error's one line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:80]}... ({len(text)} characters)"


def there(name, allowed=FILE):
    """Is there such a file or folder, here or, of the classroom's, beside the scripts? DATA, HUB:
    or might it be on the Hub; HUB: or is it none, ""?"""
    if name and os.path.exists(beside(name)):
        return True
    may_be = allowed == HUB or allowed == DATA and find_spec("datasets")
    on_hub = re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})+", name, re.ASCII)
    return bool(may_be and (on_hub or allowed == HUB and not name))


def check(f, value, who=""):
    """A flag's text, or a value of `who`, a preset or a recipe -> what the script gets, or the
    user's error. What a preset names need not be there: nobody may read it."""
    if isinstance(value, list):                          # of a flag that may be given again
        return tuple(check(f, v, who) for v in value)
    said, allowed = f"{who}{flag_of(f.name)} {shown(value)}", f.metadata["allowed"]
    if f.type in (int, float):
        x, what = number(value, f.type), "an integer" if f.type is int else "a number"
        if not inside(x, allowed):
            given = shown(x if x == x else value)          # NaN is not
            fail(f"{who}{flag_of(f.name)} {given}: must be {what} in {allowed}")
        return x
    if re.search("[\ud800-\udfff\0]", str(value)):      # what the shell gave in no encoding of ours
        fail(f"{said}: must be text in UTF-8")
    if allowed is None or value == f.default:            # must_exist sees to that
        return value
    if callable(allowed):
        read_text(said, value, allowed)
    elif not isinstance(allowed, str):
        among(f.name, value, allowed, who)
    elif not who and not there(value, allowed):
        fail(f"{said}: must be {allowed}")
    return value


def among(name, value, choices, who=""):
    """The user's error where a flag's value is none of its choices."""
    if renamed := OLD.get(f"{flag_of(name)} {value}"):
        fail(f"{flag_of(name)} {value} is now {renamed}")
    if value not in choices:
        fail(f"{who}unknown {flag_of(name)} {shown(value)}; there are: {', '.join(choices)}")


def read_text(said, text, read):
    """read(text), whose OSError and ValueError are the user's error; said: what the text is of."""
    try:
        return read(text)
    except (OSError, ValueError, RecursionError) as e:
        why = getattr(e, "strerror", None) or e
        fail(f"{said}: {' '.join(str(why).split())[:300]}")


def read_flag(args, name, read):
    """read(a flag's value), or the user's error"""
    return read_text(f"{flag_of(name)} {shown(getattr(args, name))}", getattr(args, name), read)


def must_exist(args, *names):
    """The user's error where a flag of data that was not given, so that nobody looked, names
    nothing, or the classroom's for a preset that draws photos."""
    for name in names:
        value = getattr(args, name)
        if value.startswith("data/shapes") and not args.preset.startswith("shapes"):
            fail(f"preset {args.preset!r} draws photos and needs {flag_of(name)} of its own: "
                 "docs/data.md")
        if value and not there(value):
            fail(f"{flag_of(name)} {shown(value)}: must be {FILE}; the classroom's: python -m "
                 "data.shapes.prepare data")


def can_hold(folder):
    """OSError where a folder can neither be made nor be written into; nothing is left behind."""
    folder = Path(folder).absolute()
    place = next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())
    TemporaryFile(dir=place).close()


def command_line(description, epilog="", names=(), settings=()):
    """A strict parser, which knows no abbreviations, takes one line for an error, and returns what
    was given. Its --help is the description, then groups of flags: no usage, in which the few that
    matter would drown. names: the flags, for the error of an unknown one; settings: see parse."""
    p = argparse.ArgumentParser(
        description=description, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False,
        epilog=epilog, argument_default=argparse.SUPPRESS, formatter_class=partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=34))
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


def kind_of(f):
    """What --help says that a flag takes: int [1, 1e7]"""
    ranged = f.type in (int, float)
    return f"{f.type.__name__} {f.metadata['allowed']}" if ranged else (
        "" if f.type is bool else "str")


def about(f):
    """What --help says of a flag."""
    default = ("off", "on")[f.default] if f.type is bool else f.default
    return f.metadata["help"] + (f" [{default}]" if default not in ("", None, ()) else "")


def in_order(Args):
    """-> its fields: a script's own, then those that it shares with others"""
    own = {f.name for f in fields(Args)}
    shared = [kind.__dataclass_fields__.keys() for kind in (FlowFlags, RunFlags)]
    return sorted(fields(Args), key=lambda f: sum(f.name in its for its in shared if its <= own))


def add_flags(p, Args):
    """Every field of Args as a flag, in its group; a boolean gets its --no-x, a tuple may be given
    again."""
    group = p
    for f in in_order(Args):
        if title := f.metadata["group"]:                 # the fields that follow belong to it, too
            group = p.add_argument_group(title)
        if f.metadata["setting"]:
            continue
        text = about(f).replace("%", "%%")
        if f.metadata["positional"]:
            group.add_argument(f.name, nargs="*", help=text)
        elif f.name == "resume":                         # alone it means: there is one
            group.add_argument("--resume", help=text, metavar="auto", nargs="?", const="yes")
        elif f.type in (bool, bool | None):              # None: its help says when it is on
            group.add_argument(flag_of(f.name), help=text, action=argparse.BooleanOptionalAction)
        else:
            group.add_argument(flag_of(f.name), help=text, metavar=kind_of(f),
                               action="append" if f.type is tuple else "store")
    group.add_argument("-h", "--help", action="help", help="print this text")


def recipe_of(name, Args, preset_has):
    """--recipe: a name in RECIPES, or a .json of settings, which goes on from the recipe that it
    names ("recipe": its name), else from the one that the preset has -> {field: value}"""
    if not name.endswith(".json"):
        if name not in RECIPES:
            fail(f"unknown --recipe {shown(name)}; there are: {', '.join(RECIPES)}, or a .json of "
                 "them")
        return RECIPES[name]
    try:
        own = dict(**json.loads(Path(name).read_text()))         # TypeError unless an object
        base = recipe_of(own.pop("recipe", preset_has), Args, preset_has)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as e:
        fail(f"--recipe {shown(name)} is no JSON object of settings: {f'{e}'[:300]}")
    kinds = {f.name: bool if f.type == bool | None else f.type for f in fields(Args)}
    for k, value in own.items():
        if k in kinds and type(value) is not kinds[k] and (type(value), kinds[k]) != (int, float):
            fail(f"--recipe {shown(name)}: {k} is a {kinds[k].__name__}, not {shown(value)}")
    return base | own


def parse(Args, description, stage=None, tasks=None, not_here=None, more=""):
    """A dataclass of `flag`s as a command line: typos die, booleans get --no-x, all are grouped.
    Precedence: the dataclass < `tasks`[--task] < the preset's values for `stage` < its recipe's, or
    --recipe's < a flag. What papers alone set is no flag: a recipe sets it, or a .json of settings
    that is given as --recipe. not_here: {task: settings of recipes that it goes without, which it
    says}; others that the script lacks are an error. more: a last group for --help"""
    known = {f.name: f for f in in_order(Args)}
    settings = [f for f in known.values() if f.metadata["setting"]]
    said = [f"  {f'{f.name} {kind_of(f)}':30}  {about(f)}" for f in settings]
    p = command_line(
        description, "\n".join([
            "Settings of recipes; to change one, give a .json as --recipe, such as {\"recipe\": "
            "\"fast\", \"wd\": 0.01}:", *said]) if settings else more,
        [flag_of(name) for name, f in known.items() if f not in settings],
        [f.name for f in settings])
    add_flags(p, Args)
    given = {name: check(known[name], value) for name, value in vars(p.parse_args()).items()}
    if given.get("resume"):
        given = as_before(known, given)
    elif "change" in given:
        fail(f"--change {shown(given['change'])} belongs to --resume")
    args = asdict(Args()) | given

    def settle(who, values, instead=""):
        lacks = [flag_of(k) for k in values if k not in known]
        if lacks:
            fail(f"{who} needs {', '.join(lacks)}, which this script lacks{instead}")
        args.update({k: check(known[k], v, f"{who}: ") for k, v in values.items()} | given)
    if tasks:
        settle(f"task {args['task']!r}", tasks[args["task"]])
    paper = {}
    if stage:
        paper = getattr(preset(args["preset"]), stage)
        if paper is None:
            have = [name for name, c in PRESETS.items() if getattr(c, stage) is not None]
            fail(f"the paper of preset {args['preset']!r} has no {stage}; presets that have: "
                 + ", ".join(have))
        settle(f"preset {args['preset']!r}", paper)
    if "recipe" in args and not known.keys() <= given.keys():    # a resumed run has them all
        values = recipe_of(args["recipe"], Args, paper.get("recipe", Args.recipe))
        without = (not_here or {}).get(args.get("task", ""), ())
        if left := [k for k in values if k in without]:
            print(f"recipe {args['recipe']!r}: {', '.join(left)} are nothing for this and left out")
        settle(f"recipe {args['recipe']!r}",
               {k: v for k, v in values.items() if k not in without},
               ": give another --recipe, such as fast")
    return Args(**args)


def fork(Args, without, **own):
    """Args of a script that departs from another's: without some of its fields, and with its own,
    {name: flag(...)}, behind them -> dataclass"""
    kept, title = [], ""
    for f in fields(Args):
        title = f.metadata["group"] or title             # of a group whose first field is left out
        if f.name not in {*without, *own}:
            kept.append((f.name, f.type, flag(f.default, **f.metadata | dict(group=title))))
            title = ""
    return make_dataclass("Args", kept + [(name, type(f.default), f) for name, f in own.items()])


def given_parts(args):
    """--vlm, --dit, --vae, --refs, --solver, where given: in place of the preset's."""
    return {k: getattr(args, k) for k in (*PARTS, "refs", "solver") if getattr(args, k, "")}


# What a run was started with, and --resume goes on with


def settings_of(out):
    """The flags that a run goes by: those it was started with, in config.json, or those of its
    last --resume that changed some, in config_00120.json. -> {name: value}, {} of no run"""
    files = sorted(Path(out).glob("config*.json"), key=lambda f: (len(f.name), f.name))
    try:
        settings = json.loads(files[-1].read_text()) if files else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def script():
    """-> the name of the script that runs"""
    return Path(sys.argv[0]).name


# These may differ from what a run was started with: they change no update, but that rates fall
# more slowly with more --steps.
FREE = {"out", "resume", "change", "keep", "track", "steps", "eval_every", "final_bench", "micro",
        "checkpoint", "compile", "shard", "workers", "cache", "judge_url", "max_failed"}
FIXED = {"preset", "recipe", "task"}     # stand for many others, which a run has by now


def as_before(known, given):
    """--resume goes on with the flags that the run had, as if they were given. known: {name:
    field}; given: {name: value} of the command line, of which only FREE ones, and those that
    --change names, may differ. -> {name: value}"""
    out = given.get("out", known["out"].default)
    had = settings_of(out)
    if not had and (Path(out) / "ckpt" / "optim.pt").exists():
        fail(f"{out} has a checkpoint, but no config.json that can be read and says its flags: put "
             "it back, or start anew in another --out")
    if had and had.pop("script", script()) != script():
        fail(f"{out} is not a run of {script()}: choose another --out")
    named = {name.strip().strip("-").replace("-", "_") for name in
             given.get("change", "").split(",")} - {""}
    settings = {name for name, f in known.items() if f.metadata["setting"]}
    if odd := named - (known.keys() - FIXED - settings):
        fail(f"--change {shown(','.join(sorted(odd)))}: no flag that may change")
    for name, value in given.items():
        if name in had and had[name] != value and name not in FREE | named - FIXED:
            other = f"add --change {name}" if name not in FIXED else (
                f"begin anew: --init {out} --out, another folder")
            fail(f"{flag_of(name)} was {shown(had[name])} when {out} was begun, not {shown(value)}:"
                 f" leave it out, or {other}")
    return {k: check(known[k], v, f"{out}: ") for k, v in had.items() if k in known} | given
