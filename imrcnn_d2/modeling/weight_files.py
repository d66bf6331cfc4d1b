"""Files of tensors, read so that none of them can run code."""

import json
import pickle
import pickletools
import re
import zipfile

import torch
from safetensors import SafetensorError, safe_open

__all__ = ["UnsafeFileError", "load_safetensors", "load_torch_file", "refusal", "unreadable"]


class UnsafeFileError(ValueError):
    """A file was refused: it needs more than data to be loaded."""


def refusal(filename, what):
    """
    Args:
        filename (str or Path): the file.
        what (str): what it asks for, such as "posix.system".

    Returns:
        UnsafeFileError:
    """
    return UnsafeFileError(
        f"{filename} was refused: it holds {what}, and to load that could run any code. Weights "
        "are tensors, numbers, strings and containers of these. If you trust the file's source, "
        "load it once in a program of your own and save its tensors alone, with "
        "safetensors.torch.save_file(tensors, 'weights.safetensors')"
    )


def unreadable(filename, kind, error):
    """
    Args:
        filename (str or Path): the file.
        kind (str): what it should be.
        error (Exception): what its reader said.

    Returns:
        ValueError:
    """
    return ValueError(
        f"{filename} cannot be read as a {kind} ({error!r}): it is damaged or of another format"
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
        # What torch says goes on to recommend weights_only=False.
        named = re.search(r"(?:GLOBAL|[Cc]lass|function|type) ([\w.]*\w)", str(error))
        what = named[1] if named else " and ".join(_globals(filename))
        if not what:
            raise unreadable(filename, "file of torch.save", error) from error
        raise refusal(filename, what) from None
    except (RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise unreadable(filename, "file of torch.save", error) from error


def _globals(filename):
    """What a pickle, or the one in a zip of torch's, asks for: a list of "module.name"."""
    names, strings = [], []
    with open(filename, "rb") as file:
        data = file.read()
    if zipfile.is_zipfile(filename):
        with zipfile.ZipFile(filename) as archive:
            data = b"".join(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(argument.replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except ValueError:  # no pickle from here on
        pass
    return names


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
        raise unreadable(filename, "safetensors file", error) from error
    return tensors, {name: _parsed(text) for name, text in metadata.items()}


def _parsed(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
