"""τ of requests that sample, by temperature and limits, in one engine.

Run it where the engine is installed; the prompts and the requests' seeds are the same in each:

    python benchmarks/sampled_tau.py --engine vllm --output FILE.json

Rows that the file has already are kept, so a run that ended early goes on. With the same seed the
Transformers engine and SGLang write the same text; vLLM draws with noise of its own, so that its τ
differs by chance too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from statistics import pstdev
from typing import Annotated, Any

import torch
import typer
from draft_sampling import LIMITS
from serving_common import EngineUnderTest, Load, circumstances, real_prompts

from dflash_plugin.checkpoints.hub import resolve_model
from dflash_plugin.decoding.sampling import SamplingParams
from dflash_plugin.transformers import Engine, Request, load_drafter, load_target

# Answers to all prompts at a temperature and within limits: τ, and what else the engine tells.
Answers = Callable[[float, dict[str, Any]], dict[str, Any]]
SEED = {"vllm": "seed", "sglang": "sampling_seed"}


class Name(StrEnum):
    """The engines."""

    transformers = "transformers"
    vllm = "vllm"
    sglang = "sglang"


@contextmanager
def in_transformers(
    directory: Path, drafter: Path, way: Any, prompts: list[list[int]], tokens: int
) -> Iterator[Answers]:
    """The Transformers engine; tells the passes and τ's standard error, too."""
    model, _ = load_target(directory, torch.float32, "cpu")
    engine = Engine(
        model,
        load_drafter(drafter, model),
        max_batch=len(prompts),
        max_length=max(map(len, prompts)) + tokens,
        draft_sampling=way,
    )

    def answers(temperature: float, limits: dict[str, Any]) -> dict[str, Any]:
        results = engine.generate(
            [
                Request(
                    prompt,
                    tokens,
                    stop_ids=(),
                    sampling=SamplingParams(temperature, **limits, seed=seed),
                )
                for seed, prompt in enumerate(prompts)
            ]
        )
        accepted = [result.accepted for result in results]
        return {
            "tau": tau_of(accepted),
            "passes": sum(map(len, accepted)),
            "error": round(standard_error(accepted), 4),
        }

    yield answers


def tau_of(accepted: list[list[int]]) -> float:
    """τ of texts, from the accepted drafts of their passes, those cut off at a limit included."""
    return 1 + sum(map(sum, accepted)) / sum(map(len, accepted))


def standard_error(accepted: list[list[int]]) -> float:
    """Of τ, by the jackknife over texts: the passes of one text are alike."""
    count = len(accepted)
    without = [tau_of(accepted[:place] + accepted[place + 1 :]) for place in range(count)]
    return (count - 1) ** 0.5 * pstdev(without)


@contextmanager
def served_by(
    engine: EngineUnderTest,
    directory: Path,
    drafter: Path,
    way: str,
    prompts: list[list[int]],
    tokens: int,
    log: Path,
) -> Iterator[Answers]:
    """A serving engine in a process of its own."""
    load = Load(len(prompts), max(map(len, prompts)) + tokens, memory=None, is_dummy=False)
    arguments = {**engine.common(load), **engine.model(directory), "dtype": "float32"}
    environment = {"DFLASH_PLUGIN_DRAFT_SAMPLING": way} if engine.name == Name.sglang else {}
    if engine.name == Name.vllm:
        # Compiling would take longer than the texts.
        arguments["enforce_eager"] = True
        arguments["additional_config"] = {"dflash_plugin": {"draft_sampling": way}}
    drafts = json.loads((drafter / "config.json").read_text())["block_size"] - 1
    child = engine.served(
        "plugin", arguments, engine.speculative(drafter, drafts), log, **environment
    )

    def answers(temperature: float, limits: dict[str, Any]) -> dict[str, Any]:
        given = {**engine.sampling(tokens, False), "temperature": temperature, **limits}
        found = child.ask(
            prompts=prompts,
            concurrency=len(prompts),
            sampling={**given, "ignore_eos": True},
            seeds={SEED[engine.name]: list(range(len(prompts)))},
        )
        return {"tau": found["tau"]}

    try:
        child.wait()
        yield answers
    finally:
        child.close()


def main(
    output: Annotated[Path, typer.Option()],
    engine: Annotated[Name, typer.Option()],
    target: str = "smollm2",
    drafters: str = "examples/smollm2-135m-dflash,examples/smollm2-135m-dflash2",
    data: Path = Path("tests/data"),
    prompts: int = 8,
    new_tokens: int = 64,
    temperatures: str = "0.3,0.6,0.8,1.0",
    ways: str = "greedy,probabilistic",
) -> None:
    """Prompts of the five sets in turn, all at once; writes one JSON file after each row."""
    directory = resolve_model(target)
    asked = real_prompts(directory, data, prompts)
    if engine is Name.vllm:
        from vllm_serving import VLLM as under_test
    elif engine is Name.sglang:
        from sglang_serving import SGLANG as under_test
    else:
        under_test = None
    if under_test is None:
        from dflash_plugin import __version__

        facts = circumstances("dflash-plugin", __version__)
    else:
        facts = circumstances(under_test.name, under_test.version())
    record = {**facts, "engine": engine.value, "prompts": prompts, "max_new_tokens": new_tokens}
    rows = kept_rows(output, record)
    cells = [
        (float(temperature), limits) for temperature in temperatures.split(",") for limits in LIMITS
    ]
    for drafter in map(Path, drafters.split(",")):
        for way in ways.split(","):
            known = {
                (row["temperature"], row["limits"])
                for row in rows
                if (row["drafter"], row["draft_sampling"]) == (drafter.name, way)
            }
            missing = [cell for cell in cells if cell not in known]
            if not missing:
                continue
            given = (directory, drafter, way, asked, new_tokens)
            if under_test is None:
                running = in_transformers(*given)
            else:
                running = served_by(under_test, *given, output.with_suffix(".log"))
            with running as answers:
                for temperature, limits in missing:
                    found = answers(temperature, LIMITS[limits])
                    row = {"drafter": drafter.name, "draft_sampling": way}
                    row |= {"temperature": temperature, "limits": limits, **found}
                    rows.append({**row, "tau": round(found["tau"], 4)})
                    print(rows[-1], flush=True)
                    write(output, record, rows)
    write(output, record, rows)


def write(output: Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Keep the circumstances of the last run, and the rows of all."""
    output.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


def kept_rows(output: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same engine and prompts.

    Raises:
        typer.BadParameter: the file is of another run.
    """
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        return []
    before = json.loads(output.read_text())
    for name in ("engine", "versions", "prompts", "max_new_tokens"):
        if before[name] != record[name]:
            raise typer.BadParameter(
                f"{output} has {name} {before[name]!r} and this run {record[name]!r}: give another "
                "--output"
            )
    rows: list[dict[str, Any]] = before["rows"]
    return rows


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
