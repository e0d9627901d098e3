"""The command line: text on stdout, everything else on stderr, and one clear line for every error."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_fakes import ApiTokenizer, HeldExecutor, make_engine, weight_bytes

import fastllm
from fastllm import LLM, SamplingParams
from fastllm.__main__ import main
from fastllm.cli.text import for_terminal, speed
from fastllm.outputs import RequestMetrics, RequestOutput

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def interruptible(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program that Ctrl-C reaches, and that does not outlive a test that fails.

    A shell starts background jobs with SIGINT ignored, and what is ignored is inherited.
    """

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, preexec_fn=heed, **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> HeldExecutor:
    """The commands run on this one instead of a model."""
    executor = HeldExecutor()

    def make_llm(options: argparse.Namespace) -> LLM:
        tokenizer: Any = ApiTokenizer()
        return LLM._from_parts(make_engine(executor), tokenizer)

    for command in ("generate", "chat"):
        monkeypatch.setattr(f"fastllm.cli.{command}.make_llm", make_llm)
    return executor


def expected(prompt: str, **params: Any) -> str:
    """The text that follows a prompt."""
    tokenizer: Any = ApiTokenizer()
    with LLM._from_parts(make_engine(HeldExecutor()), tokenizer) as llm:
        given = SamplingParams(**{"temperature": 0, "max_tokens": 128, "seed": 0, **params})
        return llm.generate(prompt, given)[0].outputs[0].text


def lines_of(capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    shown = capsys.readouterr()
    return shown.out, shown.err.splitlines()


# ---- generate ----------------------------------------------------------------------------------------


def test_generate_prints_the_text_and_its_speed(
    executor: HeldExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "abc", "--max-tokens", "9"]) == 0
    out, err = lines_of(capsys)
    assert out == expected("abc", max_tokens=9) + "\n"
    assert re.fullmatch(r"prompt: 3 tokens, [\d.]+ tokens/s; first token after [\d.]+ ms", err[0])
    assert re.fullmatch(r"generated: 9 tokens, [\d.]+ tokens/s", err[1])
    assert len(err) == 2
    assert executor.num_closed == 1


def test_profile_says_where_the_time_went(executor: HeldExecutor, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "abc", "--max-tokens", "9", "--profile"]) == 0
    out, err = lines_of(capsys)
    assert out == expected("abc", max_tokens=9) + "\n"
    assert err[1].startswith("generated: 9 tokens")
    assert [line.split() for line in err[2:5]] == [
        ["prefill", "decode"],
        ["1", "step", "8", "steps"],
        ["3", "tokens", "8", "tokens"],
    ]
    assert [line.split()[0] for line in err[6:]] == [
        *("executor", "scheduling", "Python", "between", "unaccounted", "step", "tokens/s"),
    ]
    assert main(["generate", "abc", "--max-tokens", "9", "--profile", "--quiet"]) == 0
    assert len(lines_of(capsys)[1]) == len(err) - 2


def test_the_options_of_sampling_reach_the_sampler(
    executor: HeldExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "ab", "--quiet", "--echo", "--temperature", "0.5", "--seed", "7", "--top-k", "5"]
    command += ["--top-p", "0.9", "--min-p", "0.1", "--repetition-penalty", "1.5", "--max-tokens", "20"]
    assert main([*command, "--stop", "ax", "--stop", "cc", "--ignore-eos"]) == 0
    out, err = lines_of(capsys)
    text = expected(
        "ab",
        temperature=0.5,
        seed=7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        max_tokens=20,
        stop=["ax", "cc"],
        ignore_eos=True,
    )
    assert (out, err) == (f"ab{text}\n", [])


def test_a_prompt_from_stdin(
    executor: HeldExecutor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b\n"))
    assert main(["generate", "-", "--quiet"]) == 0
    assert lines_of(capsys) == (expected("a b") + "\n", [])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\xfe"), encoding="utf-8"))
    assert main(["generate", "-"]) == 2
    assert lines_of(capsys)[1] == [
        r"fastllm: error: prompt: expected text in UTF-8 on stdin, got b'\xff\xfe'"
    ]


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--model", "no/such.gguf"], "model: expected a .gguf file"),
        (["info", "no/such.gguf"], "model: expected a .gguf file"),
        (["pull", "hf:"], "model: expected hf:org/name"),
        (["chat", "--model", "no/such.gguf"], "model: expected a .gguf file"),
        (["generate", "a", "--max-tokens", "0"], "max_tokens: expected an integer in 1"),
        (["generate", "a", "--temperature", "-1"], "temperature: expected a number"),
        (["generate", "a", "--threads", "-3"], "threads: expected an integer"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = lines_of(capsys)
    assert out == ""
    assert len(err) == 1
    assert err[0].startswith("fastllm: error: " + message)


def test_a_damaged_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    for command in (["generate", "a", "--model"], ["info"]):
        assert main([*command, str(path)]) == 2
        (line,) = lines_of(capsys)[1]
        assert line.startswith(f"fastllm: error: {path}: ")


def test_a_prompt_that_cannot_fit_is_one_line(
    executor: HeldExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a" * 100]) == 2
    out, err = lines_of(capsys)
    assert (out, len(err)) == ("", 1)
    assert "asked 100 prompt tokens, had 59" in err[0]
    assert executor.num_closed == 1


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "some.gguf"), MemoryError()])
def test_the_system_s_errors_are_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr("fastllm.cli.info.resolve", fail)
    assert main(["info"]) == 2
    (line,) = lines_of(capsys)[1]
    assert line in ("fastllm: error: some.gguf: Permission denied", "fastllm: error: not enough memory")


def test_a_failure_of_the_engine_is_one_line(
    capsys: pytest.CaptureFixture[str], executor: HeldExecutor
) -> None:
    executor._fail_at = (2, RuntimeError("broken\ntwice"))
    assert main(["generate", "abc", "--ignore-eos"]) == 2
    (line,) = lines_of(capsys)[1]
    assert line.startswith("fastllm: error: the engine stopped: RuntimeError: broken twice")


def test_an_interrupt_ends_with_130(capsys: pytest.CaptureFixture[str], executor: HeldExecutor) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        executor.before_step = lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 2 else None
        assert main(["generate", "abc", "--ignore-eos", "--max-tokens", "50"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert lines_of(capsys)[1] == []
    assert executor.num_closed == 1


# ---- chat --------------------------------------------------------------------------------------------


def answer_to(*messages: str, max_tokens: int = 6) -> str:
    """What the fake model says to these messages; its template is token 2 and the contents."""
    return expected("a" + "".join(messages), max_tokens=max_tokens)


def test_one_message(executor: HeldExecutor, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--message", "ab", "--system", "c", "--max-tokens", "6", "--stats"]) == 0
    out, err = lines_of(capsys)
    assert out == answer_to("c", "ab") + "\n"
    assert [line.split(":")[0] for line in err] == ["prompt", "generated"]


def test_a_conversation_remembers_until_it_is_told_not_to(
    executor: HeldExecutor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Answers are limited to one token of plain ASCII, so that they can be part of the next prompt.
    executor._pick = lambda row: 2 + row.context % 3
    lines = ["ab", "", "b", "/reset", "b", "x" * 80, "/what", "b", "/exit", "ab"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    seen: list[str] = []

    def note(self: ApiTokenizer, messages: Any, **arguments: Any) -> list[int]:
        seen.append(" ".join(f"{message['role'][0]}{message['content']}" for message in messages))
        return [2, *(token for message in messages for token in self.encode(message["content"]))]

    monkeypatch.setattr(ApiTokenizer, "apply_chat_template", note)
    assert main(["chat", "--max-tokens", "1"]) == 0
    out, err = lines_of(capsys)
    said = out.split("\n")
    assert len(said) == 5
    assert all(text in ("a", "b", "c") for text in said[:4])
    assert seen == [
        "uab",
        f"uab a{said[0]} ub",
        "ub",
        f"ub a{said[2]} u{'x' * 80}",  # refused, and taken back
        f"ub a{said[2]} ub",
    ]
    assert len(err) == 2
    assert "asked 83 prompt tokens" in err[0]
    assert "/reset" in err[1]


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C stops an answer, Ctrl-D leaves; a model's escape sequences do not reach the terminal."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from api_fakes import ApiTokenizer, HeldExecutor, make_engine\n"
        "from fastllm import LLM\n"
        "import fastllm.cli.chat\n"
        "from fastllm.__main__ import main\n"
        "executor = HeldExecutor(pick=lambda row: 12)\n"
        "executor.before_step = lambda number: time.sleep(0.1)\n"
        "fastllm.cli.chat.make_llm = lambda options: LLM._from_parts(make_engine(executor), ApiTokenizer())\n"
        "sys.exit(main(['chat', '--max-tokens', '50']))\n"
    )
    leader, follower = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    with interruptible(
        [sys.executable, str(program)], stdin=follower, stdout=follower, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        seen = b""

        def wait_for(ending: bytes, *, after: int, interrupt: bool = False) -> int:
            # Send the signal until then: readline does not see one that comes just before it begins to wait.
            nonlocal seen
            deadline = time.monotonic() + 30
            while not seen[after:].endswith(ending):
                assert time.monotonic() < deadline, seen
                if interrupt:
                    process.send_signal(signal.SIGINT)
                while not seen[after:].endswith(ending) and select.select([leader], [], [], 1.0)[0]:
                    seen += os.read(leader, 1000)
            return len(seen)

        place = wait_for(b"> ", after=0)
        for line in (b"ab\n", b"b\n"):
            os.write(leader, line)
            place = wait_for(b"xxx", after=place)
            place = wait_for(b"> ", after=place, interrupt=True)
            place = wait_for(b"> ", after=place, interrupt=True)  # at the prompt: a new line
        assert b"Traceback" not in seen
        assert seen.count(b"x") < 40
        os.write(leader, b"\x04")
        assert process.wait(30) == 0
    os.close(leader)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 你好 \n\t end", "plain é 你好 \n\t end"),
        ("\x1b[2Jgone", "\ufffd[2Jgone"),
        ("a\rb\x00c\x7f\x9b", "a\ufffdb\ufffdc\ufffd\ufffd"),
    ],
)
def test_a_model_gives_no_orders_to_a_terminal(text: str, shown: str) -> None:
    assert for_terminal(text) == shown


def test_speed_counts_the_first_token_to_the_prompt() -> None:
    metrics = RequestMetrics(10.0, 11.0, 13.0, 18.0, 18.0, 0, 11)
    output = RequestOutput("a", None, [1] * 40, metrics=metrics)
    assert speed(output).splitlines() == [
        "prompt: 40 tokens, 20.0 tokens/s; first token after 3000.0 ms",
        "generated: 11 tokens, 2.0 tokens/s",
    ]
    assert speed(RequestOutput("a", None, [1])) == ""


# ---- help --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["info"], ["pull"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: fastllm" + "".join(f" {word}" for word in command))
    assert "None" not in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fastllm {fastllm.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate", "--top-k", "many"]])
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


# ---- the real thing ----------------------------------------------------------------------------------


def fastllm_command(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastllm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


@pytest.mark.model
def test_generate_with_a_real_model(default_model_path: Path) -> None:
    done = fastllm_command(
        "generate", "-", "--model", str(default_model_path), "--max-tokens", "8", "--verbose",
        input="The capital of France is\n",
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith(" Paris.")
    err = done.stderr.splitlines()
    assert "KV cache" in err[0]
    assert err[-2].startswith("prompt: 5 tokens")
    assert err[-1].startswith("generated: 8 tokens")


@pytest.mark.model
def test_chat_info_and_pull_with_a_real_model(
    default_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(default_model_path)
    assert main(["chat", "--model", model, "--message", "Who are you?", "--max-tokens", "20"]) == 0
    said = capsys.readouterr().out
    assert main(["pull", model]) == 0
    assert capsys.readouterr().out == model + "\n"
    assert main(["info", model]) == 0
    facts = dict(
        re.split(r" {2,}", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines()
    )
    assert facts["architecture"] == "llama"
    assert facts["Q4_1"].startswith("210, ")
    assert facts["KV cache"].startswith("23040 bytes per token")
    assert facts["chat templates"] == "default"
    # The estimate is what loading takes.
    with LLM(model, kv_cache_tokens=64) as llm:
        packed = weight_bytes(llm)
        params = SamplingParams(temperature=0, max_tokens=20)
        (answer,) = llm.chat([{"role": "user", "content": "Who are you?"}], params)
    assert facts["packed"].startswith(f"{packed / 2**20:.1f} MiB")
    assert said == answer.outputs[0].text + "\n"


@pytest.mark.model
def test_a_reader_that_goes_away_is_no_error(default_model_path: Path) -> None:
    command = [sys.executable, "-m", "fastllm", "generate", "--model", str(default_model_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(24) == b"The capital of France is"
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


@pytest.mark.model
def test_an_interrupted_program_says_nothing(default_model_path: Path) -> None:
    command = [sys.executable, "-m", "fastllm", "generate", "--ignore-eos", "--max-tokens", "4000"]
    with interruptible(
        [*command, "--model", str(default_model_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b""


@pytest.fixture(autouse=True)
def _streams_stay_as_they_are() -> Iterator[None]:
    errors = sys.stdout.errors, sys.stderr.errors
    yield
    for stream, before in zip((sys.stdout, sys.stderr), errors, strict=True):
        if hasattr(stream, "reconfigure") and before is not None:
            stream.reconfigure(errors=before)
