"""What the command does to folders and processes: its own and those of others."""

# ruff: noqa: F811 (fixtures are imported by the names by which tests ask for them)

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import filelock
import pytest
from filelock import FileLock

from otkd.files import sentence, written_whole
from otkd.study.locks import LOCK, locked
from otkd.study.messages import StudyError
from otkd.study.ownership import MARKER, Claim, check_own, mark, remove
from otkd.study.protocols import load_protocol
from otkd.study.results import read_result
from otkd.study.work import claim
from tests.studies.test_cli import (  # noqa: F401
    SMALL,
    arguments,
    glue,
    one_process,
    otkd_command,
    said,
    start_command,
    teacher,
)
from tests.studies.test_protocols import children_of

CORES = os.cpu_count()


def tree(root):
    """Every path below a folder, with what is in the files and where the links lead."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def refused(*command):
    """What a command says that ends with a sentence and status 1."""
    result = otkd_command(*command)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return said(result)


# What is another's --------------------------------------------------------------------------------


def write(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    write(target / "notes.txt")
    path.symlink_to(target)


TRAIN = ["train", "rte", "--loss", "kl"]
COMPARE = ["compare", "rte", "--losses", "kl", "--seeds", 1]


@pytest.mark.parametrize(
    ("command", "place", "put"),
    [
        (TRAIN, "student", lambda path: write(path / "notes.txt")),
        (TRAIN, "student", lambda path: write(path / "config.json", "{}")),
        (TRAIN, "student", lambda path: link(path, path.parent.parent / "elsewhere")),
        (TRAIN, "student", write),
        (TRAIN, "student.work", lambda path: write(path / "notes.txt")),
        (TRAIN, "student.work", lambda path: write(path / "checkpoint-5" / "model.safetensors")),
        (TRAIN, "student.work", lambda path: write(path / "settings.json", '{"theme": "dark"}')),
        (TRAIN, "student.work", lambda path: link(path, path.parent.parent / "elsewhere")),
        (TRAIN, "results.json", write),
        (TRAIN, "results.json", lambda path: write(path, '{"accuracy": 1}')),
        (TRAIN, "results.json", lambda path: write(path / "notes.txt")),
        (TRAIN, "results.json", lambda path: path.symlink_to("nothing")),
        (TRAIN, "precision.json", write),
        (TRAIN, "teacher", write),
        (TRAIN, "teacher", lambda path: link(path, path.parent.parent / "elsewhere")),
        (TRAIN, "teacher/model", lambda path: write(path / "model.safetensors")),
        (TRAIN, "teacher/result.partial", lambda path: write(path / "notes.txt")),
        (TRAIN, "teacher/train-logits.safetensors", write),
        (COMPARE, "rte/teacher/model", lambda path: write(path / "notes.txt")),
        (COMPARE, "rte/summary.json", lambda path: write(path, '{"task": "shopping"}')),
        (COMPARE, "rte/comparison.png", write),
        (COMPARE, "rte/kl/0.json", write),
        (COMPARE, "rte/kl/0.json", lambda path: write(path / "notes.txt")),
        (COMPARE, "rte/kl/0.partial", lambda path: write(path / "notes.txt")),
        (COMPARE, "rte/kl", write),
        (COMPARE, "rte/kl", lambda path: link(path, path.parent.parent / "elsewhere")),
        (COMPARE, "rte", write),
    ],
)
def test_what_the_command_did_not_write_is_refused_and_left(
    arguments, tmp_path, command, place, put
):
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    put(path)
    before = tree(tmp_path)
    for more in ([], ["--overwrite"]):
        assert path.name in refused(*command, *arguments, *more)
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def trained(teacher, glue, tmp_path_factory):
    """A student trained by the command, to be copied."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    result = otkd_command(
        *(*TRAIN, "--output-dir", folder, "--data-dir", glue, "--teacher", teacher, *SMALL)
    )
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def out(trained, tmp_path):
    """A folder that the command wrote, here to be used in another test's way."""
    shutil.copytree(trained, tmp_path / "out", symlinks=True)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("--student", "student"),
        ("--teacher", "student"),
        ("--teacher", "teacher/model"),
        ("--student", "../link"),
        ("--data-dir", "."),
        ("--data-dir", "data"),
        ("--data-dir", "student"),
    ],
)
def test_inputs_in_the_folder_of_results_are_refused(out, arguments, glue, tmp_path, option, place):
    (tmp_path / "link").symlink_to(out / "student")
    shutil.copytree(glue / "RTE", out / "RTE")
    shutil.copytree(glue, out / "data")
    shutil.copytree(glue / "RTE", out / "student" / "RTE")
    before = tree(tmp_path)
    message = refused(*TRAIN, *arguments, "--overwrite", "--epochs", 1, option, out / place)
    assert option in message
    assert str(out) in message
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["", "distilled", "a/b"])
def test_a_models_folder_is_no_place_for_results(arguments, teacher, tmp_path, place):
    model = shutil.copytree(teacher, tmp_path / "model")
    before = tree(model)
    folder = model / place
    for option in ("--teacher", "--student"):
        assert option in refused(*TRAIN, *arguments, option, model, "--output-dir", folder)
    for path in sorted(model.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    assert tree(model) == before


@pytest.fixture
def no_waiting():
    """Raise where a test waits, as for a pipe that nobody writes to."""

    def raise_timeout(number, frame):
        raise TimeoutError("the test waits")

    before = signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.usefixtures("no_waiting")
def test_what_is_no_file_is_neither_read_nor_taken_for_our_own(tmp_path, make):
    write(tmp_path / "comparison.png")
    make(tmp_path / "others.json")
    make(tmp_path / MARKER)
    with pytest.raises(StudyError, match=r"comparison.png was not written by otkd"):
        Claim(tmp_path, [tmp_path / "comparison.png"], []).check()
    work = tmp_path / "student.work"
    work.mkdir()
    make(work / "settings.json")
    with pytest.raises(StudyError, match=r"student.work holds settings.json"):
        check_own(work)
    make(work / MARKER)
    with pytest.raises(StudyError, match=r"student.work holds .otkd.json, settings.json"):
        check_own(work)


def test_own_folders_are_replaced_and_nothing_beside_them(out, arguments):
    for place in ("notes.txt", "teacher/notes.txt", "mine/student/notes.txt"):
        write(out / place)
    result = otkd_command(*TRAIN, *arguments, "--epochs", 1, "--overwrite")
    assert result.exit_code == 0, result.output
    assert read_result(out / "results.json").settings["epochs"] == 1
    for place in ("notes.txt", "teacher/notes.txt", "mine/student/notes.txt"):
        assert (out / place).read_text() == "mine"
    assert not (out / "student.work").exists()
    # A file that is put among its own makes the folder another's.
    write(out / "student" / "README.md")
    before = tree(out)
    message = refused(*TRAIN, *arguments, "--overwrite")
    assert "README.md, not written by otkd" in message
    assert tree(out) == before


def test_results_of_commands_without_markers_are_known(out, arguments):
    for path in list(out.rglob(".otkd*")):
        path.unlink()
    # The student's folder could be anyone's, the results could not.
    assert "student holds" in refused(*TRAIN, *arguments)
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "teacher" / "model")
    result = otkd_command(*TRAIN, *arguments)
    assert result.exit_code == 0, result.output


def test_a_removal_that_was_stopped_can_be_finished(tmp_path):
    folder = tmp_path / "model"
    write(folder / "weights" / "a")
    write(folder / "config.json")
    with pytest.raises(StudyError, match=r"config.json, weights, not written by otkd"):
        check_own(folder)
    mark(folder, ["weights", "config.json"])
    (folder / "config.json").unlink()
    check_own(folder)
    (tmp_path / "target").mkdir()
    write(tmp_path / "target" / "kept")
    (folder / "weights" / "link").symlink_to(tmp_path / "target")
    remove(folder)
    assert tree(tmp_path) == {"target": None, "target/kept": b"mine"}
    # What came later stays, and so does the folder.
    mark(folder, ["weights"])
    write(folder / "weights" / "a")
    write(folder / "notes.txt")
    remove(folder)
    assert sorted(tree(folder)) == [MARKER, "notes.txt"]
    write(folder / MARKER, "damaged")
    with pytest.raises(StudyError, match="not written by otkd"):
        check_own(folder)


def test_left_over_work_of_finished_runs_is_removed(out, arguments):
    for work in (out / "student.work", out / "teacher" / "result.partial"):
        write(claim(work, {"epochs": 2}) / "checkpoint-5" / "model.safetensors")
    write(out / ".otkd-0123456789abcdef.partial")
    write(out / "teacher" / ".otkd-model.partial" / "model.safetensors")
    result = otkd_command(*TRAIN, *arguments)
    assert result.exit_code == 0, result.output
    assert "kept: 1 of 1" in said(result)
    assert not [path for path in out.rglob("*") if path.suffix in (".work", ".partial")]


# One command a folder -----------------------------------------------------------------------------


def test_a_second_command_in_a_folder_is_refused(out, arguments):
    with locked(out):
        before = tree(out)
        message = refused(*TRAIN, *arguments)
        assert f"{out} is in use by another otkd command (process {os.getpid()} on" in message
        assert tree(out) == before
        # Other folders are free, such as that of another task in the same place.
        with locked(out / "wnli"):
            pass
    # A lock whose process is gone is none, whatever its file says.
    write(out / LOCK, " (process 1 on nowhere)")
    assert otkd_command(*TRAIN, *arguments).exit_code == 0
    assert (out / LOCK).read_text() == ""


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), NotImplementedError("none")])
def test_where_nothing_can_be_locked_the_command_says_so(tmp_path, monkeypatch, caplog, error):
    caplog.set_level(logging.INFO)

    def acquire(*args, **kwargs):
        raise error

    # No file system without locks can be had here, so the library meets one.
    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with locked(tmp_path):
        pass
    assert "cannot lock files" in caplog.text


def until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def workers_of(process):
    """The processes that a command started to train in."""
    found = []
    for path in children_of(os.getpgid(process.pid)):
        pid = int(path.parent.name)
        words = (path.parent / "cmdline").read_bytes()
        if pid != process.pid and b"spawn_main" in words:
            found.append(pid)
    return found


@pytest.mark.skipif(CORES == 1, reason="needs two cores")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a list of processes")
def test_killed_workers_and_killed_parents(teacher, glue, tmp_path):
    command = ["compare", "rte", "--losses", "ce", "--seeds", 2, "--workers", 2, *SMALL]
    command += ["--teacher", teacher, "--data-dir", glue, "--output-dir", tmp_path]
    command += ["--epochs", 6]
    folder = tmp_path / "rte"
    process = start_command(*command, start_new_session=True)
    try:
        until(lambda: len(workers_of(process)) == 2 or process.poll() is not None)
        # Meanwhile the folder is its own.
        message = refused(*command, "--workers", 1)
        assert f"in use by another otkd command (process {process.pid} on" in message
        # A worker that the system kills for want of memory ends like this.
        os.kill(workers_of(process)[0], signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
    finally:
        end(process)
    assert process.returncode == 1, output
    assert "A worker process was killed (SIGKILL)" in " ".join(output.split())
    assert "Traceback" not in output

    process = start_command(*command, start_new_session=True)
    try:
        until(lambda: list(folder.glob("ce/*.partial/checkpoint-*")) or process.poll() is not None)
        assert process.poll() is None
        assert len(workers_of(process)) == 2
        process.kill()
        process.wait()
        until(lambda: not children_of(process.pid), seconds=30)
    finally:
        end(process)
    result = otkd_command(*command, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert len(list(folder.glob("ce/[0-9].json"))) == 2
    assert not [path for path in folder.rglob("*") if path.suffix == ".partial"]


def end(process):
    """Nothing of a command goes on, whatever a test found."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()


def test_a_request_to_end_is_answered_like_ctrl_c(arguments, tmp_path):
    begun = threading.Event()

    def ask():
        until(lambda: list((tmp_path / "out").rglob("checkpoint-*")))
        begun.set()
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        result = otkd_command(*COMPARE, *arguments, "--epochs", 500)
    finally:
        thread.join()
    assert begun.is_set()
    assert result.exit_code == 143, result.output
    assert "Ended by SIGTERM: finished runs are kept in" in said(result)
    assert "the same command continues" in said(result)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with FileLock(tmp_path / "out" / "rte" / LOCK, timeout=0):
        pass


# What the system refuses --------------------------------------------------------------------------


def test_a_limit_of_a_files_size_is_named_and_nothing_is_lost(arguments, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        message = refused(*TRAIN, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    place = tmp_path / "out" / "teacher" / "result.partial"
    assert f"{place}: File too large. Raise the limit" in message
    assert "the command again" in message
    result = otkd_command(*TRAIN, *arguments)
    assert result.exit_code == 0, result.output


@pytest.fixture
def small_disk():
    # Not among pytest's own folders, which it could not remove if this one stayed.
    folder = Path(tempfile.mkdtemp(prefix="otkd-disk-"))
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        yield folder
        subprocess.run(["umount", "-l", folder], check=True)
    finally:
        folder.rmdir()


def test_a_full_disk_is_named_and_what_is_done_stays(small_disk, teacher, glue):
    command = ["compare", "rte", "--teacher", teacher, "--data-dir", glue, "--seeds", 1, *SMALL]
    command += ["--output-dir", small_disk, "--losses"]
    assert otkd_command(*command, "ce").exit_code == 0
    done = small_disk / "rte" / "ce" / "0.json"
    before = done.read_bytes()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))
    message = refused(*command, "ce,kl")
    assert (
        f"{small_disk / 'rte' / 'kl' / '0.partial'}: No space left on device. Free some" in message
    )
    filler.unlink()
    result = otkd_command(*command, "ce,kl")
    assert result.exit_code == 0, result.output
    assert "kept: 1 of 2" in said(result)
    assert done.read_bytes() == before


def test_what_the_system_does_not_permit_is_named(arguments, tmp_path):
    folder = tmp_path / "out" / "rte" / "kl"
    folder.mkdir(parents=True)
    if (
        shutil.which("chattr") is None
        or subprocess.run(["chattr", "+i", folder], capture_output=True).returncode
    ):  # root is stopped by nothing else
        pytest.skip("files cannot be made immutable here")
    try:
        message = refused(*COMPARE, *arguments)
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    assert f"{folder}" in message
    assert "Check its owner" in message
    assert (tmp_path / "out" / "rte" / "teacher" / "result.json").is_file()
    assert otkd_command(*COMPARE, *arguments).exit_code == 0


@pytest.mark.parametrize(
    ("option", "make", "message"),
    [
        ("--output-dir", lambda path: path.write_text(""), "File exists"),
        ("--output-dir", lambda path: path.symlink_to("nothing"), "File exists"),
        ("--output-dir", lambda path: path.symlink_to(path.name), "File exists"),
        ("--output-dir", lambda path: path.with_name("n" * 300), "File name too long"),
        ("--teacher", lambda path: path.with_name("n" * 300), "n" * 20),
        ("--student", lambda path: path.with_name("n" * 300), "n" * 20),
        ("--data-dir", lambda path: path.with_name("n" * 300), "n" * 20),
        ("--data-dir", lambda path: path.symlink_to(path.name), "place"),
        ("--teacher", lambda path: path.symlink_to(path.name), "place"),
    ],
)
def test_places_that_cannot_be_are_named(arguments, tmp_path, option, make, message):
    path = make(tmp_path / "place") or tmp_path / "place"
    path = path if isinstance(path, Path) else tmp_path / "place"
    assert message in refused(*TRAIN, *arguments, option, path)


def test_every_refusal_of_the_system_has_a_sentence():
    for number in (errno.ENOSPC, errno.EACCES, errno.EISDIR, errno.ELOOP, errno.EDEADLK):
        text = sentence(OSError(number, os.strerror(number), "file", None, "other"))
        assert text.startswith("file → other: ")
        assert text.endswith(".")
    assert sentence(OSError(errno.ENOSPC, "x")).startswith("X. Free some space")
    assert sentence(TimeoutError("slow")) == "Slow."


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / ("n" * 250)
    before = os.umask(0o027)
    try:
        with written_whole(path) as partial:
            partial.write_text("first")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(KeyboardInterrupt), written_whole(path):
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="full") as caught, written_whole(path):
        raise OSError(errno.ENOSPC, "full")  # as writing raises it, without a name
    assert caught.value.filename == str(path)
    assert tree(tmp_path / "folder") == {"n" * 250: b"first"}


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("../../../x", "", " ", ".", "..", "a/b", r"a\\b", r"a\u0000", r"a\n", r"\u200b", "a:b"),
        *("teacher", "Teacher", "tuning", "summary.json", "rte", "a.", "a ", " a", ".a", "-a"),
        *("x" * 101, "é" * 51, "CON", "nul.txt"),
    ],
)
def test_losses_are_called_what_a_folder_can_be(tmp_path, name):
    path = tmp_path / "mine.toml"
    path.write_text(f'[losses."{name}"]\nloss = "kl"\n')
    with pytest.raises(StudyError, match=r"mine.toml: \[losses\..*cannot be the name of"):
        load_protocol(str(path))


def test_no_result_is_written_outside(arguments, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[losses."../../../x"]\nloss = "kl"\n')
    message = refused("compare", "rte", "--protocol", path, *arguments)
    assert "[losses.'../../../x']" in message
    assert tree(tmp_path).keys() == {"mine.toml"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", '[losses.kl]\n[losses."KL"]', "cannot tell it from 'kl'"),
        ("a.toml", '[losses."\\u00e9"]\n[losses."e\\u0301"]', "cannot tell it from"),
        ("teacher.toml", "[losses.kl]", "its name, 'teacher',"),
        ("rte.toml", "[losses.kl]", "its name, 'rte',"),
        (".toml", "[losses.kl]", "its name, '.toml',"),
        ("..toml", "[losses.kl]", r"its name, '\.',"),
        ("a.toml", f"x = {'[' * 9999}{']' * 9999}", "too deeply nested tables or lists"),
        ("a.toml", b"\xff\xfe", "is not UTF-8 text"),
        ("a.toml", "[losses.kl]".encode("utf-16"), "is not UTF-8 text"),
        ("a.toml", "#" * 1_000_001, "has 1,000,001 bytes"),
        (
            "a.toml",
            f"[settings]\nalpha = 1{'0' * 400}\n[losses.kl]",
            "settings.alpha must be",
        ),
        (
            "a.toml",
            f"[settings]\nalpha = 0x1{'0' * 4000}\n[losses.kl]",
            "settings.alpha must be",
        ),
        (
            "a.toml",
            f"[settings]\nepochs = '{'a' * 9999}'\n[losses.kl]",
            "must be a valid integer, got 'aaa.{,30}$",
        ),
    ],
)
def test_protocols_that_cannot_be_read_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StudyError, match=message) as caught:
        load_protocol(str(path))
    assert str(path) in str(caught.value)


def test_protocols_are_files(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "link.toml").symlink_to("link.toml")
    for name, message in (
        ("folder", "it is not a regular file"),
        ("pipe", "not a regular file"),
        ("link", "Too many levels of symbolic links"),
        ("none", "No such file"),
        ("n" * 300, "longer than 100 bytes"),
    ):
        with pytest.raises(StudyError, match=message):
            load_protocol(str(tmp_path / f"{name}.toml"))
    (tmp_path / "a b (ü).toml").write_bytes(b"\xef\xbb\xbf[losses.'kl, T=2']\nloss = 'kl'")
    assert list(load_protocol(str(tmp_path / "a b (ü).toml")).losses) == ["kl, T=2"]
