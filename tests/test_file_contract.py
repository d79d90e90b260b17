"""What holds of every file format of the package."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.curvature.checkpoint import PassCheckpoint, read_checkpoint
from bmoe_lightning.laplace.storage import load_posterior, save_posterior
from bmoe_lightning.methods.snapshots import apply_snapshot, save_snapshot, snapshot_info
from bmoe_lightning.utils.file_contract import check_file_format
from bmoe_lightning.utils.file_header import seal
from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from bmoe_lightning.utils.safetensors_io import read_tensor_file, write_tensor_file

OPTIONS = {"rank": 2}
TENSORS = {"format": "sample", "version": 3}
INDEX = {"format": "sample index", "version": 2}


class Posterior:
    name = "posterior.safetensors"

    def __init__(self):
        self.factors = collect_factors(toy_model(idle=[1]), answer_logits, [toy_batch()], rank=3)

    def write(self, path):
        precision = torch.tensor([0.1, 3.0]).double()
        save_posterior(path, self.factors, precision, "zero", description={"layers": "experts"}, fit="f1")

    def read(self, path):
        return load_posterior(path)


class Snapshot:
    name = "epoch-0001.safetensors"

    def write(self, path):
        save_snapshot(path, dict(toy_model(seed=3).named_parameters()), fit="f1")

    def read(self, path):
        model, info = toy_model(), snapshot_info(path)
        apply_snapshot(model, path)
        return {"info": info, "weights": {name: parameter.detach() for name, parameter in model.named_parameters()}}


class Sums:
    def __init__(self):
        self.sums = {"slots": torch.arange(5.0).double(), "inputs.gram": torch.randn(3, 4)}

    def state(self):
        return self.sums


class Checkpoint:
    """Written by rank zero of one."""

    name = "curvature.safetensors"

    def __init__(self):
        self.sums = [Sums(), Sums()]

    def write(self, path):
        checkpoint = PassCheckpoint(path, 1, "weights", OPTIONS, distributed=False)
        batches = [{"x": torch.ones(2)}, {"x": torch.zeros(2)}]
        assert len(list(checkpoint.remaining(batches))) == (0 if checkpoint.resumed else 2)
        checkpoint.batch_done(self.sums, torch.Generator(), 4, checked=True)

    def read(self, path):
        return read_checkpoint(path, "weights", OPTIONS)


class Tensors:
    """The layer beneath, with every kind of tensor."""

    name = "tensors.safetensors"

    def write(self, path):
        tensors = {"a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), "none": torch.empty(2, 5, 0)}
        tensors |= {"b": torch.arange(9), "é": torch.tensor(True), "half": torch.ones(7).bfloat16()}
        write_tensor_file(path, tensors, description={"x": [1.5, None, "é"]}, fit="f1", **TENSORS)

    def read(self, path):
        return read_tensor_file(path, **TENSORS)


class Index:
    """A description without tensors."""

    name = "index.json"

    def write(self, path):
        write_json_file(path, description={"x": [1.5, None, "é"], "y": {"z": 1}}, fit="f1", **INDEX)

    def read(self, path):
        return read_json_file(path, **INDEX)


@pytest.mark.parametrize("kind", [Posterior, Snapshot, Checkpoint, Tensors, Index])
def test_contract(kind, tmp_path):
    sample = kind()
    check_file_format(sample.write, sample.read, tmp_path, name=sample.name)


@pytest.mark.parametrize("kind", [Posterior, Snapshot, Checkpoint, Tensors, Index])
def test_a_permission_error_is_no_missing_file(kind, tmp_path, monkeypatch):
    """Root may read everything, so it is made up here."""
    sample = kind()
    path = tmp_path / sample.name
    sample.write(path)

    def forbidden(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(PermissionError, match=sample.name):
        sample.read(path)


class TestTheContractItself:
    """Formats that break the contract are found out."""

    def check(self, tmp_path, write, read, message, name="a.json"):
        with pytest.raises(AssertionError, match=message):
            check_file_format(write, read, tmp_path, name=name)

    def test_no_folder(self, tmp_path):
        self.check(tmp_path, lambda path: None, Index().read, "must create the folder")

    def test_something_else_beside_it(self, tmp_path):
        def write(path):
            Index().write(path)
            (path.parent / "more").touch()

        self.check(tmp_path, write, Index().read, "must leave nothing but the file")

    def test_permissions(self, tmp_path):
        def write(path):
            Index().write(path)
            path.chmod(0o600)

        self.check(tmp_path, write, Index().read, "permissions of the umask")

    def test_not_atomic(self, tmp_path):
        def write(path):
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}")

        self.check(tmp_path, write, lambda path: path.read_text(), "must call os.fsync")

    def test_leftovers(self, tmp_path, monkeypatch):
        monkeypatch.setattr("bmoe_lightning.utils.atomic_io.remove_leftovers", lambda path: None)
        self.check(tmp_path, Index().write, Index().read, "killed writer left behind")

    def test_a_missing_file_with_another_error(self, tmp_path):
        def read(path):
            if not path.is_file():
                raise ValueError(f"no {path}")
            return Index().read(path)

        self.check(tmp_path, Index().write, read, "a missing file must raise FileNotFoundError")

    def test_unreadable_called_missing(self, tmp_path):
        def read(path):
            if not path.is_dir() and not path.is_file():
                raise FileNotFoundError(str(path))
            return Index().read(path)

        self.check(tmp_path, Index().write, read, "must not be called missing")

    def test_truncation(self, tmp_path):
        def read(path):
            return Index().read(path) if path.stat().st_size > 50 else None

        self.check(tmp_path, Index().write, read, r"truncated to 0% must raise ValueError, and was read")

    def test_a_message_without_the_path(self, tmp_path):
        def read(path):
            try:
                return Index().read(path)
            except ValueError as error:
                raise ValueError("damaged") from error

        self.check(tmp_path, Index().write, read, "must name the path")

    def test_another_format_and_version(self, tmp_path):
        def read(key):
            def unchecked(path):
                with suppress(ValueError):
                    header = json.loads(path.read_bytes())
                    if isinstance(header, dict) and header.get("sha256") == seal(header)[1]:
                        path.write_text(seal({**header, key: INDEX[key]})[0])
                return Index().read(path)

            return unchecked

        self.check(tmp_path / "1", Index().write, read("format"), "a file of another format must raise")
        self.check(tmp_path / "2", Index().write, read("version"), "a file of a newer version must raise")

    def test_unknown_keys(self, tmp_path):
        def read(path):
            found = Index().read(path)
            if "added_later" in found.description:
                raise KeyError("added_later")
            return found

        with pytest.raises(KeyError, match="added_later"):
            check_file_format(Index().write, read, tmp_path, name="a.json")

    @pytest.mark.parametrize("kind", [Tensors, Index])
    def test_damage(self, kind, tmp_path, monkeypatch):
        """Without digests, that is."""
        monkeypatch.setattr("bmoe_lightning.utils.file_header._digest", lambda fields: "0" * 64)
        if kind is Tensors:
            monkeypatch.setattr("bmoe_lightning.utils.safetensors_io.tensor_digest", lambda name, tensor: "0" * 64)
        message = "changed under the old digest|must not go unnoticed"
        self.check(tmp_path, kind().write, kind().read, message, name=kind.name)

    def test_payload_damage(self, tmp_path, monkeypatch):
        monkeypatch.setattr("bmoe_lightning.utils.safetensors_io.tensor_digest", lambda name, tensor: "0" * 64)
        self.check(tmp_path, Tensors().write, Tensors().read, "must not go unnoticed", name=Tensors.name)

    def test_another_error_for_damage(self, tmp_path):
        def read(path):
            try:
                return Index().read(path)
            except ValueError as error:
                if "JSON" in str(error) and path.stat().st_size == size[0]:
                    raise KeyError("x") from error
                raise

        Index().write(tmp_path / "size.json")
        size = [(tmp_path / "size.json").stat().st_size]
        (tmp_path / "size.json").unlink()
        self.check(tmp_path, Index().write, read, "must be a ValueError, and is KeyError")
