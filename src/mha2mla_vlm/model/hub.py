"""A converted model's way to the hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from mha2mla_vlm.errors import InputError, first_line
from mha2mla_vlm.utils.progress import status
from mha2mla_vlm.utils.remote import HUB_ERRORS, unreachable


def check_repository(repository: str | None) -> None:
    """Raise `InputError` if nothing could be sent there: a bad name, or no token that may write."""
    if repository is None:
        return
    try:
        validate_repo_id(repository)
        if away := unreachable():
            raise InputError(f"--push-to-hub {repository}: {away}; leave it out, and send the result later")
        with status("asking the hub"):
            HfApi().repo_exists(repository)
            HfApi().whoami()
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repository!r}: {error}") from None
    except (LocalTokenNotFoundError, *HUB_ERRORS) as error:
        reason = first_line(error)
        raise InputError(f"--push-to-hub {repository}: {reason}; log in with: hf auth login") from None


def push(folder: Path, repository: str) -> str:
    """Send a folder to a model repository of the hub, made if it is not there; returns its address."""
    api = HfApi()
    try:
        with status(f"sending {folder} to {repository}"):
            address = api.create_repo(repository, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder)
    except HUB_ERRORS as error:
        reason = first_line(error)
        raise InputError(
            f"the model is in {folder}, but cannot be sent to {repository}: {reason}; "
            f"send it with: hf upload {repository} {folder}"
        ) from error
    return str(address)
