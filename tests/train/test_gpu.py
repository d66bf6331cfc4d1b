"""The light IMR-CNN on a card: what the tests on the CPU and with fake tensors cannot see."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from imrcnn_d2.engine import Trainer, load_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card"),
]
DEVICE = "cuda"


@pytest.fixture
def cfg(tiny_opts):
    """A function: the tiny config on the card, with other keys."""

    def load(**keys):
        opts = [x for item in {"MODEL.DEVICE": DEVICE, **keys}.items() for x in item]
        return load_config("configs/imrcnn_lite.yaml", [*tiny_opts, *opts])

    return load


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_validates_resumes_and_evaluates(cfg, precision):
    keys = {"SOLVER.MAX_ITER": 2, "SOLVER.AMP.ENABLED": precision != "fp32"}
    if precision != "fp32":
        keys["SOLVER.AMP.PRECISION"] = precision
    trainer = Trainer(cfg(**keys))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert {v.device.type for v in before.values()} == {DEVICE}
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert results["lesion"]["TN"] + results["lesion"]["FP"] >= 1
    after = trainer.model.state_dict()
    assert all(torch.isfinite(v).all() for v in after.values())
    if precision != "fp16":  # whose scaler skips steps until its scale fits
        assert any(not torch.equal(v, before[k]) for k, v in after.items() if "pan_" in k)

    resumed = Trainer(cfg(**keys | {"SOLVER.MAX_ITER": 3}))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, after[name]), name
    states = resumed.optimizer.state_dict()["state"].values()
    moments = [
        state["momentum_buffer"] for state in states if state.get("momentum_buffer") is not None
    ]
    assert moments or precision == "fp16"
    assert {moment.device.type for moment in moments} <= {DEVICE}
    resumed.train()
    assert resumed.iter == 3


def test_inference_equals_the_cpu_s(cfg):
    torch.manual_seed(0)
    on_cpu = build_model(cfg(**{"MODEL.DEVICE": "cpu"})).eval()
    on_card = build_model(cfg()).eval()
    on_card.load_state_dict(on_cpu.state_dict())
    inputs = [{"image": torch.randint(0, 255, (3, 96, 128)), "height": 192, "width": 256}]
    given = Instances((96, 128))
    given.pred_boxes = Boxes(torch.tensor([[10.3, 20.1, 100.7, 90.2], [3.0, 4.0, 60.0, 50.0]]))
    given.pred_classes = torch.zeros(2, dtype=torch.int64)

    def outputs(model):
        pyramid = model.backbone(model.preprocess_image(inputs).tensor)
        masks = model.inference(inputs, [copy.deepcopy(given)], do_postprocess=False)[0].pred_masks
        instances = model(inputs)[0]["instances"].to("cpu")
        return {k: v.cpu() for k, v in pyramid.items()}, masks.cpu(), instances

    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        expected, got = outputs(on_cpu), outputs(on_card)
    for name, feature in got[0].items():
        bound = 1e-4 * expected[0][name].abs().max().item()
        torch.testing.assert_close(feature, expected[0][name], rtol=1e-4, atol=bound, msg=name)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-3)
    # Of a random model the ranks are ties, but for the best of all.
    assert len(got[2]) > 0 and got[2].pred_masks.shape[1:] == (192, 256)
    torch.testing.assert_close(got[2].scores[:1], expected[2].scores[:1], rtol=0, atol=1e-3)
