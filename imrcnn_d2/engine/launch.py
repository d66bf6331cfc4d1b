"""How a training script starts: its arguments, and its processes."""

import gc

import torch.distributed as dist
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm

__all__ = ["launch_script", "leave_process_groups"]


def launch_script(main):
    """
    Read Detectron2's usual arguments and run ``main(args)`` in as many processes as they ask for.

    Args:
        main (callable): defined at the top level of a module.
    """
    args = default_argument_parser().parse_args()
    launch(
        _run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(main, args),
    )


def _run(main, args):
    main(args)
    leave_process_groups()


def leave_process_groups():
    """
    Wait for all processes, then end the process groups and their threads.

    A group's threads end with the last reference to it, and ``destroy_process_group`` drops only
    torch's: Detectron2 keeps groups of its own, DDP keeps one. A thread that outlives them and lets
    go of a tensor while the interpreter shuts down aborts the process ("terminate called without an
    active exception").
    """
    if not dist.is_initialized():
        return
    comm.synchronize()  # the first process serves the store that the others may still ask
    comm._LOCAL_PROCESS_GROUP = None
    comm.create_local_process_group.cache_clear()
    comm._get_global_gloo_group.cache_clear()
    gc.collect()
    dist.destroy_process_group()
