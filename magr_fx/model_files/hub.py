"""A model's name on the Hugging Face Hub → the directory with what is downloaded of it."""

from __future__ import annotations

from pathlib import Path

from magr_fx.errors import ModelError

# Seconds until the Hub is taken not to answer; what is in the cache is used then.
PATIENCE = 10
_OR = "or give a directory"


def download(name: str, ignored: list[str]) -> Path:
    """What is on the Hub now, or where that cannot be reached what is in the cache, if it is whole.

    Files that are whole in the cache are not downloaded again.

    Args:
        name: such as ``"HuggingFaceTB/SmolLM2-135M"``.
        ignored: patterns of the files to leave there.

    Raises:
        ModelError: it cannot be had; the message says why, and what to do.
    """
    from huggingface_hub import HfApi, snapshot_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    unreachable: Exception | None = None
    try:
        HfApi().model_info(name, timeout=PATIENCE)  # snapshot_download would ask, and wait forever
    except HFValidationError as error:
        raise ModelError(
            f"{name} is neither a directory here nor a name that the Hub can have: {_brief(error)}"
        ) from error
    except HfHubHTTPError:
        pass  # asked again below, which goes on with the cache if it is of the kind that passes
    except Exception as error:  # of the connection, or it is to be used offline
        unreachable = error
    try:
        offline = unreachable is not None
        return Path(snapshot_download(name, ignore_patterns=ignored, local_files_only=offline))
    except Exception as error:  # of the client, the connection, or the disk
        why = _why_not(name, error, unreachable)
        raise ModelError(f"{name} is no directory here, and {why}") from error


def _why_not(name: str, error: Exception, unreachable: Exception | None) -> str:
    """What went wrong, and the remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        IncompleteSnapshotError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    part = "only a part of it" if isinstance(error, IncompleteSnapshotError) else "nothing of it"
    if unreachable is not None:
        if isinstance(unreachable, OfflineModeIsEnabled):
            reason, remedy = "HF_HUB_OFFLINE keeps the Hub away", "unset that to download it"
        else:
            reason = f"the Hub cannot be reached ({_brief(unreachable)})"
            remedy = "check the connection, and HF_ENDPOINT if it is set"
        return f"{part} is in the cache, and {reason}: {remedy}, {_OR}"
    if isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # after which nothing was found in the cache
    if isinstance(error, GatedRepoError):
        return (
            f"on the Hub it is gated: accept its conditions at {constants.ENDPOINT}/{name} and log "
            f"in (hf auth login), {_OR}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "the Hub has no model of this name that it shows you: check the name, log in for a "
            f"private one (hf auth login), {_OR}"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the Hub refuses it ({_brief(error)}): log in anew (hf auth login), {_OR}"
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"what is downloaded cannot be written: {error}. Free some space, set HF_HOME to "
            f"another place, {_OR}"
        )
    return (
        f"the download failed ({_brief(error)}): check the connection; the same command takes it "
        f"up again, and keeps the files that are whole"
    )


def _brief(error: Exception) -> str:
    """The kind and the first line, which with the Hub's client are followed by advice."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0].rstrip('. ')}"
