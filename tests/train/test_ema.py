"""The average of past weights against a loop written out."""

import pytest
import torch
from torch import nn

from imrcnn_d2.engine.hooks import EMA


def test_the_average_is_exponential_with_a_warm_up():
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay=0.5)
    nn.init.constant_(model.weight, 8.0)  # loaded after the hook was made
    ema.before_train()
    expected = 8.0
    for n, value in enumerate((1.0, 3.0, -2.0, 5.0, 0.0, 1.0, 4.0, 2.0, 7.0, 1.0), start=1):
        nn.init.constant_(model.weight, value)
        ema.after_step()
        keep = min(0.5, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 1.0

    resumed = EMA(nn.Linear(1, 1, bias=False), decay=0.5)
    resumed.load_state_dict(ema.state_dict())
    resumed.before_train()  # does not start again
    assert torch.equal(resumed.model.weight, ema.model.weight)
    resumed._live.weight.data.fill_(2.0)
    resumed.after_step()
    assert resumed.model.weight.item() == pytest.approx(0.5 * expected + 1.0, rel=1e-6)


@pytest.mark.parametrize("decay", [1.0, -0.1, 2])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="SOLVER.EMA_DECAY is"):
        EMA(nn.Linear(1, 1), decay)
