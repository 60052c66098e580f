"""Which part of the work a thought speaks of, and what it says about the gripper, by its words alone.

The words are matched without understanding them, so whatever could mean several things is left unknown: a check that
is silent costs less than one that sends good thoughts back.
"""

from __future__ import annotations

import re

from dtvla.cot.narrate import PHASES

UNCLEAR = "unclear"
"""In the lexicon, phrases that name more than one stage; what follows them is not read."""

_HAND = (
    r"(?:(?:the|its|my) )?(?:(?:open|closed|robot|robot's|robotic) )?(?:gripper|hand|arm|fingers|end[- ]effector|robot)"
)
_THING = (
    r"(?:it|them|(?:the|this|that|its) (?!(?:open |closed |robot |robotic )?(?:gripper|hand|arm|finger|end|robot))\S+)"
)
_MOVE = r"(?:move|moving|go|going|bring|bringing|guide|shift|get)"
_HOW = r"(?: (?:\w+ly|straight|back|closer|forward|further|again))*"
_GAP = r"(?: \w+){0,3}?"

LEXICON = {
    "reach": (
        rf"(?:{_MOVE}|head|travel|navigate|return|position|align|place)(?: {_HAND})?{_HOW}"
        r" (?:above|over|to|towards?|near|closer|on top|next to|in front|with)\b",
        r"approach",
        r"reach(?:ing)? (?:for|out|over|towards?|to|the)\b",
        r"hover",
        r"open the (?:gripper|fingers|hand) and (?:move|go|reach|return|approach)\b(?!(?: the \w+)? (?:up|away))",
    ),
    "lower": (
        rf"lower(?:ing)? (?:{_HAND}|itself|down|around)\b",
        r"descend",
        rf"{_MOVE}(?: {_HAND})?{_HOW} (?:down|downwards?)\b",
        rf"(?:{_MOVE}|position|place)(?: {_HAND})?{_HOW} around\b",
    ),
    "grasp": (
        rf"(?:close|closing|shut|tighten)(?: {_HAND}|{_HOW} (?:around|on|onto)| firmly| tightly)",
        r"(?:grasp|grip|grab|clamp|pinch|squeeze)(?:ing)?\b(?!per)",
        rf"secur(?:e|ing) {_THING}",
    ),
    "lift": (
        r"(?:lift|rais|elevat|hoist)(?:e|ing)?\b",
        rf"{_MOVE} {_THING}{_GAP} (?:up|upwards?)\b",
    ),
    "carry": (
        r"(?:carry|transport|convey|transfer|deliver)(?:ing)?\b",
        rf"(?:{_MOVE}|take|taking) {_THING}{_GAP} (?:above|over|to|towards?|across|onto|near|closer)\b",
    ),
    "place": (
        rf"(?:lower|plac|put|set|deposit|position|insert|stack)(?:e|t?ing)? {_THING}",
        rf"{_MOVE} {_THING}{_GAP} (?:down|downwards?)\b",
    ),
    "release": (rf"open(?:ing)? {_HAND}", r"releas(?:e|ing)\b", r"let(?:ting)? (?:it )?go\b", rf"drop {_THING}"),
    "retreat": (
        r"(?:retreat|withdraw|retract)",
        rf"(?:lift|rais|elevat)(?:e|ing)? {_HAND}",
        rf"(?:{_MOVE}|back|pull)(?: {_HAND})?{_HOW} (?:up|upwards?|away|off|clear)\b",
        r"return to (?:the |its )?(?:home|start|initial|rest|neutral)",
    ),
    UNCLEAR: (r"pick", r"(?:push|pull|slide|turn|rotate|press|twist|nudge)(?:e|ing)?\b", r"(?:wait|stop|stay|pause)\b"),
}
"""Regular expressions for each stage; they match narrate.py's sentences and ordinary wording of a language model."""

_PATTERNS = {stage: re.compile(rf"\b(?:{'|'.join(phrases)})") for stage, phrases in LEXICON.items()}

_SENTENCE = re.compile(r"[^.;!?]+[.;!?]*")
_MARKS = (  # of what comes next, the surest first
    re.compile(
        r"\b(?:next|following|immediate) (?:step|action|move|task|sub-?goal|goal)\b(?: is|:|,)?(?: to)?|\bnext\b,?"
        r"|\b(?:sub-?goal|next)(?: is|:)(?: to)?"
    ),
    re.compile(
        r"\b(?:i|we|robot|arm|gripper|hand)(?: (?:now|then))?"
        r" (?:should|must|needs? to|will|can|ha(?:ve|s) to|(?:am|is|are) (?:going|about) to)(?: (?:now|then|next))?"
        r"|^ ?now\b,?|\btime to\b"
    ),
)
_BE = r"(?: (?:is|are|was|were|has|have|been|now|still|already|wide|\w+ly))+"
_HOLDS = re.compile(
    r"\b(?:hold(?:s|ing)|held|grasped|gripped|(?:in|inside|between) (?:the|its) (?:closed )?(?:gripper|fingers|grasp)"
    rf"|(?:gripper|hand|fingers){_BE} closed|closed (?:gripper|fingers))\b"
)
_DENIES = re.compile(r"\b(?:not|isn't|aren't|no longer|never|before being|to be|nothing|without|will be)(?: \w+)?$")
_OPEN = re.compile(
    rf"\b(?:(?:gripper|hand|fingers){_BE} (?:open|opened|empty)|open (?:gripper|fingers|hand)"
    r"|(?:is|are|been|was|were)(?: now| already)? (?:let go|released)|holds nothing)\b"
)
_MEANT_HOLDING = {"reach": "carry", "lower": "place", "retreat": "lift"}
_MEANT_OPEN = {"lift": "retreat"}


def next_step(thought: str) -> str:
    """The clause that says what comes next, in lower case; the last sentence where none says so."""
    return _split(thought)[1]


def _split(thought: str) -> tuple[str, str]:
    """What is said before the next step, and the next step."""
    text = " ".join(thought.lower().split())
    sentences = list(_SENTENCE.finditer(text))
    for marks in _MARKS:
        for sentence in reversed(sentences):
            mark = marks.search(sentence[0])
            if mark:
                start = sentence.start()
                return text[: start + mark.start()], text[start + mark.end() : sentence.end()].strip(" ,:.")
    start = sentences[-1].start() if sentences else 0
    return text[:start], text[start:].strip(" ,:.")


def gripper_claim(thought: str) -> bool | None:
    """Whether the gripper is said to be closed or to hold something; None where nothing or both is said.

    What is to be done next is no claim.
    """
    before, _ = _split(thought)
    closed = any(not _DENIES.search(before[: found.start()].rstrip()) for found in _HOLDS.finditer(before))
    opened = any(not _DENIES.search(before[: found.start()].rstrip()) for found in _OPEN.finditer(before))
    return None if closed == opened else closed


def stage_of(thought: str) -> int | None:
    """Place in :data:`~dtvla.cot.narrate.PHASES` of the stage that a thought says comes next; None when unknown.

    The first phrase of the clause counts, of several at one place the longest. Verbs that mean another stage with
    something in the hand are read with what the thought says about the gripper.

    Args:
        thought: text between the tags.
    """
    found = []
    step = next_step(thought)
    for stage, pattern in _PATTERNS.items():
        match = pattern.search(step)
        if match:
            found.append((match.start(), -match.end(), stage))
    stage = min(found)[2] if found else UNCLEAR
    if stage == UNCLEAR:
        return None
    claim = gripper_claim(thought)
    meant = _MEANT_HOLDING if claim else _MEANT_OPEN if claim is False else {}
    return PHASES.index(meant.get(stage, stage))
