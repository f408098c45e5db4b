"""A model that is no folder: what the hub's failures are called."""

import httpx
import pytest
from huggingface_hub import errors

from quartet.models import hub
from quartet.models.language_model import ModelError, check_hub, load_tokenizer, read_config


def response(code):
    return httpx.Response(code, request=httpx.Request("GET", "http://hub"))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (httpx.ConnectError("x"), "a/b: is no folder here, and the hub cannot be reached. Check the path"),
        (errors.OfflineModeIsEnabled("x"), "a/b: is no folder here, and the hub cannot be reached. Check the path"),
        (errors.RepositoryNotFoundError("x", response=response(404)), "a/b: is no folder here, and the hub has no such model"),
        (errors.GatedRepoError("x", response=response(403)), "a/b: is no folder here, and the hub gives it only to accounts"),
        (errors.HfHubHTTPError("busy", response=response(500)), "a/b: is no folder here, and the hub does not answer (busy)."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("load", [check_hub, load_tokenizer, read_config])
def test_the_cause_comes_first(monkeypatch, error, sentence, load):
    def fail(url, timeout):
        assert timeout <= 5 and url.endswith("/a/b/resolve/main/config.json")
        raise error

    monkeypatch.setattr(hub, "get_hf_file_metadata", fail)
    with pytest.raises(ModelError) as caught:
        load("a/b")
    assert str(caught.value).startswith(sentence)


def test_a_path_is_no_name_of_the_hub():
    with pytest.raises(ModelError, match="/no/such/folder: is no folder here, and it is no name"):
        check_hub("/no/such/folder")


def test_a_folder_is_never_looked_up(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *_, **__: 1 / 0)
    check_hub(tmp_path)


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """Each further try would wait, up to eight seconds."""
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        check_hub("a/b")
    assert not waits
