"""What the command line looks like: help on a screen, examples that parse, errors of one line, exit codes, progress, completion."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import tiny
import typer.main

from reflective import cli
from reflective.cli import common
from reflective.cli.help import EXIT_CODES

ROOT = typer.main.get_command(cli.app)
COMMANDS = list(ROOT.commands)
START = "import sys; sys.argv[0] = 'reflective'; from reflective.cli import main; main()"


def call(*args, code=0, columns=80, **env):
    """A process, its streams pipes."""
    given = {**{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}, "COLUMNS": str(columns), **env}
    done = subprocess.run(
        [sys.executable, "-c", START, *map(str, args)], capture_output=True, text=True, timeout=tiny.PATIENCE, check=False, env=given
    )
    assert done.returncode == code, done.stderr
    return done


def on_a_terminal(*args, until=None, term="xterm", **env):
    """What a process writes onto a terminal of 80 columns and 24 lines, and its exit code; ``until``: a text after which it is
    interrupted, as by Ctrl-C."""
    import fcntl
    import pty
    import signal
    import struct
    import termios

    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TQDM_DISABLE")}
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + START
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdin=terminal, stdout=terminal, stderr=terminal, env={**kept, "TERM": term, **env}
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(screen, 4096):
            shown += part
            if until and until.encode() in shown:
                until = None
                process.send_signal(signal.SIGINT)
    os.close(screen)
    return shown.decode(), process.wait(tiny.PATIENCE)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_the_commands_fit_a_screen():
    shown, code = on_a_terminal("--help")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert code == 0 and len(lines) <= 23, "and the shell's next line"
    assert max(map(len, lines)) <= 80 and "\x1b[1m" in shown
    assert EXIT_CODES in lines
    for name in COMMANDS:
        (line,) = (line for line in lines if line.strip().startswith(name + " "))
        assert not line.rstrip().endswith("..."), "cut short"


def test_every_command_is_in_a_group():
    for command in ROOT.commands.values():
        assert command.rich_help_panel, command.name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name):
    text = call(name, "--help").stdout
    lines = text.splitlines()
    assert "\x1b" not in text and max(map(len, lines)) <= 80
    assert lines[0].startswith(f"Usage: reflective {name} ")
    for param in ROOT.commands[name].params:
        if param.param_type_name == "option" and not param.hidden:
            assert re.search(rf"(?m)^  (-\w, )*{re.escape(max(param.opts, key=len))}\b", text), param.opts
    (start,) = (i for i, line in enumerate(lines) if line == "Examples")
    examples = [line.strip() for line in lines[start + 1 :]]
    assert len(examples) >= 2 and all(examples)
    assert examples == [line.strip() for line in ROOT.commands[name].epilog.strip().splitlines()], "none is wider than the screen"


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name):
    """By the command's own parser; nothing is run."""
    tried = 0
    for line in ROOT.commands[name].epilog.strip().splitlines():
        words = shlex.split(line.partition("|")[2] or line, comments=True) if "reflective" in line and line[0] != "#" else []
        words = words[: words.index(">")] if ">" in words else words
        if "reflective" not in words:
            continue
        given = words[words.index("reflective") + 1 :]
        assert given[0] == name
        ROOT.commands[name].make_context(name, given[1:])
        tried += 1
    assert tried >= 2


def test_frequent_options_come_first():
    text = call("generate", "--help").stdout
    headings = re.findall(r"(?m)^(\w[\w ]+)$", text)
    assert headings == ["Arguments", "Options", "Files", "Sampling", "Model", "Speed and memory", "Cluster", "Examples"]
    assert text.index("--strategy") < text.index("--seed") < text.index("--top-k") < text.index("--kv-tokens")
    assert "[default: 0.6]" in text and "[env: REFLECTIVE_API_KEY]" in call("serve", "--help").stdout.replace("\n" + " " * 28, " ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "No such command 'nonsense'. (reflective --help)"),
        (["generate", "--nonsense"], "No such option: --nonsense"),
        (["generate", "--top-p", "2", "x"], "'--top-p'"),
        (["train"], "Missing argument"),
        (["generate", "--model", "/nowhere", "x"], "/nowhere"),
        (["eval", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_errors_are_a_line(args, message):
    done = call(*args, code=2)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line and not done.stdout and "\x1b" not in line


def test_without_a_command_the_help_is_printed():
    done = call(code=2)
    assert done.stdout.rstrip() == call("--help").stdout.rstrip() and not done.stderr


def test_a_capability_that_the_processor_lacks_is_named():
    from reflective.scoring import ops

    if ops.WHY_NO_EXTENSION:
        pytest.skip(ops.WHY_NO_EXTENSION)
    done = call("--version", "-v", code=2, REFLECTIVE_CPU_CAPABILITY="nonsense")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: REFLECTIVE_CPU_CAPABILITY: there is no CPU capability 'nonsense'")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted_while_loading_is_130():
    """Whatever runs, also what says nothing of Ctrl-C itself."""
    code = (
        "import sys, os, signal; sys.argv = ['reflective', 'eval', 'x']; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from reflective import cli, evaluate\n"
        "evaluate.evaluate = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=tiny.PATIENCE, check=False)
    assert done.returncode == 130 and done.stderr.strip() == "interrupted" and not done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("term", "env"), [("xterm", {}), ("xterm", {"NO_COLOR": "1"}), ("dumb", {})], ids=["colour", "NO_COLOR", "dumb"])
def test_progress_and_colour_on_a_terminal(tmp_path, monkeypatch, term, env):
    code = (
        "import time; from reflective.cli.common import progress_bars, waiting\n"
        "with progress_bars() as bars:\n"
        "    for i in bars.track(range(4), description='rows'): time.sleep(0.3)\n"
        "with waiting('loading'): time.sleep(0.3)\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "START", code)
    shown, _ = on_a_terminal(term=term, **env)
    if term == "dumb":
        assert not shown.strip()
        return
    assert "rows" in shown and re.search(r"\d\.\d/s", shown) and "left" in shown and "0:00:0" in shown and "loading" in shown
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", shown)) is not bool(env), "colours"


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1"}])
def test_no_progress_in_a_pipe(env, monkeypatch):
    monkeypatch.setattr(
        sys.modules[__name__], "START",
        "from reflective.cli.common import progress_bars, waiting\nwith progress_bars() as b, waiting('x'): list(b.track(range(3)))",
    )  # fmt: skip
    done = call(**env)
    assert not done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_colour_is_off_in_pipes_and_by_no_color():
    coloured = re.compile(r"\x1b\[[0-9;]*3[0-9]m")
    assert "\x1b" not in call("--help").stdout and "\x1b" not in call("nonsense", code=2).stderr
    assert coloured.search(on_a_terminal("--help")[0]) and coloured.search(on_a_terminal("nonsense")[0])
    assert not coloured.search(on_a_terminal("--help", NO_COLOR="1")[0] + on_a_terminal("nonsense", NO_COLOR="1")[0])


def test_watched_is_not_fooled(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    for term, expected in (("xterm", True), ("dumb", False), ("", False)):
        monkeypatch.setenv("TERM", term)
        assert common.watched() is expected


def completed(*words, current=""):
    """What bash is given for a line, by its protocol: COMP_WORDS and the word at the cursor."""
    line = " ".join(["reflective", *words, current])
    done = call(_REFLECTIVE_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) + 1))
    return done.stdout.split()


def test_completion_of_commands_options_and_names():
    assert set(completed()) >= set(COMMANDS) and completed(current="doc") == ["doctor"]
    assert "--strategy" in completed("generate", current="--s")
    from reflective.benchmarks import cases
    from reflective.search.strategies import NAMES

    assert completed("generate", "--strategy") == list(NAMES)
    assert completed("generate", "--strategy", current="st") == ["step_beam"]
    assert completed("generate", "--effort") == ["low", "medium", "high", "auto"]
    assert completed("bench", "--op") == list(cases.CASES)
    assert completed("bench", "--implementation") == [*cases.OURS, *cases.PEERS]
    assert completed("train", "--task") == ["sums", "chain_sum", "reasoning-gym:"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path):
    """The script that --show-completion prints, in bash itself."""
    home = tmp_path / "bin"
    home.mkdir()
    (home / "reflective").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(START)} "$@"\n')
    (home / "reflective").chmod(0o755)
    script = call(_REFLECTIVE_COMPLETE="source_bash").stdout
    assert "complete " in script
    asked = (
        script + "\nCOMP_WORDS=(reflective generate --effort h); COMP_CWORD=3\n"
        "_reflective_completion reflective h --effort\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    env = {**os.environ, "PATH": f"{home}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", asked], capture_output=True, text=True, check=True, env=env, timeout=tiny.PATIENCE)
    assert done.stdout.split() == ["high"], done.stderr
