"""The column ``reasoning``: texts, or token ids padded with 0, reduced to its distinct thoughts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtvla.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLUMN = "reasoning"
TAGGED = re.compile("<think>(.*)</think>", re.DOTALL)
PAD_ID = 0  # fills the rows of token ids


class ThoughtColumn:
    """Collects the column file by file; only distinct rows are kept."""

    def __init__(self, source: Path, tokenizer: str | Path | PreTrainedTokenizerFast | None) -> None:
        """Start an empty column.

        Args:
            source: dataset, to name in errors.
            tokenizer: reads token ids: an object, the folder or hub id of a checkpoint; None where there are texts.
        """
        self._source, self._tokenizer = source, tokenizer
        self._rows: dict[str | bytes, int] = {}
        self._indices: list[np.ndarray] = []

    def add(self, column: pa.ChunkedArray) -> None:
        """Append the rows of a file; :class:`UserError` when they are neither texts nor token ids."""
        kind = column.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            encoded = column.combine_chunks().fill_null("").dictionary_encode()
            places = [self._rows.setdefault(text, len(self._rows)) for text in encoded.dictionary.to_pylist()]
            self._indices.append(np.array(places, dtype=np.int64)[encoded.indices.to_numpy()])
        elif hasattr(kind, "value_type") and pa.types.is_integer(kind.value_type):
            keys = [row_T.tobytes() for row_T in self._ids(column.combine_chunks())]
            self._indices.append(np.array([self._rows.setdefault(key, len(self._rows)) for key in keys], np.int64))
        else:
            raise UserError(f"{self._source}: column {COLUMN!r} holds {kind}, expected text or token ids")

    def finish(self) -> tuple[list[str], np.ndarray]:
        """Distinct thoughts without tags ("" for none), and for every row its place among them (int64).

        Raises:
            UserError: token ids without a tokenizer or with another one's, or no thought at all.
        """
        texts = self._decode() if any(isinstance(row, bytes) for row in self._rows) else list(self._rows)
        places: dict[str, int] = {}
        place_R = np.array([places.setdefault(_inner(str(text)), len(places)) for text in texts], dtype=np.int64)
        if not any(places):
            raise UserError(
                f"{self._source}: column {COLUMN!r} holds no thought; use another dataset, or "
                "data.thoughts=false, cot=none"
            )
        return list(places), place_R[np.concatenate(self._indices)]

    def _ids(self, rows: pa.Array) -> list[np.ndarray]:
        """Token ids of every row (int32), without the padding."""
        lengths_F = pc.list_value_length(rows).fill_null(0).to_numpy()
        flat = rows.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
        return [row_T[row_T != PAD_ID] for row_T in np.split(flat, np.cumsum(lengths_F)[:-1])]

    def _decode(self) -> list[str]:
        """The texts of all distinct rows; what lies outside the tags is dropped, and so is a row without both."""
        tokenizer = self._open()
        decoder, size = tokenizer.backend_tokenizer, len(tokenizer)
        texts = []
        for row in self._rows:
            ids_T = np.frombuffer(row if isinstance(row, bytes) else b"", dtype=np.int32)
            if len(ids_T) and not 0 <= ids_T.min() <= ids_T.max() < size:
                raise self._foreign(f"has no id {ids_T.max()}")
            text = decoder.decode(ids_T.tolist(), skip_special_tokens=False) if len(ids_T) else ""
            texts.append(text if TAGGED.search(text) else "")
        if not any(texts) and any(self._rows):
            raise self._foreign("reads no row as <think>...</think>")
        return texts

    def _open(self) -> Any:
        if self._tokenizer is None:
            raise UserError(
                f"{self._source}: column {COLUMN!r} holds token ids; set data.thought_tokenizer to the checkpoint "
                "(folder or hub id) whose tokenizer wrote them"
            )
        if not isinstance(self._tokenizer, str | Path):
            return self._tokenizer
        from dtvla.policy.hub import find_checkpoint, locate
        from dtvla.policy.weights import read_tokenizer

        folder = find_checkpoint(str(self._tokenizer), "data.thought_tokenizer")
        return read_tokenizer(folder if (folder / "tokenizer.json").is_file() else locate(folder).base)

    def _foreign(self, reason: str) -> UserError:
        name = self._tokenizer if isinstance(self._tokenizer, str | Path) else "the tokenizer"
        return UserError(
            f"data.thought_tokenizer: {name} {reason} in column {COLUMN!r} of {self._source}; "
            "give the checkpoint whose tokenizer wrote the dataset"
        )


def _inner(text: str) -> str:
    """The thought between its tags, where it has them."""
    tagged = TAGGED.search(text)
    return (tagged[1] if tagged else text).strip()
