"""What a thought must look like before it may enter a dataset."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtvla.errors import UserError

_TAG = re.compile(r"</?\s*(think|action|image|bos|eos|pad)\b[^>]*>|<(loc|seg)\d+>", re.IGNORECASE)
_CONTROL = re.compile(rf"{_TAG.pattern}|<\|[^<>|]*\|>|<(unused\d+|s|/s|start_of_turn|end_of_turn)>", re.IGNORECASE)
_BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ENDS = (".", "!", "?", '."', ".)")


@dataclass(frozen=True)
class Violation:
    """A rule that a thought breaks.

    Attributes:
        check: name of the rule, to count by.
        message: what was found, as a sentence about the thought.
    """

    check: str
    message: str


@dataclass(frozen=True)
class SchemaSettings:
    """What thoughts may look like.

    Attributes:
        min_words, max_words: length.
        max_tokens: length in tokens of ``tokenizer``; None for no such limit.
        tokenizer: folder or hub id of the checkpoint whose tokenizer counts.
        ascii: whether only ASCII may be used.
    """

    min_words: int = 8
    max_words: int = 80
    max_tokens: int | None = None
    tokenizer: str | None = None
    ascii: bool = True

    def __post_init__(self) -> None:
        """Refuse limits that nothing can meet."""
        if not 1 <= self.min_words <= self.max_words:
            raise UserError(
                f"schema.min_words, schema.max_words: found {self.min_words} and {self.max_words}; "
                "use 1 <= min_words <= max_words"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"schema.max_tokens: found {self.max_tokens}; use 1 or more, or null")
        if (self.max_tokens is None) != (self.tokenizer is None):
            raise UserError(
                f"schema.max_tokens, schema.tokenizer: found {self.max_tokens} and {self.tokenizer}; set both or none"
            )


class Schema:
    """Reads thoughts out of answers and checks them."""

    def __init__(self, settings: SchemaSettings) -> None:
        """Open the tokenizer where one is set.

        Raises:
            UserError: the tokenizer can't be had.
        """
        self.settings = settings
        self._tokens = _token_counter(settings.tokenizer) if settings.tokenizer else None

    def read(self, answer: str, objects: Sequence[str]) -> tuple[str, list[Violation]]:
        """The thought of an answer and what is wrong with it.

        Args:
            answer: text with one ``<think>...</think>`` and nothing but space around it.
            objects: spoken names of what the task is about; none leaves mentions unchecked.

        Returns:
            The text of the first block without space around it ("" where there is none), and the violations: one_block,
            length, tokens, charset, paragraph, repetition, control or objects.
        """
        block = _BLOCK.search(answer)
        thought = block[1].strip() if block else ""
        found = []
        tags = len(re.findall(r"<think>", answer)), len(re.findall(r"</think>", answer))
        if block is None or tags != (1, 1):
            found.append(Violation("one_block", f"has {tags[0]} <think> and {tags[1]} </think>, expected one of each"))
        elif answer.replace(block[0], "", 1).strip():
            found.append(Violation("one_block", "has text outside <think>...</think>"))
        return thought, found + (self.violations(thought, objects) if block else [])

    def violations(self, thought: str, objects: Sequence[str]) -> list[Violation]:
        """What is wrong with a thought that has been taken out of its block, or that a person has written."""
        limits, found = self.settings, []
        words = len(thought.split())
        if not limits.min_words <= words <= limits.max_words:
            found.append(Violation("length", f"has {words} words, expected {limits.min_words} to {limits.max_words}"))
        tokens = self._tokens(thought) if self._tokens else 0
        if limits.max_tokens is not None and tokens > limits.max_tokens:
            found.append(Violation("tokens", f"has {tokens} tokens, expected at most {limits.max_tokens}"))
        odd = sorted({c for c in thought if not (c.isprintable() or c in "\r\n") or (limits.ascii and not c.isascii())})
        if odd:
            allowed = "printable ASCII" if limits.ascii else "printable characters"
            found.append(Violation("charset", f"has {', '.join(map(ascii, odd[:5]))}, expected {allowed}"))
        if len(thought.splitlines()) > 1:
            found.append(Violation("paragraph", "is more than one paragraph"))
        elif words and not thought.endswith(_ENDS):
            found.append(Violation("paragraph", "does not end with a full stop; it may be cut off"))
        sentences = Counter(filter(None, (part.strip() for part in re.split(r"[.!?]", thought.lower()))))
        if sentences and (most := sentences.most_common(1)[0])[1] > 1:
            found.append(Violation("repetition", f"says {most[1]} times: {most[0]}"))
        control = _CONTROL.search(thought)
        if control:
            found.append(Violation("control", f"contains the control tag {control[0]}"))
        return found + (_object_violations(thought, objects) if words and objects else [])


def _object_violations(thought: str, objects: Sequence[str]) -> list[Violation]:
    from dtvla.cot.objects import mentions_any, strangers
    from dtvla.cot.stages import next_step

    if not mentions_any(thought, objects):
        return [Violation("objects", f"mentions none of: {', '.join(objects)}")]
    others = strangers(next_step(thought), objects)
    if others:
        return [Violation("objects", f"acts on {', '.join(others)}; the task is about: {', '.join(objects)}")]
    return []


def _token_counter(name: str) -> Callable[[str], int]:
    """Counts the tokens of a text with the tokenizer of a checkpoint."""
    from dtvla.policy.hub import find_checkpoint

    path = find_checkpoint(name, "schema.tokenizer") / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"schema.tokenizer: {path.parent} has no tokenizer.json; give a folder or hub id that has one")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
