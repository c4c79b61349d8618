"""What differs between SGLang versions, and which versions are supported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import Any

from dflash_plugin.errors import DFlashError


@dataclass(frozen=True)
class Version:
    """A supported version.

    Attributes:
        declares_arguments: decisions about arguments are declared beside ``ServerArgs`` instead of
            being written into it.
        log_probabilities: SGLang returns log-probabilities under DFLASH.
        draft_backend: the function that chooses the draft model's attention back end.
        has_kv_index_translator: back ends translate slots by a ``kv_index_translator``; before, by
            a function ``_translate_kv_loc``.
        plans_kv_writes: the input of a verify pass holds a plan of the slots that the pass writes
            (``kv_loc_plan``).
        counts_rows_on_host: a pass tells of its rows on the host, too
            (``global_num_token_non_padded_cpu``).
        has_sampling_masks: requests can ask for the tokens that sampling left over.
        defers_gather: the target's verify passes leave logits on the ranks that made them.
        lora: SGLang serves adapters of the target under DFLASH.
        native_dp_attention: SGLang's own DFLASH runs with data-parallel attention.
        native_disaggregation: SGLang's own DFLASH runs with prefill-decode disaggregation.
    """

    declares_arguments: bool = False
    log_probabilities: bool = False
    draft_backend: str = "_resolve_draft_attention_backend_fallback"
    has_kv_index_translator: bool = False
    plans_kv_writes: bool = False
    counts_rows_on_host: bool = False
    has_sampling_masks: bool = False
    defers_gather: bool = False
    lora: bool = False
    native_dp_attention: bool = False
    native_disaggregation: bool = False

    def supports_ragged_verify(self, backend: Any) -> bool:
        """Whether a back end's own attention takes requests with different numbers of rows."""
        return bool(backend.supports_ragged_verify_graph)

    def returns_sampling_masks(self, info: Any) -> bool:
        """Whether a request of a batch asked for the tokens that sampling left over."""
        return self.has_sampling_masks and info.sampling_mask_batch_indices is not None


_0_5_17 = Version()
_0_5_18 = replace(_0_5_17, log_probabilities=True, native_disaggregation=True)
_0_5_19 = replace(_0_5_18, declares_arguments=True, has_kv_index_translator=True, lora=True)
_0_5_20 = replace(_0_5_19, counts_rows_on_host=True, has_sampling_masks=True)
_0_5_22 = replace(
    _0_5_20, draft_backend="resolve_draft_worker_attention_backend", plans_kv_writes=True
)
_0_5_23 = replace(_0_5_22, defers_gather=True, native_dp_attention=True)
SUPPORTED: dict[str, Version] = {
    "0.5.17": _0_5_17,
    "0.5.18": _0_5_18,
    "0.5.19": _0_5_19,
    "0.5.20": _0_5_20,
    "0.5.21": _0_5_20,
    "0.5.22": _0_5_22,
    "0.5.23": _0_5_23,
}


@cache
def installed() -> str:
    """The installed SGLang's version; read once, as it takes a millisecond.

    Raises:
        DFlashError: it is not installed.
    """
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        raise DFlashError("SGLang is not installed: pip install sglang") from None


def row() -> Version | None:
    """The installed version's row of the table, or None where it has none."""
    return SUPPORTED.get(installed().partition("+")[0].partition(".post")[0])


def current() -> Version:
    """The installed version's row of the table.

    Raises:
        DFlashError: the version is not in the table.
    """
    version = row()
    if version is None:
        names = ", ".join(SUPPORTED)
        raise DFlashError(
            f"SGLang {installed()} is not supported: dflash-plugin runs with {names}; install one "
            "of them, or set DFLASH_PLUGIN=off to use SGLang's own DFlash"
        )
    return version


def argument(server_args: Any, name: str) -> Any:
    """An argument's value in ``ServerArgs``, with the decisions that were made so far."""
    if not current().declares_arguments:
        return getattr(server_args, name)
    from sglang.srt.arg_groups.model_override_base import resolving_view

    return getattr(resolving_view(server_args), name)


def has_dp_attention(server_args: Any) -> bool:
    """Whether attention is data-parallel, by its flag or by the number that replaced it."""
    if hasattr(server_args, "attn_dp_size") and argument(server_args, "attn_dp_size") > 1:
        return True
    return bool(argument(server_args, "enable_dp_attention"))


def set_argument(server_args: Any, name: str, value: Any) -> None:
    """Decide an argument."""
    if not current().declares_arguments:
        setattr(server_args, name, value)
        return
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, "dflash-plugin", **{name: value})


@contextmanager
def as_cuda(server_args: Any) -> Iterator[None]:
    """Let a check of the device pass on a CPU."""
    device = argument(server_args, "device")
    set_argument(server_args, "device", "cuda")
    try:
        yield
    finally:
        set_argument(server_args, "device", device)
