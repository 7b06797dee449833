"""Entry point of `python -m qwen_min.audit`; see report/audit.py."""

import sys

from qwen_min.report.audit import main

if __name__ == "__main__":
    sys.exit(main())
