"""What `build` says about its plan and its result: to the terminal, and the same to the log."""

from __future__ import annotations

import collections
import dataclasses
import math
import shlex
from collections.abc import Sequence, Set
from pathlib import Path

from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.manifest import REJECTS, Manifest
from fluxdit_jax.shared.sanitize import shown
from preprocess.buckets import TOKEN_SIDE
from preprocess.build import advice
from preprocess.build.encode import Counts
from preprocess.build.journal import Journal
from preprocess.build.options import Options
from preprocess.build.parts import Part
from preprocess.build.plan import Identities, Plan
from preprocess.build.publish import LOG_FILE
from preprocess.build.rows import Finished
from preprocess.input.findings import Scan, counted

MANY_REJECTS = 3  # exit status
_SHOWN_KINDS = 6  # of files that are not looked at


def report_plan(
    journal: Journal, plan: Plan, listing: Scan, beyond: Set[str] = frozenset(), of_several: bool = False
) -> None:
    """Says what is odd about a plan, the largest one `of_several`; `beyond` are the keys that `--limit` leaves out."""
    if beyond:
        journal.say(
            f"  --limit {plan.options.limit}: {len(beyond):,} more images of the input are not looked at; --limit 0 "
            "takes all"
        )
    several, captions = plan.items.several, plan.items.captions
    if several:
        journal.say(f"  {several:,} images have several captions; {captions:,} captions in all")
    if listing.ignored:
        kinds = listing.ignored.most_common()
        journal.event("ignored", files=dict(kinds))
        others = ", ".join(f"{shown(name)} {count}" for name, count in kinds[:_SHOWN_KINDS])
        more = f", and {len(kinds) - _SHOWN_KINDS} more kinds" if kinds[_SHOWN_KINDS:] else ""
        journal.say(f"  other files, not looked at: {others}{more}")
    if plan.passed_over:
        what = ", ".join(f"{shown(reason)} {count:,}" for reason, count in plan.passed_over.most_common(8))
        journal.say(f"  captions passed over, as another one was taken: {what}")
    if plan.duplicates:
        group = plan.duplicates[0]
        journal.say(
            f"  {sum(len(g) - 1 for g in plan.duplicates):,} images are copies of another, byte by byte "
            f"(for example {shown(group[0])} = {shown(group[1])}); each is a record of its own"
        )
    if wrong := plan.items.wrong_extension:
        journal.say(f"  {wrong:,} images have another format than their extension says; read by content")
    if plan.grid:
        journal.say(f"  a gate set: {len({place.photograph for place in plan.grid.values()})} photographs in a grid")
    else:
        for line in advice.repeated_captions(plan.items.repeated()):
            journal.say(line)
    advice.report_bends(plan, journal.say, of_several)
    enlarged = advice.report_enlarged(plan, journal.say, of_several)
    journal.event(
        "plan",
        items=len(plan.items),
        units=len(plan.units),
        rejects=counted(plan.rejects),
        passed_over=dict(plan.passed_over),
        duplicates=plan.duplicates,
        enlarged=enlarged,
        wrong_extension=wrong,
        several_captions=several,
        captions=captions,
    )
    for reject in plan.rejects:
        journal.event("reject", key=reject.key, reason=reject.reason, detail=reject.detail)


def report_encoders(journal: Journal, identities: Identities) -> None:
    for name, identity in identities.items():
        journal.say(
            f"  {name:6} {identity.id} ({identity.dtype}, width {identity.width}, "
            f"sha256 {identity.sha256[:12] or 'none'})"
        )


@dataclasses.dataclass(frozen=True)
class Published:
    """A dataset that a build has published.

    Attributes:
      units: of its plan.
      changed: False if it was up to date.
    """

    part: Part
    units: list[Finished]
    manifest: Manifest
    changed: bool


def report_result(
    journal: Journal, options: Options, published: list[Published], counts: Counts, seconds: dict[str, float]
) -> int:
    """Says what a build has made; returns the exit status. The datasets have the same records: one speaks for all."""
    journal.say("")
    for each in published:
        splits = ", ".join(f"{split} {each.manifest.records(split):,}" for split in each.manifest.shards)
        total = sum(map(each.manifest.records, each.manifest.shards))
        word = "Done" if each.changed else "Up to date"
        journal.say(f"{word}: {total:,} records ({splits}) in {each.part.output}")
    plan, manifest, finished = published[-1].part.plan, published[-1].manifest, published[-1].units
    output = published[-1].part.output
    reasons = collections.Counter(reject.reason for reject in plan.rejects if reject.counted)
    listed = collections.Counter(reject.reason for reject in plan.rejects if not reject.counted)
    reasons.update(reject.reason for unit in finished for reject in unit.info.rejects)
    names = {"latent": "latents", "text": "captions", "vision": "vision vectors"}
    names |= {"patches": "pictures' patches"} if options.vision_patches else {}
    made = ", ".join(f"{counts.made.get(name, 0):,} {what}" for name, what in names.items())
    journal.say(f"  encoded {made}; {counts.reused:,} tensors taken over from before")
    if further := manifest.further():
        journal.say(f"  with the conditions {', '.join(f'{n} [{manifest.encoders[n].width}]' for n in further)}")
    if several := sum(unit.info.several for unit in finished):
        captions = total + sum(unit.info.others for unit in finished)
        journal.say(f"  {several:,} records have several captions; {captions:,} captions in all")
    if counts.truncated:
        journal.say(f"  {counts.truncated:,} captions were longer than {plan.options.max_tokens} tokens and were cut")
    if counts.profiles_ignored:
        journal.say(f"  {counts.profiles_ignored:,} unusable colour profiles were ignored")
    if plan.duplicates:
        copies = sum(len(group) - 1 for group in plan.duplicates)
        journal.say(f"  {copies:,} records are copies of another's image (listed in {LOG_FILE})")
    if reasons:
        journal.say(f"  {manifest.rejects:,} rejected, each with its reason in {output / REJECTS}:")
        for reason, count in reasons.most_common():
            journal.say(f"    {count:7,}  {reason}")
    if listed:
        told = ", ".join(f"{reason} {count:,}" for reason, count in listed.most_common())
        journal.say(f"  listed in {output / REJECTS} and not counted, as no picture is missing for it: {told}")
    busy = sum(seconds.get(f"encode: {what}", 0.0) for what in manifest.encoders)
    parts = ", ".join(f"{what.removeprefix('encode: ')} {value:.1f} s" for what, value in seconds.items())
    journal.say(f"  time: {parts}")
    if counts.pictures:
        in_all = max(seconds["encode"], 1e-9)
        told = f"encoders busy for {busy / in_all:.0%} of the encoding, " if busy else ""  # not told by other processes
        journal.say(f"  {told}{counts.pictures / in_all:.2f} images/s")
    journal.event(
        "end",
        records=total,
        rejects=dict(reasons),
        counts=dataclasses.asdict(counts),
        seconds={what: round(value, 3) for what, value in seconds.items()},
        changed=any(each.changed for each in published),
    )
    for line in next_steps(Path(options.output), manifest, published[-1].part.output, options.resolutions):
        journal.say(line)
    if too_many := too_many_rejects(manifest.rejects, total, plan.options.max_rejects):
        journal.say(f"error: {too_many}. The dataset is complete without them")
        return MANY_REJECTS
    return 0


def too_many_rejects(rejects: int, records: int, most: float) -> str:
    """What is to be said where a larger share of the inputs than `most` (--max-rejects) is rejected; else ""."""
    share = rejects / max(1, rejects + records)
    if share <= most:
        return ""
    return (
        f"{rejects:,} of {rejects + records:,} inputs are rejected ({share:.1%}), more than {most:.1%} (--max-rejects "
        f"{most:g}). If that is right, give --max-rejects {math.ceil(100 * share) / 100:g}"
    )


_OF_PRODUCTION = (256, 512, 1024)  # the stages of configs/prod.py
_GATE_SET = 300  # images that the gate's model can memorise


def next_steps(
    output: Path, manifest: Manifest, inspected: Path | None = None, resolutions: Sequence[int] = ()
) -> list[str]:
    """What to do with a dataset: commands that run as they stand, from any folder, each when those above are done.

    Args:
      output: of the build. manifest: of its dataset, of several that of the largest.
      inspected: where that one is, if it is not `output`.
      resolutions: of several.
    """
    whole = output.resolve() if output.name in ("", "..") else output
    name = whole.name.removesuffix("-dataset")  # as `subset` calls it, which prints the same command
    data, run, one = shlex.quote(str(output)), shlex.quote(f"runs/{name}"), shlex.quote(str(inspected or output))
    images = sum(manifest.records(split) for split in manifest.shards)
    lines = [f"Look at it:  python -m preprocess inspect {one}"]
    few = " --allow-fewer" if images < 20 else ""
    if any(encoder.id.startswith("builtin:") for encoder in manifest.encoders.values()):
        return [*lines, f"Train on it: {train_command('demo', one, run)}"]
    if images <= _GATE_SET and "holdout" not in manifest.shards:
        return [
            *lines,
            f"Train on it: {train_command('nano', one, run)}",
            f"Then:        python -m fluxdit_jax.validate --workdir={run}",
        ]
    gate = whole.with_name(f"{name}-gate")
    side = min(512, manifest.resolution // TOKEN_SIDE * TOKEN_SIDE)
    report = shlex.quote(f"runs/{gate.name}/validation/report.json")
    config, dataset = ("prod", data) if set(_OF_PRODUCTION) <= set(resolutions) else ("prod_1024", one)
    return [
        *lines,
        f"First the gate, which ends with its own commands: python -m preprocess subset --input {one} --output "
        f"{shlex.quote(str(gate))} --resolution {side} --square{few}",
        f"Then train on it: {train_command(config, dataset, run)} --config.gate.report={report}",
    ]


def train_command(config: str, data: str, run: str) -> str:
    """A command line that trains `configs/<config>.py`; `data` and `run` are quoted for a shell."""
    path = Path("configs") / f"{config}.py"
    if not path.is_file():  # not in the project's folder
        path = Path(records.__file__).parents[1] / path
    return (
        f"python -m fluxdit_jax.train --config={shlex.quote(str(path))} --config.data.path={data} "
        f"--config.workdir={run}"
    )
