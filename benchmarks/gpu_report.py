"""What the rows of the GPU benchmark say: the table, the ratio to PyTorch, and what the configurations should be."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import environment
from benchmarks.gpu_sides import TARGETS, configuration_of

Row = dict[str, Any]
NEAR = 0.98  # of the best images/s: as good, so that of such the one with least memory is taken


def timed(rows: list[Row], target: str, side: str) -> list[Row]:
    """The rows of a target and side that have a time."""
    return [row for row in rows if row["spec"]["target"] == target and row["spec"]["side"] == side and "seconds" in row]


def allowed(row: Row, memory_gb: float = 0.0) -> bool:
    """Whether the configuration could say this: the global batch is a multiple, and `train` would let it start."""
    fits = not memory_gb or row.get("plan_gb") is None or row["plan_gb"] <= memory_gb
    return fits and TARGETS[row["spec"]["target"]].global_batch_size % row["spec"]["batch"] == 0


def best(rows: list[Row], target: str, side: str, memory_gb: float = 0.0) -> Row | None:
    """The row with most images/s that a configuration could say; of equals the one with least memory."""
    found = [row for row in timed(rows, target, side) if allowed(row, memory_gb) and "changes" not in row["spec"]]
    if not found:
        return None
    most = max(row["images_s"] for row in found)
    near = [row for row in found if row["images_s"] >= NEAR * most]
    return min(near, key=lambda row: (row["peak_gb"] or 0.0, -row["images_s"]))


def pairs(rows: list[Row], ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[float, float]]:
    """(our images/s, theirs) of each turn that measured both."""

    def by_turn(spec: dict[str, Any]) -> dict[str, float]:
        return {row["turn"]: row["images_s"] for row in rows if row["spec"] == spec and "seconds" in row}

    a, b = by_turn(ours), by_turn(theirs)
    return [(a[turn], b[turn]) for turn in sorted(a.keys() & b.keys())]


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def changed(spec: dict[str, Any]) -> list[str]:
    """What a configuration has that its file does not say, in words."""
    return [f"{key} {value}" for key, value in spec.get("changes", {}).items()]


def table(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        spec, seconds = row["spec"], row.get("seconds")
        low, middle, high = (min(seconds), statistics.median(seconds), max(seconds)) if seconds else (None, None, None)
        spread = f"{1e3 * middle:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})" if seconds else row["status"]
        cells.append(
            [spec["target"], ", ".join([spec["side"], *changed(spec)]),
             row.get("attention", "-"), spec["remat"], spec["batch"], spread,
             number(1e3 * statistics.median(row["update_seconds"]) if row.get("update_seconds") else None, ".1f"),
             number(row.get("images_s"), ".2f"), number(row.get("mfu"), ".1%"), number(row.get("plan_gb"), ".2f"),
             number(row.get("peak_gb"), ".2f"), number(row.get("compile_s"), ".0f")]
        )  # fmt: skip
    header = ["target", "side", "attention", "remat", "micro-batch", "ms", "update ms", "images/s", "MFU", "plan GB",
              "peak GB", "compile s"]  # fmt: skip
    return environment.table(header, cells)


def verdict(rows: list[Row], target: str, memory_gb: float) -> list[str]:
    """What a target's rows say, line by line."""
    champion = best(rows, target, "jax", memory_gb)
    rival = best(rows, target, "torch")
    said = []
    if champion is None:
        return [f"{target}: no configuration of ours was measured that `train` would start with"]
    if rival:
        ratios = [a / b for a, b in pairs(rows, champion["spec"], rival["spec"])]
        ratios = ratios or [champion["images_s"] / rival["images_s"]]
        what = f"{rival['spec']['remat']} remat, micro-batch {rival['spec']['batch']}"
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds)"
        target_ratio = " (target 1.2)" if target == "prod-1024" else ""
        said.append(f"{target}: {spread} times PyTorch at its best, {what}{target_ratio}")
    plain = [row for row in timed(rows, target, "jax") if row["spec"] == champion["spec"] | {"attention": "xla"}]
    if plain and champion["attention"] == "cudnn":
        said.append(f"{target}: cuDNN's attention {champion['images_s'] / plain[-1]['images_s']:.2f} times XLA's")
    for row in timed(rows, target, "jax"):
        if changed(row["spec"]) and {key: row["spec"][key] for key in champion["spec"]} == champion["spec"]:
            rate, memory = row["images_s"] / champion["images_s"], row["peak_gb"] or 0.0
            said.append(
                f"{target}: with {', '.join(changed(row['spec']))} {rate:.2f} times the images/s, {memory:.2f} GB"
            )
    wanted = {"prod-1024": " (target 50%)", "nano-512": " (target 40%)"}.get(target, "")
    if champion.get("mfu") is not None:
        said.append(f"{target}: MFU {champion['mfu']:.1%}{wanted}")
    return [*said, advice(rows, target, champion)]


def advice(rows: list[Row], target: str, champion: Row) -> str:
    """What the configuration should say, and what it says."""
    spec, config = champion["spec"], TARGETS[target].config
    should = (spec["batch"], spec["remat"])
    text = f"c.data.micro_batch_size = {spec['batch']}, c.model.remat = {spec['remat']!r}"
    text += f" ({champion['images_s']:.2f} images/s)"
    try:
        c = configuration_of(TARGETS[target])
    except ImportError as error:
        return f"{target}: best is {text}; configs/{config}.py could not be read to compare ({error})"
    says = (c.data.micro_batch_size, c.model.remat)
    if says == should:
        return f"{target}: configs/{config}.py says the best already: {text}"
    now = [row for row in timed(rows, target, "jax") if (row["spec"]["batch"], row["spec"]["remat"]) == says]
    now = [row for row in now if row["spec"]["attention"] == "auto"]
    rate = f"{now[-1]['images_s']:.2f} images/s" if now else "not measured at this size"
    return f"{target}: best is {text}; configs/{config}.py says {says[0]}, {says[1]!r} ({rate})"


def profiles(rows: list[Row]) -> list[str]:
    """Each profile: share of the time by group, and the largest operations."""
    said = []
    for row in rows:
        profile = row.get("profile")
        if profile is None:
            continue
        name = f"profile of {row['spec']['target']}, {row['spec']['remat']} remat, micro-batch {row['spec']['batch']}"
        if "error" in profile:
            said.append(f"{name}: {profile['error']}")
            continue
        total = sum(profile["groups"].values())
        shares = [[label, f"{ms:.2f}", f"{ms / total:.1%}"] for label, ms in profile["groups"].items()]
        largest = [[operation, label, f"{ms:.2f}"] for operation, label, ms in profile["top"]]
        said += [f"{name}:", environment.table(["group", "ms a step", "share"], shares)]
        said += ["", environment.table(["operation", "group", "ms a step"], largest)]
    return said


def report(rows: list[Row], memory_gb: float, left: list[str]) -> str:
    """All of it as text: the verdicts last, so that the end of a long output has them."""
    targets = list(dict.fromkeys(row["spec"]["target"] for row in rows))
    lines = [*profiles(rows), "", table([row for row in rows if "profile" not in row]), ""]
    failed = [row for row in rows if row["status"] not in ("ok", "out of memory")]
    lines += [f"{row['status']}: {row['spec']}: {row.get('error', '')}" for row in failed]
    for target in targets:
        lines += verdict(rows, target, memory_gb)
    if left:
        lines.append(f"left out for want of time ({len(left)}); --append goes on with them: " + "; ".join(left))
    return "\n".join(lines)
