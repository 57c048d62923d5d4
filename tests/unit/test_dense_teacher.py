import pytest
import safetensors.torch
import torch

import otkd
from otkd.teachers import DenseTeacher, StoredTeacher, teacher_logits_of
from tests.problems import logits

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path, dtype):
    stored = DenseTeacher(logits(1, 4, 3, 5, dtype=dtype).requires_grad_())
    path = tmp_path / "new" / "teacher.safetensors"
    stored.save(path)
    loaded = DenseTeacher.load(str(path))
    assert torch.equal(loaded.logits(), stored.values)
    assert loaded.values.dtype == dtype
    assert not loaded.values.requires_grad
    DenseTeacher(stored.values.mT[1:]).save(path)  # not contiguous, over an older file
    assert torch.equal(DenseTeacher.load(path).values, stored.values.mT[1:])
    assert [file.name for file in path.parent.iterdir()] == ["teacher.safetensors"]


def test_a_save_that_fails_leaves_the_older_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "teacher.safetensors"
    first = DenseTeacher(torch.ones(2, 3))
    first.save(path)

    def half_written(tensors, filename, *arguments, **options):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", half_written)
        with pytest.raises(OSError, match="no space left"):
            DenseTeacher(torch.zeros(2, 3)).save(path)
    assert torch.equal(DenseTeacher.load(path).values, first.values)
    assert [file.name for file in tmp_path.iterdir()] == ["teacher.safetensors"]


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        DenseTeacher.load(tmp_path / "absent.safetensors")
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(2, 3)}, other)
    with pytest.raises(ValueError, match=r"other.safetensors holds \['weight'\], but no tensor"):
        DenseTeacher.load(other)
    safetensors.torch.save_file({"logits": torch.ones(2, 3, dtype=torch.int32)}, other)
    with pytest.raises(ValueError, match="floating-point logits"):
        DenseTeacher.load(other)
    for content in (b"", b"not a table of logits"):
        other.write_bytes(content)
        with pytest.raises(ValueError, match=r"other.safetensors .*safetensors file"):
            DenseTeacher.load(other)


def test_indexing():
    values = logits(1, 6, 3, 5)
    stored = DenseTeacher(values)
    assert len(stored) == 6
    for index in (2, slice(1, 4), torch.tensor([5, 0, 0]), torch.arange(6) % 2 == 0, [1, 3]):
        part = stored[index]
        assert isinstance(part, DenseTeacher)
        assert torch.equal(part.logits(), values[index])
    with pytest.raises(IndexError):
        stored[6]
    assert stored.to("cpu") is stored
    assert stored.to(torch.device("meta")).values.device.type == "meta"
    with pytest.raises(AttributeError):
        stored.values = values


@pytest.mark.parametrize("values", [torch.ones(2, 3, dtype=torch.int64), torch.tensor(1.0)])
def test_refused_values(values):
    with pytest.raises(ValueError, match="floating-point logits with the vocabulary last"):
        DenseTeacher(values)


class Recomputed:
    """A stored teacher of another kind: logits that are made when they are asked for."""

    def __init__(self, seeds, device="cpu"):
        self.seeds, self.device = seeds, device

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, index):
        return Recomputed(self.seeds[index], self.device)

    def to(self, device):
        return Recomputed(self.seeds, device)

    def logits(self):
        rows = [logits(seed, 3, 5) for seed in self.seeds]
        return torch.stack(rows).to(self.device).requires_grad_()


def test_any_object_of_the_protocol_is_a_teacher():
    stored = Recomputed([4, 5, 6, 7])
    assert isinstance(stored, StoredTeacher)
    assert isinstance(DenseTeacher(torch.ones(2, 3)), StoredTeacher)
    student = logits(1, 2, 3, 5).requires_grad_()
    for name in ("kl", "batch_sinkhorn", "uld"):
        value = otkd.get_loss(name)(student, stored[1:3])
        expected = otkd.get_loss(name)(student, torch.stack([logits(s, 3, 5) for s in (5, 6)]))
        torch.testing.assert_close(value, expected)
    assert not teacher_logits_of(stored, torch.device("cpu")).requires_grad


def test_teacher_logits():
    device = torch.device("cpu")
    tensor = torch.ones(2, 3, requires_grad=True)
    assert not teacher_logits_of(tensor, device).requires_grad
    assert teacher_logits_of(DenseTeacher(tensor), torch.device("meta")).device.type == "meta"
    for wrong in ([[1.0, 2.0]], "teacher.safetensors", 3, {"logits": tensor}, None):
        assert not isinstance(wrong, StoredTeacher)
        with pytest.raises(TypeError, match=f"got {type(wrong).__name__}"):
            teacher_logits_of(wrong, device)
