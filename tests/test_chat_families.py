"""Labels under the chat templates of the major families, over tokenizers as theirs are built.

The templates are ours; they behave as the released ones do. Their `{% generation %}` blocks
say what the model writes, which transformers reads and our code does not: that is the oracle.
"""

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.vlm.chat import VICUNA_TEMPLATE, answer_spans, render, tokenize_with_labels
from vlm_encoders.vlm.processor import VLMProcessor

Messages = list[dict[str, str]]

EACH = "{% for m in messages %}"
PASSED = (
    "{% set ask = namespace(at=0) %}"
    + EACH
    + ("{% if m.role == 'user' %}{% set ask.at = loop.index0 %}{% endif %}{% endfor %}")
)
SPLIT_SYSTEM = (
    "{% set turns = messages %}{% set order = '' %}{% if messages[0].role == 'system' %}"
    "{% set order = messages[0].content %}{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
)


def learned(body: str) -> str:
    return "{% generation %}" + body + "{% endgeneration %}"


def roles(header: str, end: str, *, start: str = "", trim: str = "", always: bool = False) -> str:
    """Give a template that writes each turn alike: a header, the content, the end of the turn and a line break."""
    mark, gap = end.rstrip("\n"), "{{ '" + "\\n" * end.count("\n") + "' }}"
    content = "{{ m.content" + trim + " }}" + mark
    prompt = header.replace("ROLE", "assistant")
    return (
        start + EACH + header.replace("ROLE", "{{ m.role }}")
        + "{% if m.role == 'assistant' %}" + learned(content) + "{% else %}" + content + "{% endif %}" + gap
        + "{% endfor %}" + (prompt if always else "{% if add_generation_prompt %}" + prompt + "{% endif %}")
    )  # fmt: skip


def mistral(user: str, lead: str, *, when: str, trim: str = "") -> str:
    said = "{% if " + when + " and order %}{{ order + '\\n\\n' }}{% endif %}{{ m.content }}"
    answer = learned(lead + "{{ m.content" + trim + " }}{{ eos_token }}")
    return (
        "{{ bos_token }}" + SPLIT_SYSTEM + "{% if m.role == 'user' %}" + user.replace("SAID", said)
        + "{% else %}" + answer + "{% endif %}{% endfor %}"
    )  # fmt: skip


def qwen3(prompt: str, *, left: str) -> str:
    """Give a template that keeps thinking in the turns after the last question alone; LEFT is what a prompt leaves."""
    think = "{% set text = m.content.split('</think>')[-1].lstrip('\\n') if '</think>' in m.content else m.content %}"
    thought = "{% set why = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') "
    thought += "if '</think>' in m.content else '' %}"
    last = "{{ '<think>\\n' }}" if left else ""
    block = ("" if left else "{{ '<think>\\n' }}") + "{{ why + '\\n</think>\\n\\n' + text }}<|im_end|>"
    return (
        PASSED + EACH + "<|im_start|>{{ m.role + '\\n' }}{% if m.role == 'assistant' %}" + think + thought
        + "{% if loop.index0 > ask.at %}" + last + learned(block)
        + "{% else %}" + learned("{{ text }}<|im_end|>") + "{% endif %}"
        + "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n" + prompt + "' }}{% endif %}"
    )  # fmt: skip


CHATML = roles("<|im_start|>ROLE{{ '\\n' }}", "<|im_end|>\n")
LLAMA3 = "<|start_header_id|>ROLE<|end_header_id|>{{ '\\n\\n' }}"
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system{{ '\\n' }}You help.<|im_end|>{{ '\\n' }}{% endif %}"
DATE = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>{{ '\\n\\nToday Date: ' }}"
    "{{ date_string if date_string is defined else '26 Jul 2024' }}{{ '\\n\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
    "<|eot_id|>"
)
GEMMA_TURN = "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}{{ '\\n' }}"
GEMMA_PROMPT = "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model{{ '\\n' }}{% endif %}"
GEMMA_ANSWER = "{% if m.role == 'assistant' %}" + learned("{{ m.content | trim }}<end_of_turn>") + "{% else %}"
REFUSE_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@dataclass(frozen=True)
class Family:
    """A template, the tokenizer that goes with it, and what an answer is beside its content.

    Attributes:
        template: with generation blocks; None for Vicuna's.
        marks: special tokens beside bos and eos.
        end: what ends the last answer.
        lead: what the model writes before the content of the last answer.
        earlier: (lead, end) of the answers before it; None where they are the same.
        core: "bytes", "spaces" (SentencePiece with a space put before each text), "plain" (without it).
        system: the template takes a system turn.
        exact: each prompt is a prefix of the training text, with and without a system turn.
        absorb: the marks take in white space behind them.
    """

    template: str | None
    end: str
    marks: tuple[str, ...] = ()
    lead: str = ""
    earlier: tuple[str, str] | None = None
    core: str = "bytes"
    system: bool = True
    exact: tuple[bool, bool] = (True, True)
    absorb: bool = False


IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TURN = ("<start_of_turn>", "<end_of_turn>")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")  # noqa: RUF001
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


def deepseek(after: str, before_content: str) -> str:
    user, assistant, end = DEEPSEEK
    return (
        "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
        + EACH + "{% if m.role == 'user' %}" + user + "{{ m.content }}{% elif m.role == 'assistant' %}"
        + assistant + before_content + learned("{{ m.content.split('</think>')[-1] }}" + end)
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + assistant + after + "{% endif %}"
    )  # fmt: skip


FAMILIES = {
    "vicuna": Family(None, "</s>", lead=" ", core="spaces"),
    "llama-2": Family(
        SPLIT_SYSTEM
        + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
        + "{% if loop.first and order %}{{ '<<SYS>>\\n' + order + '\\n<</SYS>>\\n\\n' }}{% endif %}"
        + "{{ m.content.strip() + ' [/INST]' }}{% else %}"
        + learned("{{ ' ' + m.content.strip() + ' ' + eos_token }}")
        + "{% endif %}{% endfor %}",
        " </s>",
        lead=" ",
        core="spaces",
    ),
    "llama-3": Family(roles(LLAMA3, "<|eot_id|>", start="{{ bos_token }}", trim=" | trim"), "<|eot_id|>", HEADERS),
    "llama-3-always-prompted": Family(roles(LLAMA3, "<|eot_id|>", trim=" | trim", always=True), "<|eot_id|>", HEADERS),
    "llama-3.1": Family(roles(LLAMA3, "<|eot_id|>", start=DATE, trim=" | trim"), "<|eot_id|>", HEADERS),
    "chatml": Family(CHATML, "<|im_end|>", IM),
    "qwen2.5": Family(DEFAULT + CHATML, "<|im_end|>", IM),
    "smollm2": Family(DEFAULT + CHATML, "<|im_end|>", IM),
    "internlm2": Family("{{ bos_token }}" + CHATML, "<|im_end|>", IM, core="spaces"),
    "qwen3": Family(
        qwen3("", left=""), "<|im_end|>", IM, lead="<think>\n\n</think>\n\n", earlier=("", "<|im_end|>")
    ),
    "qwen3-thinking": Family(
        qwen3("<think>\\n", left="<think>"), "<|im_end|>", IM,
        lead="\n</think>\n\n", earlier=("", "<|im_end|>"), exact=(False, False),
    ),
    "mistral-v1": Family(mistral("{{ ' [INST] ' }}SAID{{ ' [/INST]' }}", "{{ ' ' }}", when="loop.first"), "</s>",
                         lead=" ", core="spaces"),
    "mistral-v3": Family(
        mistral("[INST]{{ ' ' }}SAID[/INST]", "{{ ' ' }}", when="loop.index0 >= turns | length - 2", trim=" | trim"),
        "</s>", ("[INST]", "[/INST]"), lead=" ", core="spaces", exact=(True, False),
    ),
    "mistral-tekken": Family(
        mistral("[INST]SAID[/INST]", "", when="loop.index0 >= turns | length - 2"),
        "</s>", ("[INST]", "[/INST]"), exact=(True, False),
    ),
    "gemma-2": Family(
        "{{ bos_token }}" + REFUSE_SYSTEM + EACH + GEMMA_TURN + GEMMA_ANSWER
        + "{{ m.content | trim }}<end_of_turn>{% endif %}" + GEMMA_PROMPT,
        "<end_of_turn>", TURN, core="plain", system=False,
    ),
    "gemma-3": Family(
        "{{ bos_token }}" + SPLIT_SYSTEM + GEMMA_TURN + GEMMA_ANSWER
        + "{% if loop.first and order %}{{ order + '\\n\\n' }}{% endif %}{{ m.content | trim }}<end_of_turn>{% endif %}"
        + GEMMA_PROMPT,
        "<end_of_turn>", TURN, core="plain",
    ),
    "phi-3": Family(
        EACH + "{% if m.role == 'assistant' %}" + learned("{{ m.content }}<|end|>") + "{{ '\\n' }}"
        "{% else %}<|{{ m.role }}|>{{ '\\n' + m.content }}<|end|>{{ '\\n' }}"
        "{% if m.role == 'user' %}<|assistant|>{{ '\\n' }}{% endif %}{% endif %}{% endfor %}",
        "<|end|>", PHI, core="spaces", absorb=True,
    ),
    "phi-3.5": Family(
        roles("<|ROLE|>{{ '\\n' }}", "<|end|>\n") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        "<|end|>", PHI, core="spaces", absorb=True,
    ),
    "phi-4": Family(roles("<|im_start|>ROLE<|im_sep|>", "<|im_end|>"), "<|im_end|>", (*IM, "<|im_sep|>")),
    "phi-4-mini": Family(
        roles("<|ROLE|>", "<|end|>") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", "<|end|>", PHI
    ),
    "deepseek-v2": Family(
        "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
        "{% elif m.role == 'assistant' %}Assistant:" + learned("{{ ' ' + m.content + eos_token }}")
        + "{% else %}{{ m.content + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        "</s>", lead=" ",
    ),
    "deepseek-v3": Family(deepseek("", ""), DEEPSEEK[2], DEEPSEEK),
    "deepseek-v3.1": Family(deepseek("</think>", "</think>"), DEEPSEEK[2], (*DEEPSEEK, "</think>")),
    "deepseek-coder": Family(
        "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}{{ '### Instruction:\\n' + m.content + '\\n' }}"
        "{% elif m.role == 'assistant' %}{{ '### Response:\\n' }}" + learned("{{ m.content + '\\n' }}<|EOT|>")
        + "{{ '\\n' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
        "\n<|EOT|>", ("<|EOT|>",),
    ),
    "gpt-oss": Family(
        EACH + "{% if m.role == 'assistant' %}<|start|>assistant"
        + "{% if loop.last %}" + learned("<|channel|>final<|message|>{{ m.content }}<|return|>")
        + "{% else %}" + learned("<|channel|>final<|message|>{{ m.content }}") + "<|end|>{% endif %}"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|return|>", HARMONY, lead="<|channel|>final<|message|>", earlier=("<|channel|>final<|message|>", ""),
    ),
}  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERS = ["It is a reddish-brown fox, jumping.", "Twelve; unbelievably many 🦊!", "It is."]
TALK: Messages = [
    {"role": "user", "content": "What animal do you see?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "How many are there?"},
    {"role": "assistant", "content": ANSWERS[1]},
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": ANSWERS[2]},
]


@cache
def trained(core: str) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    lines = [f"{turn['role']}: {turn['content']} It is. It was.\n\nThe fox jumps.\n" for turn in TALK]
    # Unlike GPT-2, the newer families let punctuation melt with the line breaks behind it.
    words = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]+\n*|\s*\n|\s+"), "isolated")
    made = Tokenizer(models.BPE(unk_token=None if core == "bytes" else "<unk>", byte_fallback=core != "bytes"))
    if core == "bytes":
        made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        prefix = [normalizers.Prepend("▁")] if core == "spaces" else []
        made.normalizer = normalizers.Sequence([*prefix, replace])
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    # SentencePiece learns line by line: a line break is a byte of its own.
    made.train_from_iterator(
        lines if core == "bytes" else [line for text in lines for line in text.split("\n")], trainer
    )
    result: str = made.to_str()
    if core != "bytes":
        result = _bytes_as_plain_vocabulary(result)
    return result


def _bytes_as_plain_vocabulary(text: str) -> str:
    import json

    state = json.loads(text)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<unk>"]
    return json.dumps(state)


def make_tokenizer(family: Family) -> Any:
    from tokenizers import AddedToken, Tokenizer

    core = Tokenizer.from_str(trained(family.core))
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.add_tokens([AddedToken(mark, special=True, rstrip=family.absorb) for mark in family.marks])
    made.chat_template = family.template
    return made


def told(family: Family, number: int, total: int, answer: str) -> str:
    lead, end = family.lead, family.end
    if family.earlier is not None and number < total - 1:
        lead, end = family.earlier
    return lead + answer + end


def runs_of(labels: list[int]) -> list[tuple[int, int]]:
    edges = [place for place in range(1, len(labels)) if (labels[place] == -100) != (labels[place - 1] == -100)]
    if labels[-1] != -100:
        edges.append(len(labels))
    return list(zip(edges[::2], edges[1::2], strict=True))


def oracle(tokenizer: Any, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    texts, places = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], [tuple(place) for place in places[0]]


def talks(family: Family) -> list[Messages]:
    plain = [TALK[:2], TALK[:4], TALK]
    return plain + [[SYSTEM, *talk] for talk in plain] if family.system else plain


@pytest.mark.parametrize("name", FAMILIES)
def test_each_answer_is_learned_with_its_end_and_nothing_else(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    for talk in talks(family):
        text, spans = answer_spans(tokenizer, talk)
        assert text == render(tokenizer, talk)
        answers = [turn["content"] for turn in talk if turn["role"] == "assistant"]
        wanted = [told(family, number, len(answers), answer) for number, answer in enumerate(answers)]
        assert [text[start:end] for start, end in spans] == wanted
        ids, labels = tokenize_with_labels(tokenizer, talk)
        assert all(label in {-100, token} for token, label in zip(ids, labels, strict=True))
        runs = [tokenizer.decode(labels[start:end]) for start, end in runs_of(labels)]
        # SentencePiece drops a text's first space, and marks that took in white space do not give it back.
        bare = family.core != "bytes"
        assert [run.strip() if bare else run for run in runs] == [one.strip() if bare else one for one in wanted]
        # Words are cut, or edges inside of words would prove nothing.
        assert len(ids) > 2 * len(text.split())


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.template])
def test_the_labels_are_the_mask_of_transformers(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    for talk in talks(family):
        theirs = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        ids, labels = tokenize_with_labels(tokenizer, talk)
        assert ids == list(theirs["input_ids"])
        assert [int(label != -100) for label in labels] == list(theirs["assistant_masks"])


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.template])
def test_no_content_confuses_the_spans(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    pieces = ["", " ", "\n", "It is.", "is", *family.marks, "</s>", "assistant", "<thi", "</think>\n\n", "@0END"]
    rng = random.Random(name)
    for _ in range(60):
        talk = [{**turn, "content": "".join(rng.choices(pieces, k=rng.randrange(4)))} for turn in TALK]
        if family.system and rng.random() < 0.5:
            talk = [{"role": "system", "content": rng.choice(pieces)}, *talk]
        assert answer_spans(tokenizer, talk) == oracle(tokenizer, talk)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_is_what_stands_before_the_answer(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    for talk in talks(family):
        ids, labels = tokenize_with_labels(tokenizer, talk)
        starts = [start for start, _ in runs_of(labels)]
        places = [place for place, turn in enumerate(talk) if turn["role"] == "assistant"]
        for place, start in zip(places, starts, strict=True):
            text = render(tokenizer, talk[:place], generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            is_last = place == places[-1]
            if is_last or family.exact[talk[0]["role"] == "system"]:
                assert prompt == ids[:start]
            else:
                assert prompt != ids[:start]


@pytest.mark.parametrize("name", FAMILIES)
def test_images_and_labels_go_together(name: str, clip: Encoder) -> None:
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    processor = VLMProcessor(clip, build_connector("mlp", clip.token_spec, 32), tokenizer)
    talk = [{**TALK[0], "content": "<image>\n" + TALK[0]["content"]}, *TALK[1:]]
    image = Image.new("RGB", (40, 30))
    sample, prompt = processor.sample(talk, [image]), processor.prompt(talk[:-1], [image])
    assert sample.input_ids.count(processor.image_token_id) == 16
    starts, ends = zip(*runs_of(sample.labels), strict=True)
    assert len(starts) == 3
    assert sample.input_ids[: starts[-1]] == prompt.input_ids
    assert tokenizer.decode(sample.labels[starts[-1] : ends[-1]]).strip() == told(family, 2, 3, ANSWERS[2]).strip()


def test_the_end_of_turn_that_takes_in_white_space_is_learned() -> None:
    # Phi-3 declares its marks so: the offsets of <|end|> reach over the line break behind it.
    tokenizer = make_tokenizer(FAMILIES["phi-3"])
    ids, labels = tokenize_with_labels(tokenizer, TALK)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert [token for token in ids if token == end] == [end] * 6
    assert [label for label in labels if label == end] == [end] * 3


def test_a_token_over_the_end_of_an_answer_without_mark_is_not_learned() -> None:
    template = (
        EACH + "{{ m.role + ': ' + m.content }}{{ eos_token if loop.last and m.role == 'assistant' else '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )  # fmt: skip
    tokenizer = make_tokenizer(Family(template, "</s>"))
    _, labels = tokenize_with_labels(tokenizer, TALK[:4])
    # The first answer's full stop is one token with the line break behind it.
    assert [tokenizer.decode(labels[start:end]) for start, end in runs_of(labels)] == [
        " It is a reddish-brown fox, jumping",
        f" {ANSWERS[1]}</s>",
    ]


def test_contents_given_twice_and_found_elsewhere_are_told_apart() -> None:
    tokenizer = make_tokenizer(FAMILIES["chatml"])
    talk = [{"role": "user" if place % 2 == 0 else "assistant", "content": "assistant"} for place in range(6)]
    text, spans = answer_spans(tokenizer, talk)
    assert [text[start:end] for start, end in spans] == ["assistant<|im_end|>"] * 3
    assert [text[:start].count("<|im_start|>") for start, _ in spans] == [2, 4, 6]


REFUSED = {
    "answers left out": (EACH + "{% if m.role == 'user' %}{{ m.content }}{% endif %}</s>{% endfor %}", "0 times"),
    "answers written twice": (EACH + "{{ m.role + m.content + m.content }}</s>{% endfor %}", "2 times, not once"),
    "contents that are parts": (
        EACH + "{% for part in m.content %}{{ part.text }}{% endfor %}</s>{% endfor %}",
        r"content of turn 6 \(assistant\) 0 times",
    ),
    "no end of turn": (EACH + "<|{{ m.role }}|>{{ m.content }}{% endfor %}", "ends an answer by ''"),
    "marks of another tokenizer": (CHATML, r"ends an answer by '<\|im_end\|>\\n', which holds no special token"),
    "a prompt that training does not have": (deepseek("<think>", ""), "ends the prompt of turn 6 by"),
    "turns that depend on a content": (
        EACH + "{{ 'Q' if messages[:2][-1].content | length > 36 else 'A' }}{{ m.content }}</s>{% endfor %}",
        "writes other turns differently by the text of turn 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_whose_answers_cannot_be_told_is_refused(case: str) -> None:
    template, sentence = REFUSED[case]
    marks = DEEPSEEK if "training" in case else ()
    with pytest.raises(VlmError, match=sentence):
        tokenize_with_labels(make_tokenizer(Family(template, "", marks)), TALK)


def test_a_conversation_that_starts_with_an_answer_is_refused() -> None:
    with pytest.raises(VlmError, match="starts with an answer"):
        tokenize_with_labels(make_tokenizer(FAMILIES["chatml"]), TALK[1:])


def test_the_date_of_the_day_does_not_matter() -> None:
    tokenizer = make_tokenizer(FAMILIES["llama-3.1"])
    tokenizer.chat_template = tokenizer.chat_template.replace("'26 Jul 2024'", "strftime_now('%d %b %Y')")
    text, spans = answer_spans(tokenizer, TALK)
    assert [text[start:end] for start, end in spans] == [answer + "<|eot_id|>" for answer in ANSWERS]


def test_vicunas_turns_are_those_of_the_default() -> None:
    assert "ASSISTANT:" in VICUNA_TEMPLATE
    tokenizer = make_tokenizer(FAMILIES["vicuna"])
    assert render(tokenizer, TALK[:2]) == f"<s>USER: What animal do you see? ASSISTANT: {ANSWERS[0]}</s>"
