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

from dflash_plugin.bench.http_endpoint import HttpEndpoint, settle
from dflash_plugin.bench.measurements import Counters, Endpoint, RequestTrace, turns_of
from dflash_plugin.bench.metrics import check_counts, make_cell
from dflash_plugin.bench.redact import without_credentials
from dflash_plugin.bench.schema import Cell, KeptText, Record, Repeat, Role, Server, Settings
from dflash_plugin.bench.sglang_server import SglangServer
from dflash_plugin.bench.vllm_server import VllmServer
from dflash_plugin.errors import DFlashError
from dflash_plugin.prompts import Prompt

Progress = Callable[[str, int, int], None]


def connect(url: str, api_key: str | None = None) -> HttpEndpoint:
    """Find out what serves there.

    Raises:
        DFlashError: nothing does, or neither vLLM nor SGLang.
    """
    url = url if "://" in url else f"http://{url}"
    shown = without_credentials(url)
    probe = VllmServer(url, api_key)
    owners = {
        model.get("owned_by") for model in (probe.get_json("/v1/models") or {}).get("data", [])
    }
    if "vllm" in owners:
        return probe
    sglang = SglangServer(url, api_key)
    if "sglang" in owners or "internal_states" in (sglang.get_json("/server_info") or {}):
        return sglang
    raise DFlashError(
        f"{shown} answers, but /v1/models names neither vllm nor sglang as owner: give the root "
        "URL of `vllm serve` or `sglang.launch_server`"
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
    most = max(settings.concurrency)
    for name, prompts in sets.items():
        if len(prompts) < most:
            raise DFlashError(
                f"--concurrency {most} needs as many prompts, {name} has {len(prompts)}: raise "
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
    """Measure every cell and write the record after each run.

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
                    _run(endpoint, prompts[:level], level, settings, what, progress)
            gathered = {role: _Gathered(endpoint) for role, endpoint in endpoints.items()}
            for number in range(settings.repeats):
                for role, endpoint in endpoints.items():
                    what = f"{set_name} ×{level} {role}, run {number + 1}/{settings.repeats}"
                    seen = gathered[role].run(prompts, level, settings, what, progress)
                    _put(record.cells, gathered[role].cell(role, set_name, level))
                    if number == 0 and level == settings.concurrency[0]:
                        record.texts += _keep(endpoint, seen[:keep_text], role, set_name, level)
                    if output is not None:
                        record.write(output)
    record.complete = True
    if output is not None:
        record.write(output)


class _Gathered:
    """The runs of one cell on one server so far."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.repeats: list[Repeat] = []
        self.observations: list[RequestTrace] = []
        self.grown: list[Counters] = []
        self.missing: str | None = None

    def run(
        self,
        prompts: list[Prompt],
        level: int,
        settings: Settings,
        what: str,
        progress: Progress,
    ) -> list[RequestTrace]:
        endpoint = self.endpoint
        before, busy = endpoint.counters(), time.process_time()
        observations, seconds = _run(endpoint, prompts, level, settings, what, progress)
        busy = time.process_time() - busy
        tokens = sum(observation.tokens for observation in observations)
        grown = settle(endpoint, before, tokens).since(before)
        self.missing = endpoint.fill_passes(observations, grown) or self.missing
        self.repeats.append(
            Repeat(
                seconds=round(seconds, 4),
                requests=len(observations),
                tokens=tokens,
                tokens_per_second=round(tokens / seconds, 2),
                client_busy=round(busy / seconds, 3) if endpoint.busy_client else None,
                checks=check_counts(observations, grown),
            )
        )
        self.observations += observations
        self.grown.append(grown)
        return observations

    def cell(self, role: Role, set_name: str, level: int) -> Cell:
        return make_cell(
            role,
            set_name,
            level,
            self.repeats,
            self.observations,
            self.grown,
            self.endpoint.by_request,
            self.missing,
        )


def _run(
    endpoint: Endpoint,
    prompts: list[Prompt],
    level: int,
    settings: Settings,
    what: str,
    progress: Progress,
) -> tuple[list[RequestTrace], float]:
    total, done = sum(len(turns_of(prompt)) for prompt in prompts), 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    progress(what, 0, total)
    return endpoint.run(prompts, level, settings, count)


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
