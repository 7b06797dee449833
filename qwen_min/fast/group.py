"""One command in several processes: they start together, and when one ends, all end.

torchrun starts the same command W times and tells each process its rank, by environment variables.
The processes meet at a key-value store (MASTER_ADDR, MASTER_PORT). What they compute together is in
ranks.py; here is the rest:

- Rank 0 alone prints and writes. The others do the same work, but what they print goes nowhere, and
  their files go into a temporary directory.
- The first to end, rank 0 with the command's result or any rank with an error, writes its rank,
  exit status and last line to the store. In each process a thread polls the store and then ends the
  process with the same status, even inside an exchange.
- A process that is killed writes nothing. Others in an exchange with it see the closed connection.
  The threads also exchange heartbeats, so a machine that is gone is noticed. An exchange itself has
  no time limit, because another rank may compute for an hour before it enters.
"""

import argparse
import io
import os
import re
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

START_LIMIT = timedelta(minutes=5)  # until all are there: imports from a slow disk take time
NO_LIMIT = timedelta(days=100)  # of an exchange
GRACE = {1: 2, 2: 10}  # by exit status, seconds in which rank 0 can report an error of all ranks
POLL = 0.2  # seconds
SILENT = 125  # polls without a heartbeat, then a process is lost; torchrun kills after 30 s
KILLED = "error: {} (was another process killed?); continue training by --resume"
STOPPED = "error: stopped by SIGTERM, which torchrun also sends when another process has ended"


def run(run_single: Callable[[Command, argparse.Namespace], int], command: Command, args):
    """Run the command as one process of several, and end the process.

    run_single: runs a command as in a single process, with error lines; returns its exit status.
    """
    try:
        join()
    except UserError as error:  # they cannot communicate yet, so each prints it
        print(f"error: {error}", file=sys.__stderr__, flush=True)
        os._exit(2)
    end, given, status, message = End(), str(vars(args)), 1, ""
    signal.signal(signal.SIGTERM, lambda *_: end.terminated.set())

    def checked(args: argparse.Namespace) -> int:
        if ranks.rank:
            redirect_output(args, end.temporary)
        # After this exchange every rank has its copy of the run, so rank 0 may change it.
        ranks.check_same("command line or versions", [given, sys.version, torch.__version__])
        if args.plain:
            raise UserError("--plain computes in a single process; start it without torchrun")
        return command(args)

    if ranks.rank:
        sys.stderr = io.StringIO()
    try:
        status = run_single(checked, args)
        if ranks.rank and status:
            last = sys.stderr.getvalue().rpartition("\n")[0].rpartition("\n")[2]
            # No error line: the training was stopped, as that of rank 0 was.
            if last.startswith(("error: ", "interrupted")):
                message = f"error: process {ranks.rank}: {last.removeprefix('error: ')}"
    except ranks.Lost as lost:
        # Gloo begins with a place in its source, and ends with advice.
        reason = re.sub(r"^\[\S+\] ", "", str(lost.__cause__)).splitlines()[0].split(". ")[0]
        message = KILLED.format(reason)
    except Exception:
        message = traceback.format_exc().strip()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if message:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(GRACE.get(status, 0))
    elif ranks.rank:  # rank 0 ends first, and then the thread of `End` ends this process
        time.sleep(1e6)
    with suppress(OSError):
        sys.stdout.flush()
    end.all(status, message)


def join() -> None:
    """Meet the other processes. Raises UserError if that is impossible."""
    try:
        store, rank, size = next(rendezvous("env://", timeout=START_LIMIT))
        store.set(f"here {rank}", "")
        store.wait([f"here {other}" for other in range(size)], START_LIMIT)
        how = ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", None, NO_LIMIT)
        exchange = distributed.PrefixStore("exchange", store)
        distributed.init_process_group(*how, size, rank, exchange)
    except (RuntimeError, ValueError) as error:
        reason, size = str(error).split("\n")[0], os.environ["WORLD_SIZE"]
        found = f"WORLD_SIZE is {size}, but the processes do not find each other"
        raise UserError(f"{found} ({reason}); start all by torchrun, or unset it") from None
    ranks.rank, ranks.size = rank, size


def redirect_output(args: argparse.Namespace, temporary: Path) -> None:
    """Let the command write into `temporary`; a run to be resumed is copied there."""
    if "resume" in args:  # train.py
        if args.resume and os.path.isdir(args.output or ""):
            ignored = shutil.ignore_patterns("features", "results*", "predictions*")
            shutil.copytree(args.output, temporary / "run", ignore=ignored)
        args.output = str(temporary / "run")
    elif "predictions" in args:  # evaluate.py
        args.output, args.predictions = str(temporary / "results"), str(temporary / "predictions")
    elif args.output:
        args.output = str(temporary / f"labels{Path(args.output).suffix}")


class End:
    """Reports the end of this process, and notices the end of others."""

    def __init__(self) -> None:
        # A connection of its own: the exchanges' may be busy. And keys of their own, should
        # torchrun start everything again.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(*address, is_master=False, wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = distributed.PrefixStore(f"end {attempt}", store)
        self.temporary = Path(tempfile.mkdtemp(prefix="qwen_min-"))
        self.once, self.terminated = threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def all(self, status: int, message: str) -> NoReturn:
        """End all processes with this status, and say why, unless another one was the first."""
        self.once.acquire()  # by one of two threads
        first = own = f"{ranks.rank} {status}"
        with suppress(RuntimeError):  # the store is gone
            first = self.store.compare_set("end", "", own).decode()
        if first == own and message:
            with suppress(OSError):
                print(message, file=sys.__stderr__, flush=True)
        shutil.rmtree(self.temporary, ignore_errors=True)
        time.sleep(0.5 * (ranks.rank == 0))  # the others look at the store, which may be its own
        os._exit(int(first.split()[1]))

    def _watch(self) -> None:
        others = range(1, ranks.size) if ranks.rank == 0 else [0]  # rank 0 watches all, all rank 0
        heartbeats, silent = dict.fromkeys(others, 0), dict.fromkeys(others, 0)
        try:
            while not self.store.check(["end"]):
                self.store.add(f"heartbeats {ranks.rank}", 1)
                for other in others:
                    now = self.store.add(f"heartbeats {other}", 0)
                    silent[other] = silent[other] + 1 if now == heartbeats[other] else 0
                    heartbeats[other] = now
                    if silent[other] == SILENT:
                        self.all(1, KILLED.format(f"process {other} is silent"))
                if self.terminated.wait(POLL):
                    self.all(128 + signal.SIGTERM, STOPPED)
            self.all(1, "")
        except RuntimeError:  # the store is gone, with torchrun or with rank 0
            self.all(1, KILLED.format("the common store is gone") * (ranks.rank == 1))
