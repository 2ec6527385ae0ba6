"""``moectl generate``: let a model write, token by token, and show which expert took each of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli.output import out
from moectl.errors import ConfigError, MoectlError, NotFoundError

if TYPE_CHECKING:
    from moectl.walk.generate import Sampling, Utterance, Voice


def command(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|FOLDER",
            help="A run, a folder of `upcycle` or `export`, or a base (smollm2, a folder); default: the newest run.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The text to go on with; with --chat, what you say.")] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", metavar="FILE", help="Read it from a UTF-8 file, or from -."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk, by the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="At most so many.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Choose among so many; default: all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing.")] = 0,
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="Colour each token by its expert, and sum up every layer.")
    ] = False,
    layer: Annotated[int | None, typer.Option(min=0, help="Whose experts are shown; default: the last.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="A checkpoint's step; default: the last.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Let a run or model go on with a text, or talk with it; stops with Ctrl-C (exit code 130).

    With --show-routing each token is printed in the colour of its expert in one layer (--layer), with a mark [e3]
    behind it where there is no colour (NO_COLOR, a pipe), and every layer's shares and entropy follow.
    """
    if layer is not None and not show_routing:
        raise ConfigError("--layer changes nothing without --show-routing", "Add it, or leave --layer away.")
    text = _text(prompt, prompt_file)
    if text is None and (not chat or as_json):
        raise ConfigError(
            "there is nothing to go on with", 'Give --prompt "Once upon a time", --prompt-file FILE, or --chat.'
        )

    from moectl import paths

    paths.use_project_cache()

    from moectl.walk.generate import Sampling, open_voice

    sampling = Sampling(max_new_tokens, temperature, top_k, seed)
    sampling.check()
    voice = open_voice(run, step=step, device=device)
    for warning in voice.warnings:
        out().warn(warning)
    shown = voice.layer(layer) if show_routing else None
    out().say(voice.name if voice.step is None else f"{voice.name} · step {voice.step:,}")
    if chat:
        _talk(voice, sampling, text, shown, as_json)
        return
    assert text is not None
    utterance = _utterance(voice, voice.prompt(text), sampling)
    if as_json:
        _silently(utterance)
        out().data({**utterance.to_json(), "prompt": text})
        return
    _print(utterance, shown)


def _talk(voice: Voice, sampling: Sampling, first: str | None, shown: int | None, as_json: bool) -> None:
    """Turn by turn: the prompt's one, or the lines that are typed until the end of input."""
    messages: list[dict[str, str]] = []
    voice.chat([{"role": "user", "content": "?"}])  # without a template nobody should have to type first
    while True:
        said = first if first is not None else _line()
        if said is None:
            return
        if not said.strip():
            if first is not None:
                raise ConfigError("the prompt is empty", "Say something.")
            continue
        messages.append({"role": "user", "content": said})
        utterance = _utterance(voice, voice.chat(messages), sampling)
        if as_json:
            _silently(utterance)
            messages.append({"role": "assistant", "content": utterance.text})
            out().data({**utterance.to_json(), "messages": messages})
            return
        _print(utterance, shown)
        messages.append({"role": "assistant", "content": utterance.text})
        if first is not None:
            return


def _utterance(voice: Voice, ids: list[int], sampling: Sampling) -> Utterance:
    from moectl.walk.generate import Utterance

    return Utterance(voice, ids, sampling)


def _silently(utterance: Utterance) -> None:
    for _ in utterance:
        pass


def _print(utterance: Utterance, shown: int | None) -> None:
    """Piece by piece, as it comes; the line is ended whatever ends the text."""
    from moectl.reports.routing_text import SUMMARY_COLUMNS, legend, painted, summarize, summary_rows

    counts, colour = utterance.voice.speaker.num_experts, _has_colour()
    try:
        for piece in utterance:
            if shown is None:
                out().stream(piece.text)
            else:
                visits: list[Any] = [said.visits.get(shown) for said in piece.said]
                out().stream(painted(piece.text, visits, colour=colour))
    finally:
        out().stream("\n")
    if utterance.stopped == "positions":
        out().say(f"stopped: the model's {utterance.voice.speaker.max_length:,} positions are full")
    if shown is not None:
        out().data(legend(shown, counts[shown], colour=colour))
        out().table("Routing of the generated tokens", SUMMARY_COLUMNS, summary_rows(summarize(utterance.said, counts)))


def _text(prompt: str | None, file: str | None) -> str | None:
    if prompt is not None and file is not None:
        raise ConfigError("--prompt and --prompt-file are two prompts", "Give one of them.")
    if file is None:
        if prompt == "":
            raise ConfigError("the prompt is empty", "Give at least one character to go on from.")
        return prompt
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MoectlError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}", "Convert it.") from error
    except OSError as error:
        raise NotFoundError(f"cannot read {file}: {error.strerror or error}", "Check the path.") from error
    if not text:
        raise ConfigError(f"the prompt in {file} is empty", "Give at least one character to go on from.")
    return text


def _line() -> str | None:
    """What the user types; None at the end of input."""
    if sys.stdin.isatty():
        out().say("you (Ctrl-D ends):")
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _has_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
