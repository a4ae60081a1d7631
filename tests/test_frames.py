from __future__ import annotations

import logging

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from raise_env.encoding import Encoder
from raise_env.errors import SettingError
from raise_env.frames import PLAIN_TEMPLATE, ChatFrame, PlainFrame
from raise_env.pool import Instruction

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% else %}{{ m['content'] }}\n{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: What ends the conversation is more than what ends a turn.
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{{ m['content'] | trim }}[eot]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
#: Each answer begins with an empty thought.
THINKING = CHATML.replace(
    "\n{{ m['content'] }}",
    "\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)
#: ChatML again, which itself says what is learned.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: As Llama 3.2 has it.
DATED = (
    "{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date = '26 Jul 2024' %}{%- endif %}Today Date: {{ date }}\n" + CHATML
)

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]

ONE = Instruction("What is 2 + 2?", "It is 4.")
TWO = Instruction("And plus 1?", "5, of course: ß", earlier=(("What is 2 + 2?", "4"),))
HEADED = Instruction("Go on. ", " Well >", system="You are short.", earlier=(("a", "b"), ("c d", "e\nf")))


@pytest.fixture(scope="module")
def make_tokenizer():
    """Return a function that gives a tokenizer a chat template; its tokens go over blanks and line breaks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    texts = [f"assistant\n\nIt is 4. {i}\n### Response:\nIt is {i}: of course [/INST] It is" for i in range(20)]
    tokenizer.train_from_iterator(texts, trainer)

    def make(template):
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        made.chat_template = template
        return made

    return make


def learned(encoder, row):
    """Return what is learned of a row as texts, one for each stretch of labels."""
    tokens, is_label = encoder.encode([row]).row(0)
    texts, before = [], False
    stretch = []
    for token, label in [*zip(tokens, is_label, strict=True), (0, False)]:
        if label:
            stretch.append(token)
        elif before:
            texts.append(encoder.tokenizer.decode(stretch))
            stretch = []
        before = bool(label)
    return texts


def chat(row):
    head = [{"role": "system", "content": row.system}] if row.system else []
    turns = [
        {"role": role, "content": text}
        for pair in row.exchanges
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return head + turns


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        (CHATML, ONE, ["It is 4.<|im_end|>"]),
        (CHATML, TWO, ["4<|im_end|>", "5, of course: ß<|im_end|>"]),
        (CHATML, HEADED, ["b<|im_end|>", "e\nf<|im_end|>", " Well ><|im_end|>"]),
        (MARKED, TWO, ["4<|im_end|>", "5, of course: ß<|im_end|>"]),
        (MARKED, HEADED, ["b<|im_end|>", "e\nf<|im_end|>", " Well ><|im_end|>"]),
        (LLAMA, ONE, ["It is 4.<|eot_id|>"]),
        (LLAMA, HEADED, ["b<|eot_id|>", "e\nf<|eot_id|>", "Well ><|eot_id|>"]),
        (MISTRAL, ONE, [" It is 4.</s>"]),
        (MISTRAL, HEADED, [" b</s>", " e\nf</s>", "  Well ></s>"]),
        (GEMMA, TWO, ["4<end_of_turn>", "5, of course: ß<end_of_turn>"]),
        (QWEN, ONE, ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"]),
        (QWEN, HEADED, ["b<|im_end|>", "e\nf<|im_end|>", "<think>\n\n</think>\n\n Well ><|im_end|>"]),
    ],
)
def test_encode__chat_template__is_what_it_gives_and_learns_every_answer(make_tokenizer, template, row, expected):
    encoder = Encoder(make_tokenizer(template), 1000)
    tokens, _ = encoder.encode([row]).row(0)
    assert tokens.tolist() == encoder.tokenizer.apply_chat_template(chat(row))["input_ids"]
    text = encoder.tokenizer.apply_chat_template(chat(row), tokenize=False)
    # A token that begins in the frame and ends in the answer is learned whole.
    for found, answer in zip(learned(encoder, row), expected, strict=True):
        assert found.endswith(answer)
        assert found.removesuffix(answer) in ("", "\n", "t\n")
    before = encoder.prompt_text(row)
    assert text.startswith(before)
    assert text[len(before) :].startswith(expected[-1])


def test_encode__marked_template__learns_what_it_marks(make_tokenizer):
    encoder = Encoder(make_tokenizer(MARKED), 1000)
    assert encoder.tokenizer.decode(encoder.encode([TWO]).tokens).count("<|im_end|>") == 4
    wanted = encoder.tokenizer.apply_chat_template(chat(TWO), return_dict=True, return_assistant_tokens_mask=True)
    assert encoder.encode([TWO]).is_label.tolist() == [bool(bit) for bit in wanted["assistant_masks"]]
    marks_nothing = MARKED.replace(
        "{{ m['content'] }}<|im_end|>{% endgeneration %}", "{% endgeneration %}{{ m['content'] }}"
    )
    with pytest.raises(SettingError, match="marks nothing of the conversation 'And plus 1"):
        Encoder(make_tokenizer(marks_nothing), 1000).encode([ONE, TWO][1:])


@pytest.mark.parametrize("trims", [True, False])
def test_encode__marked_answer_that_begins_or_ends_with_a_blank__loses_neither_itself_nor_later_ones(
    make_tokenizer, trims
):
    from tokenizers import processors

    marked = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    tokenizer = make_tokenizer(marked)
    # Where places are trimmed, no token stands for a blank at the beginning of a word.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    row = Instruction("c", " 6 ", earlier=(("a", " 4"), ("b", "5"), ("b", "7 ")))
    assert (tokenizer([" 4"]).char_to_token(0, 0) is None) == trims
    found = learned(Encoder(tokenizer, 1000), row)
    assert [text.strip() for text in found] == ["4", "5", "7", "6"]
    # An answer without any token leaves the others as they are.
    blank = ChatFrame(tokenizer)._tokenized([chat(Instruction("c", "6", earlier=(("a", " "),)))])
    (tokens,), (mask,) = blank
    assert tokenizer.decode([token for token, is_label in zip(tokens, mask, strict=True) if is_label]).strip() == "6"


def test_encode__template_that_asks_for_the_date__has_the_same_tokens_on_any_day(make_tokenizer):
    encoder = Encoder(make_tokenizer(DATED), 1000)
    tokens, _ = encoder.encode([TWO]).row(0)
    date, _, text = encoder.tokenizer.decode(tokens).partition("\n")
    assert date == "Today Date: 26 Jul 2024", "as where there is no strftime_now"
    assert text == encoder.tokenizer.apply_chat_template(chat(TWO), tokenize=False).partition("\n")[2]
    assert encoder.prompt_text(TWO).startswith("Today Date: 26 Jul 2024\n")
    # What was kept under the template alone has the tokens of some other day.
    assert encoder.key == {"template": DATED + "{# today is 2024-07-26 #}", "encoding": 2}
    assert Encoder(make_tokenizer(CHATML), 1000).key == {"template": CHATML, "encoding": 2}


def test_encode__template_without_an_end__appends_the_end_token_and_learns_it(make_tokenizer):
    bare = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert learned(Encoder(make_tokenizer(bare), 1000), TWO) == ["4", "5, of course: ß\n</s>"]
    mark = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}\n{% endgeneration %}{% else %}"
    marked = bare.replace("{{ m['content'] }}\n", mark + "{{ m['content'] }}\n{% endif %}")
    assert learned(Encoder(make_tokenizer(marked), 1000), TWO) == ["4\n", "5, of course: ß\n</s>"]


def test_encode__tokens_over_the_boundary__are_learned(make_tokenizer):
    tokenizer = make_tokenizer(None)
    encoder = Encoder(tokenizer, 1000, "Q: {{ prompt }}\n### Response:\n")
    row = Instruction("x", "It is 4.")
    whole = tokenizer("Q: x\n### Response:\nIt is 4.", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("Q: x\n### Response:\n", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt, "the tokenizer puts the end of the frame and the response together"
    tokens, is_label = encoder.encode([row]).row(0)
    assert tokens.tolist() == [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
    text = tokenizer.decode(tokens[is_label])
    assert text.endswith("It is 4.</s>")
    assert len(text) < len("### Response:\nIt is 4.</s>")
    assert encoder.key != Encoder(tokenizer, 9, "{{ prompt }}").key
    assert "encoding" in encoder.key


def test_encode__first_token_of_a_row__is_never_learned(make_tokenizer):
    tokenizer = make_tokenizer(None)
    tokenizer.bos_token = None
    encoder = Encoder(tokenizer, 1000, "{{ prompt }}")
    tokens, is_label = encoder.encode([Instruction("It", " is 4.")]).row(0)
    assert tokens[0] == tokenizer("It is 4.", add_special_tokens=False)["input_ids"][0]
    assert is_label.tolist() == [False] + [True] * (len(tokens) - 1)


SUMS = Instruction("And what is 4 + 4?", " 8", earlier=(("What is 1 + 3?", " 4"),))


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        # A later turn says the same, as the answer was before it was trimmed.
        (BRACKETS, SUMS, ["4[eot]", "8[eot]"]),
        (LLAMA, SUMS, ["4<|eot_id|>", "8<|eot_id|>"]),
        (BRACKETS, Instruction("Yes then go on.", "No", earlier=(("Well?", "Yes "),)), ["Yes[eot]", "No[eot]"]),
        (
            CHATML,
            Instruction("Yes then go on.", "No", earlier=(("Well?", "Yes "),)),
            ["Yes <|im_end|>", "No<|im_end|>"],
        ),
        # The template says the same before the answer, or after it.
        (
            THINKING,
            Instruction("think", "think", earlier=(("What do you do?", "think"),)),
            ["<think>\n\n</think>\n\nthink<|im_end|>"] * 2,
        ),
        (
            CHATML,
            Instruction("end", "end", earlier=(("a", "end"), ("b", "user"))),
            ["end<|im_end|>", "user<|im_end|>", "end<|im_end|>"],
        ),
        (
            BRACKETS,
            Instruction("eot", "eot", earlier=(("a", "\n\neot"), ("eot", "]"))),
            ["eot[eot]", "][eot]", "eot[eot]"],
        ),
    ],
)
def test_framed__answer_that_others_say_too__ends_where_it_ends(make_tokenizer, template, row, expected):
    (framed,) = ChatFrame(make_tokenizer(template)).framed([row])
    assert [framed.text[slice(*span)] for span in framed.spans] == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PHI, ["b<|end|>", "e\nf<|end|>", " Well ><|end|>\n</s>"]),
        (PHI.replace("<|end|>\n", "<|end|>"), ["b<|end|>", "e\nf<|end|>", " Well ><|end|></s>"]),
        # Nothing ends a turn: what ends the conversation is not learned before its end.
        (PHI.replace("<|end|>", ""), ["b", "e\nf", " Well >\n</s>"]),
    ],
)
def test_framed__conversation_that_ends_in_more_than_a_turn__earlier_answers_learn_their_end(
    make_tokenizer, template, expected
):
    (framed,) = ChatFrame(make_tokenizer(template)).framed([HEADED])
    assert [framed.text[slice(*span)] for span in framed.spans] == expected


@pytest.mark.parametrize("row", [ONE, TWO, HEADED])
@pytest.mark.parametrize("template", [CHATML, MARKED, None])
def test_encode__slow_tokenizer__learns_the_same_characters(row, template):
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = template
    expected = {None: "</s>"}.get(template, "<|im_end|>")
    assert learned(Encoder(tokenizer, 1000), row) == [answer + expected for _, answer in row.exchanges]


# Errors


def test_encode__template_that_refuses__its_own_words_and_the_row(make_tokenizer):
    encoder = Encoder(make_tokenizer(GEMMA), 1000)
    with pytest.raises(
        SettingError, match=r"begins 'You are short\.', with the roles system, user.*System role not supp"
    ):
        encoder.encode([ONE, HEADED])


def test_encode__beginning_is_shown_in_another_way__is_an_error(make_tokenizer):
    counted = "{{ messages | length }} turns: " + CHATML
    with pytest.raises(SettingError, match="in another way once it is answered"):
        Encoder(make_tokenizer(counted), 1000).encode([ONE])


def test_encode__response_is_changed_or_missing__is_an_error(make_tokenizer):
    upper = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | replace('It', 'THAT') }}")
    with pytest.raises(SettingError, match=r"does not show the response 'It is 4\.'"):
        Encoder(make_tokenizer(upper), 1000).encode([ONE])
    none = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' }}")
    with pytest.raises(SettingError, match="does not show"):
        Encoder(make_tokenizer(none), 1000).encode([ONE])
    # What is said instead, or what follows, is not taken for an earlier answer.
    row = Instruction("That was no 4", "5", earlier=(("2 + 2?", "4"),))
    for shown in (
        "'four' if m['content'] == '4' else m['content']",
        "m['content'] if m['role'] == 'user' or loop.last",
    ):
        with pytest.raises(SettingError, match="does not show the response '4' as it is"):
            Encoder(make_tokenizer(CHATML.replace("m['content']", shown)), 1000).encode([row])


def test_chat_frame__without_marks__says_once_that_it_falls_back(make_tokenizer, caplog):
    with caplog.at_level(logging.INFO, logger="raise_env"):
        encoder = Encoder(make_tokenizer(CHATML), 1000)
        encoder.encode([ONE, TWO])
        encoder.encode([HEADED])
        ChatFrame(make_tokenizer(MARKED))
    assert [record.message for record in caplog.records if "{% generation %}" in record.message] == [
        "the chat template has no {% generation %} mark: learned is what it adds between an open conversation and the "
        "answered one"
    ]


def test_encode__template_that_marks_the_system_text__is_an_error(base):
    encoder = Encoder(base.tokenizer, 256)
    encoder.encode([ONE, TWO])
    with pytest.raises(SettingError, match=r"not an answer as generated: system texts, such as 'You are short\.'"):
        encoder.encode([ONE, HEADED])


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_chat_frame__system_that_the_template_never_shows__is_an_error(make_tokenizer, template):
    hidden = template.replace("messages %}", "messages if m['role'] != 'system' %}")
    encoder = Encoder(make_tokenizer(hidden), 1000)
    encoder.encode([ONE, TWO])
    encoder.prompt_text(TWO)
    message = r"never shows a system text, but there are rows with one, such as 'You are short\.'.*--template"
    with pytest.raises(SettingError, match=message):
        encoder.encode([ONE, HEADED])
    with pytest.raises(SettingError, match=message):
        encoder.prompt_text(HEADED)


# The plain frame


def test_plain_frame__exchanges__follow_each_other_each_ended():
    frame = PlainFrame(PLAIN_TEMPLATE, "</s>")
    (framed,) = frame.framed([HEADED])
    assert framed.text == (
        "You are short.\n\n### Instruction:\na\n\n### Response:\nb</s>### Instruction:\nc d\n\n### Response:\ne\nf</s>"
        "### Instruction:\nGo on. \n\n### Response:\n Well >"
    )
    assert [framed.text[slice(*span)] for span in framed.spans] == ["b</s>", "e\nf</s>", " Well >"]
    assert not framed.is_ended
    assert frame.prompt_text(HEADED) == framed.text.removesuffix(" Well >")


def test_plain_frame__without_system__is_what_it_always_was():
    assert PlainFrame(PLAIN_TEMPLATE, "</s>").prompt_text(ONE) == "### Instruction:\nWhat is 2 + 2?\n\n### Response:\n"


def test_plain_frame__response_that_ends_in_the_end_token__keeps_it():
    (framed,) = PlainFrame("{{ prompt }}", "</s>").framed([Instruction("a", "b</s>")])
    assert framed.text == "ab</s>"
    assert framed.spans == ((1, 6),)


def test_plain_frame__system_that_the_template_never_shows__is_an_error():
    frame = PlainFrame("Q: {{ prompt }}\nA: ", "</s>")
    assert frame.prompt_text(ONE) == "Q: What is 2 + 2?\nA: "
    with pytest.raises(SettingError, match=r"never shows \{\{ system \}\}, .* such as 'You are short\.'"):
        frame.framed([ONE, HEADED])
    assert PlainFrame("{{ system }}{{ prompt }}", "</s>").prompt_text(Instruction("a", "b", system="s")) == "sa"


def test_encode__plain_frame__learns_every_answer_and_its_end(make_tokenizer):
    encoder = Encoder(make_tokenizer(None), 1000, "{{ system }}|{{ prompt }}|")
    tokens, _ = encoder.encode([HEADED]).row(0)
    assert encoder.tokenizer.decode(tokens) == "<s>You are short.|a|b</s>|c d|e\nf</s>|Go on. | Well ></s>"
    assert learned(encoder, HEADED) == ["b</s>", "e\nf</s>", " Well ></s>"]


def test_key__embedded_model__is_the_template_alone(base):
    encoder = Encoder(base.tokenizer, 256)
    assert encoder.key == {"template": base.tokenizer.chat_template}, "or cached features would be computed again"
    assert Encoder(base.tokenizer, 256, "{{ prompt }}").key == {"template": "{{ prompt }}"}
