"""Training settings: read from TOML, and each mistake answered with a sentence."""

from pathlib import Path
from typing import Any

import pytest

from connectors.errors import VlmError
from vlm_encoders.training.config import TrainConfig

PATHS = {"data": "a.json", "image_folder": "images", "output": "out"}
LINES = 'data = "a.json"\nimage_folder = "images"\noutput = "out"\n'


def toml(folder: Path, text: str) -> Path:
    path = folder / "train.toml"
    path.write_text(text)
    return path


def test_every_setting_survives_toml(tmp_path: Path) -> None:
    text = LINES + 'stage = "stage-2"\nsteps = 7\nlearning_rate = 1\nprogress = false\nschedule = "constant"\n'
    config = TrainConfig.from_toml(toml(tmp_path, text))
    expected = TrainConfig(**PATHS, stage="stage-2", steps=7, learning_rate=1, progress=False, schedule="constant")
    assert config == expected
    assert TrainConfig(**config.to_dict()) == config


def test_given_settings_stand_over_the_file(tmp_path: Path) -> None:
    config = TrainConfig.from_toml(
        toml(tmp_path, 'data = "a.json"\nsteps = 7\n'), image_folder="i", output="o", steps=9
    )
    assert (config.steps, config.data, config.output) == (9, "a.json", "o")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (LINES + "batch_sise = 4\n", "no setting 'batch_sise'; did you mean batch_size"),
        (LINES + 'batch_size = "4"\n', "batch_size must be a whole number, got '4' (str)"),
        (LINES + "batch_size = true\n", "batch_size must be a whole number, got True (bool)"),
        (LINES + "seed = 1.5\n", "seed must be a whole number, got 1.5 (float)"),
        (LINES + "seed = 4294967295\n", "seed must be at most 2147483647, got 4294967295"),
        (LINES + 'learning_rate = "1e-3"\n', "learning_rate must be a number, got '1e-3' (str)"),
        (LINES + 'schedule = "linear"\n', "schedule must be 'cosine' or 'constant' or 'wsd', got 'linear'"),
        (LINES + "[encoder]\nname = 1\n", "encoder must be a text in quotes, got {'name': 1} (dict)"),
        (LINES + "batch_size = = 4\n", "is not TOML: Invalid value (at line 4, column 14)"),
        ('data = "a.json"\n', "lacks output"),
        (LINES + "steps = 0\n", "steps must be at least 1, got 0"),
        (LINES + "steps = 3\nepochs = 1\n", "steps=3 and epochs=1 both set the length"),
        (LINES + "warmup_ratio = 1.5\n", "warmup_ratio must be between 0 and 1, got 1.5"),
        (LINES + "learning_rate = 0.0\n", "learning_rate must be above 0, got 0.0"),
        (LINES + "weight_decay = nan\n", "weight_decay must be 0 or more, got nan"),
        (LINES + 'model = "m"\nllm = "l"\n', "model='m' has its own llm"),
        (LINES + 'model = "m"\ndtype = "float16"\n', 'dtype="float16" does not go with a saved model or with bf16'),
        (LINES + 'dtype = "fp32"\n', "dtype must be 'float32' or 'bfloat16' or 'float16', got 'fp32'"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, text: str, sentence: str) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(VlmError) as caught:
        TrainConfig.from_toml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match="cannot be read"):
        TrainConfig.from_toml(tmp_path / "none.toml")


def test_what_is_given_replaces_the_length_of_the_file(tmp_path: Path) -> None:
    config = TrainConfig.from_toml(toml(tmp_path, LINES + "epochs = 2\n"), steps=3)
    assert (config.steps, config.epochs) == (3, None)
    config = TrainConfig.from_toml(toml(tmp_path, LINES + "steps = 3\n"), epochs=2)
    assert (config.steps, config.epochs) == (None, 2)
    with pytest.raises(VlmError, match="both set the length"):
        TrainConfig.from_toml(toml(tmp_path, LINES), epochs=2, steps=3)


def test_every_setting_is_explained() -> None:
    source = Path(TrainConfig.__module__.replace(".", "/") + ".py")
    lines = (Path(__file__).parents[1] / source).read_text().splitlines()
    for name in TrainConfig.__dataclass_fields__:
        (place,) = [number for number, line in enumerate(lines) if line.startswith(f"    {name}: ")]
        assert lines[place + 1].startswith('    """'), name


def test_a_run_is_saved_on_its_way_unless_told_otherwise() -> None:
    assert TrainConfig(**PATHS).save_every == 500
    assert TrainConfig(**PATHS, save_every=None).save_every is None


def test_the_settings_are_frozen() -> None:
    config: Any = TrainConfig(**PATHS)
    with pytest.raises(AttributeError):
        config.steps = 3
