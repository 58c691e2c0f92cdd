"""Which words of a caption are changed, and where the subject then moves."""

from __future__ import annotations

import dataclasses
import re

DIRECTIONS = {
    "right": ("horizontal", 1),
    "left": ("horizontal", -1),
    "down": ("vertical", 1),
    "up": ("vertical", -1),
}
# Tried in this order: words that say nothing of what the picture shows.
UNRELATED = (
    ("portrait of", "picture of"),
    ("photo of", "picture of"),
    ("photograph of", "picture of"),
    ("image of", "picture of"),
    ("picture of", "image of"),
    ("in front of", "before"),
    ("there is", "we see"),
    ("with", "having"),
    ("a", "one"),
)


class EditError(Exception):
    """An edit cannot be read, or no caption has its words."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Replace the words `old` by `new`, and the subject must move in `direction`, a key of `DIRECTIONS`."""

    old: str
    new: str
    direction: str

    @classmethod
    def parse(cls, text: str) -> Rule:
        """From "looking left=>looking right:right".

        Raises:
          EditError: it is not of that form.
        """
        words, _, direction = text.rpartition(":")
        old, _, new = words.partition("=>")
        rule = cls(old.strip(), new.strip(), direction.strip())
        if not (rule.old and rule.new) or rule.direction not in DIRECTIONS:
            raise EditError(
                f"--edit {text!r} must be 'OLD WORDS=>NEW WORDS:DIRECTION', DIRECTION one of "
                f"{', '.join(DIRECTIONS)}: where the subject moves"
            )
        return rule

    @property
    def axis(self) -> str:
        return DIRECTIONS[self.direction][0]

    @property
    def sign(self) -> int:
        return DIRECTIONS[self.direction][1]


DEFAULT_RULES = (
    Rule("looking left", "looking right", "right"),
    Rule("looking right", "looking left", "left"),
)


def edited(caption: str, old: str, new: str) -> str | None:
    """The caption with the whole words `old` replaced by `new`, whatever their case; None if it has none."""
    before = r"(?<!\w)" if re.match(r"\w", old) else ""
    after = r"(?!\w)" if re.search(r"\w$", old) else ""
    result = re.sub(before + re.escape(old) + after, lambda _: new, caption, flags=re.IGNORECASE)
    return result if result != caption else None


def choose_rules(captions: list[str], given: list[Rule]) -> list[Rule]:
    """The rules given, or those of `DEFAULT_RULES` that some caption allows.

    Raises:
      EditError: no caption has the words of a given rule, or of any default one.
    """
    for rule in given:
        if not any(edited(caption, rule.old, rule.new) for caption in captions):
            raise EditError(f"--edit: no caption of the data set has the words {rule.old!r}")
    rules = given or [r for r in DEFAULT_RULES if any(edited(c, r.old, r.new) for c in captions)]
    if not rules:
        raise EditError(
            "no caption says 'looking left' or 'looking right': say what to change and where the subject then "
            "moves, as in --edit 'on the left=>on the right:right'"
        )
    return rules


def choose_unrelated(captions: list[str], given: str | None) -> tuple[str, str]:
    """(old, new) words that say nothing of what the picture shows: the given "OLD=>NEW", or from `UNRELATED`.

    Raises:
      EditError: the given one is not of that form or in no caption, or there is none that most captions have.
    """
    if given is not None:
        old, _, new = (part.strip() for part in given.partition("=>"))
        if not (old and new) or not any(edited(caption, old, new) for caption in captions):
            raise EditError(f"--unrelated {given!r} must be 'OLD=>NEW' with words that captions have")
        return old, new
    for old, new in UNRELATED:
        if sum(edited(caption, old, new) is not None for caption in captions) >= len(captions) / 2:
            return old, new
    raise EditError("no harmless word is common to the captions: give one to change, --unrelated 'OLD=>NEW'")
