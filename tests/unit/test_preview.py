"""What people see of a row: exact text on small tokenizers."""

import io

import numpy as np
import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from caldpo_ray.preview import SHOWN_AT_EACH_END, preview
from caldpo_ray.schema import Example, Row
from caldpo_ray.tokenization import tokenise


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def tokenised(example, tokenizer, max_prompt_length=None):
    return tokenise(
        example,
        tokenizer,
        max_length=10_000,
        max_prompt_length=max_prompt_length,
        truncation="keep_end",
        row_id="0123456789abcdef",
    )


def test_a_pair(tokenizer):
    text = preview([tokenised(Example("Say\nyes", [" ok", "\n[b]"]), tokenizer)], tokenizer)
    assert text.plain == (
        "row 0123456789abcdef: 7 prompt tokens, not scored\n"
        "Say\nyes\n"
        "chosen: 4 tokens, all scored\n"
        "[ ][o][k][</s>]\n"
        "rejected: 5 tokens, all scored\n"
        "[\\n][[][b][]][</s>]\n\n"
    )


def test_everything_a_row_may_have(tokenizer):
    example = Example("abcdef", ["x", "y", "z"], scores=[1.5, 1.0, -2.0], weight=0.5, columns={"soft_label": 0.75})
    text = preview([tokenised(example, tokenizer, max_prompt_length=2)], tokenizer)
    assert text.plain == (
        "row 0123456789abcdef: 2 prompt tokens, not scored, 4 more cut by data.truncation, weight 0.5, soft_label 0.75\n"
        "ef\n"
        "response 1 of 3: 2 tokens, all scored, score 1.5\n"
        "[x][</s>]\n"
        "response 2 of 3: 2 tokens, all scored, score 1\n"
        "[y][</s>]\n"
        "response 3 of 3: 2 tokens, all scored, score -2\n"
        "[z][</s>]\n\n"
    )


def test_tokens_that_share_a_character_come_together(tokenizer):
    text = preview([tokenised(Example("q", ["早\U0001f600e"]), tokenizer)], tokenizer).plain
    assert "response: 9 tokens, all scored\n[早][\U0001f600][e][</s>]\n" in text


def test_a_character_cut_at_the_end_is_still_shown(tokenizer):
    ids = np.array(tokenizer.encode("a早")[:-1] + tokenizer.encode("b早")[:-1], np.int32)
    row = Row("r", np.array([0], np.int32), [ids], np.array([np.nan], np.float32))
    shown = preview([(row, 0)], tokenizer).plain.splitlines()[-2]
    assert shown.startswith("[a]") and "b" in shown and shown.endswith("\N{REPLACEMENT CHARACTER}]")


def test_the_middle_of_long_texts_is_left_out(tokenizer):
    n = SHOWN_AT_EACH_END
    lines = preview(
        [tokenised(Example("p" * (2 * n + 7), ["r" * (2 * n + 8)]), tokenizer)], tokenizer
    ).plain.splitlines()
    assert lines[0].endswith(f": {2 * n + 7} prompt tokens, not scored")
    assert lines[1] == "p" * n + " ... 7 tokens ... " + "p" * n
    assert lines[3] == "[r]" * n + " ... 9 tokens ... " + "[r]" * (n - 1) + "[</s>]"


def test_colours_repeat_what_the_brackets_say(tokenizer):
    text = preview([tokenised(Example("[bold]q[/bold]", ["yes"]), tokenizer)], tokenizer)
    styles = {
        style: "".join(text.plain[s.start : s.end] for s in text.spans if s.style == style)
        for style in ("dim", "green")
    }
    assert styles == {"dim": "[bold]q[/bold]", "green": "[y][e][s][</s>]"}
    plain = Console(file=io.StringIO(), width=200, no_color=True)
    plain.print(text)
    assert plain.file.getvalue() == text.plain + "\n"


def test_rows_one_after_another(tokenizer):
    rows = [tokenised(Example("q", [answer]), tokenizer) for answer in ("a", "b")]
    assert preview(rows, tokenizer).plain == "".join(preview([row], tokenizer).plain for row in rows)
