"""Where the time of a decode step goes, out of a torch profiler trace of an engine.

    python benchmarks/timeline.py TRACE.json.gz

A step reaches from the end of one target verify pass to the end of the next. What the GPU does in
it is grouped by the CUDA graph that launched it (the graph with most work is the verify pass, the
other one of a step the draft pass), and what was launched one by one counts as eager. Idle is when
nothing runs on the GPU. All times are medians over the steps, in milliseconds. Steps in which
prompts were read launch many times as much, and stand by themselves.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
NAMES_SHOWN = 6
PARTS = ("verify graph", "other graphs", "eager", "idle", "step")
# A step with so many times the launches of the one with the fewest, and so many more, read prompts:
# their passes run layer by layer, in launches or in parts of graphs.
TIMES, MORE = 3, 50


def load(path: Path) -> list[dict[str, Any]]:
    """Complete events of a trace."""
    content = path.read_bytes()
    trace = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def short(name: str) -> str:
    """A kernel's name without its template and parameters."""
    return re.split(r"[<(]", name.removeprefix("void "))[0][:60]


def timeline(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of a trace.

    Args:
        events: complete events.

    Raises:
        ValueError: fewer than two graphs were launched in it, so that it holds no whole step.
    """
    launches = {
        event["args"]["correlation"]
        for event in events
        if "GraphLaunch" in event["name"] and "correlation" in event.get("args", {})
    }
    work = sorted((e for e in events if e.get("cat") in GPU), key=lambda event: event["ts"])
    graphs: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in work:
        if event["args"].get("correlation") in launches:
            graphs[event["args"]["correlation"]].append(event)
    busy = {key: sum(event["dur"] for event in graph) for key, graph in graphs.items()}
    # Verify passes do like work; a draft pass does a part of it.
    most = max(busy.values(), default=0.0)
    verify = {key for key, time in busy.items() if time > 0.5 * most}
    ends = sorted(max(e["ts"] + e["dur"] for e in graphs[key]) for key in verify)
    if len(ends) < 2:
        raise ValueError(f"{len(ends)} verify passes in the trace: record more steps")
    steps = [_step(work, graphs, verify, *span) for span in pairwise(ends)]
    most_launches = TIMES * min(step["launches"] + step["graphs"] for step in steps) + MORE
    prompted = [step for step in steps if step["launches"] + step["graphs"] > most_launches]
    plain = [step for step in steps if step["launches"] + step["graphs"] <= most_launches]
    found = {
        "steps": len(plain),
        "milliseconds": _medians(plain),
        "eager_launches": median(step["launches"] for step in plain),
        "longest": {part: _longest([step["names"][part] for step in plain]) for part in PARTS[:3]},
    }
    if prompted:
        found["with_prompts"] = {"steps": len(prompted), "milliseconds": _medians(prompted)}
    return found


def _medians(steps: list[dict[str, Any]]) -> dict[str, float]:
    return {part: round(median(step[part] for step in steps) / 1e3, 3) for part in PARTS}


def _step(
    work: list[dict[str, Any]],
    graphs: dict[int, list[dict[str, Any]]],
    verify: set[int],
    start: float,
    end: float,
) -> dict[str, Any]:
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    names: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    launched = set()
    for event in work:
        if start <= event["ts"] < end:
            key = event["args"].get("correlation")
            part = "eager" if key not in graphs else "other graphs"
            part = "verify graph" if key in verify else part
            launched |= {key} & graphs.keys()
            spans[part].append((event["ts"], min(end, event["ts"] + event["dur"])))
            names[part][short(event["name"])] += event["dur"]
    found: dict[str, Any] = {part: covered(spans[part]) for part in spans}
    for part in ("verify graph", "other graphs", "eager"):
        found.setdefault(part, 0.0)
    found["step"] = end - start
    found["idle"] = found["step"] - covered(span for part in spans.values() for span in part)
    return {**found, "launches": len(spans["eager"]), "graphs": len(launched), "names": names}


def _longest(steps: list[dict[str, float]]) -> dict[str, float]:
    every = {name for step in steps for name in step}
    times = {name: median(step.get(name, 0.0) for step in steps) / 1e3 for name in every}
    ranked = sorted(times.items(), key=lambda item: -item[1])[:NAMES_SHOWN]
    return {name: round(time, 4) for name, time in ranked}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(json.dumps(timeline(load(Path(sys.argv[1]))), indent=1))


if __name__ == "__main__":
    main()
