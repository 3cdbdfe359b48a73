"""Where a model's files are: a directory, or the hub's snapshot of them."""

from __future__ import annotations

from pathlib import Path

from adaptax.config import UserError

SMALL_FILES = ("config.json", "tokenizer.model")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
HUB_FILES = (*SMALL_FILES, *_WEIGHTS)
# What a merged checkpoint takes from its base as it is; programs and pickles are never among it.
CARRIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
EXPORT_FILES = (*CARRIED_FILES, *_WEIGHTS)
_QUICKSTART = "python run_training.py +experiment=quickstart runs without a download"


def fetch_files(source: str, patterns: tuple[str, ...] = HUB_FILES) -> Path | None:
    """The directory of a source: itself, or the hub's snapshot (downloaded, or cached). None for ``random``.

    ``patterns`` are the files that are fetched: ``SMALL_FILES`` are enough to look at the model and the data,
    ``EXPORT_FILES`` are all that a merged checkpoint is made of. The token is read from the environment (``HF_TOKEN``)
    or the hub's own login; ``HF_HUB_OFFLINE`` is honoured.

    Raises:
      UserError: the hub does not hand it out.
    """
    if source == "random":
        return None
    directory = Path(source).expanduser()
    return directory if directory.is_dir() else _download(source, patterns)


def find_file(directory: Path, name: str) -> Path:
    """A small file of a model, whether it exists or not: in its directory, or beside an Orbax checkpoint's arrays."""
    from adaptax.orbax_files import find_checkpoint  # brings numpy and tensorstore

    path = directory / name
    folder = None if path.exists() or not directory.is_dir() else find_checkpoint(directory)
    return folder / name if folder is not None and (folder / name).exists() else path


def _download(repo: str, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub as hub  # slow to import, needed for hub ids alone
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        problem = f"is gated: accept its licence at {page}, then set HF_TOKEN or run `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = (
            f"does not exist or is private: look at {page}, and set HF_TOKEN or run `hf auth login` if it is yours"
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = "is not in the local cache and the hub is out of reach: connect once, or set model.weights=DIRECTORY"
    except errors.HFValidationError:
        problem = "is not a valid hub id"
    except Exception as error:  # whatever the transport raises: it is not in our hands
        problem = (
            f"could not be fetched from {page} ({type(error).__name__}): try again, or set model.weights=DIRECTORY"
        )
    raise UserError(f"model.weights={repo} {problem}; {_QUICKSTART}")
