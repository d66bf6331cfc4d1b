"""Train or evaluate a detector or classifier: Detectron2's training script with our trainer.

    imrcnn train --auto --data DIR
    imrcnn train --config-file configs/imrcnn_lite.yaml --data DIR
    imrcnn train --config-file configs/lazy/imrcnn_lite.py --data DIR train.max_iter=1000

--auto makes a plan first, as `imrcnn plan` does, and trains it.

A config file is YAML, with overrides as KEY VALUE, or a LazyConfig (.py), with overrides in Hydra's
grammar. A LazyConfig runs as Python code: load only files that you trust.
"""

import argparse
import contextlib
import copy
import logging
import os
from difflib import get_close_matches
from pathlib import Path
from shlex import quote

from detectron2.config import CfgNode, LazyConfig
from detectron2.engine.defaults import default_argument_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from imrcnn_d2.cli import WEIGHTS_HELP
from imrcnn_d2.utils.files import write_atomically

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if late := [text for text in args.opts if text.startswith("--")]:
        parser.error(f"{late[0]} comes before {args.opts[0]}: options first, KEY VALUE ... last")
    if not (args.config_file or args.auto):  # Detectron2's defaults would be trained
        parser.error("name a model, such as --config-file imrcnn_lite.yaml, or give --auto")
    from imrcnn_d2.engine.launch import launch_script, one_line_refusals

    with one_line_refusals(OSError, RuntimeError, ValueError):
        _choose_processes(args)
        _choose_weights(args)
        if args.auto:
            args.config_file = _plan(args)
    launch_script(run, args)


def argument_parser() -> argparse.ArgumentParser:
    parser = default_argument_parser()
    parser.set_defaults(num_gpus=None)
    parser.add_argument(
        "--data",
        default="",
        metavar="DIR",
        help="folder of a prepared data set, or a short name such as kvasir_seg for one in "
        "$IMRCNN_DATASETS, $DETECTRON2_DATASETS or datasets/",
    )
    parser.add_argument("--weights", default="", help=f"what training starts from: {WEIGHTS_HELP}")
    parser.add_argument(
        "--auto",
        action="store_true",
        help="plan and train in one go: the plan is OUTPUT_DIR/plan.yaml, which --resume keeps",
    )
    return parser


def _choose_weights(args: argparse.Namespace) -> None:
    """--weights is short for MODEL.WEIGHTS, or train.init_checkpoint of a LazyConfig."""
    if args.weights and args.config_file.endswith(".py"):
        quoted = args.weights.replace("'", r"\'")
        args.opts = [f"train.init_checkpoint='{quoted}'", *args.opts]
    elif args.weights:
        args.opts = ["MODEL.WEIGHTS", args.weights, *args.opts]


def _plan(args: argparse.Namespace) -> str:
    """The file of a new plan for --data; with --resume that of the training."""
    from imrcnn_d2.data.catalog import data_set_name
    from imrcnn_d2.engine import choose_device
    from imrcnn_d2.engine.fingerprint import plan_training
    from imrcnn_d2.engine.launch import locked_output

    if args.config_file or args.eval_only or not args.data:
        raise ValueError("--auto plans a training: it takes --data, and no --config-file")
    if args.num_machines > 1 or "WORLD_SIZE" in os.environ:
        raise ValueError("--auto is for one machine: imrcnn plan first, then train with its file")
    opts = dict(zip(args.opts[::2], args.opts[1::2], strict=False))
    if (device := opts.get("MODEL.DEVICE")) not in (None, planned := choose_device()):
        raise ValueError(
            f"--auto plans for {planned}, not for {device}: hide a GPU by CUDA_VISIBLE_DEVICES=''"
        )
    folder = Path(opts.get("OUTPUT_DIR", Path("output", data_set_name(args.data), "plan")))
    file = folder / "plan.yaml"
    if not (args.resume and file.is_file()):
        with locked_output(str(folder)):  # not the plan of a job that is running
            plan_training(args.data, file, args.weights)
        print(f"Planned: {file}\n\n{file.read_text()}")
    return str(file)


def _choose_processes(args: argparse.Namespace) -> None:
    """Without --num-gpus, and with 0, it is one process; who asks for GPUs never trains without."""
    import torch

    cpu = ["train.device=cpu"] if args.config_file.endswith(".py") else ["MODEL.DEVICE", "cpu"]
    key = cpu[0].removesuffix("cpu")
    if args.num_gpus is not None and not any(text.startswith(key) for text in args.opts):
        if args.num_gpus and not torch.cuda.is_available():
            raise ValueError(
                f"--num-gpus {args.num_gpus}: torch {torch.__version__} finds no GPU. To train on "
                f"the CPU: --num-gpus 0, or, in several processes, {' '.join(cpu)}"
            )
        if not args.num_gpus:
            args.opts = [*args.opts, *cpu]
    args.num_gpus = args.num_gpus or 1


def run(args: argparse.Namespace) -> dict:
    """One process of a training or evaluation; returns the metrics of the final test."""
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from imrcnn_d2.engine import Trainer, load_weights
    from imrcnn_d2.engine.checkpoint import Checkpointer
    from imrcnn_d2.engine.launch import locked_output, one_line_refusals, set_up
    from imrcnn_d2.engine.train_step import keep_freed_memory
    from imrcnn_d2.engine.trainer import LazyTrainer, check_class_order, class_names
    from imrcnn_d2.report.plots import plot_test_grad_cams
    from imrcnn_d2.task import Task

    keep_freed_memory()
    lazy = args.config_file.endswith(".py")
    trainer_class = LazyTrainer if lazy else Trainer
    with contextlib.ExitStack() as stack:
        with one_line_refusals(OSError, RuntimeError, ValueError):
            cfg = _lazy_config(args) if lazy else _config(args)
            written = copy.deepcopy(cfg)  # a LazyTrainer puts its model into the config
            output_dir = trainer_class.output_dir(cfg)
            stack.enter_context(locked_output(output_dir))
            set_up(output_dir, args, *_setup_values(cfg))
            if args.eval_only:
                model = trainer_class.build_model(cfg)
                checkpointer = Checkpointer(model, output_dir, whole=True)
                resumed = args.resume and checkpointer.has_checkpoint()
                initial = cfg.train.init_checkpoint if lazy else cfg.MODEL.WEIGHTS
                path = checkpointer.get_checkpoint_file() if resumed else initial
                if not path:
                    key = "train.init_checkpoint=FILE" if lazy else "MODEL.WEIGHTS FILE"
                    raise ValueError(
                        f"--eval-only evaluates weights: give --weights FILE, or {key}"
                    )
                weights = load_weights(checkpointer, path)
                tested = [cfg.dataloader.test_evaluator.dataset_name] if lazy else cfg.DATASETS.TEST
                for name in tested if weights.classes else ():
                    check_class_order(name, class_names(name), weights.classes, path)
                if not lazy:
                    cfg = written = _seeing_as_trained(cfg, weights.crop_to_view, args.opts)
            else:
                trainer = trainer_class(cfg)
                trainer.resume_or_load(args.resume)
            if comm.is_main_process():
                _write_config(written, Path(output_dir, "config.yaml"), keep=args.eval_only)
        if args.eval_only:
            metrics, results = trainer_class.final_test(cfg, model, weights)
        else:
            metrics, results = trainer.train(), trainer.test_results
            model, weights = trainer.evaluated_model, trainer.final_weights
        if comm.is_main_process():
            plot_test_results(results, output_dir)
            if not lazy:
                if not Task.of(cfg).localises:
                    plot_test_grad_cams(cfg, model)
                verify_results(cfg, metrics)
            log_end(results, output_dir, weights.path, lazy)
    return metrics


def _seeing_as_trained(cfg: CfgNode, crop_to_view: bool | None, opts: list[str]) -> CfgNode:
    """The config with INPUT.CROP_TO_VIEW of the weights, if they know it and `opts` have none."""
    key = "INPUT.CROP_TO_VIEW"
    if crop_to_view in (None, cfg.INPUT.CROP_TO_VIEW) or key in opts:
        return cfg
    text = "%s is %s, as the weights were trained: give it to have it otherwise"
    logger.warning(text, key, crop_to_view)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.CROP_TO_VIEW = crop_to_view
    cfg.freeze()
    return cfg


def _setup_values(cfg) -> tuple[str, int, bool]:
    """The config as text, its seed and whether cuDNN looks for the fastest algorithms."""
    if isinstance(cfg, CfgNode):
        return cfg.dump(), cfg.SEED, cfg.CUDNN_BENCHMARK
    return str(cfg), cfg.train.seed, cfg.train.get("cudnn_benchmark", False)


def _write_config(cfg, path: Path, keep: bool) -> None:
    """Write a run's config; `keep` the one that is there, of the training."""
    if keep and path.is_file():
        return
    if isinstance(cfg, CfgNode):
        write_atomically(path, cfg.dump())
    else:
        LazyConfig.save(cfg, str(path))


def _config(args):
    from imrcnn_d2.data.catalog import check_registered
    from imrcnn_d2.engine.config import (
        check_named_splits,
        check_resumable,
        find_config,
        load_training_config,
        register_root,
    )

    file = args.config_file and find_config(args.config_file)
    # Quoted, so that a folder called 2024 stays a string.
    data = ["DATASETS.ROOT", repr(args.data)] if args.data else []
    cfg = load_training_config(file, [*data, *args.opts], args.eval_only)
    register_root(cfg)
    splits = ("TEST",) if args.eval_only else ("TEST", "TRAIN", "VAL")
    check_registered(name for split in splits for name in cfg.DATASETS[split])
    check_named_splits(cfg, splits)
    if args.resume:
        check_resumable(cfg)
    cfg.freeze()
    return cfg


def _lazy_config(args):
    from imrcnn_d2.data.catalog import SHORT_NAMES, data_set_name, register_data_set
    from imrcnn_d2.engine import choose_device
    from imrcnn_d2.engine.config import find_config

    args.config_file = str(find_config(args.config_file))
    cfg = LazyConfig.load(args.config_file)
    if not cfg.train.device and not any(o.startswith("train.device=") for o in args.opts):
        cfg.train.device = choose_device()
    _check_keys(cfg, args.opts)
    try:
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except (HydraException, OmegaConfBaseException, KeyError, NotImplementedError) as error:
        reason = str(error.args[0]).partition("\n")[0]
        raise ValueError(f"{' '.join(args.opts)}: {reason}") from error
    if data := args.data or cfg.train.get("dataset", ""):
        register_data_set(data)
        cfg.train.dataset = data_set_name(data)
    elif cfg.dataloader.train.dataset.names == "_train":
        raise ValueError(
            f"{args.config_file} names no data set: add --data DIR or train.dataset=DIR, a folder "
            f"that `imrcnn prepare-dataset` wrote or one of {', '.join(SHORT_NAMES)}"
        )
    return cfg


def _check_keys(cfg: DictConfig, overrides: list[str]) -> None:
    """LazyConfig adds unknown keys, which nothing reads but the calls that are to get them."""
    for text in overrides:
        key = text.partition("=")[0]
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        plain = isinstance(node, DictConfig) and "_target_" not in node
        if not key.startswith(("+", "~")) and (node is None or plain and name not in node):
            while node is None:  # the misspelt name is before the last dot
                parent, _, name = parent.rpartition(".")
                node = OmegaConf.select(cfg, parent) if parent else cfg
            like = get_close_matches(name, list(node))
            raise ValueError(
                f"{text}: the config has no {key}; similar: {', '.join(like) or 'none'}. +{text} "
                "adds it all the same"
            )


def log_end(results: dict, output_dir: str, weights: str | None, lazy: bool) -> None:
    """Log the metrics of each test set, by data set, where the files are, and what to run next."""
    from imrcnn_d2.report.tables import summary

    folders = [Path(output_dir, "inference", name) for name in results]
    texts = [f"{name}: {summary(scored)}" for name, scored in results.items()]
    texts += [] if results else ["No test images: nothing was tested."]
    texts += [f"Weights: {weights}", *(f"Results: {folder}/" for folder in folders)]
    commands = [f"report {quote(output_dir)} --output {quote(output_dir)}/report.html"]
    if not lazy:  # predict needs a config of values
        commands += [f"predict --weights {quote(str(weights))} --input IMAGES --output predictions"]
    texts += [f"Next:    imrcnn {command}" for command in commands]
    logger.info("Done.\n\n%s", "\n".join(texts))


def plot_test_results(results: dict, output_dir: str) -> None:
    """Write the plots of each test set next to its files; `results` are by data set."""
    from detectron2.data import MetadataCatalog

    from imrcnn_d2.report.plots import draw_all

    for name, scored in results.items():
        folder = Path(output_dir, "inference", name)
        draw_all(scored, folder, MetadataCatalog.get(name).get("image_root", ""))
