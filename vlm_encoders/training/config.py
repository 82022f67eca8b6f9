"""What a training run is: one frozen record, written as TOML."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

from connectors.errors import VlmError
from connectors.registry import nearest
from vlm_encoders.training.feeding.sources.spec import DataName
from vlm_encoders.training.setting_checks import check_range, check_type

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of one training run; paths are relative to the working directory.

    Raises:
        VlmError: a value has the wrong type, is out of range, or contradicts another.
    """

    data: str
    """Conversations to train on: a JSON or JSONL file, tar shards such as `shards/*.tar`, or a dataset's name or
    folder, as in `hf:NAME[split=train,streaming=true]`."""
    image_folder: str | None = None
    """Folder that relative image paths of `data` and `eval_data` start from; None for that of the data file."""
    output: str
    """Folder for checkpoints and the log."""
    eval_data: str | None = None
    """Conversations to evaluate on, never trained on, named as `data` is."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What a sample that cannot be made does: stop the run, or be left out, counted and logged."""
    max_bad_samples: int = 100
    """Samples that may be left out before the run stops all the same."""
    shuffle_buffer: int = 1000
    """Samples of a stream that are drawn from at random; data that can be indexed is shuffled whole."""
    encoder: str | None = None
    """Encoder name, as `create_encoder` takes it."""
    connector: str | None = None
    """Connector recipe, such as `pixel_shuffle:factor=2+mlp`."""
    llm: str | None = None
    """Hub id or folder of the language model; the commands take "tiny" for the embedded one."""
    tiler: str | None = None
    """Name of the tiler with its options, such as `internvl:max_tiles=6`; None for one view an image."""
    model: str | None = None
    """Folder of a saved model to start from, in place of encoder, connector, llm and tiler."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of encoder and LLM, also of a saved `model` where it is "bfloat16"; the connector stays float32.

    A weight that itself trains in bfloat16 loses every update below 1/256 of its size, so train a
    whole LLM in float32 with mixed_precision "bf16", or by LoRA, whose adapters are float32. In
    float16 nothing can train but what is float32."""
    quantize: Literal["no", "nf4"] = "no"
    """Hold the LLM in 4 bits, for a stage whose LLM policy is "qlora"; needs bitsandbytes."""
    stage: str = "stage-1"
    """What trains: the name of a stage policy, or a TOML file of policies by part."""
    steps: int | None = None
    """Optimizer steps; None to count by `epochs`."""
    epochs: int | None = None
    """Passes over the data, 1 when `steps` is None too."""
    batch_size: int = 8
    """Samples of one forward pass on one process."""
    gradient_accumulation: int = 1
    """Forward passes of one process before an optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate of every part that trains; None for the stage policy's own, part by part."""
    weight_decay: float = 0.0
    """AdamW decay of the matrices; norms, biases and learned tokens have none."""
    warmup_ratio: float = 0.03
    """Part of the steps in which the learning rate rises."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up; "wsd" stays at the peak and falls at the end."""
    decay_ratio: float = 0.1
    """Part of the steps in which "wsd" falls."""
    floor_ratio: float = 0.0
    """Part of the peak learning rate at which cosine and "wsd" end."""
    max_grad_norm: float | None = 1.0
    """Norm to which gradients are clipped; None for no clipping."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the forward pass; what trains is held in float32 whatever the dtype."""
    gradient_checkpointing: bool = False
    """Compute the blocks of what gradients pass through again in the backward pass, in place of keeping them."""
    frozen_parts: Literal["replicated", "sharded"] = "replicated"
    """Where training is sharded (FSDP): whether each process holds frozen parts whole, or its share."""
    group_by_length: bool = False
    """Draw batches of samples of like length, which are padded less."""
    pack_tokens: int | None = None
    """Tokens of a pack: samples stand one after another in place of padding, `batch_size` packs a forward
    pass, each sample attending to itself alone; None for padding."""
    token_cache: str | None = None
    """Folder in which a frozen encoder's tokens are kept, so that each image is encoded once; None for none."""
    max_length: int | None = None
    """Longest sample in tokens; None for the limit of the processor."""
    max_image_tokens: int | None = None
    """The most tokens that an image may cost, markers included; None for the limit of the processor."""
    chunk_tokens: int | None = None
    """The most tokens that the encoder sees at once, which bounds the memory of a frozen one; None for all."""
    num_workers: int = 0
    """Processes that load data, on each training process."""
    seed: int = 0
    """Seed of new weights, of the data order and of dropout."""
    save_every: int | None = 500
    """Steps between checkpoints; None for one at the end alone."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    keep_best: bool = True
    """Save the model of the lowest evaluation loss to `output`/best."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int | None = None
    """Steps between evaluations of the loss on `eval_data`; None for one at the end."""
    tracker: Literal["auto", "tensorboard", "wandb", "none"] = "auto"
    """Where the log goes beside `output`/log.jsonl; "auto" for TensorBoard where it is installed."""
    progress: bool | None = None
    """Progress bar; None for one on a terminal and plain lines elsewhere."""
    cpu: bool = False
    """Train on the CPU even where an accelerator is present."""

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            check_type(field.name, value, hints[field.name])
            check_range(field.name, value)
        if self.steps is not None and self.epochs is not None:
            raise VlmError(f"steps={self.steps} and epochs={self.epochs} both set the length; give one of them")
        parts = [name for name in ("encoder", "connector", "llm", "tiler") if getattr(self, name) is not None]
        if self.dtype == "float16" and (self.model is not None or self.mixed_precision == "bf16"):
            raise VlmError('dtype="float16" does not go with a saved model or with bf16; set dtype="bfloat16"')
        if self.quantize != "no":
            parts.append("quantize")
        if self.model is not None and parts:
            raise VlmError(f"model='{self.model}' has its own {', '.join(parts)}; leave these out, or the model")

    @property
    def images(self) -> Path:
        """The folder that relative image paths start from."""
        return DataName.parse(self.data).folder if self.image_folder is None else Path(self.image_folder)

    @classmethod
    def from_toml(cls, path: str | Path, **given: Any) -> Self:
        """Read a configuration whose keys are the fields of this class.

        Args:
            path: the TOML file.
            **given: settings that stand over those of the file.

        Raises:
            VlmError: the file cannot be read, is not TOML, or has an unknown, missing or wrong key.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise VlmError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
        except UnicodeDecodeError as error:
            raise VlmError(f"{path}: is not UTF-8 text at byte {error.start}; save it as UTF-8") from error
        except tomllib.TOMLDecodeError as error:
            raise VlmError(f"{path}: is not TOML: {error}; write each line as key = value, texts in quotes") from error
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise VlmError(f"{path}: no setting '{key}'; {nearest(key, known)}")
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if one in given and other not in given:
                # Both set the length, so either replaces whichever the file has.
                values.pop(other, None)
        values |= given
        missing = [name for name in ("data", "output") if name not in values]
        if missing:
            raise VlmError(f'{path}: lacks {", ".join(missing)}; add a line such as {missing[0]} = "..."')
        try:
            return cls(**values)
        except VlmError as error:
            raise VlmError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as plain values; `TrainConfig(**settings)` makes them again."""
        return asdict(self)
