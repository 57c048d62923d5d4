"""Names of the previous release still work, and say what replaces them."""

import subprocess
import sys

import pytest
import torch

import otkd

OLD = {
    "DenseSignal": otkd.DenseTeacher,
    "TeacherSignal": otkd.StoredTeacher,
    "TopKSignal": otkd.TopKTeacher,
}


@pytest.mark.parametrize("name", OLD)
def test_old_classes_are_the_new_ones(name):
    with pytest.warns(DeprecationWarning, match=OLD[name].__name__):
        assert getattr(otkd, name) is OLD[name]


def test_the_old_module_finds_the_new_one():
    code = "from otkd.signals import DenseSignal, TopKSignal; print(DenseSignal, TopKSignal)"
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"otkd.teachers" in done.stderr
    assert b"DenseTeacher" in done.stdout


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = otkd.Nonsense


def test_old_methods_do_what_the_new_ones_do():
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    with pytest.warns(DeprecationWarning, match="from_logits"):
        teacher = otkd.TopKTeacher.of(logits, 3)
    assert torch.equal(teacher.tokens, otkd.TopKTeacher.from_logits(logits, 3).tokens)
    loss = otkd.SinkhornLoss("discrete", support=otkd.supports.TopK(3))
    with pytest.warns(DeprecationWarning, match=r"loss\.with_self_term"):
        old = teacher.with_self_term(loss)
    assert torch.equal(old.self_potential, loss.with_self_term(teacher).self_potential)
