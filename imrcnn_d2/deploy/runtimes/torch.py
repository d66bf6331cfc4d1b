"""PyTorch, and safetensors files of weights."""

import json
from pathlib import Path

import safetensors.torch
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from torch import nn

from imrcnn_d2.deploy.runtimes.base import Runtime, export_metadata
from imrcnn_d2.modeling.roi_heads import FP32SeparableROIPooler
from imrcnn_d2.utils.files import write_atomically
from imrcnn_d2.utils.safe_loading import CHECKSUM, tensors_checksum

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class TorchRuntime(Runtime):
    """PyTorch, on the device of the model. Its files are weights, which MODEL.WEIGHTS takes too."""

    name = "torch"
    suffix = ".safetensors"
    precisions, exact_precisions = tuple(_DTYPES), ("fp32",)
    _autocast = False

    def __init__(self, model: nn.Module):
        """``model`` is in evaluation mode, and changed in place."""
        self.model = model.to(memory_format=torch.channels_last)

    @classmethod
    def from_model(cls, model, example):
        return cls(model)

    @torch.no_grad()  # not inference_mode: what comes out may be changed in place
    def __call__(self, images):
        inputs = [{"image": image} for image in images]
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._autocast):
            if isinstance(self.model, GeneralizedRCNN):
                outputs = self.model.inference(inputs, do_postprocess=False)
            else:
                outputs = self.model(inputs)
        return [_to_cpu(output) for output in outputs]

    @classmethod
    def export(cls, loaded, path: Path, *, example=None, precision="fp32", calibration=()):
        """In fp16, kernels and matrices are rounded; vectors such as the statistics of a norm are
        not. ``crc32`` is of the tensors and of the metadata, which are JSON texts.
        """
        cls.check_precision(precision)
        kernels = {name for name, tensor in loaded.model.named_parameters() if tensor.ndim > 1}
        tensors = {
            name: _rounded(name, tensor, _DTYPES[precision] if name in kernels else tensor.dtype)
            for name, tensor in loaded.model.state_dict().items()
        }
        metadata = export_metadata(loaded, precision)
        texts = {"format": "pt", **{key: json.dumps(value) for key, value in metadata.items()}}
        texts[CHECKSUM] = tensors_checksum(tensors, texts)
        write_atomically(path, safetensors.torch.save(tensors, texts))


class TorchBF16Runtime(TorchRuntime):
    """PyTorch with autocast to bf16. ROI pooling stays in fp32, since boxes would move by a pixel,
    and so do scores, which would come in steps of 0.004.
    """

    name = "torch-bf16"
    suffix, precisions, exact_precisions = None, (), ()
    precision = "bf16"
    _autocast = True

    def __init__(self, model: nn.Module):
        super().__init__(model)
        heads = getattr(model, "roi_heads", None)
        if heads is None:
            return
        for name in ("box_pooler", "mask_pooler"):
            if isinstance(getattr(heads, name, None), ROIPooler):
                setattr(heads, name, FP32SeparableROIPooler(getattr(heads, name)))
        forward = heads.box_predictor.forward

        def in_fp32(x):
            with torch.autocast(x.device.type, enabled=False):
                return forward(x.float())

        heads.box_predictor.forward = in_fp32


def _to_cpu(output):
    """The instances, or the scores, of an output in the form that its model gives it."""
    if isinstance(output, dict):
        output = output["instances"] if "instances" in output else output["scores"].float()
    return output.to("cpu")


def _rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy: safetensors refuses tensors that share their memory."""
    rounded = tensor.detach().cpu().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(rounded).all():
        largest = tensor.abs().max().item()
        raise ValueError(f"{name} has values up to {largest:g}, too large for fp16; take fp32")
    return rounded
