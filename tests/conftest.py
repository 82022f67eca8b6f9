"""What the tests share: one thread (tiny tensors are slower on two), no network, tiny parts with random weights."""

import dataclasses
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from connectors import build_connector
from vlm_encoders.encoder import Encoder
from vlm_encoders.encoders.transformers_backend import TransformersEncoder
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.testing import tiny_llm
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.vlm.build import load_llm
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import StagePolicy, apply_stage

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


class CheckpointKit:
    """An encoder and an LLM as folders below `root`, and models made of them."""

    image = 70

    def __init__(self, root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.root = root
        self.write_clip("clip")
        tiny_llm().save_pretrained(root / "llm")  # type: ignore[operator]
        tokenizer.save_pretrained(root / "llm")

    def write_clip(self, name: str, *, seed: int = 0, patch: int = 7) -> None:
        torch.manual_seed(seed)
        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=patch,
        )
        CLIPVisionModel(config).save_pretrained(self.root / name)

    def build(self, *, pretrained: bool = True, dtype: str = "float32", newline: bool = True) -> VisionLanguageModel:
        encoder = create_encoder(f"hf:{self.root}/clip", pretrained=pretrained, dtype=dtype)
        kind = getattr(torch, dtype)
        llm, _ = load_llm(self.root / "llm", kind)
        torch.manual_seed(2)
        connector = build_connector("pixel_shuffle:factor=2+mlp", encoder.token_spec, 32).to(kind)
        layout = TileLayout(unpad=newline, newline=newline)
        # Not model.to(dtype): it would round the rotary frequencies too, which no checkpoint holds.
        return VisionLanguageModel(encoder, connector, llm, image_token_id=self.image, layout=layout).eval()

    def inputs(self, tokens: int = 5) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(3, 60, (1, 20), generator=generator)
        ids[0, 1 : 1 + tokens] = self.image
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}

    def train(self, model: VisionLanguageModel, *stages: StagePolicy) -> VisionLanguageModel:
        """Take two steps of each stage."""
        inputs = self.inputs(4 + model.layout.newline)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == self.image, -100)
        for stage in stages:
            apply_stage(model, stage).train()
            optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.3)
            for _ in range(2):
                loss = model(**inputs, labels=labels).loss
                assert loss is not None
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model.eval()


@pytest.fixture
def kit(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> CheckpointKit:
    """Parts on the disk, for models that are saved and loaded."""
    return CheckpointKit(tmp_path, tokenizer)
