"""An example plugin of vlm-encoders: one encoder, one connector."""
