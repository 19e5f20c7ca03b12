"""Building tokenizers: the special tokens' ids, padding, digits, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from molmo_core.errors import CheckpointError
from molmo_core.tokens import SPECIAL_TOKENS, filler_token
from molmo_hf.tokenizer import build_tokenizer, check_tokenizer, save_tokenizer, train_tokenizer

TEXTS = ["Point to the red circle.", 'coords="1 1 512 340"', "the red circle"] * 20
BASE_SIZE = 300
BASE = train_tokenizer(TEXTS, 290)
BUILT = build_tokenizer(BASE, BASE_SIZE)


def test_special_tokens_stand_behind_the_base_vocabulary():
    ids = BUILT.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(BASE_SIZE, BASE_SIZE + 14))
    assert len(BUILT) == BASE_SIZE + 14
    assert BUILT.convert_tokens_to_ids(filler_token(0)) == len(BASE)
    assert BUILT.convert_tokens_to_ids(filler_token(BASE_SIZE - len(BASE) - 1)) == BASE_SIZE - 1


def test_every_special_token_is_one_token_wherever_it_stands():
    for offset, token in enumerate(SPECIAL_TOKENS):
        ids = BUILT(f"a{token}b {token}", add_special_tokens=False)["input_ids"]
        assert [i for i in ids if i >= BASE_SIZE] == [BASE_SIZE + offset] * 2


def test_base_ids_stay():
    text = 'Point to the red circle. coords="1 1 512 340"'
    plain = BASE(text)["input_ids"]
    assert BUILT(text)["input_ids"] == plain
    assert max(plain) < len(BASE)


def test_each_digit_is_a_token():
    assert BUILT.tokenize("512")[-3:] == ["5", "1", "2"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_any_text_comes_back(text):
    assert BUILT.decode(BUILT(text, add_special_tokens=False)["input_ids"]) == text


def test_controls():
    assert BUILT.eos_token == "<|im_end|>"
    assert BUILT.pad_token == "<|endoftext|>"
    assert BUILT.bos_token is None
    assert BUILT.padding_side == "left"
    assert BUILT.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


def test_a_bos_of_the_base_is_kept():
    base = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(BASE.backend_tokenizer.to_str()),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    assert build_tokenizer(base, BASE_SIZE).bos_token == "<|endoftext|>"


def test_saved_files_are_read_alike(tmp_path):
    save_tokenizer(BUILT, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nPoint 12 <im_patch><|im_end|>"
    assert loaded(text)["input_ids"] == BUILT(text)["input_ids"]
    assert (loaded.eos_token, loaded.pad_token, loaded.padding_side) == (
        "<|im_end|>",
        "<|endoftext|>",
        "left",
    )
    check_tokenizer(loaded, BASE_SIZE)
    settings_file = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings_file["tokenizer_class"] == "PreTrainedTokenizerFast", "4.57 knows this one"
    assert "extra_special_tokens" not in settings_file


def test_a_base_that_is_too_large_is_refused():
    with pytest.raises(CheckpointError, match="allowed are at most 280"):
        build_tokenizer(BASE, 280)


def test_a_base_without_chat_controls_is_refused():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={t: k for k, t in enumerate(alphabet)}, merges=[]))
    with pytest.raises(CheckpointError, match="im_start"):
        build_tokenizer(PreTrainedTokenizerFast(tokenizer_object=bare), BASE_SIZE)


def test_a_vocabulary_needs_room_for_bytes():
    with pytest.raises(ValueError, match="259"):
        train_tokenizer(TEXTS, 100)


def test_wrong_ids_are_found():
    with pytest.raises(CheckpointError, match="301 to 314"):
        check_tokenizer(BUILT, BASE_SIZE + 1)
