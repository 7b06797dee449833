"""One command in several processes: they begin together, and end with the first that ends.

torchrun starts the same command W times and tells each process its rank, by environment variables.
The processes meet at a store of keys and values (MASTER_ADDR, MASTER_PORT). What they compute
together is in ranks.py; here is the rest:

- Rank 0 alone prints and writes. The others do the same work, but what they print goes nowhere, and
  their files go into a temporary directory.
- The first to end, rank 0 with the command's result or any rank with an error, writes its rank,
  exit status and last line to the store. In each process a thread looks there, and then ends the
  process with the same status, whatever the process is waiting for.
- A process that is killed writes nothing. Others in an exchange with it see the closed connection.
  The threads also watch each other, so a machine that is gone is noticed. An exchange itself has no
  limit, because another rank may compute for an hour before it enters.
"""

import argparse
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from qwen_min.errors import UserError
from qwen_min.fast import ranks

Command = Callable[[argparse.Namespace], int]

BEGIN = timedelta(minutes=5)  # until all processes are there: imports from a slow disk take time
NO_LIMIT = timedelta(days=100)  # of an exchange
GRACE = 2  # seconds in which rank 0 can report an error that all ranks have
SILENT = 25  # seconds without a sign of life, then a process is lost; torchrun kills after 30
KILLED = "error: another process ended without a message (killed?); continue training by --resume"
STOPPED = "error: stopped by SIGTERM, which torchrun also sends when another process has ended"


def run(single: Callable[[Command, argparse.Namespace], int], command: Command, args) -> NoReturn:
    """Run the command as one process of several, and end the process.

    single: runs a command as in a single process, with error lines; returns its exit status.
    """
    try:
        store = join()
    except UserError as error:  # there is no way yet to agree on who says it
        print(f"error: {error}", file=sys.__stderr__, flush=True)
        os._exit(2)
    end, given, status, said = End(store), str(vars(args)), 1, ""
    signal.signal(signal.SIGTERM, lambda *_: end.terminated.set())

    def checked(args: argparse.Namespace) -> int:
        if ranks.rank:
            keep_apart(args, end.private)
        # All have copied by then what rank 0 will change.
        ranks.check_same("command line or versions", [given, sys.version, torch.__version__])
        if args.plain:
            raise UserError("--plain computes in a single process; start it without torchrun")
        return command(args)

    if ranks.rank:
        sys.stderr = io.StringIO()
    try:
        status = single(checked, args)
        if ranks.rank and status:  # its own error; or, as rank 0, the end of a stopped training
            last = sys.stderr.getvalue().rpartition("\n")[0].rpartition("\n")[2]
            if last.startswith(("error: ", "interrupted")):
                said = f"error: process {ranks.rank}: {last.removeprefix('error: ')}"
    except ranks.Lost:
        said = KILLED
    except Exception:
        said = traceback.format_exc().strip()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if said or ranks.rank:  # without an error rank 0 ends first, and `End` then ends this process
        time.sleep(GRACE if said else 1e6)
    end.all(status, said)


def join() -> distributed.Store:
    """Meet the other processes; returns the store. Raises UserError if that is impossible."""
    try:
        store, rank, size = next(rendezvous("env://", timeout=BEGIN))
        store.set(f"here {rank}", "")
        store.wait([f"here {other}" for other in range(size)], BEGIN)
        how = ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", None, NO_LIMIT)
        exchange = distributed.PrefixStore("exchange", store)
        distributed.init_process_group(*how, size, rank, exchange)
    except (RuntimeError, ValueError) as error:
        reason, size = str(error).split("\n")[0], os.environ["WORLD_SIZE"]
        found = f"WORLD_SIZE is {size}, but the processes do not find each other"
        raise UserError(f"{found} ({reason}); start all by torchrun, or unset it") from None
    ranks.rank, ranks.size = rank, size
    return store


def keep_apart(args: argparse.Namespace, private: Path) -> None:
    """Let the command write into `private`; a run to be resumed is copied there."""
    if "resume" in args:  # train.py
        if args.resume and os.path.isdir(args.output or ""):
            shutil.copytree(args.output, private / "run", ignore=shutil.ignore_patterns("features"))
        args.output, args.export, args.feature_cache = str(private / "run"), None, None
    elif "predictions" in args:  # evaluate.py
        args.output, args.predictions = str(private / "results"), str(private / "predictions")
    elif args.output:
        args.output = str(private / f"labels{Path(args.output).suffix}")


class End:
    """How this process learns that another one has ended, and the others that this one has."""

    def __init__(self, store: distributed.Store):
        self.store, self.private = store.clone(), Path(tempfile.mkdtemp(prefix="qwen_min-"))
        self.once, self.terminated = threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def all(self, status: int, said: str) -> NoReturn:
        """End all processes with this status, and say why, unless another one was the first."""
        self.once.acquire()  # by one of two threads
        first = own = f"{ranks.rank} {status}"
        with suppress(RuntimeError):  # the store is gone
            first = self.store.compare_set("end", "", own).decode()
        if first == own and said:
            print(said, file=sys.__stderr__, flush=True)
        shutil.rmtree(self.private, ignore_errors=True)
        time.sleep(0.5 * (ranks.rank == 0))  # the others look at the store, which may be its own
        os._exit(int(first.split()[1]))

    def _watch(self) -> None:
        others = range(1, ranks.size) if ranks.rank == 0 else [0]  # rank 0 watches all, all rank 0
        heard = dict.fromkeys(others, (0, time.monotonic()))
        try:
            while not self.store.check(["end"]):
                self.store.add(f"alive {ranks.rank}", 1)
                for other, (signs, last) in heard.items():
                    if (now := self.store.add(f"alive {other}", 0)) != signs:
                        heard[other] = (now, time.monotonic())
                    elif time.monotonic() - last > SILENT:
                        self.all(1, KILLED)
                if self.terminated.wait(0.2):
                    self.all(128 + signal.SIGTERM, STOPPED)
            self.all(1, "")
        except RuntimeError:  # the store is gone, with torchrun or with rank 0
            self.all(1, KILLED * (ranks.rank == 1))
