"""A frozen encoder's tokens, kept on the disk."""
