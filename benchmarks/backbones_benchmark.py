"""Which timm models work as backbones of the light IMR-CNN: the table of docs/guide/backbones.md.

For benchmarks/benchmark.py. Weights are random: what is tried is whether a model builds, trains,
freezes and gives the same in each runtime, which needs no download. The record of all models that
were tried is backbones.json next to this file.
"""

import copy
import json
import warnings
from pathlib import Path

import timm
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from imrcnn_d2.deploy.runtimes import OnnxRuntime, OpenVINORuntime, TorchRuntime
from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.train_step import use_channels_last
from imrcnn_d2.utils.files import write_atomically

ROOT = Path(__file__).parents[1]
PAGE, RECORD = ROOT / "docs" / "guide" / "backbones.md", Path(__file__).with_name("backbones.json")
FAMILIES = [
    "resnet50",
    "convnext_tiny",
    "convnextv2_nano",
    "pvt_v2_b0",
    "mobilenetv4_conv_small",
    "tf_efficientnetv2_b0",
    "tf_efficientnet_lite0",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "hiera_tiny_224",
    "mambaout_femto",
    "vit_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
]
RUNTIMES = {"ONNX Runtime": OnnxRuntime, "OpenVINO": OpenVINORuntime}
COLUMNS = ["M parameters", "G multiply-adds", "trains", "freezes", "torch", *RUNTIMES]
SIZE = 352  # of the images that multiply-adds are counted for
OTHER = (256, 416)  # of images that a graph was not traced with
SAME = 0.99  # the share of detections that two runtimes have in common, to be called the same
BEGIN, END = "<!-- table of backbones -->", "<!-- end -->"  # in the page


def check_backbone(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """A row of the table, and for each column that says "no" the cause."""
    torch.manual_seed(0)
    row, causes = dict.fromkeys(COLUMNS, "–"), {}
    opts = ["MODEL.TIMM.NAME", name, "MODEL.TIMM.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    try:
        model = build_model(load_config(ROOT / "configs" / "imrcnn_lite.yaml", opts))
        use_channels_last(model)  # as this config is trained
    except Exception as error:
        return row, {"builds": _cause(error)}
    bottom_up = model.backbone.bottom_up
    row["M parameters"] = f"{sum(p.numel() for p in bottom_up.parameters()) / 1e6:.1f}"
    row["G multiply-adds"] = f"{multiply_adds(bottom_up, SIZE) / 1e9:.2f}"

    def attempt(column, run):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row[column] = run()
        except Exception as error:
            row[column], causes[column] = "no", _cause(error)

    state = copy.deepcopy(model.state_dict())
    attempt("trains", lambda: train_a_step(model))
    attempt("freezes", lambda: frozen_share(bottom_up))
    model.load_state_dict(state)  # a step from random weights may lead anywhere
    with torch.no_grad():  # scores that differ
        model.eval().roi_heads.box_predictor.cls_score.weight.normal_(std=0.5)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((SIZE, SIZE), OTHER)]
    expected = [TorchRuntime.from_model(model, None)([image])[0] for image in images]
    attempt("torch", lambda: "yes" if all(map(len, expected)) else "no detections")
    for column, runtime in RUNTIMES.items():
        attempt(column, lambda runtime=runtime: compare(runtime, model, images, expected))
    return row, causes


def multiply_adds(module: torch.nn.Module, size: int) -> float:
    """Of matrix products and convolutions, attention included, for an image of that side."""
    image = torch.zeros(1, 3, size, size)
    was_training = module.training
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.eval()(image)
    module.train(was_training)
    return counter.get_total_flops() / 2


def train_a_step(model: torch.nn.Module) -> str:
    """ "yes" where all that learns has a gradient, and nothing else has moved.

    Raises:
        ValueError: otherwise.
    """
    truth = Instances((SIZE, SIZE), gt_boxes=Boxes([[60, 70, 250, 200]]))
    truth.gt_classes = torch.zeros(1, dtype=torch.int64)
    truth.gt_masks = BitMasks(torch.ones(1, SIZE, SIZE, dtype=torch.bool))
    image = torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with EventStorage():
        loss = sum(model.train()([{"image": image, "instances": truth}]).values())
    loss.backward()
    optimizer.step()
    if not loss.isfinite():
        raise ValueError(f"the loss is {loss.item()}")
    for name, p in model.named_parameters():
        if p.requires_grad and p.grad is None:
            raise ValueError(f"{name} has no gradient")
        if not p.requires_grad and not torch.equal(p, before[name]):
            raise ValueError(f"{name} is frozen but moved")
    return "yes"


def frozen_share(bottom_up: torch.nn.Module) -> str:
    """Of the body's weights, those that MODEL.TIMM.FREEZE_AT 2 has frozen."""
    parameters = list(bottom_up.body.parameters())
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    if not frozen:
        raise ValueError("nothing is frozen")
    return f"{100 * frozen / sum(p.numel() for p in parameters):.1f} %"


def compare(runtime, model, images, expected) -> str:
    """ "yes" where a runtime has the detections of PyTorch.

    Raises:
        ValueError: otherwise.
    """
    built = runtime.from_model(model, images[0])
    for image, reference in zip(images, expected, strict=True):
        (result,) = built([image])
        iou = pairwise_iou(reference.pred_boxes, result.pred_boxes)
        near = (reference.scores[:, None] - result.scores).abs() < 0.01
        share = ((iou > 0.95) & near).any(dim=1).float().mean().item()
        if share < SAME:
            height, width = image.shape[1:]
            raise ValueError(
                f"{100 * share:.0f} % of the detections of PyTorch in an image of {height}×{width}"
            )
    return "yes"


def _cause(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def table(record: dict[str, dict]) -> str:
    """The table in Markdown, with what it was made with, and the causes of each "no"."""
    lines = [f"| backbone | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for name, entry in record.items():
        lines.append(f"| `{name}` | {' | '.join(entry['row'][c] for c in COLUMNS)} |")
    made_with = "; ".join(sorted({entry["made with"] for entry in record.values()}))
    lines += ["", f"Made with {made_with}."]
    failed = [
        f"- `{name}`, {column}: {cause}"
        for name, entry in record.items()
        for column, cause in entry["causes"].items()
    ]
    return "\n".join([*lines, *([""] if failed else []), *failed])


def write_page(names: list[str]) -> None:
    """Try the models one after the other, and put the table of all in the record into the page."""
    made_with = f"timm {timm.__version__} and PyTorch {torch.__version__.partition('+')[0]}"
    for name in names or FAMILIES:
        row, causes = check_backbone(name)
        entry = {"made with": made_with, "row": row, "causes": causes}
        print(table({name: entry}), flush=True)
        record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
        record[name] = entry
        order = [n for n in FAMILIES if n in record] + sorted(record.keys() - set(FAMILIES))
        record = {name: record[name] for name in order}
        write_atomically(RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        write_atomically(PAGE, f"{before}{BEGIN}\n{table(record)}\n{END}{after}")
