"""Where a tree's tokens come from, counted by hand, and both kinds of engine on one drafter."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from trees import compare, gains

from dflash_plugin.transformers import Engine, Request, Result
from tests.helpers.tiny import tiny_target
from tests.transformers.test_engine import greedy, prompts_of
from tests.transformers.test_trees import doubting_drafter


def test_gains_are_counted_behind_the_rejection():
    # A chain of 3; rows from 4 on stand beside it.
    paths = [[1, 2, 3], [1, 2], [1, 5], [4, 6, 9], []]
    results = [Result(accepted_rows=paths[:2]), Result(accepted_rows=paths[2:])]
    assert gains(results, 3) == {
        "passes": 5,
        "rejections": 4,
        "siblings": 2,
        "gained": 1 + 3,
        "behind": 2,
    }


def test_chain_and_trees_write_the_same_text():
    target, prompts = tiny_target(), prompts_of(3)
    texts = [prompt + greedy(target, prompt, 20) for prompt in prompts]
    drafter = doubting_drafter(texts)
    engines = {rows: Engine(target, drafter, max_length=72, tree_rows=rows) for rows in (0, 8)}
    requests = [Request(prompt, 20, []) for prompt in prompts]
    found, results = compare(engines, drafter, requests, 2)
    assert [p + r.tokens for p, r in zip(prompts, results, strict=True)] == texts
    assert [row["rows"] for row in found] == [0, 8]
    assert [row["same_text"] for row in found] == [3, 3]
    assert found[1]["tau"] > found[0]["tau"] + 1
    assert found[1]["passes"] == found[1]["steps"]
    assert [len(row["seconds"]) for row in found] == [2, 2]
