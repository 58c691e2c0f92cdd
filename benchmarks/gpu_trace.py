"""Where the device's time goes: a JAX profile's operations, grouped by what they are for.

The profile's own `*.trace.json.gz` (Chrome's trace format) names each kernel's HLO operation; what that operation is
stands in the compiled program's text. Nothing but the standard library is needed.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", re.MULTILINE)
_OPERANDS = re.compile(r"(?<=[\w\-])\(%[^()]*\)")
_CONTAINERS = (" while(", " conditional(", " call(")  # their time is that of the operations in them
# In this order: the first whose word occurs in the kernel's name or its line of HLO.
_GROUPS = (
    ("attention", ("fmha", "sdpa", "flash")),
    ("products", ("matmul", "gemm", "cublas", "nvjet", "cutlass", "dot_general", " dot(", "convolution(")),
    ("copies", ("memcpy", "memset", " copy(", " copy-start(", "copy_fusion", "transpose_fusion")),
)


def operations(hlo: str) -> dict[str, str]:
    """Name of each operation in a compiled program's text (`Compiled.as_text`): the rest of its line."""
    return dict(_LINE.findall(hlo))


def group(name: str, line: str) -> str:
    """What an operation is for, by its kernel's name and its line of HLO ("" where it has none).

    Beyond products, attention and copies: what stands outside the loss (whose operations JAX calls jvp) is the
    optimizer's, and the EMA's and the metrics'; the rest is norms and other elementwise work. What an operation reads
    does not count: a norm of a product's result is no product.
    """
    text = f"{name} {_OPERANDS.sub('()', line)}".lower()
    for label, words in _GROUPS:
        if any(word in text for word in words):
            return label
    if not line:
        return "not known"
    return "norms and elementwise" if "jvp(" in text else "optimizer, EMA, metrics"


def device_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels and copies on the device's streams; on a CPU, which has none, the operations of XLA."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event.get("tid")] = event["args"]["name"]
    whole = [event for event in events if event.get("ph") == "X" and event.get("dur")]
    on_device = [
        event
        for event in whole
        if "/device:" in processes.get(event["pid"], "")
        and "stream" in threads.get((event["pid"], event.get("tid")), "").lower()
    ]
    return on_device or [event for event in whole if "hlo_op" in event.get("args", {})]


def summary(directory: Path, hlo: str, steps: int, top: int = 15) -> dict[str, Any]:
    """Of the newest profile under `directory`: milliseconds a step by group, and the operations that take most.

    Idle is what lies between the first and the last kernel and is covered by none.

    Args:
      hlo: text of the compiled program. steps: how many of it were recorded.

    Returns:
      {"groups": {name: ms a step}, "top": [(operation, group, ms a step)], "file": the trace}; {"error": why} where
      there is no trace, or nothing of a device in it.
    """
    files = sorted(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not files:
        return {"error": f"no *.trace.json.gz under {directory}"}
    with gzip.open(files[-1], "rt", encoding="utf-8") as file:
        events = json.load(file).get("traceEvents", [])
    lines = operations(hlo)
    groups, by_operation, spans = Counter(), Counter(), []
    for event in device_events(events):
        name = event.get("args", {}).get("hlo_op") or event["name"]
        line = lines.get(name) or lines.get(name.replace("_", ".")) or ""
        if any(word in line for word in _CONTAINERS):
            continue
        label = group(f"{event['name']} {name}", line)
        milliseconds = event["dur"] / 1e3 / steps
        groups[label] += milliseconds
        by_operation[name, label] += milliseconds
        spans.append((event["ts"], event["ts"] + event["dur"]))
    if not spans:
        return {
            "error": f"{files[-1]}: none of its {len(events)} events is a device's",
            "file": str(files[-1]),
        }
    groups["idle"] = idle(spans) / 1e3 / steps
    largest = [(name, label, value) for (name, label), value in by_operation.most_common(top)]
    return {"groups": dict(groups.most_common()), "top": largest, "file": str(files[-1])}


def idle(spans: list[tuple[float, float]]) -> float:
    """How much of the time between the first start and the last end no span covers."""
    gaps, busy_until = 0.0, min(spans)[0]
    for start, end in sorted(spans):
        gaps += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    return gaps
