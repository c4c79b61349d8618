"""Reading what a server exports at ``/metrics``."""

from __future__ import annotations

import re
from typing import NamedTuple

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Sample(NamedTuple):
    """A line of the text format."""

    name: str
    labels: dict[str, str]
    value: float


def parse(text: str) -> list[Sample]:
    """Samples of the Prometheus text format; comments and broken lines are skipped."""
    samples = []
    for line in text.splitlines():
        found = None if line.startswith("#") else _SAMPLE.fullmatch(line.strip())
        if found:
            try:
                value = float(found[3])
            except ValueError:
                continue
            samples.append(Sample(found[1], dict(_LABEL.findall(found[2] or "")), value))
    return samples


def total(samples: list[Sample], name: str) -> int | None:
    """Sum of a counter over its labels (engines of a server, models); None if there is none."""
    values = [sample.value for sample in samples if sample.name == name]
    return round(sum(values)) if values else None


def by_position(samples: list[Sample], name: str) -> tuple[int, ...] | None:
    """A counter with the label ``position``, summed over the others; None if there is none."""
    counts: dict[int, float] = {}
    for sample in samples:
        if sample.name == name and sample.labels.get("position", "").isdigit():
            position = int(sample.labels["position"])
            counts[position] = counts.get(position, 0.0) + sample.value
    if not counts:
        return None
    return tuple(round(counts.get(k, 0.0)) for k in range(max(counts) + 1))


def label(samples: list[Sample], name: str, key: str) -> str | None:
    """A label of the first sample of that name."""
    found = (sample.labels.get(key) for sample in samples if sample.name == name)
    return next(found, None)
