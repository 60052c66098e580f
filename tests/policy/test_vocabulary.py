import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dtvla.errors import UserError
from dtvla.policy.vocabulary import Vocabulary, train_tokenizer

TEXTS = ["pick up the alphabet soup", "the gripper is above the red bowl, on the left. next: move down.", "think: "]
PUBLISHED_CONFIG = {
    "text_config": {"vocab_size": 257157},
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "image_token_index": 257152,
    "think_start_token_index": 257153,
    "think_end_token_index": 257154,
    "action_start_token_index": 257155,
    "action_end_token_index": 257156,
    "action_token_begin_idx": 254976,
    "action_token_end_idx": 257023,
}


def test_published_config_gives_the_published_ids() -> None:
    words = Vocabulary.from_config(PUBLISHED_CONFIG)
    assert (words.think_start_id, words.action_end_id, words.size) == (257153, 257156, 257157)
    assert words.bins().encode(__import__("torch").tensor([-1.0, 1.0])).tolist() == [257023, 254976]
    assert words.to_config() == {k: v for k, v in PUBLISHED_CONFIG.items() if k != "text_config"}
    assert set(words.banned_in_thought) == {1, *range(254976, 257024)}


def test_small_tokenizer_has_the_published_order_of_ids() -> None:
    tokenizer = train_tokenizer(TEXTS, action_count=64)
    words = Vocabulary.from_tokenizer(tokenizer, 64)
    assert (words.pad_id, words.eos_id, words.bos_id) == (0, 1, 2)
    base = tokenizer.vocab_size
    assert words.action_first_id + words.action_count == words.image_id == base
    assert [words.think_start_id, words.think_end_id, words.action_start_id, words.action_end_id] == [
        base + i for i in range(1, 5)
    ]
    assert words.size == len(tokenizer)
    tags = tokenizer.decode(words.control_ids, skip_special_tokens=True)
    assert tags == "<think></think><action></action>"


def test_table_may_have_more_rows_than_there_are_tokens_but_not_fewer() -> None:
    tokenizer = train_tokenizer(TEXTS, action_count=8)
    plain, padded = (Vocabulary.from_tokenizer(tokenizer, 8, size) for size in (None, len(tokenizer) + 100))
    assert padded.size == plain.size + 100
    assert padded.to_config() == plain.to_config()
    with pytest.raises(UserError, match="model.vocabulary_size"):
        Vocabulary.from_tokenizer(tokenizer, 8, len(tokenizer) - 1)


def test_words_of_the_corpus_are_single_tokens_and_all_text_round_trips() -> None:
    tokenizer = train_tokenizer(TEXTS, action_count=8)
    for word in ["gripper", "bowl", "alphabet", "soup"]:
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
    for text in [*TEXTS, "unseen wörds 42!\n"]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)).strip() == text.strip()


def test_no_text_reaches_the_action_band() -> None:
    tokenizer = train_tokenizer(TEXTS, action_count=64)
    words = Vocabulary.from_tokenizer(tokenizer, 64)
    rng = np.random.default_rng(0)
    texts = ["<bin_0003>", *("".join(map(chr, rng.integers(1, 500, 60))) for _ in range(50))]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert not [i for i in ids if words.action_first_id <= i < words.action_first_id + 64]


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(TEXTS[1].split(), 6)) for _ in range(40)]
    one, two = train_tokenizer(texts, 8, 300), train_tokenizer([*reversed(texts), texts[0]], 8, 300)
    assert one.get_vocab() == two.get_vocab()
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()


def test_saved_tokenizer_is_the_same(tmp_path) -> None:  # noqa: ANN001
    tokenizer = train_tokenizer(TEXTS, action_count=8)
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    Vocabulary.from_tokenizer(tokenizer, 8).check_tokenizer(again)
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_wrong_tokenizers_and_configs_are_refused() -> None:
    tokenizer = train_tokenizer(TEXTS, action_count=8)
    with pytest.raises(UserError, match="does not belong"):
        Vocabulary.from_config(PUBLISHED_CONFIG).check_tokenizer(tokenizer)
    with pytest.raises(UserError, match="think_end_token_index"):
        Vocabulary.from_config({k: v for k, v in PUBLISHED_CONFIG.items() if k != "think_end_token_index"})
    with pytest.raises(UserError, match="outside"):
        Vocabulary.from_config(PUBLISHED_CONFIG | {"text_config": {"vocab_size": 1000}})
    with pytest.raises(UserError, match="action band"):
        Vocabulary.from_config(PUBLISHED_CONFIG | {"think_start_token_index": 255000})
    with pytest.raises(UserError, match="share an id"):
        Vocabulary.from_config(PUBLISHED_CONFIG | {"think_start_token_index": 257154})
