"""YOLO networks for segmentation, with random weights, next to ours: speed only.

For benchmarks/benchmark.py. The package ultralytics has the AGPL. It is installed into a folder of
the benchmark's (without its dependencies: those that prediction needs are ours), and imported only
in processes that time it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

VERSION = "8.4.190"
FOLDER = Path(__file__).parents[1] / "build" / f"ultralytics-{VERSION}"
RUNTIMES = {"OpenVINO": ("openvino", "f32"), "ONNX Runtime": ("onnx", "f32")}
BF16 = {"OpenVINO bf16": ("openvino", "bf16")}


def peers(names: Sequence[str], sizes: Sequence[int], bf16: bool) -> dict[str, tuple]:
    """Builder and arguments of a side for each network, size and runtime; see `install`."""
    return {
        f"{name}, {size} pixels, {runtime}": (_yolo, name, size, *how)
        for size in sizes
        for name in names
        for runtime, how in {**RUNTIMES, **(BF16 if bf16 else {})}.items()
    }


def install() -> bool:
    """Install the package into its folder, if it is not there; return whether it is."""
    if not (FOLDER / "ultralytics").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries=1"]
        command += ["--disable-pip-version-check", f"--target={FOLDER}", f"ultralytics=={VERSION}"]
        subprocess.run(command, check=False)
    return (FOLDER / "ultralytics").is_dir()


def _yolo(name: str, size: int, format: str, precision: str) -> Callable:
    """Their prediction from file to masks, with a network for one class, as its YAML has it."""
    folder = FOLDER / "exported" / f"{name}_{size}_{format}_{precision}"
    folder.mkdir(parents=True, exist_ok=True)
    # No downloads, no usage data, no installation of packages.
    os.environ |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0", "YOLO_CONFIG_DIR": str(folder)}
    os.environ["YOLO_VERBOSE"] = "0"
    sys.path.insert(0, str(FOLDER))
    import openvino
    import torch
    import ultralytics

    ultralytics.settings.update({"sync": False})
    source = FOLDER / "ultralytics/cfg/models/11/yolo11-seg.yaml"
    network = folder / f"{name}.yaml"  # its name has the size
    network.write_text(source.read_text().replace("nc: 80", "nc: 1"))
    torch.manual_seed(0)
    before = Path.cwd()
    os.chdir(folder)  # that is where it exports to: others are at it at the same time
    exported = Path(ultralytics.YOLO(network).export(format=format, imgsz=size)).absolute()
    os.chdir(before)
    compile_model = openvino.Core.compile_model

    def compile_as(core, model, device_name, config):
        hint = {"INFERENCE_PRECISION_HINT": precision}
        return compile_model(core, model, device_name, {**config, **hint})

    openvino.Core.compile_model = compile_as  # it takes no precision
    model = ultralytics.YOLO(exported, task="segment")

    def predict(path):
        result = model.predict(path, imgsz=size, device="cpu", verbose=False)[0]
        predict.network.seconds = result.speed["inference"] / 1000
        return result

    predict.network = SimpleNamespace()
    return predict
