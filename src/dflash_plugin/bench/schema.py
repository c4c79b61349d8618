"""The file that a measurement writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dflash_plugin.bench.output import partial_path
from dflash_plugin.errors import DFlashError
from dflash_plugin.monitor.redact import without_credentials

SCHEMA_VERSION: Literal[1] = 1
Role = Literal["measured", "baseline"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Settings(_Model):
    """What was asked for.

    Attributes:
        data: files or names of prompt sets.
        limit: prompts of each set; None for all.
        concurrency: requests in flight of each level.
        repeats: timed runs of each cell and server.
        warmup: whether a round of requests runs before each cell.
        temperature, max_tokens, seed, ignore_eos: of every request.
        thinking: ``enable_thinking`` of the chat template; None leaves it alone.
    """

    data: list[str]
    limit: int | None = None
    concurrency: list[int]
    repeats: int = 3
    warmup: bool = True
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    ignore_eos: bool = False
    thinking: bool | None = None


class Server(_Model):
    """One of the measured servers.

    Attributes:
        role: measured, or the baseline that ran in turns with it.
        engine: vllm, sglang or transformers.
        version: of the engine.
        plugin_version: of this project there; None where the server does not tell or has none.
        url: without credentials; None for the Transformers engine.
        model: target.
        speculative: whether it drafts, by whatever method; None where it does not tell.
        num_drafts: drafts of a verify pass.
        gpu: name, or None.
        gpus: how many it runs on.
        flags: how it was started; credentials, and settings that are off, are left out.
        notes: what could not be found out, and how to.
    """

    role: Role
    engine: Literal["vllm", "sglang", "transformers"]
    version: str | None = None
    plugin_version: str | None = None
    url: str | None = None
    model: str
    speculative: bool | None
    num_drafts: int | None = None
    gpu: str | None = None
    gpus: int = 1
    flags: dict[str, Any] | str | None = None
    notes: list[str] = []

    def describe_further(self, gpu: str | None, gpus: int | None, command: str | None) -> None:
        """Take what the user says where it is said."""
        self.gpu = gpu or self.gpu
        self.gpus = gpus or self.gpus
        if command is not None:
            self.flags = without_credentials(command)
            self.notes = [note for note in self.notes if not note.startswith("flags")]


class Percentiles(_Model):
    """Of a number of milliseconds."""

    p50: float
    p90: float
    p99: float


class Tau(_Model):
    """The acceptance length by three averages; ``dflash_plugin.bench.metrics`` defines them.

    Attributes:
        mean_per_request: every request weighs the same.
        pooled: tokens over passes of all requests; every pass weighs the same.
        token_weighted: every request weighs as its tokens.
        sources: for each of the three where it comes from or, where it is None, why.
    """

    mean_per_request: float | None = None
    pooled: float | None = None
    token_weighted: float | None = None
    sources: dict[str, str]


class PositionRates(_Model):
    """Accepted drafts by position.

    Attributes:
        unconditional: share of verify passes that accepted the draft at position 1..K, which takes
            all before it.
        conditional: the same among passes that accepted all before it; None where there was none.
        source: where the counts come from, or why there are none.
    """

    unconditional: list[float] | None = None
    conditional: list[float | None] | None = None
    source: str


class CountCheck(_Model):
    """A count of the client beside the server's own.

    Attributes:
        what: tokens, passes.
        client: counted from the answers.
        server: by which the server's counter grew.
        agrees: whether they are equal; None if one is missing.
        note: the server's counter, or what is missing.
    """

    what: Literal["tokens", "passes"]
    client: int | None
    server: int | None
    agrees: bool | None
    note: str


class Repeat(_Model):
    """One timed run of a cell.

    Attributes:
        seconds: from the first request to the last answer, or to the interruption.
        requests: finished ones, two a prompt of two turns; fewer than in the other runs where this
            one was interrupted.
        tokens: output tokens.
        tokens_per_second: the first over the second.
        client_busy: share of the time for which this client's process computed; near 1 it is the
            client that was measured. None where client and engine are one process.
        checks: of the counts.
    """

    seconds: float
    requests: int
    tokens: int
    tokens_per_second: float
    client_busy: float | None
    checks: list[CountCheck]


class Cell(_Model):
    """A prompt set at one concurrency on one server.

    Attributes:
        role: which server.
        set_name: prompt set.
        concurrency: requests in flight.
        repeats: timed runs; fewer than asked for where the measurement was stopped.
        tokens_per_second: median of the runs; one that was interrupted counts only where it is the
            only one.
        per_user: tokens/s that one user sees once the answer has begun: 1 / median TPOT.
        ttft_ms: from sending a request to its first token.
        tpot_ms: mean time of a token after the first chunk, per request.
        passes: verify passes of all runs, or None.
        tau: acceptance length.
        acceptance: by position.
    """

    role: Role
    set_name: str
    concurrency: int
    repeats: list[Repeat]
    tokens_per_second: float
    per_user: float | None
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    passes: int | None
    tau: Tau
    acceptance: PositionRates


class KeptPass(_Model):
    """Tokens of one pass, as text.

    Attributes:
        accepted: drafts that the target accepted.
        bonus: the target's own token after them; None where a stop or the limit cut it off.
        rejected: drafts that were not; None where the server does not tell.
    """

    accepted: list[str]
    bonus: str | None
    rejected: list[str] | None = None


class KeptText(_Model):
    """An answer and the passes that wrote it.

    Attributes:
        role, set_name, prompt_id, turn, concurrency: which.
        prompt: its last user turn.
        first: text of the prompt's own pass.
        passes: verify passes in order.
        exact: whether passes are known or taken from streamed chunks that may hold several.
        note: how passes were told apart.
    """

    role: Role
    set_name: str
    prompt_id: str
    turn: int
    concurrency: int
    prompt: str
    first: list[str]
    passes: list[KeptPass]
    exact: bool
    note: str


class Record(_Model):
    """A measurement.

    Attributes:
        version: of this schema.
        label: what a report calls it.
        created: when it began, ISO 8601 in UTC.
        command: as a user would type it again, without credentials.
        plugin_version: of the client.
        git_commit: of the client's checkout, with "+" if it was changed; None elsewhere.
        client: the machine that asked.
        complete: False while it runs, and if it was stopped.
        settings: what was asked for.
        servers: what was measured.
        cells: results.
        texts: answers that were kept.
    """

    version: Literal[1] = SCHEMA_VERSION
    label: str
    created: str
    command: str
    plugin_version: str
    git_commit: str | None
    client: str
    complete: bool = False
    settings: Settings
    servers: list[Server]
    cells: list[Cell] = []
    texts: list[KeptText] = []

    def server(self, role: Role) -> Server | None:
        """The server of a role."""
        return next((server for server in self.servers if server.role == role), None)

    def cell(self, role: Role, set_name: str, concurrency: int) -> Cell | None:
        """What was measured there."""
        wanted = (role, set_name, concurrency)
        found = (c for c in self.cells if (c.role, c.set_name, c.concurrency) == wanted)
        return next(found, None)

    def write(self, path: Path) -> None:
        """Replace the file by this record, in one step.

        Raises:
            DFlashError: it cannot be written.
        """
        part = partial_path(path)
        try:
            part.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise DFlashError(
                f"{str(path)!r} cannot be written ({error}): give another --output"
            ) from error


def read_record(path: Path) -> Record:
    """Load a result.

    Raises:
        DFlashError: there is none, or it is of another version.
    """
    if not path.is_file():
        raise DFlashError(
            f"{str(path)!r} is not a file: give a result of `dflash-plugin bench --output`"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.get("version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise DFlashError(
                f"{str(path)!r} has version {version!r}, this program reads {SCHEMA_VERSION}: "
                "measure again, or use the program that wrote it"
            )
        return Record.model_validate(data)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DFlashError(
            f"{str(path)!r} is not a result ({error}): give what `dflash-plugin bench --output` "
            "wrote"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DFlashError(
            f"{str(path)!r} is damaged at {where} ({first['msg']}): measure again"
        ) from error
