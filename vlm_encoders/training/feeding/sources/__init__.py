"""Where conversations come from: files, Hugging Face datasets and tar shards, each row as one record."""
