"""Writes the hashes of what continuous integration installs, for the versions in constraints.txt: `.ci/tools.lock`,
with which source archives are built, and `.ci/all.lock`. Asks a package index; the files are those for CPython 3.11 on
Linux x86-64, and source archives where there is nothing else.

    python .ci/lock.py INDEX [WHEEL ...]     the address of the index; files in place of its own: PyTorch's CPU build
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from urllib.request import Request, urlopen

HERE = Path(__file__).parent
TOOLS = ("setuptools", "wheel")
TAGS = re.compile(r"-(?:py3|py2\.py3|cp3\d+)-(?:none|abi3|cp311)-(?:any|manylinux\S*x86_64\S*)\.whl$")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(text):
    """{name: (version, marker)} of lines such as name==1.0; python_version >= "3.11"."""
    lines = [line.partition(";") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {canonical(pin.partition("==")[0]): (pin.partition("==")[2].strip(), mark.strip()) for pin, _, mark in lines}


def version_of(filename, name):
    stem = re.sub(r"\.(tar\.gz|zip|whl)$", "", filename)
    if filename.endswith(".whl"):
        return stem.split("-")[1]
    return stem[len(name) + 1 :] if canonical(stem).startswith(f"{name}-") else None


def hashes_of(index, name, version):
    request = Request(f"{index}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urlopen(request) as answer:
        files = [file for file in json.load(answer)["files"] if version_of(file["filename"], name) == version]
    wheels = [file for file in files if TAGS.search(file["filename"])]
    sources = [file for file in files if not file["filename"].endswith(".whl")]
    return [file["hashes"]["sha256"] for file in wheels or sources]


def entry(name, version, marker, found):
    if not found:
        sys.exit(f"{name}=={version}: the index has no file for CPython 3.11 on Linux x86-64")
    return " \\\n".join(
        [f"{name}=={version}{f'; {marker}' if marker else ''}", *(f"    --hash=sha256:{h}" for h in found)]
    )


def main(index, wheels):
    given = {}
    for path in map(Path, wheels):
        name, version = path.name.split("-")[:2]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        given.setdefault((canonical(name), version.partition("+")[0]), []).append(digest)
    pins = pinned((HERE.parent / "constraints.txt").read_text(encoding="utf-8"))
    entries = {
        name: entry(name, *pin, given.get((name, pin[0])) or sorted(hashes_of(index, name, pin[0])))
        for name, pin in sorted(pins.items())
    }
    head = "# Made from constraints.txt by .ci/lock.py.\n"
    (HERE / "all.lock").write_text(head + "\n".join(entries.values()) + "\n", encoding="utf-8")
    (HERE / "tools.lock").write_text(head + "\n".join(entries[name] for name in TOOLS) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1].rstrip("/"), sys.argv[2:])
