"""`python -m vlm_encoders` is the command `vlm-encoders`."""

from vlm_encoders.cli.main import main

if __name__ == "__main__":
    main()
