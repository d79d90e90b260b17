"""Tensors with a description on disk; what holds of all files is in `test_file_contract.py`."""

from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bmoe_lightning.utils import safetensors_io
from bmoe_lightning.utils.file_contract import with_header
from bmoe_lightning.utils.safetensors_io import (
    file_origin,
    has_content,
    opened_tensor_file,
    read_tensor_file,
    remove_tensor_file,
    seal_tensors,
    tensor_digest,
    write_tensor_file,
)

KIND = {"format": "sample", "version": 1}


def write(path, tensors, description=None, fit=""):
    return write_tensor_file(path, tensors, description=description or {}, fit=fit, **KIND)


def test_views_and_graphs_are_written(tmp_path):
    base = torch.arange(6.0, requires_grad=True)
    write(tmp_path / "x", {"a": base.view(2, 3).T, "b": base[:2], "c": base[5].expand(1)}, {"k": ("v", 1)}, "f")
    found = read_tensor_file(tmp_path / "x", **KIND)
    assert torch.equal(found.tensors["a"], base.detach().view(2, 3).T)
    assert torch.equal(found.tensors["b"], base.detach()[:2])
    assert found.tensors["c"].tolist() == [5.0]
    assert found.description == {"k": ["v", 1]}
    assert found.fit == "f"


def test_plain_safetensors_readers_read_it(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.randn(2, 3, 4).mT.double()}
    write(tmp_path / "x", tensors)
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_is_read_can_be_changed_and_is_aligned(tmp_path):
    write(tmp_path / "x", {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5)}, {"k": "an odd size"})
    tensors = read_tensor_file(tmp_path / "x", **KIND).tensors
    assert tensors["b"].data_ptr() % 64 == 0
    tensors["b"] += 1
    assert torch.equal(read_tensor_file(tmp_path / "x", **KIND).tensors["b"], torch.ones(5))


class TestDigest:
    def test_is_that_of_the_header_and_no_other(self, tmp_path):
        tensors = {"a": torch.ones(2)}
        digest = write(tmp_path / "x", tensors, {"k": 1}, "f")
        assert write(tmp_path / "y", {"a": torch.ones(2)}, {"k": 1}, "f") == digest
        assert read_tensor_file(tmp_path / "x", **KIND).digest == digest
        with opened_tensor_file(tmp_path / "x", **KIND) as file:
            assert file.digest == digest
        others = [
            write(tmp_path / "z", {"a": torch.zeros(2)}, {"k": 1}, "f"),
            write(tmp_path / "z", {"b": torch.ones(2)}, {"k": 1}, "f"),
            write(tmp_path / "z", tensors, {"k": 2}, "f"),
            write(tmp_path / "z", tensors, {"k": 1}, "g"),
        ]
        assert len({digest, *others}) == 5

    def test_of_tensors(self):
        tensors = [
            ("a", torch.zeros(4)),
            ("b", torch.zeros(4)),
            ("a", torch.zeros(2, 2)),
            ("a", torch.zeros(4, dtype=torch.int32)),
            ("a", torch.zeros(8, dtype=torch.bfloat16)),
            ("a", torch.tensor([0, 0, 0, 1.0])),
        ]
        assert len({tensor_digest(*tensor) for tensor in tensors}) == len(tensors)
        x = torch.arange(12.0).view(3, 4)
        assert tensor_digest("a", x.T.contiguous().T) == tensor_digest("a", x)

    def test_each_tensor_is_verified_when_it_is_read(self, tmp_path):
        path = tmp_path / "x"
        write(path, {"a": torch.ones(4), "b": torch.ones(4)})
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with opened_tensor_file(path, **KIND) as file:
            assert torch.equal(file.read("a"), torch.ones(4))
            for _ in range(2):
                with pytest.raises(ValueError, match=r"the tensor 'b' does not match its SHA-256 digest\. If it was"):
                    file.read("b")

    def test_a_tensor_that_the_header_does_not_list_is_damage(self, tmp_path):
        path = tmp_path / "x"
        write(path, {"a": torch.ones(4)})
        with opened_tensor_file(path, **KIND) as file:
            metadata = file._file.metadata()
        save_file({"a": torch.ones(4), "b": torch.ones(4)}, path, metadata)
        with pytest.raises(ValueError, match="not those that its header lists"):
            read_tensor_file(path, **KIND)


def test_a_read_error_is_no_damage(tmp_path, monkeypatch):
    write(tmp_path / "x", {"a": torch.ones(4)})

    class Failing:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            raise SafetensorError("I/O error")

    with opened_tensor_file(tmp_path / "x", **KIND) as file:
        file._file = Failing(file._file)
        with pytest.raises(OSError, match=r"could not read the tensor 'a' from .*x: I/O error"):
            file.read("a")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: disk full")])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "x"
    write(path, {"a": torch.ones(1)})
    old = path.read_bytes()

    def fail(tensors, filename, metadata):
        with open(filename, "wb") as file:  # noqa: PTH123
            file.write(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "save_file", fail)
        with pytest.raises(OSError, match=r"No space left|could not write .*x: .*is unchanged"):
            write(path, {"a": torch.zeros(1)})
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    write(path, {"a": torch.zeros(1)})
    assert read_tensor_file(path, **KIND).tensors["a"] == 0


class TestRemove:
    def test_only_the_named_format(self, tmp_path):
        write(tmp_path / "x", {"a": torch.ones(1)})
        assert file_origin(tmp_path / "x").format == "sample"
        assert not remove_tensor_file(tmp_path / "x", format="other")
        assert (tmp_path / "x").exists()
        assert remove_tensor_file(tmp_path / "x", format="sample")
        assert not (tmp_path / "x").exists()

    def test_only_the_named_fit(self, tmp_path):
        digest = write_tensor_file(tmp_path / "x", {"a": torch.ones(1)}, description={}, fit="one", **KIND)
        origin = file_origin(tmp_path / "x")
        assert (origin.format, origin.fit, origin.digest) == ("sample", "one", digest)
        assert not remove_tensor_file(tmp_path / "x", format="sample", fit="two")
        assert remove_tensor_file(tmp_path / "x", format="sample", fit="one")

    def test_ours_in_another_version_or_with_a_damaged_payload(self, tmp_path):
        path = tmp_path / "x"
        write(path, {"a": torch.ones(100)})
        whole = path.read_bytes()
        header = {"format": "sample", "version": 7}
        for content in (whole[:-10], with_header(whole, header)):
            path.write_bytes(content)
            assert remove_tensor_file(path, format="sample")

    def test_nothing_of_others(self, tmp_path):
        path = tmp_path / "x"
        write(path, {"a": torch.ones(1)})
        whole = path.read_bytes()
        save_file({"a": torch.ones(1)}, path, {"format": "sample"})
        contents = [
            path.read_bytes(),
            b"",
            b"sample",
            b"\xff" * 20,
            whole[:30],
            b"{}",
            whole.replace(b"sample", b"simple"),
        ]
        for content in contents:
            path.write_bytes(content)
            assert not remove_tensor_file(path, format="sample")
            assert path.read_bytes() == content
        assert not remove_tensor_file(tmp_path / "missing", format="sample")
        assert not remove_tensor_file(tmp_path, format="sample")
        assert tmp_path.is_dir()


def test_content_is_known_before_and_after_it_is_written(tmp_path):
    tensors, path = {"a": torch.arange(40.0).reshape(4, 10).T}, tmp_path / "x"
    sealed = seal_tensors(tensors, description={"b": [1]}, fit="one", **KIND)
    assert not has_content(path, sealed.digest, **KIND)
    assert write_tensor_file(path, tensors, description={"b": [1]}, fit="one", **KIND) == sealed.digest
    assert has_content(path, sealed.digest, **KIND)
    assert not has_content(path, seal_tensors(tensors, description={}, fit="two", **KIND).digest, **KIND)
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    assert not has_content(path, sealed.digest, **KIND)
