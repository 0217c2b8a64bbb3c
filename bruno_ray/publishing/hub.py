"""A saved folder goes to the hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

from bruno_ray import __version__
from bruno_ray.errors import OutputError


def upload(folder: Path, repo: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Push a saved model to the hub; returns its address.

    Args:
        repo: `owner/name`; made if it does not exist.
        private: whether a new repository is private.
        endpoint: another hub than the public one.

    Raises:
        OutputError: not logged in, not allowed, no network, or ``folder`` is no saved model.
    """
    if not (folder / "bruno.json").is_file():
        raise OutputError(f"{folder} is not a model that bruno-ray saved: save a trial first")
    api = HfApi(endpoint=endpoint)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=url.repo_id, commit_message=f"Upload model edited by bruno-ray {__version__}"
        )
    except HFValidationError as error:
        raise OutputError(f"{repo} is not a repository name: use owner/name") from error
    except LocalTokenNotFoundError as error:
        raise OutputError("not logged in to the hub: run `hf auth login` or set HF_TOKEN first") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise OutputError(
                f"the hub does not accept the login for {repo}: run `hf auth login` or set HF_TOKEN first"
            ) from error
        if status == 403:
            raise OutputError(f"the token may not write to {repo}: use one with write access to its owner") from error
        raise OutputError(f"the hub refused {repo} (status {status}): try again later") from error
    except (HTTPError, ConnectionError) as error:  # includes HF_HUB_OFFLINE
        raise OutputError("the hub cannot be reached: check the network and HF_HUB_OFFLINE") from error
    return str(url)
