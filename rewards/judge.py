"""Judges: any vision-language model that answers questions about images, here or at an endpoint."""

import asyncio
import base64
import copy
import io
import json
import math
import os
import random
import re
import time
from dataclasses import dataclass, field
from functools import cache, partial

import httpx
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from common.read import arrays
from common.run import fail, has_bf16
from common.stop import stopping
from common.weights import pretrained
from common.words import special_names, verdict
from data.shapes.talk import IMAGE, MATCH, WHICH
from data.shapes.world import SIDE
from rewards.shared import MODELS, able, classroom, processor, sources, to_device


LONGEST = 1_000_000       # bytes of an endpoint's answer, of which a long one has some thousand


@dataclass
class Judge:
    """The vision-language model that answers for a run, and what it was asked."""
    model: str = ""           # folder or owner/repo, at an endpoint its name; empty: MODELS
    url: str = ""             # OpenAI-compatible, http://host:8000/v1; empty: the model runs here
    tokens: int = 64          # longest answer
    # What it is told before every question; and does a question's text stand before its images?
    system: str = field(default="", repr=False)
    text_first: bool = field(default=False, repr=False)
    timeout: float = 120.0    # seconds that a question has at the endpoint, with all its attempts
    retries: int = 3          # more attempts after a failure,
    pause: float = 1.0        # the first so many seconds later, each next one twice as long
    patience: float = 0.0     # so long a question waits that met a limit of them; 0: it has failed
    last: float = 5.0         # seconds that what is under way has once the run is to stop
    parallel: int = 16        # most questions at the endpoint at once, per process
    error: str = ""           # the last failure
    heard: list = field(default_factory=list)    # (answer or None, what was read in it or NaN)
    # How many questions in a row failed, and until when therefore none is asked: all copies' own.
    state: dict = field(default_factory=lambda: dict(failed=0, rest=0.0))

    def __post_init__(self):
        if self.url:                                 # before anything is loaded
            check_endpoint(self.url)
            api_key()

    def name(self):
        """-> what a table calls it"""
        return self.model or MODELS["judge"]

    @torch.no_grad()
    def ask_all(self, questions, heard=lambda i, answer: None):
        """[(images, text)], images uint8 (H,W,3) -> answers, None where the endpoint failed. All
        that judges goes through here, at temperature 0. heard(i, answer): told of each at once."""
        if self.url:
            check_endpoint(self.url)
            return asyncio.run(self.ask_there(questions, heard))
        small = all(x.shape[:2] == (SIDE, SIDE) for images, _ in questions for x in images)
        model, feed = judge_model(self.model or MODELS["judge-shapes" if small else "judge"])
        answers = []
        for i in range(0, len(questions), 32):
            x = turns(feed, questions[i : i + 32], self.system, self.text_first).to(model.device)
            ids = model.generate(**x, do_sample=False, max_new_tokens=self.tokens)
            new = ids[:, x["input_ids"].shape[1]:]
            answers += [a.strip() for a in feed.batch_decode(new, skip_special_tokens=True)]
            for k, answer in enumerate(answers[i:], i):
                heard(k, answer)
        return answers

    def ask(self, images, text):
        """One question about images, each uint8 (H,W,3). -> answer"""
        return self.ask_all([(images, text)])[0]

    async def ask_there(self, questions, heard):
        """ask_all at the endpoint. Once `parallel` questions in a row were neither answered nor
        refused, the others are given up, and so are those of the next `timeout` seconds: a silent
        endpoint costs an update that time once. In a run that is to stop no question is begun."""
        room, state = asyncio.Semaphore(self.parallel), self.state

        def resting():
            return time.monotonic() < state["rest"]

        async def one(client, i, images, text):
            async with room:
                if stopping.is_set() or resting():
                    return None
                body = await asyncio.to_thread(self.body, images, text)
                while True:
                    try:
                        answer, well, limited = await asyncio.wait_for(
                            self.ask_endpoint(client, body), self.timeout)
                    except asyncio.TimeoutError:
                        answer, well, limited = None, False, False
                        self.error = f"{self.url} gave no whole answer in time, {self.timeout:g} s"
                    if not (limited and self.patience) or stopping.is_set():
                        break
                    await asyncio.sleep(self.patience)
                state["failed"] = 0 if well else state["failed"] + 1
                if state["failed"] >= self.parallel:
                    state.update(failed=0, rest=time.monotonic() + self.timeout)
                heard(i, answer)
                return answer

        async with client_of(api_key()) as client:
            jobs = [asyncio.ensure_future(one(client, i, *question))
                    for i, question in enumerate(questions)]
            left = set(jobs)
            while left and not stopping.is_set() and not resting():
                left = (await asyncio.wait(left, timeout=0.1))[1]
            if left and stopping.is_set():
                left = (await asyncio.wait(left, timeout=self.last))[1]
            for job in left:
                job.cancel()
            if left:
                await asyncio.wait(left)
        return [None if job.cancelled() else job.result() for job in jobs]

    def body(self, images, text):
        """One question about images, each uint8 (H,W,3), as the endpoint reads it. -> bytes"""
        content = []
        for x in images:
            file = io.BytesIO()
            Image.fromarray(x).save(file, "PNG")
            data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            content.append(dict(type="image_url", image_url=dict(url=data)))
        content.insert(0 if self.text_first else len(content), dict(type="text", text=text))
        told = [dict(role="system", content=self.system)] if self.system else []
        return json.dumps(dict(
            model=self.name(), temperature=0, max_tokens=self.tokens,
            messages=[*told, dict(role="user", content=content)])).encode()

    async def ask_endpoint(self, client, body):
        """One question -> answer, None after failures, of which `error` says the last; is the
        endpoint well, which it is when it answers or refuses; and was the last failure that it has
        had too many questions?"""
        until = time.monotonic() + self.timeout
        for k in range(self.retries + 1):
            # A random part, so that what failed together comes back apart.
            pause, later, data = self.pause * 2**k * random.uniform(0.5, 1), True, bytearray()
            limited = False
            try:
                async with client.stream("POST", self.url.rstrip("/") + "/chat/completions",
                                         content=body) as reply:
                    async for part in reply.aiter_raw():
                        data += part
                        if len(data) > LONGEST:
                            break
                if reply.is_success and len(data) <= LONGEST:
                    return json.loads(data)["choices"][0]["message"]["content"].strip(), True, False
                # 3xx and 4xx: what is wrong stays wrong; but 408 and 429 say "later".
                later = reply.is_success or reply.is_server_error or reply.status_code in (408, 429)
                limited = reply.status_code == 429
                wait = reply.headers.get("Retry-After", "")
                pause = max(pause, float(wait)) if re.fullmatch("[0-9]{1,9}", wait) else pause
                what = f"HTTP {reply.status_code}"
                if reply.is_success:
                    what = f"more than {LONGEST:,} bytes"
                elif reply.is_redirect:
                    what += (f", a redirect to {quoted(reply.headers['Location'])}: no key is sent "
                             "there, so give --judge-url the right address")
                elif later and pause > self.timeout:
                    what += f", to be asked again in {pause:g} seconds"
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                what = "what is no answer of a chat"
            except (httpx.HTTPError, OSError) as e:
                what = f"{type(e).__name__}, {quoted(str(e))}"
            self.error = f"{self.url} gave {what}" + (f": {quoted(data)}" if data else "")
            if not later or k == self.retries or time.monotonic() + pause >= until:
                return None, not later, limited
            await asyncio.sleep(pause)
            if stopping.is_set():
                return None, True, False

    def phrasing(self, images, ours, theirs):
        """The classroom VLM's own question, or the one for everybody else's."""
        own = not self.model and not self.url and classroom(images)
        return ours.replace(IMAGE, "") if own else theirs

    def read(self, meaning, answers):
        """meaning(answer) of each, NaN where there is no answer; both are kept in `heard`."""
        values = [math.nan if a is None else meaning(a) for a in answers]
        self.heard += zip(answers, values)
        return values


@cache
def check_endpoint(url):
    """The user's error where no judge can be asked at that address."""
    if re.search("[@?#]", url):                      # a key there would stand in config.json
        fail("--judge-url must have no @, ? or #: a key belongs into the environment variable "
             "OPENAI_API_KEY")
    try:
        parts = httpx.URL(url)
        parts.host.encode("idna")
        good = (parts.scheme in ("http", "https") and re.fullmatch(r"[\w.:-]+", parts.host)
                and parts.port in (None, *range(1, 65536)) and re.fullmatch("[!-~]+", url))
    except (httpx.InvalidURL, ValueError):
        good = False
    if not good:
        fail(f"--judge-url {url[:200]!r} must be http:// or https://, a host and, if need be, a "
             "port and a path: http://localhost:8000/v1")
    try:
        client_of("")
    except (httpx.InvalidURL, OSError, ValueError, ImportError) as e:
        fail(f"the judge cannot be asked as the environment's proxies or certificates are set: {e}")


def api_key():
    """-> the endpoint's key, in which a file's line ends and spaces around it have no part"""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        fail("OPENAI_API_KEY holds a character that a key cannot have, such as a space")
    return key


certificates = cache(httpx.create_ssl_context)       # a tenth of a second to read


def client_of(key):
    """-> what asks an endpoint. It follows no redirect; time and size are bounded by who asks."""
    return httpx.AsyncClient(timeout=None, verify=certificates(), headers={
        "Content-Type": "application/json", "Authorization": f"Bearer {key or 'none'}",
        "Accept-Encoding": "identity"})              # compressed, a megabyte may hold gigabytes


def quoted(said):
    """What an endpoint said, str or bytearray -> its beginning in one line, without the key or the
    pictures that it may repeat"""
    text = said.decode(errors="replace") if isinstance(said, bytearray) else said
    key = api_key()
    text = text.replace(key, "***") if len(key) > 3 else text    # a shorter one is no secret
    text = re.sub(r"[A-Za-z0-9+/=\\]{60,}", "...", text)
    return repr(" ".join(re.sub(r"[^\w\s!-~]+", " ", text).split())[:160])


@cache
def judge_model(name):
    dtype = torch.bfloat16 if has_bf16() else torch.float32
    feed = processor(AutoProcessor, name)
    feed.tokenizer.padding_side = "left"             # answers begin where the questions end
    return to_device(pretrained(AutoModelForImageTextToText, name, dtype=dtype)), feed


HOLE = "<|\ue000|>"       # nobody's word


def turns(feed, rows, system="", text_first=False):
    """rows: (images uint8 (H,W,3), text), a user's turn each -> a VLM's inputs, padded as `feed`
    pads. A text's special_names are letters: where they stand the tokenizer reads holes, as many as
    those letters have tokens, which then fill them."""
    letters, said = [], partial(feed.tokenizer, add_special_tokens=False, split_special_tokens=True)

    def holes(name):
        ids = said(name[0])["input_ids"]
        letters.extend(ids)
        return HOLE * len(ids)
    names = special_names(feed.tokenizer)
    told = [dict(role="system", content=[dict(type="text", text=system)])] if system else []
    chats = []
    for images, text in rows:
        parts = [dict(type="image", image=Image.fromarray(x)) for x in images]
        said_so = dict(type="text", text=names.sub(holes, text))
        parts.insert(0 if text_first else len(parts), said_so)
        chats.append([*told, dict(role="user", content=parts)])
    if letters:                                      # a copy: the reward model saves its tokenizer
        feed = copy.copy(feed)
        feed.tokenizer = copy.deepcopy(feed.tokenizer)
        feed.tokenizer.add_tokens(HOLE, special_tokens=True)
    x = feed.apply_chat_template(chats, add_generation_prompt=True, tokenize=True,
                                 return_dict=True, return_tensors="pt",
                                 processor_kwargs=dict(padding=True))
    if letters:
        ids = x["input_ids"]
        ids[ids == feed.tokenizer.convert_tokens_to_ids(HOLE)] = torch.tensor(letters)
    return x


# The classroom's VLM knows its own phrasing only: see TASKS in data/shapes/prepare.py.
BETTER = ('These two images were drawn for the prompt "{}". Which one fits the prompt better and '
          'looks better? Answer only with <answer>first</answer>, <answer>second</answer> or '
          '<answer>tie</answer>.')
IN_A_TAG = "Answer only with the number in a tag, such as <answer>3</answer>."
RATE = ('This image was drawn for the prompt "{}". Rate how well it fits the prompt and how good '
        'it looks, from 1 (bad) to 5 (excellent). ' + IN_A_TAG)


# A judge that does not keep to the tag may still state its answer: the last sentence then says
# nothing else. Mere mention is no preference: "the second is worse than the first"; nor is the
# last word of an answer that was cut off: "The first is better in color. The second".
FIRST, SECOND = (f"(?:the )?(?:{one}|(?:image |picture |option )?{n})(?: image| picture| one)?"
                 for one, n in (("first", 1), ("second", 2)))
PREFERENCE = "|".join((
    "(?:my |the )?(?:answer|choice|winner|(?:better|best)(?: image| picture| one)?)(?:: | is )X",
    "X (?:is|looks|fits the prompt|matches the prompt)(?: clearly| much| slightly)? better"
    "(?: than (?:the other(?: one)?|Y))?",
    "i (?:prefer|choose|pick) X(?: (?:over|to) Y)?"))
NUMBER = r"(\d+(?:\.\d+)?)(?: ?(?:/|\(?(?:out )?of) ?(\d+)(?:\.0)?\)?)?"
SCORE = rf"\b(?:score|rating)(?: \(.*?\))?(?:: ?| is ){NUMBER}(?![\w%-]|[./]\d)"


def without_thoughts(answer):
    """-> what a judge says behind its thoughts; nothing, where it did not come to their end"""
    return re.sub(r"(?s)^.*</think>|<think>.*", "", answer)


def in_the_end(answer):
    """-> in lower case, without emphasis and quotes, what a judge's last <answer> tag holds; where
    there is none, all that stands behind its thoughts."""
    text = re.sub(r"[*_`\"]", "", without_thoughts((answer or "").lower()))
    return (re.findall(r"(?s)<answer>(.*?)(?:</answer>|$)", text) or [text])[-1].strip()


def choice(answer):
    """-> 1 if the first image is called better, 0 the second, 1/2 for a tie; NaN where the answer
    does not end by stating one of these."""
    text = in_the_end(answer).rstrip(".! ")
    last = re.split(r"(?<=[.!?\n])\s+", text)[-1]
    if re.fullmatch("(?:it is )?(?:a )?tie", last):
        return 0.5
    for value, x, y in ((1.0, FIRST, SECOND), (0.0, SECOND, FIRST)):
        preferred, why = PREFERENCE.replace("X", x).replace("Y", y), "(?:,? because .*)?"
        if re.fullmatch(x + why, text) or re.fullmatch(f"(?:{preferred}){why}", last):
            return value
    return math.nan


def rating(answer):
    """A number of 1 to 5, yes or no -> [0,1]: the whole answer, or the last score that it states.
    NaN where that is off the scale, and where there is none."""
    text = in_the_end(answer).rstrip(".! ")
    if text in ("yes", "no"):
        return float(text == "yes")
    found = re.fullmatch(NUMBER, text) or [None, *re.finditer(SCORE, text)][-1]
    if not found or found[2] not in (None, "5") or not 1 <= float(found[1]) <= 5:
        return math.nan
    return float(found[1]) / 5


def agrees(answer):
    """The classroom's VLM says yes, or no and why -> 1, 0; NaN where it says neither."""
    yes = verdict(answer)[0]
    return math.nan if yes is None else float(yes)


def preference(images, rows, judge):
    """Pairwise judge (Pref-GRPO, DeepGen): the share of its group that an image beats, in [0,1].

    Every pair is asked in both orders, so that a judge who likes the first image moves nobody
    (DeepGen asks once), and a group's mean is 1/2. An answer that says nothing usable is a tie. A
    pair of which one answer failed is left out; an image without any pair is NaN."""
    text, x = judge.phrasing(images, WHICH, BETTER), arrays(images)
    groups = {}                                # outside of training each image is its own
    for i, m in enumerate(rows):
        groups.setdefault(m.get("group", f"image {i}"), []).append(i)
    for mine in groups.values():
        assert len({rows[i]["prompt"] for i in mine}) == 1, "a group shares its prompt"
    pairs = [(i, j) for mine in groups.values() for i in mine for j in mine if i != j]
    if not pairs:
        return torch.full((len(x),), 0.5)
    answers = judge.ask_all([([x[i], x[j]], text.format(rows[i]["prompt"])) for i, j in pairs])
    firsts = np.nan_to_num(judge.read(choice, answers), nan=0.5)
    answers = dict(zip(pairs, answers))
    won, asked = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x))
    for (i, j), first in zip(pairs, firsts):
        if answers[i, j] is not None and answers[j, i] is not None:
            won[i] += first
            won[j] += 1 - first
            asked[[i, j]] += 1
    return (won / asked).float()                                 # 0 / 0 is NaN


def judge(images, rows, judge):
    """`--reward judge`, pointwise, in [0,1]: a rating from 1 to 5, divided by 5 (Flow-GRPO, which
    makes an answer without a number 0; here it is a failure); the classroom's says yes or no."""
    text = judge.phrasing(images, MATCH, RATE)
    read = rating if text == RATE else agrees
    answers = judge.ask_all([([x], text.format(m["prompt"]))
                             for x, m in zip(arrays(images), rows)])
    return torch.tensor(judge.read(read, answers))


# Two questions, of which the lower answer counts (as VIEScore): an untouched image keeps all, a
# new one may show the change.
DONE = ('The second image should be the first after the edit "{}". Rate how well that was done, '
        "from 1 (not at all) to 5 (perfectly). " + IN_A_TAG)
KEPT = ('The second image should be the first after the edit "{}". Rate how well all that the edit '
        "does not concern stayed the same, from 1 (not at all) to 5 (perfectly). " + IN_A_TAG)


def edit_judge(images, rows, judge):
    """Pointwise judge of edits, in [0,1]: is it done, is all else as it was? The classroom's VLM is
    asked what it has learned, whether the image matches the target's caption, which names every
    thing; where they are it is not asked."""
    R, which = torch.full((len(rows),), math.nan), able("edit_judge", rows)
    texts, read = [judge.phrasing(images, MATCH, t) for t in (DONE, KEPT)], rating
    if texts[0] == texts[1]:                                     # the classroom's
        which, read = [i for i in which if rows[i].get("target_meta")], agrees
        asked = [([x], texts[0].format(rows[i]["target_meta"].get("prompt", rows[i]["prompt"])))
                 for i, x in zip(which, arrays(images[which]))]
    else:
        asked = [([old, new], text.format(rows[i]["instruction"])) for text in texts
                 for i, old, new in zip(which, sources(rows, which), arrays(images[which]))]
    if which:
        rated = torch.tensor(judge.read(read, judge.ask_all(asked))).view(-1, len(which))
        R[which] = torch.where(rated.isnan().any(0), math.nan, rated.amin(0))
    return R
