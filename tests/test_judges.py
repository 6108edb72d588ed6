"""Endpoints that misbehave, over real sockets: a judge's question ends in time, in little memory,
without a word of the key, and the run goes on or says who is at fault."""

import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import tiny
import torch

from common.stop import stopping
from eval import check_scored, score
from rewards.judge import LONGEST, Judge

KEY = "sk-SECRET/0123456789+abc"
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
GOOD = json.dumps(dict(choices=[dict(message=dict(content=" 4 "))])).encode()


class Server(ThreadingHTTPServer):
    """plan(handler, how many were asked before) writes what it likes to handler.wfile."""
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self, plan=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.seen, self.at, self.sent = plan, [], [], 0
        self.over, self.lock = threading.Event(), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):                                  # who asked has hung up
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            k = len(self.server.seen)
            self.server.seen.append((self.headers["Authorization"], body))
            self.server.at.append(time.monotonic())
        self.close_connection = True
        self.server.plan(self, k)

    do_GET = do_POST

    def log_message(self, *_):
        pass

    def send(self, data):
        self.wfile.write(data)
        self.server.sent += len(data)

    def reply(self, status, data=b"", **headers):
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([f"HTTP/1.1 {status} x", *lines, f"Content-Length: {len(data)}", "",
                               ""]).encode() + data)

    def drip(self, data, seconds=0.03):
        for i in range(len(data)):
            self.send(data[i : i + 1])
            if self.server.over.wait(seconds):
                return


@pytest.fixture
def serve(monkeypatch):
    """serve(plan) -> a server"""
    servers = []
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stopping.clear()
    yield lambda plan=None: servers.append(Server(plan)) or servers[-1]
    stopping.clear()
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


def judge_at(server, **settings):
    return Judge("m", server.url, **dict(timeout=0.6, retries=2, pause=0.01, parallel=4, last=0.3)
                 | settings)


def timed(judge, n=1):
    """-> answers to n questions, seconds"""
    begin = time.monotonic()
    return judge.ask_all([([PICTURE], f"question {i}") for i in range(n)]), time.monotonic() - begin


def clean(message):
    """One printable line, short, that repeats neither the key nor the picture."""
    assert message.isprintable() and len(message) < 400, message
    assert "SECRET" not in message and "iVBOR" not in message


HEAD = b"HTTP/1.1 200 x\r\nContent-Length: 400\r\n\r\n"


# What an endpoint may do, and how often it is then asked.
def silent(h, k):
    h.server.over.wait(20)


def drips_its_body(h, k):
    h.send(HEAD)
    h.drip(b"x" * 400)


def drips_its_head(h, k):
    h.drip(HEAD)


def drips_chunks(h, k):
    h.send(b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n")
    h.drip(b"1\r\nx\r\n" * 100)


def continues_for_ever(h, k):
    while not h.server.over.wait(0.02):
        h.send(b"HTTP/1.1 100 Continue\r\n\r\n")


def stalls_midway(h, k):
    h.send(HEAD + GOOD)
    h.server.over.wait(20)


SLOW = [silent, drips_its_body, drips_its_head, drips_chunks, continues_for_ever, stalls_midway]


def endless_body(h, k):
    h.send(b"HTTP/1.1 200 x\r\n\r\n")
    while True:
        h.send(b" " * 65536)


def endless_chunks(h, k):
    h.send(b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        h.send(b"1000\r\n" + b" " * 4096 + b"\r\n")


def endless_refusal(h, k):
    h.send(b"HTTP/1.1 401 x\r\n\r\n")
    while True:
        h.send(b"no " * 20000)


def endless_header(h, k):
    h.send(b"HTTP/1.1 200 x\r\nX: ")
    while True:
        h.send(b"y" * 65536)


def a_bomb(h, k):
    h.reply(200, gzip.compress(b" " * 50_000_000), Content_Encoding="gzip")


FLOODS = {endless_body: 3, endless_chunks: 3, endless_refusal: 1, endless_header: 3, a_bomb: 3}


def answers(*reply, **headers):
    return lambda h, k: h.reply(*reply, **headers)


def raw(data):
    return lambda h, k: h.send(data)


def content(x):
    return json.dumps(dict(choices=[dict(message=dict(content=x))])).encode()


def echo(status):
    def plan(h, k):
        key, body = h.server.seen[-1]
        h.reply(status, f"{key}\r\n\x1b[31m{body.decode()}".encode())
    return plan


WRONG = {
    "empty": (answers(200), 3), "no JSON": (answers(200, b"<html>\n<b>hi"), 3),
    "another's JSON": (answers(200, b'{"error": "overloaded"}'), 3),
    "a list": (answers(200, b"[1]"), 3), "a number": (answers(200, b"1e999"), 3),
    "null": (answers(200, b"null"), 3), "no choices": (answers(200, b'{"choices": []}'), 3),
    "choices are an object": (answers(200, b'{"choices": {"a": 1}}'), 3),
    "no text": (answers(200, content(None)), 3), "parts": (answers(200, content([1])), 3),
    "deep": (answers(200, b"[" * 900_000), 3), "deeper": (answers(200, b'{"a":' * 150_000), 3),
    "deep and closed": (answers(200, b"[" * 400_000 + b"]" * 400_000), 3),
    "a long number": (answers(200, b"9" * 900_000), 3),
    "bytes": (answers(200, bytes(range(256)) * 9), 3), "UTF-16": (answers(200, b"\xff\xfex"), 3),
    "cut": (raw(b"HTTP/1.1 200 x\r\nContent-Length: 400\r\n\r\n" + GOOD), 3),
    "hangs up": (raw(b""), 3), "no HTTP": (raw(b"SSH-2.0-OpenSSH_9.6\r\n" * 3), 3),
    "bad header": (raw(b"HTTP/1.1 200 x\r\nno colon\r\n\r\n"), 3),
    "bad length": (raw(b"HTTP/1.1 200 x\r\nContent-Length: -5\r\n\r\n" + GOOD), 3),
    "bad chunks": (raw(b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), 3),
    **{str(s): (answers(s, b"later"), 3) for s in (408, 429, 500, 502, 503, 504, 529, 599)},
    **{str(s): (answers(s, b"no"), 1) for s in (300, 304, 400, 401, 402, 403, 404, 413, 422, 451)},
    **{f"repeats, {s}": (echo(s), n) for s, n in ((200, 3), (401, 1), (500, 3))},
    "wants years": (answers(429, b"", Retry_After="99999999"), 1),
    "wants a date": (answers(429, b"", Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"), 3),
    "wants nonsense": (answers(503, b"", Retry_After="-1e9"), 3),
}


@pytest.mark.parametrize("plan", SLOW)
def test_time_is_bounded(serve, plan):
    """A question ends at its deadline, whatever dribbles in; so do 200, as the first are given up
    with all others."""
    judge = judge_at(serve(plan))
    (answer,), seconds = timed(judge)
    assert answer is None and 0.5 < seconds < 1.2 and "in time" in judge.error
    server = serve(plan)
    judge = judge_at(server)
    replies, seconds = timed(judge, 200)
    assert replies == [None] * 200 and seconds < 2 and len(server.seen) < 9
    clean(judge.error)


@pytest.mark.parametrize("plan, tries", FLOODS.items())
def test_size_is_bounded(serve, plan, tries):
    server = serve(plan)
    judge = judge_at(server, timeout=20)
    (answer,), seconds = timed(judge)
    assert answer is None and len(server.seen) == tries and seconds < 10
    assert server.sent < tries * (LONGEST + 8_000_000)           # what sockets hold in between
    clean(judge.error)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers(serve, name):
    plan, tries = WRONG[name]
    server = serve(plan)
    judge = judge_at(server, timeout=20)
    assert timed(judge)[0] == [None] and len(server.seen) == tries
    assert judge.error.startswith(server.url)
    clean(judge.error)


def test_right_answers(serve):
    """Whatever their content is called, however they are cut, after whatever failures."""
    for headers in ({}, dict(Content_Type="text/html"), dict(Content_Type="image/png; q=\xe4")):
        assert judge_at(serve(answers(200, GOOD, **headers))).ask([PICTURE], "?") == "4"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD) + b"0\r\n\r\n"
    plan = raw(b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert judge_at(serve(plan)).ask([PICTURE], "?") == "4"
    judge = judge_at(serve(answers(200, content("x" * 900_000))), timeout=20)
    assert len(judge.ask([], "?")) == 900_000
    judge = judge_at(serve(lambda h, k: h.reply(*[(500,), (429, b"?"), (200, GOOD)][k % 3])),
                     timeout=30, parallel=1)
    assert timed(judge, 4)[0] == ["4"] * 4
    assert judge.ask_all([]) == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_key_across_a_redirect(serve, status):
    other = serve(answers(200, GOOD))
    server = serve(answers(status, b"gone", Location=f"{other.url}/chat/completions?{KEY}"))
    judge = judge_at(server)
    assert timed(judge)[0] == [None]
    assert len(server.seen) == 1 and other.seen == []            # nor tried again
    assert f"HTTP {status}, a redirect to" in judge.error
    clean(judge.error)


@pytest.mark.parametrize("key", [KEY, KEY + "\r", KEY + "\r\n", f" \t{KEY}\n\n", f"\v{KEY}\xa0"])
def test_keys_with_white_space(serve, monkeypatch, key):
    server = serve(echo(401))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    judge = judge_at(server)
    assert timed(judge)[0] == [None] and server.seen[0][0] == f"Bearer {KEY}"
    clean(judge.error)
    clean(repr(judge))


@pytest.mark.parametrize("key", ["a\nb", "a\rb", "a b", "a\0b", "\u201ca\u201d", "\ufeffa", "ä",
                                 "\udce4"])
def test_keys_that_are_none(serve, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", (KEY + key).replace("\0", "\x01"))
    with pytest.raises(SystemExit, match="error: OPENAI_API_KEY holds") as error:
        judge_at(serve())
    clean(str(error.value))


@pytest.mark.parametrize("key", ["", " \r\n", None])
def test_no_key(serve, monkeypatch, key):
    server = serve(answers(200, GOOD))
    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    assert judge_at(server).ask([], "?") == "4" and server.seen[0][0] == "Bearer none"


URLS = ["http://[::1", "http://", "https:///v1", "localhost:8000/v1", "//h/v1", "h", "http:/h/v1",
        "http:h", "ftp://h/v1", "file:///etc/passwd", "http://h:99999/v1", "http://h:0/v1",
        "http://h:-1/v1", "http://h:abc/v1", f"http://u:{KEY}@h/v1", f"http://h/v1?key={KEY}",
        "http://h/v1#x", f"http://[{KEY}@h", "http://h /v1", " http://h/v1", "http://h/v1 ",
        "http://h/v1\n", "http://h/\tv1", "http://a..b/v1", "http://.", "http://%41/v1",
        "http://\ud800/v1", "http://h/\ud800", "http://256.1.1.1/v1", f"http://{'a' * 64}/v1",
        "http://h/" + "x" * 70_000, "http://h\\v1", "http://h,i/v1"]


@pytest.mark.parametrize("url", URLS)
def test_urls_that_are_none(url):
    """They are refused before anything is loaded; scripts make their judge first."""
    with pytest.raises(SystemExit, match="error: --judge-url") as error:
        Judge(url=url)
    clean(str(error.value))


def test_urls(serve):
    for url in ("http://localhost:8000/v1", "https://api.example.com", "HTTP://h/v1/",
                "http://[::1]:80/v1", "http://10.0.0.1:65535/a/b", "http://my_host.local./v1"):
        Judge(url=url)
    server = serve(answers(200, GOOD))
    assert Judge(url=server.url + "/").ask([], "?") == "4"


def test_a_proxy_that_is_none(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "nonsense://x")
    with pytest.raises(SystemExit, match="error: .*proxies"):
        Judge(url="http://never-seen-before/v1")


def test_a_limit_of_questions_is_waited_out(serve):
    """More of them than all attempts, and more in a row than would give the others up."""
    def plan(h, k):
        h.reply(429, b"slow down") if k < 60 else h.reply(200, GOOD)
    judge = judge_at(serve(plan), timeout=20, patience=0.05, parallel=4)
    assert timed(judge, 8)[0] == ["4"] * 8
    judge = judge_at(serve(plan), timeout=20, parallel=4)        # in training nobody waits so long
    assert None in timed(judge, 8)[0]


def test_retry_after(serve):
    """It is heeded where the question's time allows it."""
    def plan(h, k):
        h.reply(429, b"slow down", Retry_After="1") if k == 0 else h.reply(200, GOOD)
    server = serve(plan)
    assert judge_at(server, timeout=5).ask([], "?") == "4"
    assert 1 <= server.at[1] - server.at[0] < 2.5
    server = serve(answers(429, b"slow down", Retry_After="3600"))
    judge = judge_at(server)
    replies, seconds = timed(judge, 100)
    assert replies == [None] * 100 and seconds < 2 and len(server.seen) < 12
    assert "asked again in 3600 seconds: 'slow down'" in judge.error


@pytest.mark.parametrize("plan", [answers(429, b"x"), answers(500, b"x"), raw(b""), answers(200)])
def test_storms(serve, plan):
    """So many failures in a row as are asked at once end it, in every copy of the judge. After a
    while the endpoint is asked anew."""
    server = serve(plan)
    judge = judge_at(server, timeout=2.0)
    images = torch.zeros(150, 3, 8, 8, dtype=torch.uint8)
    begin = time.monotonic()
    scores = score(images, [dict(prompt="a")] * 150, {"*": dict(judge=1.0)}, judge)
    seconds = time.monotonic() - begin
    time.sleep(0.5)                                      # what was on its way has arrived
    asked = len(server.seen)
    assert scores.values.isnan().all() and asked < 4 * 3 * 2 + 4 and seconds < 3
    assert [a for a, _ in scores.answers["judge"]] == [None] * 150
    assert timed(judge, 9)[0] == [None] * 9 and len(server.seen) == asked
    time.sleep(judge.timeout)
    server.plan = answers(200, GOOD)
    assert timed(judge, 50)[0] == ["4"] * 50


def test_some_failures_end_nothing(serve):
    """Others are answered all the same, however many are refused in a row, or fail in between."""
    server, replies = serve(), {b"1": (400,), b"2": (500,)}
    server.plan = lambda h, k: h.reply(
        *replies.get(server.seen[k][1].partition(b"question ")[2][:1], (200, GOOD)))
    judge = judge_at(server, timeout=20)
    refused = [f"question 1{i:02}" for i in range(20)]
    asked = [f"question {2 if i % 4 == 1 else 3}" for i in range(20)]
    got = judge.ask_all([([], text) for text in refused + asked])
    assert got == [None] * 20 + [None if i % 4 == 1 else "4" for i in range(20)]


@pytest.mark.parametrize("plan", [silent, answers(503, b"", Retry_After="60"), drips_its_body,
                                  lambda h, k: time.sleep(0.2) or h.reply(200, GOOD)])
def test_a_stop_is_heeded(serve, plan):
    """What is under way has a little more time, and nothing more is begun."""
    server = serve(plan)
    judge = judge_at(server, timeout=90)
    alarm = threading.Timer(0.3, stopping.set)
    alarm.start()
    replies, seconds = timed(judge, 100)
    alarm.join()
    assert 0.25 < seconds < 1.5 and len(server.seen) <= 16
    assert replies.count("4") in ([0] if plan in (silent, drips_its_body) else range(17))
    begun = len(server.seen)
    assert timed(judge, 9)[0] == [None] * 9 and len(server.seen) == begun


def test_who_is_at_fault(serve):
    """A reward whose endpoint fails says so, and quotes it; a stop is nobody's fault."""
    images, rows = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), [dict(prompt="a")] * 8
    server = serve(answers(404, b"The model `m`\n does not exist"))
    scores = score(images, rows, {"*": dict(judge=1.0)}, judge_at(server))
    with pytest.raises(SystemExit) as error:
        check_scored(scores, 0.5, 0, "PROMPTS")
    assert str(error.value) == (
        "error: reward 'judge' failed for 100% of the images of update 1, above --max-failed: the "
        f"judge's endpoint is at fault. {server.url} gave HTTP 404: 'The model `m` does not exist'")
    stopping.set()
    assert check_scored(scores, 0.5, 0, "PROMPTS") == dict(failed_judge=1.0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.make(folder)
    return folder


def test_in_a_run(serve, parts, tmp_path, monkeypatch):
    """A wrong URL takes no folder. The key is in no file and no message of a run."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\r")
    for url in ("http://[::1", f"http://u:{KEY}@h"):
        with pytest.raises(SystemExit, match="error: --judge-url"):
            tiny.play(parts, tmp_path / "a", "--reward", "judge", "--judge-url", url)
        assert not (tmp_path / "a").exists()
    server = serve(echo(401))
    with pytest.raises(SystemExit, match="endpoint is at fault. http.* gave HTTP 401") as error:
        tiny.play(parts, tmp_path / "a", "--reward", "judge", "--judge-url", server.url)
    assert {key for key, _ in server.seen} == {f"Bearer {KEY}"}
    clean(str(error.value))
    files = [file for file in (tmp_path / "a").rglob("*") if file.is_file()]
    assert files and not any(b"SECRET" in file.read_bytes() for file in files)
