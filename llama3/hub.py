"""From --model_name to a folder: a local one as it is, without touching the network, or one fetched from the hub."""

import json
import os
import sys
from pathlib import Path

from llama3.checkpoint import INDEX_FILE, SINGLE_FILE
from llama3.errors import HubError

TEXT_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
]
HUB_TIMEOUT_S = 5  # for the first answer; the hub client alone retries a silent connection for minutes


def resolve_folder(name: str | Path) -> Path:
    """The folder of the model `name`: a local folder, or a hub name such as meta-llama/Llama-3.2-1B.

    HF_HUB_OFFLINE, HF_TOKEN, HF_HOME and the other variables of huggingface_hub hold. Raises HubError if there is no
    such folder or model, if it cannot be fetched, or if files are missing that no model can do without.
    """
    name = str(name)
    path = os.path.expanduser(name)  # unlike Path's, these calls take any string without raising
    if os.path.isdir(path):
        check_folder(Path(path), path)
        return Path(path)
    if os.path.exists(path):
        raise HubError(f"{name}: a file; give the folder that holds config.json")
    if not name or looks_like_path(name):
        raise HubError(f'"{name}": no such folder; give a folder, or a hub name such as meta-llama/Llama-3.2-1B')
    return _fetch(name)


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a path: hub names are NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def check_folder(folder: Path, title: str) -> None:
    """Raise HubError, with `title` in front, unless `folder` holds a config and weights.

    A tokenizer is needed for text only, so its lack alone is no error here.
    """
    needs = {
        "config.json": ["config.json"],
        f"{SINGLE_FILE} (or {INDEX_FILE} and its shards)": [SINGLE_FILE, INDEX_FILE],
        "tokenizer.json": ["tokenizer.json"],
    }
    missing = [need for need, names in needs.items() if not any((folder / name).is_file() for name in names)]
    if missing in ([], ["tokenizer.json"]):
        return
    message = f"{title}: not a complete model folder; missing: {', '.join(missing)}"
    other = [pattern for pattern in ("*.bin", "*.pth", "*.gguf", "original/*.pth") if any(folder.glob(pattern))]
    if other:
        message += f" (found {', '.join(other)}, but only the Hugging Face safetensors format is read)"
    raise HubError(message)


def _fetch(name: str) -> Path:
    """The folder of the hub model `name` in the hub cache, downloaded, or as it lies there if the hub gives nothing."""
    try:
        folder = _download(name)
    except _NoDownload as refusal:
        folder = _cached(name, refusal)
        print(f"{name}: {refusal.reason}; using the cached {folder}", file=sys.stderr)
        return folder
    check_folder(folder, f"{name} on the hub")
    return folder


def _cached(name: str, refusal: "_NoDownload") -> Path:
    """The folder in the hub cache, if it is whole. Else HubError, with the reason why nothing can be fetched."""
    from huggingface_hub import snapshot_download

    try:
        # Only this file: what else the hub has and the cache lacks may not be needed.
        folder = Path(snapshot_download(name, allow_patterns=["config.json"], local_files_only=True))
    except Exception:
        raise HubError(f"{name}: {refusal.nothing_here}{refusal.reason}{refusal.advice}") from None
    try:
        check_folder(folder, str(folder))
        absent = [file for file in _weight_files(folder) if not (folder / file).is_file()]
        if absent:
            raise HubError(f"{folder}: not a complete model folder; missing: {', '.join(absent)}")
    except HubError as problem:
        reason = f"{refusal.reason}, and what is cached does not do ({problem})"
        raise HubError(f"{name}: {reason}{refusal.advice}") from None
    return folder


class _NoDownload(Exception):
    """The hub gives nothing. reason: why. advice: what to do, said after it. nothing_here: said before it if nothing is
    cached either."""

    def __init__(self, reason: str, advice: str = "", nothing_here: str = "") -> None:
        super().__init__(reason)
        self.reason, self.advice, self.nothing_here = reason, advice, nothing_here


def _download(name: str) -> Path:
    """Fetch what is needed of the hub model `name` into the hub cache and return the folder. Raises HubError, and
    _NoDownload where the cache may help."""
    # Imported here: a local folder must not even load the client.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    local = f"or fetch it elsewhere (hf download {name} --local-dir DIR) and give DIR"
    reached = False
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        reached = True
        # First by branch, so that the cache can tell offline which commit "main" was; then by that commit.
        folder = Path(snapshot_download(name, allow_patterns=[*TEXT_FILES, INDEX_FILE]))
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=_weight_files(folder)))
    except HFValidationError:
        raise HubError(f"{name}: neither a folder here nor a valid hub name (OWNER/NAME)") from None
    except GatedRepoError:
        advice = f"; accept its licence at https://huggingface.co/{name} and set HF_TOKEN, {local}"
        raise _NoDownload("gated on the hub", advice) from None
    except RepositoryNotFoundError:
        reason = "no such model on the hub (a private one needs HF_TOKEN)"
        raise _NoDownload(reason, nothing_here="no folder here, and ") from None
    except HfHubHTTPError as error:
        raise _NoDownload(f"the hub answered {_first_line(error)}", f"; try again later, {local}") from None
    except HubError:
        raise
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except Exception as error:  # connection errors: their types depend on the HTTP library of the hub client's version
        reason = _first_line(error)
        if reached:
            raise HubError(f"{name}: the download failed ({reason}); run again to resume it, {local}") from None
    reason = f"the hub cannot be reached ({reason})"
    raise _NoDownload(reason, f"; go online, {local}", "no folder here, not in the hub cache, and ")


def _weight_files(folder: Path) -> list[str]:
    """The weight files to fetch, read from the index where the model has one: never a second copy of the weights."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return [SINGLE_FILE]
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HubError(f"{index}: not a safetensors index") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
