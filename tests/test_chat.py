"""Labels by spans: the templates of the major families, over a tokenizer that cuts inside words."""

from functools import cache
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from connectors.errors import VlmError
from vlm_encoders.vlm.chat import VICUNA_TEMPLATE, answer_spans, render, tokenize_with_labels

LOOP = "{% for m in messages %}"
CHATML = (
    LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<s>" + LOOP + "<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no such role') }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<s>"
    + LOOP
    + "<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|/turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
PHI = (
    LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEMPLATES: dict[str, tuple[str | None, str]] = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot|>"),
    "mistral": (MISTRAL, "</s>"),
    "gemma": (GEMMA, "<|/turn|>"),
    "phi": (PHI, "<|end|>"),
    "vicuna": (None, "</s>"),
}
MARKS = ("<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<|turn|>", "<|/turn|>")
PHI_MARKS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
ANSWERS = ("It is a reddish-brown fox, jumping.", "Twelve; unbelievably many 🦊!")
CONVERSATION = [
    {"role": "user", "content": "What animal do you see?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "How many are there?"},
    {"role": "assistant", "content": ANSWERS[1]},
]


@cache
def trained() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = [f"{turn['content']} {turn['role']}: the quick brown fox jumps over the lazy dog" for turn in CONVERSATION]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    result: str = core.to_str()
    return result


def make_tokenizer(template: str | None) -> Any:
    from tokenizers import AddedToken, Tokenizer

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained()),
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=list(MARKS),
    )
    # Phi's marks are added tokens that stand in no named list.
    made.add_tokens([AddedToken(mark, special=True) for mark in PHI_MARKS])
    made.chat_template = template
    return made


def supervised_runs(labels: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    previous = -100
    for label in labels:
        if label != -100:
            if previous == -100:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return runs


@pytest.mark.parametrize("family", TEMPLATES)
def test_answers_and_their_end_of_turn_are_supervised_and_nothing_else(family: str) -> None:
    template, end = TEMPLATES[family]
    tokenizer = make_tokenizer(template)
    ids, labels = tokenize_with_labels(tokenizer, CONVERSATION)
    assert tokenizer.decode(ids) == render(tokenizer, CONVERSATION)
    assert all(label in {-100, token} for token, label in zip(ids, labels, strict=True))
    runs = supervised_runs(labels)
    assert [tokenizer.decode(run).lstrip(" ") for run in runs] == [answer + end for answer in ANSWERS]
    assert all(tokenizer.decode(run[-1:]) == end for run in runs)
    # The tokenizer really cuts words, or spans at their edges would prove nothing.
    assert all(len(run) > len(answer.split()) + 3 for run, answer in zip(runs, ANSWERS, strict=True))


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_prompt_is_what_stands_before_the_answer_in_training(family: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[family][0])
    ids, labels = tokenize_with_labels(tokenizer, CONVERSATION)
    prompt = tokenizer(render(tokenizer, CONVERSATION[:3], generation_prompt=True), add_special_tokens=False)
    first = max(place for place in range(1, len(ids)) if labels[place - 1] == -100 != labels[place])
    assert prompt["input_ids"] == ids[:first]


@pytest.mark.parametrize("family", TEMPLATES)
def test_an_empty_answer_is_its_end_of_turn(family: str) -> None:
    template, end = TEMPLATES[family]
    tokenizer = make_tokenizer(template)
    messages = [CONVERSATION[0], {"role": "assistant", "content": ""}]
    _, labels = tokenize_with_labels(tokenizer, messages)
    assert [tokenizer.decode(run).strip() for run in supervised_runs(labels)] == [end]


@pytest.mark.parametrize("family", ["chatml", "llama3", "phi", "vicuna"])
def test_a_system_turn_is_not_supervised(family: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[family][0])
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATION[:2]]
    ids, labels = tokenize_with_labels(tokenizer, messages)
    assert "Be brief." in tokenizer.decode(ids)
    [run] = supervised_runs(labels)
    assert tokenizer.decode(run).lstrip(" ").startswith(ANSWERS[0])


@pytest.mark.parametrize("family", ["gemma", "mistral"])
def test_a_template_without_system_role_refuses_it_in_a_sentence(family: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATION[:2]]
    with pytest.raises(VlmError, match="refuses a conversation of roles system, user, assistant"):
        tokenize_with_labels(make_tokenizer(TEMPLATES[family][0]), messages)


def test_without_a_template_the_turns_are_vicunas() -> None:
    tokenizer = make_tokenizer(None)
    messages = [{"role": "system", "content": "A chat."}, *CONVERSATION]
    assert render(tokenizer, messages) == (
        "<s>A chat. USER: What animal do you see? ASSISTANT: It is a reddish-brown fox, jumping.</s>"
        "USER: How many are there? ASSISTANT: Twelve; unbelievably many 🦊!</s>"
    )
    assert render(tokenizer, messages[:2], generation_prompt=True).endswith("see? ASSISTANT:")


def test_a_template_that_leaves_earlier_answers_out_is_refused() -> None:
    dropping = LOOP + "{{ m.role }}: {{ m.content if loop.last or m.role == 'user' else '...' }}</s>{% endfor %}"
    with pytest.raises(VlmError, match=r"writes the content of turn 2 \(assistant\) 0 times"):
        tokenize_with_labels(make_tokenizer(dropping), CONVERSATION)


def test_an_answer_without_a_token_of_its_own_is_refused() -> None:
    # Neither an end of turn nor text: nothing could be learned, and nobody would be told.
    bare = LOOP + "{{ m.role }}:{{ m.content }}{% if loop.last and m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    messages = [CONVERSATION[0], {"role": "assistant", "content": ""}, *CONVERSATION[:2]]
    tokenizer = make_tokenizer(bare + "{% if add_generation_prompt %}assistant:{% endif %}")
    with pytest.raises(VlmError, match="1 of 2 answers have no token of their own"):
        tokenize_with_labels(tokenizer, messages)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(VlmError, match="need a fast tokenizer, this one is slow"):
        tokenize_with_labels(Slow(), CONVERSATION)


def test_a_token_that_straddles_the_edge_is_not_supervised() -> None:
    # The answer's first newline melts with the template's into one token.
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(["\n\n"])
    messages = [CONVERSATION[0], {"role": "assistant", "content": "\nfox"}]
    text, [(start, end)] = answer_spans(tokenizer, messages)
    assert text[start:end] == "\nfox<|im_end|>"
    _, labels = tokenize_with_labels(tokenizer, messages)
    [run] = supervised_runs(labels)
    assert tokenizer.decode(run) == "fox<|im_end|>"


def test_named_templates_are_understood() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": LLAMA3}
    assert render(tokenizer, CONVERSATION[:1]) == "<|im_start|>user\nWhat animal do you see?<|im_end|>\n"
    assert "USER: " in VICUNA_TEMPLATE
