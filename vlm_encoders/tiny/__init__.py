"""An embedded encoder, LLM and dataset: everything runs without a download."""

from vlm_encoders.tiny.dataset import write_dataset
from vlm_encoders.tiny.weights_folder import encoder_folder, llm_folder

__all__ = ["encoder_folder", "llm_folder", "write_dataset"]
