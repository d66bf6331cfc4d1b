"""The Hugging Face Hub: weights in it are files of hf://USER/REPO; repositories to publish in."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from detectron2.utils.file_io import PathHandler, PathManager

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
_REPOSITORY = r"([\w.-]+/[\w.-]+)(?:@([^/]+))?"
_ADDRESS = re.compile(rf"hf://{_REPOSITORY}(?:/(.+))?")


def is_repository(name: str) -> bool:
    """Whether it has the form USER/REPO or USER/REPO@REVISION, and not that of a file."""
    is_file = name.endswith((".pth", ".pt", ".pkl", ".safetensors", ".onnx", ".openvino"))
    return re.fullmatch(_REPOSITORY, name) is not None and not is_file


class HubHandler(PathHandler):
    """``hf://USER/REPO[@REVISION][/FILE]``, by default the file `MODEL_FILE`, for Detectron2's
    PathManager: the file alone is fetched, into the Hub's cache on this machine (HF_HOME).

    Other files than of safetensors are refused before anything is requested.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return ["hf://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        from huggingface_hub import hf_hub_download

        address = _ADDRESS.fullmatch(path)
        repo, revision, file = address.groups() if address else (None, None, "")
        file = file or (MODEL_FILE if address else "")
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: weights in the Hugging Face Hub are files of safetensors: "
                "hf://USER/REPO, hf://USER/REPO@REVISION or hf://USER/REPO/FILE.safetensors"
            )
        with _one_line(path):
            return hf_hub_download(
                repo, file, revision=revision and unquote(revision), force_download=force
            )


PathManager.register_handler(HubHandler())


def upload(
    folder: Path, repo: str, message: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Commit the files of a folder to the repository of models USER/REPO, which is made if there is
    none; return the commit's address.

    Raises:
        OSError: the Hub cannot be reached, or refuses it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    with _one_line(f"hf://{repo}"):
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        operations = [CommitOperationAdd(path.name, str(path)) for path in folder.iterdir()]
        return api.create_commit(repo, operations, commit_message=message).commit_url


def front_matter(
    task: str,
    model: str,
    *,
    license: str = "other",
    dataset: str = "",
    metrics: Mapping[str, float] | None = None,
) -> str:
    """The YAML that a model card begins with, by which the Hub lists and finds the model: ``task``
    and ``license`` by the Hub's names, and ``metrics`` on a data set.
    """
    from huggingface_hub import EvalResult, ModelCardData

    # Whatever a run's files call them, they are no markup.
    model, dataset = (re.sub(r"[^\w .-]+", "", text).strip() for text in (model, dataset))
    on = {"task_type": task, "dataset_type": dataset or "other", "dataset_name": dataset or "other"}
    results = [
        EvalResult(metric_type=name, metric_value=round(value, 2), **on)
        for name, value in (metrics or {}).items()
    ]
    data = ModelCardData(
        library_name="imrcnn-d2",
        license=license,
        pipeline_tag=task,
        tags=["detectron2", "endoscopy", "medical", model.lower()],
        model_name=model,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


@contextlib.contextmanager
def _one_line(address: str) -> Iterator[None]:
    """Turn the Hub's errors, which differ in class and have several lines, into one OSError, and
    its warnings of each attempt to connect into one line before all of them.
    """
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    reasons = {
        (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled): (
            f"is not in this machine's cache, and {hub} cannot be reached (or HF_HUB_OFFLINE is "
            "set): connect to it, or name a local file"
        ),
        errors.GatedRepoError: "its owner admits users one by one: ask on its page, and log in "
        "with `hf auth login`",
        errors.RevisionNotFoundError: f"{hub} has no such revision: name a branch, tag or commit",
        errors.EntryNotFoundError: f"{hub} has no such file: name one as hf://USER/REPO/FILE",
        errors.RepositoryNotFoundError: f"{hub} has no such repository, or a private one: check "
        "the name, and log in with `hf auth login`",
    }
    logger.info("%s: asking %s", address, hub)
    noisy = logging.getLogger("huggingface_hub")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    except (errors.HTTPError, OSError, ValueError) as error:
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), None)
        if reason is None:
            reason = " ".join(str(error).split()) or type(error).__name__
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
                reason += " Log in with `hf auth login`, with a token that may write"
        raise OSError(f"{address}: {reason}") from error
    finally:
        noisy.setLevel(level)
