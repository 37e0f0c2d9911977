"""A repository on the Hub is git: what was pushed over lies in its history, until that is rewritten."""

from collections.abc import Collection
from dataclasses import dataclass, field

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from transformers.utils import logging

from .files import is_of_a_model, may_hold_weights


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class OldWeights:
    """A file of an earlier revision that may hold a model that remembers.

    Attributes:
        ref (`str`): The branch, tag or pull request it can be reached by.
        commit (`str`): Its commit.
        path (`str`): In the repository.
        content (`str`): SHA-256 of a file in large file storage, git's name of another.
    """

    ref: str
    commit: str
    path: str
    content: str

    def __str__(self) -> str:
        return f"{self.path} at {self.commit[:8]} ({self.ref})"


@dataclass
class Retraction:
    """What [`retract`] did, and what it could not.

    Attributes:
        removed (`list[OldWeights]`): No longer to be reached by any branch, tag or pull request.
        remaining (`list[OldWeights]`): Still there, under a tag or a pull request, or the newest of a branch.
        deleted_refs (`list[str]`): Tags and branches that were deleted.
    """

    removed: list[OldWeights] = field(default_factory=list)
    remaining: list[OldWeights] = field(default_factory=list)
    deleted_refs: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"Removed {len(self.removed)} files of earlier revisions."]
        lines += [f"Deleted {ref}." for ref in self.deleted_refs]
        lines += [f"Still there: {one}." for one in self.remaining]
        return "\n".join([*lines, OUT_OF_REACH])


OUT_OF_REACH = (
    "Out of reach: forks, downloads, caches, and revisions that somebody has the commit of, until the Hub cleans up."
)


def find_weights(repo_id: str, known: Collection[str] = (), *, token: str | None = None) -> list[OldWeights]:
    """Files of any revision, of all branches, tags and pull requests, that may hold a model; none without a repository.

    Args:
        known (`Collection[str]`): Contents that do not count, as those now published.
    """
    api, found, trees = HfApi(), {}, {}
    try:
        refs = api.list_repo_refs(repo_id, include_pull_requests=True, token=token)
        named = [(ref.ref, ref.name) for ref in (*refs.branches, *refs.tags)]
        named += [(ref.ref, ref.ref) for ref in (*refs.converts, *(refs.pull_requests or ()))]
        for ref, revision in named:
            for commit in api.list_repo_commits(repo_id, revision=revision, token=token):
                where = commit.commit_id
                if where not in trees:
                    trees[where] = weights_in(api, repo_id, where, token)
                for path, content in trees[where].items():
                    if content not in known:
                        found.setdefault((ref, path, content), OldWeights(ref, where, path, content))
    except RepositoryNotFoundError:
        return []
    return list(found.values())


def weights_in(api: HfApi, repo_id: str, revision: str, token: str | None) -> dict[str, str]:
    """By path, the content of each file that may hold a model, as LFS knows it (SHA-256), else git."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, token=token)
    files = [one for one in tree if isinstance(one, RepoFile) and may_hold_weights(one.path, one.lfs is not None)]
    return {file.path: file.blob_id if file.lfs is None else file.lfs.sha256 for file in files}


def files_of_models(repo_id: str, branch: str, *, token: str | None = None) -> list[str]:
    """Paths on a branch that are a model's, which another one replaces."""
    tree = HfApi().list_repo_tree(repo_id, recursive=True, revision=branch, token=token)
    return [one.path for one in tree if isinstance(one, RepoFile) and is_of_a_model(one.path)]


def squash(repo_id: str, branch: str, *, token: str | None = None) -> None:
    """Rewrites a branch as one commit, of what its newest holds."""
    HfApi().super_squash_history(repo_id, branch=branch, token=token)


def retract(repo_id: str, *, branch: str = "main", delete_refs: bool = False, token: str | None = None) -> Retraction:
    """Takes the weights of earlier revisions out of a repository that was pushed to long ago.

    The newest revision stays as it is: to replace its weights, push the unlearned model first.

    Args:
        branch (`str`): Whose history is rewritten.
        delete_refs (`bool`): Whether tags and other branches that hold other weights are deleted, too. Pull requests
            cannot be.

    Returns:
        [`Retraction`].

    Raises:
        RepositoryNotFoundError: There is no such repository, or the token may not see it.
    """
    api = HfApi()
    newest = set(weights_in(api, repo_id, branch, token).values())
    before = find_weights(repo_id, newest, token=token)
    squash(repo_id, branch, token=token)
    deleted = []
    if delete_refs:
        refs = api.list_repo_refs(repo_id, token=token)
        holding = {one.ref for one in find_weights(repo_id, newest, token=token)}
        for tag in refs.tags:
            if tag.ref in holding:
                api.delete_tag(repo_id, tag=tag.name, token=token)
                deleted.append(tag.ref)
        for other in refs.branches:
            if other.ref in holding and other.name != branch:
                api.delete_branch(repo_id, branch=other.name, token=token)
                deleted.append(other.ref)
    remaining = find_weights(repo_id, newest, token=token)
    left = {one.content for one in remaining}
    for one in remaining:
        logger.warning(f"{repo_id} still holds {one}.")
    return Retraction([one for one in before if one.content not in left], remaining, deleted)
