"""``make gpu-wheels``: a folder with the packages that a bare image lacks, for a machine without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpucheck.needs import CARRIED, pins
from gpucheck.options import ROOT, UsageError

MOST = 30 * 1_000_000  # bytes; little can be carried to a machine beside the checkout


def make(folder: Path) -> str:
    """Fill ``folder`` with a wheel of every package to carry; if an index has only the source, the wheel is built.

    Returns:
        one line that describes the content of the folder.

    Raises:
        UsageError: pip cannot make the wheels, one is not plain Python, or all together exceed :data:`MOST` bytes.
    """
    wanted = pins(need.package for need in CARRIED)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--wheel-dir", str(folder), *wanted], check=False, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        raise UsageError(f"pip could not make the wheels ({said[0]}): `{' '.join(command)}` needs a network and pip")
    wheels = sorted(folder.glob("*.whl"))
    compiled = [wheel.name for wheel in wheels if not wheel.name.endswith("-none-any.whl")]
    if compiled:
        raise UsageError(f"{compiled[0]} holds compiled code, which another machine may not run: carry another version")
    size = sum(wheel.stat().st_size for wheel in wheels)
    if size > MOST:
        raise UsageError(f"the wheels in {folder} have {size / 1e6:.0f} MB, above the limit of {MOST / 1e6:.0f} MB")
    return f"{len(wheels)} wheels, {size / 1e6:.1f} MB, in {folder}"


def main() -> None:
    """Entry point; exits with 2 and one line if the wheels cannot be made."""
    try:
        line = make((ROOT / (sys.argv[1] if len(sys.argv) > 1 else "wheels")).resolve())
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
