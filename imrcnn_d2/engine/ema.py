"""An average of the weights of past iterations, to validate and test in their place."""

from detectron2.engine import HookBase
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["EMA"]


class EMA(HookBase):
    """
    Exponential moving average of a model's weights: after update n the average keeps
    ``min(decay, (1 + n) / (10 + n))`` of what it was, so that it follows the first iterations
    closely. Buffers are the model's own.

    Put it before validation, on every rank.
    """

    def __init__(self, model, decay):
        """
        Args:
            model (nn.Module): that is trained, not wrapped by DistributedDataParallel.
            decay (float): in (0, 1), such as 0.999.

        Raises:
            ValueError: for another decay.
        """
        if not 0 < decay < 1:
            raise ValueError(f"SOLVER.EMA_DECAY is {decay}; it lies between 0 (off) and 1")

        def average(averaged, current, updates):
            get_ema_multi_avg_fn(min(decay, (1 + updates) / (10 + updates)))(
                averaged, current, updates
            )

        self._live = model
        self._averaged = AveragedModel(model, multi_avg_fn=average)

    @property
    def model(self):
        """nn.Module: with the averaged weights."""
        return self._averaged.module

    def before_train(self):
        if self._averaged.n_averaged == 0:  # MODEL.WEIGHTS was loaded after this object was made
            self._averaged.update_parameters(self._live)

    def after_step(self):
        self._averaged.update_parameters(self._live)

    def state_dict(self):
        return self._averaged.state_dict()

    def load_state_dict(self, state_dict):
        self._averaged.load_state_dict(state_dict)
