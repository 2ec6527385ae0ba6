"""The front door: a table of commands, of which only the called one is imported."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from moectl import __version__
from moectl.cli.boundary import guard, interruptible
from moectl.cli.output import out
from moectl.errors import ConfigError, did_you_mean, unknown

if TYPE_CHECKING:
    from typer import Typer

_COMPLETION = ("--install-completion", "--show-completion")


class Command(NamedTuple):
    """One line of the table: a command's section and name, and what it does."""

    section: str
    name: str
    help: str


# In the order of the walk. A command lives in `moectl.cli.<name>` (with _ for -), as `command` (a function with typer
# options) or as `app` (a Typer, for a group).
COMMANDS: tuple[Command, ...] = (
    Command("The walk", "prepare", "Turn texts into a split, packed, content-addressed dataset"),
    Command("The walk", "plan", "Say what a run takes: FLOPs, memory, time, money"),
    Command("The walk", "train", "Train a dense or Mixture-of-Experts model on it"),
    Command("The walk", "ablate", "Train presets or variants, seeds of each, as one group"),
    Command("The walk", "eval", "Measure held-out loss and bits per byte, domain by domain"),
    Command("The walk", "inspect", "See which experts take which text, beside honest nulls"),
    Command("The walk", "generate", "Let a run or model write, and show which expert took each token"),
    Command("The walk", "runs", "List, show, compare and re-index what was run"),
    Command("The bench", "compare-hf", "Hold ours, or your code, against Hugging Face, tensor by tensor"),
    Command("The bench", "doctor", "Look for what is wrong with this machine, a run or a model"),
    Command("The bench", "explain", "Say what a known mistake looks like, and how to mend it"),
    Command("The bench", "gotcha", "Write down a mistake of your own, so that it is made once"),
    Command("The workshop", "upcycle", "Make a dense model's MLPs into experts, with a receipt"),
    Command("The workshop", "grow", "Give a model with experts more of them, and the same function"),
    Command("The workshop", "bases", "Fetch pretrained models that need no hub: smollm2"),
    Command("The workshop", "distill", "Teach a dense model what a run has learned, and measure it"),
    Command("The workshop", "export", "Write a run as a checkpoint that plain transformers loads"),
    Command("The workshop", "routers", "List, show and check routers, and start one of your own"),
    Command("The workshop", "config", "Show what a config comes to, every default written out"),
    Command("The workshop", "quickstart", "Take the whole walk at once, on the text that ships"),
)
_OPTIONS = (
    ("--version", "Show the version and exit"),
    ("--debug", "Show tracebacks (or MOECTL_DEBUG=1), with any command"),
    ("--install-completion", "Complete commands and options with the Tab key"),
    ("--help", "Show this; moectl train --help shows a command's own"),
)
_FIRST_STEPS = (
    ("moectl quickstart", "all of it in minutes, on text that ships"),
    ("moectl train --router top1", "one run, on the newest data"),
    ("moectl inspect routing", "what its experts have learned"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: runs a command and returns its exit code. Never raises."""
    args = list(sys.argv[1:] if argv is None else argv)
    args, debug = _take_debug(args)
    for stream in (sys.stdout, sys.stderr):  # an ASCII terminal gets escapes, not a crash
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    before = os.environ.get("MOECTL_DEBUG")
    if debug:
        os.environ["MOECTL_DEBUG"] = "1"
    try:
        return guard(lambda: _dispatch(args))
    finally:
        if debug:
            _restore("MOECTL_DEBUG", before)


def _dispatch(args: list[str]) -> object:
    if "_MOECTL_COMPLETE" in os.environ or (args and args[0].startswith(_COMPLETION)):
        return app()(args=args, prog_name="moectl")
    if not args or args[0] in ("--help", "-h", "help"):
        if args[1:] and args[0] == "help":
            return _dispatch([*args[1:], "--help"])
        out().data(root_help(color=_stdout_has_color()))
        return 0
    if args[0] == "--version":
        out().data(f"moectl {__version__}")
        return 0
    names = [command.name for command in COMMANDS]
    args = _command_first(args, names)
    if args[0].startswith("-"):
        options = [name for name, _ in _OPTIONS]
        see = "See `moectl --help`."
        suggestion = did_you_mean(args[0], options)
        raise ConfigError(f"unknown option '{args[0]}'", f"{suggestion} {see}" if suggestion else see)
    if args[0] not in names:
        raise unknown("command", args[0], names)
    command_app, subcommands = _load(args[0])
    if subcommands:
        args = [args[0], *_subcommand(args[0], args[1:], subcommands)]
    return command_app(args=args, prog_name="moectl", standalone_mode=False)


def _subcommand(group: str, args: list[str], names: list[str]) -> list[str]:
    """A group's arguments with its sub-command first; bare means help."""
    if not args:
        return ["--help"]
    args = _command_first(args, names)
    if not args[0].startswith("-") and args[0] not in names:
        raise unknown("command", args[0], names).__class__(
            f"unknown command '{group} {args[0]}'", unknown("command", args[0], names).hint
        )
    return args


def _command_first(args: list[str], names: Iterable[str]) -> list[str]:
    """Options may stand before the command: ``--json runs ls`` is ``runs --json ls``."""
    known = set(names)
    if not args[0].startswith("-") or args[0] in ("--help", "-h"):
        return args
    for index, arg in enumerate(args):
        if arg == "--":
            break
        if arg in known:
            return [arg, *args[:index], *args[index + 1 :]]
    return args


def _load(name: str) -> tuple[Typer, list[str]]:
    """A Typer with one command, and the names of its sub-commands if it is a group."""
    import typer

    root = _new_app()
    subcommands = _register(root, name)
    root.callback()(lambda: None)  # keeps Typer from folding a single command into the root
    assert isinstance(root, typer.Typer)
    return root, subcommands


def app() -> Typer:
    """The whole tool as one Typer, for shell completion and for documentation."""
    root = _new_app(completion=True)
    for command in COMMANDS:
        _register(root, command.name)
    return root


def _new_app(*, completion: bool = False) -> Typer:
    import typer

    return typer.Typer(
        name="moectl",
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _register(root: Typer, name: str) -> list[str]:
    module = import_module(f"moectl.cli.{name.replace('-', '_')}")
    summary = next(command.help for command in COMMANDS if command.name == name)
    group = getattr(module, "app", None)
    if group is None:
        function: Callable[..., object] = interruptible(module.command)
        root.command(name, help=function.__doc__ or summary)(function)
        return []
    for info in group.registered_commands:
        info.callback = None if info.callback is None else interruptible(inspect.unwrap(info.callback))
    root.add_typer(group, name=name, help=group.info.help or summary)
    return [
        info.name or info.callback.__name__.replace("_", "-")
        for info in group.registered_commands
        if info.callback is not None
    ]


def root_help(*, color: bool = False) -> str:
    """What ``moectl --help`` prints. Plain text, from the table: nothing is imported for it."""

    def bold(text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if color else text

    def block(title: str, rows: Iterable[tuple[str, str]], width: int) -> list[str]:
        return ["", bold(title), *(f"  {bold(name.ljust(width))}  {text}" for name, text in rows)]

    lines = [
        f"{bold('moectl')} {__version__}: from raw text to evidence about a Mixture-of-Experts model.",
        "",
        "Usage: moectl COMMAND [OPTIONS]",
    ]
    lines += block("First steps", _FIRST_STEPS, 28)
    for section in dict.fromkeys(command.section for command in COMMANDS):
        rows = [(command.name, command.help) for command in COMMANDS if command.section == section]
        title = f"{section}: prepare → train → eval → inspect → runs" if section == "The walk" else section
        lines += block(title, rows, 12)
    lines += block("Options", _OPTIONS, 20)
    lines += ["", "Data goes to stdout, talk to stderr; reading commands take --json.", ""]
    return "\n".join(lines)


def _stdout_has_color() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _take_debug(args: list[str]) -> tuple[list[str], bool]:
    """``--debug`` may stand anywhere before ``--``."""
    end = args.index("--") if "--" in args else len(args)
    rest = [arg for arg in args[:end] if arg != "--debug"]
    return rest + args[end:], len(rest) < end


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


if __name__ == "__main__":
    sys.exit(main())
