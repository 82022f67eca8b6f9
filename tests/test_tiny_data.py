"""The embedded scenes, dataset and weights."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from connectors.errors import VlmError
from vlm_encoders.tiny import encoder_folder, llm_folder, scenes, write_dataset
from vlm_encoders.tiny.build import FIGURES_FILE, file_sha256

WEIGHTS = encoder_folder().parent


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((WEIGHTS / FIGURES_FILE).read_text())
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(llm_folder())


def test_split_is_disjoint_and_complete() -> None:
    train, held_out = (set(scenes.split_indices(split).tolist()) for split in ("train", "held_out"))
    assert not train & held_out
    assert len(held_out) == 397
    assert train | held_out == set(range(1797))


def test_no_held_out_image_is_a_copy_of_a_training_image() -> None:
    images, _ = scenes.digit_images()
    train, held_out = (images[scenes.split_indices(split)].reshape(-1, 64) for split in ("train", "held_out"))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in held_out}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_scene_shows_images_of_its_split_with_its_digits(split: scenes.Split) -> None:
    _, digits = scenes.digit_images()
    allowed = set(scenes.split_indices(split).tolist())
    rng = np.random.default_rng(3)
    for scene in (scenes.random_scene(split, rng) for _ in range(200)):
        shown = [source for source in scene.sources if source != scenes.BLANK]
        assert set(shown) <= allowed
        assert 2 <= len(shown) <= 4
        assert [digits[source] if source != scenes.BLANK else scenes.BLANK for source in scene.sources] == list(
            scene.cells
        )


def test_scene_is_the_same_by_seed() -> None:
    first, again, other = (scenes.random_scene("train", np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again
    assert scenes.draw(first).tobytes() == scenes.draw(again).tobytes()
    assert first != other


def test_picture_has_ink_where_the_cells_say() -> None:
    scene = scenes.random_scene("train", np.random.default_rng(0))
    picture = scenes.draw(scene)
    assert (picture.mode, picture.size) == ("RGB", (64, 64))
    cells = np.asarray(picture)[..., 0].reshape(4, 16, 4, 16).swapaxes(1, 2).reshape(16, 16, 16)
    assert ((cells.min((1, 2)) < 100) == (np.array(scene.cells) != scenes.BLANK)).all()


@pytest.mark.parametrize(("question", "answer"), [("read", "7 0 3 0"), ("count", "1 0 2 1")], ids=["read", "count"])
def test_answer_of_known_cells(question: scenes.Question, answer: str) -> None:
    cells = (-1, -1, -1, 7, -1, -1, -1, -1, 0, 3, -1, -1, 0, -1, -1, -1)
    assert scenes.ask(question, cells, np.random.default_rng(0))[1] == answer


def test_row_asks_for_a_row_that_holds_a_digit_and_says_its_cells() -> None:
    cells = (-1, -1, -1, 7, -1, -1, -1, -1, 0, 3, -1, -1, 0, -1, -1, -1)
    asked = dict(scenes.ask("row", cells, np.random.default_rng(seed)) for seed in range(20))
    assert asked == {
        "What is in row 1?": "blank blank blank 7",
        "What is in row 3?": "0 3 blank blank",
        "What is in row 4?": "0 blank blank blank",
    }


def test_no_constant_answer_is_right_often() -> None:
    rng = np.random.default_rng(0)
    boards = [scenes.random_cells(rng) for _ in range(3000)]
    shares = []
    for question in scenes.QUESTIONS:
        answers = [scenes.ask(question, cells, rng)[1] for cells in boards]
        shares.append(np.unique(answers, return_counts=True)[1].max() / len(boards))
    assert np.mean(shares) < 0.05


def test_dataset_names_every_picture_once_and_mixes_the_questions(tmp_path: Path) -> None:
    samples = json.loads(write_dataset(tmp_path, "held_out", 12, 5).read_text())
    named = [sample["image"] for sample in samples]
    assert sorted(named) == sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("images/*"))
    kinds = [sample["id"].rpartition("-")[2] for sample in samples]
    assert [kinds.count(kind) for kind in scenes.QUESTIONS] == [4, 4, 4]
    for sample in samples:
        human, gpt = sample["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n")
        assert Image.open(tmp_path / sample["image"]).size == (64, 64)


def test_dataset_answers_are_true_to_the_picture(tmp_path: Path) -> None:
    samples = json.loads(write_dataset(tmp_path, "train", 9, 1).read_text())
    for sample in samples[2::3]:
        pixels = np.asarray(Image.open(tmp_path / sample["image"]))[..., 0]
        cells = pixels.reshape(4, 16, 4, 16).min((1, 3)) < 100
        assert sample["conversations"][1]["value"] == " ".join(map(str, cells.sum(1)))


def test_dataset_is_the_same_by_seed(tmp_path: Path) -> None:
    paths = [write_dataset(tmp_path / name, "train", 6, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    files = [{path.relative_to(root.parent): path.read_bytes() for path in root.parent.rglob("*.*")} for root in paths]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_wrong_split_and_count_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match="unknown split 'test'; use 'train' or 'held_out'"):
        scenes.split_indices("test")  # type: ignore[arg-type]
    with pytest.raises(VlmError, match="ask for at least 1"):
        write_dataset(tmp_path, "train", 0, 0)


def test_missing_scikit_learn_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes._load.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(VlmError, match=r"needs scikit-learn; pip install 'vlm-encoders\[demo\]'"):
        scenes.digit_images()


def test_weights_are_small_and_are_those_of_the_figures(figures: dict[str, Any]) -> None:
    assert file_sha256(WEIGHTS) == figures["sha256"]
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 4_000_000
    assert figures["encoder"]["digit_cells"] >= 0.98
    assert min(value for name, value in figures["llm"].items() if name.endswith("_words")) >= 0.93


def test_encoder_loads_through_timm(figures: dict[str, Any]) -> None:
    model = timm.create_model(f"local-dir:{encoder_folder()}", pretrained=True).eval()
    assert sum(weight.numel() for weight in model.parameters()) == figures["encoder"]["parameters"] < 1_000_000
    assert model.num_prefix_tokens == 0
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], tuple(config["mean"]), config["crop_pct"]) == ((3, 64, 64), (0.5, 0.5, 0.5), 1.0)
    with torch.no_grad():
        assert model.forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 128)


def test_llm_loads_through_transformers_and_reads_words(
    tokenizer: PreTrainedTokenizerFast, figures: dict[str, Any]
) -> None:
    llm = AutoModelForCausalLM.from_pretrained(llm_folder(), dtype=torch.float32).eval()
    assert llm.num_parameters() == figures["llm"]["parameters"] < 1_000_000
    words = ["blank"] * 16
    words[3], words[9] = "7", "2"
    asked = [{"role": "user", "content": f"{' '.join(words)}\nWhich digits do you see, in reading order?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = llm.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "7 2 </s>"


def test_chat_template_marks_the_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "user", "content": "<image>\nWhat is in row 1?"},
        {"role": "assistant", "content": "blank 3 blank 7"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<s><|user|>\n<image>\nWhat is in row 1?\n<|assistant|>\nblank 3 blank 7</s>\n"
    )
    opened = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<s><|user|>\n<image>\nWhat is in row 1?\n<|assistant|>\n"
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    answer = [token for token, mine in zip(*map(encoded.get, ("input_ids", "assistant_masks")), strict=True) if mine]
    assert tokenizer.decode(answer) == "blank 3 blank 7 </s>"


def test_image_is_one_id_and_no_word_is_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert image != tokenizer.unk_token_id
    assert tokenizer("<image>\n<image>").input_ids == [image, image]
    rng = np.random.default_rng(0)
    for question in scenes.QUESTIONS:
        for text in scenes.ask(question, scenes.random_cells(rng), rng):
            assert tokenizer.unk_token_id not in tokenizer(text).input_ids
