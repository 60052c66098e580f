"""Answers on disk, so that none is paid twice."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

from dtvla.cot.annotator import Answer
from dtvla.errors import UserError


class AnswerCache:
    """A folder of answers that one process uses at a time, from any of its threads.

    An answer is on the disk before it is handed on. Its facts say whether it was ``cached``, and what it ``cost``.

    Attributes:
        costs: what all answers cost together when it was opened, and the dearest.
    """

    def __init__(self, folder: Path | str) -> None:
        """Open the folder, or make it.

        Raises:
            UserError: it can't be written, another process has it open, or its file is damaged.
        """
        self._path = Path(folder).expanduser() / "answers.sqlite"
        self._lock = Lock()
        self._asking: WeakValueDictionary[str, _Turn] = WeakValueDictionary()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self._path, timeout=1, check_same_thread=False)
            # The transaction takes the file for this process; the mode keeps it until it is closed.
            self._file.executescript(
                "PRAGMA locking_mode = EXCLUSIVE; PRAGMA synchronous = FULL; BEGIN EXCLUSIVE;"
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT, facts TEXT, cost REAL); COMMIT;"
            )
            with closing(self._file.execute("SELECT total(cost), ifnull(max(cost), 0) FROM answers")) as rows:
                self.costs: tuple[float, float] = rows.fetchone()
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def answer(self, key: str, ask: Callable[[], Answer]) -> Answer:
        """The answer of this key; ``ask`` is called where there is none, by one thread at a time for one key.

        Raises:
            UserError: the answer can't be kept; whatever ``ask`` raises.
        """
        with self._lock:
            turn = self._asking.setdefault(key, _Turn())
        with turn.lock:
            answer = self._find(key)
            if answer is None:
                answer = ask()
                self._keep(key, answer)
            return answer

    def close(self) -> None:
        """Leave the folder to others."""
        self._file.close()

    def _find(self, key: str) -> Answer | None:
        query = "SELECT text, facts FROM answers WHERE key = ?"
        try:
            with self._lock, closing(self._file.execute(query, (key,))) as rows:
                row = rows.fetchone()
            return row and Answer(row[0], {**json.loads(row[1]), "cached": True})
        except (sqlite3.Error, ValueError) as error:
            raise self._unusable(error) from None

    def _keep(self, key: str, answer: Answer) -> None:
        row = (key, answer.text, json.dumps(dict(answer.facts)), answer.facts.get("cost") or 0.0)
        try:
            with self._lock, self._file:
                self._file.execute("INSERT INTO answers VALUES (?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> UserError:
        busy = "locked" in str(error)
        advice = "wait for the other run that has it open" if busy else "choose another folder, or delete the file"
        return UserError(f"annotator.cache_dir: {self._path} can't be used ({error}); {advice}")


class _Turn:
    """A lock that is forgotten with the last thread that wants it."""

    def __init__(self) -> None:
        self.lock = Lock()
