"""A plan beside what exists: which records stay, which are new, changed or dropped, and what is to be encoded."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Container
from typing import Any

from fluxdit_jax.dataset.fields import CAPTION, IMAGE, LATENT, field_named
from fluxdit_jax.shared.sanitize import shown
from preprocess import PreprocessError
from preprocess.build.existing import Existing
from preprocess.build.items import Item, Items
from preprocess.build.journal import Journal
from preprocess.build.plan import Fingerprints, Plan
from preprocess.database import StoredSet

_FEW, _FEW_SHARE = 3, 0.01  # records that a build may drop or encode again without being asked to
_GONE = "no longer in the input"
# What the user did on purpose, and costs no picture.
_EDITED = ("caption changed", "vector changed", "condition added or changed")


class WouldLose(PreprocessError):
    """A finished dataset would lose more than a few records."""


@dataclasses.dataclass
class Keys:
    """How many there are, and the first of them."""

    count: int = 0
    first: str = ""

    def add(self, key: str) -> None:
        self.first = min(self.first or key, key)
        self.count += 1


@dataclasses.dataclass
class Comparison:
    """What a build would do to what exists.

    Attributes:
      records: of the dataset before.
      kept: images of the plan whose record is there as it must be.
      moved: images that the dataset has under another name.
      unfinished: images that an interrupted build has encoded, beside those of the dataset.
      new: images that the dataset does not have.
      changed: images that the dataset has, with something to be made again, by reason.
      dropped: records that will not be in the dataset any more, by reason. gone: their keys.
      pictures, captions: images of which a picture or the captions must be encoded.
      missing: images whose tensor must be made, by field.
    """

    records: int = 0
    kept: int = 0
    moved: int = 0
    unfinished: int = 0
    new: int = 0
    changed: dict[str, Keys] = dataclasses.field(default_factory=dict)
    dropped: dict[str, Keys] = dataclasses.field(default_factory=dict)
    gone: list[str] = dataclasses.field(default_factory=list)
    pictures: int = 0
    captions: int = 0
    missing: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def going(self, besides: tuple[str, ...]) -> dict[str, Keys]:
        """Records dropped or made again, by reason, besides these kinds of change."""
        return self.dropped | {
            reason: keys for reason, keys in self.changed.items() if reason not in (*besides, "damaged")
        }


def compare(
    plan: Plan,
    prints: Fingerprints,
    existing: Existing,
    known: Container[str],
    before: Fingerprints | None,
    beyond: Container[str] = frozenset(),
) -> Comparison:
    """Compares a plan with what exists.

    Args:
      prints: of the plan.
      known: ids of all tensors that can be used, see `Existing.usable`.
      before: of the dataset, None if it is not known.
      beyond: keys of the input that `--limit` leaves out.
    """
    result = Comparison(records=existing.records)
    rejected = {reject.key: reject.reason for reject in plan.rejects}
    had, had_contents, gone_contents = StoredSet(), StoredSet(), StoredSet()
    for row, old in enumerate(existing.rows()):
        key, content = old["key"], old["content_hash"]
        had.add(key)
        had_contents.add(content)
        item = plan.items.get(key)
        if item is None:
            gone_contents.add(content)
        if item is not None:
            reason = "damaged" if row in existing.damaged else _change(item, old, prints, before, plan.items)
            if reason:
                result.changed.setdefault(reason, Keys()).add(key)
            else:
                result.kept += 1
        elif not plan.items.has_content(content):
            reason = _GONE
            if key in rejected:
                reason = f"rejected now: {rejected[key]}"
            elif key in beyond:
                reason = f"beyond --limit {plan.options.limit}"
            result.dropped.setdefault(reason, Keys()).add(key)
            result.gone.append(key)
    for item in plan.items:
        missing = [name for name, own in zip(prints.names, prints.ids(item), strict=True) if own not in known]
        result.missing.update(missing)
        from_files = {name for name, _ in item.files}
        made = {field_named(name).made_from for name in missing if name not in from_files}
        picture, text = IMAGE in made, CAPTION in made
        result.pictures += picture
        result.captions += text
        if item.key in had:
            continue
        if item.content in gone_contents:
            result.moved += 1
        elif picture or text or item.content in had_contents:  # a copy needs no encoding
            result.new += 1
        else:
            result.unfinished += 1
    return result


def _change(item: Item, old: dict[str, Any], prints: Fingerprints, before: Fingerprints | None, items: Items) -> str:
    """Why a record must be made again, the weightiest reason; "" if it stays."""
    ids = dict(zip(prints.names, prints.ids(item), strict=True))
    changed = [name for name, own in ids.items() if own != old.get(f"{name}_id")]
    if not changed:
        had = {column.removesuffix("_id") for column, value in old.items() if column.endswith("_id") and value}
        return "without a condition that it had" if had - ids.keys() else ""
    if item.content != old["content_hash"] and not items.has_content(old["content_hash"]):
        return "image changed"
    if item.bucket != (old["bucket_height"], old["bucket_width"]):
        return "encoded at another size"

    def by_another(name: str) -> bool:
        return before is None or prints.prints[name] != before.prints.get(name)

    if LATENT.name in changed:
        if item.content != old["content_hash"]:
            return "image changed places with another"
        return "encoded by another VAE or --fit" if by_another(LATENT.name) else "read in another way by this version"
    if "text" in changed and by_another("text"):
        return "encoded by another text encoder"
    if "vision" in changed:
        return "encoded by another vision encoder" if by_another("vision") else "vector changed"
    return "caption changed" if "text" in changed else "condition added or changed"


def tell(journal: Journal, found: Comparison, plan: Plan) -> None:
    """Says what becomes of what exists, and what is to be encoded."""
    total, rejects = len(plan.items), sum(reject.counted for reject in plan.rejects)
    options = plan.options
    shape = (
        f"{len(plan.units)} shards, {rejects:,} rejected so far, {len(options.buckets())} buckets of modulus "
        f"{options.modulus} at {options.resolution} px"
    )
    if not found.records and not found.unfinished:
        journal.say(f"{total:,} images to encode in {shape}")
    else:
        changed = sum(keys.count for keys in found.changed.values())
        parts = [f"{found.kept + found.moved:,} kept", f"{found.new:,} new", f"{changed:,} changed"]
        if found.unfinished:
            parts.insert(1, f"{found.unfinished:,} done before the interruption")
        if found.records:
            parts.append(f"{len(found.gone):,} dropped")
        journal.say(f"{total:,} images: {', '.join(parts)}; {shape}")
        journal.say(f"  to encode: {found.pictures:,} pictures, the captions of {found.captions:,} images")
    for reason, keys in found.changed.items():
        journal.say(f"  changed: {keys.count:,} {reason} (for example {shown(keys.first)})")
    for reason, keys in found.dropped.items():
        journal.say(
            f"  {keys.count:,} of {found.records:,} records of the dataset are {shown(reason)} and are left out "
            f"(for example {shown(keys.first)})"
        )
    if found.gone:
        journal.event("gone", keys=sorted(found.gone))


def require_kept(found: Comparison, output: str, differences: dict[str, str], repairing: bool = False) -> None:
    """Checks that a build leaves a finished dataset what it has.

    Args:
      differences: options that select other inputs or encoders than the dataset's, each with a line of words; then
        nothing may go, but in a folder that was only moved captions may have been edited, and conditions may be added.
      repairing: what is encoded again is meant to be.

    Raises:
      WouldLose: more than a few records would be dropped or encoded again; it says how many, and why.
    """
    allowed: tuple[str, ...] = ()
    if repairing:
        allowed = tuple(found.changed)
    elif not set(differences) - {"input", "condition", "vision_patches"}:
        allowed = _EDITED
    going = found.going(allowed)
    count = sum(keys.count for keys in going.values())
    few = 0 if differences else max(_FEW, int(_FEW_SHARE * found.records))
    if count <= few:
        return
    lines = [f"  {keys.count:,} {reason} (for example {keys.first})" for reason, keys in going.items()]
    meant = "verify --repair" if repairing else "--replace"
    ways = (
        "Mount or give the input that it was built from, and repeat the command"
        if repairing
        else f"If that is meant, add {meant}. To keep the dataset, give the options that it was built with, or none "
        f"but --output {output}; or build into another --output"
    )
    raise WouldLose(
        "\n".join(
            [
                f"--output {output} holds {found.records:,} records, and {count:,} of them would go or be encoded "
                "again; nothing was changed:",
                *lines,
                *differences.values(),
                ways + ".",
            ]
        )
    )
