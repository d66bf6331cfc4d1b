"""How a training script starts: its arguments, and its processes on one machine or on several."""

import argparse
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from imrcnn_d2.engine.hooks import EXIT_INTERRUPTED, SIGNALS, Interrupted, interruptible
from imrcnn_d2.utils.files import BadInputError, check_no_way_out, for_terminal, lock_folder

logger = logging.getLogger(__name__)

# Of one collective: the others wait in it while the main process computes confidence intervals.
TIMEOUT = timedelta(minutes=30)
CONNECT_TIMEOUT = timedelta(minutes=10)  # machines of a cluster do not start at once
LOCK_TIMEOUT = 10  # seconds: data loaders of a training that was killed live on for some
GRACE = 10  # seconds to end by itself after SIGTERM, before SIGKILL

# Of file systems of some clusters.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_INTERRUPTED = "The job was interrupted and ended. To continue: the same command with --resume"
_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_PACKAGE = Path(__file__).resolve().parents[1]


def launch_script(
    main: Callable[[argparse.Namespace], object], args: argparse.Namespace | None = None
) -> None:
    """Run ``main(args)`` in as many processes as ``args``, Detectron2's usual ones, ask for.

    ``--num-gpus`` is the number of processes on this machine: one on each card, or on the CPU where
    there is no card. With ``--num-machines`` every machine gets the same command with its own
    ``--machine-rank`` and with the address of machine 0 as ``--dist-url``. Under ``torchrun`` the
    process joins those that ``torchrun`` started, and a restart by it implies ``--resume``.

    When a process dies, all others of the job are ended within seconds, on all machines, and each
    machine reports which it was. SIGTERM and SIGINT are passed on to the processes, which may take
    as long as they need to save (torch's elastic launcher kills them after 30 seconds).

    Args:
        main: defined at the top level of a module.

    Raises:
        SystemExit: with ``EXIT_INTERRUPTED`` if the job was interrupted, else with the code of the
            process that failed (128 + the signal's number if one killed it), or 1; an error that
            names a file is one line on stderr, see `one_line_refusals`.
        ValueError: for arguments that do not fit this machine.
    """
    args = args or default_argument_parser().parse_args()
    with interruptible():
        if _TORCHRUN <= os.environ.keys():
            args.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
            store, rank, size = next(dist.rendezvous("env://", timeout=CONNECT_TIMEOUT))
            store = _part_of_this_attempt(store, rank, size)
            local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
            _join(main, args, *local, store=store, rank=rank, world_size=size)
        elif args.num_gpus * args.num_machines > 1:
            _Machine(main, args).run()
        else:
            _run(main, args)


def _run(main, args):
    try:
        with one_line_refusals(OSError, BadInputError, FloatingPointError):
            main(args)
    except BaseException as error:
        # A loader ends its workers, which ignore SIGTERM, when it is freed; else the exit waits for
        # them.
        link = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        raise


@contextlib.contextmanager
def one_line_refusals(*classes: type[Exception]) -> Iterator[None]:
    """End with status 1 and one line where our own code refuses something, or a file fails; other
    errors, those of defects, keep their tracebacks.

    Before the first iteration a ValueError is about what the user gave; afterwards it is a defect.
    Commands other than the training show no traceback at all, see `imrcnn_d2.cli.one_line_errors`.
    """
    try:
        yield
    except classes as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        refused = Path(last.filename).is_relative_to(_PACKAGE) and last.line.startswith("raise ")
        if not refused and getattr(error, "filename", None) is None:
            raise
        sys.exit(f"{os.path.basename(sys.argv[0])}: {for_terminal(error)}")


def set_up(
    output_dir: str, args: argparse.Namespace, config: str, seed: int, benchmark: bool = False
) -> None:
    """As Detectron2's ``default_setup``: loggers, the generators' seed (negative: random), cuDNN.
    It does not write config.yaml, since weights of an earlier training may need the one there.

    log.txt gets all messages; the screen ours, the losses, warnings, and how far an evaluation is.
    """
    rank = comm.get_rank()
    for name in ("fvcore", "timm", "detectron2", "imrcnn_d2"):
        for handler in setup_logger(output_dir, distributed_rank=rank, name=name).handlers:
            if handler.stream is sys.stdout:
                handler.addFilter(_is_for_screen)
    for title, text in (
        ("Environment", collect_env_info()),
        ("Arguments", args),
        ("Config", config),
    ):
        logger.debug("%s:\n%s", title, text)
    seed_all_rng(None if seed < 0 else seed + rank)
    if not args.eval_only:  # it costs more than it gains on the few images of an evaluation
        torch.backends.cudnn.benchmark = benchmark


def _is_for_screen(record: logging.LogRecord) -> bool:
    if record.exc_info or record.name.startswith("timm"):  # an error is printed at the end
        return False
    shown = record.name.startswith(("imrcnn_d2", "detectron2.utils.events"))
    shown |= record.getMessage().startswith("Inference done")
    return record.levelno >= (logging.INFO if shown else logging.WARNING)


@contextlib.contextmanager
def locked_output(folder: str) -> Iterator[None]:
    """Keep other jobs out of OUTPUT_DIR. To be entered by all processes of a job, before it writes.

    Raises:
        ValueError: another job is writing into it; or it holds a link that leads out of it, which
            Detectron2's logs and config.yaml would be written through, or a pipe.
    """
    lock = problem = None
    if comm.is_main_process():
        try:
            check_no_way_out(folder)
            lock = lock_folder(folder, "OUTPUT_DIR", LOCK_TIMEOUT)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) in _NO_LOCKS:
                logger.warning("No lock in %s (%s): start no other job there", folder, error)
            else:
                problem = str(error)
    problem = comm.all_gather(problem)[0]
    if problem:
        raise ValueError(problem)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def leave_process_groups() -> None:
    """Wait for all processes, then end the process groups and their threads.

    A group's threads end with the last reference to it, and ``destroy_process_group`` drops only
    torch's: Detectron2 and DDP keep some. A thread that outlives them and releases a tensor while
    the interpreter shuts down aborts the process ("terminate called without an active exception").
    """
    comm.synchronize()  # nobody leaves, and is missed, while the main process still saves
    comm._LOCAL_PROCESS_GROUP = None
    comm.create_local_process_group.cache_clear()
    comm._get_global_gloo_group.cache_clear()
    gc.collect()
    dist.destroy_process_group()


def _join(main, args, local_rank, local_size, **init):
    """Run ``main(args)`` as one process of a job; ``init`` as of ``init_process_group``."""
    backend = "gloo"
    if torch.cuda.is_available():
        _check_cards(local_size)
        torch.cuda.set_device(local_rank)  # "cuda" means this card from here on
        backend = "cpu:gloo,cuda:nccl"  # MODEL.DEVICE may be "cpu" all the same
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    dist.init_process_group(backend, timeout=TIMEOUT, **init)
    comm.create_local_process_group(local_size)
    try:
        _run(main, args)
    except SystemExit as end:
        # On Interrupted this process leaves alone; after an iteration all do.
        if end.code == EXIT_INTERRUPTED and not isinstance(end, Interrupted):
            leave_process_groups()
        raise
    leave_process_groups()


def _part_of_this_attempt(store, rank, world_size):
    """A part of torchrun's store that holds nothing from before a restart.

    torchrun keeps one store over its restarts (seen in torch 2.14), and a process that finds there
    where a dead one listened waits for it in vain. Machines may count restarts differently: so
    process 0 offers a new part, and the others take it once it has seen their new names.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        store.set("offer", name)
        names = [store.get(f"{name}/{other}") for other in range(1, world_size)]
        store.set(f"{name}/names", b" ".join(names))
        return dist.PrefixStore(name, store)
    while True:
        offer = store.get("offer").decode()
        store.set(f"{offer}/{rank}", name)
        names = f"{offer}/names"
        if store.check([names]) and name in store.get(names).decode().split():
            return dist.PrefixStore(offer, store)
        time.sleep(0.1)


def _check_cards(processes):
    cards = torch.cuda.device_count()
    if processes > cards:
        raise ValueError(
            f"{processes} processes for {cards} usable cards: use --num-gpus {cards} (torchrun: "
            f"--nproc-per-node {cards}), or hide the cards to run on the CPU: CUDA_VISIBLE_DEVICES="
        )


def _worker(local_rank, main, args, host, port):
    os.setsid()  # Ctrl-C reaches the parent alone, which passes it on: once, not twice
    try:
        with interruptible():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            store = dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT)
            store = dist.PrefixStore("processes", store)
            rank = args.machine_rank * args.num_gpus + local_rank
            size = args.num_machines * args.num_gpus
            _join(main, args, local_rank, args.num_gpus, store=store, rank=rank, world_size=size)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


class _Machine:
    """The processes of one machine, and the store that it shares with the other machines of the
    job. The parent process on machine 0 serves it: it outlives all who ask it.
    """

    def __init__(self, main, args):
        self._args, self._processes, self._received = args, (), None
        if torch.cuda.is_available():
            _check_cards(args.num_gpus)
        host, port = self._address()
        serves = args.machine_rank == 0
        options = {"wait_for_workers": False, "timeout": CONNECT_TIMEOUT}
        try:
            self._store = dist.TCPStore(host, port, is_master=serves, **options)
        except dist.DistError as error:
            raise RuntimeError(
                f"--dist-url: no connection through {host}:{port} ({error}): "
                "name machine 0 and a port that is free there and open to the others"
            ) from error
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        # A process starts with the signals that are blocked here, and takes them once it has its
        # handlers. The tracker, which is started along with the first one, would unblock them.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            arguments = (main, args, host, self._store.port)
            started = mp.start_processes(_worker, arguments, nprocs=args.num_gpus, join=False)
            self._processes = started.processes
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self._received is not None:
            self._pass_on(self._received, None)

    def _address(self):
        if self._args.num_machines == 1:
            return "127.0.0.1", 0  # any free port
        url, default = self._args.dist_url, default_argument_parser().get_default("dist_url")
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        if url == default or not (host and port.isdigit()):
            raise ValueError(
                f"--dist-url {url}: several machines need tcp://HOST:PORT, the same on all of "
                "them, with a name or address of machine 0 and a free port there"
            )
        return host, int(port)

    def _pass_on(self, number, frame):
        self._received = number
        for process in self._running():
            os.kill(process.pid, number)

    def _running(self):
        return [process for process in self._processes if process.exitcode is None]

    def run(self):
        """Wait for the end of the job and leave with its exit code."""
        failure = self._wait()
        if failure:
            self._end_processes()
        with contextlib.suppress(dist.DistError):  # machine 0 is gone, and nobody waits
            self._wait_for_machines()
        if failure:
            text, code = failure
            logger.error(text)
            sys.exit(EXIT_INTERRUPTED if text == _INTERRUPTED else code)

    def _wait(self):
        """What ended the whole job first, and this machine's exit code; None once all processes of
        this machine ended well.
        """
        while True:
            codes = [process.exitcode for process in self._processes]
            if EXIT_INTERRUPTED in codes:  # who waited for that process may fail
                return self._report(_INTERRUPTED), EXIT_INTERRUPTED
            if failed := [code for code in codes if code]:
                code = min(failed)  # a kill, less than 0, is a cause; an exception may follow it
                if code > 0:
                    time.sleep(1)  # another machine may report the cause first
                text = self._report(self._describe(codes.index(code), code))
                return text, code if code > 0 else 128 - code
            if None not in codes:
                return None
            try:
                if self._store.check(["failed"]):
                    return self._store.get("failed").decode(), 1
            except dist.DistError:
                return f"Machine 0 ({self._args.dist_url}) cannot be reached any more", 1
            connection.wait([process.sentinel for process in self._running()], timeout=1)

    def _report(self, text):
        """Report to all machines why the job ends; returns what was reported first."""
        return self._store.compare_set("failed", "", text).decode()

    def _describe(self, local_rank, code):
        args = self._args
        rank, size = (
            args.machine_rank * args.num_gpus + local_rank,
            args.num_machines * args.num_gpus,
        )
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed"
        if code == -signal.SIGKILL:
            end += " (by the system where memory ran out: see dmesg)"
        elif code != -signal.SIGTERM:
            end += " (see its message in the output of that machine)"
        machine = f"machine {args.machine_rank}, {socket.gethostname()}"
        return (
            f"Process {rank} of {size} ({machine}) {end}. "
            "To continue from the last checkpoint: the same command with --resume"
        )

    def _end_processes(self):
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in self._processes:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()
            process.join()

    def _wait_for_machines(self):
        """The store goes with machine 0's parent process: it is the last to leave."""
        left, deadline = self._store.add("left", 1), time.monotonic() + 2 * GRACE
        while self._args.machine_rank == 0 and time.monotonic() < deadline:
            if left == self._args.num_machines:
                break
            time.sleep(0.1)
            left = self._store.add("left", 0)
