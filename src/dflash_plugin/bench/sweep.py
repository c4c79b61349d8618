"""The measurement: prompt sets by concurrency by repeats, servers in turns."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from dflash_plugin.bench.http_endpoint import HttpEndpoint
from dflash_plugin.bench.measurements import Endpoint, RequestTrace, turns_of
from dflash_plugin.bench.metrics import INTERRUPTED, Runs, check_counts, make_cell
from dflash_plugin.bench.schema import (
    Cell,
    CountCheck,
    KeptText,
    Record,
    Repeat,
    Role,
    Server,
    Settings,
)
from dflash_plugin.bench.sglang_server import SglangServer
from dflash_plugin.bench.vllm_server import VllmServer
from dflash_plugin.errors import DFlashError
from dflash_plugin.monitor.client import ANSWER_TIMEOUT, ServerClient, settle
from dflash_plugin.monitor.redact import without_credentials
from dflash_plugin.prompts import Prompt

Progress = Callable[[str, int, int], None]


def connect(url: str, api_key: str | None = None) -> HttpEndpoint:
    """Find out what serves there.

    Raises:
        DFlashError: nothing does, or neither vLLM nor SGLang.
    """
    client = ServerClient(url, api_key, ANSWER_TIMEOUT)
    models = client.get_json("/v1/models") or {}
    owners = {model.get("owned_by") for model in models.get("data", [])}
    if "vllm" in owners:
        return VllmServer(client)
    if "sglang" in owners or "internal_states" in (client.info() or {}):
        return SglangServer(client)
    raise DFlashError(
        f"{client.display_url} answers, but /v1/models names neither vllm nor sglang as owner: "
        "give the root URL of `vllm serve` or `sglang.launch_server`"
    )


def check_settings(settings: Settings, sets: Mapping[str, list[Prompt]]) -> None:
    """Refuse what cannot be measured.

    Raises:
        DFlashError: names the value.
    """
    for name, value in (("repeats", settings.repeats), ("max-tokens", settings.max_tokens)):
        if value < 1:
            raise DFlashError(f"--{name} is {value}: give at least 1")
    if settings.temperature < 0:
        raise DFlashError(f"--temperature is {settings.temperature}: give 0 (greedy) or more")
    if not settings.concurrency or min(settings.concurrency) < 1:
        raise DFlashError(f"--concurrency is {settings.concurrency}: give numbers from 1 on")
    requests = max(settings.concurrency)
    for name, prompts in sets.items():
        if len(prompts) < requests:
            raise DFlashError(
                f"--concurrency {requests} needs as many prompts, {name} has {len(prompts)}: raise "
                "--limit, give a longer set, or lower --concurrency"
            )


def begin(
    settings: Settings, endpoints: Mapping[Role, Endpoint], label: str | None, *, drafter: bool
) -> Record:
    """A record without results.

    Args:
        settings: what is asked for.
        endpoints: what is measured.
        label: what a report calls it; the engine's name by default.
        drafter: whether the measured one must have one.

    Raises:
        DFlashError: it has none.
    """
    servers = [endpoint.describe(role) for role, endpoint in endpoints.items()]
    ours = servers[0]
    if drafter and not ours.speculative:
        raise DFlashError(no_drafter(ours))
    for server in servers:
        if server.url and server.gpu is None and is_local(server.url):
            server.gpu = local_gpu()
    return Record(
        label=label or f"{ours.engine} {ours.version}",
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command_line(sys.argv[1:]),
        plugin_version=version("dflash-plugin"),
        git_commit=git_commit(Path(__file__).parent),
        client=f"{platform.node()}, Python {platform.python_version()}",
        settings=settings,
        servers=servers,
    )


def no_drafter(server: Server) -> str:
    """What to do about a server that does not speculate."""
    if server.engine == "vllm":
        missing = "/metrics has no vllm:spec_decode_num_drafts_total"
        start = "vllm serve with --speculative-method dflash and without --disable-log-stats"
    else:
        missing = "/server_info has no speculative_algorithm"
        start = "SGLang with --speculative-algorithm DFLASH"
    return (
        f"{server.url} has no speculative metrics ({missing}): start {start}, or give --no-drafter "
        "to measure speed alone"
    )


def sweep(
    record: Record,
    endpoints: Mapping[Role, Endpoint],
    sets: Mapping[str, list[Prompt]],
    output: Path | None,
    keep_text: int,
    progress: Progress,
) -> None:
    """Measure every cell and write the record after each run, also after one that was interrupted.

    An interrupted run (Ctrl-C, a server that dies) keeps its finished requests; the record's
    ``complete`` stays False.

    Args:
        record: takes the cells.
        endpoints: in the order in which they take turns.
        sets: prompts by name.
        output: a JSON file, or None.
        keep_text: answers of each set and server to keep by pass, of the lowest concurrency.
        progress: called with what runs, requests done and requests in all.
    """
    settings = record.settings
    for set_name, prompts in sets.items():
        for level in settings.concurrency:
            if settings.warmup:
                for role, endpoint in endpoints.items():
                    what = f"{set_name} ×{level} {role}, warm-up"
                    _run(endpoint, prompts[:level], level, settings, what, progress, [])
            runs = {role: Runs() for role in endpoints}
            for number in range(settings.repeats):
                for role, endpoint in endpoints.items():
                    what = f"{set_name} ×{level} {role}, run {number + 1}/{settings.repeats}"
                    try:
                        seen = _add_run(
                            runs[role], endpoint, prompts, level, settings, what, progress
                        )
                        if number == 0 and level == settings.concurrency[0]:
                            record.texts += _keep(endpoint, seen[:keep_text], role, set_name, level)
                    finally:
                        if runs[role].repeats:
                            cell = make_cell(role, set_name, level, runs[role], endpoint.by_request)
                            _put(record.cells, cell)
                        if output is not None and record.cells:
                            record.write(output)
    record.complete = True
    if output is not None:
        record.write(output)


def _add_run(
    runs: Runs,
    endpoint: Endpoint,
    prompts: list[Prompt],
    level: int,
    settings: Settings,
    what: str,
    progress: Progress,
) -> list[RequestTrace]:
    """Run all prompts once and add the run; one that is interrupted adds its finished requests."""
    done: list[RequestTrace] = []
    busy_began, began = time.process_time(), time.perf_counter()
    seconds = busy = None
    try:
        before = endpoint.counters()
        busy_began, began = time.process_time(), time.perf_counter()
        traces, seconds = _run(endpoint, prompts, level, settings, what, progress, done)
        busy = time.process_time() - busy_began
        tokens = sum(trace.tokens for trace in traces)
        after = settle(endpoint.counters, lambda now: _holds(now.since(before).tokens, tokens))
    except BaseException:
        if done:
            # Requests that all finished took no longer because their counts never came.
            if seconds is None or busy is None:
                seconds, busy = time.perf_counter() - began, time.process_time() - busy_began
            _add_interrupted(runs, endpoint, done, seconds, busy)
        raise
    increase = after.since(before)
    runs.missing = endpoint.fill_passes(traces, increase) or runs.missing
    checks = check_counts(traces, increase)
    runs.repeats.append(_repeat(endpoint, traces, seconds, busy, checks))
    runs.requests += traces
    runs.counted += traces
    runs.increases.append(increase)
    runs.whole += 1
    return traces


def _holds(counted: int | None, tokens: int) -> bool:
    return counted is None or counted >= tokens


def _add_interrupted(
    runs: Runs, endpoint: Endpoint, done: list[RequestTrace], seconds: float, busy: float
) -> None:
    """Add the finished requests of a run; the server is asked for nothing, it may be gone."""
    endpoint.fill_passes(done, INTERRUPTED)
    runs.repeats.append(_repeat(endpoint, done, seconds, busy, check_counts(done, INTERRUPTED)))
    runs.requests += done
    # Beside requests whose accepted drafts are known, those with passes alone would hide them.
    by_position = any(trace.accepted is not None for trace in runs.counted)
    runs.counted += [
        trace
        for trace in done
        if trace.passes is not None and (trace.accepted is not None or not by_position)
    ]


def _repeat(
    endpoint: Endpoint,
    traces: list[RequestTrace],
    seconds: float,
    busy: float,
    checks: list[CountCheck],
) -> Repeat:
    tokens = sum(trace.tokens for trace in traces)
    return Repeat(
        seconds=round(seconds, 4),
        requests=len(traces),
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 2),
        client_busy=round(busy / seconds, 3) if endpoint.busy_client else None,
        checks=checks,
    )


def _run(
    endpoint: Endpoint,
    prompts: list[Prompt],
    level: int,
    settings: Settings,
    what: str,
    progress: Progress,
    done: list[RequestTrace],
) -> tuple[list[RequestTrace], float]:
    """Run all prompts once; ``done`` takes the requests as they finish."""
    total = sum(len(turns_of(prompt)) for prompt in prompts)

    def add(trace: RequestTrace) -> None:
        done.append(trace)
        progress(what, len(done), total)

    progress(what, 0, total)
    return endpoint.run(prompts, level, settings, add)


def _put(cells: list[Cell], cell: Cell) -> None:
    """Add a cell, or replace the same one of fewer runs."""
    key = cell.role, cell.set_name, cell.concurrency
    cells[:] = [c for c in cells if (c.role, c.set_name, c.concurrency) != key]
    cells.append(cell)


def _keep(
    endpoint: Endpoint, observations: list[RequestTrace], role: Role, set_name: str, level: int
) -> list[KeptText]:
    texts = []
    for observation in observations:
        found = endpoint.passes_of(observation)
        if found is not None:
            texts.append(
                KeptText(
                    role=role,
                    set_name=set_name,
                    prompt_id=observation.prompt_id,
                    turn=observation.turn,
                    concurrency=level,
                    prompt=observation.prompt,
                    **found._asdict(),
                )
            )
    return texts


def is_local(url: str) -> bool:
    """Whether a server runs on this machine."""
    host = url.split("://", 1)[1].rsplit(":", 1)[0].split("/")[0]
    return host in ("localhost", "127.0.0.1", "[::1]", "0.0.0.0")


def local_gpu() -> str | None:
    """This machine's first GPU, as nvidia-smi names it."""
    return _first_line("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")


def git_commit(directory: Path) -> str | None:
    """The commit of a checkout, with "+" where files were changed; None outside of one."""
    commit = _first_line("git", "-C", str(directory), "rev-parse", "HEAD")
    # An environment may stand inside a checkout of something else.
    known = _first_line("git", "-C", str(directory), "ls-files", Path(__file__).name)
    if commit is None or known is None:
        return None
    changed = _first_line("git", "-C", str(directory), "status", "--porcelain", "-uno")
    return commit + ("+" if changed else "")


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if lines else None


def command_line(arguments: list[str]) -> str:
    """What was typed, without credentials."""
    return "dflash-plugin " + without_credentials(shlex.join(arguments))
