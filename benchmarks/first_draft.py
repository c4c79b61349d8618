"""How often the first draft of a block stands at temperature 1, by what it is drawn from.

    python benchmarks/first_draft.py --drafter DIRECTORY --output FILE.json

The target writes texts at temperature 1; at each of their positions the chance that a draft stands
is what the target's distribution and the drafter's have in common. "vocabulary" draws from the
head's softmax, "candidates" from the selector's over its candidates, "best" takes the head's best
token. "mass" is what the target gives to the candidates. A token that was none of them can only
come from the target; "after_candidate" and "after_other" are what "candidates" is behind either.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor

from dflash_plugin.checkpoints.hub import resolve_model
from dflash_plugin.drafter.blockwise import blocks_of_texts
from dflash_plugin.prompts import load_prompts
from dflash_plugin.train.data import respond
from dflash_plugin.train.features import OnlineFeatures, known_texts
from dflash_plugin.train.sequences import SequenceSet
from dflash_plugin.transformers.engine import Engine
from dflash_plugin.transformers.loading import load_drafter, load_target


@torch.no_grad()
def shares(
    name: str, target: transformers.PreTrainedModel, sequences: SequenceSet
) -> dict[str, float]:
    """Means over all positions of the responses."""
    drafter = load_drafter(name, target).requires_grad_(False)
    selector = drafter.candidate_selector
    features = OnlineFeatures(target, drafter.config.target_layer_ids)
    found: dict[str, list[Tensor]] = {}
    for text in known_texts(features, sequences, target.device):
        (passes,) = blocks_of_texts(drafter, [text])
        hidden = torch.cat([states[:, 0] for _, states in passes])
        anchors = torch.cat([blocks.anchors[0] for blocks, _ in passes])
        tokens = text.tokens[None]
        truth = target(tokens).logits[0].softmax(dim=-1)[anchors]
        logits = drafter.logits(hidden)
        draws = logits.softmax(dim=-1)
        best = logits.argmax(dim=-1, keepdim=True)
        seen = {
            "vocabulary": torch.minimum(truth, draws).sum(dim=-1),
            "best": truth.gather(-1, best).squeeze(-1),
        }
        if selector is not None:
            likeliest = logits.topk(selector.top_k, dim=-1)
            before = tokens[0, anchors]
            scores = selector.scores(likeliest.indices, likeliest.values, hidden, before)
            given = truth.gather(-1, likeliest.indices)
            seen["candidates"] = torch.minimum(given, scores.softmax(dim=-1)).sum(dim=-1)
            seen["mass"] = given.sum(dim=-1)
            among = (likeliest.indices[:-1] == before[1:, None]).any(dim=-1)
            seen["after_candidate"] = seen["candidates"][1:][among]
            seen["after_other"] = seen["candidates"][1:][~among]
        for kind, share in seen.items():
            found.setdefault(kind, []).append(share)
    whole = {kind: torch.cat(parts) for kind, parts in found.items()}
    means = {kind: round(float(part.mean()), 3) for kind, part in whole.items()}
    counts = {f"positions_{kind}": len(part) for kind, part in whole.items() if "after" in kind}
    return {"positions": len(whole["vocabulary"]), **counts, **means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--drafter", action="append", required=True)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    target, tokenizer = load_target(resolve_model(arguments.target), device="cpu")
    prompts = [one for file in arguments.data for one in load_prompts(file)[: arguments.limit]]
    engine = Engine(target.requires_grad_(False), max_batch=len(prompts), max_length=1024)
    limit = arguments.new_tokens
    texts = respond(engine, tokenizer, prompts, limit, 1.0, seed=1, max_prompt_tokens=512)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "device": "CPU",
        "dtype": "float32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.date.today().isoformat(),
        "texts": len(texts),
        "drafters": {name: shares(name, target, texts) for name in arguments.drafter},
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["drafters"], indent=1))


if __name__ == "__main__":
    main()
