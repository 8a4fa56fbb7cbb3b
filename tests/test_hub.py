from __future__ import annotations

from pathlib import Path

import pytest

from minivllm.errors import ConfigError
from minivllm.hub import BUNDLED_MODEL, model_folder


def test_none_is_the_bundled_model_and_a_folder_is_itself(tmp_path: Path) -> None:
    assert model_folder(None) == BUNDLED_MODEL
    assert (BUNDLED_MODEL / "config.json").is_file()
    assert model_folder(str(tmp_path)) == tmp_path


def test_the_bundled_model_stays_under_20_mb() -> None:
    assert sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir()) <= 20_000_000


@pytest.mark.parametrize("name", ["nothing-here", "a/b/c", "../secrets", "/no/such/folder", "owner/..", "owner/na me"])
def test_names_that_are_neither_are_refused_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(ConfigError, match="there is no model folder"):
        model_folder(name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match="is a file"):
        model_folder(str(file))


def test_offline_hub_says_what_to_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"downloading it from the hub failed .*Check the name, the network"):
        model_folder("minivllm-tests/does-not-exist")


def test_a_repository_is_downloaded_once_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert model_folder("owner/name") == tmp_path
    [(repository, patterns)] = asked
    assert repository == "owner/name"
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in patterns)
