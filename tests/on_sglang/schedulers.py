"""Schedulers without a server, one after the other, each rank in a fork of one warm process.

Imports of SGLang take longer than a tiny model's engine. Reads lines of JSON, answers with lines.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from tests.helpers.device import ON_GPU
from tests.on_sglang.sglang_server import ENVIRONMENT

SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,
    "max_total_tokens": 4096,
    "max_running_requests": 32,
    # The same draws in every run.
    "random_seed": 1,
    "speculative_algorithm": "DFLASH",
}
# On a GPU that engines share: no more memory than the tokens need, and few captured passes.
GPU_SETTINGS = {
    **SETTINGS,
    "device": "cuda",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "skip_tokenizer_init": True,
    "disable_cuda_graph": False,
    "disable_prefill_cuda_graph": True,
    "cuda_graph_bs_decode": [1, 2, 4],
    # Of what is free when the engine starts, which the number of tokens limits.
    "mem_fraction_static": 0.9,
    "max_total_tokens": 16384,
    "max_running_requests": 4,
}


# What a job asks for where it does not say.
JOB: dict[str, Any] = {
    "environment": {},
    "widths": None,
    "any_back_end": False,
    "steps": [],
    "adapters": [],
    "together": False,
    "late": 0,
    "batches": None,
}


def settings_of(
    target: Path, drafter: Path | None, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Arguments of ``ServerArgs`` for directories of a target and a drafter, or for none."""
    settings = {**(GPU_SETTINGS if ON_GPU else SETTINGS), "model_path": str(target)}
    settings |= changes or {}
    if drafter is None:
        settings.pop("speculative_algorithm")
        return settings
    return {**settings, "speculative_draft_model_path": str(drafter)}


class Schedulers:
    """The warm process.

    Args:
        log: takes what it prints.
        interpreted: run the kernels, interpreted.
    """

    def __init__(self, log: Path, *, interpreted: bool = False) -> None:
        self.log = log
        environment = {"TRITON_INTERPRET": "1"} if interpreted else {}
        self.process = self.begin({**ENVIRONMENT, **environment})

    def begin(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        """Start the process with more of an environment."""
        return subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )

    def run(
        self,
        target: Path,
        drafter: Path,
        prompts: list[list[int]],
        copies: int = 1,
        environment: dict[str, str] | None = None,
        settings: dict[str, Any] | None = None,
        widths: list[int | list[int]] | Literal["chosen"] | None = None,
        any_back_end: bool = False,
        steps: list[dict[str, Any]] | None = None,
        adapters: list[Path | None] | None = None,
        together: bool = False,
        late: int = 0,
        **params: Any,
    ) -> dict[str, Any]:
        """Start a scheduler, run each prompt ``copies`` times and end it.

        Args:
            target, drafter: directories.
            prompts: token ids; copies of one run together, the prompts one after the other.
            copies: of each.
            environment: of the scheduler.
            settings: of ``ServerArgs``.
            widths: rows that the passes verify, in turns, each alone or with the rows of the block
                that is drafted, or "chosen" by the policy and a clock of each rank's own that runs
                by chance; whole blocks where there are none.
            any_back_end: run the target under the attention of the settings, though SGLang has it
                for its architecture under others alone, none of which this machine may have.
            steps: changes of weights, see ``weight_steps``; the prompts run again after each.
            together: hand all prompts over at once, one copy of each; "texts" and "blocks" are then
                one list of all, and "from_host" the tokens of each that the host's cache had.
            adapters: directory of each copy's LoRA adapter, None for the target alone.
            late: decode passes, with ``widths``, behind which one more copy arrives; 0 for all at
                once.
            params: of ``SamplingParams``.

        Returns:
            Per prompt, "texts" of its copies and the "blocks" of its first; "counts" of what ran
            through kernels; with ``widths``, of each pass that was "cut" to them the width, the
            anchors' positions and the drafts that were verified, and what was "learnt". Other
            ranks' answers are "others". With ``steps``, "after" each of them what was "told", the
            texts and the blocks.
        """
        paths = sorted({str(path) for path in adapters or [] if path is not None})
        lora = {"lora_paths": paths, "lora_backend": "torch_native"} if paths else {}
        answer = self.ask(
            {
                "settings": settings_of(target, drafter, {**lora, **(settings or {})}),
                "adapters": [None if path is None else str(path) for path in adapters or []],
                "environment": {
                    **({"DFLASH_PLUGIN_ADAPTIVE_VERIFICATION": "1"} if widths else {}),
                    **(environment or {}),
                },
                "widths": widths,
                "any_back_end": any_back_end,
                "steps": steps or [],
                "together": together,
                "late": late,
                "prompts": prompts,
                "copies": copies,
                "params": params,
            }
        )
        assert "error" not in answer, f"{answer['error']}\n{self.log.read_text()[-4000:]}"
        return answer

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run a job; what ended it is the answer's "error"."""
        print(json.dumps({**JOB, **job}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


class FreshSchedulers(Schedulers):
    """A process for each job: CUDA, which SGLang touches when it is imported, survives no fork.

    Args:
        log: takes what they print.
        environment: of them all, over this process's.
    """

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.log, self.environment = log, environment

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        self.process = self.begin(
            {**self.environment, **job.get("environment", {}), "RUN_ONE_JOB": "1"}
        )
        answer = super().ask(job)
        self.close()
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """In the fork: what a job asks for."""
    os.environ.update(job["environment"])
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    if job["any_back_end"]:
        from sglang.srt.arg_groups import model_hook
        from sglang.srt.models.deepseek_common import attention_backend_handler as latent

        model_hook.attention_backends_of = lambda *_: ("triton", "triton")
        latent.AttentionBackendRegistry.register(
            "torch_native", lambda *_: latent.AttnForwardMethod.MLA
        )
    args = ServerArgs(**job["settings"])
    if hasattr(args, "resolve_once"):  # SGLang before 0.5.19 has resolved them by now.
        args.resolve_once()
    stand_in(args)
    ports = PortArgs.init_new(args)
    publish(args, role="scheduler")
    others = [
        forked(lambda rank=rank: serve_rank(job, args, ports, rank))
        for rank in range(1, args.tp_size)
    ]
    answer = serve_rank(job, args, ports, 0)
    return {**answer, "others": [other() for other in others]}


def stand_in(args: Any) -> None:
    """Put torch in the place of what SGLang has for GPUs alone, where the settings need it."""
    if ON_GPU:
        return
    if args.lora_paths:
        import unpinned

        args.check_server_args()
        unpinned.turn_on()
    if args.enable_hierarchical_cache:
        import host_copies

        host_copies.turn_on()
    if has_delta_rule(args.model_path):
        import delta_rule

        delta_rule.turn_on()
    if args.quantization == "w8a8_int8":
        import int8_products

        int8_products.turn_on()


def has_delta_rule(model: str) -> bool:
    """Whether a target's directory says that it has gated delta rules."""
    config = Path(model) / "config.json"
    return config.exists() and "linear_num_value_heads" in config.read_text()


def serve_rank(job: dict[str, Any], args: Any, ports: Any, rank: int) -> dict[str, Any]:
    """What one tensor-parallel rank makes of a job."""
    import torch
    from sglang.srt.managers.scheduler import Scheduler

    from dflash_plugin.adaptive.step_times import Lengths, Step
    from dflash_plugin.sglang import adaptive
    from dflash_plugin.sglang.selfcheck import make_request, run
    from dflash_plugin.sglang.waiting_prompts import let_prompts_wait

    counts = {}
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreted

        interpreted.turn_on()
        counts = interpreted.COUNTS
    if job["batches"] is not None and args.speculative_algorithm:
        import batches

        batches.record_drafts(Path(job["drafts_file"]))
    if job["widths"]:
        # On a GPU, passes of a tiny model gain nothing from fewer rows, and would not be captured.
        adaptive.bypass_of = lambda _: 0
    scheduler = Scheduler(args, ports, rank, rank, 0, 0, 0, 0, None)
    if counts:
        counts = interpreted.launch_ahead(scheduler.draft_worker)
    verifier, cut = getattr(scheduler.draft_worker, "verifier", None), []
    running: list[Any] = []
    arriving: list[Any] = []
    if job["widths"]:
        learn, worker = verifier.learn, scheduler.draft_worker

        def noted(committed: Any) -> None:
            learn(committed)
            tokens = worker._draft_block_tokens_buf[: len(committed), 1:].tolist()
            drafts = [[token for token in block if token >= 0] for block in tokens]
            cut.append([verifier.verify_len, worker.step.anchors.tolist(), drafts])
            if arriving and len(cut) % job["late"] == 0:
                running.append(arriving.pop(0))
                scheduler._add_request_to_queue(running[-1])

        verifier.learn = noted
    if job["widths"] == "chosen":
        drawn = random.Random(rank)
        clock = itertools.accumulate(10 ** drawn.uniform(-4, -2) for _ in itertools.count())
        adaptive.time = SimpleNamespace(monotonic=lambda: next(clock))
        if job["late"]:  # Whether a prompt waits depends on what a step takes, as far as is known.
            policy = verifier.policy
            policy.sizes = (32,)
            policy.times.prior = {
                Step(32, *choice): 1e-4 * drawn.random() for choice in policy.choices
            }
        let_prompts_wait(scheduler, verifier)
    elif job["widths"]:
        cycle = itertools.cycle(job["widths"])

        def choose(*_: Any) -> int:
            turn = next(cycle)
            rows, drafted = turn if isinstance(turn, list) else (turn, verifier.block)
            verifier.policy._chosen = Lengths(rows, drafted)
            return rows

        verifier.policy.choose = choose
        compact, generator = verifier.compact, torch.Generator(verifier.device).manual_seed(0)

        def unlike(*arguments: Any) -> Any:
            # Copies of a prompt would have as many rows each.
            verifier.predictor.predictions.uniform_(generator=generator)
            verifier.predictor.predictions[:, verifier.draft_len - 1 :] = 0
            return compact(*arguments)

        verifier.compact = unlike

    if job["batches"] is not None:
        import batches

        made = where_it_serves(scheduler, lambda: batches.run(scheduler, **job["batches"]))
        backend = back_end(scheduler.tp_worker.model_runner.attn_backend)
        return {"batches": made, "cut": cut, "adapts": verifier is not None, "attention": backend}

    def answers() -> dict[str, Any]:
        texts, blocks = [], []
        if job["together"]:
            requests = [
                make_request(scheduler, prompt, **job["params"]) for prompt in job["prompts"]
            ]
            blocks = run(scheduler, requests, whole=not job["widths"])
            texts = [list(request.output_ids_through_stop) for request in requests]
            from_host = [request.cached_tokens_host for request in requests]
            return {"texts": texts, "blocks": blocks, "from_host": from_host}
        for prompt in job["prompts"]:
            requests = [
                make_request(scheduler, prompt, **job["params"]) for _ in range(job["copies"])
            ]
            for request, path in zip(requests, job["adapters"], strict=False):
                adapt(request, path)
            running[:], arriving[:] = requests, []
            if job["late"]:
                running[:], arriving[:] = requests[:1], requests[1:]
            blocks.append(run(scheduler, running, whole=not job["widths"]))
            texts.append([list(request.output_ids_through_stop) for request in requests])
        return {"texts": texts, "blocks": blocks}

    first, after = answers(), []
    for step in job["steps"]:
        import weight_steps

        after.append({"told": weight_steps.take(scheduler, step), **answers()})
    learnt = None if verifier is None else verifier.policy.summary()
    return {
        **first, "after": after, "counts": counts, "cut": cut, "learnt": learnt
    }  # fmt: skip


def back_end(attention: Any) -> str:
    """The class of a target's attention back end; beside recurrent layers, of both parts."""
    parts = [
        getattr(attention, name, None) for name in ("linear_attn_backend", "full_attn_backend")
    ]
    return ", ".join(type(part).__name__ for part in parts if part is not None) or (
        type(attention).__name__
    )


def where_it_serves(scheduler: Any, work: Callable[[], Any]) -> Any:
    """Run work in the place of a scheduler's event loop, on the streams on which it serves."""
    from sglang.srt.managers import scheduler as module

    found = []
    native, module.dispatch_event_loop = module.dispatch_event_loop, lambda _: found.append(work())
    try:
        scheduler.run_event_loop()
    finally:
        module.dispatch_event_loop = native
    return found[0]


def adapt(request: Any, path: str | None) -> None:
    """Let a request use the adapter at ``path``, as a client's ``lora_path`` does."""
    from sglang.srt.lora.lora_registry import LoRARef

    if path is not None:
        request.lora_id = LoRARef.deterministic_id(path, path)
        request.extra_key = request.lora_id


def answered(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What work answers, or the error that ended it."""
    try:
        return work()
    except BaseException as error:
        import traceback

        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def forked(work: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Begin work in a fork; what is returned waits for its answer."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with os.fdopen(write, "w") as pipe:
            json.dump(answered(work), pipe)
        os._exit(0)
    os.close(write)

    def wait() -> dict[str, Any]:
        with os.fdopen(read) as pipe:
            found = pipe.read()
        os.waitpid(child, 0)
        answer: dict[str, Any] = json.loads(found or '{"error": "a process ended"}')
        return answer

    return wait


def main() -> None:
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    # With the plugin's patches in place, as in SGLang's own processes.
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry  # noqa: F401

    if os.environ.get("RUN_ONE_JOB"):
        print(json.dumps(answered(lambda: serve(json.loads(sys.stdin.readline())))), file=pipe)
        pipe.flush()
        # Without waiting for what the scheduler started.
        os._exit(0)
    # A fork need not look through what is here already each time that SGLang collects garbage.
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(forked(lambda job=job: serve(job))()), file=pipe, flush=True)


if __name__ == "__main__":
    main()
