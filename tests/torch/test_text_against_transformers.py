"""Tokenizer against transformers' AutoTokenizer on the same folders: ids, decoded text and rendered chats."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from narrows.text import Tokenizer as FolderTokenizer

TEXTS = [
    "",
    " ",
    "the narrow road  leads\n\n\tto 1234567890 places",
    "def f(x: int) -> int:\n    return x**2  # 3.14e-5",
    "straße 你好、世界 привет नमस्ते ﷺ 😀👩‍👩‍👧 é vs e\u0301 \u00a0\u200b\ufffd",
    "<s>user<|im_end|> the<s></s>the <think>why</think> <tool>",
    "\x00\x07\r\n",
]
CHAT = [
    {"role": "system", "content": "Be <brief> & kind"},
    {"role": "user", "content": "the road"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"x": "ü"}}}]},
    {"role": "tool", "content": "3", "reasoning": "because"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b 'q'", "parameters": {}}}]
TEMPLATE = """{{- bos_token }}
{%- if tools %}
    {{- tools | tojson(indent=2) }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- set ns.last = loop.index0 %}
    {%- if message.tool_calls is defined %}
        {{- '<|im_start|>' + message.role + (message.tool_calls | tojson) + eos_token }}
        {%- continue %}
    {%- endif %}
    {% generation %}<|im_start|>{{ message.role }}: {{ message['content'] | trim }}{{ message.reasoning_content }}
    {%- endgeneration %}
{%- endfor %}
  {% if add_generation_prompt %}
{{ ns.last }} {{ pad_token }} {{ mood }}<|im_start|>assistant
  {% endif %}
"""


def train(backend, alphabet):
    """Teach ``backend`` a few hundred merges, after three special tokens."""
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS[2:5], trainer)
    return backend


def byte_level():
    """SmolLM2's kind: digits alone, byte-level, nothing added."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return train(backend, pre_tokenizers.ByteLevel.alphabet())


def byte_level_with_bos():
    """Llama 3's kind: the post-processor puts bos first; an added token that is not special."""
    backend = byte_level()
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]),
        ]
    )
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<tool>", lstrip=True)])
    return backend


def sentencepiece():
    """Llama 2's kind: U+2581 for spaces, byte tokens, bos first, the first space dropped in decode."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"theroadnw", "th", "\u2581th"]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [("t", "h"), ("\u2581", "th")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
CONFIGS = {
    "plain": {},
    "named": NAMED,
    "a flag nobody heeds": {**NAMED, "clean_up_tokenization_spaces": True},
    "tokens of the config": {**NAMED, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    "roles of its own": {
        **NAMED,
        "image_token": "<image>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
    },
    "other flags": {
        **NAMED,
        "added_tokens_decoder": {
            "1": {"content": "<s>", "lstrip": True, "normalized": False, "special": True},
            "2": {"content": "</s>", "rstrip": True, "normalized": False, "special": False},
        },
    },
    "special tokens split": {**NAMED, "split_special_tokens": True},
}


@pytest.fixture
def pair(tmp_path):
    """Both libraries' tokenizer of one folder."""

    def load(build, config, **files):
        build().save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        for name, value in {"config": {"model_type": "llama"}, "tokenizer_config": config, **files}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return FolderTokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)

    return load


@pytest.mark.parametrize("build", [byte_level, byte_level_with_bos, sentencepiece])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_ids_and_text_are_equal(pair, build, config):
    ours, theirs = pair(build, config)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("build", [byte_level, byte_level_with_bos, sentencepiece])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_and_eos_equal_transformers_with_explicit_flags(tmp_path, build, bos, eos):
    """transformers 5 drops the flags of the file, and obeys its caller's: the rule that version 4 had for both."""
    flags = {"add_bos_token": bos, "add_eos_token": eos}
    build().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMED | flags))
    ours = FolderTokenizer.from_folder(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **NAMED, **flags)
    for text in TEXTS:
        if not text.startswith("<s>") and not text.endswith("</s>"):
            assert ours.encode(text) == theirs.encode(text), text


def test_special_tokens_map_alone(pair):
    ours, theirs = pair(byte_level, {}, special_tokens_map={"eos_token": "</s>", "bos_token": {"content": "<new>"}})
    assert ours.encode("<new>the</s>") == theirs.encode("<new>the</s>")
    assert ours.eos_ids == {theirs.eos_token_id}
    assert ours.bos_token == theirs.bos_token


@pytest.mark.parametrize("build", [byte_level_with_bos, sentencepiece])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_chats_are_equal(pair, build, tools, prompt):
    ours, theirs = pair(build, {**NAMED, "chat_template": TEMPLATE})
    text = ours.apply_chat_template(CHAT, add_generation_prompt=prompt, tools=tools, variables={"mood": "glad"})
    wanted = {"add_generation_prompt": prompt, "tools": tools, "mood": "glad"}
    assert text == theirs.apply_chat_template(CHAT, tokenize=False, **wanted)
    ids = ours.encode_chat(CHAT, add_generation_prompt=prompt, tools=tools, variables={"mood": "glad"})
    assert ids == theirs.apply_chat_template(CHAT, return_dict=False, **wanted)
    assert ids.count(1) == 1
