"""What a thought must look like before it may enter a dataset."""

import re
from collections.abc import Sequence

MIN_WORDS, MAX_WORDS = 20, 60
_TAG = re.compile(r"</?\s*(think|action|image|bos|eos|pad)\b[^>]*>|<(loc|seg)\d+>", re.IGNORECASE)


def check_thought(text: str, objects: Sequence[str]) -> list[str]:
    """Violations of the schema, as readable sentences; empty when the thought is fine.

    A thought is one ASCII paragraph of 20 to 60 words without control tags that names at least one of ``objects``
    (spoken names such as "black bowl").
    """
    found = []
    words = len(text.split())
    if not MIN_WORDS <= words <= MAX_WORDS:
        found.append(f"has {words} words, expected {MIN_WORDS} to {MAX_WORDS}")
    if not text.isascii():
        found.append("has characters outside ASCII")
    if "\n" in text or "\r" in text or text != text.strip():
        found.append("is not one paragraph without space around it")
    if _TAG.search(text):
        found.append("contains a control tag")
    lower = text.lower()
    if not any(re.search(rf"\b{re.escape(name.lower())}\b", lower) for name in objects):
        found.append(f"mentions none of: {', '.join(objects)}")
    return found
