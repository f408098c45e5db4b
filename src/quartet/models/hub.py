"""What the hub says of a model, asked before transformers loads it: its own errors begin with their
consequences."""

import logging
import re
from pathlib import Path
from typing import Literal

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)

from quartet.errors import QuartetError
from quartet.io.texts import typed

HUB_SECONDS = 5.0
"""How long the hub may take to answer whether it has a model. It is asked once: a download would
try six times, for 23 seconds."""
UNREACHABLE = (
    "the hub cannot be reached. Check the path, or download the {} where there is a network and "
    "name its folder."
)
NOUNS = {"model": "model", "dataset": "data set"}
LOG_IN = "log in with: hf auth login"


def commit_on_hub(name: str) -> str | None:
    """Return the commit of a model's newest version on the hub, or where the hub cannot be reached
    of the version that was downloaded; None where neither tells."""
    try:
        config = hf_hub_download(name, "config.json", etag_timeout=HUB_SECONDS)
    except (OSError, ValueError, HfHubHTTPError, EntryNotFoundError):
        return None
    return Path(config).parent.name


def why_not_on_hub(name: str, kind: Literal["model", "dataset"] = "model") -> str | None:
    """Return why the hub does not give a model or a data set, and what to do; None if it gives it,
    or if it is a model that was downloaded before."""
    file = "config.json" if kind == "model" else "README.md"
    try:
        if isinstance(try_to_load_from_cache(name, file, repo_type=kind), str) and kind == "model":
            return None
    except HFValidationError:
        return "it is no name that the hub can have. Check the path."
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warnings say what is returned
    try:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind), timeout=HUB_SECONDS)
    except EntryNotFoundError:  # a message about the missing file comes from the loading
        return None
    except GatedRepoError:
        return (
            "the hub gives it only to accounts that have accepted its terms. Accept them on its "
            f"page, and {LOG_IN}"
        )
    except RepositoryNotFoundError:
        return (
            f"the hub has no such {NOUNS[kind]}, or only for those who may see it. Check the name; "
            f"for a private {NOUNS[kind]} {LOG_IN}"
        )
    except HfHubHTTPError as error:
        return f"the hub does not answer ({str(error).strip().partition(chr(10))[0]})."
    except Exception:  # of the HTTP client, which has changed between versions, or of being offline
        return UNREACHABLE.format(NOUNS[kind])
    finally:
        logger.setLevel(level)
    return None


class CannotPush(QuartetError):
    """A folder cannot be put on the hub. The message is a sentence for the user."""


def check_push(name: str) -> None:
    """Raise `CannotPush` if nothing can be put on the hub under this name, before any of it is
    written."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is None:
        raise CannotPush(f"--push {name}: write owner/name, as on the hub.")
    if get_token() is None:
        raise CannotPush(f"--push {name}: needs an account of the hub: {LOG_IN}")


def push(folder: Path, name: str, kind: Literal["model", "dataset"] = "model") -> str:
    """Upload the folder of a model or data set to the hub and return its address. A repository that
    does not exist yet is created as a private one. Raises `CannotPush`."""
    api, message = HfApi(), f"{NOUNS[kind].capitalize()} by Quartet"
    try:
        address = api.create_repo(name, private=True, exist_ok=True, repo_type=kind)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, repo_type=kind)
    except Exception as error:  # of the hub, or of an HTTP client that has changed between versions
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise CannotPush(
            f"{name}: could not be uploaded ({reason}). The folder is whole; to try again: hf "
            f"upload {name} {typed(folder)}" + " --repo-type dataset" * (kind == "dataset")
        ) from error
    return str(address)
