"""
What evaluate.py reads: public datasets in the formats users have them in. Each raises ValueError("FILE:LINE: ...") for what
it cannot read. `options` is evaluate.py's; only load_mmlu looks at it.
"""

import csv
import json
from pathlib import Path


def read_jsonl(path, *keys):
    """The records of a JSON Lines file, each with one of `keys` at least."""
    records = []
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            raise ValueError(f"{path}:{n}: not a line of JSON") from None
        if record is not None:
            if not isinstance(record, dict) or not any(record.get(key) for key in keys):
                raise ValueError(f"{path}:{n}: expected an object with {' or '.join(map(repr, keys))}")
            records.append(record)
    if not records:
        raise ValueError(f"{path}:1: no record in it")
    return records


def read_csv(path):
    """(line number, cells) of every row of a CSV file that is not empty."""
    csv.field_size_limit(2**30)
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        start = 1
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1


def load_text(path, options=None):
    """Plain text, or the "text" of each record of a .jsonl, with an empty line between."""
    if Path(path).suffix == ".jsonl":
        return "\n\n".join(record["text"] for record in read_jsonl(path, "text"))
    text = Path(path).read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{path}:1: no text in it")
    return text


def load_questions(path, options=None):
    """[(question, [every right answer])] of FreebaseQA or TriviaQA."""
    if Path(path).suffix != ".json":
        found = []
        for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            question, *answers = [part.strip() for part in line.split("|")]
            if line.strip() and not (question and any(answers)):
                raise ValueError(f"{path}:{n}: expected `question | answer`")
            if line.strip():
                found.append((question, [answer for answer in answers if answer]))
    else:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON") from None
        try:
            if "Questions" in data:
                names = lambda q: {n for p in q["Parses"] for a in p["Answers"] for n in a["AnswersName"] if n}
                found = [(q["RawQuestion"], sorted(names(q))) for q in data["Questions"]]
            else:
                found = [(q["Question"], [q["Answer"]["Value"], *q["Answer"]["Aliases"]]) for q in data["Data"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}:1: neither FreebaseQA nor TriviaQA: no {error} in a question") from None
    if not found:
        raise ValueError(f"{path}:1: no question in it")
    return found


def load_mmlu(path, options):
    """{subject: (five solved questions, questions to solve)}, a question being (text, four choices, right letter)."""
    names = sorted(file.name.removesuffix("_test.csv") for file in Path(path, "test").glob("*_test.csv"))
    unknown = [name for name in options.subjects or [] if name not in names]
    if not names or unknown:
        raise ValueError(f"{path}/test:1: no {unknown[0] if unknown else 'SUBJECT'}_test.csv in it")
    load = lambda name, part: list(mmlu_questions(Path(path, part, f"{name}_{part}.csv")))
    return {name: (load(name, "dev")[:5], load(name, "test")) for name in options.subjects or names}


def mmlu_questions(path):
    for n, cells in read_csv(path):
        if cells[0] == "question" and cells[-1] == "answer":
            continue  # a header, which Hendrycks' own files have not
        answer = dict(zip("0123ABCD", "ABCDABCD")).get(cells[-1].strip())
        if len(cells) != 6 or answer is None:
            raise ValueError(f"{path}:{n}: expected question, four choices and an answer of A to D or 0 to 3")
        yield cells[0], cells[1:5], answer


def load_stories(path, options=None):
    """[(story, reference summary)]: CSV with columns text or article and y or highlights, or JSONL."""
    pick = lambda record, *keys: next((record[key] for key in keys if record.get(key)), None)
    stories = []
    if Path(path).suffix == ".jsonl":
        rows = enumerate(read_jsonl(path, "docs", "article", "text"), start=1)
    else:
        lines = list(read_csv(path))
        rows = [(n, dict(zip(lines[0][1], cells))) for n, cells in lines[1:]]
    for n, record in rows:
        story, summary = pick(record, "docs", "article", "text"), pick(record, "highlights", "y", "summary", "result")
        story = "\n\n".join(story) if isinstance(story, list) else story
        summary = summary.get("text") if isinstance(summary, dict) else summary
        if not isinstance(story, str) or not isinstance(summary, str):
            raise ValueError(
                f"{path}:{n}: expected a story (docs, article or text) and a summary (highlights, y or result)"
            )
        stories.append((story, summary.removeprefix("1####")))
    if not stories:
        raise ValueError(f"{path}:1: no story in it")
    return stories


def load_prompts(path, options=None):
    """Records with "turns", of MT-Bench, or "text", whose first tokens are the prompt."""
    return read_jsonl(path, "turns", "text")
