"""Write the result tables of README.md and docs/ from the JSON files in benchmarks/results.

python tools/make_tables.py          rewrite them
python tools/make_tables.py --check  exit 1 if one is not up to date

A table stands in its page between ``<!-- name -->`` and ``<!-- /name -->``. ``SECTIONS`` says which
function of ``tools/tables`` makes it, and from which result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.tables.acceptance import acceptance, draft_weights, greedy_texts
from tools.tables.cache import cache_groups, cached_prefixes
from tools.tables.common import ROOT
from tools.tables.dflash2 import dflash2, dflash2_by_temperature, dflash2_greedy, first_draft
from tools.tables.fair import FAIR, fair, plot, summary
from tools.tables.kernels import SHOWN_OF_DFLASH2, acceptance_kernels, draft_step, kernels
from tools.tables.policy import budget, mixed
from tools.tables.sampling import draft_sampling, sampled_tau, sglang_sampling
from tools.tables.serving import ALONE_AND_TWO, engine, serving, startup
from tools.tables.soak import soak
from tools.tables.targets import refusals, targets, targets_on_gpu
from tools.tables.timelines import timelines
from tools.tables.trees import trees_gain, trees_speed

# Tables by page and name.
SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "plot": plot,
        "vllm-fair": lambda: summary("vllm"),
        "sglang-fair": lambda: summary("sglang"),
        "acceptance": lambda: acceptance().rsplit(" `dflash-plugin", 1)[0],
    },
    "docs/results.md": {
        "vllm-fair": lambda: fair(FAIR["vllm"]),
        "sglang-fair": lambda: fair(FAIR["sglang"]),
        "vllm-default": lambda: serving(FAIR["vllm"]),
        "vllm-parts": lambda: serving("vllm-h200-qwen3-8b-default"),
        "sglang-short-blocks": lambda: fair("sglang-h200-qwen3-8b-short-blocks"),
        "sglang-whole-blocks": lambda: fair("sglang-h200-qwen3-8b-whole-blocks"),
        "vllm-profile": lambda: serving("vllm-h200-qwen3-8b-profile-8192"),
        "vllm-options": lambda: fair("vllm-h200-qwen3-8b-fair"),
        "sglang-options": lambda: fair("sglang-h200-qwen3-8b-fair"),
        "sglang-default": lambda: serving(FAIR["sglang"]),
        "sglang-parts": lambda: serving("sglang-h200-qwen3-8b-default"),
        "sglang-texts-fair": lambda: fair("sglang-h200-qwen3-8b-3.45"),
        "sglang-no-drafter": lambda: fair("sglang-h200-qwen3-8b-no-drafter"),
        "sglang-smollm2": lambda: serving("sglang-h200-smollm2-default"),
        "sglang-long": lambda: serving("sglang-h200-qwen3-8b-long"),
        "sglang-prompts": lambda: timelines("sglang-h200-qwen3-8b-default", "plugin"),
        "sglang-h200-timelines": lambda: timelines("sglang-h200-qwen3-8b-long", "plugin"),
        "vllm-hybrid": lambda: serving("vllm-h200-qwen3.5-9b"),
        "vllm-hybrid-adaptive": lambda: serving("vllm-h200-qwen3.5-9b-replay"),
        "startup-alone": lambda: startup(
            {
                "sglang-h200-startup": "the first start, nothing compiled",
                "sglang-h200-startup-again": "the next one",
            }
        ),
        "startup": lambda: startup(
            {
                "sglang-h200-qwen3-8b-whole-prompts": "SGLang, Qwen3-8B's shape",
                "sglang-h200-smollm2-default": "SGLang, SmolLM2",
                "vllm-h200-qwen3-8b-whole-prompts": "vLLM, Qwen3-8B's shape",
            }
        ),
        "acceptance": acceptance,
        "dflash2-greedy": dflash2_greedy,
        "greedy-texts": greedy_texts,
        "draft-weights": draft_weights,
        "h200": lambda: engine("transformers-h200"),
        "cpu": lambda: engine("transformers-cpu"),
        "vllm-replay": lambda: serving("vllm-h200-qwen3-8b-replay"),
        "sglang-replay": lambda: serving("sglang-h200-qwen3-8b-replay"),
        "vllm-qwen3-8b": lambda: serving("vllm-h100-qwen3-8b"),
        "vllm-h100": lambda: serving("vllm-h100-smollm2", ALONE_AND_TWO),
        "vllm-cpu": lambda: serving("vllm-cpu"),
        "vllm-soak": lambda: soak("vllm-soak-cpu", "vLLM", "preempted"),
        "sglang-qwen3-8b": lambda: serving("sglang-h100-qwen3-8b"),
        "sglang-timelines": lambda: timelines("sglang-h100-timelines"),
        "sglang-h100": lambda: serving("sglang-h100"),
        "sglang-soak": lambda: soak("sglang-soak-cpu", "SGLang", "retracted"),
        "vllm-soak-gpu": lambda: soak("vllm-soak-h200", "vLLM", "preempted"),
        "sglang-soak-gpu": lambda: soak("sglang-soak-h200", "SGLang", "retracted"),
        "sglang-soak-short": lambda: soak("sglang-soak-short-cpu", "SGLang", "retracted"),
    },
    "docs/design.md": {
        "kernels": lambda: kernels("kernels-h100"),
        "budget": lambda: budget("budget-simulator"),
    },
    "docs/vllm.md": {"cache-groups": cache_groups, "cached-prefixes": cached_prefixes},
    "docs/targets.md": {
        "targets": targets,
        "targets-gpu": targets_on_gpu,
        "refusals": refusals,
    },
    "docs/tuning.md": {
        "draft-sampling": draft_sampling,
        "sampled-tau": sampled_tau,
        "sglang-sampling": sglang_sampling,
        "acceptance-kernels": acceptance_kernels,
    },
    "docs/trees.md": {
        "trees-gain": lambda: trees_gain("trees-cpu"),
        "trees-cpu": lambda: trees_speed("trees-cpu"),
        "trees-gpu": lambda: trees_speed("trees-h200"),
    },
    "docs/adaptive.md": {
        "vllm-adaptive": lambda: serving("vllm-h200-smollm2"),
        "sglang-adaptive": lambda: serving("sglang-h200-smollm2"),
        "sglang-texts": lambda: serving("sglang-h200-qwen3-8b-replay-texts"),
        "mixed": lambda: mixed("budget-simulator"),
    },
    "docs/dflash2.md": {
        "dflash2": lambda: dflash2("smollm2-dflash2-acceptance"),
        "dflash2-mixed": lambda: dflash2("smollm2-dflash2-mixed-acceptance"),
        "dflash2-temperature": dflash2_by_temperature,
        "first-draft": first_draft,
        "draft-step": draft_step,
        "dflash2-kernels": lambda: kernels("kernels-h200-dflash2", SHOWN_OF_DFLASH2),
    },
}


def filled(text: str, sections: dict[str, Callable[[], str]]) -> str:
    """Text with every section between its markers made anew."""
    for name, make in sections.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = before + start + make() + "\n" + end + rest.split(end, 1)[1]
    return text


def main() -> None:
    for name, sections in SECTIONS.items():
        path = ROOT / name
        text = path.read_text()
        if "--check" not in sys.argv:
            path.write_text(filled(text, sections))
        elif filled(text, sections) != text:
            sys.exit(f"{name} is not up to date: run python tools/make_tables.py")


if __name__ == "__main__":
    main()
