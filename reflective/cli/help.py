"""How ``--help`` looks: a line an option where it fits, frequent options first, examples last; 80 columns are enough.

Typer's own panels leave 24 of 80 columns for the text, as they give types a column; here a value has a name, as ``-o FILE``.
"""

import inspect
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

# Of commands, in the order of `reflective --help`.
ANSWER, READ, TRAIN = "Answer", "Score and read", "Train and check"
# Of options, in the order of every --help; what has none of these comes first.
OPTIONS, DRAWING, FILES, MODEL, SPEED, REACH, CLUSTER = (
    "Options", "Sampling", "Files", "Model", "Speed and memory", "Clients and limits", "Cluster",
)  # fmt: skip
LEARNING, HEAD, BACKBONE, JOINT = "Learning", "Head", "Model too (--way backbone, joint)", "Joint training (--way joint)"
_ORDER = (OPTIONS, FILES, DRAWING, HEAD, LEARNING, BACKBONE, JOINT, MODEL, SPEED, REACH, CLUSTER)
_NAMES = {int: "N", float: "X", Path: "FILE", str: "TEXT"}  # of a value, where the option says no other
_LEFT = 24  # columns of the longest option beside which its text begins
EXIT_CODES = "Exit codes: 0 done; 1 rows failed, or a check did; 2 bad input; 130 interrupted."


class Command(TyperCommand):
    """A command with this help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        parts: list[Any] = [_usage(ctx, self), *_paragraphs(self.help or "")]
        hints = typing.get_type_hints(self.callback) if self.callback else {}
        shown = [p for p in self.get_params(ctx) if not getattr(p, "hidden", False)]
        arguments = [p for p in shown if p.param_type_name == "argument"]
        if arguments:
            parts.append(_section("Arguments", [(_argument(p), _text(p)) for p in arguments]))
        panels: dict[str, list[Any]] = {}
        for p in shown:
            if p.param_type_name == "option":
                panels.setdefault(getattr(p, "rich_help_panel", None) or OPTIONS, []).append(p)
        for name in sorted(panels, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER)):
            parts.append(_section(name, [(_option(p, hints.get(p.name)), _text(p)) for p in panels[name]]))
        if self.epilog:
            lines = inspect.cleandoc(self.epilog).splitlines()
            parts.append(Group(Text("Examples", "bold"), *(_example(line) for line in lines)))
        formatter.write(_rendered(_apart(parts)))


class Commands(TyperGroup):
    """The commands, in groups, on one screen of 24 lines."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        parts: list[Any] = [_usage(ctx, self), Text(), *_paragraphs(self.help or ""), Text()]
        groups: dict[str, list[Any]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                groups.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append(command)
        for name, commands in groups.items():
            parts.append(_section(name, [(Text(c.name, "cyan"), Text(c.get_short_help_str(64))) for c in commands], 8))
        options = [p for p in self.get_params(ctx) if p.param_type_name == "option" and not getattr(p, "hidden", False)]
        parts.append(_section("Options", [(_option(p, bool), Text(_SHORT.get(p.name) or p.help or "")) for p in options], 20))
        parts += [Text(), Text(inspect.cleandoc(self.epilog or ""))]
        formatter.write(_rendered(parts))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


_SHORT = {
    "install_completion": "Complete commands and options in this shell from now on.",
    "show_completion": "Print what that would install.",
    "help": "Show this, or behind a command its options and examples.",
}


def _rendered(parts: Iterable[Any]) -> str:
    """As standard output takes it: without colours in a pipe, at most 100 columns on a wide screen."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 80
    console.width = min(console.width, 100)
    with console.capture() as captured:
        for part in parts:
            console.print(part, highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _apart(parts: list[Any]) -> Iterator[Any]:
    for i, part in enumerate(parts):
        if i:
            yield Text()
        yield part


def _usage(ctx: Any, command: Any) -> Text:
    path = ctx.command_path.removeprefix("python -m ")
    arguments = [_argument(p) for p in command.get_params(ctx) if p.param_type_name == "argument"]
    rest = " [OPTIONS] COMMAND [ARGS]..." if isinstance(command, TyperGroup) else " [OPTIONS]"
    return Text.assemble(("Usage: ", "bold"), (path, "bold cyan"), rest, *(part for a in arguments for part in (" ", a)))


def _paragraphs(text: str) -> list[Text]:
    return [Text(" ".join(part.split())) for part in inspect.cleandoc(text).replace("\f", "").split("\n\n") if part.strip()]


def _section(title: str, rows: list[tuple[Text, Text]], left: int = _LEFT) -> Group:
    """A heading and its rows; what is wider than ``left`` has its text in the next line."""
    parts: list[Any] = [Text(title, "bold")]
    for name, text in rows:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=left, no_wrap=True)
        table.add_column(ratio=1)
        table.expand = True
        if len(name) > left:
            parts.append(Padding(name, (0, 0, 0, 2)))
            table.add_row(Text(), text)
        else:
            table.add_row(name, text)
        parts.append(Padding(table, (0, 0, 0, 2)))
    return Group(*parts)


def _argument(p: Any) -> Text:
    name = p.metavar or p.name
    return Text((name if p.required else f"[{name}]") + ("..." if p.nargs == -1 else ""), "cyan")


def _option(p: Any, hint: Any) -> Text:
    """``-o, --output FILE``, as it is typed."""
    flags = [*sorted(p.opts, key=lambda name: name.startswith("--")), *p.secondary_opts]
    told = Text(" / ".join(flags) if p.secondary_opts else ", ".join(flags), "cyan")
    if not p.opts[0].startswith("-") or p.secondary_opts or _type(hint) is bool or getattr(p, "is_flag", False):
        return told
    return told.append(f" {p.metavar or _NAMES.get(_type(hint), 'VALUE')}", "green")


def _type(hint: Any) -> Any:
    """Of one value: of ``Annotated[list[int] | None, ...]`` it is int."""
    while (origin := typing.get_origin(hint)) is not None:
        inner = [a for a in typing.get_args(hint) if a is not types.NoneType]
        if origin is typing.Annotated or inner:
            hint = inner[0]
        else:
            break
    return hint


def _text(p: Any) -> Text:
    text = Text(p.help or "")
    default = p.default() if callable(p.default) else p.default
    more = []
    if p.param_type_name == "option" and isinstance(default, int | float | str | Path | list | tuple) and not isinstance(default, bool):
        told = ", ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        if told:
            more.append(f"default: {told}")
    if p.envvar:
        more.append(f"env: {p.envvar}")
    if more:
        text.append(f" [{'; '.join(more)}]".lstrip() if not p.help else f" [{'; '.join(more)}]", "dim")
    return text


def _example(line: str) -> Text:
    """Commands as they are typed; lines that begin with # say what they do."""
    return Text("  " + line, "dim" if line.lstrip().startswith("#") else "")
