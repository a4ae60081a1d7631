from __future__ import annotations

import hashlib
import logging

import numpy as np
import pytest
import torch

from raise_env.encoding import EncodedRows, Encoder, collate, token_batches
from raise_env.errors import OutputError, SettingError
from raise_env.frames import PLAIN_TEMPLATE
from raise_env.pool import Instruction, Pool, SpilledRows
from raise_env.tiny.task import generate_task

ROWS = [Instruction("What is 2 + 2?", "4"), Instruction("Größe?", "12 Meter, ß"), Instruction("Say {{ prompt }}", "no")]


#: What the embedded task's rows were encoded to when prompt and response were still tokenised apart.
EMBEDDED = {
    "pool": ["72476059f0fe7231", "662961fea898e4b1"],
    "dev": ["4884c4e7a9b03e93", "5a240d28e4add3f8"],
    "test": ["d442ed7e94fb1961", "32a0df108121b618"],
}


@pytest.fixture(scope="module")
def encoder(base):
    return Encoder(base.tokenizer, 256)


def plain(encoder, template=None, max_length=256):
    """An encoder whose tokenizer has no chat template."""
    return Encoder(without_chat_template(encoder.tokenizer), max_length, template)


def without_chat_template(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    return other


def test_encode__chat_template__learns_the_response_and_the_end_token_alone(encoder):
    rows = encoder.encode(ROWS)
    assert len(rows) == 3
    for index, row in enumerate(ROWS):
        tokens, is_label = rows.row(index)
        messages = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}]
        wanted = encoder.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert tokens.tolist() == wanted["input_ids"]
        assert is_label.tolist() == [bool(bit) for bit in wanted["assistant_masks"]]
        learned = encoder.tokenizer.decode(tokens[is_label])
        assert learned == row.response + encoder.tokenizer.eos_token


@pytest.mark.parametrize("name", ["pool", "dev", "test"])
def test_encode__embedded_task__tokens_and_labels_are_what_they_ever_were(encoder, name):
    rows = encoder.encode(getattr(generate_task("default", seed=0, pool_size=2000), name))
    digests = [hashlib.sha256(part.tobytes()).hexdigest()[:16] for part in (rows.tokens, rows.label_counts)]
    assert digests == EMBEDDED[name]
    # Learned is the end of each row.
    wanted = EncodedRows.of_lengths(rows.tokens, rows.lengths, rows.label_counts)
    np.testing.assert_array_equal(rows.is_label, wanted.is_label)
    assert not rows.is_cut.any()


def test_encode__no_chat_template__puts_the_plain_frame_around_the_prompt(encoder):
    rows = plain(encoder).encode(ROWS[:1])
    tokens, is_label = rows.row(0)
    text = encoder.tokenizer.decode(tokens)
    assert text == "<s>### Instruction:\nWhat is 2 + 2?\n\n### Response:\n4</s>"
    assert encoder.tokenizer.decode(tokens[is_label]) == "4</s>"


def test_encode__template_of_ones_own__replaces_the_chat_template(encoder):
    own = Encoder(encoder.tokenizer, 256, "Q: {{ prompt }}\nA: ")
    assert own.prompt_text(Instruction("why {{ x }}?", "so")) == "Q: why {{ x }}?\nA: "
    assert encoder.tokenizer.decode(own.encode(ROWS[:1]).row(0)[0]) == "<s>Q: What is 2 + 2?\nA: 4</s>"


def test_description__different_frames__are_different_cache_keys(encoder):
    texts = {encoder.description, plain(encoder).description, plain(encoder, "{{ prompt }}").description}
    assert len(texts) == 3
    assert plain(encoder).description == PLAIN_TEMPLATE


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ prompt", "does not compile"),
        ("no blank", "never shows"),
        ("{{ prompt.__class__.__mro__ }}", "does not compile"),  # the sandbox forbids it
    ],
)
def test_encoder__bad_template__is_said_at_once(base, template, said):
    with pytest.raises(SettingError, match=said):
        Encoder(base.tokenizer, 256, template)


def test_encode__longer_than_the_limit__is_cut_and_counted(encoder, caplog):
    short = Encoder(encoder.tokenizer, 30)
    with caplog.at_level(logging.INFO, logger="raise_env"):
        rows = short.encode([Instruction("a" * 5, "b" * 30), Instruction("a" * 99, "b"), Instruction("a", "b")])
    assert rows.lengths.tolist() == [30, 30, len(encoder.encode([Instruction("a", "b")]).tokens)]
    assert rows.num_truncated == 2
    assert rows.has_labels.tolist() == [True, False, True]
    assert rows.label_counts[1:].tolist() == [0, 2]
    assert "2 of 3 pool rows were cut at 30 tokens" in caplog.text


def test_encode_responses__a_row__starts_with_the_start_token_alone(encoder):
    tokens, is_label = encoder.encode_responses(ROWS[:1]).row(0)
    assert encoder.tokenizer.decode(tokens) == "<s>4</s>"
    assert is_label.tolist() == [False, True, True]


ENCODED = EncodedRows.of_lengths(
    np.array([5, 6, 7, 8, 9, 4, 3], dtype=np.int32), lengths=np.array([3, 2, 2]), label_counts=np.array([2, 1, 0])
)


def test_encoded_rows__offsets__cut_the_flat_arrays_into_rows():
    assert len(ENCODED) == 3
    assert ENCODED.lengths.tolist() == [3, 2, 2]
    assert ENCODED.label_counts.tolist() == [2, 1, 0]
    assert ENCODED.has_labels.tolist() == [True, True, False]
    assert ENCODED.row(1)[0].tolist() == [8, 9]


def test_encoded_rows__mask_with_gaps_and_empty_rows__is_counted_row_by_row():
    mask = np.array([0, 1, 0, 1, 0, 0, 0, 1], dtype=bool)
    rows = EncodedRows.of_mask(np.arange(8, dtype=np.int32), np.array([4, 0, 2, 2, 0]), mask)
    assert rows.label_counts.tolist() == [2, 0, 0, 1, 0]
    part = rows.select(np.array([3, 0]))
    assert part.row(1)[1].tolist() == [False, True, False, True]
    assert part.label_counts.tolist() == [1, 2]
    assert (
        EncodedRows.of_mask(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, bool)).label_counts.tolist() == []
    )


def test_encode__conversation_that_is_cut__keeps_what_was_learned_before(encoder, caplog):
    row = Instruction("c" * 20, "d" * 20, earlier=(("a", "b"),))
    whole = encoder.encode([row])
    for length in (len(whole.tokens) - 5, len(whole.tokens) - 25, 20):
        cut = Encoder(encoder.tokenizer, length).encode([row])
        np.testing.assert_array_equal(cut.tokens, whole.tokens[:length])
        np.testing.assert_array_equal(cut.is_label, whole.is_label[:length])
        assert cut.is_cut.tolist() == [True]
    assert cut.label_counts.tolist() == [2], "the first answer and its end are left"


def test_select__some_rows__are_rows_of_their_own():
    part = ENCODED.select(np.array([2, 0]))
    assert part.lengths.tolist() == [2, 3]
    assert part.label_counts.tolist() == [0, 2]
    assert [part.row(i)[0].tolist() for i in range(2)] == [[4, 3], [5, 6, 7]]


def test_collate__rows_of_different_length__are_padded_on_the_right():
    batch = collate(ENCODED, [1, 0], pad_id=1)
    assert batch.input_ids.tolist() == [[8, 9, 1], [5, 6, 7]]
    assert batch.input_ids.dtype == torch.int64
    assert batch.is_label.tolist() == [[False, True, False], [False, True, True]]
    assert batch.targets.tolist() == [9, 6, 7]
    assert batch.keep.tolist() == [[True, False, False], [True, True, False]], "each label is predicted one before"


@pytest.mark.parametrize("max_tokens", [1, 10, 64, 10_000])
def test_token_batches__any_limit__shares_every_row_out_once(max_tokens):
    lengths = np.random.default_rng(0).integers(1, 20, 50)
    batches = token_batches(lengths, max_tokens)
    assert sorted(np.concatenate(batches)) == list(range(50))
    for places in batches:
        assert len(places) == 1 or len(places) * lengths[places].max() <= max_tokens
        assert (np.diff(lengths[np.concatenate(batches)]) <= 0).all()
    assert token_batches(np.zeros(0, dtype=np.int64), 10) == []


# Large pools


POOL_ROWS = [
    Instruction(f"What is {i} + {i}?" * (i % 5 + 1), str(2 * i) * (i % 60), earlier=(("a", "b"),) * (i % 3))
    for i in range(30)
]


def large(rows=POOL_ROWS):
    return Pool(SpilledRows(rows), "made")


@pytest.mark.parametrize("chat", [True, False])
def test_encode_pool__large__is_what_fits_into_memory_to_the_bit(encoder, tmp_path, monkeypatch, chat):
    monkeypatch.setattr("raise_env.encoding.ENCODING_BLOCK_ROWS", 4)
    short = Encoder(encoder.tokenizer, 60, None if chat else PLAIN_TEMPLATE)
    seen = []
    whole, wanted = short.encode_pool(Pool(POOL_ROWS, "made"), "key", tmp_path), short.encode(iter(POOL_ROWS))
    assert not list(tmp_path.iterdir()), "what fits into memory is not written"
    for _ in range(2):
        mapped = short.encode_pool(large(), "key", tmp_path, lambda *progress: seen.append(progress))
        assert not mapped.tokens.flags.owndata
        for rows in (whole, mapped):
            for name in ("tokens", "offsets", "is_label", "is_cut", "label_counts", "lengths", "has_labels"):
                np.testing.assert_array_equal(getattr(rows, name), getattr(wanted, name))
            assert rows.num_truncated == wanted.num_truncated > 0
            np.testing.assert_array_equal(rows.row(7)[1], wanted.row(7)[1])
    assert [done for _, done, _ in seen] == [*range(4, 30, 4), 30], "the second time nothing is encoded"
    assert {(what, total) for what, _, total in seen} == {("encoding the pool", 30)}


def test_encode_pool__anything_else_in_the_key__is_encoded_anew(encoder, tmp_path):
    short = Encoder(encoder.tokenizer, 60)
    short.encode_pool(large(), "key", tmp_path)
    short.encode_pool(large(), "another tokenizer", tmp_path)
    short.encode_pool(large(POOL_ROWS[:-1]), "key", tmp_path)
    Encoder(encoder.tokenizer, 61).encode_pool(large(), "key", tmp_path)
    plain(encoder).encode_pool(large(), "key", tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 5


def test_encode_pool__large_and_nowhere_to_write__is_an_error_that_says_what_to_do(encoder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"tokens of 30 rows .*--cache-dir"):
        encoder.encode_pool(large(), "key", tmp_path / "file")


def test_encode_choices__chat_template__gives_the_space_to_the_choice_and_no_end(encoder):
    rows = [Instruction("What?", "yes", choices=("no", "yes")), ROWS[0], Instruction("Who?", "you", choices=("you",))]
    encoded = encoder.encode_choices(rows)
    assert len(encoded) == 3, "a row without choices has none"
    decode = encoder.tokenizer.decode
    for index, (row, choice) in enumerate([(rows[0], "no"), (rows[0], "yes"), (rows[2], "you")]):
        tokens, is_label = encoded.row(index)
        assert decode(tokens) == encoder.prompt_text(row) + choice
        assert decode(tokens[is_label]) == f" {choice}"
        assert decode(tokens[~is_label]).endswith("Answer:")


def test_encode_choices__plain_frame__begins_as_training_rows_do(encoder):
    row = Instruction("What?", "yes", choices=("yes",))
    tokens, is_label = plain(encoder).encode_choices([row]).row(0)
    assert encoder.tokenizer.decode(tokens) == "<s>### Instruction:\nWhat?\n\n### Response:\nyes"
    assert encoder.tokenizer.decode(tokens[is_label]) == "\nyes"


@pytest.mark.real
def test_encode_choices__words_in_pieces__are_what_the_whole_text_has_more(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K-hf")
    row = Instruction("Once upon a", "time", choices=("time", "the", "t"))
    encoded = Encoder(tokenizer, 256, "{{ prompt }} ").encode_choices([row])
    for index, choice in enumerate(row.choices):
        tokens, is_label = encoded.row(index)
        assert tokens.tolist() == tokenizer(f"Once upon a {choice}")["input_ids"]
        assert tokens[~is_label].tolist() == tokenizer("Once upon a")["input_ids"]


def test_encode_choices__too_long__loses_the_prompts_beginning(encoder, caplog):
    row = Instruction("x" * 50, "end", choices=("end", "e" * 19, "e" * 20))
    with caplog.at_level(logging.INFO, logger="raise_env"):
        encoded = Encoder(encoder.tokenizer, 20).encode_choices([row], what="dev")
    assert encoded.lengths.tolist() == [21, 21, 21], "the last token only has to be predicted"
    assert encoder.tokenizer.decode(encoded.row(0)[0]) == "x" * 9 + "\nAnswer: end"
    # The choice with its space has 20 tokens; 21 are too many.
    assert encoded.label_counts.tolist() == [4, 20, 0]
    assert "3 of 3 dev choice rows were cut at 20 tokens" in caplog.text


def test_encode_choices__a_choice_of_no_tokens__has_no_labels(encoder):
    own = Encoder(encoder.tokenizer, 20, "{{ prompt }}:")
    assert own.encode_choices([Instruction("a", "b", choices=("", "b"))]).label_counts.tolist() == [0, 1]


def test_encode__embedded_task__gives_the_tokens_that_it_always_gave(encoder):
    import hashlib

    from raise_env.tiny.task import generate_task

    task = generate_task("default", seed=0, pool_size=500)
    digest = hashlib.sha256()
    for rows in (task.pool, task.dev, task.test):
        encoded = encoder.encode(rows)
        digest.update(encoded.tokens.tobytes() + encoded.offsets.tobytes() + encoded.label_counts.tobytes())
    assert digest.hexdigest() == "fbe6c129ed608dfeb4ada1b678579e5e2827169ee60f9b7fbe45d44d41faf41d"
