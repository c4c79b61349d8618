"""A drafter's tables against its target's vocabulary: what is cut, completed and refused."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dflash_plugin.checkpoints.inspection import inspect_checkpoint
from dflash_plugin.checkpoints.io import load_checkpoint, load_config
from dflash_plugin.checkpoints.reference_drafts import answer
from dflash_plugin.checkpoints.vocabulary import LOOKED_UP, difference, fitted, fitted_config
from dflash_plugin.decoding.sampling import SamplingParams, SamplingTensors
from dflash_plugin.drafter.static_store import StaticStore
from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers import Engine, Request, load_drafter
from tests.helpers.tiny import DFLASH2, tiny_target, write_target, write_tiny

TOKENS = 97
SIZES = (90, 97, 104)
# What of a drafter has a row a token.
OWN = {
    "nothing": {},
    "embedding": {"own_embedding": True},
    "head": {"own_head": True},
    "both": {"own_embedding": True, "own_head": True},
    "reduced head": {"own_head": True, "draft_vocab_size": 24},
    "codebooks": DFLASH2,
    "codebooks and head": {**DFLASH2, "own_head": True},
}


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def target_directory(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


def draft_all(drafter, target, temperature: float) -> torch.Tensor:
    """Drafts of one block behind each token of the target; the first six are context."""
    device = torch.device("cpu")
    ids = torch.arange(6)[None]
    out = target(input_ids=ids, use_cache=False, output_hidden_states=True)
    features = torch.cat(
        [out.hidden_states[layer + 1] for layer in drafter.config.target_layer_ids], dim=-1
    )
    anchors = torch.arange(TOKENS)
    drafter.store = StaticStore(drafter, TOKENS, 64, torch.float32, device)
    drafter.inject(features.expand(TOKENS, -1, -1), torch.arange(6).expand(TOKENS, -1))
    positions = torch.full_like(anchors, 6)
    sampling = None
    if temperature:
        sampling = SamplingTensors.build(
            [SamplingParams(temperature=temperature, seed=seed) for seed in range(TOKENS)], device
        )
    hidden = drafter.draft(anchors, positions)
    return drafter.propose(hidden, anchors, positions, sampling).tokens


@pytest.mark.parametrize("mask", ["a token", "the last row", "a vector"])
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("own", OWN)
@torch.inference_mode()
def test_inspect_and_the_loader_agree(own, rows, mask, target, target_directory, tmp_path):
    """Who loads drafts tokens of the target alone, behind every token; who does not is named."""
    changes = {**OWN[own], "vocab_size": rows}
    changes |= {"own_mask_embedding": True} if mask == "a vector" else {}
    changes |= {} if mask == "a token" else {"mask_token_id": rows - 1}
    directory = write_tiny(tmp_path, **changes)
    report = inspect_checkpoint(directory, target_directory)
    lost = mask == "the last row" and rows > TOKENS and "own_embedding" not in changes
    lost |= own == "codebooks and head" and rows < TOKENS
    assert report.fits is not lost
    if lost:
        (error,) = [finding.message for finding in report.findings if finding.level == "error"]
        with pytest.raises(DFlashError) as refused:
            load_drafter(directory, target)
        assert str(refused.value) == error
        return
    drafter = load_drafter(directory, target)
    assert drafter.config.vocab_size == TOKENS
    limit = min(rows, TOKENS) if "own_head" in changes else TOKENS
    for temperature in (0.0, 1.5):
        drafts = draft_all(drafter, target, temperature)
        assert int(drafts.max()) < limit
        assert len(drafts.unique()) > 2


@pytest.mark.parametrize("own", ["embedding", "head", "both", "codebooks", "codebooks and head"])
def test_rows_beyond_the_targets_vocabulary_do_not_count(own, target, tmp_path):
    """A padded drafter drafts as the one without padding, though the padding would win."""
    plain = write_tiny(tmp_path / "plain", **OWN[own])
    padded = write_tiny(tmp_path / "padded", **OWN[own], vocab_size=104)
    tensors = load_file(plain / "model.safetensors")
    for name in {*LOOKED_UP, "lm_head.weight"} & tensors.keys():
        tensors[name] = torch.cat([tensors[name], 50 * torch.ones(7, tensors[name].shape[1])])
    save_file(tensors, padded / "model.safetensors", {"format": "pt"})
    prompt = [5, 6, 7, 8]
    expected = answer(load_drafter(plain, target), target, prompt)
    assert answer(load_drafter(padded, target), target, prompt).drafts == expected.drafts


@pytest.mark.parametrize("own", ["embedding", "head", "both", "codebooks", "codebooks and head"])
def test_rows_beyond_the_drafters_own_vocabulary_are_padding(own, tmp_path):
    directory = write_tiny(tmp_path, **OWN[own])
    before = load_checkpoint(directory)
    tensors = dict(before.tensors)
    for name in {*LOOKED_UP, "lm_head.weight"} & tensors.keys():
        tensors[name] = torch.cat([tensors[name], torch.ones(7, tensors[name].shape[1])])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    after = load_checkpoint(directory)
    assert load_config(directory) == after.config == before.config
    assert all(torch.equal(after.tensors[name], before.tensors[name]) for name in tensors)
    # Fewer rows than the configuration says are a contradiction.
    short = {
        n: t[:90] if n in LOOKED_UP or n == "lm_head.weight" else t for n, t in tensors.items()
    }
    save_file({n: t.contiguous() for n, t in short.items()}, directory / "model.safetensors")
    with pytest.raises(DFlashError, match=r"has shape \[90, .*config.json makes it \[97,"):
        load_checkpoint(directory)


def test_the_masks_row_is_kept_where_the_target_has_none(target, tmp_path):
    """The last row of the drafter's own embedding is the mask's, beyond the target's tokens."""
    changes = {"own_embedding": True, "vocab_size": 104, "mask_token_id": 103}
    checkpoint = load_checkpoint(write_tiny(tmp_path, **changes))
    fit = fitted(checkpoint, TOKENS)
    row = checkpoint.tensors["embed_tokens.weight"][103]
    assert torch.equal(fit.tensors["mask_embedding"], row)
    assert fit.tensors["embed_tokens.weight"].shape[0] == TOKENS
    drafter = load_drafter(tmp_path, target)
    assert torch.equal(drafter.embed(torch.tensor(103)), row)


def test_a_vocabulary_that_fits_is_left_alone(tmp_path):
    checkpoint = load_checkpoint(write_tiny(tmp_path, **DFLASH2))
    assert fitted(checkpoint, TOKENS) is checkpoint
    assert difference(checkpoint.config, TOKENS) is None


def test_an_engine_tells_that_the_sizes_differ(target, tmp_path, caplog):
    load_drafter(write_tiny(tmp_path, vocab_size=104, own_head=True), target)
    load_drafter(tmp_path, target)
    assert caplog.text.count("the drafter's vocab_size is 104, the target's 97") == 1


@settings(max_examples=25, deadline=None)
@given(
    own=st.sampled_from(sorted(OWN)),
    rows=st.integers(60, 140),
    seed=st.integers(0, 2**16),
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
)
@torch.inference_mode()
def test_no_draft_is_a_token_that_the_target_lacks(own, rows, seed, temperature):
    target = tiny_target(num_hidden_layers=4)
    with TemporaryDirectory() as directory:
        write_tiny(Path(directory), seed=seed, **OWN[own], vocab_size=rows)
        config = load_config(directory)
        try:
            drafter = load_drafter(directory, target)
        except DFlashError as error:
            # Refused for its configuration, or for what its map holds.
            if "d2t maps" not in str(error):
                with pytest.raises(DFlashError):
                    fitted_config(config, TOKENS)
            return
    assert int(draft_all(drafter, target, temperature).max()) < TOKENS


@pytest.mark.parametrize("rows", [90, 104])
@pytest.mark.parametrize("own", ["head", "both", "codebooks"])
def test_the_engine_writes_the_targets_text_with_any(own, rows, target, tmp_path):
    drafter = load_drafter(write_tiny(tmp_path, **OWN[own], vocab_size=rows), target)
    prompt = [5, 6, 7, 95]
    ids = target.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    engine = Engine(target, drafter, max_batch=2, max_length=64)
    greedy = Request(prompt, 12, stop_ids=())
    drawn = Request(prompt, 12, stop_ids=(), sampling=SamplingParams(temperature=1.3, seed=7))
    written, sampled = engine.generate([greedy, drawn])
    assert written.tokens == ids[0, len(prompt) :].tolist()
    assert len(sampled.tokens) == 12
    assert max(sampled.tokens) < TOKENS
