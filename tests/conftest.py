"""What the tests share: one thread (tiny tensors are slower on two), no network, tiny parts with random weights."""

import dataclasses
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.transformers_backend import TransformersEncoder
from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import EncoderSpec

torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ' : ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 60 words with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "system", ":", *(f"w{n}" for n in range(52))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A Llama of two layers of 32 with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()




@pytest.fixture
def clip_spec() -> EncoderSpec:
    """A CLIP of four blocks of 32 on 28 px: a 4x4 grid, one prefix token, feature layer -2."""
    return dataclasses.replace(
        encoder_spec("clip-vit-b-32"),
        name="clip-small",
        weights=None,
        image_size=(28, 28),
        stride=7,
        dim=32,
        heads=4,
        mlp_dim=48,
        num_layers=4,
    )


@pytest.fixture
def clip(clip_spec: EncoderSpec) -> Encoder:
    """The small CLIP with random weights."""
    torch.manual_seed(1)
    return TransformersEncoder.build(clip_spec, pretrained=False, dtype=torch.float32).eval()
