"""Entry point of `python -m qwen_min.predict`; see command/predict.py."""

import signal
import sys

from qwen_min.command.predict import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops it as Ctrl-C does
    sys.exit(main())
