"""Entry point of `python -m qwen_min.report`; see tables.py."""

import sys

from qwen_min.report.tables import main

if __name__ == "__main__":
    sys.exit(main())
