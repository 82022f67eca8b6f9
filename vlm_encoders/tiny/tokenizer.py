"""The word-level tokenizer of the embedded LLM, with its chat template."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CELL_WORDS = ("blank", *"0123456789")
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|system|>", "<|user|>", "<|assistant|>")
OTHER_WORDS = (
    *"?,.",
    *("which", "digits", "do", "you", "see", "in", "reading", "order"),
    *("what", "is", "row", "how", "many", "are", "each"),
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Build the word-level tokenizer with its chat template."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unk, *others = SPECIAL_TOKENS
    words = (*SPECIAL_TOKENS, *CELL_WORDS, *OTHER_WORDS)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\d|[^\w\s]"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        additional_special_tokens=others,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="right",
    )
