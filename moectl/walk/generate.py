"""``moectl generate``: a run, an upcycled or exported folder, or a base, made to write, and who computed what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from moectl import paths
from moectl.errors import ConfigError, NotFoundError
from moectl.hf.bases import base_folder, known_bases
from moectl.hf.folder import is_folder, load_folder
from moectl.hf.lora import merged
from moectl.hf.speaker import LanguageModelSpeaker, Speaker, is_checkpoint, open_checkpoint
from moectl.hf.text import Message, Text, open_text
from moectl.marks import marks_of
from moectl.models.generation import Said, TextStream, choose_token, speak
from moectl.models.language_model import LanguageModel
from moectl.reports.routing_text import summarize
from moectl.runs.find import find_run
from moectl.training.runtime import resolve_device
from moectl.walk.export_source import run_tokenizer
from moectl.walk.loading import load_run

Stopped = Literal["end", "max_new_tokens", "positions"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely one.
        top_k: only so many of the most likely; None for all.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for numbers that mean nothing."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens is {self.max_new_tokens}", "Ask for at least one token.")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"the temperature must be a number from 0 on, not {self.temperature}", "0 is greedy.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k is {self.top_k}", "Give 1 or more, or leave it away for all tokens.")


@dataclass(frozen=True)
class Piece:
    """Some whole characters, and the tokens that make them up."""

    text: str
    said: tuple[Said, ...]


@dataclass
class Voice:
    """A model that is ready to write.

    Attributes:
        name: as it is known: a run's id, or a folder or base as the user said it.
        step: of a run's checkpoint.
        warnings: to be told before anything is generated.
    """

    name: str
    speaker: Speaker
    text: Text
    device: torch.device
    step: int | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def ends(self) -> frozenset[int]:
        return self.speaker.ends | self.text.ends

    def layer(self, number: int | None) -> int:
        """The layer whose experts are shown: the last with experts, or the one asked for.

        Raises:
            ConfigError: a dense model, or a layer without experts.
        """
        layers = list(self.speaker.num_experts)
        if not layers:
            raise ConfigError(f"{self.name} is dense: it has no experts to show", "Leave --show-routing away.")
        if number is not None and number not in layers:
            raise ConfigError(f"layer {number} has no experts", f"Layers with experts: {', '.join(map(str, layers))}.")
        return layers[-1] if number is None else number

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to go on with. Raises ConfigError where it has none."""
        ids = self.text.encode(text)
        if not ids:
            raise ConfigError("the prompt is empty", "Give at least one character to go on from.")
        return ids

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation. Raises ConfigError without a chat template."""
        return self.text.chat(messages)


@dataclass
class Utterance:
    """What a model writes after some ids: iterate over its pieces; afterwards it knows how it ended.

    Raises:
        ConfigError: the ids do not fit the model: too many, or of another tokenizer.
    """

    voice: Voice
    ids: Sequence[int]
    sampling: Sampling
    said: list[Said] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    def __post_init__(self) -> None:
        speaker, count = self.voice.speaker, len(self.ids)
        if speaker.max_length is not None and count >= speaker.max_length:
            raise ConfigError(
                f"the prompt has {count:,} tokens, and the model has {speaker.max_length:,} positions",
                "Give a shorter one: at least one position must be left to write in.",
            )
        if max(self.ids) >= speaker.vocab_size:
            raise ConfigError(
                f"the tokenizer gives token {max(self.ids)}, but the model's vocabulary has {speaker.vocab_size}",
                "Its tokenizer is another model's: put the right tokenizer.json beside it.",
            )

    def __iter__(self) -> Iterator[Piece]:
        generator = torch.Generator(self.voice.device).manual_seed(self.sampling.seed)
        speaker, sampling = self.voice.speaker, self.sampling
        stream = TextStream(self.voice.text.decode, self.ids)
        waiting: list[Said] = []
        spoken = speak(
            speaker.start(),
            torch.tensor([list(self.ids)], device=self.voice.device),
            sampling.max_new_tokens,
            ends=self.voice.ends,
            choose=lambda logits_BV: choose_token(logits_BV, sampling.temperature, sampling.top_k, generator),
            routes=speaker.routes,
            max_length=speaker.max_length,
        )
        for said in spoken:
            self.said.append(said)
            waiting.append(said)
            text = stream.add(said.token)
            if text:
                yield self._piece(text, waiting)
                waiting = []
        if waiting:
            yield self._piece(stream.end(), waiting)

    def _piece(self, text: str, said: Sequence[Said]) -> Piece:
        self.pieces.append(Piece(text, tuple(said)))
        return self.pieces[-1]

    @property
    def text(self) -> str:
        """All of it, so far."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def stopped(self) -> Stopped:
        """Why it ended."""
        if len(self.said) == self.sampling.max_new_tokens:
            return "max_new_tokens"
        full = self.voice.speaker.max_length
        return "positions" if full is not None and len(self.ids) + len(self.said) >= full else "end"

    def to_json(self) -> dict[str, Any]:
        """Stable keys."""
        counts = self.voice.speaker.num_experts
        return {
            "model": self.voice.name,
            "step": self.voice.step,
            "sampling": vars(self.sampling),
            "prompt_tokens": len(self.ids),
            "text": self.text,
            "tokens": [said.token for said in self.said],
            "pieces": [{"text": piece.text, "tokens": len(piece.said)} for piece in self.pieces],
            "stopped": self.stopped,
            "experts": {
                str(layer): [list(said.visits[layer].experts) if layer in said.visits else None for said in self.said]
                for layer in counts
            },
            "layers": [summary.to_json() for summary in summarize(self.said, counts)],
        }


def open_voice(name: str | None = None, *, step: int | None = None, device: str = "auto") -> Voice:
    """A model that is ready to write, and its tokenizer.

    Args:
        name: a run (id, name, prefix or folder), a folder of ``upcycle`` or ``export``, a Hugging Face folder, a known
            base, a GGUF file or a hub id; None: the newest finished run.
        step: of a run's checkpoint; None: the last.

    Raises:
        NotFoundError: there is none of that name, or it has no tokenizer (exit 4).
        ConfigError: a step of what is no run; a model that cannot be opened.
        CheckError: damaged files (exit 3).
    """
    paths.use_project_cache()
    target = resolve_device(device)
    folder = _folder(name)
    if folder is None:
        return _run(name, step, target)
    if step is not None:
        raise ConfigError(f"{name} is not a run: it has no step {step}", "Leave --step away.")
    text = open_text(folder, special=not is_folder(folder))
    if is_folder(folder):
        return _voice(str(name), load_folder(folder), text, target)
    speaker = open_checkpoint(folder)
    speaker.model.to(target)
    return Voice(str(name), speaker, text, target)


def _run(name: str | None, step: int | None, device: torch.device) -> Voice:
    loaded = load_run(name, step=step)
    places = run_tokenizer(loaded.folder, loaded.data)
    if not places:
        raise NotFoundError(f"the dataset of {loaded.folder.name} has no tokenizer", "Restore its tokenizer.json.")
    text = open_text(places[0].parent, special=False)
    voice = _voice(loaded.folder.name, merged(loaded.model.eval()), text, device, step=loaded.step)
    voice.warnings = [*loaded.messages, *voice.warnings]
    return voice


def _voice(name: str, model: LanguageModel, text: Text, device: torch.device, step: int | None = None) -> Voice:
    warnings = []
    if marks_of(model):
        warnings.append(
            f"{name} is not causal: while it writes, its router sees one token at a time, which it was not trained for"
        )
    return Voice(name, LanguageModelSpeaker(model.to(device)), text, device, step, warnings)


def _folder(name: str | None) -> Path | None:
    """The folder of a model that is no run; None for a run."""
    if name is None:
        return None
    given = Path(name).expanduser()
    if (given / "run.json").is_file():
        return None
    if is_folder(given) or is_checkpoint(given):
        return given
    try:
        find_run(name)
    except NotFoundError:
        if given.is_dir():
            raise NotFoundError(
                f"{given} holds neither a run nor a model", "Give a folder with a config.json, or a run."
            ) from None
        if name in known_bases() or given.is_file() or "/" in name:
            return base_folder(name)
        raise
    return None
