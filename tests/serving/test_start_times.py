"""One line of the log says how long the parts of a start took."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dflash_plugin.serving import start_times
from dflash_plugin.serving.start_times import StartTimes


def test_the_times_of_a_part_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.5, 2.0, 4.0, 10.0, 10.25])
    monkeypatch.setattr(start_times, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    times = StartTimes()
    for name in ("draft passes captured", "steps timed", "draft passes captured"):
        with times.part(name):
            pass
    assert str(times) == (
        "seconds of the plugin's parts of the start: draft passes captured 1.8, steps timed 2.0; "
        "0 kernels compiled and 0 loaded in 0.0 s"
    )


def test_only_our_kernels_are_counted_and_another_listener_hears_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    knobs = pytest.importorskip("triton.knobs")
    heard: list[str] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **event: heard.append(event["name"]))
    times = StartTimes()
    times.compilations.watch()
    events = [
        ("dflash_plugin.kernels.accept", False),
        ("dflash_plugin.kernels.accept", True),
        ("vllm.kernels", False),
    ]
    for module, cached in events:
        kernel = SimpleNamespace(__module__=module)
        knobs.compilation.listener(
            name=module,
            src=SimpleNamespace(fn=kernel),
            times=SimpleNamespace(total=2_000_000),
            cache_hit=cached,
        )
    assert heard == [module for module, _ in events]
    assert str(times).endswith("; 1 kernels compiled and 1 loaded in 4.0 s")
