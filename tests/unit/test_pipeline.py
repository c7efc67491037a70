import subprocess
import sys
from pathlib import Path

import yaml

FULL_DISK = """
import resource, sys
from caldpo_ray.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # not one byte more, as on a full disk
main(["train", sys.argv[1]])
"""


def test_a_disk_that_takes_no_more_is_one_line_and_exit_3(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    values = {
        "run": {"output_dir": str(tmp_path / "runs")},
        "model": {"name_or_path": "m"},
        "data": {"train": "d.jsonl"},
    }
    config.write_text(yaml.safe_dump({**values, "objective": {"name": "sft"}}))
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(config)], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    told, code = done.stderr.splitlines()
    assert "cannot be written (File too large); make room there" in told and str(tmp_path / "runs") in told
    assert not list((tmp_path / "runs").rglob("*.*")), "no half-written file stays"
    assert code == "caldpo: exit code 3"
