"""How a training script starts: its arguments, and its processes."""

from detectron2.engine import default_argument_parser, launch

__all__ = ["launch_script"]


def launch_script(main):
    """
    Read Detectron2's usual arguments and run ``main(args)`` in as many processes as they ask for.

    Args:
        main (callable): defined at the top level of a module.
    """
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
