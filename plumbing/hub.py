"""What is asked of the Hugging Face hub, and what can go wrong, in one sentence each."""

import sys
from contextlib import contextmanager


def list_parquet(source, revision):
    """The parquet files in OWNER/DATASET/FOLDER, at the commit that revision stands for now: the commit, and
    {path: address}."""
    owner, name, folder = source.split("/", 2)
    with hub_errors(source):
        from huggingface_hub import HfApi

        api, repo = HfApi(), f"{owner}/{name}"
        commit = api.dataset_info(repo, revision=revision).sha
        entries = api.list_repo_tree(repo, folder, repo_type="dataset", revision=commit)
        paths = sorted(entry.path for entry in entries if entry.path.endswith(".parquet"))
    if not paths:
        sys.exit(f"--source={source}: that folder of the hub holds no .parquet file.")
    return commit, {path: f"hf://datasets/{repo}@{commit}/{path}" for path in paths}


@contextmanager
def hub_errors(what, but=()):
    """Whatever goes wrong between here and the hub, but for some kinds of errors, as one sentence."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "HFValidationError" in kinds:
            sys.exit(f"{what} is no path here, and cannot be the name of anything on the hub.")
        if "RevisionNotFoundError" in kinds:
            sys.exit(f"{what}: the hub knows no such --revision.")
        if "RepositoryNotFoundError" in kinds:  # the hub does not tell the two apart, so that names stay private
            sys.exit(f"{what}: the hub does not know it, or keeps it for members: then set HF_TOKEN to your token.")
        if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
            sys.exit(f"{what}: the hub knows the repository, but nothing of that name in it.")
        sys.exit(
            f"{what}: the hub cannot be reached ({type(error).__name__}); without a network, "
            "`python prepare.py config/tiny.py` needs nothing from it."
        )
