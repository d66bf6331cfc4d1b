import os

from processes import run_script

# Prints each file under the data folder that is looked into, each file that is written, and each
# connection, while the package is imported.
SCRIPT = """
import os, sys

def watch(event, args):
    if event.startswith(("socket.connect", "socket.getaddrinfo")):
        print(event, *args)
    elif event in ("open", "os.listdir", "os.scandir", "os.mkdir") and isinstance(args[0], str):
        flags = args[2] if event == "open" else 0
        written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and "__pycache__" not in args[0]
        written = written and not args[0].startswith("/dev/")
        if written or os.path.abspath(args[0]).startswith(os.environ["IMRCNN_DATASETS"]):
            print(event, *args)

# What these read and write is their own affair.
import cv2, detectron2.data, detectron2.engine, pycocotools.mask, timm, torchvision
sys.addaudithook(watch)
import imrcnn_d2
from detectron2.data import DatasetCatalog
assert "kvasir_seg_train" in DatasetCatalog.list()
"""


def test_import_registers_data_sets_and_touches_no_disk(tmp_path):
    annotations = tmp_path / "datasets" / "kvasir_seg" / "annotations"
    annotations.mkdir(parents=True)
    (annotations / "train.json").write_text("{}")
    script = tmp_path / "watch.py"
    script.write_text(SCRIPT)
    done = run_script(script, env={**os.environ, "IMRCNN_DATASETS": str(tmp_path / "datasets")})
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
