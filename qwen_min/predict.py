"""Entry point of `python -m qwen_min.predict`; see command/predict.py."""

import sys

from qwen_min.command.predict import main

if __name__ == "__main__":
    sys.exit(main())
