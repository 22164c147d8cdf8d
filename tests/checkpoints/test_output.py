"""The output folder: complete or not at all, whatever happens, and nothing of others is lost."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dirmerge.checkpoints.output import OutputFolder
from dirmerge.errors import OutputError


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything below a folder: names, contents, modes, times, link targets."""
    result: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        result[str(path.relative_to(folder))] = (content, status.st_mode, status.st_mtime_ns, status.st_ino)
    return result


def existing(out: Path) -> Path:
    (out / "sub").mkdir(parents=True)
    (out / "model.safetensors").write_bytes(b"old weights")
    (out / "sub" / "notes.txt").write_text("mine")
    (out / "dirmerge.json").write_text('{"dirmerge": "0.1.0"}')
    return out


def write_new(out: Path, overwrite: bool = False) -> None:
    with OutputFolder(out, overwrite) as folder:
        (folder.path / "sub").mkdir()
        (folder.path / "sub" / "new.txt").write_text("new")
        folder.commit()


class TestOutputFolder:
    @pytest.mark.parametrize("before", ["missing", "empty", "missing parents"])
    def test_commit(self, tmp_path: Path, before: str) -> None:
        out = tmp_path / "a" / "b" / "out" if before == "missing parents" else tmp_path / "out"
        if before == "empty":
            out.mkdir()
        with OutputFolder(out) as folder:
            (folder.path / "x").write_text("1")
            assert folder.path.parent == out.parent
            assert re.fullmatch(rf"\.out\.dirmerge-staging-{os.getpid()}-[0-9a-f]{{8}}", folder.path.name)
            assert not out.exists() or not any(out.iterdir())
            folder.commit()
        assert [path.name for path in out.iterdir()] == ["x"]
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        umask = os.umask(0)
        os.umask(umask)
        assert out.stat().st_mode & 0o777 == 0o777 & ~umask

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_exception_leaves_nothing(self, tmp_path: Path, error: type[BaseException]) -> None:
        def fail() -> None:
            with OutputFolder(tmp_path / "a" / "b" / "out") as folder:
                (folder.path / "x").write_text("1")
                raise error

        with pytest.raises(error):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_an_interrupt_on_the_way_in_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(fcntl, "flock", interrupt)
        with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path / "a" / "b" / "out"):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_an_interrupt_between_the_two_renames_keeps_the_old_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = existing(tmp_path / "out")
        before = snapshot(tmp_path)
        rename = Path.rename

        def interrupt(path: Path, target: Path) -> Path:
            if "staging" in path.name:
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_new(out, overwrite=True)
        assert snapshot(tmp_path) == before

    def test_exception_keeps_parents_that_were_there(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        with OutputFolder(tmp_path / "a" / "b" / "out"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert list((tmp_path / "a").iterdir()) == []

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_exception_leaves_the_existing_folder_as_it_is(self, tmp_path: Path, overwrite: bool) -> None:
        out = existing(tmp_path / "out")
        before = snapshot(tmp_path)

        def fail() -> None:
            with OutputFolder(out, overwrite) as folder:
                (folder.path / "model.safetensors").write_bytes(b"new")
                raise RuntimeError

        with pytest.raises(RuntimeError if overwrite else OutputError):
            fail()
        assert snapshot(tmp_path) == before

    def test_existing_folder_is_refused_before_any_work(self, tmp_path: Path) -> None:
        existing(tmp_path / "out")
        with pytest.raises(OutputError, match="exists and is not empty"):
            OutputFolder(tmp_path / "out")

    def test_folder_filled_meanwhile(self, tmp_path: Path) -> None:
        with OutputFolder(tmp_path / "out") as folder:
            existing(tmp_path / "out")
            before = snapshot(tmp_path / "out")
            with pytest.raises(OutputError, match="exists and is not empty"):
                folder.commit()
        assert snapshot(tmp_path / "out") == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_overwrite(self, tmp_path: Path) -> None:
        existing(tmp_path / "out")
        write_new(tmp_path / "out", overwrite=True)
        assert {path.name for path in (tmp_path / "out").rglob("*")} == {"sub", "new.txt"}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_link_stays_a_link(self, tmp_path: Path) -> None:
        existing(tmp_path / "disk" / "models")
        (tmp_path / "out").symlink_to("disk/models")
        write_new(tmp_path / "out", overwrite=True)
        assert (tmp_path / "out").is_symlink()
        assert {path.name for path in (tmp_path / "disk" / "models").iterdir()} == {"sub"}

    def test_rename_fails_between(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = existing(tmp_path / "out")
        before = snapshot(out)
        rename = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if "staging" in self.name:
                raise OSError(28, "No space left on device")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(OutputError, match=r"out: cannot be put in place: No space left"):
            write_new(out, overwrite=True)
        monkeypatch.undo()
        assert snapshot(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("manifest", [None, "", "[]", '{"other": 1}', "folder", "link to nothing"])
    def test_a_folder_of_others_is_not_replaced(self, tmp_path: Path, manifest: str | None) -> None:
        out = existing(tmp_path / "out")
        (out / "dirmerge.json").unlink()
        if manifest == "folder":
            (out / "dirmerge.json").mkdir()
        elif manifest == "link to nothing":
            (out / "dirmerge.json").symlink_to("nothing")
        elif manifest is not None:
            (out / "dirmerge.json").write_text(manifest)
        before = snapshot(tmp_path)
        with pytest.raises(OutputError, match="was not written by dirmerge"):
            write_new(out, overwrite=True)
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize(
        ("place", "relation"),
        [
            ("out", "holds"),
            ("out/sub", "holds"),
            ("out/model.safetensors", "holds"),
            ("link", "holds"),
            ("links", "holds"),
            (".", "lies in"),
            ("link/../link", "holds"),
        ],
    )
    def test_protected_places_are_not_replaced(self, tmp_path: Path, place: str, relation: str) -> None:
        out = existing(tmp_path / "out")
        (tmp_path / "link").symlink_to("out")
        (tmp_path / "links").symlink_to("out/sub/notes.txt")
        before = snapshot(tmp_path)
        for spelling in (out, tmp_path / "link"):
            with pytest.raises(OutputError, match=f"{relation} the input"):
                OutputFolder(spelling, True, [tmp_path / "elsewhere", tmp_path / place])
        assert snapshot(tmp_path) == before

    def test_a_link_inside_is_protected_as_well_as_its_target(self, tmp_path: Path) -> None:
        out = existing(tmp_path / "out")
        (tmp_path / "weights").write_text("elsewhere")
        (out / "weights").symlink_to(tmp_path / "weights")
        with pytest.raises(OutputError, match="holds the input"):
            OutputFolder(out, True, [out / "weights"])

    @pytest.mark.parametrize("inside", [".", "sub"])
    def test_the_working_directory_is_not_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
    ) -> None:
        out = existing(tmp_path / "out")
        monkeypatch.chdir(out / inside)
        with pytest.raises(OutputError, match="holds the working directory"):
            OutputFolder(out, True)
        monkeypatch.chdir(tmp_path)
        write_new(out, overwrite=True)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_file_in_the_way(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(OutputError, match="out: is a file"):
            OutputFolder(tmp_path / "out", overwrite)
        with (
            pytest.raises(OutputError, match="cannot be written: Not a directory"),
            OutputFolder(tmp_path / "out/x"),
        ):
            pass
        assert (tmp_path / "out").read_text() == "mine"

    def test_path_only_while_open(self, tmp_path: Path) -> None:
        folder = OutputFolder(tmp_path / "out")
        with pytest.raises(ValueError, match="open only inside"):
            folder.path  # noqa: B018
        with folder:
            folder.commit()
            with pytest.raises(ValueError, match="open only inside"):
                folder.commit()


KILLED = """
import os, signal, sys
from pathlib import Path
from dirmerge.checkpoints import output
mode, out = sys.argv[1:]
rename, rmtree = Path.rename, output.shutil.rmtree
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "between":
    Path.rename = lambda self, target: die() if "staging" in self.name else rename(self, target)
if mode == "removing":
    output.shutil.rmtree = die
with output.OutputFolder(out, overwrite=True) as folder:
    (folder.path / "new.txt").write_text("new")
    if mode == "writing":
        die()
    if mode == "alive":
        print("ready", flush=True)
        sys.stdin.read()
    folder.commit()
"""


class TestKilled:
    def kill(self, mode: str, out: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, mode, str(out)], capture_output=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr

    def test_while_writing(self, tmp_path: Path) -> None:
        out = existing(tmp_path / "out")
        before = snapshot(out)
        self.kill("writing", out)
        assert snapshot(out) == before
        (left,) = [path.name for path in tmp_path.iterdir() if path.name != "out"]
        assert re.fullmatch(r"\.out\.dirmerge-staging-\d+-[0-9a-f]{8}", left)
        # what only looks similar stays: another output's, a file, a link, another tool's
        others = [
            ".other.dirmerge-staging-1-00000000",
            ".out.dirmerge-staging-1-0000000",
            "out.dirmerge-staging-1-00000000",
        ]
        for name in others:
            (tmp_path / name).mkdir()
            (tmp_path / name / ".dirmerge-lock").touch()
        (tmp_path / ".out.dirmerge-staging-1-00000001").write_text("a file")
        (tmp_path / ".out.dirmerge-staging-1-00000002").symlink_to(out)
        write_new(out, overwrite=True)
        names = {path.name for path in tmp_path.iterdir()}
        assert left not in names
        assert names == {
            "out", *others, ".out.dirmerge-staging-1-00000001", ".out.dirmerge-staging-1-00000002"
        }  # fmt: skip

    def test_between_the_renames(self, tmp_path: Path) -> None:
        out = existing(tmp_path / "out")
        before = snapshot(out)
        self.kill("between", out)
        assert not out.exists()
        with OutputFolder(out, overwrite=True):
            assert snapshot(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_between_the_renames_without_overwrite(self, tmp_path: Path) -> None:
        out = existing(tmp_path / "out")
        before = snapshot(out)
        self.kill("between", out)
        with pytest.raises(OutputError, match="exists and is not empty"), OutputFolder(out):
            pass
        assert snapshot(out) == before

    def test_while_removing_the_old_one(self, tmp_path: Path) -> None:
        out = existing(tmp_path / "out")
        self.kill("removing", out)
        assert [path.name for path in out.iterdir()] == ["new.txt"]
        # the half-removed one must never come back, even if the new one is gone
        (out / "new.txt").unlink()
        out.rmdir()
        write_new(out)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in out.iterdir()] == ["sub"]

    def test_before_the_lock(self, tmp_path: Path) -> None:
        (tmp_path / ".out.dirmerge-staging-1-00000000").mkdir()
        write_new(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_link_is_never_restored(self, tmp_path: Path) -> None:
        existing(tmp_path / "other")
        link = tmp_path / ".out.dirmerge-replaced-1-00000000"
        link.symlink_to("other")
        write_new(tmp_path / "out")
        assert link.is_symlink()
        assert not (tmp_path / "out").is_symlink()

    def test_living_process_is_left_alone(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, "alive", str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            (theirs,) = list(tmp_path.iterdir())
            before = snapshot(theirs)
            with OutputFolder(out) as folder:
                (folder.path / "dirmerge.json").write_text('{"dirmerge": "0.1.0"}')
                folder.commit()
            assert snapshot(theirs) == before
            process.stdin.close()
            assert process.wait() == 0
        finally:
            process.stdout.close()
            process.kill()
            process.wait()
        # they may overwrite, so theirs is there now, and nothing else
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in out.iterdir()] == ["new.txt"]
