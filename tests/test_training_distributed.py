"""Two processes are one: the same losses by DDP and FSDP2, checkpoints between them, nothing that hangs."""

import copy
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from connectors import build_connector
from connectors.errors import VlmError
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.training import TrainConfig, mean_loss
from vlm_encoders.training.processes.blank import anchor
from vlm_encoders.training.processes.distributed import make_accelerator
from vlm_encoders.training.processes.sharding import sharding_units
from vlm_encoders.training.step import StepError
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.stages import STAGE_3, apply_stage

WORKER = Path(__file__).with_name("distributed_worker.py")
spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
assert spec is not None
assert spec.loader is not None
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

STAGES = ("stage-1", "stage-2", "stage-2-lora", "stage-3")
CASES = ["-".join(case) for case in worker.CASES]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process saw, and what two of them did by rank."""
    folder = tmp_path_factory.mktemp("launched")
    one = {stage: run_alone(folder, stage) for stage in STAGES}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "ACCELERATE_USE_CPU": "1"}
    place |= {"FSDP_VERSION": "2", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        # A hang is a failure, and must not outlive the tests.
        errors = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {"folder": folder, "one": one, "ranks": ranks}


def run_alone(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Train for four steps on this process, and save after two."""
    training = worker.Training(worker.make_model(), stage)
    steps = [training.step(number) for number in range(2)]
    torch.save(training.state(), folder / f"one-{stage}.pt")
    return steps + [training.step(number) for number in range(2, 4)]


def losses(steps: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for step in steps]


def same(values: Any) -> Any:
    return pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_losses_of_one(launched: dict[str, Any], case: str) -> None:
    stage = case.split("-", 2)[2]
    first, second = (rank[case] for rank in launched["ranks"])
    one = launched["one"][stage]
    assert first["kind"] == case.split("-", maxsplit=1)[0]
    assert first["steps"] == second["steps"]
    assert losses(first["steps"]) == same(losses(one))
    for two, alone in zip(first["steps"], one, strict=True):
        assert (two["tokens"], two["supervised"]) == (alone["tokens"], alone["supervised"])
        assert two["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_go_on_where_one_stopped(launched: dict[str, Any], case: str) -> None:
    one = launched["one"][case.split("-", 2)[2]]
    assert losses(launched["ranks"][0][case]["resumed"]) == same(losses(one[2:]))


@pytest.mark.parametrize("case", CASES)
def test_one_process_goes_on_where_two_stopped(launched: dict[str, Any], case: str) -> None:
    stage = case.split("-", 2)[2]
    state = torch.load(launched["folder"] / f"{case}.pt")
    training = worker.Training(worker.make_model(), stage)
    training.load(state)
    whole = training.model.state_dict()
    assert whole.keys() == state["whole"].keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state["whole"].items())
    resumed = [training.step(number) for number in range(2, 4)]
    assert losses(resumed) == same(losses(launched["ranks"][0][case]["steps"][2:]))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("fsdp2")])
def test_each_process_holds_its_share(launched: dict[str, Any], case: str) -> None:
    for place, rank in enumerate(launched["ranks"]):
        held = rank[case]["held"]
        assert held["trained"] == pytest.approx(0.5, abs=0.01)
        if "stage-3" not in case:
            assert held["frozen"] == pytest.approx(1.0 if "replicated" in case else 0.5, abs=0.01)
        # The first process alone has the model whole while it is saved.
        assert rank[case]["sharded"] == [place == 1, True]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_recomputed_blocks_give_the_same_losses(launched: dict[str, Any], kind: str) -> None:
    assert losses(launched["ranks"][0][kind]["recomputed"]) == same(losses(launched["one"]["stage-2"]))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_may_read_their_images_in_unequal_numbers_of_chunks(launched: dict[str, Any], kind: str) -> None:
    assert losses(launched["ranks"][0][kind]["chunked"]) == same(losses(launched["one"]["stage-3"][:1]))


def test_frozen_weights_keep_their_dtype_beside_trained_ones(launched: dict[str, Any]) -> None:
    ddp, fsdp = (launched["ranks"][0][kind] for kind in ("ddp", "fsdp2"))
    assert ddp["dtypes"] == fsdp["dtypes"]
    assert "torch.bfloat16" in fsdp["dtypes"]
    assert fsdp["mixed"][0]["loss"] == ddp["mixed"][0]["loss"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_evaluation_takes_unequal_shares(launched: dict[str, Any], kind: str) -> None:
    found = [rank[kind]["evaluated"] for rank in launched["ranks"]]
    samples = [worker.sample(number, text=number == 4) for number in range(5)]
    whole = mean_loss(worker.make_model().eval(), worker.Joined(), samples, batch_size=5)
    assert sum(loss for loss, _ in found) / sum(counted for _, counted in found) == same(whole)
    assert launched["ranks"][0][kind]["after"] == same(launched["one"]["stage-2"][0]["loss"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_what_one_process_cannot_make_stops_all(launched: dict[str, Any], kind: str) -> None:
    first, second = (rank[kind]["error"] for rank in launched["ranks"])
    assert first == "another process could not make its batch; its own message says why"
    assert second == "sample 7 is broken"


def test_a_step_whose_samples_were_all_left_out_is_refused() -> None:
    training = worker.Training(worker.make_model(), "stage-1")
    with pytest.raises(StepError, match="all samples of the step were left out"):
        training.step(0, iter([None, None]))


def test_blocks_and_layers_are_sharded_by_themselves() -> None:
    model = worker.make_model()
    assert sharding_units(model) == [*model.encoder.blocks(), *model.llm.model.layers]
    model.chunk_tokens = 17
    assert sharding_units(model) == list(model.llm.model.layers)


@pytest.mark.parametrize(
    ("recipe", "newline"), [("mlp", False), ("pixel_shuffle:factor=2+mlp", True), ("qformer:queries=4+mlp", False)]
)
def test_the_anchor_is_zero_and_reaches_all_before_the_llm(recipe: str, *, newline: bool) -> None:
    model = worker.make_model()
    connector = build_connector(recipe, model.encoder.token_spec, 32)
    layout = TileLayout(unpad=newline, newline=newline)
    model = VisionLanguageModel(model.encoder, connector, model.llm, image_token_id=worker.IMAGE, layout=layout)
    apply_stage(model, STAGE_3)
    zero = anchor(model, images=False)
    zero.backward()
    assert float(zero.detach()) == 0.0
    for part in (model.encoder, model.connector):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1, which flattens .*; set fsdp_version: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "fsdp_activation_checkpointing, .* gradient_checkpointing = true in the settings",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM, .* use DDP, FSDP2 or DeepSpeed"),
    ],
)
def test_what_accelerate_is_set_to_and_is_not_done_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(VlmError, match=message):
        make_accelerator(TrainConfig(data="", output="", cpu=True))


def test_parameters_do_not_share_their_count_of_steps() -> None:
    training, resumed = (worker.Training(worker.make_model(), "stage-2") for _ in range(2))
    training.step(0)
    state = training.state()
    count = torch.tensor(1.0)
    for values in state["optimizer"]["state"].values():
        values["step"] = count
    resumed.load(state)
    for number in (1, 2):
        assert resumed.step(number) == training.step(number)


@pytest.mark.parametrize("name", ["cpu_ddp", "ddp", "fsdp2", "zero2", "zero3", "multi_node"])
def test_accelerate_reads_the_shipped_configurations(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(Path(__file__).parents[1] / f"examples/accelerate/{name}.yaml"))
    assert found.num_processes > 1
    assert str(found.mixed_precision) == "no"


def test_weights_that_do_not_fit_are_refused() -> None:
    training = worker.Training(worker.make_model(), "stage-1")
    state = training.state()
    other = worker.Training(worker.make_model(), "stage-2")
    with pytest.raises(VlmError, match="the checkpoint does not fit the model: llm"):
        other.load(copy.deepcopy(state))
    state["optimizer"]["groups"][0]["names"].reverse()
    with pytest.raises(VlmError, match="optimizer has other parameters, or other groups"):
        training.load(state)
