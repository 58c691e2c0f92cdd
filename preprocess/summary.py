"""What `build` says about its plan and its result: to the terminal, and the same to the log."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import pyarrow as pa

from fluxdit_jax import records
from fluxdit_jax.records import Manifest
from fluxdit_jax.untrusted import shown
from preprocess import buckets
from preprocess.encode import Counts
from preprocess.findings import Scan, counted
from preprocess.journal import Journal
from preprocess.plan import Item, Plan, Unit
from preprocess.publish import LOG_FILE, Identities
from preprocess.units import UnitInfo

MANY_REJECTS = 3  # exit status


def tell_plan(journal: Journal, plan: Plan, listing: Scan) -> None:
    options = plan.options
    journal.say(
        f"{len(plan.items):,} images to encode in {len(plan.units)} shards, {counted(plan.rejects):,} rejected so far, "
        f"{len(options.buckets())} buckets of modulus {options.modulus} at {options.resolution} px"
    )
    several, captions = sum(len(i.captions) > 1 for i in plan.items), sum(len(i.captions) for i in plan.items)
    if several:
        journal.say(f"  {several:,} images have several captions; {captions:,} captions in all")
    if listing.ignored:
        others = ", ".join(f"{shown(name)} {count}" for name, count in listing.ignored.most_common(6))
        journal.say(f"  other files, not looked at: {others}")
    if plan.passed_over:
        what = ", ".join(f"{shown(reason)} {count:,}" for reason, count in plan.passed_over.most_common(8))
        journal.say(f"  captions passed over, as another one was taken: {what}")
    if plan.duplicates:
        group = plan.duplicates[0]
        journal.say(
            f"  {sum(len(g) - 1 for g in plan.duplicates):,} images are copies of another, byte by byte "
            f"(for example {shown(group[0])} = {shown(group[1])}); each is a record of its own"
        )
    if plan.wrong_extension:
        journal.say(
            f"  {plan.wrong_extension:,} images have another format than their extension says; read by content"
        )
    enlarged = [i for i in plan.items if buckets.enlargement(_size(i), i.bucket) > options.max_upscale]
    if enlarged:
        worst = max(enlarged, key=lambda i: buckets.enlargement(_size(i), i.bucket))
        journal.say(
            f"  warning: {len(enlarged):,} images are enlarged more than {options.max_upscale:g} times (worst "
            f"{shown(worst.key)}, {buckets.enlargement(_size(worst), worst.bucket):.1f} times): they will look soft"
        )
    journal.event(
        "plan",
        items=len(plan.items),
        units=len(plan.units),
        rejects=counted(plan.rejects),
        passed_over=dict(plan.passed_over),
        duplicates=plan.duplicates,
        enlarged=len(enlarged),
        wrong_extension=plan.wrong_extension,
        several_captions=several,
        captions=captions,
    )
    for reject in plan.rejects:
        journal.event("reject", key=reject.key, reason=reject.reason, detail=reject.detail)


def tell_gone(journal: Journal, before: set[str], plan: Plan) -> None:
    """Says which records of the finished dataset will not be in the new one."""
    gone = sorted(before - {item.key for item in plan.items})
    if gone:
        journal.say(
            f"  {len(gone):,} of {len(before):,} records of the dataset are no longer in the input and are left out "
            f"(for example {gone[0]})"
        )
        journal.event("gone", keys=gone)


def _size(item: Item) -> buckets.Size:
    return item.header.height, item.header.width


def tell_encoders(journal: Journal, identities: Identities) -> None:
    for name, identity in dataclasses.asdict(identities).items():
        journal.say(
            f"  {name:6} {identity['id']} ({identity['dtype']}, width {identity['width']}, "
            f"sha256 {identity['sha256'][:12] or 'none'})"
        )


def tell_result(
    journal: Journal,
    output: Path,
    plan: Plan,
    manifest: Manifest,
    finished: list[tuple[Unit, UnitInfo, pa.Table]],
    counts: Counts,
    seconds: dict[str, float],
    changed: bool,
) -> int:
    splits = ", ".join(f"{split} {manifest.records(split):,}" for split in manifest.shards)
    total = sum(manifest.records(split) for split in manifest.shards)
    reasons = collections.Counter(reject.reason for reject in plan.rejects if reject.counted)
    listed = collections.Counter(reject.reason for reject in plan.rejects if not reject.counted)
    reasons.update(reject.reason for _, info, _ in finished for reject in info.rejects)
    journal.say(f"\n{'Done' if changed else 'Up to date'}: {total:,} records ({splits}) in {output}")
    journal.say(
        f"  encoded {counts.latents:,} latents, {counts.texts:,} captions, {counts.visions:,} vision vectors; "
        f"{counts.reused:,} tensors taken over from before"
    )
    if several := sum(info.several for _, info, _ in finished):
        captions = total + sum(info.others for _, info, _ in finished)
        journal.say(f"  {several:,} records have several captions; {captions:,} captions in all")
    if counts.truncated:
        journal.say(
            f"  {counts.truncated:,} captions were longer than {plan.options.max_tokens} tokens and were cut"
        )
    if counts.profiles_ignored:
        journal.say(f"  {counts.profiles_ignored:,} unusable colour profiles were ignored")
    if plan.duplicates:
        copies = sum(len(group) - 1 for group in plan.duplicates)
        journal.say(f"  {copies:,} records are copies of another's image (listed in {LOG_FILE})")
    if reasons:
        journal.say(f"  {manifest.rejects:,} rejected, each with its reason in {output / records.REJECTS}:")
        for reason, count in reasons.most_common():
            journal.say(f"    {count:7,}  {reason}")
    if listed:
        told = ", ".join(f"{reason} {count:,}" for reason, count in listed.most_common())
        journal.say(f"  listed there too, and not counted, as no picture is missing for it: {told}")
    busy = sum(seconds.get(f"encode: {what}", 0.0) for what in ("text", "vae", "vision"))
    parts = ", ".join(f"{what.removeprefix('encode: ')} {value:.1f} s" for what, value in seconds.items())
    journal.say(f"  time: {parts}")
    if counts.pictures:
        journal.say(
            f"  encoders busy for {busy / max(seconds['encode'], 1e-9):.0%} of the encoding, "
            f"{counts.pictures / max(seconds['encode'], 1e-9):.2f} images/s"
        )
    journal.event(
        "end",
        records=total,
        rejects=dict(reasons),
        counts=dataclasses.asdict(counts),
        seconds={what: round(value, 3) for what, value in seconds.items()},
        changed=changed,
    )
    journal.say(f"Look at it:  python -m preprocess inspect {output}")
    journal.say(
        f"Train on it: python -m fluxdit_jax.train --config=configs/nano.py --config.data.path={output}"
    )
    share = manifest.rejects / max(1, manifest.rejects + total)
    if share > plan.options.max_rejects:
        journal.say(
            f"error: {share:.1%} of the inputs were rejected, more than --max-rejects {plan.options.max_rejects:g}; "
            "the dataset is complete without them"
        )
        return MANY_REJECTS
    return 0
