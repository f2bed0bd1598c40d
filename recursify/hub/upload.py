"""Upload a folder to the Hugging Face hub, or to the server in HF_ENDPOINT.

Name, token and connection are checked before the export begins. After a failed upload the folder is complete, so the upload can be
repeated. The token is HF_TOKEN or that of `hf auth login`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError, first_line
from ..utils.http import httpx

# Files of an older upload to delete: they would be read instead of the new files, or with them.
_REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py", "*.svg", "*.jinja", "recursify.json"]
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)"


def check(repo: str) -> None:
    """Check that a push to `repo` can begin. Changes nothing on the hub.

    Raises:
        UserError: An invalid name, offline mode, no connection, no token, or an invalid token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push: expected a name on the hub such as you/model, got {repo!r} ({first_line(error)})") from error
    if constants.is_offline_mode():
        raise UserError("--push: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or leave --push out")
    token = get_token()
    if token is None:
        raise UserError(f"--push {repo}: no token for the hub; {_LOGIN}")
    with _explained(repo):
        HfApi(token=token).whoami()


def push(folder: Path, files: Sequence[str], repo: str, *, private: bool, message: str) -> str:
    """Upload files of a folder to a model repository, which is created if it does not exist; returns its address.

    Args:
        files: Names of the files to upload; others are ignored.
        private: Create the repository as a private one.
        message: Commit message.

    Raises:
        UserError: The hub refused or did not answer, or `private` for an existing public repository.
    """
    api = HfApi(token=get_token())
    with _explained(repo, folder):
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(made.repo_id).private:
            raise UserError(f"--private: {made.repo_id} is on the hub already and public; nothing was uploaded. Choose another name")
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, allow_patterns=list(files), delete_patterns=_REPLACED, commit_message=message
        )
    return str(made)


@contextmanager
def _explained(repo: str, folder: Path | None = None) -> Iterator[None]:
    """Turn errors of the hub's client and of the network into a UserError.

    Args:
        folder: The folder to upload, if it has been written.
    """
    again = "" if folder is None else f". {folder} is written and whole: `hf upload {repo} {folder}` uploads it"
    try:
        yield
    except UserError:
        raise
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        if code == 401:
            raise UserError(f"--push {repo}: the hub does not take the token; {_LOGIN}{again}") from error
        if code == 403:
            raise UserError(f"--push {repo}: the token may not write there; name a place of your own, or {_LOGIN}{again}") from error
        if isinstance(error, RepositoryNotFoundError) or code == 404:
            raise UserError(f"--push {repo}: not found on the hub, or not for this token; check the name{again}") from error
        raise UserError(f"--push {repo}: the hub refused ({code}: {first_line(error)}){again}") from error
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:  # raised by the client for a failed transfer or an invalid card
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        why = "the hub cannot be reached" if isinstance(cause, httpx.TransportError) else "the upload failed"
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"--push {repo}: {why} ({reason}); check the network{again}") from error
