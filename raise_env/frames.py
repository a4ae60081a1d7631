"""The text that a model sees of a conversation, and which part of it the assistant says.

Decisions:
    A conversation becomes one text. What is trained on is then, character by character, what the model is shown when
    it is asked: prompt and response put together from two renderings would not always be.

    A chat template that marks what is generated is believed. One without marks is asked twice: what it adds between
    an open conversation and the answered one is the assistant's. Where the two do not agree, it is an error, for the
    mask would be wrong and the loss would look fine.

    Where an earlier answer ends is not searched for by its text alone, for what follows may say the same: the
    conversation is rendered once more with other answers, and what stays is the template's and the user's.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError

from .errors import SettingError, excerpt
from .pool import Instruction
from .sandbox import TODAY, BoundedTemplate

__all__ = ["PLAIN_TEMPLATE", "ChatFrame", "Frame", "FramedRow", "PlainFrame"]

logger = logging.getLogger(__name__)

#: The frame for base models whose tokenizer has no chat template.
PLAIN_TEMPLATE = "{% if system %}{{ system }}\n\n{% endif %}### Instruction:\n{{ prompt }}\n\n### Response:\n"

#: Stand in for a response and for a system text where a template is tried out; no template holds them, and none would
#: change them.
_STAND_IN, _SYSTEM = "stand-in-for-a-response", "stand-in-for-a-system-text"

#: The tag by which a chat template marks what the assistant says, as `transformers` looks for it.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class FramedRow:
    """A conversation as one text.

    Attributes:
        text: All of it.
        spans: What the assistant says, each as its first character and the one after its last.
        is_ended: Whether the text ends the last response itself; if not, the end token follows, and is learned.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    is_ended: bool


class Frame(Protocol):
    """What stands around prompts and responses."""

    @property
    def description(self) -> str:
        """The frame as text: equal for frames that give equal texts."""

    @property
    def has_start(self) -> bool:
        """Whether the text begins with the start token where the model has one."""

    def prompt_text(self, row: Instruction) -> str:
        """Return what stands before the last response."""

    def framed(self, rows: Sequence[Instruction]) -> list[FramedRow]:
        """Return each row as one text."""


class PlainFrame:
    """A frame around each prompt, one exchange after the other, each response ended by the end token.

    Args:
        template: Jinja over `prompt` and `system`; the latter is empty from the second exchange on.
        end: The end token as text.

    Raises:
        SettingError: The template does not compile, or does not contain the prompt.
    """

    has_start = False

    def __init__(self, template: str, end: str) -> None:
        self.description = template
        self._end = end
        self._template = _compile(template)
        self._shows_system = "\x01" in self._shown("\x00", "\x01")

    def prompt_text(self, row: Instruction) -> str:
        """Return the frame of the last prompt, and all exchanges before it.

        Raises:
            SettingError: As `framed`.
        """
        (framed,) = self.framed([row])
        return framed.text[: framed.spans[-1][0]]

    def framed(self, rows: Sequence[Instruction]) -> list[FramedRow]:
        """Return each row as one text.

        Raises:
            SettingError: A row has a system text, and the template never shows it; or the template fails on a row.
        """
        return [self._framed(row) for row in rows]

    def _shown(self, prompt: str, system: str) -> str:
        try:
            return self._template.render(prompt=prompt, system=system)
        except TemplateError as error:
            raise SettingError(
                f"the template {excerpt(self.description)!r} refuses the prompt {excerpt(prompt)!r}: {error}. Expected "
                "Jinja over {{ prompt }} and {{ system }}."
            ) from error

    def _framed(self, row: Instruction) -> FramedRow:
        if row.system and not self._shows_system:
            raise SettingError(
                f"the template {self.description!r} never shows {{{{ system }}}}, but there are rows with a system "
                f"text, such as {excerpt(row.system)!r}. Add {{% if system %}}{{{{ system }}}}{{% endif %}} to it."
            )
        text, spans, system = "", [], row.system
        for prompt, response in row.exchanges:
            text += self._shown(prompt, system)
            spans.append((len(text), len(text) + len(response) + len(self._end)))
            text += response + self._end
            system = ""
        # The last end token is put there as a token: as text it is one only if the tokenizer takes it for one.
        text = text.removesuffix(self._end)
        spans[-1] = (spans[-1][0], len(text))
        return FramedRow(text, tuple(spans), is_ended=False)


class ChatFrame:
    """A tokenizer's chat template.

    Args:
        tokenizer: A `transformers` tokenizer that has one.

    Raises:
        SettingError: It does not compile.
    """

    has_start = True

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.description = str(tokenizer.chat_template)
        if "strftime_now" in self.description:
            self.description += f"{{# today is {TODAY:%Y-%m-%d} #}}"
        try:
            self._template = BoundedTemplate(tokenizer.get_chat_template(), is_chat=True)
        except (TemplateError, ValueError) as error:  # a ValueError: there are several, and none is the default
            raise SettingError(
                f"the tokenizer's chat template cannot be used: {error}. Give a template of your own: --template."
            ) from error
        self._special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        #: Whether the template itself tells what is learned; which characters a token stands for, fast ones alone know.
        self.has_marks = bool(_MARK.search(self.description)) and bool(tokenizer.is_fast)
        if not self.has_marks:
            logger.info(
                "the chat template has no {% generation %} mark: learned is what it adds between an open "
                "conversation and the answered one"
            )

    @functools.cached_property
    def end(self) -> str:
        """What the template puts behind a response to end it, without white space; empty where it puts nothing there.

        Raises:
            SettingError: The template cannot be used.
        """
        (text,) = self._rendered([messages_of(Instruction("question", _STAND_IN))], is_open=False)
        if _STAND_IN not in text:
            raise SettingError("the chat template does not show what the assistant says. Give a template: --template.")
        return text.rpartition(_STAND_IN)[2].rstrip()

    @functools.cached_property
    def _turn_ends(self) -> tuple[str, ...]:
        """What may end a response that is followed by another turn, the longest first.

        `end` may hold more: what ends the conversation as a whole, on a line of its own or as the end token.
        """
        lines = [self.end[:place] for place, character in enumerate(self.end) if character == "\n"]
        without_token = self.end.removesuffix(self._special_tokens.get("eos_token", ""))
        ends = {self.end, *(part.rstrip() for part in (*lines, without_token))}
        return tuple(sorted(ends - {""}, key=len, reverse=True))

    def prompt_text(self, row: Instruction) -> str:
        """Return the conversation up to the last response.

        Raises:
            SettingError: The template refuses it, or does not show its system text.
        """
        (text,) = self._rendered([messages_of(row)[:-1]], is_open=True)
        self._check_system([row], is_open=True)
        return text

    def framed(self, rows: Sequence[Instruction]) -> list[FramedRow]:
        """Return each row as one text, by what the template adds for each response.

        Raises:
            SettingError: The template refuses a conversation, shows its beginning in another way once it is answered,
                or does not show a response or a system text.
        """
        wholes = self._rendered([messages_of(row) for row in rows], is_open=False)
        self._check_system(rows, is_open=False)
        return [self._spanned(row, whole) for row, whole in zip(rows, wholes, strict=True)]

    def marked(self, rows: Sequence[Instruction]) -> list[tuple[list[int], list[bool]]]:
        """Return the tokens of each row, and which of them the template marks as the assistant's.

        Raises:
            SettingError: The template refuses a conversation, does not show its system text or marks it too, or marks
                nothing.
        """
        headed = next((row for row in rows if row.system), None)
        if headed is not None and self._marks_system:
            raise SettingError(
                f"the chat template marks what is not an answer as generated: system texts, such as "
                f"{excerpt(headed.system)!r}. Mend its {{% generation %}} tags, or give a template: --template."
            )
        tokens, masks = self._tokenized([messages_of(row) for row in rows])
        self._check_system(rows, is_open=False)
        for row, mask in zip(rows, masks, strict=True):
            if not any(mask):
                raise SettingError(
                    f"the chat template marks nothing of the conversation {excerpt(row.prompt)!r} as generated. "
                    "Mend its {% generation %} tags, or give a template: --template."
                )
        return list(zip(tokens, masks, strict=True))

    @functools.cached_property
    def _marks_system(self) -> bool:
        turns = messages_of(Instruction("question", _STAND_IN, system="system"))[:-1]
        return any(self._tokenized([turns])[1][0])

    def _check_system(self, rows: Sequence[Instruction], *, is_open: bool) -> None:
        """Check that the template shows a system text where there is one, in open conversations or in answered ones."""
        headed = next((row for row in rows if row.system), None)
        if headed is not None and not self._shows_system[is_open]:
            raise SettingError(
                f"the chat template never shows a system text, but there are rows with one, such as "
                f"{excerpt(headed.system)!r}. Give a template of your own that shows {{{{ system }}}}: --template."
            )

    @functools.cached_property
    def _shows_system(self) -> tuple[bool, bool]:
        """Whether an answered conversation shows its system text, and whether an open one does."""
        turns = messages_of(Instruction("question", _STAND_IN, system=_SYSTEM))
        answered, opened = self._rendered([turns], is_open=False), self._rendered([turns[:-1]], is_open=True)
        return _SYSTEM in answered[0], _SYSTEM in opened[0]

    def _spanned(self, row: Instruction, whole: str) -> FramedRow:
        """Return the row for its text."""
        starts = self._starts(row, whole)
        if row.response.strip() not in whole[starts[-1] :]:
            raise _not_shown(row.response)
        end = len(whole.rstrip()) if self.end else len(whole)
        ends = [*self._earlier_ends(row, whole, starts), end]
        return FramedRow(whole, tuple(zip(starts, ends, strict=True)), is_ended=bool(self.end))

    def _starts(self, row: Instruction, whole: str) -> list[int]:
        """Return where each response begins: how much the template shows of the conversation before it."""
        chat = messages_of(row)
        opens = [chat[:place] for place, message in enumerate(chat) if message["role"] == "assistant"]
        beginnings = self._rendered(opens, is_open=True)
        for before in beginnings:
            if not whole.startswith(before):
                raise SettingError(
                    f"the chat template shows a conversation in another way once it is answered: {excerpt(before)!r} "
                    f"does not begin {excerpt(whole)!r}. Mark what is learned by {{% generation %}} in it, or give a "
                    "template: --template."
                )
        return [len(before) for before in beginnings]

    def _earlier_ends(self, row: Instruction, whole: str, starts: Sequence[int]) -> list[int]:
        """Return where each response but the last ends, with what ends its turn."""
        if not row.earlier:
            return []
        # The same conversation with other answers: between these stands what is no answer.
        other = dataclasses.replace(row, earlier=tuple((said, _STAND_IN) for said, _ in row.earlier))
        first, *between = self._rendered([messages_of(other)[:-1]], is_open=True)[0].split(_STAND_IN)
        if len(between) != len(row.earlier):
            raise _not_shown(row.earlier[0][1])
        ends, place = [], len(first)
        for start, (_, response), following in zip(starts[:-1], row.earlier, between, strict=True):
            bare = response.strip()
            shown = whole.find(bare, max(start, place))
            end = whole.find(following, shown + len(bare))
            # Templates may trim a response: nothing but white space is left or lost around it.
            if shown < 0 or end < 0 or (whole[place:shown] + whole[shown + len(bare) : end]).strip():
                raise _not_shown(response)
            ends.append(end + len(next((mark for mark in self._turn_ends if whole.startswith(mark, end)), "")))
            place = end + len(following)
        return ends

    def _tokenized(self, chats: list[Messages]) -> tuple[list[list[int]], list[list[bool]]]:
        """Return the tokens of each conversation, and which of them stand for what is marked."""
        rendered = [self._marked(chat, is_open=False) for chat in chats]
        found = self._tokenizer([text for text, _ in rendered], add_special_tokens=False, verbose=False)
        masks = []
        for place, (_, marks) in enumerate(rendered):
            mask = [False] * len(found["input_ids"][place])
            for start, end in marks:
                # A blank may have no token of its own: byte-level tokenizers leave it out of the next word's place.
                first = _first_token(found, place, range(start, end))
                last = _first_token(found, place, reversed(range(start, end)))
                if first is not None and last is not None:
                    mask[first : last + 1] = [True] * (last + 1 - first)
            masks.append(mask)
        return [list(tokens) for tokens in found["input_ids"]], masks

    def _rendered(self, chats: list[Messages], *, is_open: bool) -> list[str]:
        return [self._marked(chat, is_open=is_open)[0] for chat in chats]

    def _marked(self, chat: Messages, *, is_open: bool) -> tuple[str, list[tuple[int, int]]]:
        shown = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": is_open}
        try:
            return self._template.render_marked(**shown, **self._special_tokens)
        except TemplateError as error:
            raise SettingError(
                f"the chat template refuses the conversation that begins {excerpt(chat[0]['content'])!r}, with the "
                f"roles {', '.join(message['role'] for message in chat)}: {error}. "
                "Change the rows, or give a template of your own: --template."
            ) from error


def _first_token(found: Any, place: int, characters: Iterable[int]) -> int | None:
    """Return the token of the first character that has one; None where none has."""
    tokens = (found.char_to_token(place, character) for character in characters)
    return next((token for token in tokens if token is not None), None)


def messages_of(row: Instruction) -> Messages:
    """Return a row as a chat template takes it."""
    messages = [{"role": "system", "content": row.system}] if row.system else []
    for said, answered in row.exchanges:
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
    return messages


def _not_shown(response: str) -> SettingError:
    return SettingError(
        f"the chat template does not show the response {excerpt(response)!r} as it is. Mark what is learned by "
        "{% generation %} in it, or give a template: --template."
    )


def _compile(template: str) -> BoundedTemplate:
    try:
        compiled = BoundedTemplate(template)
        probe = compiled.render(prompt="\x00", system="")
    except TemplateError as error:
        raise SettingError(
            f"the template does not compile: {error}. Expected Jinja over {{{{ prompt }}}} and {{{{ system }}}}."
        ) from error
    if "\x00" not in probe:
        raise SettingError(f"the template {template!r} never shows {{{{ prompt }}}}.")
    return compiled
