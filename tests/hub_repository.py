"""A repository of the small Hub: commits as git keeps them."""

import hashlib
from dataclasses import dataclass, field


@dataclass
class Commit:
    title: str
    parent: str | None
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, title: str, files: dict[str, bytes], parent: str | None) -> str:
        """A commit on a branch (or a pull request); returns its id."""
        content = repr((title, parent, sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items())))
        oid = hashlib.sha1(content.encode() + str(len(self.commits)).encode()).hexdigest()
        self.commits[oid] = Commit(title, parent, files)
        (self.pull_requests if branch.startswith("refs/pr/") else self.branches)[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for refs in (self.branches, self.tags, self.pull_requests):
            if name in refs:
                return refs[name]
        return revision if revision in self.commits else None

    def history(self, revision: str) -> list[str]:
        oid, found = self.resolve(revision), []
        while oid is not None:
            found.append(oid)
            oid = self.commits[oid].parent
        return found

    def reachable(self) -> dict[str, set[bytes]]:
        """By path, all contents that a branch, tag or pull request leads to."""
        found: dict[str, set[bytes]] = {}
        for refs in (self.branches, self.tags, self.pull_requests):
            for name in refs:
                for oid in self.history(name):
                    for path, data in self.commits[oid].files.items():
                        found.setdefault(path, set()).add(data)
        return found
