"""Finding what a user calls a model: a path, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from dirmerge.errors import CheckpointError

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*)(@(?P<revision>[\w.\-/]+))?")
# What a merge can use of a hub repository: weights, configuration, tokenizer, custom code.
_HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "tokenizer*",
    "LICENSE*",
    "NOTICE*",
]
_HUB_IGNORED = ["*/*", "consolidated*"]


def resolve(source: str) -> Path:
    """Turns what a user calls a model into a path, downloading it from the Hugging Face hub if need be.

    Args:
        source: a local path, or a hub id "org/name", optionally with "@revision".

    Returns:
        A file or folder on this machine. From the hub only safetensors, configuration, tokenizer and code
        files come, no pickles.

    Raises:
        CheckpointError: if there is neither such a path nor such a repository, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise CheckpointError(
            f"{source}: no such file or folder (and not a hub id of the form org/name[@revision])"
        )
    # imported here: a merge of local files needs no hub client
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                match["id"],
                revision=match["revision"],
                allow_patterns=_HUB_FILES,
                ignore_patterns=_HUB_IGNORED,
            )
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{source}: no such file or folder, and as a hub id it is not in the local cache while the hub "
            f"cannot be reached (offline?): download it first with `hf download {match['id']}`, or give a "
            "local path"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{source}: no such file or folder, and the hub answers: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
