"""A model's name on the Hugging Face Hub → the directory with what is downloaded of it."""

from __future__ import annotations

from pathlib import Path

from magr_fx.errors import ModelError

# Seconds until the Hub is taken not to answer; what is in the cache is used then.
PATIENCE = 10


def download(name: str, ignored: list[str]) -> Path:
    """What is on the Hub now, or, where the Hub cannot be reached, the cache if it is complete.

    Files that are complete in the cache are not downloaded again.

    Args:
        name: such as ``"HuggingFaceTB/SmolLM2-135M"``.
        ignored: patterns of the files to leave there.

    Raises:
        ModelError: with huggingface_hub's own message, and what can be done.
    """
    from huggingface_hub import HfApi, snapshot_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    unreachable: Exception | None = None
    try:
        try:
            HfApi().model_info(name, timeout=PATIENCE)  # snapshot_download asks without a limit
        except (HfHubHTTPError, HFValidationError):
            pass  # snapshot_download gets the same answer, and looks into the cache
        except Exception as error:  # httpx's, of the connection
            unreachable = error
        offline = unreachable is not None
        return Path(snapshot_download(name, ignore_patterns=ignored, local_files_only=offline))
    except Exception as error:  # huggingface_hub's, the connection's, or the disk's
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if unreachable is not None:
            reason = (
                f"the Hub cannot be reached ({unreachable}), and the cache does not hold it all"
            )
        raise ModelError(
            f"{name} is no directory here, and cannot be downloaded: {reason.rstrip('.')}. Give a "
            "directory, or check the name, the connection and the disk (HF_HOME is the cache); "
            "models that are gated or private need a login (hf auth login). The same command "
            "keeps the files that are complete"
        ) from error
