"""Downloads of Detectron2's tools, which stay in their folder. Importing this sees to it."""

from typing import Any
from urllib.parse import urlparse

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import HTTPURLHandler

__all__ = ["DownloadHandler"]


class DownloadHandler(HTTPURLHandler):
    """Puts http://HOST/a/b at a/b in the folder of downloads; iopath's goes where ``..`` leads."""

    def _get_local_path(self, path: str, *args: Any, **kwargs: Any) -> str:
        if ".." in (*urlparse(path).path.split("/"), path.split("/")[-1]):
            raise ValueError(
                f"{path!r} was not downloaded: '..' in an address would lead out of the folder of "
                "downloads. Give the address without it, or a local file"
            )
        return super()._get_local_path(path, *args, **kwargs)


PathManager.register_handler(DownloadHandler())  # of detectron2:// and catalog:// too
