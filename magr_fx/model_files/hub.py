"""Download a model from the Hugging Face Hub into the cache."""

from __future__ import annotations

from pathlib import Path

from magr_fx.errors import ModelError

# Seconds to wait for an answer of the Hub before the cache alone is used.
PATIENCE = 10


def download(name: str, ignored: list[str]) -> Path:
    """Download a model's latest version, and return its directory in the cache.

    If the Hub cannot be reached, the version in the cache is used if it is complete. Files that are
    complete in the cache are not downloaded again.

    Args:
        name: a model's name, such as ``"HuggingFaceTB/SmolLM2-135M"``.
        ignored: patterns of the files that are not downloaded.

    Raises:
        ModelError: the model cannot be downloaded. The message has that of huggingface_hub, and the
            possible remedies.
    """
    from huggingface_hub import HfApi, snapshot_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    unreachable: Exception | None = None
    try:
        try:
            HfApi().model_info(name, timeout=PATIENCE)  # snapshot_download has no time limit
        except (HfHubHTTPError, HFValidationError):
            pass  # snapshot_download gets the same answer, and then looks into the cache
        except Exception as error:  # an error of the connection, from httpx
            unreachable = error
        offline = unreachable is not None
        return Path(snapshot_download(name, ignore_patterns=ignored, local_files_only=offline))
    except Exception as error:  # from huggingface_hub, the connection or the disk
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if unreachable is not None:
            reason = (
                f"the Hub cannot be reached ({unreachable}), and the cache does not hold all of it"
            )
        raise ModelError(
            f"{name} is not a directory here, and cannot be downloaded: {reason.rstrip('.')}. Give "
            "a directory, or check the name, the connection and the disk (HF_HOME is the cache); "
            "models that are gated or private need a login (hf auth login). When you repeat the "
            "command, files that are complete are not downloaded again"
        ) from error
