"""Scripts in processes of their own, without the seconds that imports take.

They are forked from a server that has imported torch, Detectron2 and the like, but nothing of ours:
each sees our package as a new interpreter does. conftest.py names the imports (PRELOAD), so whoever
asks multiprocessing for the start method "forkserver" shares the server."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PRELOAD = """torch torchvision detectron2.engine detectron2.evaluation detectron2.model_zoo timm
    torch.utils.tensorboard hydra""".split()


def _run(argv, env, out, err):
    for file, number in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")


def run_script(script, *arguments, env=None):
    """Run a script as ``python script arguments`` in the root of the repository does.

    Return the ``CompletedProcess`` with the output as text. The environment is this process's by
    default; the seconds are far more than a script needs on a busy machine."""
    argv = [str(ROOT / script), *map(str, arguments)]
    with TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("out", "err")]
        process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(argv, dict(os.environ if env is None else env), *files)
        )
        process.start()
        process.join()
        printed = [Path(file).read_text(errors="replace") for file in files]
    return subprocess.CompletedProcess(argv, process.exitcode, *printed)
