"""ONNX Runtime, and ONNX files."""

import zlib
from collections.abc import Iterator

import torch

from imrcnn_d2.deploy.runtimes.base import FREE_AXES, INPUT, METADATA_KEY, GraphRuntime
from imrcnn_d2.utils.safe_loading import CHECKSUM, UnsafeFileError, strict_loads


class OnnxRuntime(GraphRuntime):
    name = "onnxruntime"
    suffix = ".onnx"
    precisions = ("fp32",)  # it has no bf16 on CPUs, and NNCF no way with ROIAlign in ONNX

    @classmethod
    def _open(cls, content):
        import onnx
        import onnxruntime

        model = onnx.load_from_string(content)
        _check(model)
        entries = {entry.key: entry.value for entry in model.metadata_props}
        if entries.get(CHECKSUM) not in (None, onnx_checksum(model)):
            raise ValueError(f"it is damaged: its checksum {entries[CHECKSUM]} does not fit")
        # What was checked is what is run, whatever else another parser might see in the bytes.
        model.DiscardUnknownFields()
        content = model.SerializeToString()
        metadata = strict_loads(entries[METADATA_KEY]) if METADATA_KEY in entries else None
        threads = torch.get_num_threads()  # of this thread; another one may compile

        def compile(size):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3  # errors
            options.add_session_config_entry("session.load_model_format", "ONNX")
            for axis, length in zip(FREE_AXES.values(), (1, *(size or ())), strict=False):
                options.add_free_dimension_override_by_name(axis, length)
            session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
            return lambda batch: session.run(None, {INPUT: batch})

        return compile, metadata

    @classmethod
    def _convert(cls, path, calibration):
        return path.read_bytes()

    @classmethod
    def _with_metadata(cls, content, metadata):
        import onnx

        model = onnx.load_from_string(content)
        onnx.helper.set_model_props(model, {METADATA_KEY: metadata})
        model.metadata_props.add(key=CHECKSUM, value=onnx_checksum(model))
        return model.SerializeToString()


def onnx_checksum(model) -> str:
    """CRC-32 of an onnx.ModelProto without the checksum in it."""
    bare = type(model)()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    bare.metadata_props.extend(entry for entry in model.metadata_props if entry.key != CHECKSUM)
    return str(zlib.crc32(bare.SerializeToString()))


def _check(model) -> None:
    """Refuses what reads other files, or takes memory that is not in the file."""
    for part in _messages(model):
        kind = part.DESCRIPTOR.name
        if kind == "TensorProto" and (part.external_data or part.data_location):
            location = {entry.key: entry.value for entry in part.external_data}.get("location")
            raise UnsafeFileError(f"its tensor {part.name!r} is in another file, {location!r}")
        if kind == "SparseTensorProto":
            raise UnsafeFileError(f"it holds a sparse tensor of shape {list(part.dims)}")
        if kind == "NodeProto" and part.domain not in ("", "ai.onnx"):
            raise UnsafeFileError(f"it holds the operator {part.domain}.{part.op_type}")


def _messages(message) -> Iterator:
    """A protobuf message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type:
            for inner in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _messages(inner)
