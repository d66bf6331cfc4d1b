import numpy as np
import pytest
import torch

from imrcnn_d2.modeling import CBAM


@pytest.mark.parametrize("gate, scale", [("sigmoid", 1.0), ("double_sigmoid", 2.0)])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_agrees_with_the_paper_s_formulas(numpy_cbam, gate, scale, kernel_size):
    torch.manual_seed(0)
    cbam = CBAM(12, reduction=4, kernel_size=kernel_size, gate=gate).double()
    x = 3 * torch.randn(2, 12, 9, 14, dtype=torch.double)
    expected = numpy_cbam(x, cbam.state_dict(), scale)
    np.testing.assert_allclose(cbam(x).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_residual_gate_adds_the_input(numpy_cbam):
    torch.manual_seed(0)
    cbam = CBAM(12, reduction=4, gate="residual").double()
    x = torch.randn(2, 12, 9, 14, dtype=torch.double)
    expected = x.numpy() + numpy_cbam(x, cbam.state_dict(), 1.0)
    np.testing.assert_allclose(cbam(x).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gate", ["double_sigmoid", "residual"])
def test_without_gradients_the_result_is_the_same_and_the_input_untouched(gate):
    torch.manual_seed(0)
    cbam = CBAM(8, reduction=2, gate=gate)
    x = torch.randn(2, 8, 6, 5)
    before = x.clone()
    with torch.no_grad():
        fast = cbam(x)
    assert torch.equal(fast, cbam(x))
    assert torch.equal(x, before)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    cbam = CBAM(4, reduction=2, kernel_size=3).double()
    x = torch.randn(1, 4, 4, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(cbam, (x,))


def test_init_identity_passes_the_input_on():
    cbam = CBAM(8)
    x = torch.randn(2, 8, 6, 5)
    assert not torch.allclose(cbam(x), x)
    cbam.init_identity()
    assert torch.equal(cbam(x), x)


def test_hidden_layer_has_channels_over_reduction_units_and_at_least_one():
    assert CBAM(256).channel.mlp[0].weight.shape == (16, 256)
    assert CBAM(8, reduction=16).channel.mlp[0].weight.shape == (1, 8)


@pytest.mark.parametrize(
    "option, key",
    [
        ({"gate": "tanh"}, "MODEL.CBAM.GATE is 'tanh'"),
        ({"kernel_size": 4}, "MODEL.CBAM.KERNEL_SIZE is 4"),
        ({"reduction": 0}, "MODEL.CBAM.REDUCTION is 0"),
    ],
)
def test_errors_name_the_key(option, key):
    with pytest.raises(ValueError, match=key):
        CBAM(8, **option)
