"""The command `vlm-encoders`, one sub-command a file."""
