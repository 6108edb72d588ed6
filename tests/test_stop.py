"""A run may end anywhere, by anything: what goes on from there is what would have been. Runs are
children of this process, which has imported everything, so that a kill costs a second or two.
Random kills and torchrun: stops.py, which is run by hand.
"""

import errno
import json
import os
import random
import resource
import signal
import time

import pytest
import ranks
import tiny
import torch
from ranks import child
from test_cli import complaint, files

import common.checkpoint as checkpoint_py
import common.record as record_py
import grpo
from common.checkpoint import keep_beside, save_checkpoint, saved_about
from common.flags import settings_of
from common.presets import Config
from common.record import Log
from common.rl import Ldam
from common.run import writing

FOUR = ["--steps", 4, "--eval-every", 2]


@pytest.fixture(scope="module")
def photos(parts):
    return ranks.photos_of(parts)


def play(photos, out, name, *flags):
    return ranks.play(photos, out, name, *FOUR, *flags)


def state(out):
    """All that a run has learned and said, but for the time it took."""
    saved = torch.load(out / "ckpt/optim.pt", weights_only=True)
    rows = [{k: v for k, v in row.items() if k != "at" and not k.startswith("s_")}
            for row in record_py.read_log(out)]
    weights = {f.relative_to(out): f.read_bytes() for f in (out / "ckpt").rglob("*.safetensors")}
    return saved, rows, weights


def same(a, b):
    """The same to the last bit, whatever holds it."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """-> f(name): the state of a script's uninterrupted run"""
    known = {}

    def run(name):
        if name not in known:
            out = tmp_path_factory.mktemp("whole") / name
            play(photos, out, name)
            known[name] = state(out)
        return known[name]
    return run


# --- killed ---


def killed_while_writing(photos, out, name, n):
    """SIGKILL at the n-th time, from 0, that a file is to take its place, or a row is written.
    -> was there an n-th?"""
    def run():
        count, replace, write = iter(range(n)), os.replace, record_py.Log.write

        def at_nth(real, half):
            def wrapped(*inputs):
                if next(count, None) is None:
                    half(*inputs)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*inputs)
            return wrapped

        def torn(log, row):
            log.file.seek(0, os.SEEK_END)
            log.file.write(json.dumps(row).encode()[:20])
        os.replace = at_nth(replace, lambda *paths: None)
        record_py.Log.write = at_nth(write, torn)
        play(photos, out, name, "--resume", "auto")
    process = child(run, out.parent / "said")
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), (out.parent / "said").read_text()[-2000:]
    return process.exitcode != 0


@pytest.mark.parametrize("name", ranks.MAINS)
def test_killed_at_every_write(photos, whole, tmp_path, name):
    """Each in turn, so that a run is killed again and again while it goes on: what it becomes in
    the end is the uninterrupted run, every row of it, and nothing half written lies about."""
    out, kills = tmp_path / "run", 0
    while killed_while_writing(photos, out, name, 1 + 5 * kills % 17):
        kills += 1
        assert kills < 40, "the run gets nowhere"
    assert kills >= 2
    assert all(map(same, state(out), whole(name)))
    assert not [f for f in out.rglob("*.tmp")]


def test_killed_between_the_two_files_of_a_checkpoint(photos, whole, tmp_path):
    """The state of update 4 is there, the weights beside it are of update 2: they are written."""
    out, real, calls = tmp_path / "run", checkpoint_py.save_checkpoint, iter(range(2))

    def killed(*inputs, **more):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*inputs, **more)
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(checkpoint_py, "save_checkpoint", killed)
        play(photos, out, "grpo")
    assert saved_about(out / "ckpt")["step"] == 2
    play(photos, out, "grpo", "--resume")
    assert saved_about(out / "ckpt")["step"] == 4 and all(map(same, state(out), whole("grpo")))


def test_training_goes_on_while_a_checkpoint_is_written(photos, tmp_path):
    """Killed in the midst of the second checkpoint, rows later: the run goes on from the first, and
    becomes what it would have been."""
    out, real, calls = tmp_path / "run", checkpoint_py.torch.save, iter(range(2))

    def endless(state, file):
        if next(calls, 1):
            file.write_bytes(b"torn")
            time.sleep(600)
        real(state, file)

    def rows():
        return len(record_py.read_log(out))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(checkpoint_py.torch, "save", endless)
        process = child(lambda: play(photos, out, "grpo", "--steps", 9), tmp_path / "said")
        while process.is_alive() and rows() < 6:
            time.sleep(0.02)
        process.kill()
        process.join()
    assert rows() >= 6 and (out / "ckpt/optim.pt.tmp").read_bytes() == b"torn"
    assert saved_about(out / "ckpt")["step"] == 2
    play(photos, out, "grpo", "--steps", 9, "--resume")
    play(photos, tmp_path / "other", "grpo", "--steps", 9)
    assert all(map(same, state(out), state(tmp_path / "other")))


def test_a_checkpoint_that_could_not_be_written_ends_the_run(photos, tmp_path, monkeypatch):
    """As soon as that is known: the updates after it would be lost."""
    real, calls = checkpoint_py.save_checkpoint, iter(range(2))

    def full(*inputs, **more):
        if next(calls) == 1:
            raise SystemExit("error: the disk is full")
        real(*inputs, **more)
    monkeypatch.setattr(checkpoint_py, "save_checkpoint", full)
    with pytest.raises(SystemExit, match="disk is full"):
        play(photos, tmp_path / "run", "grpo", "--steps", 40)
    assert 4 < len(record_py.read_log(tmp_path / "run")) <= 8


# --- asked to stop ---


def after_row(out, step, process):
    """Waits until a run has logged a step."""
    end = time.time() + 120
    while process.is_alive() and time.time() < end:
        log = out / "log.jsonl"
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get so far")


@pytest.mark.parametrize("name, signals", [*zip(
    ranks.MAINS, 3 * [[signal.SIGTERM] * 2, [signal.SIGINT] * 3])])
def test_signals_end_the_update_and_save(photos, whole, tmp_path, name, signals):
    """One or many: exit code 143 or 130, one line each of what is done, and nothing is lost."""
    out = tmp_path / "run"
    process = child(lambda: play(photos, out, name), tmp_path / "said")
    after_row(out, 1, process)
    for which in signals:
        os.kill(process.pid, which)
        time.sleep(0.05)
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 128 + signals[0], said[-2000:]
    done = torch.load(out / "ckpt/optim.pt", weights_only=True)["step"]
    assert done == record_py.read_log(out)[-1]["step"] < 4
    assert f"stopped by {signals[0].name} after update {done}: saved in" in said
    assert "Traceback" not in said and not (out / "results.json").exists()
    play(photos, out, name, "--resume")
    # A look more, of the update at which it stopped, is all that tells them apart.
    (a, rows, _), (b, wanted, _) = state(out), whole(name)
    assert same(a, b) and len(rows) == len(wanted)
    assert all(row | want == row for row, want in zip(rows, wanted))


def test_a_signal_in_the_benchmark_at_the_end(photos, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def endless(*inputs):
        (tmp_path / "begun").touch()
        while True:
            time.sleep(0.01)
    monkeypatch.setattr(grpo, "before_and_after", endless)
    process = child(lambda: play(photos, out, "grpo", "--final-bench"), tmp_path / "said")
    while process.is_alive() and not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 143 and saved_about(out / "ckpt")["step"] == 4
    assert "stopped by SIGTERM at once; what was saved is whole" in (tmp_path / "said").read_text()


def test_a_signal_in_the_last_look(photos, tmp_path, monkeypatch):
    """The run is done by then, and ends in the signal's exit code before the benchmark."""
    out, real = tmp_path / "run", record_py.Recorder.look

    def look(self, step):
        real(self, step)
        if step == self.args.steps:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(record_py.Recorder, "look", look)
    process = child(lambda: play(photos, out, "grpo", "--final-bench"), tmp_path / "said")
    process.join()
    assert process.exitcode == 143 and saved_about(out / "ckpt")["step"] == 4
    assert "stopped by SIGTERM after update 4: saved in" in (tmp_path / "said").read_text()
    assert not (out / "results.json").exists()


# --- full disks, torn files ---


@pytest.mark.parametrize("limit", [2_000, 60_000, 400_000])
def test_a_full_disk(photos, whole, tmp_path, limit):
    """No file may grow past a limit: the log, a grid or the checkpoint fails, in one line; what
    was there is whole, and with space the run goes on."""
    out = tmp_path / "run"

    def cramped():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        real = record_py.Recorder.record

        def record(self, step, *inputs):
            if step == 2:                                    # once there is a checkpoint
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return real(self, step, *inputs)
        record_py.Recorder.record = record
        play(photos, out, "grpo")
    process = child(cramped, tmp_path / "said")
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 1 and "Traceback" not in said, said[-2000:]
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and ("could not be written" in last
                                           or "cannot be written" in last)
    assert saved_about(out / "ckpt")["step"] == 2 and not [f for f in out.rglob("*.tmp")]
    assert record_py.read_log(out)[-1]["step"] in (2, 3, 4)
    play(photos, out, "grpo", "--resume")
    assert all(map(same, state(out), whole("grpo")))


@pytest.fixture
def stopped(photos, tmp_path):
    """-> a run of grpo.py with a checkpoint of update 2 and rows up to 3"""
    with tiny.killed_at(grpo, "rollout", 3):
        play(photos, tmp_path / "run", "grpo")
    return tmp_path / "run"


LOGS = dict(whole=lambda s: s, torn=lambda s: s[:-30], no_newline=lambda s: s[:-1],
            row_lost=lambda s: "".join(s.splitlines(True)[:2]), empty=lambda s: "",
            garbage=lambda s: s + "\0\0\0 {", foreign=lambda s: s + "[1, 2]\n", gone=None)


@pytest.mark.parametrize("log", LOGS)
def test_any_log_is_gone_on_with(photos, whole, stopped, log, capfd):
    """What is torn goes, rows that are lost are named, the weights are as they would have been."""
    file = stopped / "log.jsonl"
    text = file.read_text()
    file.unlink() if LOGS[log] is None else file.write_text(LOGS[log](text))
    play(photos, stopped, "grpo", "--resume")
    (a, rows, weights), (b, wanted, as_wanted) = state(stopped), whole("grpo")
    assert same(a, b) and weights == as_wanted
    lost = [row["step"] for row in wanted if row["step"] not in [r["step"] for r in rows]]
    assert lost == dict(empty=[0, 1, 2], gone=[0, 1, 2], row_lost=[2]).get(log, [])
    assert ("lacks the rows up to update 2" in capfd.readouterr().err) == bool(lost)


@pytest.mark.parametrize("rows, keep, tail", [
    (100_001, 99_990, b""), (30_001, 50, b'{"step'), (5, 2, b""), (5, -1, b"x"),
    (5, 4, b"x\n[1]\n"), (0, 3, b""), (0, 3, b"torn")])
def test_a_long_log_is_cut_at_its_end(tmp_path, rows, keep, tail):
    """Also where more than the last megabyte goes; 100,000 rows take below 0.1 s."""
    text = "".join(json.dumps(dict(step=i, at=2.0 * i, **{f"c{k}": 1 / 3 for k in range(9)})) + "\n"
                   for i in range(rows))
    (tmp_path / "log.jsonl").write_bytes(text.encode() + tail)
    begun, log = time.process_time(), record_py.Log(tmp_path)
    last = log.keep_up_to(keep)
    spent = time.process_time() - begun
    log.file.close()
    kept = min(rows, keep + 1)
    assert [row["step"] for row in record_py.read_log(tmp_path)] == list(range(kept))
    assert (last["step"] if last else -1) == kept - 1
    assert rows < 100_000 or spent < 0.1


def test_ldam_goes_by_whole_rows(tmp_path):
    """Its state is that of the rows: one that is torn is none, and one that is lost is missed."""
    rows = [dict(step=i, grad_norm=2.0**i, reward_clip=1 / i) for i in range(1, 5)]
    args = grpo.Args(ldam_leap=1.5, ldam_falls=2, ldam_gamma=0.3)

    def resumed(text, start):
        (tmp_path / "log.jsonl").write_text(text)
        return Ldam(args, {"clip": range(3, 5)}, (3, 4)).resumed(tmp_path, start)
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    noise = resumed(whole, 3)
    assert noise.shape == (2,) and (noise != 1).all()
    for tail in (whole[:-9], whole + '{"step": 5', whole + "[1, 2]\n"):
        assert torch.equal(resumed(tail, 3), noise)
    for lost in (whole[:-9], whole.partition("\n")[2], ""):
        assert "lacks rows up to update 4" in complaint(resumed, lost, 4)
    (tmp_path / "log.jsonl").unlink()
    assert Ldam(args, {"clip": range(3, 5)}, (3, 4)).resumed(tmp_path, 0) is None


def test_states_that_are_damaged(photos, stopped):
    """60 places at which three bytes differ, cuts, and what is no state: one line each, and the
    folder stays as it is; or, where nothing that counts is hurt, the very state."""
    file, rng = stopped / "ckpt/optim.pt", random.Random(0)
    good, known = file.read_bytes(), torch.load(file, weights_only=True)
    broken = [b"", b"x" * 100, good[:-1], good[: len(good) // 2], json.dumps({}).encode()]
    for _ in range(60):
        hurt = bytearray(good)
        for _ in range(3):
            hurt[rng.randrange(len(hurt))] ^= 1 + rng.randrange(255)
        broken.append(bytes(hurt))
    for other in (dict(a=1), [1, 2], 3, dict(known, raw={}), dict(known, opt={}),
                  {k: v for k, v in known.items() if k != "step"}):
        torch.save(other, stopped / "x.pt")
        broken.append((stopped / "x.pt").read_bytes())
    (stopped / "x.pt").unlink()
    refused = 0
    args = grpo.Args(out=str(stopped), resume="yes")
    for content in broken:
        file.write_bytes(content)
        before = files(stopped)
        params = {k: torch.nn.Parameter(torch.zeros_like(v)) for k, v in known["raw"].items()}
        ema = checkpoint_py.Ema(params, 0.9)
        opt = torch.optim.AdamW([dict(params=list(params.values()))])
        try:
            assert checkpoint_py.resume_run(ema, args, opt) == (known["step"], known["data"])
            assert same({k: p.detach() for k, p in params.items()}, known["raw"])
            assert same(ema.mean, known["mean"])
            assert same({k: opt.state[p] for k, p in params.items()}, known["opt"])
        except SystemExit as e:
            assert e.code.startswith("error: ") and "\n" not in e.code
            refused += 1
        assert files(stopped) == before
    assert refused > len(broken) * 0.8
    file.write_bytes(b"")
    assert "cannot be read" in complaint(play, photos, stopped, "grpo", "--resume")


# --- whose folder it is, and which flags ---


def test_one_folder_one_run(photos, tmp_path):
    """A second start and a second resume refuse while the first is at work."""
    out = tmp_path / "run"
    first = child(lambda: play(photos, out, "grpo", "--steps", 400), tmp_path / "said")
    after_row(out, 2, first)
    at_work = "belongs to a run that is at work"
    for flags, words in (([], "holds another run"), (["--resume"], at_work),
                         (["--resume", "auto"], at_work)):
        second = child(lambda: play(photos, out, "grpo", *flags), tmp_path / "other")
        second.join()
        assert second.exitcode == 1 and words in (tmp_path / "other").read_text()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    steps = [row["step"] for row in record_py.read_log(out)]
    assert steps == list(range(len(steps)))


def test_auto_begins_and_goes_on(photos, whole, tmp_path):
    """One command: in no folder, in one where the run died before its first checkpoint, and in one
    that holds a checkpoint; done is done."""
    out = tmp_path / "run"
    with tiny.killed_at(grpo, "rollout", 1):
        play(photos, out, "grpo", "--resume", "auto")
    assert not (out / "ckpt/optim.pt").exists()
    assert "--resume auto begins" in complaint(play, photos, out, "grpo", "--resume")
    assert "holds another run" in complaint(play, photos, out, "grpo")
    with tiny.killed_at(grpo, "rollout", 3):
        play(photos, out, "grpo", "--resume", "auto")
    play(photos, out, "grpo", "--resume", "auto")
    assert all(map(same, state(out), whole("grpo")))
    before = files(out)
    play(photos, out, "grpo", "--resume", "auto", "--no-final-bench")
    changed = {f.name for f, text in files(out).items() if before.get(f) != text}
    assert changed <= {"config_00004.json"}


def test_resume_knows_its_flags(photos, stopped):
    """They come from config.json, which stays; what changes the run's meaning has to be named."""
    config = (stopped / "config.json").read_bytes()

    def resume(*flags):
        return play(photos, stopped, "grpo", "--resume", *flags)
    assert json.loads(config)["script"] == "x.py"
    for flags in ("--seed 1", "--reward geneval", "--G 8", "--lr 1", "--B 2", "--train bridge",
                  "--init data/shapes/sft"):
        name, value = flags.split()
        said = complaint(resume, name, value)
        assert name in said and f"--change {name[2:]}" in said
    for flags, words in (([], "--preset was 'shapes'"), ([], "begin anew: --init"),
                         (["--change", "preset"], "no flag that"),
                         (["--change", "wd"], "no flag that"),
                         (["--change", "lr,nonsense"], "no flag that")):
        assert words in complaint(resume, "--preset", "deepgen", *flags)
    assert not list(stopped.glob("config_*"))
    for broken in (config[:-3], None):                   # no flags but the defaults are left
        (stopped / "config.json").unlink() if broken is None else (
            stopped / "config.json").write_bytes(broken)
        assert "no config.json that can be read" in complaint(resume)
    (stopped / "config.json").write_bytes(config)
    resume("--lr", 3e-4, "--change", "lr")
    assert (stopped / "config.json").read_bytes() == config
    now = json.loads((stopped / "config_00002.json").read_text())
    was = json.loads(config)
    assert now == was | dict(lr=3e-4) and was["lr"] != 3e-4
    rows = resume("--steps", 5)                                  # of the rate as it is now
    assert rows[-1]["step"] == 5
    assert json.loads((stopped / "config_00004.json").read_text())["lr"] == 3e-4


def test_long_runs_have_long_numbers(tmp_path):
    """Of steps with five digits and with six the latest is the highest number."""
    for step, lr in ((50_000, 1), (120_000, 2)):
        (tmp_path / f"config_{step:05d}.json").write_text(json.dumps(dict(lr=lr)))
    (tmp_path / "config.json").write_text(json.dumps(dict(lr=0)))
    assert settings_of(tmp_path) == dict(lr=2)
    (tmp_path / "ckpt/step_00100_good").mkdir(parents=True)      # a user's own
    for step in (98_000, 99_000, 100_000, 101_000):
        save_checkpoint(tmp_path / "ckpt", dict(w=torch.ones(1)), Config(), step)
        keep_beside(tmp_path, step, 2)
    assert sorted(f.name for f in (tmp_path / "ckpt").glob("step_*")) == [
        "step_00100_good", "step_100000", "step_101000"]


def test_a_disk_without_locks(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(record_py.fcntl, "flock", flock)
    Log(tmp_path).write(dict(step=1))
    assert record_py.read_log(tmp_path) == [dict(step=1)]
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_a_folder_that_is_gone_ends_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="could not be written"), writing(tmp_path / "gone/file"):
        open(tmp_path / "gone/file", "w")


def test_folders_that_are_not_a_run_s(photos, tmp_path):
    theirs = tmp_path / "model"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    (tmp_path / "file").write_text("x")
    before = files(tmp_path)
    for out, words in ((theirs, "neither empty nor a run's"), ("", "--out is empty"),
                       (tmp_path / "file", "Not a directory"), ("/proc/run", "error: --out"),
                       (tmp_path / "file/run", "Not a directory")):
        for flags in ([], ["--resume", "auto"]):
            said = complaint(tiny.play, photos, tmp_path / "x", *FOUR, *flags, "--out", out)
            assert words in said
    assert files(tmp_path) == before


def test_the_best_and_the_last_are_kept(photos, tmp_path, monkeypatch):
    """ckpt/best is the checkpoint with the highest held-out score; --keep 2 two more beside it."""
    out, real = tmp_path / "run", record_py.Recorder.look
    scores = iter([0.9, 0.1, 0.3, 0.2, 0.3, 0])

    def look(self, step):                            # the tiny model's own scores are all 0
        real(self, step)
        self.shown["score"] = next(scores)
    monkeypatch.setattr(record_py.Recorder, "look", look)
    play(photos, out, "grpo", "--steps", 5, "--eval-every", 1, "--keep", 2)
    about = saved_about(out / "ckpt/best")
    assert (about["step"], about["score"]) == (2, 0.3)               # the first of equals
    assert sorted(f.name for f in (out / "ckpt").glob("step_*")) == ["step_00004", "step_00005"]
    assert saved_about(out / "ckpt/step_00004")["step"] == 4
    (tmp_path / "other").touch()
    assert {f.stat().st_mode for f in out.rglob("*") if f.is_file()} == {
        (tmp_path / "other").stat().st_mode}                     # readable as any file is
