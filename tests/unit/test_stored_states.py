"""The stored teacher of texts that differ in length."""

from __future__ import annotations

import pytest
import torch

from otkd.study.states import StoredStates

LENGTHS = (3, 1, 4, 2)


@pytest.fixture
def stored():
    texts = [torch.full((length, 2), float(number)) for number, length in enumerate(LENGTHS)]
    return StoredStates.of(texts, torch.eye(3, 2), torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize(
    ("index", "texts"),
    [
        (slice(None), [0, 1, 2, 3]),
        (slice(1, 3), [1, 2]),
        (torch.tensor([2, 0, 2]), [2, 0, 2]),
        (torch.tensor([-1]), [3]),
        (torch.tensor([False, True, False, True]), [1, 3]),
    ],
)
def test_some_texts_are_those_of_the_index(stored, index, texts):
    chosen = stored[index]
    assert chosen.lengths.tolist() == [LENGTHS[text] for text in texts]
    logits = chosen.logits()
    assert logits.shape == (len(texts), max(LENGTHS[text] for text in texts), 3)
    for row, text in zip(logits, texts, strict=True):
        expected = torch.tensor([text, text + 0.5, 1.0]).expand(LENGTHS[text], -1)
        assert torch.equal(row[: LENGTHS[text]], expected)


def test_a_single_text_has_no_padding(stored):
    assert stored[2].shape == stored[-2].shape == (4, 3)
    assert torch.equal(stored[-2].states, torch.full((4, 2), 2.0))
    with pytest.raises(IndexError):
        stored[4]


def test_a_file_holds_everything_and_is_checked(stored, tmp_path):
    stored.save(tmp_path / "states.safetensors")
    again = StoredStates.load(tmp_path / "states.safetensors")
    assert torch.equal(again.logits(), stored.logits())
    content = bytearray((tmp_path / "states.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "states.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"states\.safetensors"):
        StoredStates.load(tmp_path / "states.safetensors")


def test_a_training_on_all_rows_copies_no_states(stored):
    from otkd.study.interface import Rows
    from otkd.study.teachers import Teacher

    teacher = Teacher(None, stored, stored, torch.eye(3, 2))  # pyright: ignore
    assert teacher.on(Rows(None, {}), features=False) is stored  # pyright: ignore
    some = teacher.on(Rows(None, {}, index=[3, 0]), features=False)  # pyright: ignore
    assert len(some) == 2
