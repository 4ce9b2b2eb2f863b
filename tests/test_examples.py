"""Each example runs as its header says, and gives the expected results with the demo model.

The Rust example is built by `cargo test` and run by tests/rust/examples.rs.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object, input: str = "") -> subprocess.CompletedProcess[str]:
    """Runs one example with the demo model; a warning fails it."""
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-W", "error", EXAMPLES / name, *map(str, arguments)],
        input=input,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_it_is_run(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    what, how = lines[:2]
    mark = {".py": "# ", ".rs": "//! "}[path.suffix]
    run_by = {".py": f"python examples/{path.name}", ".rs": f"cargo run --release --example {path.stem}"}
    assert what.startswith(mark)
    assert how.startswith(f"{mark}Run: {run_by[path.suffix]} ")
    if path.suffix == ".py":
        assert f"def test_{path.stem}" in Path(__file__).read_text(encoding="utf-8")


def test_chat_remembers_and_starts_again_when_the_context_is_full():
    done = run("chat.py", input="What is the capital of France?\nAnd of Italy?\n")
    france, italy = (line for line in done.stdout.splitlines() if line.startswith("> The"))
    assert "Paris" in france
    # The second question asks for a capital only because of the first one.
    assert "Rome" in italy

    full = run("chat.py", input=f"{'word ' * 9000}\nWhat is the capital of France?\n").stdout
    assert "the context holds 8192" in full
    assert "Paris" in full.partition("The conversation starts again.")[2]


def test_stream_prints_one_paragraph_and_the_finish_reason(demo_llm):
    prompt = "Once upon a time, there was a little"
    done = run("stream.py", "demo", prompt)
    assert done.stdout.startswith(prompt)
    assert 20 < len(done.stdout.split()) < 200
    assert "\n" not in done.stdout.strip()
    assert re.fullmatch(
        r"\[stop: \d+ tokens, the first after \d\.\d{3} s, then [1-9]\d* tokens/s\]\n", done.stderr
    )
    # The seed makes the output reproducible.
    assert run("stream.py", "demo", prompt).stdout == done.stdout


def answers(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_batch_answers_questions(tmp_path, demo_llm):
    source, destination = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions = ["What is the capital of France?", "Name a fruit."]
    source.write_text("\n\n".join(questions) + "\n", encoding="utf-8")
    run("batch.py", source, destination)
    records = answers(destination)
    assert [record["question"] for record in records] == questions
    assert "Paris" in records[0]["answer"]
    alone = demo_llm.chat([{"role": "user", "content": questions[1]}])
    assert (records[1]["answer"], records[1]["finish_reason"]) == (alone.text, "stop")


def test_batch_keeps_the_order_of_questions_over_several_calls(tmp_path, tiny, llm):
    source, destination = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions = [f"hello world {n}" for n in range(70)]
    source.write_text("\n".join(questions), encoding="utf-8")
    done = run("batch.py", source, destination, tiny)
    assert done.stderr.splitlines() == ["64 of 70", "70 of 70"]
    records = answers(destination)
    assert [record["question"] for record in records] == questions
    assert len({record["answer"] for record in records}) > 1
    for index in (0, 69):
        alone = llm.chat([{"role": "user", "content": questions[index]}], max_new_tokens=128)
        assert records[index]["answer"] == alone.text


def test_score_ranks_the_right_answers_first(demo_llm):
    *rows, right, perplexity = run("score.py").stdout.splitlines()
    paris = demo_llm.loglikelihood("The capital of France is", " Paris").sum
    assert rows[0].startswith(f"The capital of France is | Paris {paris:.2f} | Berlin -")
    assert right == f"right: {len(rows)} of {len(rows)}"
    assert 1 < float(re.match(r"perplexity (\d+\.\d\d); least expected: ", perplexity)[1]) < 100


def test_quantize_writes_a_smaller_file_and_reports_the_perplexity(tmp_path):
    destination = tmp_path / "demo-q4_0.gguf"
    written, before, after = run("quantize.py", destination).stdout.splitlines()
    assert written.startswith(f"{destination}: {destination.stat().st_size / 1e6:.1f} MB in ")
    assert "211 tensors as Q4_0" in written
    found = [
        re.fullmatch(r".*: (\d+\.\d) MB of weights, perplexity (\d+\.\d{3})", line)
        for line in (before, after)
    ]
    sizes, perplexities = zip(*((float(line[1]), float(line[2])) for line in found), strict=True)
    assert sizes[1] < sizes[0]
    assert 0.9 < perplexities[1] / perplexities[0] < 1.2
