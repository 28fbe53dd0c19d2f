"""Tokenizer over folders built here: files and their precedence, special tokens, chats, and errors."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from narrows.errors import CheckpointError, ConfigError
from narrows.text import Tokenizer as FolderTokenizer

CORPUS = ["the narrow road, the wide road", "straße 你好 привет 😀 नमस्ते", "def f(x):\n    return x + 1\n"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "the road"}]


def byte_level(*, bos=False):
    """A byte-level BPE with three special tokens, trained on the corpus; with ``bos`` put first by a post-processor."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    return backend


@pytest.fixture
def folder(tmp_path):
    """Writes a folder: the tokenizer, and JSON files by name without ending."""

    def write(backend=None, template=None, **files):
        (backend or byte_level()).save(str(tmp_path / "tokenizer.json"))
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return write


@pytest.mark.parametrize("text", ["", *CORPUS, "<|im_start|>user\nthe<|im_end|>"])
def test_decode_undoes_encode(folder, text):
    tokenizer = FolderTokenizer.from_folder(folder())
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_special_tokens_are_ids_in_text_and_skipped_in_decode(folder):
    tokenizer = FolderTokenizer.from_folder(folder())
    ids = tokenizer.encode("the<|im_end|>")
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode([*ids, 10**6]) == "the"  # padded logits may yield an id without a token


def test_bos_is_added_once(folder):
    tokenizer = FolderTokenizer.from_folder(folder(byte_level(bos=True), template="{{ '<|im_start|>x' }}"))
    plain = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.encode("the") == [1, *plain]
    assert tokenizer.encode_chat(HELLO).count(1) == 1


@pytest.mark.parametrize("in_file", [False, True], ids=["tokenizer.json adds none", "tokenizer.json adds bos"])
@pytest.mark.parametrize("bos", [None, False, True])
@pytest.mark.parametrize("eos", [None, False, True])
def test_the_config_says_whether_bos_and_eos_are_added(folder, in_file, bos, eos):
    flags = {"add_bos_token": bos, "add_eos_token": eos}
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    path = folder(byte_level(bos=in_file), "{{ bos_token }}the", tokenizer_config=config | flags)
    tokenizer = FolderTokenizer.from_folder(path)
    plain = tokenizer.encode("the", add_special_tokens=False)
    assert plain and 1 not in plain and 2 not in plain
    begin, end = [1] * (in_file if bos is None else bos), [2] * bool(eos)
    assert tokenizer.encode("the") == [*begin, *plain, *end]
    assert tokenizer.encode("") == [*begin, *end]
    assert tokenizer.added_around == (len(begin), len(end))
    assert tokenizer.encode_chat(HELLO) == [1, *plain]  # the template's own
    if not in_file:  # a chat's text, sent as a plain prompt
        assert tokenizer.encode("<|im_start|>the") == [1, *plain, *end]


def test_saved_truncation_and_padding_are_off(folder):
    backend = byte_level()
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=50)
    tokenizer = FolderTokenizer.from_folder(folder(backend))
    assert tokenizer.decode(tokenizer.encode(CORPUS[1])) == CORPUS[1]


def test_eos_ids_are_those_of_all_files(folder):
    path = folder(
        generation_config={"eos_token_id": [2, 7]},
        config={"eos_token_id": 0},
        tokenizer_config={"eos_token": {"__type": "AddedToken", "content": "<|im_start|>"}},
    )
    tokenizer = FolderTokenizer.from_folder(path)
    assert tokenizer.eos_ids == {0, 1, 2, 7}
    assert tokenizer.eos_token == "<|im_start|>"


def test_eos_ids_of_a_nested_or_silent_config(folder):
    tokenizer = FolderTokenizer.from_folder(folder(config={"text_config": {"eos_token_id": 5}}, generation_config={}))
    assert tokenizer.eos_ids == {5}


@pytest.mark.parametrize("ids", ["2", [2, None], -1, True])
def test_eos_ids_must_be_ids(folder, ids):
    with pytest.raises(CheckpointError, match="eos_token_id is"):
        FolderTokenizer.from_folder(folder(config={"eos_token_id": ids}))


def test_tokens_that_only_the_config_has_are_added(folder):
    size = byte_level().get_vocab_size()
    path = folder(
        tokenizer_config={
            "bos_token": "<bos>",
            "additional_special_tokens": ["<tool>"],
            "added_tokens_decoder": {str(size): {"content": "<think>", "special": False}},
        }
    )
    tokenizer = FolderTokenizer.from_folder(path)
    assert tokenizer.encode("<think><bos><tool>") == [size, size + 1, size + 2]
    assert tokenizer.decode([size, size + 1, size + 2]) == "<think>"
    assert tokenizer.vocab_size == size + 3


def test_special_tokens_map_counts_without_added_tokens_decoder(folder):
    tokenizer = FolderTokenizer.from_folder(folder(special_tokens_map={"eos_token": "<|im_end|>"}))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_ids == {2}


def test_vocab_size_covers_the_highest_id(folder):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    backend.add_tokens([AddedToken("<x>")])
    assert FolderTokenizer.from_folder(folder(backend)).vocab_size == 10
    assert FolderTokenizer.from_folder(folder(backend)).encode("b") == [9]


def test_half_a_surrogate_pair_is_an_error(folder):
    with pytest.raises(ConfigError, match=r"character 3 of 5 is half of a surrogate pair \(U\+D83D\)"):
        FolderTokenizer.from_folder(folder()).encode("the\ud83d!")


# -- chat templates ---------------------------------------------------------------------------------------------------


def test_chat_template_and_its_ids(folder):
    tokenizer = FolderTokenizer.from_folder(folder(tokenizer_config={"chat_template": CHATML}))
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(HELLO) == "<|im_start|>user\nthe road<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(HELLO, add_generation_prompt=False).endswith("<|im_end|>\n")
    ids = tokenizer.encode_chat(HELLO)
    assert ids[0] == 1 and ids.count(2) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.apply_chat_template(HELLO)


def test_template_file_wins_and_tools_pick_theirs(folder):
    path = folder(template="file", tokenizer_config={"chat_template": CHATML})
    assert FolderTokenizer.from_folder(path).apply_chat_template(HELLO) == "file"
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].name }}")
    tokenizer = FolderTokenizer.from_folder(path)
    assert tokenizer.apply_chat_template(HELLO) == "file"
    assert tokenizer.apply_chat_template(HELLO, tools=[{"name": "add"}]) == "add"


def test_templates_listed_by_name(folder):
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    tokenizer = FolderTokenizer.from_folder(folder(tokenizer_config={"chat_template": named}))
    assert tokenizer.apply_chat_template(HELLO) == "one"
    assert tokenizer.apply_chat_template(HELLO, tools=[]) == "two"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<|im_start|><|im_end|>"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'b': '<ü>', 'a': none} | tojson }}", '{"b": "<ü>", "a": null}'),
        ("{{ {'a': [1]} | tojson(indent=1, separators=(',', ':')) }}", '{\n "a":[\n  1\n ]\n}'),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{% set n = namespace(k=1) %}{% set n.k = 2 %}{{ n.k }}{{ dict(a=3).a }}", "23"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ messages[0].content is defined }}{{ tools is none }}{{ mood }}", "TrueTrueglad"),
        ("{{ messages[0].tool_calls is defined }}{{ messages[0].reasoning_content }}", "Falsewhy"),
    ],
)
def test_template_functions_that_checkpoints_use(folder, template, text):
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = FolderTokenizer.from_folder(folder(template=template, tokenizer_config=named))
    message = {"role": "user", "content": "x", "tool_calls": None, "reasoning": "why"}
    assert tokenizer.apply_chat_template([message], variables={"mood": "glad"}) == text


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[0].content + missing }}", "'missing' is undefined"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set n = namespace(__init__=1) %}", "namespace"),
    ],
)
def test_a_failing_template_is_a_one_line_error(folder, template, problem):
    tokenizer = FolderTokenizer.from_folder(folder(template=template))
    with pytest.raises(ConfigError, match=problem) as caught:
        tokenizer.apply_chat_template(HELLO)
    assert "\n" not in str(caught.value)


def test_chat_errors(folder):
    tokenizer = FolderTokenizer.from_folder(folder())
    assert not tokenizer.has_chat_template
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizer.encode_chat(HELLO)
    tokenizer = FolderTokenizer.from_folder(folder(template="x"))
    with pytest.raises(ConfigError, match="at least one message"):
        tokenizer.encode_chat([])
    with pytest.raises(ConfigError, match="must be an object"):
        tokenizer.encode_chat(["hello"])


# -- folders that are wrong -------------------------------------------------------------------------------------------


def test_folder_errors_name_the_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        FolderTokenizer.from_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json; download it"):
        FolderTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"it has tokenizer.model, .*save_pretrained"):
        FolderTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("generation_config.json", "[]", "holds a JSON list"),
        ("tokenizer_config.json", '{"eos_token": 3}', "a special token is 3"),
        ("tokenizer_config.json", '{"eos_token": {"content": "x", "lstrip": "no"}}', "a special token is"),
        ("tokenizer_config.json", '{"chat_template": 3}', "neither a text nor"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', "neither a text nor"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a", "template": 3}]}', "neither a text nor"),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["x"]}', "added_tokens_decoder is"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "must be a token id"),
        ("tokenizer_config.json", '{"additional_special_tokens": "x"}', "further special tokens are 'x'"),
        ("tokenizer_config.json", '{"additional_special_tokens": [["x"]]}', "a special token is"),
        ("tokenizer_config.json", '{"split_special_tokens": "no"}', "split_special_tokens is 'no'; it must be true"),
        ("tokenizer_config.json", '{"add_bos_token": 1}', "add_bos_token is 1; it must be true or false"),
        ("tokenizer_config.json", '{"add_bos_token": true}', "add_bos_token is true, but no bos_token is named"),
        ("tokenizer_config.json", '{"add_eos_token": true, "eos_token": null}', "but no eos_token is named"),
        ("chat_template.jinja", "{% for %}", "is not valid"),
    ],
)
def test_broken_files_are_named(folder, name, content, problem):
    path = folder()
    (path / name).write_text(content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        FolderTokenizer.from_folder(path)
    assert str(path) in str(caught.value)


def test_the_room_needs_no_torch():
    check = "import sys, narrows.text; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def sentencepiece(*, fallback=True, normalizer=None):
    """BPE with a leading ▁, as Llama 2's; ``fallback``: unknown text becomes bytes, else one unknown token."""
    alphabet = [*sorted({c for line in CORPUS for c in line} - {" "}), "▁"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=fallback,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizer or normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def composing():
    """Byte-level BPE of composed characters: the text's own bytes may be three times as many."""
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    return backend


TEXTS = st.text(st.sampled_from("the road, é😀\u1112\u1161\u11ab\u0301\n\ud7ff"), max_size=60) | st.text(max_size=40)


@pytest.mark.parametrize("build", [byte_level, sentencepiece, composing])
@settings(deadline=None)
@given(text=TEXTS)
def test_a_texts_length_bounds_its_tokens_from_below(build, text):
    tokenizer = loaded(build)
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


@cache
def loaded(build):
    with tempfile.TemporaryDirectory() as folder:
        build().save(f"{folder}/tokenizer.json")
        return FolderTokenizer.from_folder(folder)


@pytest.mark.parametrize("build", [byte_level, sentencepiece, composing])
def test_the_bound_of_a_long_text_is_close(build):
    tokenizer = loaded(build)
    text = "the road " * 10_000
    assert tokenizer.fewest_tokens(text) > len(tokenizer.encode(text, add_special_tokens=False)) / 40


def strips_around_a_token():
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|pad|>", lstrip=True)])
    return backend


def unknown_is_one_token():
    return sentencepiece(fallback=False)


def strips():
    return sentencepiece(normalizer=normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" ", "▁")]))


def drops_spaces():
    backend = sentencepiece(normalizer=normalizers.NFC())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def removes():
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (strips_around_a_token, " " * 5000 + "<|pad|>"),
        (unknown_is_one_token, "龜" * 5000),
        (strips, " " * 5000 + "the"),
        (drops_spaces, " " * 5000 + "the"),
        (removes, " " * 5000 + "the"),
    ],
)
def test_tokenizers_that_drop_or_merge_text_have_no_bound(build, text):
    tokenizer = loaded(build)
    assert len(tokenizer.encode(text, add_special_tokens=False)) < 10
    assert tokenizer.fewest_tokens(text) == 0


@pytest.mark.slow
def test_other_threads_run_while_a_long_text_is_encoded_or_decoded():
    """Counted, not timed: a thread that only counts gets its turns while one call is made."""
    tokenizer = loaded(byte_level)
    text = "the narrow road, the wide road " * 40_000
    for call in (lambda: tokenizer.encode(text), lambda: tokenizer.decode([5] * 1_500_000)):
        turns, begun, done = [0], threading.Event(), threading.Event()

        def count(turns=turns, begun=begun, done=done):
            while not done.is_set():
                turns[0] += 1
                begun.set()
                time.sleep(0)

        thread = threading.Thread(target=count)
        thread.start()
        begun.wait()
        before = turns[0]
        call()
        after = turns[0]
        done.set()
        thread.join()
        assert after - before > 20
