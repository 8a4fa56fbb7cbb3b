"""Where a model's folder is: the bundled model, a local folder, or a repository on the Hugging Face hub.

The network is used only when the caller names a repository that is not a local folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from minivllm.errors import ConfigError

BUNDLED_MODEL = Path(__file__).resolve().parent / "assets" / "tiny"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Everything that minivllm reads, and nothing that could be executed.
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja"]


def model_folder(model: str | None) -> Path:
    """Local folder of `model`: None is the bundled one, a path is itself, `owner/name` is downloaded (and cached).

    Raises:
        ConfigError: neither a folder nor a repository that can be downloaded.
    """
    if model is None:
        return BUNDLED_MODEL
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"model {model!r} is a file; give the folder with config.json and *.safetensors")
    if not _REPOSITORY.fullmatch(model) or ".." in model:
        raise ConfigError(
            f"there is no model folder {model!r}; give an existing folder or a hub id such as Qwen/Qwen3-0.6B"
        )
    return _download(model)


def _download(repository: str) -> Path:
    # Imported here: the hub's client costs a quarter of a second, and most runs use a local folder.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"there is no model folder {repository!r}, and downloading it from the hub failed ({why}). Check the name, "
            "the network and HF_HUB_OFFLINE; a gated model also needs `hf auth login`"
        ) from error
