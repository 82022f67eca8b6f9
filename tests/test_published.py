"""Published stages: what their scripts say, in a form that a run takes."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from connectors import MLP
from connectors.errors import UnknownNameError
from connectors.recipe import parse_recipe
from vlm_encoders.cli.main import app
from vlm_encoders.encoder import Encoder
from vlm_encoders.registry import encoder_spec
from vlm_encoders.tiling import PRESETS
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.training.optim import parameter_groups
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.published import PUBLISHED, STAGES, published_stage
from vlm_encoders.vlm.stages import apply_stage

# As read in the scripts that `source` names: rates of encoder, connector and LLM (0 where frozen), samples of a
# step on all processes, weight decay, part of the steps that is warm-up, longest sample.
SCRIPTS = {
    "llava-1.5-stage-1": ((0, 1e-3, 0), 32 * 8, 0.0, 0.03, 2048),
    "llava-1.5-stage-2": ((0, 2e-5, 2e-5), 16 * 8, 0.0, 0.03, 2048),
    "llava-1.5-stage-2-lora": ((0, 2e-5, 2e-4), 16 * 8, 0.0, 0.03, 2048),
    "llava-next-stage-2": ((2e-6, 1e-5, 1e-5), None, 0.0, 0.03, 32768),
    "llava-onevision-stage-1": ((0, 1e-3, 0), None, 0.0, 0.03, 8192),
    "llava-onevision-stage-1.5": ((2e-6, 1e-5, 1e-5), None, None, None, None),
    "llava-onevision-stage-2-si": ((2e-6, 1e-5, 1e-5), 1 * 2 * 128, 0.0, 0.03, 32768),
    "llava-onevision-stage-2-ov": ((2e-6, 1e-5, 1e-5), 1 * 2 * 128, 0.0, 0.03, 32768),
    "sharegpt4v-stage-1": ((2e-5, 2e-5, 2e-5), 16 * 16, 0.0, 0.03, 2048),
    "sharegpt4v-stage-2": ((0, 2e-5, 2e-5), 8 * 16, 0.0, 0.03, 2048),
    "internvl-2.5-stage-1": ((0, 2e-4, 0), 512, 0.05, 100 / 100_000, 16384),
    "internvl-2.5-stage-1.5": ((1e-5, 1e-5, 0), 1024, 0.05, 100 / 100_000, 16384),
    "internvl-2.5-stage-2": ((4e-5, 4e-5, 4e-5), 512, 0.05, 0.03, 16384),
    "prismatic-single-stage": ((0, 2e-5, 2e-5), 128, 0.1, 0.03, 2048),
    "prismatic-single-stage-tuned": ((2e-5, 2e-5, 2e-5), 128, 0.1, 0.03, 2048),
    "cambrian-1-stage-1": ((0, 1e-4, 0), 512, 0.0, 0.06, 2048),
    "cambrian-1-stage-2": ((0, 4e-5, 4e-5), 512, 0.0, 0.03, 2048),
    "blip-2-stage-2": ((0, 1e-4, 0), None, 0.05, None, None),
}
OWN = ("stage-1", "stage-2", "stage-2-lora", "stage-3")


def test_each_stage_is_what_its_script_says() -> None:
    assert list(PUBLISHED) == [*OWN, *SCRIPTS]
    for name, (rates, batch, decay, warmup, length) in SCRIPTS.items():
        stage = PUBLISHED[name]
        assert tuple(stage.policy.part(part).lr for part in ("encoder", "connector", "llm")) == rates, name
        assert (stage.batch, stage.weight_decay, stage.warmup_ratio, stage.max_length) == (batch, decay, warmup, length)
    lora = STAGES["llava-1.5-stage-2-lora"].llm
    assert (lora.mode, lora.lora_rank, lora.alpha) == ("lora", 128, 256)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_stage_is_settings_that_a_run_takes(name: str, tmp_path: Path) -> None:
    stage = published_stage(name)
    (tmp_path / "run.toml").write_text(stage.toml())
    config = TrainConfig.from_toml(tmp_path / "run.toml")
    assert config.stage == name
    if stage.batch is not None:
        assert config.batch_size * config.gradient_accumulation == stage.batch
    for key in ("epochs", "steps", "warmup_ratio", "schedule", "weight_decay", "max_length", "pack_tokens"):
        if getattr(stage, key) is not None:
            assert getattr(config, key) == getattr(stage, key)
    assert config.mixed_precision == ("bf16" if stage.precision == "bfloat16" else "no")
    assert not stage.after or stage.after in PUBLISHED
    assert not stage.tiler or stage.tiler in PRESETS
    if stage.encoder:
        assert encoder_spec(stage.encoder).name == stage.encoder
    if stage.connector:
        parse_recipe(stage.connector)
    assert stage.source.startswith(("arXiv", "https://"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_stage_can_be_applied(name: str, clip: Encoder, llama: LlamaForCausalLM) -> None:
    model = VisionLanguageModel(clip, MLP(32, 32), llama, image_token_id=70)
    apply_stage(model, STAGES[name])
    groups = parameter_groups(model, learning_rate=None, weight_decay=0.0)
    rates = {group["part"]: group["lr"] for group in groups}
    assert rates == {part: policy.lr for part in rates if (policy := STAGES[name].part(part)).trains}  # type: ignore[arg-type]


def test_an_unknown_stage_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no stage 'llava-1\.5-stage1'; did you mean llava-1\.5-stage-1"):
        published_stage("llava-1.5-stage1")


def test_stages_are_listed_and_shown_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from vlm_encoders.cli.main import app; r = CliRunner()\n"
        "print(r.invoke(app, ['list', '--stages']).output, r.invoke(app, ['info', 'llava-1.5-stage-1']).output)\n"
        "print('HEAVY', sorted(set(sys.modules) & {'torch', 'transformers', 'timm', 'peft', 'PIL'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for name in PUBLISHED:
        assert f"\n{name} " in f"\n{done.stdout}"
    assert "- / 0.001 / - " in done.stdout
    assert "last 50% of the blocks" in done.stdout
    card, _, settings = done.stdout.partition("# As a file for")
    assert "batch:         256 samples a step, on all processes together" in card
    assert "clipping:      not stated" in card
    (tmp_path / "run.toml").write_text("# " + settings.partition("HEAVY")[0])
    config = TrainConfig.from_toml(tmp_path / "run.toml")
    assert (config.stage, config.batch_size, config.gradient_accumulation) == ("llava-1.5-stage-1", 32, 8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["list", "nothing*", "--stages"], "no stage matches 'nothing*'; known are stage-1, "),
        (["list", "--stages", "--tilers"], "--tilers and --stages are two lists; ask for one"),
        (["list", "--stages", "--family", "clip"], "stages are not chosen by --family"),
        (["info", "stage-1", "--image-size", "336"], "'stage-1' is a stage; --image-size and"),
        (
            ["info", "llava-1.5-stage-9"],
            "no encoder, connector, tiler or stage 'llava-1.5-stage-9'; did you mean llava",
        ),
    ],
)
def test_a_wrong_question_is_answered_with_a_sentence(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert sentence in str(result.exception)
