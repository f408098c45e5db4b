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
        (errors.LocalEntryNotFoundError("x"), "a/b: is no folder here, and the hub cannot be reached. Check the path"),
        (errors.RepositoryNotFoundError("x", response=response(404)), "a/b: is no folder here, and the hub has no such model"),
        (errors.GatedRepoError("x", response=response(403)), "a/b: is no folder here, and the hub gives it only to accounts"),
        (errors.HfHubHTTPError("busy", response=response(500)), "a/b: is no folder here, and the hub does not answer (busy)."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("load", [check_hub, load_tokenizer, read_config])
def test_the_cause_comes_first(monkeypatch, error, sentence, load):
    def fail(*_, etag_timeout, **__):
        assert etag_timeout <= 5, "offline, a wrong name is answered in seconds"
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(ModelError) as caught:
        load("a/b")
    assert str(caught.value).startswith(sentence)


def test_a_path_is_no_name_of_the_hub():
    with pytest.raises(ModelError, match="/no/such/folder: is no folder here, and it is no name"):
        check_hub("/no/such/folder")


def test_a_folder_is_never_looked_up(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: 1 / 0)
    check_hub(tmp_path)
