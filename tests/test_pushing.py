"""Pushing when something fails or was there before, and the commands around it."""

import logging
import resource
import subprocess
import sys

import huggingface_hub
import pytest
from hub_server import Fault, Repository
from huggingface_hub import ModelCard
from published import REPO, rows

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.commands import run
from hf_orthograd.publishing import CardOptions, publish, retract, verify, write_card


# ---- Faults ----


PASSING = {
    "500 three times on the commit": ("POST", "/commit/", 500, 3),
    "500 three times on the storage": ("PUT", "/storage/", 500, 3),
    "503 on the listing": ("GET", "/refs", 503, 2),
    "connection cut in mid-upload": ("PUT", "/storage/", "cut", 1),
    "connection cut in the commit": ("POST", "/commit/", "cut", 1),
}


@pytest.mark.parametrize("name", PASSING)
def test_fault_that_passes_is_waited_out(hub, folder, name):
    hub.faults.append(Fault(*PASSING[name]))
    publish(folder, REPO)
    assert hub.faults[0].times == 0
    assert hub.repositories[REPO].reachable()["model.safetensors"] == {(folder / "model.safetensors").read_bytes()}


STAYING = {
    "403 on the storage": ("PUT", "/storage/", 403, "403"),
    "401": ("POST", "/preupload/", 401, "401"),
    "403": ("POST", "/commit/", 403, "403"),
    "404 on a private repository": ("GET", "/refs", 404, "404"),
    "409": ("POST", "/commit/", 409, "409"),
}


@pytest.mark.parametrize("name", STAYING)
def test_fault_that_stays_is_said_and_a_second_push_finishes(hub, folder, name, caplog):
    method, path, status, message = STAYING[name]
    hub.faults.append(Fault(method, path, status, times=100))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises((OSError, RuntimeError)) as raised, caplog.at_level(logging.ERROR):
        publish(folder, REPO)
    assert message in f"{raised.value} {raised.value.__cause__}"
    assert "What was to be published is whole in" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    hub.faults.clear()
    publish(folder, REPO)
    assert verify(REPO) == []


def test_card_is_whole_or_the_old_one_when_the_disk_is_full(folder):
    before = (folder / "README.md").read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_card(folder, CardOptions(model_name="other"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "README.md").read_text() == before and not list(folder.glob("*.partial"))


def test_timeout_is_waited_out(hub, folder, monkeypatch):
    """The first answer comes later than the client waits."""
    waits = {"timeout": 1.0}
    client = huggingface_hub.utils.get_session()
    monkeypatch.setattr(client, "timeout", waits["timeout"])
    hub.faults.append(Fault("POST", "/commit/", "slow", times=1))
    publish(folder, REPO)
    assert hub.faults[0].times == 0 and verify(REPO) == []


# ---- History ----


def old_repository(hub, name=REPO, tag=False, pull_request=False):
    hub.repositories[name] = repository = Repository(private=False)
    first = repository.add("main", "trained", {"model.safetensors": b"remembers"}, None)
    if tag:
        repository.tags["v1"] = first
    if pull_request:
        repository.add("refs/pr/1", "convert", {"pytorch_model.bin": b"remembers too"}, first)
    repository.add("main", "remove", {"README.md": b"moved"}, first)
    return repository


def test_history_that_remembers_is_refused(hub, folder, unlearned):
    repository = old_repository(hub)
    refused = r"model.safetensors at \w{8} \(refs/heads/main\)\. Push to another repository .* squash_history=True"
    with pytest.raises(ValueError, match=refused):
        publish(folder, REPO)
    with pytest.raises(ValueError, match=refused):  # before training, too
        unlearned()
    old_repository(hub, "owner/out")
    with pytest.raises(ValueError, match="owner/out"):  # named as the folder, where no name is given
        unlearned(hub_model_id=None)
    assert len(repository.commits) == 2


def test_squashed_history_holds_old_weights_nowhere(hub, folder, caplog):
    repository = old_repository(hub, tag=True)
    done = publish(folder, REPO, squash_history=True)
    held = repository.history("main")
    assert len(held) == 1 and repository.commits[held[0]].files["model.safetensors"] != b"remembers"
    assert [one.ref for one in done.remaining] == ["refs/tags/v1"] and "model.safetensors" in caplog.text


def test_retract(hub, folder):
    repository = old_repository(hub, tag=True, pull_request=True)
    found = retract(REPO)
    assert {one.ref for one in found.remaining} == {"refs/tags/v1", "refs/pr/1"} and not found.removed
    found = retract(REPO, delete_refs=True)
    assert found.deleted_refs == ["refs/tags/v1"] and not repository.tags
    assert {one.path for one in found.remaining} == {"model.safetensors", "pytorch_model.bin"}  # of the pull request
    assert "Out of reach: forks" in str(found)
    repository.pull_requests.clear()
    assert not retract(REPO).remaining and b"remembers" not in repository.reachable().get("model.safetensors", set())


@pytest.mark.parametrize("name", ["model/0_0.distcp", "model.nemo", "weights.keras", "consolidated.tar"])
def test_weights_of_other_kinds_count(hub, folder, name):
    hub.repositories[REPO] = repository = Repository(private=False)
    first = repository.add("main", "trained", {name: b"remembers"}, None)
    repository.add("main", "remove", {"README.md": b"moved"}, first)
    with pytest.raises(ValueError, match=rf"{name} at "):
        publish(folder, REPO)


def test_what_would_be_loaded_with_the_model_goes(hub, folder):
    """And nothing else; the commit that is returned is there after the history was rewritten."""
    hub.repositories[REPO] = repository = Repository(private=False)
    kept = {"notes.md", "results.csv", "docs/README.md", "data/tokenizer.json", "train_data.zip"}
    old = ("adapter_config.json", "vocab.json", "old [1]/model.bin", *kept)
    repository.add("main", "before", dict.fromkeys(old, b"{}"), None)
    done = publish(folder, REPO, squash_history=True)
    left = set(repository.commits[repository.branches["main"]].files)
    assert left & set(old) == kept
    assert [one.path for one in done.remaining] == ["train_data.zip"]  # nobody knows what is in it
    assert done.commit.oid == repository.branches["main"] and done.commit.oid in done.commit.commit_url
    assert verify(REPO) == ["data/tokenizer.json stands in no record", "train_data.zip stands in no record"]


def test_plain_trainer_does_not_push_what_is_the_owners(hub, unlearned, make_model, make_samples, tmp_path):
    unlearned(push_to_hub=False).create_model_card()
    samples = make_samples("vit", 4, seed=2)
    args = {"report_to": "none", "use_cpu": True, "max_steps": 1}
    refused = "_unlearning_salt.key, which are for the owner alone"
    with pytest.raises(ValueError, match=refused):
        OrthoGradTrainer(
            make_model("vit"), OrthoGradConfig(str(tmp_path / "out"), push_to_hub=True, **args), train_dataset=samples
        )
    plain = OrthoGradTrainer(make_model("vit"), OrthoGradConfig(str(tmp_path / "out"), **args), train_dataset=samples)
    with pytest.raises(ValueError, match=refused):
        plain.push_to_hub()


def test_adapter_of_an_earlier_push_is_named(hub, folder):
    hub.repositories[REPO] = repository = Repository(private=False)
    repository.add("main", "adapter", {"adapter_model.safetensors": b"difference"}, None)
    with pytest.raises(ValueError, match="Merged weights minus a public adapter give the original back"):
        publish(folder, REPO)


# ---- Commands ----


def test_commands_say_what_they_did(hub, folder, capsys, make_samples, tmp_path):
    assert run(["publish", str(folder), REPO]) == 0 and "Published: http" in capsys.readouterr().out
    assert run(["verify", REPO]) == 0 and "As recorded" in capsys.readouterr().out
    rows(make_samples("vit", 4, seed=1)).to_parquet(tmp_path / "forget.parquet")
    asked = ["verify", str(folder), "--salt", str(folder.parent / "_unlearning_salt.key")]
    assert run([*asked, "--rows", str(tmp_path / "forget.parquet"), "--row", "3"]) == 0
    assert "chain, the seal of this salt, and the row was in a request." in capsys.readouterr().out
    assert run([*asked, "--rows", str(tmp_path / "forget.parquet"), "--row", "9"]) == 2
    assert "has rows 0 to 3" in capsys.readouterr().err
    assert run(["card", str(folder), "--model_name", "Renamed", "--license", "mit"]) == 0
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    assert run(["retract", "owner/nothing"]) == 2 and "RepositoryNotFoundError" in capsys.readouterr().err
    repository = old_repository(hub, "owner/old", tag=True)
    assert run(["retract", "owner/old"]) == 1 and "Still there: model.safetensors" in capsys.readouterr().out
    assert run(["retract", "owner/old", "--delete_refs"]) == 0 and not repository.tags
    (folder / "model.safetensors").write_bytes(b"")
    assert run(["verify", str(folder)]) == 1 and "Differs: model.safetensors" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run(["publish"])
    assert ended.value.code == 2


# ---- Signing, as the guide shows it ----


def test_signed_folder_is_published_with_its_signature(hub, folder, tmp_path):
    pytest.importorskip("model_signing", reason="signing is an extra")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)

    def model_signing(*arguments):
        command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True).returncode

    signature = folder / "model.sig"
    assert model_signing("sign", "key", folder, "--private_key", tmp_path / "key.pem", "--signature", signature) == 0
    publish(folder, REPO)
    local = tmp_path / "downloaded"
    huggingface_hub.snapshot_download(REPO, local_dir=local)
    check = ("verify", "key", local, "--signature", local / "model.sig", "--public_key", tmp_path / "key.pub")
    check += ("--ignore-paths", local / ".cache")
    assert model_signing(*check) == 0
    with open(local / "model.safetensors", "ab") as file:
        file.write(b"x")
    assert model_signing(*check) != 0
