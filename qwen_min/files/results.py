"""The names of the files that an evaluation writes."""

import argparse
import hashlib
import os


def name_outputs(args: argparse.Namespace, record: dict, data_hash: str) -> None:
    """Set --output and --predictions, where not given, to files in the run's directory.

    The name depends on the data, and on settings that differ from the run's (`args.changed`), so
    that different results never replace each other.
    """
    parts = [data_hash[:12]] if args.method == record["method"] else [args.method, data_hash[:12]]
    if args.changed:
        parts.append(hashlib.sha256(" ".join(args.changed).encode()).hexdigest()[:8])
    ending = "-".join(parts)
    args.output = args.output or os.path.join(args.run, f"results-{ending}.json")
    args.predictions = args.predictions or os.path.join(args.run, f"predictions-{ending}.jsonl")
