"""
What evaluate.py reads: public datasets in the formats that users have them in. Each raises ValueError("FILE:LINE: ...")
for what it cannot read. `options` is evaluate.py's; only load_stories looks at it.
"""

import csv
import json
import math
import random
from pathlib import Path

from support.common import read_utf8
from support.measuring import numbered_jsonl, read_jsonl, read_parquet, read_text

LENGTHS = dict(small=470, medium=790, large=math.inf)  # the paper's three kinds of a story: its most words
SUMMARIZE = ("Summarize the given story in less than 150 words while preserving high coherence, consistency, fluency, "
             "and relevance.\n\n")  # the paper's; the story follows


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
        if not line.strip():
            continue
        question, *answers = map(str.strip, line.split("|"))
        answers = list(filter(None, answers))
        if not question or not answers:
            raise ValueError(f"{path}:{n}: expected `question | answer`")
        questions.append((question, answers))
    return questions


def question_json(path):
    try:
        data = json.loads(read_utf8(path))
    except ValueError as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON") from None
    questions = []
    try:
        for q in data.get("Questions", []):  # FreebaseQA
            names = set()
            for parse in q["Parses"]:
                for answer in parse["Answers"]:
                    names.update(filter(None, answer["AnswersName"]))
            questions.append((q["RawQuestion"], sorted(names)))
        for q in data.get("Data", []):  # TriviaQA
            questions.append((q["Question"], [q["Answer"]["Value"], *q["Answer"]["Aliases"]]))
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path}:1: neither FreebaseQA nor TriviaQA") from None
    return questions


def load_stories(path, options=None):
    """
    Records with the keys of MT-Bench's questions, one per story of a CSV, JSONL or Parquet file whose column is article
    or text (CNN/DailyMail). With options.per_class so many of each length, the first in the file.
    """
    if Path(path).suffix == ".jsonl":
        rows = numbered_jsonl(path, "article", "text")
    elif Path(path).suffix == ".parquet":
        rows = read_parquet(path, "article", "text")
    else:
        csv.field_size_limit(2**30)
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, record) for record in reader]  # the last line of each
    if not rows:
        raise ValueError(f"{path}:1: no story in it")
    stories, numbers = [], dict.fromkeys(LENGTHS, 0)
    most_of_each = options and options.per_class or math.inf
    for n, record in rows:
        story = record.get("article") or record.get("text")
        if not isinstance(story, str):
            raise ValueError(f"{path}:{n}: expected a story (article or text)")
        words = len(story.split())
        length = next(name for name, most in LENGTHS.items() if words <= most)
        numbers[length] += 1
        if numbers[length] <= most_of_each:
            stories.append(dict(question_id=n, length=length, words=words, turns=[SUMMARIZE + story]))
    return stories


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
