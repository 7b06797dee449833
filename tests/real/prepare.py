#!/usr/bin/env python3
"""Make real weights and real reviews (once), and print the command to run with them.

python tests/real/prepare.py
python tests/real/prepare.py 1.5b --dtype float32
"""

import argparse
import shlex
import sys
from pathlib import Path

# For a script, Python adds the script's folder to the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qwen_min.errors import UserError
from tests.real.make_checkpoint import DTYPE_BYTES, FAMILIES, ensure, say
from tests.real.make_reviews import ensure_reviews


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "size", nargs="?", choices=FAMILIES, default="0.5b", help="default: %(default)s"
    )
    parser.add_argument(
        "--dtype", choices=DTYPE_BYTES, default="bfloat16", help="default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    try:
        reviews = ensure_reviews()
        model = ensure(arguments.size, arguments.dtype)
    except UserError as error:
        say(f"error: {error}")
        return 2
    command = ["python", "evaluate.py", "--method", "zero_shot", "--model", str(model)]
    command += ["--data", str(reviews / "dev.tsv")]
    print(f"weights: {model}\nreviews: {reviews}\nnext: {shlex.join(command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
