"""Versions of what a figure depends on."""

from importlib import metadata

__all__ = ["package_versions"]

PACKAGES = (
    "imrcnn-d2",
    "detectron2",
    "torch",
    "torchvision",
    "timm",
    "pycocotools",
    "faster-coco-eval",
    "numpy",
)


def package_versions():
    """
    Returns:
        dict[str, str or None]: distribution name -> installed version, None where it has none.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
