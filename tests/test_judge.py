"""experiments/judge.py against a small server: both orders, replies without ratings, going on, mistakes in one line."""

import csv
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import judge
import plot
import pytest
from tiny import mistake, write_csv, write_jsonl

pytest.importorskip("openai", reason="openai is not installed")


class Endpoint(ThreadingHTTPServer):
    """A judge on this machine: reply(prompt) is what it says, `asked` what it was asked, status an error's."""

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked, self.keys, self.status = reply, [], [], 200
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()  # looks for its end so often


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, request = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(request)
        server.keys.append(self.headers["Authorization"])
        body = dict(error=dict(message="no such key"))
        if server.status == 200:
            message = dict(role="assistant", content=server.reply(request["messages"][0]["content"]))
            body = dict(
                id="1",
                object="chat.completion",
                created=0,
                model=request["model"],
                choices=[dict(index=0, finish_reason="stop", message=message)],
            )
        data = json.dumps(body).encode()
        self.send_response(server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def likes_the_first(prompt):
    """The first answer gets two marks more than it deserves, which is 7 for a good one and 3 for a bad one."""
    shown = prompt[prompt.index("<A>") :]
    deserved = sorted((shown.index(word), mark) for word, mark in (("good", 7), ("bad", 3)))
    (_, first), (_, second) = deserved
    return f"Some words.\nRatings: {first + 2} {second}"


@pytest.fixture
def endpoint():
    server = Endpoint(likes_the_first)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path, endpoint, monkeypatch):
    """run(*flags) -> the rows of the CSV: two files of answers to six questions, judged by the endpoint."""
    groups = ["writing", "math"] * 3
    turns = [dict(question_id=i, category=group, turns=[f"Ask {i}.", "Again."]) for i, group in enumerate(groups)]
    write_jsonl(tmp_path / "question.jsonl", *turns)
    folder = tmp_path / "mtbench"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    for name, word, counts in ("dense--ffn", "good", [0, 40, 0, 40]), ("ffnskip-0.25-ffn", "bad", [10, 40, 10, 40]):
        choices = [dict(index=0, turns=[f"A {word} text.", f"More {word} text."])]
        answers = [dict(question_id=i, model_id=name, choices=choices, counts=counts) for i in range(6)]
        write_jsonl(folder / f"{name}.jsonl", *answers)

    def call(*flags):
        judge.main(arguments(folder, tmp_path / "question.jsonl", endpoint, *flags))
        lines = (tmp_path / "out" / "mtbench_judged.csv").read_text().splitlines()
        return list(csv.DictReader(line for line in lines if line[0] != "#"))

    call.folder = folder
    return call


def arguments(folder, data, endpoint, *flags):
    files = [str(file) for file in sorted(folder.glob("*.jsonl"))]
    return [*files, "--data", str(data), "--base-url", endpoint.url, "--model", "small", *map(str, flags)]


@pytest.mark.parametrize(
    "line, ratings",
    [
        ("Ratings: 7 5", (7, 5)),
        ("ratings: 7.5, 10", (7.5, 10)),
        ("**Ratings: 8/10 0/10**", (8, 0)),
        ("Ratings: **8** **6**", (8, 6)),
        ("Ratings: 1 2\nNo, I was wrong.\nRatings: 3 4", (3, 4)),
        ("Ratings: A B", None),
        ("Ratings: 7", None),
        ("Ratings: 70 50", None),
        ("Ratings: -7 5", None),
        ("Ratings: 7 5 3", None),
        ("I give it 7 and 5.", None),
        ("", None),
    ],
)
def test_the_line_with_ratings(line, ratings):
    assert judge.parse_ratings(f"A is good.\n{line}\n") == ratings


def test_both_orders_cancel_the_liking_for_a_place(run, endpoint, capsys):
    rows = run()
    assert len(rows) == 6 and len(endpoint.asked) == 12
    for row in rows:
        assert (row["score"], row["score_dense"]) == ("4.0", "8.0")  # (3 + 5) / 2, (9 + 7) / 2
        assert (row["policy"], row["skip_ratio_percent"], row["criterion"]) == ("ffnskip", "25", "quality")
    assert [row["category"] for row in rows] == ["writing", "math"] * 3
    first = endpoint.asked[0]["messages"][0]["content"]
    assert "Ask 0." in first and "More bad text." in first and "Again." in first  # the questions, and all turns
    assert "written to out/mtbench_judged.csv" in capsys.readouterr().out
    assert endpoint.asked[0]["model"] == "small" and endpoint.asked[0]["temperature"] == 0


def test_replies_without_ratings_are_counted_and_give_no_score(run, endpoint, capsys):
    def reply(prompt):
        return "I cannot say." if "Ask 3." in prompt and prompt.index("good") < prompt.index("bad") else good(prompt)

    good, endpoint.reply = endpoint.reply, reply
    rows = run()
    assert [row["score"] for row in rows] == ["4.0"] * 3 + [""] + ["4.0"] * 2
    assert "ffnskip-0.25-ffn: 1 replies without ratings" in capsys.readouterr().out


def test_it_goes_on_without_asking_again(run, endpoint, capsys):
    endpoint.reply = lambda prompt: likes_the_first(prompt) if len(endpoint.asked) < 6 else None  # None: no text
    first = run()
    kept = run.folder / "judged" / "ffnskip-0.25-ffn.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 12 and run() == first and len(endpoint.asked) == 12  # nor what had no ratings
    kept.write_text("".join(lines[:4]) + lines[4][:20])  # cut off within a line
    endpoint.reply = likes_the_first
    assert all(row["score"] == "4.0" for row in run())
    assert len(endpoint.asked) == 12 + 8 and len(kept.read_text().splitlines()) == 12
    run("--model", "large")  # another judge is another opinion
    assert len(endpoint.asked) == 20 + 12 and endpoint.asked[-1]["model"] == "large"


def test_plot_draws_and_prints_the_scores(run, endpoint, tmp_path, capsys):
    """Also where a category has no score at all, as the authors' judge had none for math."""
    endpoint.reply = lambda prompt: "?" if any(f"Ask {i}." in prompt for i in (1, 3, 5)) else likes_the_first(prompt)
    run()
    capsys.readouterr()
    plot.main(["out/mtbench_judged.csv", "lost"])
    assert "| ffnskip | 4 at 25.0% (n 3) |" in capsys.readouterr().out
    plot.main(["out/mtbench_judged.csv"])
    assert (tmp_path / "out" / "mtbench_judged.png").exists()


def test_a_reference_of_ones_own(run, endpoint, tmp_path, capsys):
    choices = [dict(index=0, turns=["A good text."])]
    write_jsonl(tmp_path / "gpt.jsonl", *(dict(question_id=i, choices=choices) for i in range(6)))
    (run.folder / "dense--ffn.jsonl").write_text((run.folder / "dense--ffn.jsonl").read_text().replace("good", "bad"))
    rows = run("--reference", tmp_path / "gpt.jsonl")
    assert len(rows) == 12 and {row["score_reference"] for row in rows} == {"8.0"}  # dense is judged as well
    capsys.readouterr()
    plot.main(["out/mtbench_judged.csv", "lost"])
    assert "| ffnskip | 0 at 25.0% (n 6) |" in capsys.readouterr().out  # lost to dense, not to the reference


def test_summaries_are_judged_by_four_criteria(tmp_path, endpoint):
    write_csv(tmp_path / "stories.csv", ["", "text", "y"], *[[i, f"The story {i}.", "Short."] for i in range(2)])
    folder = tmp_path / "summarize"
    folder.mkdir()
    for name, word in ("dense--ffn", "good"), ("random-0.15-ffn", "bad"):
        about = dict(length="small", words=3, choices=[dict(turns=[f"A {word} one."])], counts=[1, 20, 1, 20])
        write_jsonl(folder / f"{name}.jsonl", *(dict(question_id=i, **about) for i in (2, 3)))  # lines of the file
    judge.main(arguments(folder, tmp_path / "stories.csv", endpoint, "--output", tmp_path / "x.csv"))
    rows = plot.read(tmp_path / "x.csv")
    assert [row["criterion"] for row in rows] == ["coherence", "consistency", "fluency", "relevance"] * 2
    assert {(row["length"], row["score"], row["score_dense"]) for row in rows} == {("small", 4.0, 8.0)}
    assert len(endpoint.asked) == 16 and "The story 1." in endpoint.asked[-1]["messages"][0]["content"]
    other = [[i, "Another story, of more words.", "Short."] for i in range(2)]
    write_csv(tmp_path / "stories.csv", ["", "text", "y"], *other)
    with pytest.raises(ValueError, match="random.*answers what is not item 2"):
        judge.main(arguments(folder, tmp_path / "stories.csv", endpoint, "--output", tmp_path / "x.csv"))


def test_the_key_is_sent_only_where_it_is_asked_for(run, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    run()
    assert not any("secret" in key for key in endpoint.keys)
    monkeypatch.setenv("MY_KEY", "mine")
    run("--api-key-env", "MY_KEY", "--model", "other")
    assert endpoint.keys[-1] == "Bearer mine"


def test_mistakes_are_one_line(run, endpoint, tmp_path, capsys):
    good = arguments(run.folder, tmp_path / "question.jsonl", endpoint)
    endpoint.status = 401
    said = mistake(capsys, judge.main, *good)
    assert "401" in said and "no such key" in said and endpoint.url in said and "goes on" in said
    assert not (tmp_path / "out" / "mtbench_judged.csv").exists()
    endpoint.server_close()
    endpoint.shutdown()
    assert "Connection refused" in mistake(capsys, judge.main, *good)
    assert "NO_KEY" in mistake(capsys, judge.main, *good, "--api-key-env", "NO_KEY")
    assert "no such folder" in mistake(capsys, judge.main, *good, "--output", tmp_path / "none" / "x.csv")
    assert "--reference" in mistake(capsys, judge.main, *good[1:])  # without the dense model's
    write_jsonl(tmp_path / "question.jsonl", dict(question_id=99, turns=["Ask."]))
    assert "is not item 0 of" in mistake(capsys, judge.main, *good)


def test_without_the_package_it_says_so(run, endpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    good = arguments(run.folder, tmp_path / "question.jsonl", endpoint)
    assert "make eval" in mistake(capsys, judge.main, *good)
