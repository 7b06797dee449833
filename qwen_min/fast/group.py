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

END, LEFT = "end", "left"  # keys: how the first process ended; how many know of it
BEGIN = timedelta(minutes=5)  # until all processes are there: imports from a slow disk take time
SILENT = 40  # seconds without a sign of life after which a process is lost
GRACE = 2  # seconds in which rank 0 can report an error that all ranks have
KILLED = "another process ended without a message (was it killed?); continue training by --resume"
STOPPED = "stopped by SIGTERM, which torchrun also sends when another process has ended"


class Terminated(BaseException):
    """SIGTERM."""


def run(single: Callable[[Command, argparse.Namespace], int], command: Command, args) -> NoReturn:
    """Run the command as one process of several, and end the process.

    single: runs a command as in a single process, with error lines; returns its exit status.
    """
    try:
        store = join(args.device)
    except UserError as error:  # there is no way yet to agree on who says it
        print(f"error: {error}", file=sys.__stderr__, flush=True)
        os._exit(2)
    end, given = End(store), str(vars(args))
    signal.signal(signal.SIGTERM, _terminate)

    def checked(args: argparse.Namespace) -> int:
        if ranks.rank:
            keep_apart(args, end.private)
        ranks.check_same("command line", given)  # also: all have copied what rank 0 will change
        ranks.check_same("version of Python or torch", sys.version, torch.__version__)
        if args.plain:
            raise UserError("--plain computes in a single process; start it without torchrun")
        return command(args)

    status, line, bug = 1, "", None
    if ranks.rank:
        sys.stderr = io.StringIO()
    try:
        status = single(checked, args)
        if ranks.rank and status:  # what `single` said
            line = (sys.stderr.getvalue().splitlines() or [""])[-1]
            line = line if line.startswith(("error: ", "interrupted")) else ""
    except ranks.Lost:
        line = KILLED
    except Terminated:
        status, line = 128 + signal.SIGTERM, STOPPED
    except BaseException as error:
        line, bug = "a bug", error
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end.report(status, line.removeprefix("error: "), bug)


def join(device: str) -> distributed.Store:
    """Meet the other processes; returns the store. Raises UserError if that is impossible."""
    try:
        store, rank, size = next(rendezvous("env://", timeout=BEGIN))
        store.set(f"here {rank}", "")
        store.wait([f"here {other}" for other in range(size)], BEGIN)
        cuda = device in ("auto", "cuda") and torch.cuda.is_available()
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=distributed.PrefixStore("exchange", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(days=100),
        )
    except (RuntimeError, ValueError) as error:
        reason, size = str(error).split("\n")[0], os.environ["WORLD_SIZE"]
        found = f"WORLD_SIZE is {size}, but the processes do not find each other"
        raise UserError(f"{found} ({reason}); start all by torchrun, or unset it") from None
    ranks.rank, ranks.size = rank, size
    return store


def keep_apart(args: argparse.Namespace, private: Path) -> None:
    """Let the command write into `private`; a run to be resumed is copied there."""
    if "resume" in args:  # train.py
        run = args.output or f"runs/{args.method}"
        if args.resume and os.path.isdir(run):
            ignored = shutil.ignore_patterns("features", ".*", "results-*", "predictions-*")
            shutil.copytree(run, private / "run", ignore=ignored)
        args.output, args.export, args.feature_cache = str(private / "run"), None, None
    elif "predictions" in args:  # evaluate.py
        args.output, args.predictions = str(private / "results"), str(private / "predictions")
    elif args.output:
        args.output = str(private / f"labels{Path(args.output).suffix}")


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


class End:
    """How this process learns that another one has ended, and the others that this one has."""

    def __init__(self, store: distributed.Store):
        self.store, self.private = store.clone(), Path(tempfile.mkdtemp(prefix="qwen_min-"))
        self.watches, self.leaves = True, threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def report(self, status: int, line: str, bug: BaseException | None = None) -> NoReturn:
        """End all processes with this status, unless another one is the first.

        line: what went wrong; of rank 0 only what is not printed yet. Where it is empty there is
        nothing to add to rank 0's result, which may still be on its way to the disk.
        """
        if ranks.rank or line:
            time.sleep(GRACE if line else 1e6)  # meanwhile `_watch` may end this process
        own = f"{ranks.rank} {status}"
        if (first := self.store.compare_set(END, "", own).decode()) != own:
            self._leave(int(first.split()[1]))
        self.watches = False
        if bug:
            traceback.print_exception(bug, file=sys.__stderr__)
        elif line:
            said = f"process {ranks.rank}: " * bool(ranks.rank) + line
            print(f"error: {said}", file=sys.__stderr__)
        self._leave(status)

    def _watch(self) -> None:
        # Rank 0 watches all, all watch rank 0.
        others = range(1, ranks.size) if ranks.rank == 0 else [0]
        heard = dict.fromkeys(others, (0, time.monotonic()))
        next_sign = 0.0
        while self.watches:
            try:
                if self.store.check([END]) and self.watches:
                    self._leave(int(self.store.get(END).split()[1]))
                if (now := time.monotonic()) >= next_sign:
                    next_sign = now + 2
                    self.store.add(f"alive {ranks.rank}", 1)
                    signs = {other: self.store.add(f"alive {other}", 0) for other in others}
                    heard |= {o: (n, now) for o, n in signs.items() if n != heard[o][0]}
                    if lost := [o for o, (_, last) in heard.items() if now - last > SILENT]:
                        self.report(1, f"no sign of process {lost[0]} for {SILENT} s; {KILLED}")
            except RuntimeError:  # the store is gone, with rank 0 or with torchrun
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print(f"error: {KILLED}", file=sys.__stderr__)
                self._leave(1)
            time.sleep(0.2)

    def _leave(self, status: int) -> NoReturn:
        """End this process. Rank 0, whose own the store may be, waits until all know, or 2 s."""
        self.leaves.acquire()  # once, by one of two threads
        shutil.rmtree(self.private, ignore_errors=True)
        for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
            with suppress(OSError, ValueError):
                stream.flush()
        with suppress(RuntimeError):
            know, until = self.store.add(LEFT, 1), time.monotonic() + 2
            while ranks.rank == 0 and know < ranks.size and time.monotonic() < until:
                time.sleep(0.05)
                know = self.store.add(LEFT, 0)
        os._exit(status)
