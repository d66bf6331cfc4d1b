#!/usr/bin/env python3
import runpy
from pathlib import Path

package = Path(__file__).resolve().parents[1] / "imrcnn_d2"
runpy.run_path(str(package / "cli" / "install_detectron2.py"), run_name="__main__")
