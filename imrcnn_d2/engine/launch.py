"""How a training script starts: its arguments, and its processes on one machine or on several."""

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
from datetime import timedelta
from multiprocessing import connection, resource_tracker

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from imrcnn_d2.data.images import check_no_way_out
from imrcnn_d2.engine.hooks import EXIT_INTERRUPTED, SIGNALS, Interrupted, interruptible
from imrcnn_d2.utils.files import lock_folder

__all__ = ["launch_script", "leave_process_groups", "locked_output"]

logger = logging.getLogger(__name__)


# Of one collective: the others wait in it while the main process computes confidence intervals.
TIMEOUT = timedelta(minutes=30)
CONNECT_TIMEOUT = timedelta(minutes=10)  # machines of a cluster do not start at once
LOCK_TIMEOUT = 10  # seconds: data loaders of a training that was killed live on for some
GRACE = 10  # seconds to end by itself after SIGTERM, before SIGKILL

# What the file systems of some clusters say.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_INTERRUPTED = (
    "The job was interrupted, and ended. What was saved is whole: the same command with --resume "
    "goes on from there"
)
_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def launch_script(main, args=None):
    """
    Run ``main(args)`` in as many processes as ``args`` ask for.

    ``--num-gpus`` is the number of processes on this machine: one on each card, or on the CPU where
    there is no card. With ``--num-machines`` the same command is given on every machine, with its
    ``--machine-rank`` and the address of machine 0 as ``--dist-url``. Under ``torchrun`` the
    process joins those that ``torchrun`` started, and a restart by it implies ``--resume``.

    When a process dies, all others of the job are ended within seconds, on all machines, and each
    machine says which it was. SIGTERM and SIGINT are passed on to the processes; from here to the
    end of ``main`` they end the job with ``EXIT_INTERRUPTED``, see :func:`interruptible`.

    Args:
        main (callable): defined at the top level of a module.
        args (argparse.Namespace): Detectron2's usual arguments; by default the command line's.

    Raises:
        SystemExit: with ``EXIT_INTERRUPTED`` if the job was interrupted, else with the code of the
            process that failed (128 + the signal's number if one killed it), or 1; a ValueError or
            OSError of ``main`` is its one line on stderr.
        ValueError: for arguments that do not fit this machine.
    """
    with interruptible():
        _launch(main, args or default_argument_parser().parse_args())


def _launch(main, args):
    if _TORCHRUN <= os.environ.keys():
        args.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        store, rank, world_size = next(dist.rendezvous("env://", timeout=CONNECT_TIMEOUT))
        _join(
            main,
            args,
            int(os.environ["LOCAL_RANK"]),
            int(os.environ["LOCAL_WORLD_SIZE"]),
            store=_part_of_this_attempt(store, rank, world_size),
            rank=rank,
            world_size=world_size,
        )
    elif args.num_gpus * args.num_machines > 1:
        if args.num_machines > 1 and args.dist_url == default_argument_parser().get_default(
            "dist_url"
        ):
            raise ValueError(
                f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, the same "
                "on all machines: a name or address of machine 0 and a free port there"
            )
        _Machine(main, args).run()
    else:
        _run(main, args)


def _run(main, args):
    """What a file or argument is refused for is one line; Detectron2 logs an iteration's errors."""
    try:
        main(args)
    except (OSError, ValueError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")


@contextlib.contextmanager
def locked_output(folder: str):
    """
    Keep other jobs out of a folder. To be entered by all processes of a job, before it writes.

    Args:
        folder (str): OUTPUT_DIR.

    Raises:
        ValueError: another job is writing into it; or it holds a link that leads out of it, which
            Detectron2's logs and config.yaml would be written through, or a pipe.
    """
    lock = problem = None
    if comm.is_main_process():
        try:
            check_no_way_out(folder)
            lock = lock_folder(folder, "OUTPUT_DIR", LOCK_TIMEOUT)
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                problem = str(error)
            else:
                logger.warning("No lock in %s (%s): start no other job there", folder, error)
    problem = comm.all_gather(problem)[0]
    if problem:
        raise ValueError(problem)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def leave_process_groups():
    """
    Wait for all processes, then end the process groups and their threads.

    A group's threads end with the last reference to it, and ``destroy_process_group`` drops only
    torch's: Detectron2 keeps groups of its own, DDP keeps one. A thread that outlives them and lets
    go of a tensor while the interpreter shuts down aborts the process ("terminate called without an
    active exception").
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
        if end.code != EXIT_INTERRUPTED or isinstance(end, Interrupted):  # the latter alone
            raise
        leave_process_groups()
        raise
    leave_process_groups()


def _part_of_this_attempt(store, rank, world_size):
    """
    torchrun keeps one store over its restarts (seen in torch 2.14), and a process that finds there
    where a dead one listened waits for it in vain. The number of restarts may differ between
    machines. So process 0 offers a new name for a part of the store, and the others take it once it
    has seen them, and not their predecessors, by their own new names.

    Returns:
        PrefixStore: which holds nothing from before.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("offer", own)
        names = [store.get(f"{own}/{other}") for other in range(1, world_size)]
        store.set(f"{own}/names", b" ".join(names))
        return dist.PrefixStore(own, store)
    while True:
        offer = store.get("offer").decode()
        store.set(f"{offer}/{rank}", own)
        names = f"{offer}/names"
        if store.check([names]) and own in store.get(names).decode().split():
            return dist.PrefixStore(offer, store)
        time.sleep(0.1)


def _check_cards(wanted):
    cards = torch.cuda.device_count()
    if wanted > cards:
        raise ValueError(
            f"{wanted} processes were asked for on a machine with {cards} usable cards: use "
            f"--num-gpus {cards} (torchrun: --nproc-per-node {cards}), or hide the cards to run on "
            "the CPU: CUDA_VISIBLE_DEVICES="
        )


def _worker(local_rank, main, args, host, port):
    os.setsid()  # Ctrl-C reaches the parent alone, which passes it on: once, not twice
    try:
        with interruptible():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            store = dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT)
            _join(
                main,
                args,
                local_rank,
                args.num_gpus,
                store=dist.PrefixStore("processes", store),
                rank=args.machine_rank * args.num_gpus + local_rank,
                world_size=args.num_machines * args.num_gpus,
            )
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


class _Machine:
    """
    The processes of one machine, and what it shares with the other machines of the job: a store,
    which the parent process on machine 0 serves, so that it outlives all who ask it.
    """

    def __init__(self, main, args):
        self._args = args
        if torch.cuda.is_available():
            _check_cards(args.num_gpus)
        host, port = self._address()
        try:
            self._store = dist.TCPStore(
                host,
                port,
                is_master=args.machine_rank == 0,
                wait_for_workers=False,
                timeout=CONNECT_TIMEOUT,
            )
        except dist.DistError as error:
            raise RuntimeError(
                f"No connection through {host}:{port} ({error}). Machine {args.machine_rank} is "
                "to serve it if it is machine 0, else to reach it: --dist-url names machine 0 "
                "and a port that is free there and open to the others"
            ) from error
        self._processes, self._received = (), None
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        # A process starts with the signals that are blocked here, and takes them once it has its
        # handlers. The tracker, which is started along with the first one, would unblock them.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._processes = mp.start_processes(
                _worker, (main, args, host, self._store.port), nprocs=args.num_gpus, join=False
            ).processes
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self._received is not None:
            self._pass_on(self._received, None)

    def _address(self):
        if self._args.num_machines == 1:
            return "127.0.0.1", 0  # any free port
        host, _, port = self._args.dist_url.removeprefix("tcp://").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(
                f"--dist-url {self._args.dist_url}: with several machines use tcp://HOST:PORT"
            )
        return host, int(port)

    def run(self):
        """Wait for the end of the job and leave with its exit code."""
        failure = self._wait()
        if failure:
            self._end_processes()
        self._wait_for_machines()
        if failure:
            text, code = failure
            logger.error(text)
            sys.exit(code)

    def _pass_on(self, number, frame):
        self._received = number
        for process in self._processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def _wait(self):
        """
        Returns:
            (str, int) or None: what ended the whole job first, and this machine's exit code; None
                once all processes of this machine ended well.
        """
        while True:
            codes = [process.exitcode for process in self._processes]
            if EXIT_INTERRUPTED in codes:  # who waited for that process may fail
                return self._tell(_INTERRUPTED), EXIT_INTERRUPTED
            failed = [c for c in codes if c not in (None, 0)]
            if failed:
                code = min(failed)  # a kill, less than 0, is a cause; an exception may follow it
                if code > 0:
                    time.sleep(1)  # lest this machine be the first to report what it suffers from
                text = self._tell(self._describe(codes.index(code), code))
                code = code if code > 0 else 128 - code
                return text, EXIT_INTERRUPTED if text == _INTERRUPTED else code
            if None not in codes:
                return None
            try:
                if self._store.check(["failed"]):
                    text = self._store.get("failed").decode()
                    return text, EXIT_INTERRUPTED if text == _INTERRUPTED else 1
            except dist.DistError:
                return f"Machine 0 ({self._args.dist_url}) cannot be reached any more", 1
            running = [process.sentinel for process in self._processes if process.exitcode is None]
            connection.wait(running, timeout=1)

    def _tell(self, text):
        """Say to all machines why the job ends; returns what was said first."""
        return self._store.compare_set("failed", "", text).decode()

    def _describe(self, local_rank, code):
        rank = self._args.machine_rank * self._args.num_gpus + local_rank
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed"
        hint = {
            -signal.SIGKILL: "The system kills so when memory runs out: see dmesg. ",
            -signal.SIGTERM: "",
        }.get(code, "Its own message stands above, in the output of that machine. ")
        return (
            f"Process {rank} of {self._args.num_machines * self._args.num_gpus} (machine "
            f"{self._args.machine_rank}, {socket.gethostname()}) {end}, and the job was ended. "
            f"{hint}The same command with --resume goes on from the last checkpoint"
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
        try:
            self._store.add("left", 1)
            deadline = time.monotonic() + 2 * GRACE
            while (
                self._args.machine_rank == 0
                and self._store.add("left", 0) < self._args.num_machines
                and time.monotonic() < deadline
            ):
                time.sleep(0.1)
        except dist.DistError:
            pass  # machine 0 is gone, and nobody waits
