import gzip
import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from dflash_plugin.errors import DFlashError
from dflash_plugin.prompts import Message, Prompt, encode, load_prompts, set_name_of

DATA = Path(__file__).parent / "data"
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
CODE = "Write a solution to the following problem and make sure that it passes the tests:\n"


def write(path: Path, *items: object) -> Path:
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def only_text(prompts: list[Prompt]) -> list[str]:
    assert all(len(p.messages) == 1 and p.messages[0].role == "user" for p in prompts)
    return [p.messages[0].content for p in prompts]


@pytest.mark.parametrize(
    ("file", "field", "name", "before", "after"),
    [
        ("gsm8k_test", "question", "gsm8k", "", BOXED),
        ("gsm8k_train", "question", "gsm8k", "", BOXED),
        ("math500", "question", "math500", "", BOXED),
        ("humaneval", "prompt", "humaneval", CODE + "```python\n", "\n```"),
        ("mbpp", "text", "mbpp", "", ""),
    ],
)
def test_sets_are_worded_as_in_the_reference(file, field, name, before, after):
    path = DATA / f"{file}.jsonl"
    items = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = load_prompts(path)
    assert only_text(prompts) == [before + item[field] + after for item in items]
    assert {p.set_name for p in prompts} == {name}
    assert [p.id for p in prompts] == [f"{name}-{i + 1}" for i in range(len(items))]
    assert only_text(load_prompts(path, field=field)) == [item[field] for item in items]


def test_turns():
    path = DATA / "mt_bench.jsonl"
    turns = [json.loads(line)["turns"] for line in path.read_text().splitlines()]
    assert only_text(load_prompts(path)) == [first for first, _ in turns]
    both = load_prompts(path, turns="all")
    assert [[m.content for m in p.messages] for p in both] == turns
    with pytest.raises(DFlashError, match="turns='last'"):
        load_prompts(path, turns="last")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gsm8k_test.jsonl.gz", "gsm8k"),
        ("HumanEval.jsonl", "humaneval"),
        ("mt_bench.jsonl", "mt_bench"),
        ("support-tickets.jsonl", "support-tickets"),
    ],
)
def test_set_name(name, expected):
    assert set_name_of(Path("some") / name) == expected


def test_limit():
    path = DATA / "math500.jsonl"
    assert load_prompts(path, limit=3) == load_prompts(path)[:3]
    assert len(load_prompts(path, limit=99)) == 10
    with pytest.raises(DFlashError, match="limit=0"):
        load_prompts(path, limit=0)


def test_limit_reads_no_further(tmp_path):
    assert len(load_prompts(write(tmp_path / "a.jsonl", {"prompt": "x"}, "{broken"), limit=1)) == 1


def test_gzip(tmp_path):
    packed = tmp_path / "humaneval.jsonl.gz"
    packed.write_bytes(gzip.compress((DATA / "humaneval.jsonl").read_bytes()))
    assert load_prompts(packed) == load_prompts(DATA / "humaneval.jsonl")


def test_unknown_set_is_plain_and_braces_survive(tmp_path):
    text = "a {b} {} \\boxed{} %s"
    assert only_text(load_prompts(write(tmp_path / "own.jsonl", {"prompt": text}))) == [text]
    worded = only_text(load_prompts(write(tmp_path / "gsm8k.jsonl", {"question": text})))
    assert worded == [text + BOXED]


def test_line_separators_inside_strings_and_blank_lines(tmp_path):
    text = "one\u2028two\x85three"
    line = json.dumps({"prompt": text}, ensure_ascii=False)
    path = write(tmp_path / "own.jsonl", "\ufeff" + line, "", "  ", line + "\r")
    assert [p.id for p in load_prompts(path)] == ["own-1", "own-4"]
    assert only_text(load_prompts(path)) == [text, text]


def test_chat_messages_are_kept(tmp_path):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi", "name": "ignored"},
    ]
    (prompt,) = load_prompts(write(tmp_path / "gsm8k.jsonl", {"messages": chat}))
    assert [(m.role, m.content) for m in prompt.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]


def test_dumped_messages_are_read_back(tmp_path):
    prompts = load_prompts(DATA / "gsm8k_train.jsonl")
    items = [{"messages": prompt.model_dump()["messages"]} for prompt in prompts]
    again = load_prompts(write(tmp_path / "gsm8k_own.jsonl", *items))
    assert [p.messages for p in again] == [p.messages for p in prompts]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2 is not JSON"),
        ("[1]", "line 2 is a list"),
        ({"q": "x"}, r"line 2 has the fields \['q'\] but not one of messages, turns"),
        ({"prompt": ""}, "line 2 has prompt=''"),
        ({"prompt": " \n"}, "line 2 has prompt="),
        ({"prompt": None}, "line 2 has prompt=None"),
        ({"turns": []}, r"line 2 has turns=\[\]"),
        ({"turns": [""]}, "line 2 has turns="),
        ({"messages": []}, "line 2 has malformed messages"),
        ({"messages": "hi"}, "line 2 has malformed messages"),
        ({"messages": [{"role": "user"}]}, "line 2 has malformed messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "line 2 has malformed messages"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(DFlashError, match=f"bad.jsonl' {message}"):
        load_prompts(path)


def test_missing_field_is_named():
    with pytest.raises(DFlashError, match=r"mbpp.jsonl' line 1 has the fields .* but not 'story'"):
        load_prompts(DATA / "mbpp.jsonl", field="story")


def test_bad_files(tmp_path):
    with pytest.raises(DFlashError, match=r"absent\.jsonl' is not a file"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(DFlashError, match="holds no prompt"):
        load_prompts(write(tmp_path / "empty.jsonl", "", " "))
    packed = gzip.compress(b'{"prompt": "x"}\n' * 50)
    flipped = packed[:12] + bytes([packed[12] ^ 255]) + packed[13:]
    for broken in (b"plain", packed[:-9], flipped):
        (tmp_path / "broken.gz").write_bytes(broken)
        with pytest.raises(DFlashError, match=r"broken\.gz' cannot be read"):
            load_prompts(tmp_path / "broken.gz")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DFlashError, match="give UTF-8 JSONL"):
        load_prompts(tmp_path / "latin.jsonl")


def test_prompt_is_a_conversation_or_text():
    prompt = Prompt.user("hi", id="a", set_name="own")
    assert prompt.messages == (Message(role="user", content="hi"),)
    with pytest.raises(ValidationError, match="frozen"):
        prompt.id = "b"
    with pytest.raises(ValidationError, match="either messages or text"):
        Prompt(id="a")
    with pytest.raises(ValidationError, match="either messages or text"):
        Prompt(id="a", messages=prompt.messages, text="hi")


class CharTokenizer:
    """A token a character; 1 is its BOS."""

    def __init__(self, chat_template: str | None):
        self.chat_template = chat_template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **options):
        assert not tokenize
        assert add_generation_prompt
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"
        return text + "".join(f"{name}={value}" for name, value in options.items())

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(c) for c in text]


def test_encode_applies_the_chat_template_without_a_second_bos():
    ids = encode(CharTokenizer("yes"), Prompt.user("hi"))
    assert ids == [ord(c) for c in "<user>hi<assistant>"]
    assert encode(CharTokenizer("yes"), [Message(role="user", content="hi")]) == ids


@pytest.mark.parametrize("thinking", [True, False])
def test_encode_tells_the_template_whether_to_think(thinking):
    ids = encode(CharTokenizer("yes"), Prompt.user("hi"), thinking)
    assert "".join(map(chr, ids)) == f"<user>hi<assistant>enable_thinking={thinking}"


def test_encode_without_a_template_or_of_raw_text():
    assert encode(CharTokenizer(None), Prompt.user("hi")) == [1, ord("h"), ord("i")]
    assert encode(CharTokenizer("yes"), Prompt(id="r", text="hi")) == [1, ord("h"), ord("i")]


def test_encode_with_smollm2(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    (prompt,) = load_prompts(DATA / "gsm8k_test.jsonl", limit=1)
    ids = encode(tokenizer, prompt)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        f"<|im_start|>user\n{prompt.messages[0].content}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert encode(tokenizer, Prompt(id="raw", text="x = 12")) == tokenizer.encode("x = 12")
