"""How much code one command runs through: the files and functions from its first line to its last.

    python scripts/tools/reading_path.py                    both commands, for the robustkit that is imported
    PYTHONPATH=OTHER python scripts/tools/reading_path.py   the same for the checkout OTHER

Counted with `sys.setprofile`, over functions defined in robustkit's files (attacks/ and defenses/ included):

* files, functions and classes that are entered, but for what an import runs;
* switches: calls from a function of one file to a function of another file; apart from these, the calls of
  `__torch_function__` that torch makes inside other files while a function mode counts layers, which no line
  of those files names;
* modules of robustkit that are loaded.

Then the size of the code: the largest files and functions, and the number of files in each folder.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

ROOMS = ("robustkit/", "attacks/", "defenses/")
COMMANDS = {
    "evaluate": "evaluate of 8 images of digits with pgd(steps=3)",
    "train": "train dverge on digits, 2 epochs",
}


class Trace:
    """The calls between functions of one package while `run` runs a command."""

    def __init__(self, root: Path) -> None:
        """Prepare to count calls of functions in files below `root`."""
        self.root = root
        self.files: dict[str, str | None] = {}
        self.functions: set[CodeType] = set()
        self.switches: Counter[tuple[str, str]] = Counter()
        self.by_torch = 0
        self.imports = 0

    def run(self, command: Callable[[], object]) -> None:
        """Run a command and count."""
        sys.setprofile(self._profile)
        try:
            command()
        finally:
            sys.setprofile(None)

    def _file(self, code: CodeType) -> str | None:
        """Return the file of code below the root, else None."""
        if code.co_filename not in self.files:
            path = Path(code.co_filename).resolve()
            name = str(path.relative_to(self.root)) if path.is_relative_to(self.root) else ""
            self.files[code.co_filename] = name if name.startswith(ROOMS) and path.is_file() else None
        return self.files[code.co_filename]

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_name == "<module>":
            # What an import runs is not read by who follows the command.
            self.imports += {"call": 1, "return": -1}.get(event, 0)
        if self.imports or event != "call" or (file := self._file(frame.f_code)) is None:
            return
        if not frame.f_code.co_name.startswith("<"):
            self.functions.add(frame.f_code)
        caller = frame.f_back and self._file(frame.f_back.f_code)
        if not caller or caller == file:
            return
        if frame.f_code.co_name == "__torch_function__":
            self.by_torch += 1
        else:
            self.switches[caller, file] += 1

    def summary(self) -> str:
        """Return the counts as one line."""
        names = {
            (code.co_filename, getattr(code, "co_qualname", code.co_name).rpartition(".")[0])
            for code in self.functions
        }
        classes = {(file, name) for file, name in names if name and "<locals>" not in name}
        files = {self._file(code) for code in self.functions}
        modules = [name for name in sys.modules if name.partition(".")[0] == "robustkit"]
        return (
            f"{len(files)} files, {len(self.functions)} functions, {self.switches.total()} switches "
            f"(and {self.by_torch} calls of function modes by torch), "
            f"{len(classes)} classes; {len(modules)} modules loaded"
        )


def evaluate() -> Callable[[], object]:
    """Return the evaluation, with its model and images at hand."""
    import torch

    import robustkit
    from robustkit.data import load_data

    samples = load_data("digits:test").head(8)
    images, labels = samples.images(range(8)), torch.from_numpy(samples.labels)
    model = robustkit.load_model("robustkit:digits-cnn")
    return lambda: robustkit.evaluate(model, images, labels, "linf:0.1", suite="pgd(steps=3)", device="cpu")


def train() -> Callable[[], object]:
    """Return the training, of the data by its name."""
    import robustkit

    def command() -> None:
        with tempfile.TemporaryDirectory() as folder:
            robustkit.train("dverge", data="digits:train", epochs=2, device="cpu", out=f"{folder}/run")

    return command


def sizes(root: Path) -> str:
    """Return lines with the largest files and functions, and the files in each folder."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True)
    names = [name for name in tracked.stdout.split() if name.startswith(ROOMS)]
    files, functions = Counter[str](), Counter[str]()
    for name in names:
        text = (root / name).read_text()
        files[name] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions[f"{name}:{node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    folders = Counter(str(Path(name).parent) for name in names)
    lines = ["largest files:     " + ", ".join(f"{name} {size}" for name, size in files.most_common(5))]
    lines += ["largest functions: " + ", ".join(f"{name} {size}" for name, size in functions.most_common(5))]
    lines += [f"{len(names)} files, {files.total()} lines; files in each folder:"]
    lines += [f"  {folder} {size}" for folder, size in sorted(folders.items())]
    return "\n".join(lines)


def main() -> None:
    """Print the counts of each command, each in a process of its own, and the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=COMMANDS, help="count this one in this process")
    parser.add_argument("--switches", type=int, default=0, help="also list so many pairs of files, most first")
    options = parser.parse_args()
    import robustkit

    root = Path(robustkit.__file__).resolve().parent.parent
    if options.command:
        command = {"evaluate": evaluate, "train": train}[options.command]()
        trace = Trace(root)
        trace.run(command)
        print(f"{COMMANDS[options.command]}: {trace.summary()}")
        for (caller, file), count in trace.switches.most_common(options.switches):
            print(f"  {count:5d}  {caller} -> {file}")
        return
    for name in COMMANDS:
        subprocess.run([sys.executable, __file__, "--command", name, *sys.argv[1:]], check=True)
    print(sizes(root))


if __name__ == "__main__":
    main()
