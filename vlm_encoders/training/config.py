"""What a training run is: one frozen record, written as TOML."""

from __future__ import annotations

import math
import tomllib
import types
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from connectors.errors import VlmError
from connectors.registry import nearest

__all__ = ["TrainConfig"]

_AT_LEAST_ONE = (
    "batch_size",
    "gradient_accumulation",
    "steps",
    "epochs",
    "save_every",
    "log_every",
    "eval_every",
    "keep_checkpoints",
    "max_length",
    "max_image_tokens",
    "chunk_tokens",
)
_AT_LEAST_ZERO = ("weight_decay", "num_workers", "seed")
_ABOVE_ZERO = ("learning_rate", "max_grad_norm")
_WORDS = {str: "a text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
_FRACTIONS = ("warmup_ratio", "floor_ratio")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of one training run; paths are relative to the working directory.

    Raises:
        VlmError: a value has the wrong type, is out of range, or contradicts another.
    """

    data: str
    """LLaVA conversations to train on, a JSON list or JSON Lines."""
    image_folder: str
    """Folder that the image paths of `data` and `eval_data` start from."""
    output: str
    """Folder for checkpoints and the log."""
    eval_data: str | None = None
    """LLaVA conversations to evaluate on, never trained on."""
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
    """Dtype of encoder and LLM; the connector, which trains, stays float32.

    A weight that itself trains in bfloat16 loses every update below 1/256 of its size, so train a
    whole LLM in float32 with mixed_precision "bf16", or by LoRA, whose adapters are float32. In
    float16 nothing can train but what is float32."""
    stage: str = "stage-1"
    """Name of the stage policy that says what trains."""
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
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    floor_ratio: float = 0.0
    """Part of the peak learning rate at which the cosine ends."""
    max_grad_norm: float | None = 1.0
    """Norm to which gradients are clipped; None for no clipping."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the forward pass."""
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
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int | None = None
    """Steps between evaluations of the loss on `eval_data`; None for one at the end."""
    progress: bool | None = None
    """Progress bar; None for one on a terminal and plain lines elsewhere."""
    cpu: bool = False
    """Train on the CPU even where an accelerator is present."""

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, hints[field.name])
            _check_range(field.name, value)
        if self.steps is not None and self.epochs is not None:
            raise VlmError(f"steps={self.steps} and epochs={self.epochs} both set the length; give one of them")
        parts = [name for name in ("encoder", "connector", "llm", "tiler") if getattr(self, name) is not None]
        if self.dtype != "float32":
            parts.append("dtype")
        if self.model is not None and parts:
            raise VlmError(f"model='{self.model}' has its own {', '.join(parts)}; give the model or its parts")

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
        missing = [name for name in ("data", "image_folder", "output") if name not in values]
        if missing:
            raise VlmError(f'{path}: lacks {", ".join(missing)}; add a line such as {missing[0]} = "..."')
        try:
            return cls(**values)
        except VlmError as error:
            raise VlmError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as plain values; `TrainConfig(**settings)` makes them again."""
        return asdict(self)


def _check_type(name: str, value: object, hint: Any) -> None:
    options = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    words: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            if value in get_args(option):
                return
            words.extend(repr(choice) for choice in get_args(option))
        elif _is_a(value, option):
            return
        elif option is not type(None):
            words.append(_WORDS[option])
    raise VlmError(f"{name} must be {' or '.join(words)}, got {value!r} ({type(value).__name__})")


def _is_a(value: object, kind: Any) -> bool:
    # bool is an int to Python, never to a reader of the file.
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _check_range(name: str, value: Any) -> None:
    if value is None:
        return
    if name in _AT_LEAST_ONE and value < 1:
        raise VlmError(f"{name} must be at least 1, got {value}")
    if name in _AT_LEAST_ZERO and not 0 <= value < math.inf:
        raise VlmError(f"{name} must be 0 or more, got {value}")
    if name in _ABOVE_ZERO and not 0 < value < math.inf:
        raise VlmError(f"{name} must be above 0, got {value}")
    if name in _FRACTIONS and not 0 <= value <= 1:
        raise VlmError(f"{name} must be between 0 and 1, got {value}")
