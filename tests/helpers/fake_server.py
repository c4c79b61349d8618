"""A server in this process that speaks vLLM's or SGLang's HTTP, and answers by plan."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DRAFTS = 5
# Seconds between two chunks of a stream.
PAUSE = 0.002


@dataclass
class Fake:
    """What it answers.

    Attributes:
        kind: vllm or sglang.
        plans: by the last user turn, how many drafts each verify pass accepts.
        speculative: whether it drafts.
        method: what the engine calls it; only dflash has the plugin.
        exported: whether vLLM's /metrics has counters.
        finds_nothing: a pass that accepts nothing had no drafts, as n-gram search has it.
        settings: more entries of SGLang's /server_info.
        merged: a chunk holds two passes.
        miscounted: by how much its counter of tokens is too high a request.
        token: text of a token.
        on_request: called with the number of the request.
        max_active: requests that were under way at once.
        error: status and text of every answer.
        api_key: what requests must bring, but for /metrics, as SGLang requires it.
        dies_at: number of the request at which the server goes away without an answer.
        told: what it tells of itself besides: vLLM's further lines of metrics, by name and labels,
            with their values; the plugin's entries in SGLang's /server_info.
    """

    kind: str
    plans: dict[str, Sequence[int]] = field(default_factory=dict)
    speculative: bool = True
    method: str = "dflash"
    exported: bool = True
    finds_nothing: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    merged: bool = False
    miscounted: int = 0
    token: Callable[[int], str] = lambda number: f" t{number}"
    on_request: Callable[[int], None] = lambda number: None
    error: tuple[int, str] | None = None
    api_key: str | None = None
    dies_at: int | None = None
    told: dict[str, Any] = field(default_factory=dict)
    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    passes: int = 0
    accepted: list[int] = field(default_factory=lambda: [0] * DRAFTS)
    started: int = 0
    active: int = 0
    max_active: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def plan(self, messages: list[dict[str, str]]) -> list[int]:
        """Accepted drafts of each pass; none without a drafter."""
        plan = list(self.plans.get(messages[-1]["content"], (1,)))
        return plan if self.speculative else [0] * sum(accepted + 1 for accepted in plan)

    def begin(self) -> None:
        with self.lock:
            self.started += 1
            self.active += 1
            self.max_active = max(self.max_active, self.active)

    def count(self, plan: list[int]) -> None:
        """Add what a request wrote, which ends it."""
        with self.lock:
            self._count(plan)
            self.active -= 1

    def _count(self, plan: list[int]) -> None:
        self.tokens += 1 + sum(accepted + 1 for accepted in plan) + self.miscounted
        if self.speculative:
            self.passes += sum(accepted > 0 or not self.finds_nothing for accepted in plan)
            for accepted in plan:
                for position in range(accepted):
                    self.accepted[position] += 1

    def chunks(self, plan: list[int]) -> list[int]:
        """Tokens of each streamed chunk."""
        sizes = [accepted + 1 for accepted in plan]
        if self.merged:
            sizes = [sum(sizes[n : n + 2]) for n in range(0, len(sizes), 2)]
        return [1, *sizes]

    def metrics(self) -> str:
        label = 'engine="0",model_name="fake"'
        if not self.exported:
            return "python_gc_objects_collected_total 1.0\n"
        lines = ["# HELP a comment", f"vllm:generation_tokens_total{{{label}}} {self.tokens}.0"]
        if self.speculative:
            if self.method == "dflash":
                lines.append('dflash:drafter_info{block_size="6",plugin="9.9"} 1.0')
            lines += [f"{name} {value}" for name, value in self.told.items()]
            lines.append(f"vllm:spec_decode_num_drafts_total{{{label}}} {float(self.passes)}")
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="{k}"}} {n}'
                for k, n in enumerate(self.accepted)
            ]
        return "\n".join(lines) + "\n"

    def server_info(self) -> dict[str, Any]:
        state = {"dflash_plugin": {"version": "9.9", "verify_passes": self.passes, **self.told}}
        return {
            "version": "0.5.20",
            "model_path": "org/fake",
            "api_key": "hidden",
            "tp_size": 2,
            "speculative_algorithm": self.method.upper() if self.speculative else None,
            "speculative_num_draft_tokens": DRAFTS + 1 if self.speculative else None,
            "internal_states": [state if self.speculative and self.method == "dflash" else {}],
            **self.settings,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def log_message(self, *_: Any) -> None:
        pass

    def _admitted(self) -> bool:
        """Whether the request brings the key and the server is there; else it is answered."""
        fake = self.fake
        if fake.dies_at is not None and fake.started >= fake.dies_at:
            self.close_connection = True
            return False
        wanted = f"Bearer {fake.api_key}"
        if fake.api_key and self.headers["Authorization"] != wanted and self.path != "/metrics":
            self._answer(401, {"error": "Unauthorized"})
            return False
        return True

    def do_GET(self) -> None:
        fake = self.fake
        if not self._admitted():
            return
        answers: dict[str, Any] = {
            "/v1/models": {"data": [{"id": "fake", "owned_by": fake.kind}]},
            "/version": {"version": "0.32.0"},
        }
        if fake.kind == "vllm":
            answers["/metrics"] = fake.metrics()
        else:
            answers["/server_info"] = fake.server_info()
        if self.path in answers:
            self._answer(200, answers[self.path])
        else:
            self._answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._admitted():
            return None
        if fake.error:
            return self._answer(fake.error[0], {"error": fake.error[1]})
        if self.path == "/detokenize" and fake.kind == "vllm":
            return self._answer(200, {"prompt": "".join(map(fake.token, body["tokens"]))})
        if self.path == "/detokenize":
            texts = ["".join(map(fake.token, ids)) for ids in body["tokens"]]
            return self._answer(200, {"text": texts})
        if self.path == "/tokenize":
            fake.seen.append(body)
            # The ids lead back to the messages.
            return self._answer(200, {"tokens": [len(fake.seen) - 1]})
        fake.begin()
        fake.on_request(len(fake.seen))
        if fake.kind == "vllm":
            fake.seen.append(body)
            return self._stream(self._chat(fake.plan(body["messages"])))
        messages = fake.seen[body["input_ids"][0]]["messages"]
        return self._stream(self._generate(fake.plan(messages)))

    def _chat(self, plan: list[int]) -> Iterator[dict[str, Any]]:
        yield {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        at = 0
        for size in self.fake.chunks(plan):
            ids = list(range(at, at + size))
            text = "".join(map(self.fake.token, ids))
            yield {"choices": [{"delta": {"content": text}, "token_ids": ids}]}
            at += size
        self.fake.count(plan)
        yield {"choices": [], "usage": {"completion_tokens": at}}

    def _generate(self, plan: list[int]) -> Iterator[dict[str, Any]]:
        at, sizes = 0, self.fake.chunks(plan)
        for number, size in enumerate(sizes):
            at += size
            meta: dict[str, Any] = {"completion_tokens": at}
            if number == len(sizes) - 1 and self.fake.speculative and plan:
                meta["spec_verify_ct"] = len(plan)
                meta["spec_correct_drafts_histogram"] = [
                    plan.count(accepted) for accepted in range(max(plan) + 1)
                ]
            text = "".join(map(self.fake.token, range(at)))
            yield {"text": text, "output_ids": list(range(at)), "meta_info": meta}
        self.fake.count(plan)

    def _stream(self, chunks: Iterator[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            self.wfile.flush()
            # A client tells chunks apart by when they come.
            time.sleep(PAUSE)
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _answer(self, status: int, value: Any) -> None:
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(kind: str, **answers: Any) -> Iterator[Fake]:
    """A fake server until the block is left."""
    fake = Fake(kind, **answers)
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
