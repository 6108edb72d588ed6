"""Pictures in an official layout, whoever drew them, are scored: by what measures them, or by a
judge whose answers are kept, so that a run that was cut short asks no question again.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.drawing import by_file
from common.read import LOOSE, UNREADABLE, lines, read_image
from common.run import fail, writing
from rewards.judge import without_thoughts


def pictures_of(bench, its, folder):
    """The pictures of Shots that share a file, (H,W,3) each; the user's error where they cannot be
    read. .jpg and .jpeg do as well as .png, as for most official scorers."""
    file = folder / its[0].file
    file = next((f for ending in (".jpg", ".jpeg") if (f := file.with_suffix(ending)).exists()
                 and not file.exists()), file)
    if not file.exists():
        fail(f"{folder} has no {its[0].file}: --n says how many pictures of each prompt there are, "
             f"{bench.ABOUT.n} in a whole run")
    try:
        image = np.array(read_image(file))
    except UNREADABLE as e:
        fail(f"{file} cannot be read: {e}")
    if len(its) == 1:
        return [image]
    h, w = image.shape[0] // -(-len(its) // 2), image.shape[1] // 2
    return [image[i // 2 * h : (i // 2 + 1) * h, i % 2 * w : (i % 2 + 1) * w]
            for i in range(len(its))]


def score_all(bench, shots, folder, judge, answers, most_failed=0.0):
    """Shots -> a row for each picture: file, id, k, tag, item (a name of what is drawn alone),
    prompt and what its verdict says; and counts, of questions, of answers that say nothing usable
    (unparsed), and of questions without an answer. answers: the file that keeps them; most_failed:
    the share that may stay without one."""
    rows, counts = [], dict(questions=0, unparsed=0, unanswered=0)
    files = by_file(shots)
    size = 8 if hasattr(bench, "measure") else 32                # files that are held at once
    said = None if hasattr(bench, "measure") else Answers(answers, judge)
    for a in tqdm(range(0, len(files), size), "score", unit="batch", disable=None):
        now = files[a : a + size]
        images = [x for its in now for x in pictures_of(bench, its, folder)]
        some = [shot for its in now for shot in its]
        verdicts = (bench.measure(some, images) if said is None else
                    judged(bench, some, images, said, counts))
        rows += [dict(file=shot.file, id=shot.item["id"], k=shot.k, tag=shot.item["tag"],
                      item=f"{shot.item['tag']}/{shot.item['id']}", prompt=shot.item["prompt"]) | v
                 for shot, v in zip(some, verdicts)]
    if counts["unanswered"] > most_failed * counts["questions"]:
        fail(f"{counts['unanswered']} of {counts['questions']} questions have no answer. "
             f"{judge.error} Run it again to ask these alone, or score without them: --max-failed "
             f"{-(-100 * counts['unanswered'] // counts['questions']) / 100:g}")
    return rows, counts


def judged(bench, shots, images, said, counts):
    """What a judge says of pictures -> their verdicts, {} where a question has no usable answer"""
    asked = [bench.questions(shot.item, shrunk(image, bench.ABOUT.longest))
             for shot, image in zip(shots, images)]
    flat = [([shrunk(x, bench.ABOUT.longest) for x in shown], text)
            for questions in asked for shown, text in questions.values()]
    replies, verdicts = iter(said.to(flat)), []
    for shot, questions in zip(shots, asked):
        heard = {name: next(replies) for name in questions}
        values = {name: None if answer is None else
                  bench.read(shot.item, name, without_thoughts(answer))
                  for name, answer in heard.items()}
        counts["questions"] += len(heard)
        counts["unanswered"] += sum(answer is None for answer in heard.values())
        counts["unparsed"] += sum(values[k] is None and heard[k] is not None for k in heard)
        known = {k: v for k, v in values.items() if v is not None}
        whole = len(known) == len(values) or bench.ABOUT.partial and known
        verdicts.append(bench.verdict(shot.item, known) if whole else {})
    return verdicts


def shrunk(image, longest):
    """An image (H,W,3) whose longer side is at most so many pixels; 0: as it is"""
    if not longest or max(image.shape[:2]) <= longest:
        return image
    small = Image.fromarray(image)
    small.thumbnail((longest, longest))
    return np.array(small)


class Answers:
    """What a judge has answered, a line of a file each, by a hash of judge, question and images:
    what is there is not asked again."""

    def __init__(self, file, judge):
        self.file, self.judge, self.known = Path(file), judge, {}
        self.who = [judge.name(), judge.tokens, judge.system, judge.text_first]
        self.begun = "\n" if self.file.exists() else ""    # ends a line that was cut short
        try:
            for _, line in lines(file) if self.file.exists() else ():
                self.heed(line)
        except UNREADABLE as e:
            fail(e)

    def heed(self, line):
        try:
            row = LOOSE.decode(line)
            self.known[row["key"]] = row["answer"]
        except (ValueError, TypeError, LookupError):
            pass                                # the last line of a run that was cut short

    def key(self, images, text):
        said = hashlib.sha256(json.dumps([*self.who, text]).encode())
        for x in images:
            said.update(str(x.shape).encode() + np.ascontiguousarray(x).tobytes())
        return said.hexdigest()

    def to(self, questions):
        """[(images, text)] -> answers, None where the judge gave none. Each is kept at once."""
        keys = [self.key(*question) for question in questions]
        todo = {key: q for key, q in zip(keys, questions) if key not in self.known}
        names = [*todo]

        def heard(i, answer):
            if answer is None:
                return
            self.known[names[i]] = answer
            row = dict(key=names[i], question=todo[names[i]][1], answer=answer)
            with writing(self.file), open(self.file, "a") as out:
                out.write(self.begun + json.dumps(row) + "\n")
            self.begun = ""
        if todo:
            self.judge.ask_all([*todo.values()], heard)
        return [self.known.get(key) for key in keys]
