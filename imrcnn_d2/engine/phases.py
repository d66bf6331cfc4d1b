"""Training in steps: each phase has its own learning rate, length and parts that learn."""

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import accumulate

from detectron2.engine import HookBase, hooks

from imrcnn_d2.modeling.stages import check_trainable, frozen_norms, trainable_parameters

from .train_step import distribute

__all__ = ["LRScheduler", "Phase", "Phases", "check_phases", "phases_in_iterations", "read_phases"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """
    Attributes:
        name (str): such as "fine-tuning".
        start (int): its first iteration.
        iterations (int): how many, at least 1.
        lr (float): its SOLVER.BASE_LR.
        trainable (str): see :func:`trainable_parameters`.
    """

    name: str
    start: int
    iterations: int
    lr: float
    trainable: str


def check_phases(entries):
    """
    Args:
        entries (list[dict]): SOLVER.PHASES.

    Returns:
        str: "epochs" or "iterations", in which their lengths are given; "" for no phases.

    Raises:
        ValueError: a phase lacks a key or has one too many, or a value makes no sense.
    """
    unit = ""
    for number, entry in enumerate(entries, 1):
        where = f"SOLVER.PHASES, phase {number}"
        keys = set(entry) if isinstance(entry, dict) else set()
        unit = unit or ("iterations" if "iterations" in keys else "epochs")
        if keys != {"name", unit, "lr", "trainable"}:
            raise ValueError(f"{where} is {entry!r}; it takes name, {unit}, lr and trainable")
        for key in (unit, "lr"):
            value = entry[key]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(
                    f"{where}: {key} is {value!r}; give a number above 0 (1e-4 is text in YAML: "
                    "write 1.0e-4)"
                )
        try:
            check_trainable(entry["trainable"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    twice = [name for name, n in Counter(entry["name"] for entry in entries).items() if n > 1]
    if twice:
        raise ValueError(f"SOLVER.PHASES has several phases named {twice[0]!r}; rename all but one")
    return unit


def phases_in_iterations(entries, iterations):
    """
    Args:
        entries (list[dict]): SOLVER.PHASES with ``epochs``.
        iterations (callable): epochs -> iterations.

    Returns:
        list[dict]: the same with ``iterations``; a phase ends where the sum of epochs up to its own
        does.

    Raises:
        ValueError: a phase is shorter than an iteration.
    """
    ret, start, epochs = [], 0, 0
    for entry in entries:
        epochs += entry["epochs"]
        end = iterations(epochs)
        if end <= start:
            raise ValueError(
                f"SOLVER.PHASES: {entry['epochs']} epochs of phase {entry['name']!r} are less than "
                "an iteration"
            )
        rest = {key: value for key, value in entry.items() if key != "epochs"}
        ret.append({**rest, "iterations": end - start})
        start = end
    return ret


def read_phases(entries):
    """
    Args:
        entries (list[dict]): SOLVER.PHASES with ``iterations``.

    Returns:
        list[Phase]: without gaps from iteration 0 on.
    """
    starts = accumulate((entry["iterations"] for entry in entries), initial=0)
    return [Phase(**entry, start=start) for entry, start in zip(entries, starts, strict=False)]


class Phases(HookBase):
    """
    Switches a training from phase to phase: what learns, with which optimizer and schedule.

    A phase starts with a new optimizer, so without the momentum of the one before. Batch norms
    whose weights do not learn keep their running statistics as well. A checkpoint belongs to the
    phase of its iteration: :meth:`start_at` has to come before its state is loaded.

    Put it first, on every rank.
    """

    def __init__(self, phases, model, build_solver):
        """
        Args:
            phases (list[Phase]): at least one.
            model (nn.Module): as it was built, not wrapped by DistributedDataParallel; what needs
                no gradient now will not learn in any phase. Left as the first phase has it.
            build_solver (callable): (Phase) -> (optimizer, scheduler) for the model's parameters
                that need gradients.

        Raises:
            ValueError: the model has no such stage.
        """
        self._phases, self._model, self._build_solver = phases, model, build_solver
        self._learning = [trainable_parameters(model, phase.trainable) for phase in phases]
        self._current, self._norms = None, []
        self.optimizer, self.scheduler = self._start(0)

    def _start(self, index):
        """Set what learns; returns the phase's optimizer and scheduler."""
        phase, names = self._phases[index], self._learning[index]
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad = name in names
            if name not in names:
                parameter.grad = None
        for norm in self._norms:  # of the phase before
            norm.train(self._model.training)
        self._norms = frozen_norms(self._model)
        self._current = index
        sizes = {name: p.numel() for name, p in self._model.named_parameters()}
        logger.info(
            "Phase %d of %d, %r, from iteration %d on, %d iterations: %r learns at learning rate "
            "%g, %.2f of %.2f million parameters: %s",
            index + 1,
            len(self._phases),
            phase.name,
            phase.start,
            phase.iterations,
            phase.trainable,
            phase.lr,
            sum(sizes[name] for name in names) / 1e6,
            sum(sizes.values()) / 1e6,
            ", ".join(_summary(sizes, names)),
        )
        return self._build_solver(phase)

    def start_at(self, iteration):
        """
        Put model, optimizer and schedule in the state that an iteration's phase begins with.

        Args:
            iteration (int): from 0; any after the last phase belongs to that.
        """
        index = self._index(iteration)
        if index == self._current:
            return
        optimizer, scheduler = self._start(index)
        trainer = self.trainer
        trainer.optimizer, trainer.scheduler = optimizer, scheduler
        if trainer.model is not self._model:
            # DistributedDataParallel waits for the gradients that it was built with.
            trainer.model = distribute(self._model)

    def _index(self, iteration):
        started = [i for i, phase in enumerate(self._phases) if phase.start <= iteration]
        return started[-1]

    def before_step(self):
        self.start_at(self.trainer.iter)
        # Each time: whoever evaluates the model puts all of it back into training mode.
        for norm in self._norms:
            norm.eval()

    def describe(self):
        """list[dict]: the phases, for run.json, with the number of ``parameters`` that learn."""
        sizes = {name: p.numel() for name, p in self._model.named_parameters()}
        return [
            {**asdict(phase), "parameters": sum(sizes[name] for name in names)}
            for phase, names in zip(self._phases, self._learning, strict=True)
        ]


def _summary(names, chosen, prefix=""):
    """The chosen of some parameters, "layer4.*" where that is all of a part."""
    mine = [name for name in names if name.startswith(prefix)]
    if all(name in chosen for name in mine):
        return [f"{prefix}*" if len(mine) > 1 else mine[0]]
    found = []
    for part in dict.fromkeys(name[len(prefix) :].split(".")[0] for name in mine):
        whole = prefix + part
        if whole in mine:
            found += [whole] * (whole in chosen)
        elif any(name.startswith(f"{whole}.") for name in chosen):
            found += _summary(names, chosen, f"{whole}.")
    return found


class LRScheduler(hooks.LRScheduler):
    """Detectron2's, for an optimizer that is another one from some iteration on."""

    def before_step(self):
        if self._optimizer is not self.trainer.optimizer:
            self._optimizer = None
            self.before_train()
