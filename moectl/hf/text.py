"""Text to token ids and back, with the chat template where there is one: any tokenizer that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moectl.errors import ConfigError, MoectlError, NotFoundError
from moectl.hf.refusals import quiet_transformers, unreadable

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
Message = Mapping[str, str]


class Text:
    """A tokenizer.

    Args:
        tokenizer: of transformers.
        special: whether a text gets the special tokens that the tokenizer puts around one. Runs are trained
            without; a base may be used to them.
    """

    def __init__(self, tokenizer: Any, *, special: bool) -> None:
        self._tokenizer = tokenizer
        self._special = special

    @property
    def ends(self) -> frozenset[int]:
        """The token that ends a text or a turn."""
        end = self._tokenizer.eos_token_id
        return frozenset() if end is None else frozenset({int(end)})

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=self._special)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; half a character at an end is ``\\ufffd``."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, ready for the assistant's next turn.

        Raises:
            ConfigError: the tokenizer has no chat template, or it refuses the conversation.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise ConfigError(
                "the model's tokenizer has no chat template: it was not made for conversations",
                "Give a text to go on with: --prompt TEXT. Instruction-tuned bases (smollm2) have a template.",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of its author's, and jinja raises what it likes
            raise ConfigError(f"the chat template refuses this conversation: {error}", "Start anew.") from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def open_text(folder: Path, *, special: bool) -> Text:
    """The tokenizer in a folder.

    Raises:
        NotFoundError: there is none. MoectlError: it does not load.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    known = (folder / SETTINGS).is_file()
    if not known and not (folder / TOKENIZER).is_file():
        raise NotFoundError(f"{folder} has no tokenizer", f"Put the model's own {TOKENIZER} into it.")
    try:
        with quiet_transformers():
            if known:
                found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            else:
                found = PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER))
    except MoectlError:
        raise
    except Exception as error:  # transformers raises what it likes: the files are the user's
        raise unreadable(f"the tokenizer in {folder}", error) from error
    return Text(found, special=special)
