"""Files of tensors, read so that none of them can run code."""

import json
import pickle
import re

import torch
from safetensors import SafetensorError, safe_open

__all__ = ["UnsafeFileError", "load_safetensors", "load_torch_file"]


class UnsafeFileError(ValueError):
    """A file was refused because it needs more than data to be loaded."""

    def __init__(self, filename, what):
        """
        Args:
            filename (str or Path): the file.
            what (str): what it asks for, such as "posix.system".
        """
        super().__init__(
            f"{filename} was refused: it holds {what}, and to load that could run any code. Weights "
            "are tensors, numbers, strings and containers of these. If you trust the file's source, "
            "load it once in a program of your own and save its tensors alone, with "
            "safetensors.torch.save_file(tensors, 'weights.safetensors')"
        )


def load_torch_file(filename):
    """
    Read what ``torch.save`` wrote, on the CPU, with ``weights_only=True``.

    Args:
        filename (str or Path): of any extension.

    Returns:
        object: tensors, numbers, strings and containers of these.

    Raises:
        UnsafeFileError: the file holds anything else; the error names it.
        ValueError: the file is damaged, or not torch's.
    """
    try:
        return torch.load(filename, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch goes on to recommend weights_only=False.
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0]
        named = re.search(r"(?:GLOBAL|class|function|instance of type) ([\w.]*\w)", reason)
        what = named[1] if named else f"what torch.load(weights_only=True) refuses ({reason})"
        raise UnsafeFileError(filename, what) from None
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{filename} cannot be read as a file of torch.save ({error}): it is damaged or of "
            "another format"
        ) from error


def load_safetensors(filename):
    """
    Args:
        filename (str or Path): a .safetensors file.

    Returns:
        tuple[dict[str, Tensor], dict[str, object]]: the tensors, on the CPU; the metadata, parsed
        where they are JSON, else as strings.

    Raises:
        ValueError: the file is damaged, or no safetensors file.
    """
    try:
        with safe_open(filename, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{filename} cannot be read as a safetensors file ({error}): it is damaged or of "
            "another format"
        ) from error
    return tensors, {name: _parsed(text) for name, text in metadata.items()}


def _parsed(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
