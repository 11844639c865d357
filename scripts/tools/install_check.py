"""Install robustkit from a clone without symlinks and a plug-in package in a new environment, and use both.

    python scripts/tools/install_check.py > scripts/results/install_check.txt

The clone's links robustkit/attacks and robustkit/defenses are text files, as git writes them on Windows. The
plug-in package is that of docs/plugins.md. The new environment sees the dependencies that the present one has,
and nothing else: no network is needed. Takes about two minutes on 2 cores.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLONE = ("robustkit", "attacks", "defenses", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
SUITE = "'random-signs(queries=20),pgd(steps=5)' --no-html"
COMMANDS = (
    "robustkit --version",
    "robustkit list attacks",
    "robustkit list models",
    f"robustkit evaluate --limit 16 --suite {SUITE} --out one",
    f"robustkit evaluate --limit 16 --suite {SUITE} --out two --workers 2",
    "robustkit verify one",
    "robustkit evaluate 'stranger:64?num_classes=2' --data checks:test --threat linf:0.1 --suite fgsm --no-html",
    "robustkit evaluate 'robustkit:digits-cnn?defense=blur:3' --limit 16 --suite fgsm --no-html",
    "robustkit train smooth-labels --data digits:train --epochs 10 --out trained",
    "robustkit evaluate trained/ --data digits:test --limit 16 --suite fgsm --no-html",
)


def clone_without_links(to: Path) -> None:
    """Copy what the installation needs, its links as text files."""
    for name in CLONE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)
    for link in ("attacks", "defenses"):
        (to / "robustkit" / link).unlink()
        (to / "robustkit" / link).write_text(f"../{link}")


def stranger(to: Path) -> None:
    """Write the files of the package of docs/plugins.md."""
    to.mkdir()
    for text in re.findall(r"```\w+\n(# [\w.]+\.\w+\n.*?)```", (ROOT / "docs/plugins.md").read_text(), re.DOTALL):
        (to / text.partition("\n")[0][2:]).write_text(text)


def main() -> None:
    """Make the environment, install both, and print what the commands print."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "clone").mkdir()
        clone_without_links(place / "clone")
        stranger(place / "stranger")
        venv.create(place / "venv", with_pip=False)
        binaries = place / "venv" / "bin"
        packages = next((place / "venv").glob("lib/python*/site-packages"))
        # The dependencies of the present environment; of robustkit only what is installed below.
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        install = [str(binaries / "python"), "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-q"]
        for source in ("clone", "stranger"):
            subprocess.run([*install, str(place / source)], check=True, cwd=place, env={"PATH": str(binaries)})
        print(f"installed into a new environment: {sorted(one.name for one in packages.glob('*.dist-info'))}")
        work = place / "work"
        work.mkdir()
        for command in COMMANDS:
            print(f"\n$ {command}")
            done = subprocess.run(
                command,
                shell=True,
                cwd=work,
                env={"PATH": f"{binaries}:/usr/bin:/bin", "HOME": folder, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            lines = done.stdout.rstrip().splitlines()
            kept = [line for line in lines if "stranger" in line] if " list " in command else lines
            print("\n".join(line.rstrip() for line in kept).replace(folder, "…"))
            if done.returncode:
                sys.exit(f"exit code {done.returncode}: {done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
