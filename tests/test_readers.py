"""experiments/readers.py: every format that a data set comes in, and files that are none of them."""

import json
import sys
from types import SimpleNamespace

import pytest
import readers
from tiny import STORY, write_csv, write_data, write_jsonl


def test_parquet_is_read_by_an_optional_package(tmp_path, monkeypatch):
    """As text, of the column `text`, and as stories, of the column `article`."""
    rows = [dict(text="", article=None), dict(text=" = A = \n", article=STORY), dict(text="b")]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="t.parquet: a Parquet file: needs.*pip install pyarrow"):
        readers.load_text(tmp_path / "t.parquet")
    package = SimpleNamespace(read_table=lambda path: SimpleNamespace(to_pylist=lambda: rows))
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=package))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", package)
    assert readers.load_text(tmp_path / "t.parquet") == " = A = \n\n\nb"
    rows.pop()  # which has a text, and no article
    (story,) = readers.load_stories(tmp_path / "t.parquet")
    assert story["question_id"] == 2 and story["turns"][0].endswith(STORY)
    rows[:] = [dict(body="x")]
    with pytest.raises(ValueError, match="t.parquet:1: no row in it with 'text'"):
        readers.load_text(tmp_path / "t.parquet")

    def damaged(path):
        raise ValueError("magic bytes not found")

    package.read_table = damaged
    with pytest.raises(ValueError, match="t.parquet: not a Parquet file: magic bytes"):
        readers.load_text(tmp_path / "t.parquet")


def test_questions_in_all_formats(tmp_path):
    file = tmp_path / "q.txt"
    file.write_text("Who? | ghana \n\nWhat | a|b\n")
    assert sorted(readers.load_questions(file)) == [("What", ["a", "b"]), ("Who?", ["ghana"])]
    answers = [dict(AnswersMid="m.1", AnswersName=["the who"]), dict(AnswersMid="m.2", AnswersName=["who"])]
    freebase = dict(Questions=[dict(RawQuestion="Band?", Parses=[dict(Answers=answers), dict(Answers=answers[:1])])])
    trivia = dict(Data=[dict(Question="Sea?", Answer=dict(Value="Red", Aliases=["Red", "Red Sea"]))])
    file = tmp_path / "q.json"
    file.write_text(json.dumps(freebase))
    assert readers.load_questions(file) == [("Band?", ["the who", "who"])]
    file.write_text(json.dumps(trivia))
    assert readers.load_questions(file) == [("Sea?", ["Red", "Red", "Red Sea"])]


def test_questions_of_a_sorted_file_are_in_one_random_order(tmp_path):
    """Else the scored ones would begin with A, and those on which ratios are reached with I."""
    file = tmp_path / "q.txt"
    file.write_text("".join(f"{n:03} | a\n" for n in range(200)))
    order = [int(question) for question, _ in readers.load_questions(file)]
    assert sorted(order) == list(range(200)) and 60 < sum(order[:50]) / 50 < 140
    assert order == [int(question) for question, _ in readers.load_questions(file)]


def test_stories_in_both_formats(tmp_path):
    write_data(tmp_path)
    first, *others = readers.load_stories(tmp_path / "stories.csv")
    about = dict(question_id=2, length="small", words=34)
    assert first == about | dict(turns=[readers.SUMMARIZE + STORY * 2])
    assert [story["length"] for story in others] == ["medium", "large"]
    write_csv(tmp_path / "cnn.csv", ["id", "article", "highlights"], ["1", "Long\nstory.", "Short."])
    (story,) = readers.load_stories(tmp_path / "cnn.csv")
    assert story["turns"] == [readers.SUMMARIZE + "Long\nstory."]
    write_jsonl(tmp_path / "stories.jsonl", dict(article="A.", highlights="B."), dict(text="C."))
    stories = readers.load_stories(tmp_path / "stories.jsonl")
    assert [story["turns"][0][-2:] for story in stories] == ["A.", "C."]


def test_so_many_stories_of_each_length(tmp_path):
    sizes = 790, 470, 791, 471, 1, 900, 2
    write_jsonl(tmp_path / "stories.jsonl", *(dict(article="word " * n) for n in sizes))
    chosen = readers.load_stories(tmp_path / "stories.jsonl", SimpleNamespace(per_class=2))
    assert [(story["words"], story["length"]) for story in chosen] == [
        (790, "medium"), (470, "small"), (791, "large"), (471, "medium"), (1, "small"), (900, "large")
    ]  # fmt: skip
    one = readers.load_stories(tmp_path / "stories.jsonl", SimpleNamespace(per_class=1))
    assert [story["words"] for story in one] == [790, 470, 791]


def test_questions_of_one_turn_as_vicuna_has_them(tmp_path):
    record = dict(question_id=1, text="Why?", category="fermi")
    write_jsonl(tmp_path / "v.jsonl", record, dict(question_id=2, turns=["A?", "B?"]))
    first, second = readers.load_turns(tmp_path / "v.jsonl")
    assert first == record | dict(turns=["Why?"]) and second["turns"] == ["A?", "B?"]


def test_text_and_prompts(tmp_path):
    write_data(tmp_path)
    assert readers.load_text(tmp_path / "text.raw") == STORY * 12
    assert readers.load_text(tmp_path / "c4.jsonl") == "\n\n".join(f"{i} {STORY}" for i in range(3))
    assert [len(record["turns"]) for record in readers.load_prompts(tmp_path / "question.jsonl")] == [2, 2]
    assert [record["text"][0] for record in readers.load_prompts(tmp_path / "c4.jsonl")] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "load, name, text, line",
    [
        (readers.load_questions, "q.txt", "a | b\nno answer\n", 2),
        (readers.load_questions, "q.txt", "", 1),
        (readers.load_questions, "q.json", '{"Questions": [\n{]}', 2),
        (readers.load_questions, "q.json", '{"Questions": [{}]}', 1),
        (readers.load_text, "t.jsonl", '{"text": "a"}\n{"txt": "b"}\n', 2),
        (readers.load_text, "t.jsonl", '{"text": "a"}\nb\n', 2),
        (readers.load_text, "t.raw", " \n", 1),
        (readers.load_prompts, "p.jsonl", '{"text": "a"}\n\n[1]\n', 3),
        (readers.load_prompts, "p.jsonl", '{"turns": null}\n', 1),
        (readers.load_stories, "s.csv", "id,text\n1,x\n2\n", 3),
        (readers.load_stories, "s.csv", "", 1),
        (readers.load_stories, "s.jsonl", '{"docs": "a"}\n', 1),
        (readers.load_stories, "s.jsonl", '{"text": "a"}\n\n{"text": ["a"]}\n', 3),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, load, name, text, line):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        load(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}:{line}: ")


@pytest.mark.parametrize("load, name", [(readers.load_text, "t.raw"), (readers.load_questions, "q.txt")])
def test_bad_bytes_are_named_with_their_file(tmp_path, load, name):
    (tmp_path / name).write_bytes("na\u00efve | x\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name}: not UTF-8 text"):
        load(tmp_path / name)
