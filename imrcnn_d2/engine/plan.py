"""A training plan: from the facts of a data set and a machine to a config with its reasons.

All rules are in this file, each a small function of the facts and of what earlier rules chose;
`RULES` is their order. A plan is a function of its `Facts` alone, which its file holds, measured
times included. The numbers below are rules of thumb from this project's and Detectron2's recipes;
docs/guide/training.md has the one comparison with a config chosen by hand.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import NamedTuple

import yaml
from detectron2.config import CfgNode

TRAINING_SHARE = 0.9  # of the hours; the rest is for validation and the final test
VALIDATION_COST = 1 / 3  # of an image, in images of training: a forward pass without a backward one
MEMORY_SHARE = 0.9  # of the memory that a step may take
VALIDATIONS = 20  # in a training, if they fit into their share of the hours
MOST_EPOCHS = 200  # of a small data set
FEWEST_EPOCHS = 10  # that are counted in epochs; a shorter training needs finer periods
SHORTEST = 100  # iterations
LIGHT, LARGE = "imrcnn_lite.yaml", "imrcnn_R_50.yaml"
# Epochs, and how many images a training sees at least and at most, from weights of other images
# and from weights of lesions.
TRAINING, FINE_TUNING = (50, 12_000, 500_000), (10, 1_000, 100_000)
# GiB of a training (of the ResNet with FREEZE_AT 2): what is there without images, of a megapixel
# of image and of an image's regions. A step that is measured replaces it.
GIB = {LARGE: (2.5, 0.66, 0.25), LIGHT: (1.5, 0.7, 0.1)}


def _fact(meaning: str, **options):
    return field(metadata={"meaning": meaning}, **options)


@dataclass(frozen=True)
class Facts:
    """What a plan is made of, PLAN in its file. Images are as a network sees them, cropped to the
    endoscope's view. Sizes of lesions are of their boxes: the square root of the area in percent of
    the image's shorter side."""

    images: int = _fact("of the training split")
    validation_images: int = _fact("of the validation split")
    lesions: int = _fact("annotated in the training images")
    lesion_free: float = _fact("percent of the training images")
    classes: list[str] = _fact("of lesions")
    masks: bool = _fact("every lesion has a mask, not a box alone")
    centres: int = _fact("named in the training images; 0: none is")
    patients: int = _fact("named in the training images; 0: none is")
    short_side: int = _fact("of the view in an image, in pixels, median")
    aspect: float = _fact("long side / short side, 95th percentile")
    small_lesion: float = _fact("5th percentile of sizes, percent of the image's shorter side")
    median_lesion: float = _fact("of sizes, percent of the image's shorter side")
    large_lesion: float = _fact("95th percentile of sizes, percent of the image's shorter side")
    device: str = _fact("cpu or cuda")
    cores: int = _fact("of the processor, for this process")
    memory: float = _fact("GiB, of the GPU or of the machine, or --memory")
    hours: float = _fact("that the training may take: --hours")
    weights: str = _fact("that the training starts from: --weights", default="")
    weights_base: str = _fact("the shipped config that is nearest to theirs", default="")
    weights_keys: dict = _fact("how theirs differs from it", default_factory=dict)
    largest_batch: int = _fact("that fits into the memory, as tried", default=0)
    step_seconds: float = _fact("of an iteration of this plan, measured", default=0.0)
    step_memory: float = _fact("GiB at most in it, measured", default=0.0)
    fp32_seconds: float = _fact("of its passes in fp32, measured", default=0.0)
    short_seconds: float = _fact("of its passes in 16 bits, measured", default=0.0)

    @property
    def light(self) -> bool:
        """Whether the weights, or else the memory, ask for the light model."""
        if self.weights_base:
            return "lite" in self.weights_base
        return self.device == "cpu" or self.memory * MEMORY_SHARE < _gib(LARGE, 4, 640, 4 / 3)


class Choice(NamedTuple):
    key: str  # of the config
    value: object
    reason: str


Chosen = Mapping[str, object]  # keys and values of the rules before


def make_plan(facts: Facts) -> list[Choice]:
    """Every choice, in the order of the rules.

    Raises:
        ValueError: the hours do not suffice for a training.
    """
    choices: list[Choice] = []
    for rule in RULES:
        chosen = {choice.key: choice.value for choice in choices}
        choices += [Choice(*entry) for entry in rule(facts, chosen)]
    return choices


Entries = Iterator[tuple[str, object, str]]


def base_model(f: Facts, c: Chosen) -> Entries:
    if f.weights_base:
        yield "_BASE_", f.weights_base, f"the config that is nearest to that of {f.weights}"
    elif f.light:
        why = "no GPU" if f.device == "cpu" else f"{f.memory:g} GiB are too few for a ResNet-50"
        yield "_BASE_", LIGHT, f"the light model: {why}"
    else:
        yield "_BASE_", LARGE, f"ResNet-50 from COCO weights: a GPU with {f.memory:g} GiB"
    if f.weights:
        yield "MODEL.WEIGHTS", f.weights, "fine-tuned from these, as --weights asks"
    for key, value in f.weights_keys.items():
        yield key, value, "as those weights were trained"


def output(f: Facts, c: Chosen) -> Entries:
    names = ", ".join(f.classes)
    yield "MODEL.ROI_HEADS.NUM_CLASSES", len(f.classes), f"annotated: {names}"
    if not f.masks:
        yield "MODEL.MASK_ON", False, "some lesions have a box and no mask: a detector of boxes"


def frozen_stages(f: Facts, c: Chosen) -> Entries:
    if f.light:
        why = "stem and first stages keep ImageNet's filters: no backward pass where maps are large"
        yield "MODEL.TIMM.FREEZE_AT", 2, why
    elif f.images < 1000:
        why = f"stem and first stage keep COCO's filters: {f.images:,} images are few"
        yield "MODEL.BACKBONE.FREEZE_AT", 2, why
    else:
        why = f"all learns: {f.images:,} images, whose colours and textures are not COCO's"
        yield "MODEL.BACKBONE.FREEZE_AT", 0, why


def test_size(f: Facts, c: Chosen) -> Entries:
    """The light model: 352 pixels, more where small lesions need it, as many as images have. The
    ResNet: as many as the images have, from 640 to 1024, and fewer where its largest anchors, of
    512 pixels, would not reach large lesions."""
    yield "INPUT.CROP_TO_VIEW", True, "the endoscope's view alone, of which all sizes here are"
    key, small = "INPUT.MIN_SIZE_TEST", f.small_lesion / 100
    if f.weights_base:
        yield key, c.get(key, 352 if f.light else 800), "the size that those weights are for"
    elif f.light:
        available = max(224, _multiple(f.short_side))
        size = max(352, math.ceil(16 / small / 32) * 32)
        value = min(size, available, 640)
        why = f"the images have {f.short_side}"
        if value > 352:
            why += ", the light model usually sees 352"
        elif value < f.short_side:
            why += ", the light model is made for 352"
        why += f"; a small lesion (5th percentile) then has {small * value:.0f}"
        yield key, value, f"pixels of the shorter side; {why}"
    else:
        fits = 512 * math.sqrt(2) / (f.large_lesion / 100)
        value = max(640, min(1024, _multiple(f.short_side), _multiple(fits)))
        why = f"the images have {f.short_side}"
        if value > f.short_side:
            why += "; fewer than 640 are far from what COCO weights know"
        elif fits < min(1024, f.short_side):
            why += f"; at {value} a large lesion has {f.large_lesion / 100 * value:.0f}"
        elif value < _multiple(f.short_side):
            why += f"; a small lesion still has {f.small_lesion / 100 * value:.0f}, and memory and "
            why += "time grow with the square"
        yield key, value, f"pixels of the shorter side; {why}"


def training_sizes(f: Facts, c: Chosen) -> Entries:
    """The light model: sizes from 0.55 to 1.1 of the test's. The ResNet: a window of half to all
    of each side, at any size up to the test's, which scales lesions by up to 2, and down to where
    small ones have 32 pixels, but at least to a half and at most to a quarter."""
    size = c["INPUT.MIN_SIZE_TEST"]
    if f.light:
        sizes = list(range(_multiple(0.55 * size), _multiple(1.1 * size) + 1, 32))
        why = f"the distance of the endoscope varies: 0.55 to 1.1 of {size}"
    else:
        low = min(max(32 / (f.small_lesion / 100), size / 4), size / 2)
        sizes = [_multiple(low), size]
        why = f"any size between; small lesions keep {f.small_lesion / 100 * sizes[0]:.0f} pixels"
    yield "INPUT.MIN_SIZE_TRAIN", sizes, why
    if not f.light:
        why = "windows of half to all of each side: lesions up to twice as large"
        yield "INPUT.CROP.ENABLED", True, why
    for key, shortest, usual in (("TRAIN", sizes[-1], 4 / 3), ("TEST", size, 16 / 9)):
        ratio = min(max(f.aspect, usual), 2.5)
        longest = math.ceil(shortest * ratio / 32) * 32
        why = f"{ratio:.3g} times the shorter side; nearly all images need at most {f.aspect:g}"
        yield f"INPUT.MAX_SIZE_{key}", longest, why


def anchors(f: Facts, c: Chosen) -> Entries:
    """Five octaves. Those that the RPN was trained with are kept as long as they cover the lesions
    but the 5 % smallest and largest, within half an octave; else they move."""
    key, size = "MODEL.ANCHOR_GENERATOR.SIZES", c["INPUT.MIN_SIZE_TEST"]
    small, large = (share / 100 * size for share in (f.small_lesion, f.large_lesion))
    if f.weights_base:
        if key not in c:  # the base has those of the weights
            return
        yield key, c[key], f"those weights' own; lesions have {small:.0f} to {large:.0f}"
        return
    usual = 16 if f.light else 32
    low = usual
    while low > 8 and small < low / math.sqrt(2):
        low //= 2
    while low < 64 and low <= usual and large > low * 16 * math.sqrt(2):
        low *= 2
    verdict = "as usual" if low == usual else f"{low / usual:g} times the usual"
    why = f"{verdict}: 90 % of lesions have {small:.0f} to {large:.0f} pixels at {size}"
    yield key, [[low << i] for i in range(5)], why


def augmentation(f: Facts, c: Chosen) -> Entries:
    yield "INPUT.AUG.VFLIP_PROB", 0.5, "with horizontal flips: an endoscope has no up and down"
    yield "INPUT.AUG.ROT90", True, "it is held at any angle"
    yield "INPUT.AUG.COLOR", 0.2, "light and colour differ from device to device, mildly"


def batch(f: Facts, c: Chosen) -> Entries:
    usual = 4 if f.device == "cpu" else 16
    size, why = usual, "usual without a GPU" if f.device == "cpu" else "usual on a GPU"
    while size > 2 and f.images / size < 20:
        size, why = size // 2, f"few, as the {f.images} images are"
    model = LIGHT if f.light else LARGE
    limit = f.largest_batch or 16
    while (
        not f.largest_batch
        and limit > 1
        and (
            _gib(model, limit, c["INPUT.MIN_SIZE_TEST"], max(f.aspect, 4 / 3))
            > MEMORY_SHARE * f.memory
        )
    ):
        limit //= 2
    if limit < size:
        source = "tried" if f.largest_batch else "estimated"
        size, why = limit, f"what {f.memory:g} GiB hold, as {source}"
    if f.step_memory:
        why += f"; a step takes {f.step_memory:g} GiB at most"
    yield "SOLVER.IMS_PER_BATCH", size, f"images per iteration: {why}"


def rate(f: Facts, c: Chosen) -> Entries:
    images = c["SOLVER.IMS_PER_BATCH"]
    if f.light:
        value = significant(0.0005 * math.sqrt(images / 4), 2)
        why = "AdamW: 0.0005 for 4 images, with the square root of the batch"
    else:
        value = significant(0.01 * images / 16, 3)
        why = "SGD: 0.01 for 16 images, in proportion to the batch"
    if f.weights_base:
        why += "; fine-tuning on PolypGen, once, a fifth of it had less F1"
        if not f.light:
            why = "SGD: 0.01 for 16 images, halved for fine-tuning"
            value = significant(value / 2, 3)
    yield "SOLVER.BASE_LR", value, why
    if f.weights_base and not f.light:
        yield "SOLVER.NEW_LAYER_LR_FACTOR", 1.0, "no layer is new to the weights"


def precision(f: Facts, c: Chosen) -> Entries:
    why = "a training times its first batches and chooses"
    if f.short_seconds:
        times = f"{f.fp32_seconds:g} s in fp32, {f.short_seconds:g} s in 16 bits"
        why += f"; for this plan a batch took {times}"
    yield "SOLVER.AMP.PRECISION", "auto", why


def schedule(f: Facts, c: Chosen) -> Entries:
    """Length, warm-up, average, evaluation and checkpoints: in epochs, or in iterations where they
    are fewer than FEWEST_EPOCHS."""
    per_epoch = f.images / c["SOLVER.IMS_PER_BATCH"]
    usual, least, most = FINE_TUNING if f.weights_base else TRAINING
    epochs, why = usual, "a rule of thumb"
    if f.light and not f.weights_base:
        why = "a rule of thumb; on Kvasir-SEG 27 epochs were better than 7"
    if epochs * f.images < least:
        epochs = min(math.ceil(least / f.images), MOST_EPOCHS)
        why = f"{epochs * f.images:,} images, of a small data set"
    elif epochs * f.images > most:
        epochs, why = most / f.images, f"{most:,} images, enough of a large data set"
    hours = epochs * per_epoch * f.step_seconds / 3600
    if is_limited := hours > TRAINING_SHARE * f.hours:
        why = f"what fits into {f.hours:g} hours, where {epochs:.3g} epochs take"
        why += f" {hours / TRAINING_SHARE:.3g}"
        epochs *= TRAINING_SHARE * f.hours / hours
    iterations = max(round(epochs * per_epoch), 1)
    if iterations < SHORTEST and is_limited:
        raise ValueError(
            f"{f.hours:g} hours (--hours) are {iterations} iterations of {f.step_seconds:g} s, "
            f"and {SHORTEST} are the fewest that train a model: give at least "
            f"{SHORTEST * f.step_seconds / 3600 / TRAINING_SHARE:.2g}"
        )

    if (total := math.floor(epochs)) >= FEWEST_EPOCHS:
        iterations = round(total * per_epoch)
        unit, key, length = "epochs", "SOLVER.MAX_EPOCHS", f"{iterations:,} iterations"
    else:
        total = iterations
        unit, key, length = "iterations", "SOLVER.MAX_ITER", f"{epochs:.2g} epochs"
        yield "SOLVER.MAX_EPOCHS", 0, f"fewer than {FEWEST_EPOCHS} epochs are counted in iterations"
    if f.step_seconds:
        hours = iterations * f.step_seconds / 3600
        why += f"; {f.step_seconds:g} s an iteration make {hours:.2g} hours, without validation"
    yield key, total, f"{length}: {why}"

    warmup, length = min(50 if f.light else 200, iterations // 10), ""
    if unit == "epochs":
        warmup = max(1, round(warmup / per_epoch))
        length = f", {math.ceil(warmup * per_epoch):,} iterations,"
    yield "SOLVER.WARMUP_ITERS", warmup, f"{unit}{length} of warm-up: at most a tenth of all"

    longer = (n for n in (1000, 500, 200) if n <= iterations / 20)
    horizon = next(longer, min(100, max(iterations // 10, 2)))
    decay = round(1 - 1 / horizon, 4)
    why = f"mean of about {horizon} iterations' weights, of {iterations:,}"
    yield "SOLVER.EMA_DECAY", decay, why

    seen = iterations * c["SOLVER.IMS_PER_BATCH"]
    affordable = (1 / TRAINING_SHARE - 1) * seen / VALIDATION_COST / max(f.validation_images, 1)
    number = max(2, min(VALIDATIONS, int(affordable) - 1))  # and the final test
    period = math.ceil(total / number)
    limit = (
        "" if number == VALIDATIONS else f", the most that fit on {f.validation_images:,} images"
    )
    why = f"{unit}: about {round(total / period)} validations{limit}; the best weights are kept"
    yield "TEST.EVAL_PERIOD", period, why
    yield "SOLVER.CHECKPOINT_PERIOD", period, f"{unit}: what a crash may cost"


def loading(f: Facts, c: Chosen) -> Entries:
    why = f"{f.lesion_free:g} % of the training images are lesion-free, and take part"
    if not f.lesion_free:
        why = "no image is lesion-free: false alarms are neither learned from nor measured"
    yield "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, why
    number = min(2 if f.device == "cpu" else 8, f.cores)
    yield "DATALOADER.NUM_WORKERS", number, f"processes that read images, on {f.cores} cores"


RULES: tuple[Callable[[Facts, Chosen], Entries], ...] = (
    base_model,
    output,
    frozen_stages,
    test_size,
    training_sizes,
    anchors,
    augmentation,
    batch,
    rate,
    precision,
    schedule,
    loading,
)


def _gib(model: str, images: int, size: int, aspect: float) -> float:
    fixed, per_megapixel, regions = GIB[model]
    return fixed + images * (per_megapixel * size * size * aspect / 1e6 + regions)


def _multiple(pixels: float) -> int:
    """The nearest multiple of 32, the stride of the last stage."""
    return round(pixels / 32) * 32


def significant(value: float, number: int) -> float:
    """A value rounded to a number of significant digits."""
    return float(f"{value:.{number}g}")


def as_yaml(facts: Facts, choices: list[Choice], data: str) -> str:
    """The plan as a config file: each choice with its reason, then the facts, as PLAN.

    Args:
        data: DATASETS.ROOT.
    """
    lines = [
        "# A plan of `imrcnn plan`, to be trained with: imrcnn train --config-file THIS_FILE",
        "# The reason of each choice is on its line; change what you know better. The facts that",
        "# it was made of are at the end: with the same facts, the same plan.",
    ]
    root = Choice("DATASETS.ROOT", data, "the data set")
    entries = {choice.key: choice for choice in [choices[0], root, *choices[1:]]}  # the last counts
    tree: dict = {}
    for choice in entries.values():
        *parents, name = choice.key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = choice
    meanings = {f.name: f.metadata["meaning"] for f in fields(Facts)}
    optional = {f.name for f in fields(Facts) if f.default != MISSING or f.name == "weights_keys"}
    facts_node = {
        name: Choice(name, value, meanings[name])
        for name, value in asdict(facts).items()
        if value or name not in optional
    }
    lines += _lines({**tree, "PLAN": facts_node, "VERSION": Choice("VERSION", 2, "of the keys")})
    return "\n".join(lines) + "\n"


def _lines(tree: dict, indent: str = "") -> Iterator[str]:
    for name, node in tree.items():
        if isinstance(node, dict):
            yield f"{indent}{name}:"
            yield from _lines(node, indent + "  ")
        else:
            # Of a number or text alone, the dump ends with a line "...".
            value = yaml.safe_dump([node.value], default_flow_style=True, width=math.inf)
            yield f"{indent}{name}: {value.strip()[1:-1]}  # {node.reason}"


def facts_of(cfg: CfgNode) -> Facts | None:
    """The facts in PLAN of a config; None of one that is no plan.

    Raises:
        ValueError: PLAN has other keys than a plan of this version.
    """
    if not cfg.PLAN:
        return None
    try:
        return Facts(**{k: dict(v) if isinstance(v, dict) else v for k, v in cfg.PLAN.items()})
    except TypeError as error:
        raise ValueError(f"PLAN has other facts than a plan of this version ({error})") from error


def plan_record(cfg: CfgNode) -> dict | None:
    """For run.json: the facts of a plan, and its choices that the config still has, with reasons;
    None where the config is no plan."""
    facts = facts_of(cfg)
    if facts is None:
        return None
    kept = {}
    for key, value, reason in make_plan(facts):
        node = cfg
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if key == "_BASE_" or plain(node) == plain(value):
            kept[key] = {"value": value, "reason": reason}
    return {"facts": asdict(facts), "choices": kept}


def plain(value):
    """A config's value with its tuples as lists."""
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value
