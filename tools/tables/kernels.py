"""Microseconds of kernels and of a draft step."""

from __future__ import annotations

from tools.tables.common import load, table, versions_of

SHOWN = (
    "inject_kv", "draft_head", "draft_head_fp8", "fp8_product", "fp8_product_down",
    "draft_attention", "draft_attention_batch",
)  # fmt: skip
SHOWN_OF_DFLASH2 = (
    "projected_convolution", "convolve_add_rms_norm", "draft_head_candidates", "best_logits",
)  # fmt: skip
ACCEPTANCE = {
    "target_softmax": "the target's distributions",
    "limited_softmax": "the same within top-k, top-p or min-p",
    "draw_tokens": "drafts drawn",
    "accept": "acceptance draft by draft",
    "accept_block": "acceptance by block",
}
OF_SELECTOR = {
    "accept_block_candidates": "acceptance by block, drafts of a selector",
    "accept_greedy": "greedy acceptance",
}


def kernels(name: str, ops: tuple[str, ...] = SHOWN) -> str:
    """Microseconds of the kernels that replace something of an engine's."""
    record = load(name)
    rows = [
        [
            row["op"],
            f"{row['rows']:,}",
            *(f"{row[key]:,.1f}" for key in ("kernel_us", "engine_us", "copy_us", "twin_us")),
            f"{row['engine_us'] / row['kernel_us']:.2f}",
        ]
        for row in record["rows"]
        if row["op"] in ops
    ]
    header = ["operation", "size", "kernel", "instead", "copy of as many bytes", "twin"]
    return f"{table([*header, 'times as fast'], rows)}\n\n{facts_of(record)}"


def acceptance_kernels() -> str:
    """Microseconds of what accepts the drafts of requests that sample, by requests."""
    records = load("kernels-h200-acceptance"), load("kernels-h200-acceptance-selector")
    requests = sorted({row["rows"] for row in records[0]["rows"]})
    rows = []
    for record, ops in zip(records, (ACCEPTANCE, OF_SELECTOR), strict=True):
        found = {(row["op"], row["rows"]): row["kernel_us"] for row in record["rows"]}
        rows += [
            [what, *(f"{found[op, count]:,.0f}" for count in requests)] for op, what in ops.items()
        ]
    header = ["µs, by requests", *map(str, requests)]
    facts = "; the last two lines: ".join(map(facts_of, records))
    return f"{table(header, rows)}\n\n{facts}"


def facts_of(record: dict) -> str:
    """On what, with which versions, when and by which command kernels were timed."""
    facts = f"{record['device']}, {record['dtype']}, {versions_of(record)}, {record['date']}. "
    return f"{facts}`{record['command']}`"


def draft_step() -> str:
    """A step's microseconds, and by how much each part lengthens it."""
    record = load("draft-step-h200")
    kinds = {
        "dflash": "DFlash",
        "convolutions": "with convolutions",
        "selector": "with a selector",
        "dflash2": "DFlash 2",
        "dflash2_sampled": "DFlash 2, sampled",
    }
    rows = [
        [
            str(row["requests"]),
            f"{row['dflash']:,.0f} µs",
            *(
                f"{row[kind]:,.0f} µs ({row[kind] / row['dflash'] - 1:+.0%})"
                for kind in list(kinds)[1:]
            ),
        ]
        for row in record["rows"]
    ]
    versions = versions_of(record)
    facts = f"{record['device']}, bfloat16, {versions}, {record['date']}. `{record['command']}`"
    return f"{table(['requests', *kinds.values()], rows)}\n\n{facts}"
