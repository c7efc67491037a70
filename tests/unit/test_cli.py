"""What the command itself does: exit codes and the last line."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from caldpo_ray.cli import main


@pytest.fixture
def terminal() -> Iterator[None]:
    """SIGINT as in a terminal: these tests may run in a shell's background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_is_answered_at_once_and_is_exit_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[str] = []

    def interrupted(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            heard.append(capfd.readouterr().err)  # before anything is cleaned up
            raise

    monkeypatch.setattr("caldpo_ray.world.create_world", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["world", "create", str(tmp_path / "world")])
    assert stopped.value.code == 130
    assert "caldpo: stopping ..." in heard[0]
    assert "caldpo: interrupted; the same command resumes the run\ncaldpo: exit code 130" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_the_shell_ignores_stays_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("caldpo_ray.world.create_world", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["world", "create", str(tmp_path / "world")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 0 and "stopping" not in capfd.readouterr().err
