"""What is context and what is scored: boundaries, BOS and EOS, chat templates, truncation, digests."""

import gzip
import json
import struct
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from caldpo_ray.errors import InputError
from caldpo_ray.reading.formats import FORMATS
from caldpo_ray.schema import Example
from caldpo_ray.tokenization import characters_per_token, check_tokenizer, response_digest, row_id, tokenise

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|tail|>", "<|eot|>", "<think>"]
CORPUS = [
    "The meal was cooked by the chef every day. Rewrite the sentence in the passive voice, please!",
    "Question: what is the capital of France?\nAnswer: The capital city of France is Paris.\n\nHuman: thanks",
    "def read(path):\n    return path.read_text()\n",
    "早上好，你今天怎么样？谢谢你的帮助。",
]
AWKWARD = [
    Example("no space", ["between", " with one"]),
    Example("trailing space ", ["word", " two", "\nline"]),
    Example("newline\n", ["\nnewline", "  indented", "word"]),
    Example(" leading", [" \U0001f600 smile", "e\u0301 combining"]),
    Example("早上好", ["你今天", "谢谢。"]),
    Example("ends in unknown Ж", ["Ждать", " known"]),
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|tail|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
UNCLOSED = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
THINKING = (  # asks for a thinking block that an answered conversation does not show
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|tail|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|><think>\n{% endif %}"
)
PHI3 = (  # ends the conversation as well as the turn
    "{% for m in messages %}<|head|>{{ m['role'] }}<|tail|>\n{{ m['content'] }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|>\n{% else %}{{ eos_token }}{% endif %}"
)


def wrap(tokenizer, **special):
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "</s>"} | special)


def byte_bpe(**special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, **special)


def word_level(texts):
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))
    return wrap(tokenizer, unk_token="<unk>")


def sentencepiece_bpe():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, unk_token="<unk>")


def merging_bpe():
    """Without a pre-tokenizer, so that merges cross the boundary: a + b gives ab."""
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "ab"])}
    return wrap(Tokenizer(models.BPE(vocabulary, [("a", "b")])))


def with_template(tokenizer, template):
    """`template` as "<s> $A </s>": what the tokenizer puts around every text."""
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in template.split() if token != "$A"]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


@pytest.fixture(scope="module")
def bpe():
    return byte_bpe(bos_token="<s>")


def run(example, tokenizer, **changes):
    options = {"max_length": 100_000, "max_prompt_length": None, "truncation": "keep_end", "row_id": "r"}
    return tokenise(example, tokenizer, **options | changes)


def tokens(tokenizer, example, **changes):
    """Prompt and responses as lists of token texts."""
    row, _ = run(example, tokenizer, **changes)
    return [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in (row.prompt_ids, *row.response_ids)]


def decoded(tokenizer, example, **changes):
    row, _ = run(example, tokenizer, **changes)
    return [tokenizer.decode(ids.tolist()) for ids in (row.prompt_ids, *row.response_ids)]


def chat(*contents):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, contents, strict=False)]


def real_examples(name, format_name, count):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name} beside the checkout")
    data = path.read_bytes()
    examples = []
    for record in json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)[:count]:
        try:
            examples.append(FORMATS[format_name](record))
        except ValueError:
            continue
    return examples


def plain_examples():
    name = "llms-from-scratch/instruction-data-with-preference.json"
    return AWKWARD + real_examples(name, "alpaca", 300)


# Plain text


def check_invariants(example, tokenizer):
    row, num_cut = run(example, tokenizer)
    prompt_ids, eos = row.prompt_ids.tolist(), tokenizer.eos_token_id
    assert num_cut == 0
    assert prompt_ids == tokenizer(example.prompt)["input_ids"]  # what a model gets when it is asked
    assert len(row.response_ids) == len(example.responses)
    for ids in row.response_ids:
        assert ids.dtype == np.int32
        assert ids[-1] == eos and eos not in ids[:-1]
    return [tokenizer.decode([*prompt_ids, *ids[:-1].tolist()]) for ids in row.response_ids]


@pytest.mark.parametrize("examples", [lambda: AWKWARD, plain_examples], ids=["awkward", "real"])
def test_bytes_round_trip(bpe, examples):
    for example in examples():
        assert check_invariants(example, bpe) == [example.prompt + response for response in example.responses]


def test_words_round_trip():
    examples = [*plain_examples()[len(AWKWARD) :], Example("one word", ["two words", "three"])]
    tokenizer = word_level([text for example in examples for text in (example.prompt, *example.responses)])
    for example in examples:
        for text, response in zip(check_invariants(example, tokenizer), example.responses, strict=True):
            assert "".join(text.split()) == "".join((example.prompt + response).split())


def test_merge_across_the_boundary_keeps_the_prompt_and_hides_nothing():
    assert tokens(merging_bpe(), Example("ca", ["bc", "c"])) == [["c", "a"], ["b", "c", "</s>"], ["c", "</s>"]]


def test_merge_inside_a_response_is_not_touched():
    assert tokens(merging_bpe(), Example("c", ["ab", "b"])) == [["c"], ["ab", "</s>"], ["b", "</s>"]]


def test_unknown_end_of_prompt_does_not_swallow_the_response():
    tokenizer = word_level(["known words here"])
    assert tokens(tokenizer, Example("known strange", ["words here", " words"])) == [
        ["known", "<unk>"],
        ["words", "here", "</s>"],
        ["words", "</s>"],
    ]


def test_sentencepiece_does_not_invent_a_space():
    tokenizer = sentencepiece_bpe()
    for prompt, response in [("The chef ", "was"), ("The chef", " was"), ("The ch", "ef was"), ("The chef\n", "was")]:
        row, _ = run(Example(prompt, [response]), tokenizer)
        assert tokenizer.decode([*row.prompt_ids, *row.response_ids[0][:-1]]) == prompt + response


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [
        ("<s> $A", "ab", ["<s>", "ab"]),
        ("<s> $A", "<s>ab", ["<s>", "ab"]),  # the text has it already
        ("<s> $A </s>", "ab", ["<s>", "ab"]),
        ("$A </s>", "ab", ["ab"]),
        ("</s> $A", "ab", ["</s>", "ab"]),  # OPT begins texts with its EOS
        ("$A", "ab", ["ab"]),
    ],
)
def test_bos_as_the_tokenizer_does_it_and_eos_once(template, prompt, expected):
    tokenizer = with_template(merging_bpe(), template)
    assert tokens(tokenizer, Example(prompt, ["c", "cc"])) == [expected, ["c", "</s>"], ["c", "c", "</s>"]]


def test_eos_in_the_text():
    tokenizer = merging_bpe()
    assert tokens(tokenizer, Example("c", ["ab</s>", "b"]))[1] == ["ab", "</s>"]
    for example in (Example("c", ["a</s>b"]), Example("c", ["a</s></s>"])):
        with pytest.raises(ValueError, match=r"^a response contains the end of a turn$"):
            run(example, tokenizer)
    with pytest.raises(ValueError, match=r"^empty response$"):
        run(Example("c", ["</s>"]), tokenizer)


def test_rows_without_tokens_to_score_are_refused():
    tokenizer = merging_bpe()  # knows a, b and c, and drops what it does not know
    for example, reason in [
        (Example("xyz", ["a"]), "the prompt has no tokens"),
        (Example("a", ["xyz"]), "a response has no tokens"),
        (Example("a", ["cx", "cy"]), "responses have equal tokens"),
    ]:
        with pytest.raises(ValueError) as caught:
            run(example, tokenizer)
        assert str(caught.value) == reason


def test_the_rest_of_the_row():
    example = Example("c", ["a", "b"], scores=[2.0, 0.5], weight=3.0, columns={"soft_label": 0.75})
    row, _ = run(example, merging_bpe(), row_id="abc")
    assert (row.row_id, row.weight, row.columns) == ("abc", 3.0, {"soft_label": 0.75})
    assert row.response_scores.dtype == np.float32 and row.response_scores.tolist() == [2.0, 0.5]
    unscored, _ = run(Example("c", ["a", "b"]), merging_bpe())
    assert unscored.response_scores.shape == (2,) and np.isnan(unscored.response_scores).all()


# Chat templates


@pytest.mark.parametrize(
    ("template", "prompt", "yes", "no"),
    [
        (CHATML, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>", " no<|im_end|>"),
        (LLAMA3, "<s><|head|>user<|tail|>\n\nq<|eot|><|head|>assistant<|tail|>\n\n", "yes<|eot|>", "no<|eot|>"),
        (ZEPHYR, "<|user|>\nq</s>\n<|assistant|>\n", "yes</s>", " no</s>"),
        (UNCLOSED, "### user:\nq\n\n### assistant:\n", "yes</s>", " no</s>"),
        (THINKING, "<s><|head|>user<|tail|>q</s><|head|>assistant<|tail|>", "yes</s>", " no</s>"),
        (PHI3, "<|head|>user<|tail|>\nq<|eot|>\n<|head|>assistant<|tail|>\n", "yes<|eot|>", " no<|eot|>"),
        (
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }} (end of turn){{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}",
            "[user]q (end of turn)</s>[assistant]",
            "yes (end of turn)</s>",
            " no (end of turn)</s>",
        ),
    ],
    ids=["chatml", "llama3", "zephyr", "unclosed", "thinking", "phi3", "words"],
)
def test_template_boundary_and_one_end_of_turn(template, prompt, yes, no):
    tokenizer = with_template(byte_bpe(bos_token="<s>", chat_template=template), "<s> $A")
    assert decoded(tokenizer, Example(chat("q"), ["yes", " no"])) == [prompt, yes, no]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, ZEPHYR], ids=["chatml", "llama3", "zephyr"])
def test_tokens_are_those_of_apply_chat_template(template):
    tokenizer = byte_bpe(bos_token="<s>", chat_template=template)
    examples = real_examples("llama-factory/dpo_zh_demo.json.gz", "sharegpt", 40)
    for example in [Example(chat("早上好", "a", "q\n"), ["谢谢", "yes\nyes"]), *examples]:
        row, _ = run(example, tokenizer)
        asked = tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, return_dict=False)
        assert row.prompt_ids.tolist() == asked
        for response, ids in zip(example.responses, row.response_ids, strict=True):
            whole = [*example.prompt, {"role": "assistant", "content": response}]
            answered = tokenizer.apply_chat_template(whole, return_dict=False)
            newline = tokenizer.encode("\n", add_special_tokens=False) if template != LLAMA3 else []
            assert [*asked, *ids.tolist(), *newline] == answered


def test_first_word_after_a_special_token_is_marked_as_the_template_marks_it():
    tokenizer = sentencepiece_bpe()
    template = THINKING.replace("<think>\n", "")
    prompt, answer = tokens(tokenizer, Example(chat("The chef"), ["was"]), chat_template=template)
    assert (prompt[-1], "".join(answer)) == ("<|tail|>", "\u2581was</s>")


def test_response_of_several_turns_is_scored_as_a_whole():
    tokenizer = byte_bpe(chat_template=CHATML)
    example = Example(chat("q"), [chat("", "a", "r", "b")[1:], chat("", "c")[1:]])
    _, first, second = decoded(tokenizer, example)
    assert first == "a<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    assert second == "c<|im_end|>"


def test_template_of_the_config_wins():
    tokenizer = byte_bpe(chat_template=CHATML)
    prompt, *_ = decoded(tokenizer, Example(chat("q"), ["yes"]), chat_template=UNCLOSED)
    assert prompt == "### user:\nq\n\n### assistant:\n"


@pytest.mark.parametrize(
    ("template", "responses", "reason"),
    [
        (CHATML, ["a<|im_end|>b"], "a response contains the end of a turn"),
        (LLAMA3, ["a<|eot|>"], "a response contains the end of a turn"),
        (LLAMA3, ["a</s>"], "a response contains the end of a turn"),
        ("{{ raise_exception('roles must alternate') }}", ["a"], "the chat template refuses the conversation: roles"),
        ("{{ messages[0]['content'] }}", ["a"], "the chat template does not write the answer"),
        ("{{ messages | length }}" + CHATML, ["a"], "the chat template writes an answered prompt differently"),
        (
            CHATML.replace("<|im_end|>", "{% if loop.index < 3 %}<|im_end|>{% endif %}"),
            [chat("", "a", "r", "b")[1:]],
            "the chat template writes an answered prompt differently",
        ),
        (
            CHATML.replace("assistant", "model"),
            ["a"],
            "the chat template writes an answered prompt differently",
        ),
    ],
)
def test_template_and_conversation_do_not_fit(template, responses, reason):
    with pytest.raises(ValueError, match=f"^{reason}") as caught:
        run(Example(chat("q"), responses), byte_bpe(chat_template=template))
    assert not isinstance(caught.value, InputError)


def test_chat_template_with_plain_text_is_not_ignored(bpe):
    with pytest.raises(ValueError, match=r"^data.chat_template is set, but the row is plain text$"):
        run(Example("q", ["a"]), bpe, chat_template=CHATML)


def test_unusable_tokenizers_and_templates(bpe):
    with pytest.raises(
        InputError, match=r"data hold chat messages and it has no chat template: set data.chat_template"
    ):
        run(Example(chat("q"), ["a"]), bpe)
    with pytest.raises(InputError, match=r"no end-of-sequence token.*set eos_token"):
        run(Example("q", ["a"]), byte_bpe(eos_token=None))
    with pytest.raises(InputError, match=r"data.chat_template: not a valid Jinja template"):
        run(Example(chat("q"), ["a"]), bpe, chat_template="{% for m in %}")
    check_tokenizer(bpe, needs_chat_template=False)
    with pytest.raises(InputError, match="no chat template"):
        check_tokenizer(bpe, needs_chat_template=True)


# Truncation: tokens of prompt "abcabc" are ab c ab c


@pytest.mark.parametrize(
    ("truncation", "max_length", "max_prompt_length", "kept", "num_cut"),
    [
        ("keep_end", 8, None, ["<s>", "ab", "c", "ab", "c"], 0),
        ("keep_end", 7, None, ["<s>", "c", "ab", "c"], 1),
        ("keep_end", 5, None, ["<s>", "c"], 3),
        ("keep_start", 7, None, ["<s>", "ab", "c", "ab"], 1),
        ("keep_start", 5, None, ["<s>", "ab"], 3),
        ("keep_end", 100, 3, ["<s>", "ab", "c"], 2),
        ("keep_start", 100, 3, ["<s>", "ab", "c"], 2),
        ("keep_end", 5, 4, ["<s>", "c"], 3),
        ("error", 8, 5, ["<s>", "ab", "c", "ab", "c"], 0),
    ],
)
def test_truncation_cuts_only_the_prompt(truncation, max_length, max_prompt_length, kept, num_cut):
    tokenizer = with_template(merging_bpe(), "<s> $A")
    row, cut = run(
        Example("abcabc", ["ab" * 2, "c"]),  # the longest response has 3 tokens with EOS
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation=truncation,
    )
    texts = [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in (row.prompt_ids, *row.response_ids)]
    assert texts == [kept, ["ab", "ab", "</s>"], ["c", "</s>"]]
    assert cut == num_cut


@pytest.mark.parametrize(
    ("truncation", "max_length", "max_prompt_length", "reason"),
    [
        (
            "keep_end",
            4,
            None,
            "the longest response leaves no room for the prompt within data.max_length",
        ),  # only BOS would stay
        ("keep_start", 3, None, "the longest response leaves no room for the prompt within data.max_length"),
        ("error", 2, None, "the longest response leaves no room for the prompt within data.max_length"),
        ("error", 7, None, "the prompt is too long"),
        ("error", 100, 4, "the prompt is too long"),
    ],
)
def test_rows_that_cannot_fit(truncation, max_length, max_prompt_length, reason):
    tokenizer = with_template(merging_bpe(), "<s> $A")
    with pytest.raises(ValueError) as caught:
        run(
            Example("abcabc", ["abab", "c"]),
            tokenizer,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            truncation=truncation,
        )
    assert str(caught.value) == reason


def test_truncation_keeps_bos_and_header_of_a_chat():
    tokenizer = byte_bpe(bos_token="<s>", chat_template=LLAMA3)
    header = "<|head|>assistant<|tail|>\n\n"
    example = Example(chat("zxy" * 20), ["yes"])
    whole, _ = run(example, tokenizer)
    for truncation in ("keep_end", "keep_start"):
        prompt, response = decoded(tokenizer, example, max_prompt_length=40, truncation=truncation)
        assert prompt.startswith("<s>") and prompt.endswith(header) and response == "yes<|eot|>"
        row, num_cut = run(example, tokenizer, max_prompt_length=40, truncation=truncation)
        assert (len(row.prompt_ids), num_cut) == (40, len(whole.prompt_ids) - 40)
        assert ("user" in prompt) == (truncation == "keep_start")


def test_truncation_never_takes_a_token_of_a_response(bpe):
    for example in plain_examples():
        whole, _ = run(example, bpe)
        longest = max(map(len, whole.response_ids))
        for truncation in ("keep_end", "keep_start"):
            row, num_cut = run(example, bpe, max_length=longest + 2, truncation=truncation)
            assert [ids.tolist() for ids in row.response_ids] == [ids.tolist() for ids in whole.response_ids]
            assert len(row.prompt_ids) == min(2, len(whole.prompt_ids)) == len(whole.prompt_ids) - num_cut


# Digests


def test_row_ids_are_digests_of_source_and_number():
    assert row_id("data/train.jsonl", 0) == blake2b(b"data/train.jsonl\x000", digest_size=8).hexdigest()
    ids = {row_id(source, index) for source in ("a", "a1", "a\x001") for index in range(1000)}
    assert len(ids) == 3000 and {len(digest) for digest in ids} == {16}


def test_response_digest_names_prompt_and_response():
    prompt, response = np.array([1, -2, 300], np.int32), np.array([70000, 5], np.int32)
    expected = blake2b(struct.pack("<2i", 3, 2) + struct.pack("<5i", 1, -2, 300, 70000, 5), digest_size=16).digest()
    assert response_digest(prompt, response) == expected
    assert response_digest(prompt.astype(np.int64), response.astype(">i4")) == expected
    ids = np.concatenate([prompt, response])
    assert len({response_digest(ids[:cut], ids[cut:]) for cut in range(6)}) == 6
    assert response_digest(prompt, response[::-1]) != expected


def sentencepiece_with_bytes():
    """As Llama 2: spaces become a letter, and what has no token its bytes."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a", "▁▁", "▁▁▁▁"]
    merges = [("a", "b"), ("▁", "a"), ("▁", "▁"), ("▁▁", "▁▁")]
    vocabulary = {token: i for i, token in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")


def composing_bpe():
    """As Qwen: bytes of composed characters, pieces cut by an expression."""
    tokenizer = byte_bpe()
    tokenizer._tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated")
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_bpe, sentencepiece_with_bytes, composing_bpe])
def test_no_token_stands_for_more_characters_than_its_tokenizer_says(make):
    tokenizer, texts = (
        make(),
        [*CORPUS, " " * 100, "ab" * 50, "\u03b1\u0313\u0300\u0345" * 30, "e\u0301", "<|im_start|>", "\0\n"],
    )
    for text in texts:
        num_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert num_tokens * characters_per_token(tokenizer) >= len(text)


def test_tokenizers_that_may_drop_or_join_text_have_no_such_number():
    swallowing, cutting = byte_bpe(), byte_bpe()
    swallowing.add_tokens([AddedToken("<mask>", lstrip=True)])
    cutting._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), cutting._tokenizer.pre_tokenizer]
    )
    stripping = byte_bpe()
    stripping._tokenizer.normalizer = normalizers.Strip()
    for tokenizer in (word_level(CORPUS), sentencepiece_bpe(), merging_bpe(), swallowing, cutting, stripping):
        assert characters_per_token(tokenizer) is None


def test_a_response_that_cannot_fit_is_refused_before_it_is_tokenised(bpe):
    """An empty prompt is found when it is tokenised: a response that is far too long comes first, another does not."""
    room = 8 * characters_per_token(bpe)
    for length, reason in ((room + 1, "leaves no room"), (room, "the prompt has no tokens")):
        with pytest.raises(ValueError, match=reason):
            run(Example("", ["x" * length]), bpe, max_length=8)
