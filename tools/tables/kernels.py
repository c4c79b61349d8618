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
    versions = versions_of(record)
    facts = f"{record['device']}, {record['dtype']}, {versions}, {record['date']}. "
    return f"{table([*header, 'times as fast'], rows)}\n\n{facts}`{record['command']}`"


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
