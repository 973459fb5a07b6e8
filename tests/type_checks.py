"""Has mypy (strict) and pyright read the files `typed_*.py`, against the package that an interpreter has installed.

    python tests/type_checks.py PYTHON     # for each checker and file: that errors are where they should be, and nowhere else

The checkers are those of the interpreter that runs this. They work in a folder that holds only the file: so they find the
package where a user's program finds it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = sorted(Path(__file__).parent.glob("typed_*.py"))
CHECKERS = ("mypy", "pyright")


def expected(file: Path) -> dict[int, str]:
    """The lines that must be errors, with words of mypy's message where the file states some."""
    found = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        marked = re.search(r"  # refused(?:: (.*))?$", line)
        if marked:
            found[number] = marked[1] or ""
    return found


def errors(checker: str, file: Path, python: str) -> dict[int, str]:
    """The messages of a checker, by line. Raises RuntimeError if it could not run, or found errors in another file."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(file, folder)
        command = [sys.executable, "-m", checker, *_options(checker, python), file.name]
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        found = _of_mypy(done.stdout) if checker == "mypy" else _of_pyright(done.stdout)
    if found is None or any(name != file.name for name, _, _ in found):
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    messages: dict[int, str] = {}
    for _, line, text in found:
        messages[line] = messages.get(line, "") + text
    return messages


def _options(checker: str, python: str) -> list[str]:
    if checker == "mypy":
        return ["--strict", "--python-executable", python, "--cache-dir", ".mypy_cache"]
    return ["--pythonpath", python, "--outputjson"]


def _of_mypy(text: str) -> list[tuple[str, int, str]] | None:
    if not re.search(r"^(Found \d+ error|Success)", text, re.M):
        return None
    return [(name, int(line), said) for name, line, said in re.findall(r"^(.*?):(\d+): error: (.*)", text, re.M)]


def _of_pyright(text: str) -> list[tuple[str, int, str]] | None:
    try:
        found = json.loads(text)["generalDiagnostics"]
    except ValueError:
        return None
    wrong = [one for one in found if one["severity"] == "error"]
    return [(Path(one["file"]).name, one["range"]["start"]["line"] + 1, one["message"]) for one in wrong]


def differences(checker: str, file: Path, python: str) -> list[str]:
    """What a checker says of a file and should not, and the reverse."""
    wanted, said = expected(file), errors(checker, file, python)
    lines = [f"{file.name}:{line}: {checker} accepts this line" for line in sorted(wanted.keys() - said.keys())]
    lines += [f"{file.name}:{line}: {checker}: {said[line]}" for line in sorted(said.keys() - wanted.keys())]
    if checker == "mypy":
        both = sorted(wanted.keys() & said.keys())
        lines += [f"{file.name}:{line}: mypy: {said[line]}" for line in both if wanted[line] not in said[line]]
    return lines


if __name__ == "__main__":
    python = sys.argv[1] if len(sys.argv) > 1 else sys.executable
    found = [line for file in FILES for checker in CHECKERS for line in differences(checker, file, python)]
    print("\n".join(found) or f"{len(FILES)} files, {' and '.join(CHECKERS)}: errors where they should be")
    sys.exit(bool(found))
