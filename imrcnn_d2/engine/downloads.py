"""Downloads of Detectron2's tools, which stay in their folder. Importing this sees to it."""

import os
from typing import Any
from urllib.parse import urlparse

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import HTTPURLHandler, get_cache_dir

__all__ = ["DownloadHandler"]

MODEL_ZOO = "https://dl.fbaipublicfiles.com/"


class DownloadHandler(HTTPURLHandler):
    """
    Puts http://HOST/a/b at HOST/a/b in the folder of downloads, and the model zoo's at a/b. That of
    iopath goes where ``..`` leads, and takes a file of one host for another's.
    """

    def _get_local_path(
        self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any
    ) -> str:
        address = urlparse(path)
        if ".." in (address.netloc, *address.path.split("/"), path.split("/")[-1]):
            raise ValueError(
                f"{path!r} was not downloaded: '..' in an address would lead out of the folder of "
                "downloads. Give the address without it, or a local file"
            )
        if not path.startswith(MODEL_ZOO):
            cache_dir = os.path.join(get_cache_dir(cache_dir), address.netloc)
        return super()._get_local_path(path, force, cache_dir, **kwargs)


PathManager.register_handler(DownloadHandler())  # of detectron2:// and catalog:// too
