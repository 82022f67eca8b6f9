"""`vlm-encoders compare`: equal terms, plain controls, and refusals before anything trains."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from connectors import TokenSpec, VlmError, build_connector
from vlm_encoders.cli.claim import claim_folder
from vlm_encoders.cli.main import app
from vlm_encoders.compare import Compared, compare_connectors, pooling_control
from vlm_encoders.tiny import write_dataset
from vlm_encoders.tiny.stage1 import build_tiny, tiny_run
from vlm_encoders.training.feeding.data import ConversationDataset


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (6, 9), (1, 7), (27, 27)])
def test_the_control_has_as_many_tokens_and_the_encoders_shape(grid: tuple[int, int]) -> None:
    spec = TokenSpec(math.prod(grid), 4, grid)
    for count in range(1, math.prod(grid) + 1):
        recipe = pooling_control(spec, count)
        fits = [rows for rows in range(1, grid[0] + 1) if count % rows == 0 and count // rows <= grid[1]]
        assert (recipe is None) == (not fits)
        if recipe is not None:
            assert build_connector(recipe, spec, 6).out_spec(spec).num_tokens == count
    assert pooling_control(spec, math.prod(grid)) == "mlp"


def test_the_control_is_as_square_as_the_grid() -> None:
    assert pooling_control(TokenSpec(64, 4, (8, 8)), 16) == "avg_pool:grid=4x4+mlp"
    assert pooling_control(TokenSpec(32, 4, (4, 8)), 8) == "avg_pool:grid=2x4+mlp"


def test_each_connector_sees_the_same_samples_in_the_same_order(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, steps=3)
    seen: dict[str, list[int]] = {}

    def build(recipe: str, seed: int):  # type: ignore[no-untyped-def]
        model, processor = build_tiny(recipe, seed=seed)
        original = processor.sample
        name = f"{recipe} {seed}"

        def sample(messages, images):  # type: ignore[no-untyped-def]
            seen.setdefault(name, []).append(hash(str(messages)))
            return original(messages, images)

        setattr(processor, "sample", sample)  # noqa: B010 - an instance's own
        return model, processor

    def held_out(processor):  # type: ignore[no-untyped-def]
        data = ConversationDataset(run.held_out, run.held_out.parent, processor)
        data.records = data.records[:4]
        return data

    rows = [compare_connectors(recipe, build, run.config, held_out, seeds=(0, 1)) for recipe in ("mlp", "linear")]
    assert seen["mlp 0"] == seen["linear 0"]
    assert seen["mlp 1"] == seen["linear 1"]
    assert seen["mlp 0"] != seen["mlp 1"]
    assert [row.recipe for row in rows] == ["mlp", "linear"]
    assert all(row.tokens == 64 and row.seeds == (0, 1) and len(set(row.losses)) == 2 for row in rows)
    assert rows[1].parameters == 128 * 128 + 128
    with pytest.raises(VlmError, match="there is no seed to train from; give at least one"):
        compare_connectors("mlp", build, run.config, held_out, seeds=())


def test_the_command_prints_a_table_and_keeps_every_number(tmp_path: Path) -> None:
    output = tmp_path / "compare"
    result = CliRunner().invoke(
        app, ["compare", "--steps", "2", "--connector", "pixel_shuffle:factor=2+mlp", "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    assert "avg_pool:grid=4x4+mlp" in result.stdout
    rows = json.loads((output / "compare.json").read_text())
    assert [(row["recipe"], row["tokens"]) for row in rows] == [
        ("pixel_shuffle:factor=2+mlp", 16),
        ("avg_pool:grid=4x4+mlp", 16),
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds", "0"], "--seeds 0 trains nothing; give at least 1"),
        (["--steps", "0"], "--steps 0 trains nothing; give at least 1"),
        (["--connector", "mpl"], "no connector 'mpl'; did you mean mlp"),
        (["--connector", "pixel_shuffle:factor=3+mlp"], "8x8 grid does not divide into 3x3 blocks"),
        (["--connector", "avg_pool:grid=4x4"], "'avg_pool:grid=4x4' has no parameter that Stage 1 could train"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_it_trains(
    arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    earlier = earlier_run(tmp_path / "out")
    result = CliRunner().invoke(app, ["compare", *arguments, "--output", str(tmp_path / "out")])
    assert sentence in str(result.exception)
    assert all(path.is_file() for path in earlier)


def earlier_run(output: Path) -> list[Path]:
    """Write what an earlier comparison leaves behind."""
    files = [
        output / name for name in ("compare.txt", "compare.json", "train/mlp-0/log.jsonl", "data/train/train.json")
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("[]")
    return files


def own_settings(tmp_path: Path, data: Path, **more: object) -> Path:
    """Write settings for the embedded parts, with data of one's own in the folder `data`."""
    train = write_dataset(data, "train", 2, seed=0)
    values = {"data": train, "eval_data": train, "image_folder": data, "output": "x"}
    values |= {"encoder": "tiny-digits", "llm": "tiny", **more}
    path = tmp_path / "run.toml"
    lines = [f"{key} = {value if isinstance(value, int) else json.dumps(str(value))}" for key, value in values.items()]
    path.write_text("\n".join([*lines, "cpu = true", "batch_size = 2", "progress = false\n"]))
    return path


def test_own_parts_are_compared_and_replace_the_earlier_table(tmp_path: Path) -> None:
    path = own_settings(tmp_path, tmp_path / "mine", epochs=3)
    earlier_run(tmp_path / "out")
    arguments = ["compare", "--config", str(path), "--connector", "mlp", "--steps", "1"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0
    assert [row["recipe"] for row in json.loads((tmp_path / "out" / "compare.json").read_text())] == ["mlp"]
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["compare.json", "compare.txt", "train"]


def test_what_is_removed_is_never_what_is_read(tmp_path: Path) -> None:
    earlier = earlier_run(tmp_path / "out")
    path = own_settings(tmp_path, tmp_path / "out" / "data")
    result = CliRunner().invoke(app, ["compare", "--config", str(path), "--output", str(tmp_path / "out")])
    assert "lies in" in str(result.exception)
    assert "which compare removes; move it, or give another --output" in str(result.exception)
    assert all(file.is_file() for file in earlier)


@pytest.mark.parametrize(("setting", "sentence"), [("eval_data", "cannot be read"), ("image_folder", "is no folder")])
def test_data_is_checked_before_the_earlier_run_goes(setting: str, sentence: str, tmp_path: Path) -> None:
    path = own_settings(tmp_path, tmp_path / "mine", **{setting: tmp_path / "nowhere"})
    earlier = earlier_run(tmp_path / "out")
    result = CliRunner().invoke(app, ["compare", "--config", str(path), "--output", str(tmp_path / "out")])
    assert sentence in str(result.exception)
    assert all(file.is_file() for file in earlier)


def test_what_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    earlier_run(tmp_path / "out")
    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(
        VlmError, match=r"earlier run in '.*out' cannot be removed \(Permission denied\); remove it, or"
    ):
        claim_folder(tmp_path / "out", "compare", ("data",))


@pytest.mark.parametrize("error", [VlmError("it broke"), KeyboardInterrupt()])
def test_rows_that_are_done_are_printed_when_a_later_one_fails(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(recipe: str, *_: object, **__: object) -> Compared:
        if recipe == "linear":
            raise error
        return Compared(recipe, 64, 1, (0,), (0.5,), (0.25,), 1.0)

    monkeypatch.setattr("vlm_encoders.compare.compare_connectors", compared)
    options = ["--connector", "mlp", "--connector", "linear", "--steps", "1", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["compare", *options])
    assert result.exit_code != 0
    assert "25.0%" in result.stdout


def test_a_settings_file_must_name_the_fixed_parts(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'data = "d.json"\nimage_folder = "{tmp_path}"\nencoder = "tiny-digits"\noutput = "x"\n')
    result = CliRunner().invoke(app, ["compare", "--config", str(path), "--output", str(tmp_path / "out")])
    assert "a comparison needs encoder, llm and eval_data" in str(result.exception)
    path.write_text(path.read_text() + 'llm = "l"\neval_data = "e.json"\nstage = "stage-2"\n')
    result = CliRunner().invoke(app, ["compare", "--config", str(path), "--output", str(tmp_path / "out")])
    assert "connectors are compared by stage-1, the file says 'stage-2'" in str(result.exception)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    result = CliRunner().invoke(app, ["compare", "--output", str(tmp_path)])
    assert "holds something that is not an earlier compare's" in str(result.exception)
    assert (tmp_path / "mine.txt").read_text() == "keep"
