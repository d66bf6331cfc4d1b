"""The machine that benchmarks run on: its name, its processor, the versions of libraries."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

# Flags of /proc/cpuinfo of the instructions that decide how fast a network is.
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 int8",
    "avx_vnni": "AVX int8",
    "avx512_bf16": "AVX-512 bf16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
}
# Names on the page, and distributions.
LIBRARIES = {
    "torch": "torch",
    "OpenVINO": "openvino",
    "ONNX Runtime": "onnxruntime",
    "Detectron2": "detectron2",
    "torchvision": "torchvision",
    "NumPy": "numpy",
}


def describe() -> dict:
    """Name, processor, instructions, cores, threads, memory and versions, as a record has them."""
    processors = _processors()
    first = processors[0] if processors else {}
    model = first.get("model name") or platform.processor() or platform.machine()
    flags = first.get("flags", "").split()
    instructions = [text for flag, text in INSTRUCTIONS.items() if flag in flags]
    count, cores = len(processors) or os.cpu_count(), _cores(processors)
    return {
        "name": name(model, instructions, cores),
        "processor": model,
        "instructions": instructions,
        "cores": cores,
        "threads": count,
        "memory, GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {library: _version(package) for library, package in LIBRARIES.items()},
    }


def name(model: str, instructions: list[str], cores: int) -> str:
    """A short name of this kind of machine, such as "intel-xeon-amx-2-cores"."""
    known = re.sub(r"\(\w+\)|\b(cpu|gen|processor)\b", " ", model.lower())
    words = re.findall(r"\b[a-z]\w*", known)[:2]
    extension = "amx" if has_amx(instructions) else _widest(instructions)
    return "-".join([*words, *extension.split(), f"{cores}-core{'s' * (cores > 1)}"])


def has_amx(instructions: list[str]) -> bool:
    return "AMX bf16" in instructions


def has_bf16(instructions: list[str]) -> bool:
    """Whether the processor multiplies in bf16; where it is emulated, it is slower than fp32."""
    return bool({"AMX bf16", "AVX-512 bf16"} & set(instructions))


def _widest(instructions):
    names = {"AVX-512": "avx512", "AVX2": "avx2"}
    return next((short for text, short in names.items() if text in instructions), "")


def memory(process: int | str = "self") -> dict[str, float]:
    """MiB of a process: resident "now", at most ("peak"), and with shared pages divided ("PSS");
    empty except on Linux.
    """
    folder, sizes = Path(f"/proc/{process}"), {}
    keys = {"now": ("status", "VmRSS"), "peak": ("status", "VmHWM"), "PSS": ("smaps_rollup", "Pss")}
    for name, (file, key) in keys.items() if folder.is_dir() else ():
        text = (folder / file).read_text()
        sizes[name] = int(re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)[1]) / 1024
    return sizes


def _processors():
    """A mapping of fields for each processor that this process may run on."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return []
    blocks = [
        dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in block.splitlines() if ":" in line)
        for block in info.read_text().strip().split("\n\n")
    ]
    allowed = {str(number) for number in os.sched_getaffinity(0)}
    return [block for block in blocks if block.get("processor") in allowed]


def _cores(processors):
    ids = {(block.get("physical id"), block.get("core id")) for block in processors}
    return len(ids - {(None, None)}) or len(processors) or os.cpu_count()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
