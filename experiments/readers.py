"""
What evaluate.py reads: public datasets in the formats that users have them in. Each raises ValueError("FILE:LINE: ...")
for what it cannot read. `options` is evaluate.py's; only load_mmlu and load_stories look at it.
"""

import csv
import json
import math
import random
from pathlib import Path

from support.common import read_utf8
from support.measuring import numbered_jsonl, read_jsonl, read_text

CLASSES = dict(small=470, medium=790, large=math.inf)  # the paper's three lengths of a story: its most words


def read_csv(path):
    """(line number, cells) of every row of a CSV file that is not empty."""
    csv.field_size_limit(2**30)
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        start = 1
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1


def load_text(path, options=None):
    """Plain text, or the "text" of each record of a .jsonl, with an empty line between."""
    text = read_text([path])
    if not text.strip():
        raise ValueError(f"{path}:1: no text in it")
    return text


def load_questions(path, options=None):
    """
    [(question, [every right answer])] of FreebaseQA or TriviaQA, always in the same random order: FreebaseQA's file is
    sorted, and the questions that are scored and those on which ratios are reached must be of one kind.
    """
    questions = question_lines(path) if Path(path).suffix != ".json" else question_json(path)
    if not questions:
        raise ValueError(f"{path}:1: no question in it")
    random.Random(0).shuffle(questions)
    return questions


def question_lines(path):
    questions = []
    for n, line in enumerate(read_utf8(path).split("\n"), start=1):
        question, *answers = [part.strip() for part in line.split("|")]
        answers = [answer for answer in answers if answer]
        if line.strip() and not (question and answers):
            raise ValueError(f"{path}:{n}: expected `question | answer`")
        if line.strip():
            questions.append((question, answers))
    return questions


def question_json(path):
    try:
        data = json.loads(read_utf8(path))
    except ValueError as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON") from None
    questions = []
    try:
        if "Questions" in data:  # FreebaseQA
            for q in data["Questions"]:
                answers = [answer for parse in q["Parses"] for answer in parse["Answers"]]
                names = {name for answer in answers for name in answer["AnswersName"] if name}
                questions.append((q["RawQuestion"], sorted(names)))
        else:
            for q in data["Data"]:  # TriviaQA
                questions.append((q["Question"], [q["Answer"]["Value"], *q["Answer"]["Aliases"]]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}:1: neither FreebaseQA nor TriviaQA: no {error} in a question") from None
    return questions


def load_mmlu(path, options):
    """{subject: (five solved questions, questions to solve)}, a question being (text, four choices, right letter)."""
    names = sorted(file.name.removesuffix("_test.csv") for file in Path(path, "test").glob("*_test.csv"))
    wanted = options.subjects or names
    for name in wanted or ["SUBJECT"]:
        if name not in names:
            raise ValueError(f"{path}/test:1: no {name}_test.csv in it")
    subjects = {}
    for name in wanted:
        shots = mmlu_questions(Path(path, "dev", f"{name}_dev.csv"))
        subjects[name] = shots[:5], mmlu_questions(Path(path, "test", f"{name}_test.csv"))
    return subjects


def mmlu_questions(path):
    questions = []
    for n, cells in read_csv(path):
        if cells[0] == "question" and cells[-1] == "answer":
            continue  # a header, which Hendrycks' own files have not
        answer = dict(zip("0123ABCD", "ABCDABCD")).get(cells[-1].strip())
        if len(cells) != 6 or answer is None:
            raise ValueError(f"{path}:{n}: expected question, four choices and an answer of A to D or 0 to 3")
        questions.append((cells[0], cells[1:5], answer))
    return questions


def load_stories(path, options=None):
    """
    [(story, reference summary)]: CSV with columns text or article and y or highlights, or JSONL. With options.per_class
    so many of each length, the first in the file, or as many as there are.
    """
    if Path(path).suffix == ".jsonl":
        rows = numbered_jsonl(path, "docs", "article", "text")
    else:
        (_, header), *lines = [*read_csv(path)] or [(1, [])]
        rows = [(n, dict(zip(header, cells))) for n, cells in lines]
    if not rows:
        raise ValueError(f"{path}:1: no story in it")
    stories = []
    for n, record in rows:
        story = first_of(record, "docs", "article", "text")
        summary = first_of(record, "highlights", "y", "summary", "result")
        if isinstance(story, list):
            story = "\n\n".join(story)
        if isinstance(summary, dict):
            summary = summary.get("text")
        if not isinstance(story, str) or not isinstance(summary, str):
            keys = "a story (docs, article or text) and a summary (highlights, y or result)"
            raise ValueError(f"{path}:{n}: expected {keys}")
        stories.append((story, summary.removeprefix("1####")))
    if options is None or options.per_class is None:
        return stories
    chosen = []
    for size in CLASSES:
        chosen += [pair for pair in stories if length_class(pair[0]) == size][: options.per_class]
    return chosen


def length_class(story):
    words = len(story.split())
    return next(size for size, most in CLASSES.items() if words <= most)


def first_of(record, *keys):
    for key in keys:
        if record.get(key):
            return record[key]


def load_prompts(path, options=None):
    """Records with "turns", of MT-Bench, or "text", whose first tokens are the prompt."""
    return read_jsonl(path, "turns", "text")


def load_turns(path, options=None):
    """MT-Bench's questions, of one turn or more, or Vicuna's, whose only turn is called "text" in the authors' file."""
    records = numbered_jsonl(path, "turns", "text")
    for n, record in records:
        if "question_id" not in record:
            raise ValueError(f"{path}:{n}: expected an object with 'question_id'")
        record.setdefault("turns", [record.get("text")])
    return [record for _, record in records]
