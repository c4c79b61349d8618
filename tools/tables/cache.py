"""Groups of vLLM's cache and what prefixes it finds again."""

from __future__ import annotations

from tools.tables.common import load, table


def cache_groups() -> str:
    """Groups of vLLM's cache and the tokens that they hold."""
    record = load("vllm-cache-groups")
    ways = ["alone", "native", "plugin"]
    rows = [
        [
            *pair(row),
            f"{row['length']:,}",
            *(f"{row[way]['groups']}, {row[way]['tokens_in_gib']:,}" for way in ways),
        ]
        for row in record["rows"]
    ]
    header = ["target", "drafter", "longest request", "alone", "natively", "with the plugin"]
    facts = f"{record['drafts']} drafts, prefix caching; vLLM {record['vllm']}, {record['date']}."
    return f"{table(header, rows)}\n\n{facts} `{record['command']}`"


def cached_prefixes() -> str:
    """Tokens of a repeated prompt that vLLM finds again."""
    record = load("vllm-cache-groups")
    rows = [
        [
            *pair(row),
            f"{row['alone']['cached']:,}",
            f"{row['native']['cached_dropping']:,}",
            f"{row['native']['cached']:,}",
            f"{row['plugin']['cached']:,}",
        ]
        for row in record["rows"]
        if row["length"] == max(one["length"] for one in record["rows"])
    ]
    header = ["target", "drafter", "alone", "natively, 0.31 and 0.32", "natively, 0.33"]
    return (
        f"{table([*header, 'with the plugin'], rows)}\n\nOf {record['prompt']:,} tokens; as above."
    )


def pair(row: dict) -> list[str]:
    """A target with recurrent layers, and its drafter."""
    target, drafter = row["target"], row["drafter"]
    layers = [f"{drafter[kind]} {kind}" for kind in ("windowed", "full") if drafter[kind]]
    return [
        f"{target['name']}: {target['recurrent']} recurrent, {target['full']} full "
        f"({target['kv_heads']} × {target['head_dim']})",
        f"{', '.join(layers)} ({drafter['kv_heads']} × {drafter['head_dim']})",
    ]
