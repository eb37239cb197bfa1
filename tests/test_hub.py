"""From --model_name to a folder: no network for a local one, only the needed files from the hub, quick clear errors."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from llama3 import hub as hub_module
from llama3.checkpoint import load_weights
from llama3.config import ModelConfig
from llama3.errors import HubError
from llama3.hub import looks_like_path, resolve_folder
from tests.fake_hub import FakeHub, serve
from tests.model_folders import make_model_folder

NAME = "someone/Llama-3-small"
HOW_TO_GO_LOCAL = f"or fetch it elsewhere (hf download {NAME} --local-dir DIR) and give DIR"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty model NAME on a hub that the client uses instead of the real one, with an empty cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    with serve(FakeHub(NAME, folder)) as hub:
        use_endpoint(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


def fill(hub: FakeHub, sharded: bool) -> None:
    """A model as published: the needed files among others that nobody should download."""
    make_model_folder(hub.folder, sharded=sharded)
    (hub.folder / "original").mkdir()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "original/tokenizer.json",
    ):
        (hub.folder / name).write_text(f'{{"name": "{name}"}}')  # equal files would be fetched once


def test_a_local_folder_is_used_as_it_is_without_network(tmp_path: Path, no_network: None, monkeypatch):
    folder = tmp_path / "org" / "model"
    make_model_folder(folder)
    assert resolve_folder(folder) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("org/model") == Path("org/model")  # before a hub model of the same name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_folder("~/org/model") == folder
    config = ModelConfig.from_folder(folder)
    load_weights(folder, config, "cpu", progress=False)


def test_a_local_folder_does_not_even_load_the_hub_client(tmp_path: Path):
    make_model_folder(tmp_path)
    code = (
        "import sys; from llama3.hub import resolve_folder; resolve_folder(sys.argv[1]);"
        " sys.exit('huggingface_hub' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, cwd=Path(__file__).parent.parent).returncode == 0


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./models/x", "~/nothing-here", "a/b/c", "models/", "", "C:\\models\\x"]
)
def test_a_path_that_is_not_there_is_an_error_without_network(name: str, no_network: None, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError) as caught:
        resolve_folder(name)
    assert str(caught.value) == (
        f'"{name}": no such folder; give a folder, or a hub name such as meta-llama/Llama-3.2-1B'
    )


def test_hub_names_do_not_look_like_paths():
    assert not any(map(looks_like_path, ("gpt2", NAME, "meta-llama/Llama-3.2-1B")))


def test_an_empty_folder_says_what_is_needed(tmp_path: Path, no_network: None):
    with pytest.raises(HubError) as caught:
        resolve_folder(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: not a complete model folder; missing: config.json,"
        " model.safetensors (or model.safetensors.index.json and its shards), tokenizer.json"
    )


def test_a_folder_in_another_format_says_so(tmp_path: Path, no_network: None):
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin"):
        (tmp_path / name).touch()
    with pytest.raises(HubError) as caught:
        resolve_folder(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: not a complete model folder; missing: model.safetensors (or model.safetensors.index.json and its"
        " shards) (found *.bin, but only the Hugging Face safetensors format is read)"
    )


def test_a_file_is_not_a_folder(tmp_path: Path, no_network: None):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(HubError, match=r"model\.safetensors: a file; give the folder that holds config\.json"):
        resolve_folder(tmp_path / "model.safetensors")


@pytest.mark.parametrize("sharded", [False, True])
def test_downloads_the_needed_files_and_no_others(fake_hub: FakeHub, sharded: bool):
    fill(fake_hub, sharded)
    weights = {path.name for path in fake_hub.folder.glob("model*")}
    assert len(weights) > 2 if sharded else weights == {"model.safetensors"}
    folder = resolve_folder(NAME)
    expected = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} | weights
    assert fake_hub.downloads == expected
    assert {path.name for path in folder.iterdir()} == expected
    assert fake_hub.tokens == {"Bearer hf_secret"}
    load_weights(folder, ModelConfig.from_folder(folder), "cpu", progress=False)
    fake_hub.downloads.clear()
    assert resolve_folder(NAME) == folder
    assert fake_hub.downloads == set()


def test_a_downloaded_model_works_offline(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys):
    fill(fake_hub, sharded=True)
    folder = resolve_folder(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    capsys.readouterr()
    assert resolve_folder(NAME) == folder
    note = f"{NAME}: the hub cannot be reached (HF_HUB_OFFLINE is set); using the cached {folder}\n"
    assert capsys.readouterr().err.endswith(note)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("missing", "no such model on the hub (a private one needs HF_TOKEN)"),
        ("gated", "gated on the hub"),
        ("broken", "the hub answered Server error '500"),
    ],
)
def test_what_is_cached_does_without_the_hub(fake_hub: FakeHub, failure: str, said: str, capsys):
    fill(fake_hub, sharded=True)
    folder = resolve_folder(NAME)
    fake_hub.failure = failure
    capsys.readouterr()
    assert resolve_folder(NAME) == folder
    printed = capsys.readouterr().err
    assert printed.startswith(f"{NAME}: {said}") and printed.endswith(f"; using the cached {folder}\n")


@pytest.mark.parametrize("failure", ["missing", "gated", "broken"])
def test_a_part_of_the_shards_is_no_cached_model(fake_hub: FakeHub, failure: str, capsys):
    fill(fake_hub, sharded=True)
    folder = resolve_folder(NAME)
    (folder / "model-00002-of-00004.safetensors").unlink()
    fake_hub.failure = failure
    with pytest.raises(HubError, match=r"what is cached does not do .* missing: model-00002-of-00004\.safetensors\)"):
        resolve_folder(NAME)
    assert "using the cached" not in capsys.readouterr().err


def test_offline_only_what_the_model_needs_has_to_be_cached(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    fill(fake_hub, sharded=False)
    some = ["config.json", "tokenizer.json", "*.safetensors"]
    folder = huggingface_hub.snapshot_download(NAME, allow_patterns=some, ignore_patterns=["cons*", "original/*"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_folder(NAME) == Path(folder)
    (Path(folder) / "model.safetensors").unlink()
    with pytest.raises(HubError) as caught:
        resolve_folder(NAME)
    assert str(caught.value) == (
        f"{NAME}: the hub cannot be reached (HF_HUB_OFFLINE is set), and what is cached does not do ({folder}: not a"
        " complete model folder; missing: model.safetensors (or model.safetensors.index.json and its shards)); go"
        f" online, {HOW_TO_GO_LOCAL}"
    )


def test_a_model_without_safetensors_is_refused(fake_hub: FakeHub):
    (fake_hub.folder / "config.json").write_text("{}")
    (fake_hub.folder / "pytorch_model.bin").write_text("{}")
    with pytest.raises(HubError, match=f"^{NAME} on the hub: not a complete model folder; missing: model.safetensors"):
        resolve_folder(NAME)
    assert "pytorch_model.bin" not in fake_hub.downloads


@pytest.mark.parametrize(
    ("failure", "files_only", "message"),
    [
        ("missing", False, f"{NAME}: no folder here, and no such model on the hub (a private one needs HF_TOKEN)"),
        (
            "gated",
            True,  # the listing of a gated model is public, its files are not
            f"{NAME}: gated on the hub; accept its licence at https://huggingface.co/{NAME} and set HF_TOKEN,"
            f" {HOW_TO_GO_LOCAL}",
        ),
        ("broken", False, "{answer}; try again later, " + HOW_TO_GO_LOCAL),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(fake_hub: FakeHub, failure: str, files_only: bool, message: str):
    fill(fake_hub, sharded=False)
    fake_hub.failure, fake_hub.files_only = failure, files_only
    start = time.monotonic()
    with pytest.raises(HubError) as caught:
        resolve_folder(NAME)
    assert time.monotonic() - start < 5
    said = str(caught.value)
    if "{answer}" in message:
        assert said.startswith(f"{NAME}: the hub answered ") and "500" in said
        message = message.format(answer=said.split(";")[0])
    assert said == message


def test_a_download_that_breaks_off_says_so(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full_disk)
    with pytest.raises(HubError) as caught:
        resolve_folder(NAME)
    reason = "the download failed ([Errno 28] No space left on device); run again to resume it, "
    assert str(caught.value) == f"{NAME}: {reason}{HOW_TO_GO_LOCAL}"


def test_an_invalid_name_is_refused_before_any_request(fake_hub: FakeHub):
    with pytest.raises(HubError) as caught:
        resolve_folder("bad name!")
    assert str(caught.value) == "bad name!: neither a folder here nor a valid hub name (OWNER/NAME)"
    assert not fake_hub.tokens


@pytest.mark.parametrize("listening", [True, False], ids=["silent", "refused"])
def test_an_unreachable_hub_is_an_error_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: bool
):
    monkeypatch.setattr(hub_module, "HUB_TIMEOUT_S", 0.3)
    monkeypatch.chdir(tmp_path)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:  # accepts, and never says a word: what a firewall does
            server.listen()
        use_endpoint(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path / "cache")
        start = time.monotonic()
        with pytest.raises(HubError) as caught:
            resolve_folder(NAME)
    assert time.monotonic() - start < 8
    said = str(caught.value)
    assert said.startswith(f"{NAME}: no folder here, not in the hub cache, and the hub cannot be reached (")
    assert said.endswith(f"); go online, {HOW_TO_GO_LOCAL}") and "\n" not in said


def test_offline_mode_of_the_environment_is_respected(tmp_path: Path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    code = f"from llama3.hub import resolve_folder; resolve_folder({NAME!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    reason = (
        "not in the hub cache, and the hub cannot be reached (HF_HUB_OFFLINE is set); go online, " + HOW_TO_GO_LOCAL
    )
    assert result.stderr.endswith(f"HubError: {NAME}: no folder here, {reason}\n")
