"""The model: encoder, connector and LLM joined, its stages, its samples, its checkpoints."""
