"""Files on file systems that lack something: done without, said once; and what fails leaves all as it was."""

import errno
import os
import stat
import warnings

import filelock
import pytest

from src import files
from src.files import locked, write_whole


@pytest.fixture(autouse=True)
def unsaid():
    files._say_once.cache_clear()


def refuse(monkeypatch, name: str, number: int, folders: bool | None = None) -> None:
    """Let a function of `os` fail; of fsync, for folders or for files only."""
    real = getattr(os, name)

    def refused(target, *arguments, **options):
        if folders is None or stat.S_ISDIR(os.fstat(target).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        return real(target, *arguments, **options)

    monkeypatch.setattr(os, name, refused)


@pytest.mark.parametrize(("name", "number", "folders", "said"), [
    ("fsync", errno.EINVAL, True, "does not confirm that a new name is on disk"),
    ("fsync", errno.EIO, True, "does not confirm that a new name is on disk"),  # the file is in place: no error is true
    ("fsync", errno.ENOSYS, False, "does not confirm that files are on disk"),
    ("chmod", errno.EPERM, None, "takes no file modes"), ("chmod", errno.ENOTSUP, None, "takes no file modes")])
def test_what_a_file_system_lacks_is_done_without(name, number, folders, said, tmp_path, monkeypatch):
    refuse(monkeypatch, name, number, folders)
    with pytest.warns(UserWarning, match=said):
        write_whole(tmp_path / "a", b"1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        write_whole(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"2"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("name", "number", "folders"), [
    ("fsync", errno.EIO, False), ("fsync", errno.ENOSPC, False), ("replace", errno.EACCES, None)])
def test_an_error_leaves_what_was_there(name, number, folders, tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"1")
    refuse(monkeypatch, name, number, folders)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_whole(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [NotImplementedError("no flock here"), OSError(errno.ENOLCK, "No locks available"),
                                   OSError(errno.EOPNOTSUPP, "Operation not supported")])
def test_without_locks_the_work_is_done_all_the_same(error, tmp_path, monkeypatch):
    monkeypatch.setattr(filelock.FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.warns(UserWarning, match="takes no locks; see that no two processes"), locked(tmp_path / "a"):
        write_whole(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(filelock.FileLock, "acquire",
                        lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(OSError, match="Read-only"), locked(tmp_path / "a"):
        pass
